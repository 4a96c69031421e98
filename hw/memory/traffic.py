"""What travels between line stores and DRAM, through the engine of the slot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..arrays import Bytes, Flags, Index, Words
from .controller import SLOT_NONE, MemoryController
from .dram import Dram
from .line_store import ALL, LineStore, masks_to_lines, runs


class Traffic:
    """Fills and write-backs: whole pages as pages, the rest line by line.

    Args:
        dram: the cells.
        controller: gives the engine of a slot.
    """

    def __init__(self, dram: Dram, controller: MemoryController) -> None:
        self._dram = dram
        self._controller = controller

    def fill(self, store: LineStore, pages: Index, masks: Words) -> None:
        """Bring the lines that the masks of the pages name into the store."""
        for units, cells, cached in self._places(store, pages, masks):
            if store.slot == SLOT_NONE:
                _copy_units(units, cells, cached)
            else:
                self._controller.engine(store.slot).decrypt_units(units, cells, cached)

    def write_back(self, store: LineStore, pages: Index, masks: Words) -> None:
        """Take the lines that the masks of the pages name to DRAM."""
        for units, cells, cached in self._places(store, pages, masks):
            if cells is self._dram.pages:
                for first, end in runs(units):
                    self._dram.expect_bulk(first, end)
            if store.slot == SLOT_NONE:
                _copy_units(units, cached, cells)
            else:
                self._controller.engine(store.slot).encrypt_units(units, cached, cells)
        for first, end in runs(pages[masks != 0]):
            self._dram.mark_written(first, end, store.slot)

    def _places(
        self, store: LineStore, pages: Index, masks: Words
    ) -> Iterator[tuple[Index, Bytes, Bytes]]:
        """Yield units with their rows in DRAM and in the store, pages before lines."""
        whole, lines = _by_size(pages, masks)
        if whole.size:
            yield whole, self._dram.pages, store.data.pages
        if lines.size:
            yield lines, self._dram.lines, store.data.lines


def contested_lines(
    dirty: list[tuple[LineStore, Index]],
) -> list[tuple[int, list[int]]]:
    """Return the lines that are dirty under two tags or more, with the tags.

    Args:
        dirty: stores with their dirty pages.
    """
    if len(dirty) < 2:
        return []
    tags: dict[int, list[int]] = {}
    pages, counts = np.unique(
        np.concatenate([pages for _, pages in dirty]), return_counts=True
    )
    shared = pages[counts > 1]
    for store, _ in dirty:
        for line in masks_to_lines(shared, store.dirty[shared]).tolist():
            tags.setdefault(line, []).append(store.slot)
    return [(line, slots) for line, slots in tags.items() if len(slots) > 1]


def _by_size(pages: Index, masks: Words) -> tuple[Index, Index]:
    """Split into whole pages and single lines."""
    whole: Flags = masks == ALL
    if whole.all():
        return pages, pages[:0]
    return pages[whole], masks_to_lines(pages[~whole], masks[~whole])


def _copy_units(units: Index, source: Bytes, target: Bytes) -> None:
    for first, end in runs(units):
        target[first:end] = source[first:end]
