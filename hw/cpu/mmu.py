"""The MMU of one core: modes, TLB, page walks, and the views that spare both.

An access asks in three stages, each only where the one before has no answer: a view
of the page (nothing to check, nothing to account), the TLB, the page walk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ..errors import CbitError
from ..faults import GeneralProtection, PageFault
from ..memory import MemoryBus
from ..paging import (
    Access,
    AddressRules,
    Entry,
    Format,
    PageWalker,
    Protection,
    Tlb,
    Translation,
)
from ..paging.formats import INDEX_MASK
from ..types import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE

MAX_RETRIES = 16
"""A handler that claims success this often for one access has not cured it."""

WRITE = int(Access.WRITE)
USER = int(Access.USER)


class Run(NamedTuple):
    """A physically contiguous part of a virtual range, under one tag."""

    pa: int
    length: int
    slot: int


class Mmu:
    """Translates for one core.

    Args:
        bus: where page tables lie.
        on_fault: called with a failed translation; returns True if the cause is gone.

    Attributes:
        rules: which bits of an entry are address, C-bit, reserved.
        root: CR3.
        walker: reads page tables in this mode; None with paging off.
        user: accesses come from CPL 3.
        load_views, store_views: virtual page number to its 4096 bytes, for accesses
            that need no stage but this. Dropped whenever the mode, the TLB or a
            cache tag changes.
    """

    rules: AddressRules

    def __init__(self, bus: MemoryBus, on_fault: Callable[[PageFault], bool]) -> None:
        self.root = 0
        self.user = False
        self.load_views: dict[int, memoryview] = {}
        self.store_views: dict[int, memoryview] = {}
        self._bus = bus
        self._on_fault = on_fault
        self._tlb = Tlb()
        self.walker: PageWalker | None = None

    def enter(
        self, layout: Format | None, rules: AddressRules, protection: Protection
    ) -> None:
        """Change the mode; the TLB stays.

        Args:
            layout: format of the page tables, None with paging off.
            rules: as the attribute.
            protection: which rights an access needs.
        """
        self.rules = rules
        self.drop_views()
        self.walker = None
        if layout is not None:
            self.walker = PageWalker(self._bus, layout, rules, protection)

    def flush(self, *, keep_global: bool) -> None:
        """Drop the TLB, or what is not global in it."""
        self._tlb.flush(keep_global=keep_global)
        self.drop_views()

    def invlpg(self, va: int) -> None:
        """Drop the translations of the page that holds `va`, global or not."""
        for page in self._tlb.drop(va >> PAGE_SHIFT):
            self._drop_view(page)

    def _drop_view(self, page: int) -> None:
        self.load_views.pop(page, None)
        self.store_views.pop(page, None)

    def drop_views(self) -> None:
        """Forget views of pages: a mode or a translation changed."""
        self.load_views.clear()
        self.store_views.clear()

    def tags_changed(self) -> None:
        """Forget views of pages and of page tables: cached lines left."""
        self.drop_views()
        if self.walker is not None:
            self.walker.drop_views()

    def translate(self, va: int, access: int) -> Translation:
        """Return the translation of an access; fills the TLB.

        Args:
            va: any address.
            access: WRITE or FETCH of `Access`, or 0; USER is added here.

        Raises:
            PageFault: and nobody cured it.
            GeneralProtection: not canonical, or over 32 bits with paging off.
        """
        walker = self.walker
        if walker is None:
            if va >> 32:
                raise GeneralProtection(f"address {va:#x}: 32 bits with paging off")
            pa = va & -PAGE_SIZE
            slot = self._bus.slot_for(False)
            return Translation(pa, slot, 7, 32, int(Entry.A | Entry.D))
        if not (0 <= va < walker.low_end or walker.high_start <= va < 1 << 64):
            raise GeneralProtection(
                f"address {va:#x} is not canonical with {walker.format.name} paging"
            )
        if self.user:
            access |= USER
        page = va >> PAGE_SHIFT
        found = self._tlb.entries.get(page)
        if (
            found is not None
            and found.rights | access << 3 not in walker.refused
            and (not access & WRITE or found.dirty)
        ):
            return found
        # A refused or clean translation is walked again, as hardware does. Views show
        # the frame of the one that goes.
        if found is not None:
            self._drop_view(page)
        try:
            found = walker.walk(self.root, va, access)
        except PageFault as fault:
            found = self._walk_after(fault, va, access)
        gone = self._tlb.insert(page, found)
        if gone is not None:
            self._drop_view(gone)
        return found

    def walk(self, va: int, access: int) -> Translation:
        """Translate for a core that has a TLB of its own; this one is left alone.

        Args:
            va: any address.
            access: bits of `Access`, USER among them.

        Raises:
            PageFault: not mapped, or refused.
            GeneralProtection: as `translate`.
        """
        walker = self.walker
        if walker is None:
            return self.translate(va, access)
        if not (0 <= va < walker.low_end or walker.high_start <= va < 1 << 64):
            raise GeneralProtection(
                f"address {va:#x} is not canonical with {walker.format.name} paging"
            )
        return walker.walk(self.root, va, access)

    def probe(self, va: int) -> Translation:
        """Translate for a supervisor read that no handler sees and no TLB keeps.

        Raises:
            PageFault: not mapped, or not for the supervisor.
            GeneralProtection: as `translate`.
        """
        held = self._tlb.entries.get(va >> PAGE_SHIFT)
        if held is not None:
            return held
        walker = self.walker
        if walker is None or not walker.format.is_canonical(va):
            return self.translate(va, 0)
        return walker.walk(self.root, va, 0)

    def runs(self, va: int, length: int, access: int) -> Iterator[Run]:
        """Split [va, va + length) where the frame, the tag or the leaf ends.

        Small pages that map frame after frame come as one run.
        """
        while length > 0:
            leaf = self.translate(va, access)
            pa = leaf.pa | va & PAGE_OFFSET_MASK
            size = 1 << leaf.shift
            step = size - (va & size - 1)
            if length > step and leaf.shift == PAGE_SHIFT:
                step += self._more_pages(va, leaf, access, length - step)
            step = min(length, step)
            yield Run(pa, step, leaf.slot)
            va += step
            length -= step

    def _walk_after(self, fault: PageFault, va: int, access: int) -> Translation:
        """Let the handler cure the fault and walk again."""
        for _ in range(MAX_RETRIES):
            self.invlpg(va)
            if not self._on_fault(fault):
                raise fault
            assert self.walker is not None
            try:
                return self.walker.walk(self.root, va, access)
            except PageFault as again:
                fault = again
        raise CbitError(f"#PF at {va:#x}: still faulting after {MAX_RETRIES} retries")

    def _more_pages(self, va: int, leaf: Translation, access: int, length: int) -> int:
        """Return how many bytes behind the page of `va` may join its run."""
        assert self.walker is not None
        page = va >> PAGE_SHIFT
        end = page + 1 + (length + PAGE_SIZE - 1 >> PAGE_SHIFT)
        # What the TLB holds counts, stale or not.
        end = min(end, (page | INDEX_MASK) + 1)
        write = bool(access & WRITE)
        end = self._tlb.agrees_until(page, end, leaf, write=write)
        if end == page + 1:
            return 0
        if self.user:
            access |= USER
        root = self.root
        return self.walker.extend(root, va, leaf, access, end - page) - 1 << PAGE_SHIFT
