"""The early direct map: 2 MiB entries made when an address is first touched.

Tables come from 64 static pages of the kernel. When those are used up everything is
thrown away and made anew by the faults that follow.

Source: Linux 6.1.192 arch/x86/kernel/head64.c, __early_make_pgtable(),
reset_early_page_tables().
"""

from __future__ import annotations

from collections.abc import Callable

from ..hw.cpu import Cpu
from ..hw.errors import KernelError
from ..hw.faults import CpuException, PageFault
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr
from .cc import EncryptionState
from .pgtable import (
    KERNPG_TABLE_NOENC,
    MAX_PHYSMEM_BITS_4_LEVEL,
    MAX_PHYSMEM_BITS_5_LEVEL,
    PMD_SHIFT,
    PMD_SIZE,
    PTRS_PER_TABLE,
    Page,
    encrypted,
    entry_phys,
    page_offset,
    table_index,
    table_shifts,
)

EARLY_DYNAMIC_PAGE_TABLES = 64


class EarlyPageTables:
    """early_top_pgt and the dynamic tables below it.

    Args:
        cpu: the boot core, on kernel virtual addresses.
        state: for the C-bit of tables and CR3.
        top: physical address of early_top_pgt.
        dynamic: physical address of the 64 dynamic pages.
        kernel_va: from a physical address inside the kernel to its high mapping.
        five_levels: LA57 is on.

    Attributes:
        pmd_flags: early_pmd_flags: what the fault handler gives a new 2 MiB entry.
        faults: how many page faults made an entry.
    """

    def __init__(
        self,
        cpu: Cpu,
        state: EncryptionState,
        *,
        top: PhysAddr,
        dynamic: PhysAddr,
        kernel_va: Callable[[PhysAddr], VirtAddr],
        five_levels: bool,
        pmd_flags: int,
    ) -> None:
        self.pmd_flags = pmd_flags
        self.faults = 0
        self._cpu = cpu
        self._state = state
        self._top = top
        self._dynamic = dynamic
        self._kernel_va = kernel_va
        self._used = 0
        self._shifts = table_shifts(five_levels)[:-1]  # down to the PMD
        bits = MAX_PHYSMEM_BITS_5_LEVEL if five_levels else MAX_PHYSMEM_BITS_4_LEVEL
        self._base = page_offset(five_levels)
        self._limit = 1 << bits

    def reset(self) -> None:
        """Forget every entry but the kernel's own, the last, and reload CR3.

        Source: Linux 6.1.192 head64.c, reset_early_page_tables().
        """
        self._cpu.fill(self._kernel_va(self._top), 0, 8 * (PTRS_PER_TABLE - 1))
        self._used = 0
        self._cpu.write_cr3(self._state.with_mask(self._top))

    def direct_map(self, pa: int) -> VirtAddr:
        """__va: return the direct-map address of a physical one."""
        return VirtAddr(self._base + pa)

    def handle_fault(self, cpu: Cpu, fault: CpuException) -> bool:
        """Map the 2 MiB around a faulting direct-map address, encrypted by default."""
        if not isinstance(fault, PageFault) or fault.code & 1:
            return False
        pa = fault.address - self._base
        if not 0 <= pa < self._limit:
            return False
        self.make(VirtAddr(fault.address), (pa & -PMD_SIZE) + self.pmd_flags)
        self.faults += 1
        return True

    def make(self, va: VirtAddr, pmd: int) -> None:
        """Set the PMD entry of `va`, making the tables above where they are missing.

        Args:
            va: a direct-map address.
            pmd: the whole entry; 0 unmaps.
        """
        while (slot := self._pmd_slot(va)) is None:
            self.reset()
        self._cpu.store64(slot, pmd)

    def _pmd_slot(self, va: int) -> int | None:
        """Return where the PMD entry lies; None when the dynamic pages are used up."""
        table = self._top
        for shift in self._shifts:
            slot = self._kernel_va(table) + 8 * table_index(va, shift)
            if shift == PMD_SHIFT:
                return slot
            entry = self._cpu.load64(slot)
            if not entry & Page.PRESENT:
                if self._used == EARLY_DYNAMIC_PAGE_TABLES:
                    return None
                page = PhysAddr(self._dynamic + self._used * PAGE_SIZE)
                self._used += 1
                self._cpu.fill(self._kernel_va(page), 0, PAGE_SIZE)
                entry = page | encrypted(self._state, KERNPG_TABLE_NOENC)
                self._cpu.store64(slot, entry)
            table = entry_phys(self._state, entry)
        raise KernelError(f"early page tables: no PMD level for {va:#x}")
