"""The devices of a PC: clock, interrupts, timers, serial port, power."""

from .clock import NEVER, Timer, VirtualClock
from .platform import Interrupts, Platform
from .ports import PortDevice, PortSpace

__all__ = [
    "NEVER",
    "Interrupts",
    "Platform",
    "PortDevice",
    "PortSpace",
    "Timer",
    "VirtualClock",
]
