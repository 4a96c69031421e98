"""PCI configuration mechanism 1 with a host bridge and nothing else.

Source: PCI Local Bus specification 3.0, 3.2.2.3 (configuration) and 6.1 (header).
"""

from __future__ import annotations

ADDRESS, DATA = 0xCF8, 0xCFC
ENABLE = 1 << 31
WRITABLE = 0x80FF_FFFC
"""Bits 30 to 24, 1 and 0 of the latch are wired to 0."""
AMD, HOST_BRIDGE = 0x1022, 0x1450
CLASS_HOST_BRIDGE = 0x0600_0000
HEADER = {0x00: HOST_BRIDGE << 16 | AMD, 0x08: CLASS_HOST_BRIDGE}
"""Bytes of the header that are not 0, as 32-bit words."""


class PciHost:
    """The address latch and bus 0."""

    def __init__(self) -> None:
        self._address = 0

    def read_port(self, port: int, size: int) -> int:
        """Read the latch, 32 bits, or configuration space."""
        mask = (1 << 8 * size) - 1
        if port < DATA:
            return self._address if size == 4 else mask
        if not self._address & ENABLE or self._address >> 8 & 0xFFFF:
            return mask
        word = HEADER.get(self._address & 0xFC, 0)
        return word >> 8 * (port - DATA) & mask

    def write_port(self, port: int, value: int, size: int) -> None:
        """Set the latch by a 32-bit write; the bridge has nothing to set."""
        if port == ADDRESS and size == 4:
            self._address = value & WRITABLE

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {"address": self._address}

    def restore(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        self._address = int(state["address"])
