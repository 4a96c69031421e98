"""The clock that all devices share: nanoseconds of virtual time, and timers."""

from __future__ import annotations

import heapq
from collections.abc import Callable

NEVER = 1 << 63
"""A deadline beyond any run."""


class Timer:
    """One callback at one moment; armed again it forgets the moment before."""

    def __init__(self, clock: VirtualClock, callback: Callable[[], None]) -> None:
        self.when: int | None = None
        self._order = 0  # of the entry in the heap that counts
        self._clock = clock
        self._callback = callback

    def arm(self, when: int) -> None:
        """Call back at `when`, nanoseconds; at once where that is past."""
        self.when = when
        self._clock._add(self, when)

    def disarm(self) -> None:
        """Call back no more."""
        self.when = None
        self._clock._settle()

    def _waits_as(self, order: int) -> bool:
        return self.when is not None and self._order == order

    def _fire(self) -> None:
        self.when = None
        self._callback()


class VirtualClock:
    """Time goes on only when somebody advances it; deadlines run in order.

    Attributes:
        now: nanoseconds since power-on.
        next_deadline: of the earliest timer, `NEVER` if none is armed.
    """

    def __init__(self) -> None:
        self.now = 0
        self.next_deadline = NEVER
        self._heap: list[tuple[int, int, Timer]] = []
        self._order = 0

    def timer(self, callback: Callable[[], None]) -> Timer:
        """Return a timer, not armed."""
        return Timer(self, callback)

    def advance_to(self, when: int) -> None:
        """Run every timer that is due by `when`, each at its own moment."""
        while self.next_deadline <= when:
            deadline, _, timer = heapq.heappop(self._heap)
            self.now = max(self.now, deadline)
            timer._fire()
            self._settle()
        self.now = max(self.now, when)

    def _add(self, timer: Timer, when: int) -> None:
        self._order += 1  # equal deadlines fire in the order they were armed
        timer._order = self._order
        heapq.heappush(self._heap, (when, self._order, timer))
        self._settle()

    def _settle(self) -> None:
        heap = self._heap
        while heap and not heap[0][2]._waits_as(heap[0][1]):
            heapq.heappop(heap)
        self.next_deadline = heap[0][0] if heap else NEVER
