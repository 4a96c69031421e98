"""The I/O port space: which device answers at which port."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from ..errors import CallerError

PORTS = 0x1_0000


class PortDevice(Protocol):
    """A device with I/O ports."""

    def read_port(self, port: int, size: int) -> int:
        """Return `size` bytes at `port`, little-endian."""

    def write_port(self, port: int, value: int, size: int) -> None:
        """Take `size` bytes at `port`."""


class PortSpace:
    """Routes IN and OUT; where nothing answers, all ones are read.

    Attributes:
        unclaimed: accesses that nothing answered, by port.
    """

    def __init__(self) -> None:
        self.unclaimed: Counter[int] = Counter()
        self._devices: dict[int, PortDevice] = {}

    def attach(self, first: int, last: int, device: PortDevice) -> None:
        """Let a device answer at ports first to last.

        Raises:
            CallerError: a port is taken, or there is no such port.
        """
        if not 0 <= first <= last < PORTS:
            raise CallerError(f"ports {first:#x} to {last:#x}: 0 to 0xffff expected")
        for port in range(first, last + 1):
            if port in self._devices:
                raise CallerError(f"port {port:#x} has a device already")
        self._devices.update(dict.fromkeys(range(first, last + 1), device))

    def read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        device = self._devices.get(port)
        if device is None:
            self.unclaimed[port] += 1
            return (1 << 8 * size) - 1
        return device.read_port(port, size)

    def write(self, port: int, value: int, size: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        device = self._devices.get(port)
        if device is None:
            self.unclaimed[port] += 1
        else:
            device.write_port(port, value, size)
