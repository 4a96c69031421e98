"""Firmware hand-over and early boot: detection, in-place encryption, their order."""
