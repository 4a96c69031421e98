"""The DRAM cells: the bytes that a probe on the memory bus would read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ..arrays import Bytes, Index
from ..types import LARGE_PAGE_SIZE, PAGE_SIZE, PhysAddr
from .line_store import runs
from .sparse import PAGES_PER_REGION, SparseMemory
from .state import DramState


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

    def state(self) -> DramState:
        """Return which cells hold what; the bytes themselves are `pages`.

        Cells that somebody changed in a 2 MiB region without a single
        `mark_written` are not seen.
        """
        regions = np.flatnonzero(self._written)
        words = self.pages.view(np.uint64)
        found = [np.empty(0, np.intp)]
        for first, end in runs(regions):
            first, end = first * PAGES_PER_REGION, end * PAGES_PER_REGION
            filled = np.bitwise_or.reduce(words[first:end], axis=1)
            found.append(np.flatnonzero(filled) + first)
        written_by = self.written_by[self._pages_of(regions)]
        return DramState(regions, written_by, np.concatenate(found))

    def restore(self, state: DramState) -> None:
        """Take over the marks of a state; the caller brings the bytes into `pages`."""
        self.written_by[:] = 0
        self.written_by[self._pages_of(state.regions)] = state.written_by
        self._written[:] = False
        self._written[state.regions] = True

    def count_region_pages(self, regions: Index) -> int:
        """Return how many pages lie in 2 MiB regions; the last may be a part."""
        return self._pages_of(regions).size

    def _pages_of(self, regions: Index) -> Index:
        pages = regions[:, None] * PAGES_PER_REGION + np.arange(PAGES_PER_REGION)
        return pages[pages < len(self.written_by)]

    def count_pages(self) -> dict[int, int]:
        """Return how many pages each key slot wrote last, by slot."""
        counts: Counter[int] = Counter()
        for region in np.flatnonzero(self._written).tolist():
            start = region * PAGES_PER_REGION
            counts.update(self.written_by[start : start + PAGES_PER_REGION].tolist())
        return {mark - 1: count for mark, count in sorted(counts.items()) if mark}
