"""8254 interval timer at 40h, and the speaker port 61h that gates its channel 2.

Nothing ticks: counts are computed from the clock when they are read, and channel 0
has a timer for its next interrupt. Pulse n comes n / 1193182 s after a count was
written, rounded down to a nanosecond. A count takes effect at once, in mid-cycle too,
and counting is binary always.

Source: Intel 8254 data sheet (231164); port 61h: IBM PC/AT technical reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .clock import VirtualClock

HZ = 1_193_182
NANOSECONDS = 1_000_000_000
PERIODIC = (2, 3)
TRIGGERED = (1, 5)
"""Modes that wait for a rising edge of GATE."""
REFRESH_NS = 15_085
"""Half a period of the memory refresh that bit 4 of port 61h shows."""


def moment(pulses: int) -> int:
    """Return after how many nanoseconds that many input pulses have come."""
    return pulses * NANOSECONDS // HZ


class Channel:
    """One counter.

    Attributes:
        mode: 0 to 5.
        start: when counting began, nanoseconds; None if it has not.
        loaded: a count was written since the control word.
    """

    NUMBERS = ("mode", "access", "reload", "low")
    FLAGS = ("gate", "loaded", "read_high", "write_high")
    OPTIONAL = ("start", "latched", "latched_status", "frozen")

    def __init__(self, clock: VirtualClock) -> None:
        self.mode, self.access, self.reload = 3, 3, 0x1_0000
        self.start: int | None = None
        self.gate, self.loaded = True, False
        self.low = 0
        self.latched: int | None = None
        self.latched_status: int | None = None
        self.read_high = self.write_high = False
        self.frozen: int | None = None  # ticks gone by when the gate closed
        self._clock = clock

    def ticks(self) -> int:
        """Return input pulses since the count was loaded."""
        if self.start is None:
            return 0
        if self.frozen is not None:
            return self.frozen
        return ((self._clock.now - self.start + 1) * HZ - 1) // NANOSECONDS

    def count(self) -> int:
        """Return the counter as it stands, 16 bits."""
        ticks = self.ticks()
        if self.mode == 3:
            return self.reload - ticks * 2 % self.reload & 0xFFFE
        if self.mode == 2:
            return self.reload - ticks % self.reload & 0xFFFF
        return self.reload - ticks & 0xFFFF

    def output(self) -> bool:
        """Return OUT."""
        if self.start is None or (self.mode in PERIODIC and not self.gate):
            return self.mode != 0
        ticks = self.ticks()
        if self.mode in (0, 1):
            return ticks >= self.reload
        if self.mode == 3:
            return ticks % self.reload < (self.reload + 1) // 2
        if self.mode == 2:
            return ticks % self.reload != self.reload - 1
        return ticks != self.reload

    def program(self, value: int) -> None:
        """Take a control word's mode and access."""
        self.access = value >> 4 & 3
        mode = value >> 1 & 7
        self.mode = mode - 4 if mode > 5 else mode
        self.start = self.latched = self.latched_status = self.frozen = None
        self.loaded = False
        self.read_high = self.write_high = False

    def load(self, value: int) -> bool:
        """Take one byte of a count; tell whether it is complete."""
        if self.access == 3:
            if not self.write_high:
                self.low, self.write_high = value, True
                return False
            value, self.write_high = value << 8 | self.low, False
        elif self.access == 2:
            value <<= 8
        self.reload = value or 0x1_0000
        self.loaded = True
        if self.mode not in TRIGGERED:
            self.start = self._clock.now
            self.frozen = None if self.gate else 0
        return True

    def set_gate(self, high: bool) -> None:
        """Drive GATE: modes 0 and 4 pause, a rising edge restarts the others."""
        if high == self.gate:
            return
        self.gate = high
        if self.mode in TRIGGERED:
            if high and self.loaded:
                self.start = self._clock.now
        elif self.start is not None and not high:
            self.frozen = self.ticks()
        elif self.start is not None:
            gone = self.frozen or 0 if self.mode in (0, 4) else 0
            self.start = self._clock.now - moment(gone)
            self.frozen = None

    def latch(self) -> None:
        """Keep the count for reading."""
        if self.latched is None:
            self.latched = self.count()

    def latch_status(self) -> None:
        """Keep the status byte for reading."""
        if self.latched_status is None:
            null = not self.loaded
            self.latched_status = (
                self.output() << 7 | null << 6 | self.access << 4 | self.mode << 1
            )

    def read(self) -> int:
        """Return the next byte of status or count."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.count() if self.latched is None else self.latched
        if self.access == 3:
            high, self.read_high = self.read_high, not self.read_high
            if high:
                self.latched = None
            return value >> 8 if high else value & 0xFF
        self.latched = None
        return value >> 8 if self.access == 2 else value & 0xFF


class Pit:
    """The chip.

    Args:
        clock: the machine's time.
        line: drives IRQ 0.
    """

    def __init__(self, clock: VirtualClock, line: Callable[[bool], None]) -> None:
        self.channels = [Channel(clock) for _ in range(3)]
        self.channels[2].gate = False
        self._clock = clock
        self._line = line
        self._speaker = 0
        self._timer = clock.timer(self._tick)
        line(self.channels[0].output())

    def read_port(self, port: int, size: int) -> int:
        """A counter, or port 61h."""
        if port == 0x61:
            refresh = self._clock.now // REFRESH_NS & 1
            return self._speaker | refresh << 4 | self.channels[2].output() << 5
        if port == 0x43:
            return 0xFF
        return self.channels[port - 0x40].read()

    def write_port(self, port: int, value: int, size: int) -> None:
        """A count, the control word, or port 61h."""
        value &= 0xFF
        if port == 0x61:
            self._speaker = value & 0xF
            self.channels[2].set_gate(bool(value & 1))
        elif port == 0x43:
            self._control(value)
        elif self.channels[port - 0x40].load(value) and port == 0x40:
            self._schedule()

    def _control(self, value: int) -> None:
        number = value >> 6
        if number == 3:
            for index, channel in enumerate(self.channels):
                if value >> index + 1 & 1:
                    if not value & 0x20:
                        channel.latch()
                    if not value & 0x10:
                        channel.latch_status()
        elif not value >> 4 & 3:
            self.channels[number].latch()
        else:
            self.channels[number].program(value)
            if number == 0:
                self._timer.disarm()
                self._line(self.channels[0].mode != 0)

    def _schedule(self) -> None:
        """Arm the timer for the next rising edge of OUT 0."""
        channel = self.channels[0]
        self._timer.disarm()
        if channel.start is None:
            return
        if channel.mode in PERIODIC:
            edge = (channel.ticks() // channel.reload + 1) * channel.reload
        else:
            edge = channel.reload + (channel.mode == 4)  # low for one pulse
        self._line(channel.mode != 0)
        self._timer.arm(channel.start + moment(edge))

    def _tick(self) -> None:
        self._line(False)
        self._line(True)
        if self.channels[0].mode in PERIODIC:
            self._schedule()

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            "channels": [
                {
                    key: getattr(channel, key)
                    for key in Channel.NUMBERS + Channel.FLAGS + Channel.OPTIONAL
                }
                for channel in self.channels
            ],
            "speaker": self._speaker,
            "timer": self._timer.when,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        for channel, saved in zip(self.channels, state["channels"], strict=True):
            for key in Channel.NUMBERS:
                setattr(channel, key, int(saved[key]))
            for key in Channel.FLAGS:
                setattr(channel, key, bool(saved[key]))
            for key in Channel.OPTIONAL:
                value = saved[key]
                setattr(channel, key, None if value is None else int(value))
        self._speaker = int(state["speaker"])
        self._timer.disarm()
        if state["timer"] is not None:
            self._timer.arm(int(state["timer"]))
