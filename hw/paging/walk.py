"""The page walk: one loop over the levels that a `Format` lists.

Each table is read through the C-bit of what points to it: CR3 for the top, an entry
for the one below. A table written under the other setting reads as garbage here, as
on silicon. Accessed and dirty bits are stored through the same setting (unverified).

Source: [APM2] 5.3 (walk), 15.34.5 and Table 15-30 (what decides encryption).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np

from ..faults import PageFault, PageFaultCode
from ..memory import MemoryBus
from ..types import PAGE_SHIFT
from .formats import ENTRY_SIZE, INDEX_MASK, AddressRules, Entry, Format
from .tlb import Translation


class Access(IntFlag):
    """Kind of access; the bits are those of the page-fault error code."""

    READ = 0
    WRITE = int(PageFaultCode.WRITE)
    USER = int(PageFaultCode.USER)
    FETCH = int(PageFaultCode.FETCH)
    LIFTED = 1 << 8
    """Not in the error code: RFLAGS.AC is 1, so SMAP does not count."""


WRITE = int(Access.WRITE)
USER = int(Access.USER)
FETCH = int(Access.FETCH)
LIFTED = int(Access.LIFTED)

WRITABLE, FOR_USER, EXECUTABLE = 1, 2, 4
"""Bits of `Translation.rights`."""

MOST_ROOTS = 64
"""Roots whose ways are remembered at a time."""


@dataclass(frozen=True)
class Protection:
    """Mode bits that decide which rights an access needs.

    Attributes:
        write_protect: CR0.WP.
        smep: CR4.SMEP: supervisor code may not be fetched from user pages.
        smap: CR4.SMAP and RFLAGS.AC = 0: supervisor data may not be on user pages.
    """

    write_protect: bool = True
    smep: bool = False
    smap: bool = False

    def refuses(self, rights: int, access: int) -> str:
        """Return why the access is refused, or "" if it is allowed."""
        user = access & USER
        if user and not rights & FOR_USER:
            return "supervisor page, access from user mode"
        if access & WRITE and not rights & WRITABLE and (user or self.write_protect):
            return "page is not writable"
        if access & FETCH and not rights & EXECUTABLE:
            return "page is not executable"
        if not user and rights & FOR_USER:
            if access & FETCH and self.smep:
                return "user page, supervisor fetch under SMEP"
            if not access & (FETCH | LIFTED) and self.smap:
                return "user page, supervisor access under SMAP"
        return ""

    def refused_pairs(self) -> frozenset[int]:
        """Return every refused pair as `rights | access << 3`."""
        plain = (0, WRITE, FETCH, USER, USER | WRITE, USER | FETCH)
        kinds = (*plain, *(kind | LIFTED for kind in plain))
        return frozenset(
            rights | access << 3
            for rights in range(8)
            for access in kinds
            if self.refuses(rights, access)
        )


class _Step(NamedTuple):
    """One level as the loop needs it, every mask computed beforehand."""

    name: str
    shift: int
    reserved_pointer: int
    leaf_bits: int  # an entry with any of these bits is a leaf; P where all are
    leaf_watched: int  # P and what is reserved in a leaf
    leaf_address: int


class PageWalker:
    """Walks tables of one format under one set of rules.

    Args:
        bus: where tables lie.
        layout: levels and virtual width.
        rules: address, reserved and C bits.
        protection: which rights an access needs.

    Attributes:
        low_end, high_start: the canonical halves are below and from there up.
        refused: pairs `rights | access << 3` that fault.
    """

    def __init__(
        self,
        bus: MemoryBus,
        layout: Format,
        rules: AddressRules,
        protection: Protection,
    ) -> None:
        self.format = layout
        self.low_end = 1 << layout.virtual_bits - 1
        self.high_start = (1 << 64) - self.low_end
        self.rules = rules
        self.protection = protection
        self.refused = protection.refused_pairs()
        self._bus = bus
        self._c_mask = rules.c_mask
        # A table is known by the bits that name it: address and C-bit.
        self._key_mask = rules.address_mask | rules.c_mask
        steps = [
            _Step(
                level.name,
                level.shift,
                rules.reserved_mask(level, leaf=False),
                int(Entry.P)
                if level.maps_page
                else int(Entry.PS) * rules.leaf_allowed(level),
                _P | rules.reserved_mask(level, leaf=True),
                rules.leaf_address_mask(level),
            )
            for level in layout.levels
        ]
        # What the loop needs of every step, unpacked by its `for`; the watched bits
        # of the lowest level make every entry uncommon, as each is a leaf.
        self._loop = [
            (
                step.shift,
                0
                if step.leaf_bits == Entry.P
                else _P_AND_A | _NX | step.leaf_bits | step.reserved_pointer,
                step,
            )
            for step in steps
        ]
        self._plain_slot, self._c_slot = bus.slot_for(False), bus.slot_for(True)
        self._last_step = steps[-1]
        self._tables: dict[int, memoryview] = {}
        # Ways to page tables by root and va >> 21. A way counts only while the
        # entries on it still read as they did: this is no paging-structure cache.
        self._paths: dict[int, tuple[Any, ...]] = {}
        self._paths_root = -1
        self._paths_of: dict[int, dict[int, tuple[Any, ...]]] = {}

    def drop_views(self) -> None:
        """Forget the views of table pages; their tag may have changed."""
        self._tables.clear()
        self._paths_of.clear()
        self._paths_root = -1

    def _enter_root(self, root: int) -> None:
        """Take up the ways that are remembered under a root."""
        if len(self._paths_of) >= MOST_ROOTS:
            self._paths_of.clear()
        self._paths = self._paths_of.setdefault(root, {})
        self._paths_root = root

    def walk(self, root: int, va: int, access: int) -> Translation:
        """Translate `va` and set A, and D for a store.

        Args:
            root: CR3: table address and C-bit; PCID and flags are ignored.
            va: canonical.
            access: bits of `Access`.

        Raises:
            PageFault: not present, reserved bit, or refused; with level and entry.
        """
        if root != self._paths_root:
            self._enter_root(root)
        path = self._paths.get(va >> 21)
        if path is not None:
            a, i, x, b, j, y, c, k, z, table, key, granted, executable, step = path
            if a[i] == x and b[j] == y and c[k] == z:
                shift = step.shift
                if table is None:  # z is the leaf itself
                    index, entry = k, z
                else:
                    index = va >> 12 & INDEX_MASK
                    entry = table[index]
            else:
                path = None
        if path is None:
            key, index, entry, granted, executable, step, shift = self._descend(
                root, va, access
            )

        if entry & step.leaf_watched != _P:
            amiss = "reserved bit set" if entry & _P else "not present"
            raise self._fault(va, access, step, entry, amiss)
        rights = (granted & entry) >> 1 | (0 if entry & _NX else executable)
        if rights | access << 3 in self.refused:
            why = self.protection.refuses(rights, access)
            raise self._fault(va, access, step, entry, why)
        needed = _A | _D if access & WRITE else _A
        if entry & needed != needed:
            entry |= needed
            self._write_entry(key, index, entry)
        pa = entry & step.leaf_address
        if shift != PAGE_SHIFT:
            pa |= va & (1 << shift) - 1 & -(1 << PAGE_SHIFT)
        slot = self._c_slot if entry & self._c_mask else self._plain_slot
        # Translation(...) would cost a fifth of the whole walk.
        return _new_tuple(Translation, (pa, slot, rights, shift, entry))

    def _descend(
        self, root: int, va: int, access: int
    ) -> tuple[int, int, int, int, int, _Step, int]:
        """Follow the pointers down to the entry that is no pointer.

        With four levels the way is remembered: three entries, where they were read,
        and what they grant. They lead to a page table, or the last is a large leaf.

        Returns:
            Its table's key, its index, the entry, the rights so far, the last step.
        """
        tables = self._tables
        key = root & self._key_mask
        granted, executable = _RW_AND_US, EXECUTABLE  # until a level withholds it
        pointers: list[Any] = []
        for shift, watched, step in self._loop:
            index = va >> shift & INDEX_MASK
            table = tables.get(key)
            entry = self._read_entry(key, index) if table is None else table[index]
            # One test for what is common: a pointer, present, accessed, executable.
            if entry & watched != _P_AND_A:
                if entry & step.leaf_bits or not entry & 1:
                    break
                if entry & step.reserved_pointer:
                    raise self._fault(va, access, step, entry, "reserved bit set")
                if not entry & _A:
                    entry |= _A
                    self._write_entry(key, index, entry)
                if entry & _NX:
                    executable = 0
            granted &= entry
            pointers += (table, index, entry)
            key = entry & self._key_mask
        if step is self._last_step:
            if len(pointers) == 9 and table is not None and None not in pointers:
                path = (*pointers, table, key, granted, executable, step)
                self._paths[va >> 21] = path
        elif 3 <= len(pointers) <= 6 and table is not None and None not in pointers:
            # A large leaf stands where the third entry would, or second and third.
            leaf = (table, index, entry)
            pointers += leaf if len(pointers) == 6 else leaf * 2
            path = (*pointers, None, key, granted, executable, step)
            self._paths[va >> 21] = path
        return key, index, entry, granted, executable, step, shift

    def extend(
        self, root: int, va: int, first: Translation, access: int, limit: int
    ) -> int:
        """Count the pages from `va` on that map frame after frame just as the first.

        Looks at the rest of one page table at once and sets A and D there as the
        walks of the single pages would.

        Args:
            root: CR3.
            va: an address in the first page.
            first: its translation, a 4 KiB leaf that allows the same access.
            access: bits of `Access`.
            limit: most pages to look at, 1 or more.

        Returns:
            1 or more; the first page counts.
        """
        index = va >> PAGE_SHIFT & INDEX_MASK
        limit = min(limit, INDEX_MASK + 1 - index)
        key = root & self._key_mask
        granted = _RW_AND_US
        for shift, watched, _ in self._loop[:-1]:
            entry = self._read_entry(key, va >> shift & INDEX_MASK)
            if entry & watched != _P_AND_A:
                return 1
            granted &= entry
            key = entry & self._key_mask
        now = self._read_entry(key, index)
        table = self._tables.get(key)
        # `first` may be kept from before the tables changed: then nothing follows.
        if table is None or (now ^ first.entry) & ~(_A | _D):
            return 1
        rights = (granted & first.entry) >> 1 | first.rights & EXECUTABLE
        if rights | access << 3 in self.refused:
            return 1
        entries = np.frombuffer(table, np.uint64)[index : index + limit]
        needed = np.uint64(_A | _D if access & WRITE else _A)
        frames = np.arange(limit, dtype=np.uint64) << np.uint64(PAGE_SHIFT)
        marks = np.uint64(_A | _D)
        alike = (entries | marks) == (np.uint64(first.entry) | marks) + frames
        count = limit if alike.all() else max(int(alike.argmin()), 1)
        entries = entries[:count]
        if ((entries & needed) != needed).any():
            pa, slot = self._place(key)
            data = (entries | needed).tobytes()
            self._bus.store(pa + index * ENTRY_SIZE, data, slot)
        return count

    def _read_entry(self, key: int, index: int) -> int:
        pa, slot = self._place(key)
        data = self._bus.load(pa + index * ENTRY_SIZE, ENTRY_SIZE, slot)
        view = self._bus.page_view(slot, pa >> PAGE_SHIFT, write=False)
        if view is not None:
            self._tables[key] = view.cast("Q")
        return int.from_bytes(data, "little")

    def _write_entry(self, key: int, index: int, entry: int) -> None:
        pa, slot = self._place(key)
        data = entry.to_bytes(ENTRY_SIZE, "little")
        self._bus.store(pa + index * ENTRY_SIZE, data, slot)

    def _place(self, key: int) -> tuple[int, int]:
        slot = self._c_slot if key & self._c_mask else self._plain_slot
        return key & ~self._c_mask, slot

    def _fault(
        self, va: int, access: int, step: _Step, entry: int, reason: str
    ) -> PageFault:
        code = PageFaultCode(access & ~LIFTED)
        if entry & 1:
            code |= PageFaultCode.PRESENT
        if reason == "reserved bit set":
            code |= PageFaultCode.RESERVED
        if not self.rules.no_execute and not self.protection.smep:
            # I/D is reported only where a fetch can be told apart.
            code &= ~PageFaultCode.FETCH
        index = va >> step.shift & INDEX_MASK
        return PageFault(va, code, reason, step.name, index, entry)


_new_tuple = tuple.__new__
_NX = int(Entry.NX)
_P = int(Entry.P)
_A = int(Entry.A)
_P_AND_A = int(Entry.P | Entry.A)
_RW_AND_US = int(Entry.RW | Entry.US)
_D = int(Entry.D)
