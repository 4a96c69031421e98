"""The guest's time: executed code, what accesses cost, and what HLT skips.

Between two looks at the clock the guest runs a slice: until its next timer, at most
`LONGEST_SLICE_NS`. With `wall_clock` the host's time takes the place of the code's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ..devices import VirtualClock
from .block_clock import BlockClock
from .engine import Engine

SHORTEST_TSC_NS, LONGEST_TSC_NS = 16, 2_048
"""What reading the time-stamp counter costs, first and at most."""

POLLING_NS = 64
"""Two readings with no more code than this between them are a delay loop."""

LONGEST_SLICE_NS = 4_000_000
"""How long code may run before the host is looked at: time-out, input, signals."""

LONGEST_NAP = 0.05
"""Seconds that HLT sleeps at a time when time is the host's."""


class GuestTime:
    """Keeps a machine's clock in step with the code that runs.

    Args:
        engine: gets the block hook.
        leaving_address: see `BlockClock`.
        clock: of the devices; nanoseconds.
        slice_over: called between two blocks when a slice has run; ends in `new_slice`.
        wall_clock: time is the host's.

    Attributes:
        block_clock: counts the executed code.
    """

    def __init__(
        self,
        engine: Engine,
        leaving_address: int,
        clock: VirtualClock,
        slice_over: Callable[[], None],
        *,
        wall_clock: bool,
    ) -> None:
        self.block_clock = BlockClock(engine, leaving_address, slice_over)
        self._clock = clock
        self._skipped = 0
        self._slice_end = 0
        self._tsc_read, self._tsc_cost, self._tsc_offset = 0, SHORTEST_TSC_NS, 0
        self._host_start = time.monotonic_ns() if wall_clock else None

    def sync(self) -> int:
        """Bring the clock to now, run the timers that are due; return the time.

        A timer expires at the start of a block, whose code an interrupt may put off:
        until the count of code is there again, the clock stands still.
        """
        clock = self._clock
        now = max(self._now(), clock.now)
        if now >= clock.next_deadline:
            clock.advance_to(now)
        else:
            clock.now = now
        return now

    def _now(self) -> int:
        if self._host_start is not None:
            return self._skipped + time.monotonic_ns() - self._host_start
        return self._skipped + self.block_clock.now

    def new_slice(self) -> None:
        """Let code run until the next timer, or for the longest slice."""
        now = self._now()
        length = min(max(self._clock.next_deadline - now, 1), LONGEST_SLICE_NS)
        self._slice_end = now + length
        self.block_clock.start_slice(length)

    def shorten_slice(self) -> None:
        """Begin a new slice if a timer was armed within this one."""
        if self._clock.next_deadline < self._slice_end:
            self.new_slice()

    def skip_to_next_timer(self) -> None:
        """Let the time until the next timer pass, or with the host's a part of it."""
        clock = self._clock
        if self._host_start is not None:
            wait = clock.next_deadline - clock.now
            time.sleep(min(wait / 1e9, LONGEST_NAP))
            self.sync()
        else:
            now = clock.next_deadline
            self._skipped = now - self.block_clock.now
            clock.advance_to(now)

    def read_tsc(self) -> int:
        """Return the counter; a guest that does nothing but poll it waits faster.

        Delay loops read the counter until enough time has gone by. Each reading that
        follows another at once takes twice as long, up to a limit that still is exact
        enough for them.
        """
        now = self.sync()
        if now - self._tsc_read < POLLING_NS + self._tsc_cost:
            self._tsc_cost = min(2 * self._tsc_cost, LONGEST_TSC_NS)
        else:
            self._tsc_cost = SHORTEST_TSC_NS
        self._tsc_read = now
        self.block_clock.charge(self._tsc_cost)
        return now + self._tsc_offset & (1 << 64) - 1

    def write_tsc(self, value: int) -> None:
        """Set the counter, as WRMSR does; the clock goes on."""
        self._tsc_offset = value - self.sync()

    def state(self) -> list[int]:
        """Return the state, for JSON."""
        total = self.block_clock.total
        tsc = [self._tsc_read, self._tsc_cost, self._tsc_offset]
        return [self._skipped, total, *tsc]

    def restore(self, state: list[int]) -> None:
        """Set what `state` returned."""
        skipped, executed, tsc_read, tsc_cost, tsc_offset = map(int, state)
        self._skipped, self.block_clock.executed = skipped, executed
        self._tsc_read, self._tsc_cost = tsc_read, tsc_cost
        self._tsc_offset = tsc_offset
