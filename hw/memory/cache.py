"""The caches: plaintext lines tagged (address, key slot) in front of DRAM.

The cache is the plaintext, DRAM is the ciphertext, and bytes pass the AES engine only
when they travel between the two: at a fill, a write-back, a flush. There is no
capacity: a line stays until it is flushed, evicted on request, or claimed by another
tag on a coherent part. Every such state is one that silicon may be in.

Coherent parts (CPUID 8000_001F EAX[10]): an access through one tag first writes back
and drops the same bytes of every other tag; whole pages are the unit.

Incoherent parts: no such snoop. Lines of different tags for one address live side by
side; a stale line is returned as it is, and of two dirty ones the later write-back
wins, in an order drawn from the seed.

Source: [APM2] 15.34.7; Linux 6.1.192 arch/x86/kernel/process.c, stop_this_cpu().
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np

from ..arrays import Bytes, Index, Words
from ..trace import Trace
from ..types import (
    CACHE_LINE_SIZE,
    PAGE_SHIFT,
    PAGE_SIZE,
    PhysAddr,
    align_up,
)
from .controller import SLOT_NONE, MemoryController
from .dram import Dram
from .hazard import Hazard, HazardError, HazardPolicy
from .line_store import (
    ALL,
    ALL_LINES,
    PAGES_PER_RELEASE,
    LineStore,
    lines_to_masks,
    masks_to_lines,
    runs,
    stale_lines,
)
from .sparse import SparseMemory
from .state import CacheState
from .traffic import Traffic, contested_lines

STRETCH_PAGES = 2048
"""Pages that a large flush writes back before it gives their host memory back."""


def line_mask(start: int, end: int) -> int:
    """Return the lines that bytes [start, end) of a page touch, as a 64-bit mask."""
    first = start // CACHE_LINE_SIZE
    count = -(-end // CACHE_LINE_SIZE) - first
    return ((1 << count) - 1) << first


def covered_mask(start: int, end: int) -> int:
    """Return the lines that bytes [start, end) of a page cover from end to end."""
    first = -(-start // CACHE_LINE_SIZE)
    count = end // CACHE_LINE_SIZE - first
    return ((1 << count) - 1) << first if count > 0 else 0


class CacheHierarchy:
    """All caches of the machine as one.

    Args:
        dram: the cells behind.
        controller: gives the engine of a slot.
        coherent: whether the part keeps tags coherent by itself.
        random_source: decides the order of conflicting write-backs and evictions.
        hazards: record, or raise at the access.
        trace: receives `tag-change`, `flush` and `hazard`.

    Attributes:
        hazards_met: every hazard so far, in order.
        tag_changes: pages that passed from one tag to another.
        readable: views that `page_view` gave for loads, by address of the page | slot
            (slots end near 1000); for those who cannot afford the call.
    """

    def __init__(
        self,
        dram: Dram,
        controller: MemoryController,
        *,
        coherent: bool,
        random_source: random.Random,
        hazards: HazardPolicy,
        trace: Trace,
    ) -> None:
        self.coherent = coherent
        self.hazards_met: list[Hazard] = []
        self.tag_changes = 0
        self._dram = dram
        self._traffic = Traffic(dram, controller)
        self._random = random_source
        self._policy = hazards
        self._trace = trace
        self._stores: dict[int, LineStore] = {}
        # The tag that touched a page last, plus 1; on coherent parts its only owner.
        self._owner = np.zeros(dram.size >> PAGE_SHIFT, np.uint16)
        self._owner_word = self._owner.data
        # Incoherent parts: by line, the tag that stored to it last.
        marks = SparseMemory(align_up(dram.size // CACHE_LINE_SIZE * 2, PAGE_SIZE))
        self._last_writer = marks.cells.view(np.uint16)
        self.readable: dict[int, memoryview] = {}
        self._view_holders: list[Callable[[], None]] = []

    # Accesses

    def claim(
        self,
        slot: int,
        pa: int,
        length: int,
        *,
        write: bool = False,
        overwrite: bool = False,
    ) -> Bytes:
        """Bring bytes into the cache under a tag and return them as a live view.

        The view is valid until the next call of any method of this object.

        Args:
            slot: key slot of the access.
            pa: physical address; [pa, pa + length) lies in RAM.
            length: bytes, 1 or more.
            write: mark the lines dirty; the caller stores into the view.
            overwrite: the caller stores every byte, so lines that are covered from
                end to end need not be filled first.

        Raises:
            HazardError: an undefined access, under `HazardPolicy.RAISE`.
        """
        store = self._store(slot)
        first = pa >> PAGE_SHIFT
        start = pa & (PAGE_SIZE - 1)
        end = start + length
        if end <= PAGE_SIZE:
            self._claim_page(store, first, start, end, write, overwrite)
        else:
            self._claim_run(store, first, start, end, write, overwrite)
        if write and not self.coherent:
            end_line = -(-(pa + length) // CACHE_LINE_SIZE)
            self._last_writer[pa // CACHE_LINE_SIZE : end_line] = slot
        return store.data.cells[pa : pa + length]

    def stream(self, slot: int, pa: int, length: int) -> Bytes:
        """Return bytes for one long read, as `claim`, cached only where they must be.

        Plain bytes that no cache holds are shown where they lie, in DRAM: long reads
        do not stay cached on silicon either.
        """
        store = self._store(slot)
        first = pa >> PAGE_SHIFT
        end = (pa + length - 1 >> PAGE_SHIFT) + 1
        if (
            slot != SLOT_NONE
            or end - first < PAGES_PER_RELEASE
            or store.valid[first:end].any()
        ):
            return self.claim(slot, pa, length)
        if (self._owner[first:end] != slot + 1).any():
            self._change_hands(store, first, end)
        if not self.coherent:
            touched = np.full(end - first, ALL)
            touched[0] = line_mask(pa % PAGE_SIZE, PAGE_SIZE)
            touched[-1] = line_mask(0, pa + length - (end - 1 << PAGE_SHIFT))
            self._check_hazards(store, first, touched, touched, write=False)
        return self._dram.cells[pa : pa + length]

    def page_view(self, slot: int, page: int, *, write: bool) -> memoryview | None:
        """Return a page's 4096 bytes if plain accesses need no bookkeeping now.

        The view holds until the holders registered with `hold_views` are called.
        For writes every line must be dirty already; None says: use `claim`.
        """
        start = page << PAGE_SHIFT
        view = self.readable.get(start | slot)
        if write or view is None:
            if not self._is_plain(slot, page, write):
                return None
            data = self._stores[slot].data.cells.data
            view = self.readable[start | slot] = data[start : start + PAGE_SIZE]
        return view

    def _is_plain(self, slot: int, page: int, write: bool) -> bool:
        """Tell whether every access to the page is a hit that changes no state."""
        store = self._stores.get(slot)
        if store is None or page >= len(self._owner_word):  # devices lie above RAM
            return False
        if self._owner_word[page] != slot + 1:
            return False
        if store.valid_word[page] != ALL_LINES:
            return False
        if write and store.dirty_word[page] != ALL_LINES:
            return False
        if self.coherent:
            return True
        return not store.stale_word[page] and not any(
            other.valid_word[page] if write else other.dirty_word[page]
            for other in self._stores.values()
            if other is not store
        )

    def line_store(self, slot: int) -> LineStore:
        """Return the lines of a slot, for a core that maps them; made on first use."""
        return self._store(slot)

    def owner_words(self) -> memoryview:
        """Return, per page, the tag that touched it last plus 1; 0 for none."""
        return self._owner_word

    def page_is_plain(self, slot: int, page: int, *, write: bool) -> bool:
        """Tell whether every access to the page is a hit that changes no state."""
        return self._is_plain(slot, page, write)

    def others_hold(self, slot: int, first: int, end: int) -> bool:
        """Tell whether another tag has valid lines in pages [first, end)."""
        return any(
            bool(other.valid[first:end].any())
            for other in self._stores.values()
            if other.slot != slot
        )

    def hold_views(self, drop: Callable[[], None]) -> None:
        """Call `drop` whenever views given by `page_view` become invalid."""
        self._view_holders.append(drop)

    def release_views(self, drop: Callable[[], None]) -> None:
        """Call `drop` no more."""
        self._view_holders.remove(drop)

    # Flushes

    def write_back_invalidate(self) -> None:
        """WBINVD: write back every dirty line, then drop everything."""
        if self._trace.active:
            self._trace.emit("flush", what="wbinvd")
        stores = list(self._stores.values())
        if self.coherent or sum(bool(s.pages_with(s.dirty).size) for s in stores) < 2:
            # No line is contested: go a stretch at a time, so that the host never
            # holds all of a large cache twice.
            self._drop_views()
            for store in stores:
                pages = store.pages_with(store.dirty)
                for i in range(0, pages.size, STRETCH_PAGES):
                    stretch = pages[i : i + STRETCH_PAGES]
                    self._traffic.write_back(store, stretch, store.dirty[stretch])
                    store.invalidate(stretch)
        self.drain()
        for store in stores:
            store.forget_all()

    def drain(self) -> None:
        """Let every dirty line reach DRAM; lines stay cached, clean.

        What a probe sees once the caches have come to rest.
        """
        self._drop_views()
        dirty = [(s, s.pages_with(s.dirty)) for s in self._stores.values()]
        dirty = [(store, pages) for store, pages in dirty if pages.size]
        contested = [] if self.coherent else contested_lines(dirty)
        for store, pages in dirty:
            self._traffic.write_back(store, pages, store.dirty[pages])
        # Lines dirty under several tags: whoever is drawn comes last.
        last: dict[int, list[int]] = {}
        for line, slots in contested:
            last.setdefault(self._random.choice(slots), []).append(line)
        for slot, lines in last.items():
            self._traffic.write_back(self._stores[slot], *lines_to_masks(lines))
        for store, pages in dirty:
            store.dirty[pages] = 0

    def flush_line(self, slot: int, pa: int) -> None:
        """CLFLUSH: write back and drop the line of `pa`.

        On incoherent parts only the line of this tag: the instruction names a
        mapping, and the mapping names the tag. On coherent parts every tag's.
        """
        page = np.array([pa >> PAGE_SHIFT], np.intp)
        if self._trace.active:
            self._trace.emit("flush", what="clflush", pa=pa, slot=slot)
        self._drop_views()
        if self.coherent:
            for store in self._stores.values():
                self._traffic.write_back(store, page, store.dirty[page])
                store.invalidate(page)
            return
        store = self._store(slot)
        mask = np.uint64(line_mask(pa % PAGE_SIZE, pa % PAGE_SIZE + 1))
        self._traffic.write_back(store, page, store.dirty[page] & mask)
        for words in (store.valid, store.dirty, store.stale):
            words[page] &= ~mask

    def flush_page(self, slot: int, pa: int) -> None:
        """VM_PAGE_FLUSH: write back and drop one tag's lines of a page."""
        if self._trace.active:
            self._trace.emit("flush", what="vm-page-flush", pa=pa, slot=slot)
        self._drop_views()
        if store := self._stores.get(slot):
            page = np.array([pa >> PAGE_SHIFT], np.intp)
            self._traffic.write_back(store, page, store.dirty[page])
            store.invalidate(page)

    def evict(self, share: float = 0.5) -> None:
        """Write back and drop a drawn share of the cached pages, tag by tag.

        What capacity does to a cache at a moment nobody chose; which tag comes first
        is drawn, too.
        """
        self._drop_views()
        stores = list(self._stores.values())
        self._random.shuffle(stores)
        for store in stores:
            pages = store.pages_with(store.valid)
            chosen = np.array(
                [page for page in pages.tolist() if self._random.random() < share],
                np.intp,
            )
            self._traffic.write_back(store, chosen, store.dirty[chosen])
            store.invalidate(chosen)

    def lose(self) -> None:
        """Drop everything unwritten, as a power loss does."""
        self._drop_views()
        for store in self._stores.values():
            store.forget_all()

    def state(self) -> CacheState:
        """Return what is not in the line stores; nothing changes."""
        owned = np.flatnonzero(self._owner)
        return CacheState(
            tuple(self._stores),
            self._policy,
            self.tag_changes,
            tuple(self.hazards_met),
            self._random.getstate(),
            owned,
            self._owner[owned],
            self._last_writer[stale_lines(self._stores.values())],
        )

    def restore(self, state: CacheState) -> None:
        """Take over a state, policy left out; its line stores were restored before."""
        self._drop_views()
        self.tag_changes = state.tag_changes
        self.hazards_met[:] = state.hazards
        self._random.setstate(state.random)
        self._owner[:] = 0
        self._owner[state.owned] = state.owners
        self._last_writer[stale_lines(self._stores.values())] = state.writers

    # Claims, page by page and in runs

    def _store(self, slot: int) -> LineStore:
        store = self._stores.get(slot)
        if store is None:
            store = self._stores[slot] = LineStore(slot, self._dram.size)
        return store

    def _claim_page(
        self,
        store: LineStore,
        page: int,
        start: int,
        end: int,
        write: bool,
        overwrite: bool,
    ) -> None:
        touched = fill = ALL_LINES if self.coherent else line_mask(start, end)
        if overwrite:
            if not self.coherent:
                fill &= ~covered_mask(start, end)
            elif end - start == PAGE_SIZE:
                fill = 0
        if self._owner_word[page] != store.slot + 1:
            self._change_hands(store, page, page + 1)
        others: list[LineStore] = []
        if not self.coherent:
            others = [s for s in self._stores.values() if s is not store]
            if store.stale_word[page] & touched & fill or any(
                other.dirty_word[page] & touched for other in others
            ):
                words = np.array([[touched], [fill]], np.uint64)
                self._check_hazards(store, page, words[0], words[1], write)
        missing = fill & ~store.valid_word[page]
        if missing:
            self._traffic.fill(
                store, np.array([page], np.intp), np.array([missing], np.uint64)
            )
        store.valid_word[page] |= touched
        store.mark_used(page, page + 1)
        if write:
            store.dirty_word[page] |= touched
            store.stale_word[page] &= ~touched
            for other in others:
                other.stale_word[page] |= other.valid_word[page] & touched

    def _claim_run(
        self,
        store: LineStore,
        first: int,
        start: int,
        end: int,
        write: bool,
        overwrite: bool,
    ) -> None:
        count = -(-end // PAGE_SIZE)
        last_end = end - (count - 1) * PAGE_SIZE
        last = first + count
        touched = np.full(count, ALL)
        covered = np.full(count, ALL if overwrite else np.uint64(0))
        if self.coherent:
            covered[0] = 0 if start else covered[0]
            covered[-1] = 0 if last_end < PAGE_SIZE else covered[-1]
        else:
            touched[0] = line_mask(start, PAGE_SIZE)
            touched[-1] = line_mask(0, last_end)
            covered[0] &= np.uint64(covered_mask(start, PAGE_SIZE))
            covered[-1] &= np.uint64(covered_mask(0, last_end))
        if (self._owner[first:last] != store.slot + 1).any():
            self._change_hands(store, first, last)
        if not self.coherent:
            self._check_hazards(store, first, touched, touched & ~covered, write)
        missing = touched & ~covered & ~store.valid[first:last]
        lacking = np.flatnonzero(missing)
        store.data.expect_bulk(first, last)
        if lacking.size:
            self._traffic.fill(store, lacking + first, missing[lacking])
        store.valid[first:last] |= touched
        store.mark_used(first, last)
        if write:
            store.dirty[first:last] |= touched
            if not self.coherent:
                self._outdate_others(store, first, touched)

    def _change_hands(self, store: LineStore, first: int, end: int) -> None:
        """Make `store` the tag that touched the pages last.

        On coherent parts every other tag's lines leave first.
        """
        told = False
        for other in self._stores.values():
            if other is store:
                continue
            pages = np.flatnonzero(other.valid[first:end]) + first
            if not pages.size:
                continue
            if not told:  # a view shows lines that some tag holds
                self._drop_views()
                told = True
            self.tag_changes += int(pages.size)
            if self._trace.active:
                for run_first, run_end in runs(pages):
                    self._trace.emit(
                        "tag-change",
                        pa=run_first << PAGE_SHIFT,
                        pages=run_end - run_first,
                        from_slot=other.slot,
                        to_slot=store.slot,
                    )
            if self.coherent:
                dirty = pages[other.dirty[pages] != 0]
                self._traffic.write_back(other, dirty, other.dirty[dirty])
                other.invalidate(pages)
        self._owner[first:end] = store.slot + 1

    # Hazards

    def _check_hazards(
        self, store: LineStore, first: int, touched: Words, used: Words, write: bool
    ) -> None:
        """Report lines whose bytes silicon leaves open; `used` are read or merged."""
        end = first + touched.size
        for other in self._stores.values():
            if other is store:
                continue
            alias = _lines_from(first, other.dirty[first:end] & touched)
            self._report("dirty-alias", store, other.slot, alias, write)
        stale = _lines_from(first, store.stale[first:end] & touched & used)
        writers = self._last_writer[stale]
        for writer in np.unique(writers).tolist():
            self._report("stale-line", store, writer, stale[writers == writer], write)

    def _report(
        self,
        kind: str,
        store: LineStore,
        other_slot: int,
        lines: Index,
        write: bool,
    ) -> None:
        for start, end in runs(lines):
            hazard = Hazard(
                kind,
                PhysAddr(start * CACHE_LINE_SIZE),
                (end - start) * CACHE_LINE_SIZE,
                store.slot,
                other_slot,
                write,
            )
            if self._policy is HazardPolicy.RAISE:
                raise HazardError(hazard)
            self.hazards_met.append(hazard)
            if self._trace.active:
                self._trace.emit(
                    "hazard",
                    what=kind,
                    pa=hazard.pa,
                    length=hazard.length,
                    slot=hazard.slot,
                    other_slot=other_slot,
                    access="store" if write else "load",
                )

    def _outdate_others(self, store: LineStore, first: int, touched: Words) -> None:
        """After a store: the same lines of other tags no longer show the truth."""
        end = first + touched.size
        store.stale[first:end] &= ~touched
        for other in self._stores.values():
            if other is not store:
                other.stale[first:end] |= other.valid[first:end] & touched

    def _drop_views(self) -> None:
        self.readable.clear()
        for drop in self._view_holders:
            drop()


def _lines_from(first: int, masks: Words) -> Index:
    """Return the lines that the masks of the pages from `first` on name."""
    pages = np.flatnonzero(masks)
    return masks_to_lines(pages + first, masks[pages])
