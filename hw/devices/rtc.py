"""MC146818 clock and CMOS memory at 70h and 71h.

The date is a start date plus the machine's time, so that runs repeat. Alarm, periodic
and update interrupts are not modelled; their enable bits read back.

Source: Motorola MC146818A data sheet; memory sizes: PC firmware's use of bytes 15h to
18h, 30h to 35h.
"""

from __future__ import annotations

import time
from typing import Any

from ..memory import MemoryMap
from .clock import VirtualClock

SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR = 0, 2, 4, 6, 7, 8, 9
A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
CENTURY = 0x32
SET, BINARY, HOURS_24 = 0x80, 0x04, 0x02
VALID = 0x80
UPDATE_NS = 244_000
"""The last 244 us of a second: update in progress."""
DEFAULT_EPOCH = 1_704_067_200
"""2024-01-01T00:00:00Z, in seconds since 1970."""


class Rtc:
    """The chip.

    Args:
        clock: the machine's time.
        memory_map: for the sizes that firmware stores.
        epoch: the date at power-on, seconds since 1970.
    """

    def __init__(
        self, clock: VirtualClock, memory_map: MemoryMap, epoch: int = DEFAULT_EPOCH
    ) -> None:
        self._clock = clock
        self._epoch = epoch
        self._index = 0
        self._cells = bytearray(128)
        self._cells[A], self._cells[B] = 0x26, HOURS_24
        below_4g = max(r.end for r in memory_map.ram() if r.end <= 1 << 32)
        above_4g = sum(r.end - r.start for r in memory_map.ram() if r.end > 1 << 32)
        extended = min(below_4g - (1 << 20) >> 10, 0xFFFF)
        beyond_16m = max(below_4g - (16 << 20), 0) >> 16
        for at, value in (
            (0x15, 640),
            (0x17, extended),
            (0x30, extended),
            (0x34, min(beyond_16m, 0xFFFF)),
        ):
            self._cells[at : at + 2] = value.to_bytes(2, "little")
        self._cells[0x5B:0x5E] = (above_4g >> 16).to_bytes(3, "little")

    def read_port(self, port: int, size: int) -> int:
        """Read the chosen cell; the index itself reads all ones."""
        if port & 1 == 0:
            return 0xFF
        index = self._index
        date = time.gmtime(self._epoch + self._clock.now // 1_000_000_000)
        fields = {
            SECONDS: date.tm_sec,
            MINUTES: date.tm_min,
            HOURS: self._hours(date.tm_hour),
            WEEKDAY: (date.tm_wday + 1) % 7 + 1,
            DAY: date.tm_mday,
            MONTH: date.tm_mon,
            YEAR: date.tm_year % 100,
            CENTURY: date.tm_year // 100,
        }
        if index in fields:
            value = fields[index]
            afternoon = value & 0x80
            value &= 0x7F
            if not self._cells[B] & BINARY:
                value = value // 10 << 4 | value % 10
            return value | afternoon
        if index == A:
            updating = self._clock.now % 1_000_000_000 >= 1_000_000_000 - UPDATE_NS
            updating = updating and not self._cells[B] & SET
            return self._cells[A] & 0x7F | updating << 7
        if index == C:
            return 0
        if index == D:
            return VALID
        return self._cells[index]

    def write_port(self, port: int, value: int, size: int) -> None:
        """Choose a cell, or write it; the date cannot be set."""
        if port & 1 == 0:
            self._index = value & 0x7F
        elif self._index not in (C, D):
            self._cells[self._index] = value & 0xFF

    def _hours(self, hour: int) -> int:
        if self._cells[B] & HOURS_24:
            return hour
        return (hour % 12 or 12) | 0x80 * (hour >= 12)

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            "index": self._index,
            "cells": self._cells.hex(),
            "epoch": self._epoch,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        cells = bytearray.fromhex(state["cells"])
        if len(cells) != len(self._cells):
            raise ValueError(f"{len(cells)} CMOS cells, not {len(self._cells)}")
        self._index, self._epoch = int(state["index"]), int(state["epoch"])
        self._cells = cells
