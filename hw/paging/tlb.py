"""The TLB: translations stay until software drops them.

A changed entry without a flush goes on translating the old way. Large pages are held
by 4 KiB piece; INVLPG drops all pieces of the page it hits.

Source: [APM2] 5.5 (Translation-Lookaside Buffer).
"""

from __future__ import annotations

from typing import NamedTuple

from ..types import PAGE_SHIFT
from .formats import Entry

_D, _G = int(Entry.D), int(Entry.G)

CAPACITY = 1 << 16
"""Pieces kept; beyond that the oldest goes, as in any TLB."""


class Translation(NamedTuple):
    """One 4 KiB piece of a leaf mapping.

    Attributes:
        pa: physical address of the piece, without the C-bit.
        slot: key slot that the leaf's C-bit selects.
        rights: effective rights, bit 0 writable, bit 1 user, bit 2 executable.
        shift: log2 of the leaf's size: 12, 21 or 30.
        entry: the leaf entry as the walk left it, C-bit and flags included.
    """

    pa: int
    slot: int
    rights: int
    shift: int
    entry: int

    @property
    def dirty(self) -> bool:
        """The leaf's D bit is set, so a store needs no walk."""
        return bool(self.entry & _D)

    @property
    def is_global(self) -> bool:
        """The leaf's G bit is set: it survives a write of CR3."""
        return bool(self.entry & _G)


class Tlb:
    """Virtual page number to `Translation`.

    Attributes:
        entries: the translations; look up with `va >> 12`.
    """

    def __init__(self) -> None:
        self.entries: dict[int, Translation] = {}
        self._pieces: dict[tuple[int, int], set[int]] = {}

    def insert(self, page: int, translation: Translation) -> int | None:
        """Keep a translation of virtual page `page`; return the page that had to go."""
        gone = None
        if len(self.entries) >= CAPACITY:
            gone = next(iter(self.entries))
            del self.entries[gone]
        self.entries[page] = translation
        if translation.shift != PAGE_SHIFT:
            large = (translation.shift, page >> translation.shift - PAGE_SHIFT)
            self._pieces.setdefault(large, set()).add(page)
        return gone

    def agrees_until(
        self, page: int, end: int, first: Translation, *, write: bool
    ) -> int:
        """Return the first of pages (page, end) that breaks the run, or `end`.

        Pages that the TLB does not hold agree; those it holds must translate frame
        after frame from `first`, the translation of `page`, with the same rights, and
        be dirty for a store.
        """
        entries = self.entries
        for other in sorted(entries.keys() & range(page + 1, end)):
            held = entries[other]
            if (
                held.pa != first.pa + (other - page << PAGE_SHIFT)
                or held.slot != first.slot
                or held.rights != first.rights
                or (write and not held.dirty)
            ):
                return other
        return end

    def drop(self, page: int) -> set[int]:
        """INVLPG: drop whatever translates `page`; return the pages dropped."""
        dropped = {page}
        for shift in (21, 30):
            dropped |= self._pieces.pop((shift, page >> shift - PAGE_SHIFT), set())
        for piece in dropped:
            self.entries.pop(piece, None)
        return dropped

    def flush(self, *, keep_global: bool) -> None:
        """Drop everything, or everything that is not global."""
        if keep_global:
            kept = {p: t for p, t in self.entries.items() if t.is_global}
            self.entries.clear()
            self._pieces.clear()
            for page, translation in kept.items():
                self.insert(page, translation)
        else:
            self.entries.clear()
            self._pieces.clear()
