"""TLB fills: the page walk of hw/paging decides, the caches see whose lines are used.

A fill does four things. It walks (or refuses, and the core delivers the fault). It
claims the page for its tag, so that lines of another tag leave or are reported. It
decides how long the engine may go on without asking: a page whose lines are not all
dirty is not writable, so that the first store is seen. And it keeps code exact: a page
is either writable or executable in the engine's TLB, because the engine translates code
once and looks for changes only where a page holds both.

Exception to the last: a store to the page that is being executed gets both, which is
slow and exact.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from ..cpu import Cpu
from ..errors import CbitError
from ..faults import CpuException, GeneralProtection
from ..memory import CacheHierarchy
from ..memory.line_store import ALL_LINES
from ..paging import Access, Entry, Translation
from ..paging.walk import WRITABLE
from ..types import PAGE_SHIFT, PAGE_SIZE
from .bulk import WORTH_IT, Bulk
from .engine import (
    FILL,
    HOOK_TLB_FILL,
    MEM_READ,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    Engine,
)
from .memory import NOWHERE, SLOT_SHIFT, NativeMemory
from .state import RCX, EngineState

_USER, _LIFTED = int(Access.USER), int(Access.LIFTED)
_WRITE, _FETCH = int(Access.WRITE), int(Access.FETCH)
_ACCESS = (0, _WRITE, _FETCH)
_AC = 1 << 18
_GLOBAL, _DIRTY = int(Entry.G), int(Entry.D)
_RX, _RW = PROT_READ | PROT_EXEC, PROT_READ | PROT_WRITE

FEWEST_AHEAD, MOST_AHEAD = 16, 512
"""Pages of a large leaf that are filled ahead, for anybody and for a stream."""

MOST_LOCAL = 256
"""Translations that are dropped one by one at a change of CR3."""

DUMMY_PAGE = 1 << 62
"""Not canonical, so no guest's: under it blocks of a frame are found and dropped."""


class TlbFiller:
    """Answers the engine's TLB misses.

    Attributes:
        fills: how many there were.
        pending: why the last one was refused: a fault, or BULK.
        failure: an error of ours inside a callback; the run must end with it.
        skip_bulk: the next claim is not for a bulk operation, which found no way.
        implicit_page: page of a descriptor table that the processor itself will read
            for the instruction of user code at RIP; None for most.
        fetched: bytes of the pages that the engine may execute, by virtual page.
    """

    BULK = "bulk"

    def __init__(
        self,
        engine: Engine,
        state: EngineState,
        memory: NativeMemory,
        cpu: Cpu,
        caches: CacheHierarchy,
        bulk: Bulk,
    ) -> None:
        self.fills = 0
        self.pending: CpuException | str | None = None
        self.failure: BaseException | None = None
        self.skip_bulk = False
        self.implicit_page: int | None = None
        self._engine = engine
        self._state = state
        self._memory = memory
        self._cpu = cpu
        self._caches = caches
        self._bulk = bulk
        self._code: set[int] = set()
        self._written: dict[int, list[int]] = {}
        self._runnable: dict[int, list[int]] = {}
        self._large: set[int] = set()
        self._local: list[int] = []
        self._local_code = False
        self.fetched: dict[int, memoryview] = {}
        self._expected = {0: -1, 1: -1}
        self._ahead = FEWEST_AHEAD
        self._purge_target = 0
        self._results: dict[int, tuple[Any, Any]] = {}
        engine.hook(HOOK_TLB_FILL, FILL(self._make_fill()))
        caches.hold_views(self.flush)

    # What software and the machine flush

    def flush(self) -> None:
        """Drop every translation."""
        self._engine.flush_tlb()
        self._state.freeze_tlb_size_clock()
        self._written.clear()
        self._runnable.clear()
        self._large.clear()
        self._local.clear()
        self._local_code = False
        self.fetched.clear()

    def flush_local(self) -> None:
        """Drop what is not global, as MOV CR3 does."""
        if self._local_code or len(self._local) > MOST_LOCAL:
            self.flush()
            return
        drop = self._state.drop_translation
        for page in self._local:
            drop(page)
        self._local.clear()

    def drop(self, va: int) -> None:
        """Drop the translations of the page that holds `va`, as INVLPG does."""
        page = va >> PAGE_SHIFT
        if (
            va >> 21 in self._large
            or va >> 30 | 1 << 50 in self._large
            or page in self.fetched
        ):
            self.flush()
        else:
            self._state.drop_translation(page)

    def forget_streams(self) -> None:
        """Forget what was expected of the next accesses."""
        self._expected = {0: -1, 1: -1}
        self._ahead = FEWEST_AHEAD
        self.skip_bulk = False
        self.implicit_page = None

    # Code

    def changed(self, slot: int, first: int, end: int) -> None:
        """Note that pages [first, end) were stored to past the engine.

        Blocks translated from them are dropped before the guest goes on.
        """
        base = slot << SLOT_SHIFT - PAGE_SHIFT
        if len(self._code) < end - first:
            hit = {p for p in self._code if base + first <= p < base + end}
        else:
            hit = self._code.intersection(range(base + first, base + end))
        for page in hit:
            self._purge(page)

    def _purge(self, native_page: int) -> None:
        """Drop the blocks of a frame, and every translation that could run them."""
        self._code.discard(native_page)
        self._purge_target = native_page << PAGE_SHIFT
        self._engine.forget_code(DUMMY_PAGE, DUMMY_PAGE + PAGE_SIZE)
        self._purge_target = 0
        drop = self._state.drop_translation
        drop(DUMMY_PAGE >> PAGE_SHIFT)
        for page in self._runnable.pop(native_page, ()):
            drop(page)
            self.fetched.pop(page, None)

    # The fill

    def _make_fill(self) -> Callable[[Any, int, int, int, Any], bool]:
        mmu, state, caches = self._cpu.mmu, self._state, self._caches
        words, quads = state.words, state.quads
        hflags_at, eflags_at, rip_at = 176 // 4, 136 // 8, 128 // 8
        coherent, is_plain = caches.coherent, caches.page_is_plain
        owner, lines = caches.owner_words(), self._memory.line_words
        (_, low_end), (main_start, main_end), *ranges = self._memory.ram
        local = self._local
        code, written, large, fetched = (
            self._code,
            self._written,
            self._large,
            self.fetched,
        )
        runnable, regs = self._runnable, state.regs
        drop = state.drop_translation
        results = self._results

        def fill(_uc: Any, va: int, kind: int, result: int, _user: Any) -> bool:
            try:
                if va == DUMMY_PAGE:
                    native, perms = self._purge_target, _RX
                    if not native:
                        return False
                    self._answer(result, native, perms)
                    return True
                self.fills += 1
                kind -= MEM_READ
                access = _ACCESS[kind]
                if words[hflags_at] & 3 == 3:
                    if self.implicit_page == va >> PAGE_SHIFT and not kind:
                        self.implicit_page = None
                    else:
                        access |= _USER
                elif quads[eflags_at] & _AC:
                    access |= _LIFTED
                walker = mmu.walker
                if walker is None or not (
                    va < walker.low_end or va >= walker.high_start
                ):
                    # Raises, or translates with paging off.
                    found = mmu.walk(va, access)
                else:
                    found = walker.walk(mmu.root, va, access)
                pa, slot, rights, shift, entry = found
                page = pa >> PAGE_SHIFT
                if (
                    regs[RCX] >= WORTH_IT // 8
                    and kind != 2
                    and self._bulk.is_worth_it(va)
                ):
                    if not self.skip_bulk:
                        self.pending = self.BULK
                        return False
                    self.skip_bulk = False
                if (
                    not main_start <= page < main_end
                    and page >= low_end
                    and not any(a <= page < b for a, b in ranges)
                ):
                    return self._fill_device(result, found, kind)
                valid, dirty = lines[slot]
                if (
                    owner[page] != slot + 1
                    or valid[page] != ALL_LINES
                    or (kind == 1 and dirty[page] != ALL_LINES)
                    or not (coherent or is_plain(slot, page, write=kind == 1))
                ):
                    self._claim(found, kind == 1)
                    if kind == 2:
                        # Other bytes than were translated may have come.
                        self.changed(slot, page, page + 1)

                native = slot << SLOT_SHIFT | pa
                native_page = native >> PAGE_SHIFT
                if kind == 2:
                    if native_page not in code:
                        for alias in written.pop(native_page, ()):
                            drop(alias)
                        code.add(native_page)
                    aliases = runnable.get(native_page)
                    if aliases is None:
                        runnable[native_page] = [va >> PAGE_SHIFT]
                    else:
                        aliases.append(va >> PAGE_SHIFT)
                    fetched[va >> PAGE_SHIFT] = self._page_bytes(slot, page)
                    readable = (
                        rights | (access & ~_FETCH) << 3 not in walker.refused
                        if walker is not None
                        else True
                    )
                    perms = _RX if readable else PROT_EXEC
                elif kind == 1:
                    perms = _RW
                    if native_page in code:
                        # A block begins at RIP and ends in the next page at most.
                        away = (va >> PAGE_SHIFT) - (quads[rip_at] >> PAGE_SHIFT)
                        if 0 <= away <= 1 and (
                            walker is None
                            or rights | (access & ~_WRITE | _FETCH) << 3
                            not in walker.refused
                        ):
                            perms = _RW | PROT_EXEC
                        else:
                            self._purge(native_page)
                else:
                    perms = PROT_READ
                    if (
                        rights & WRITABLE
                        and entry & _DIRTY
                        and native_page not in code
                        and dirty[page] == ALL_LINES
                        and (coherent or is_plain(slot, page, write=True))
                    ):
                        # Nothing would change at the first store.
                        perms = _RW
                if perms & PROT_WRITE:
                    aliases = written.get(native_page)
                    if aliases is None:
                        written[native_page] = [va >> PAGE_SHIFT]
                    else:
                        aliases.append(va >> PAGE_SHIFT)
                if not entry & _GLOBAL:
                    local.append(va >> PAGE_SHIFT)
                    if kind == 2:
                        self._local_code = True
                if shift != PAGE_SHIFT:
                    large.add(va >> 21 if shift == 21 else va >> 30 | 1 << 50)

                views = results.get(result)
                if views is None:
                    self._answer(result, native, perms)
                else:
                    views[0][0] = native
                    views[1][0] = perms
                return True
            except CpuException as fault:
                self.pending = fault
                return False
            except BaseException as failure:
                self.failure = failure
                self._engine.stop()
                return False

        return fill

    def _answer(self, result: int, native: int, perms: int) -> None:
        """Store an answer; the library keeps its result at few places."""
        views = self._results.get(result)
        if views is None:
            raw = memoryview((ctypes.c_char * 16).from_address(result)).cast("B")
            views = self._results[result] = raw[:8].cast("Q"), raw[8:12].cast("I")
        views[0][0] = native
        views[1][0] = perms

    def _page_bytes(self, slot: int, page: int) -> memoryview:
        start = page << PAGE_SHIFT
        cells = self._caches.line_store(slot).data.cells
        return cells[start : start + PAGE_SIZE].data

    def _fill_device(self, result: int, found: Translation, kind: int) -> bool:
        pa, slot = found.pa, found.slot
        if kind == 2:
            raise GeneralProtection(f"code at {pa:#x}, where no memory answers")
        constant = self._memory.constant(pa) if kind == 0 else None
        if constant is not None:
            self._answer(result, constant, PROT_READ)
        elif self._memory.machine.map.find(pa) is None:
            self._memory.unpopulated += 1
            self._answer(result, NOWHERE, _RW)
        else:
            self._answer(result, slot << SLOT_SHIFT | pa, _RW)
        return True

    def _claim(self, found: Translation, write: bool) -> None:
        """Bring the page's lines under its tag, and those ahead of a stream."""
        pa, slot, _, shift, _ = found
        page = pa >> PAGE_SHIFT
        caches = self._caches
        count = 1
        if self._memory.line_words[slot][0][page] == ALL_LINES:
            # Only to be marked dirty, or to be looked at for hazards.
            caches.claim(slot, pa, PAGE_SIZE, write=write)
            return
        if self._expected.get(slot) == page:
            self._ahead = min(2 * self._ahead, MOST_AHEAD)
        else:
            self._ahead = FEWEST_AHEAD
        if shift != PAGE_SHIFT:
            # The leaf goes on, and with it the tag.
            leaf_end = (page | (1 << shift - PAGE_SHIFT) - 1) + 1
            end = next((b for a, b in self._memory.ram if a <= page < b), page + 1)
            count = min(self._ahead, leaf_end - page, end - page)
        if count > 1 and caches.others_hold(slot, page, page + count):
            count = 1
        if caches.coherent and self._ahead > FEWEST_AHEAD:
            caches.claim(slot, pa, count << PAGE_SHIFT, write=write)
        else:
            # Lines ahead are filled, not stored to.
            if count > 1:
                caches.claim(slot, pa, count << PAGE_SHIFT)
            caches.claim(slot, pa, PAGE_SIZE, write=write)
        self._expected[slot] = page + count


class NativeFailure(CbitError):
    """The native core met something that it does not emulate."""
