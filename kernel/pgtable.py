"""Page-table words by Linux's names: bits, masks, indices, and the flag sets.

Entries are plain integers. Flag sets are given without the C-bit; `encrypted` adds it
and `decrypted` takes it away.

Source: Linux 6.1.192 arch/x86/include/asm/pgtable_types.h, pgtable_64_types.h.
"""

from __future__ import annotations

from enum import IntFlag

from ..hw.types import PhysAddr
from .cc import EncryptionState

PTRS_PER_TABLE = 512

PAGE_SHIFT = 12
PMD_SHIFT = 21
PUD_SHIFT = 30
P4D_SHIFT = 39
PGDIR_SHIFT_5_LEVEL = 48

PMD_SIZE = 1 << PMD_SHIFT
PUD_SIZE = 1 << PUD_SHIFT
P4D_SIZE = 1 << P4D_SHIFT

START_KERNEL_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map: physical 0 in the kernel's high map (plus phys_base)."""

PAGE_OFFSET_4_LEVEL = 0xFFFF_8880_0000_0000
PAGE_OFFSET_5_LEVEL = 0xFF11_0000_0000_0000
"""Start of the direct map without KASLR. Source: Documentation/x86/x86_64/mm.rst."""

MAX_PHYSMEM_BITS_4_LEVEL = 46
MAX_PHYSMEM_BITS_5_LEVEL = 52


class Page(IntFlag):
    """_PAGE_*: the bits of an entry."""

    PRESENT = 1 << 0
    RW = 1 << 1
    USER = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    ACCESSED = 1 << 5
    DIRTY = 1 << 6
    PSE = 1 << 7
    PAT = 1 << 7
    GLOBAL = 1 << 8
    PAT_LARGE = 1 << 12
    DEVMAP = 1 << 58
    NX = 1 << 63


KERNPG_TABLE_NOENC = int(Page.PRESENT | Page.RW | Page.ACCESSED | Page.DIRTY)
PAGE_TABLE_NOENC = KERNPG_TABLE_NOENC | Page.USER
PAGE_KERNEL_LARGE_EXEC = KERNPG_TABLE_NOENC | Page.PSE | Page.GLOBAL

PMD_FLAGS_LARGE = PAGE_KERNEL_LARGE_EXEC & ~Page.GLOBAL
PMD_FLAGS_DEC = PMD_FLAGS_LARGE
PMD_FLAGS_DEC_WP = (PMD_FLAGS_DEC & ~Page.PCD) | Page.PAT_LARGE | Page.PWT

PTE_FLAGS = KERNPG_TABLE_NOENC
PTE_FLAGS_DEC = PTE_FLAGS
PTE_FLAGS_DEC_WP = (PTE_FLAGS_DEC & ~Page.PCD) | Page.PAT | Page.PWT
"""PAT, PWT, not PCD: index 5 of the PAT, which must then be WP."""

BOOT_TABLE_FLAGS = int(Page.PRESENT | Page.RW | Page.USER)
BOOT_PMD_FLAGS = int(Page.PRESENT | Page.RW | Page.PSE | Page.GLOBAL)
"""The boot loader's identity map. Source: boot/compressed/head_64.S."""

DEFAULT_SUPPORTED_PTE_MASK = ~0 & 0xFFFF_FFFF_FFFF_FFFF
PFN_BITS = 0xFFFF_FFFF_FFFF_F000


def encrypted(state: EncryptionState, flags: int) -> int:
    """pgprot_encrypted: return the flags with the C-bit, if there is one."""
    return int(flags) | state.cc_mask


def decrypted(state: EncryptionState, flags: int) -> int:
    """pgprot_decrypted: return the flags without the C-bit."""
    return int(flags) & ~state.cc_mask


PAGE_CHG_BITS = int(
    Page.PCD | Page.PWT | Page.ACCESSED | Page.DIRTY | Page.PSE | Page.DEVMAP
) | (1 << 9 | 1 << 10 | 1 << 11)
"""_PAGE_CHG_MASK without the frame and the C-bit: what a change of protection keeps;
bits 9 to 11 are Linux's SPECIAL, UFFD_WP and SOFT_DIRTY."""


def pte_modify(state: EncryptionState, pte: int, protection: int) -> int:
    """Return the entry with another protection; frame, history and C-bit stay.

    So mprotect() neither encrypts nor decrypts a page.

    Source: Linux 6.1.192 arch/x86/include/asm/pgtable.h, pte_modify().
    """
    kept = PAGE_CHG_BITS | pfn_mask(state) | state.cc_mask
    return pte & kept | int(protection) & ~kept


def pfn_mask(state: EncryptionState) -> int:
    """PTE_PFN_MASK: the address bits of an entry; the C-bit counts as a flag."""
    return PFN_BITS & state.physical_mask


def entry_phys(state: EncryptionState, entry: int) -> PhysAddr:
    """Return the frame or table that an entry names, the C-bit taken out."""
    return PhysAddr(entry & pfn_mask(state))


def table_index(va: int, shift: int) -> int:
    """Return the index of `va` in a table whose entries cover 1 << shift bytes."""
    return va >> shift & PTRS_PER_TABLE - 1


def pgdir_shift(five_levels: bool) -> int:
    """PGDIR_SHIFT: 48 with LA57, else 39."""
    return PGDIR_SHIFT_5_LEVEL if five_levels else P4D_SHIFT


def table_shifts(five_levels: bool) -> tuple[int, ...]:
    """Return the shifts of all levels from the PGD down to the PTE table."""
    lower = (P4D_SHIFT, PUD_SHIFT, PMD_SHIFT, PAGE_SHIFT)
    return (PGDIR_SHIFT_5_LEVEL, *lower) if five_levels else lower


def page_offset(five_levels: bool) -> int:
    """PAGE_OFFSET: where the direct map of physical memory begins."""
    return PAGE_OFFSET_5_LEVEL if five_levels else PAGE_OFFSET_4_LEVEL
