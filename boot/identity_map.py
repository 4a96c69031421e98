"""Building tables for the in-place encryption, one entry at a time, as Linux does.

Tables come zeroed from a pool in the work area and are written through the identity
map, plain. Entries that point to tables never carry the C-bit here.

Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_identity.c, sme_prepare_pgd(),
sme_populate_pgd(), sme_populate_pgd_large(), __sme_map_range().
"""

from __future__ import annotations

from ..hw.cpu import Cpu
from ..hw.errors import KernelError
from ..hw.types import PAGE_SIZE, PhysAddr
from ..kernel.cc import EncryptionState
from ..kernel.pgtable import (
    KERNPG_TABLE_NOENC,
    PAGE_SHIFT,
    PMD_SHIFT,
    PMD_SIZE,
    Page,
    entry_phys,
    pgdir_shift,
    table_index,
    table_shifts,
)


class TablePool:
    """Pages for tables, handed out upwards; never given back.

    Args:
        start: first page.
        end: where the linked work area ends.

    Attributes:
        used: pages handed out so far.
    """

    def __init__(self, start: PhysAddr, end: PhysAddr) -> None:
        self._start = start
        self._end = end
        self.used = 0

    def take(self, cpu: Cpu) -> PhysAddr:
        """Return a zeroed page.

        Raises:
            KernelError: the pool is empty.
        """
        page = PhysAddr(self._start + self.used * PAGE_SIZE)
        if page + PAGE_SIZE > self._end:
            raise KernelError(
                f"table pool [{self._start:#x}, {self._end:#x}) of the in-place "
                f"encryption is used up after {self.used} pages"
            )
        self.used += 1
        cpu.fill(page, 0, PAGE_SIZE)
        return page


class IdentityMapper:
    """Adds mappings to one PGD; pages that are mapped already stay as they are.

    Args:
        cpu: whose current tables map the pool and the PGD identically, plain.
        state: for the address bits of an entry.
        pool: where new tables come from.
        root: the PGD, a CR3 value.
        five_levels: LA57 is on.
    """

    def __init__(
        self,
        cpu: Cpu,
        state: EncryptionState,
        pool: TablePool,
        root: int,
        five_levels: bool,
    ) -> None:
        self._cpu = cpu
        self._state = state
        self._pool = pool
        self._pgd = entry_phys(state, root)
        self._shifts = table_shifts(five_levels)

    def map_range(
        self, start: int, end: int, va: int, pmd_flags: int, pte_flags: int
    ) -> None:
        """Map frames [start, end) at `va`: 2 MiB entries, PTEs for unaligned ends.

        An unaligned start is mapped up to the next 2 MiB, even where the range ends
        before: so does Linux.

        Args:
            start, end: physical; a partial page at either end is mapped whole.
            va: virtual address of `start`; congruent to it modulo 2 MiB.
            pmd_flags, pte_flags: bits of the leaves, the C-bit among them if wanted.
        """
        offset = va - start
        va_end = va + end - start
        va &= -PAGE_SIZE
        va = self._map_pages(va, _next_pmd(va), offset, pte_flags)
        while va_end - va >= PMD_SIZE:
            self._set_leaf(va, PMD_SHIFT, va - offset | int(pmd_flags))
            va += PMD_SIZE
        self._map_pages(va, va_end, offset, pte_flags)

    def clear_pgd(self, va: int, va_end: int) -> None:
        """Zero the PGD entries of [va, va_end); the tables below stay in the pool."""
        shift = self._shifts[0]
        first = table_index(va, shift)
        count = table_index(va_end, shift) - first + 1
        self._cpu.fill(self._pgd + 8 * first, 0, 8 * count)

    def _map_pages(self, va: int, va_end: int, offset: int, flags: int) -> int:
        while va < va_end:
            self._set_leaf(va, PAGE_SHIFT, va - offset | int(flags))
            va += PAGE_SIZE
        return va

    def _set_leaf(self, va: int, shift: int, entry: int) -> None:
        slot = self._slot(va, shift)
        # A table of 4 KiB entries gives way to a large page, as in Linux.
        kept = Page.PSE if shift == PMD_SHIFT else Page.PRESENT
        if slot is not None and not self._cpu.load64(slot) & kept:
            self._cpu.store64(slot, entry)

    def _slot(self, va: int, shift: int) -> int | None:
        """Return where the leaf entry lies; None below an existing large page."""
        table: int = self._pgd
        for level in self._shifts:
            slot = table + 8 * table_index(va, level)
            if level == shift:
                return slot
            entry = self._cpu.load64(slot)
            if not entry & Page.PRESENT:
                entry = self._pool.take(self._cpu) | KERNPG_TABLE_NOENC
                self._cpu.store64(slot, entry)
            elif entry & Page.PSE and level < pgdir_shift(five_levels=False):
                return None
            table = entry_phys(self._state, entry)
        raise AssertionError(f"no level with shift {shift}")


def _next_pmd(va: int) -> int:
    return va + PMD_SIZE - 1 & -PMD_SIZE
