"""A byte range as long as RAM that costs only the pages that are touched."""

from __future__ import annotations

import mmap

import numpy as np

from ..arrays import Bytes
from ..types import CACHE_LINE_SIZE, LARGE_PAGE_SIZE, PAGE_SIZE

MAP_NORESERVE = 0x4000
"""Linux's mmap flag; Python's mmap module does not name it in 3.11."""

PAGES_PER_REGION = LARGE_PAGE_SIZE // PAGE_SIZE


class SparseMemory:
    """Anonymous, contiguous, zero-filled on first touch.

    Attributes:
        size: length in bytes, a multiple of 4096.
        cells: all bytes, shape (size,).
        pages: the same bytes, shape (size / 4096, 4096).
        lines: the same bytes, shape (size / 64, 64).
    """

    def __init__(self, size: int) -> None:
        assert size > 0
        assert size % PAGE_SIZE == 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.size = size
        self._map = mmap.mmap(-1, size, flags=flags)
        self.cells: Bytes = np.frombuffer(self._map, np.uint8)
        self.pages = self.cells.reshape(-1, PAGE_SIZE)
        self.lines = self.cells.reshape(-1, CACHE_LINE_SIZE)
        regions = -(-size // LARGE_PAGE_SIZE)
        self._advised = np.zeros(regions, np.bool_)

    def expect_bulk(self, first_page: int, end_page: int) -> None:
        """Ask for 2 MiB host pages where a run is about to fill whole ones.

        Only regions inside the run are asked for: a lone page stays a lone page.
        """
        first = -(-first_page // PAGES_PER_REGION)
        end = end_page // PAGES_PER_REGION
        if first < end and not self._advised[first:end].all():
            self._advise(mmap.MADV_HUGEPAGE, first, end)

    def release(self, first_page: int, end_page: int) -> None:
        """Give the pages back to the host; they read as zeros again."""
        start, end = first_page * PAGE_SIZE, end_page * PAGE_SIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
        first = first_page // PAGES_PER_REGION
        last = -(-end_page // PAGES_PER_REGION)
        if self._advised[first:last].any():
            # Or a single byte touched later would bring 2 MiB back.
            self._advise(mmap.MADV_NOHUGEPAGE, first, last)

    def _advise(self, advice: int, first: int, end: int) -> None:
        """Advise about 2 MiB regions [first, end)."""
        self._advised[first:end] = advice == mmap.MADV_HUGEPAGE
        start = first * LARGE_PAGE_SIZE
        length = min(end * LARGE_PAGE_SIZE, self.size) - start
        self._map.madvise(advice, start, length)
