"""What travels between line stores and DRAM, through the engine of the slot."""

from __future__ import annotations

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
        dram, data = self._dram, store.data
        whole, lines = _by_size(pages, masks)
        for units, source, target in (
            (whole, dram.pages, data.pages),
            (lines, dram.lines, data.lines),
        ):
            if not units.size:
                continue
            if store.slot == SLOT_NONE:
                _copy_units(units, source, target)
            else:
                engine = self._controller.engine(store.slot)
                engine.decrypt_units(units, source, target)

    def write_back(self, store: LineStore, pages: Index, masks: Words) -> None:
        """Take the lines that the masks of the pages name to DRAM."""
        dram, data = self._dram, store.data
        whole, lines = _by_size(pages, masks)
        for first, end in runs(whole):
            dram.expect_bulk(first, end)
        for units, source, target in (
            (whole, data.pages, dram.pages),
            (lines, data.lines, dram.lines),
        ):
            if not units.size:
                continue
            if store.slot == SLOT_NONE:
                _copy_units(units, source, target)
            else:
                engine = self._controller.engine(store.slot)
                engine.encrypt_units(units, source, target)
        for first, end in runs(pages[masks != 0]):
            dram.mark_written(first, end, store.slot)


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
