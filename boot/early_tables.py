"""The tables the kernel is linked with, fixed up for where it lies and for the C-bit.

Linux keeps them in .data; distribution kernels are stripped of the symbols that would
say where. The reference keeps its own variables in the first pages of the image's
.bss, which is zero at this time: inside the range that is encrypted in place.

Source: Linux 6.1.192 arch/x86/kernel/head64.c, __startup_64(); head_64.S (data).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hw.cpu import Cpu
from ..hw.errors import KernelError
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr, align_up
from ..kernel.cc import EncryptionState
from ..kernel.early_pgtable import EARLY_DYNAMIC_PAGE_TABLES
from ..kernel.mem_encrypt import EarlyWindow
from ..kernel.pgtable import (
    KERNPG_TABLE_NOENC,
    MAX_PHYSMEM_BITS_4_LEVEL,
    MAX_PHYSMEM_BITS_5_LEVEL,
    PAGE_KERNEL_LARGE_EXEC,
    PAGE_TABLE_NOENC,
    PMD_FLAGS_LARGE,
    PMD_SHIFT,
    PMD_SIZE,
    PTRS_PER_TABLE,
    PUD_SIZE,
    START_KERNEL_MAP,
    Page,
    encrypted,
    table_index,
    table_shifts,
)
from .image import KernelLayout

FIXMAP_PMDS = (506, 507)
"""Entries of level2_fixmap_pgt that lead to level1 tables. Source: asm/fixmap.h."""


PAGES_OF = {
    "early_top_pgt": 1,
    "level4_kernel_pgt": 1,
    "level3_kernel_pgt": 1,
    "level2_kernel_pgt": 1,
    "level2_fixmap_pgt": 1,
    "level1_fixmap_pgt": len(FIXMAP_PMDS),
    "boot_params": 1,
    "boot_command_line": 1,
    "conversion_buffer": 1,
    "early_dynamic_pgts": EARLY_DYNAMIC_PAGE_TABLES,
}
"""The reference kernel's own variables, in the order they lie in memory."""


@dataclass(frozen=True)
class KernelData:
    """Where the variables of `PAGES_OF` lie: physical addresses, page aligned.

    Attributes:
        end: behind the last one.
    """

    early_top_pgt: PhysAddr
    level4_kernel_pgt: PhysAddr
    level3_kernel_pgt: PhysAddr
    level2_kernel_pgt: PhysAddr
    level2_fixmap_pgt: PhysAddr
    level1_fixmap_pgt: PhysAddr
    boot_params: PhysAddr
    boot_command_line: PhysAddr
    conversion_buffer: PhysAddr
    early_dynamic_pgts: PhysAddr
    end: PhysAddr

    @classmethod
    def place(cls, layout: KernelLayout) -> KernelData:
        """Lay the variables out in .bss, or behind _end where that has no room.

        Raises:
            KernelError: neither has room.
        """
        size = sum(PAGES_OF.values()) * PAGE_SIZE
        shared = layout.bss_decrypted
        bss_end = shared.start if shared.size else layout.bss.end
        for start, end in (
            (layout.bss.start, bss_end),
            (layout.end, layout.kernel_end),
        ):
            at = align_up(start, PAGE_SIZE)
            if at + size > end:
                continue
            places = {}
            for name, pages in PAGES_OF.items():
                places[name] = PhysAddr(at)
                at += pages * PAGE_SIZE
            return cls(**places, end=PhysAddr(at))
        raise KernelError(
            f"the kernel's .bss [{layout.bss.start:#x}, {layout.bss.end:#x}) and the "
            f"tail behind _end {layout.end:#x} have no {size:#x} bytes for early tables"
        )

    def window(self, layout: KernelLayout) -> EarlyWindow:
        """Return the two fixmap pages that early conversions map."""
        base = START_KERNEL_MAP + PUD_SIZE + (FIXMAP_PMDS[0] << PMD_SHIFT)
        slots = layout.virt(self.level1_fixmap_pgt)
        return EarlyWindow(
            VirtAddr(base),
            VirtAddr(slots),
            VirtAddr(base + PAGE_SIZE),
            VirtAddr(slots + 8),
            layout.virt(self.conversion_buffer),
        )


def check_load_address(layout: KernelLayout, five_levels: bool) -> None:
    """Refuse a load address that __startup_64 answers with an endless loop.

    Raises:
        KernelError: not 2 MiB aligned, or beyond MAX_PHYSMEM_BITS.
    """
    width = MAX_PHYSMEM_BITS_5_LEVEL if five_levels else MAX_PHYSMEM_BITS_4_LEVEL
    if layout.text_start % PMD_SIZE or layout.text_start >> width:
        raise KernelError(
            f"kernel at {layout.text_start:#x}: a multiple of 2 MiB below "
            f"{1 << width:#x} expected"
        )


def startup_64_tables(
    cpu: Cpu,
    state: EncryptionState,
    layout: KernelLayout,
    data: KernelData,
    five_levels: bool,
) -> None:
    """Build early_top_pgt and what hangs from it, every entry with the C-bit.

    Args:
        cpu: the boot core, on an identity map without C.
        state: me_mask goes into every entry, tables and leaves alike.
        layout: where the kernel lies.
        data: where the tables go.
        five_levels: LA57 is on.

    Raises:
        KernelError: a load address that Linux refuses.

    Context: before the in-place encryption, which covers these tables too. They can
        be used only with the C-bit in CR3, afterwards.

    Source: Linux 6.1.192 arch/x86/kernel/head64.c, __startup_64().
    """
    check_load_address(layout, five_levels)
    table = encrypted(state, PAGE_TABLE_NOENC)
    kernel_table = encrypted(state, KERNPG_TABLE_NOENC)
    top, pud = data.early_top_pgt, data.level3_kernel_pgt

    if five_levels:
        cpu.store64(top + 8 * 511, data.level4_kernel_pgt | table)
        cpu.store64(data.level4_kernel_pgt + 8 * 511, pud | table)
    else:
        cpu.store64(top + 8 * 511, pud | table)
    cpu.store64(pud + 8 * 510, data.level2_kernel_pgt | kernel_table)
    cpu.store64(pud + 8 * 511, data.level2_fixmap_pgt | table)
    for i, index in enumerate(FIXMAP_PMDS):
        entry = data.level1_fixmap_pgt + i * PAGE_SIZE | table
        cpu.store64(data.level2_fixmap_pgt + 8 * index, entry)
    cpu.store_array(data.level2_kernel_pgt, kernel_pmds(state, layout))
    _map_switch_over(cpu, state, layout, data, five_levels)


def kernel_pmds(
    state: EncryptionState, layout: KernelLayout
) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return level2_kernel_pgt: 512 entries of 2 MiB from __START_KERNEL_map on.

    Only those that hold _text to _end are present, moved by phys_base and the C-bit;
    the one that holds _end itself counts, though _end be its first byte.
    """
    frames = np.arange(PTRS_PER_TABLE, dtype=np.uint64) << np.uint64(PMD_SHIFT)
    entries = frames | np.uint64(PAGE_KERNEL_LARGE_EXEC)
    first = table_index(layout.virtual_base, PMD_SHIFT)
    last = table_index(layout.virt(layout.end), PMD_SHIFT)
    phys_base = layout.text_start - (layout.virtual_base - START_KERNEL_MAP)
    used = slice(first, last + 1)
    entries[used] += np.uint64((phys_base + state.me_mask) % (1 << 64))
    absent = np.ones(PTRS_PER_TABLE, np.bool_)
    absent[used] = False
    entries[absent] &= ~np.uint64(Page.PRESENT)
    return entries


def share_bss_decrypted(
    cpu: Cpu, state: EncryptionState, layout: KernelLayout, data: KernelData
) -> None:
    """Take the C-bit out of the PMDs that map .bss..decrypted.

    What lies there was encrypted a moment ago and reads as garbage until cleared.
    Linux does not flush here. On a part without coherent tags the lines just copied
    may still be dirty under C = 1 when .bss is cleared under C = 0, and which of the
    two reaches DRAM last is open; this machine reports it as a hazard. The reference
    flushes.

    Context: after the in-place encryption, on its tables: level2_kernel_pgt is
        reached through the identity map with C.

    Source: Linux 6.1.192 head64.c, sme_postprocess_startup().
    """
    shared = layout.bss_decrypted
    if state.me_mask and shared.size:
        # ORDER: between the copy through C = 1 and the first store through C = 0.
        cpu.wbinvd()
    for pa in range(shared.start, shared.end, PMD_SIZE):
        index = table_index(layout.virt(PhysAddr(pa)), PMD_SHIFT)
        slot = data.level2_kernel_pgt + 8 * index
        cpu.store64(slot, cpu.load64(slot) - state.me_mask)


def _map_switch_over(
    cpu: Cpu,
    state: EncryptionState,
    layout: KernelLayout,
    data: KernelData,
    five_levels: bool,
) -> None:
    """Map _text.._end identically, for the moment after CR3 changes.

    Every table is entered at two neighbouring indices, as the kernel may cross one.
    """
    flags = encrypted(state, KERNPG_TABLE_NOENC)
    start = layout.text_start
    shifts = table_shifts(five_levels)[:-2]
    # Linux takes its spare tables in this order: PUD, PMD, and last a P4D if any.
    order = (2, 0, 1) if five_levels else (0, 1)
    tables = [PhysAddr(data.early_dynamic_pgts + i * PAGE_SIZE) for i in order]
    parent = data.early_top_pgt
    for shift, child in zip(shifts, tables, strict=True):
        index = table_index(start, shift)
        for i in (index, (index + 1) % PTRS_PER_TABLE):
            cpu.store64(parent + 8 * i, child | flags)
        parent = child
    entry = encrypted(state, PMD_FLAGS_LARGE) + start
    count = -(-(layout.end - layout.text_start) // PMD_SIZE)
    for i in range(count):
        index = (i + (start >> PMD_SHIFT)) % PTRS_PER_TABLE
        cpu.store64(parent + 8 * index, entry + i * PMD_SIZE)
