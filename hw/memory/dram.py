"""The DRAM cells: the bytes that a probe on the memory bus would read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ..arrays import Bytes
from ..types import LARGE_PAGE_SIZE, PAGE_SIZE, PhysAddr
from .sparse import PAGES_PER_REGION, SparseMemory


class Dram(SparseMemory):
    """Ciphertext where a key slot was used, plaintext elsewhere.

    Attributes:
        written_by: per page, the key slot that wrote it last plus 1, or 0 if none
            ever did; shape (pages,). Knowledge of tools: silicon keeps no such note.

    Source: white paper, "SME Concepts": data is enciphered on the way to DRAM.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.written_by = np.zeros(size // PAGE_SIZE, np.uint16)
        self._written = np.zeros(-(-size // LARGE_PAGE_SIZE), np.bool_)

    def mark_written(self, first_page: int, end_page: int, slot: int) -> None:
        """Note that pages received bytes under a key slot."""
        self.written_by[first_page:end_page] = slot + 1
        first = first_page // PAGES_PER_REGION
        self._written[first : -(-end_page // PAGES_PER_REGION)] = True

    def extents(self) -> Iterator[tuple[PhysAddr, Bytes]]:
        """Yield (address, bytes) of every 2 MiB region that was ever written."""
        for region in np.flatnonzero(self._written).tolist():
            start = region * LARGE_PAGE_SIZE
            yield PhysAddr(start), self.cells[start : start + LARGE_PAGE_SIZE]

    def count_pages(self) -> dict[int, int]:
        """Return how many pages each key slot wrote last, by slot."""
        counts: Counter[int] = Counter()
        for region in np.flatnonzero(self._written).tolist():
            start = region * PAGES_PER_REGION
            counts.update(self.written_by[start : start + PAGES_PER_REGION].tolist())
        return {mark - 1: count for mark, count in sorted(counts.items()) if mark}
