"""The cached plaintext of one key slot, with valid, dirty and stale bits per line."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..arrays import Index, Words
from ..errors import CallerError
from ..types import LARGE_PAGE_SIZE, LINES_PER_PAGE, PAGE_SIZE
from .sparse import PAGES_PER_REGION, SparseMemory
from .state import LineStoreState

ALL_LINES = (1 << LINES_PER_PAGE) - 1
"""A page's 64 lines fill one 64-bit word: bit n is the line at 64 * n."""

ALL = np.uint64(ALL_LINES)


class LineStore:
    """Lines tagged (address, slot); data[a] is meaningful where `valid` says so.

    Attributes:
        slot: the key slot.
        data: plaintext, as long as RAM.
        valid, dirty: bit per line, shape (pages,).
        stale: valid lines that another tag has overwritten since (incoherent parts).
    """

    def __init__(self, slot: int, size: int) -> None:
        pages = size // PAGE_SIZE
        self.slot = slot
        self.data = SparseMemory(size)
        self.valid: Words = np.zeros(pages, np.uint64)
        self.dirty: Words = np.zeros(pages, np.uint64)
        self.stale: Words = np.zeros(pages, np.uint64)
        # Plain integers for the one-page paths: numpy scalars cost three times more.
        self.valid_word = self.valid.data
        self.dirty_word = self.dirty.data
        self.stale_word = self.stale.data
        self._used = np.zeros(-(-size // LARGE_PAGE_SIZE), np.bool_)

    def mark_used(self, first: int, end: int) -> None:
        """Note that pages [first, end) hold lines, so that searches look there."""
        self._used[first // PAGES_PER_REGION : -(-end // PAGES_PER_REGION)] = True

    def pages_with(self, words: Words) -> Index:
        """Return the pages whose word is not 0, ascending; cost follows use."""
        found = [
            np.flatnonzero(words[start : start + PAGES_PER_REGION]) + start
            for start in (np.flatnonzero(self._used) * PAGES_PER_REGION).tolist()
        ]
        return np.concatenate(found) if found else np.empty(0, np.intp)

    def invalidate(self, pages: Index) -> None:
        """Drop all lines of the pages, written back or not."""
        self.valid[pages] = 0
        self.dirty[pages] = 0
        self.stale[pages] = 0
        for first, end in runs(pages):
            if end - first >= PAGES_PER_RELEASE:
                self.data.release(first, end)

    def forget_all(self) -> None:
        """Drop every line, written back or not."""
        self.invalidate(self.pages_with(self.valid))
        self._used[:] = False

    def state(self) -> LineStoreState:
        """Return which lines are held; the bytes themselves are `data`."""
        pages = self.pages_with(self.valid)
        return LineStoreState(
            pages, self.valid[pages], self.dirty[pages], self.stale[pages]
        )

    def restore(self, state: LineStoreState) -> None:
        """Hold the lines of a state; the caller brings their bytes into `data`.

        Raises:
            CallerError: a line is dirty or stale and not valid.
        """
        if ((state.dirty | state.stale) & ~state.valid).any():
            raise CallerError(f"key slot {self.slot}: lines dirty or stale, not valid")
        self.forget_all()
        self.valid[state.pages] = state.valid
        self.dirty[state.pages] = state.dirty
        self.stale[state.pages] = state.stale
        self._used[state.pages // PAGES_PER_REGION] = True


def stale_lines(stores: Iterable[LineStore]) -> Index:
    """Return the lines (address / 64) that are stale in any store, ascending."""
    found = [masks_to_lines(*_with_masks(store)) for store in stores]
    return np.unique(np.concatenate([np.empty(0, np.intp), *found]))


def _with_masks(store: LineStore) -> tuple[Index, Words]:
    pages = store.pages_with(store.stale)
    return pages, store.stale[pages]


PAGES_PER_RELEASE = 64
"""Runs from this length up go back to the host: a system call is worth 256 KiB."""


def runs(pages: Index) -> list[tuple[int, int]]:
    """Return ascending page numbers as half-open runs."""
    if not pages.size:
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    firsts = pages[np.concatenate(([0], breaks))]
    lasts = pages[np.concatenate((breaks - 1, [pages.size - 1]))]
    return [
        (first, last + 1)
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]


def masks_to_lines(pages: Index, masks: Words) -> Index:
    """Return the line numbers (address / 64) that the masks of the pages name."""
    bits = np.unpackbits(
        masks.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little"
    )
    which, line = np.nonzero(bits)
    return pages[which] * LINES_PER_PAGE + line


def lines_to_masks(lines: list[int]) -> tuple[Index, Words]:
    """Return pages and masks that name the lines: `masks_to_lines` the other way."""
    pages, which = np.unique(np.array(lines) // LINES_PER_PAGE, return_inverse=True)
    masks = np.zeros(pages.size, np.uint64)
    bits = np.uint64(1) << (np.array(lines) % LINES_PER_PAGE).astype(np.uint64)
    np.bitwise_or.at(masks, which, bits)
    return pages, masks
