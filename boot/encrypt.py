"""Encrypting the kernel where it lies: the hardest hour of the boot.

The bytes are read through a mapping without the C-bit and written back through one
with it, over a buffer, by code that must not be overwritten meanwhile. So everything
needed moves to a work area behind the kernel: stack, routine, a 2 MiB buffer, and
page tables made for the occasion:

    VA = PA                     kernel and initrd, C = 1      what is written
    VA = PA + decrypted_base    the same,          C = 0, WP  what is read
    both                        work area,         C = 0

Neither these tables nor CR3 carry the C-bit: they lie in plain memory.

Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_identity.c, sme_encrypt_kernel();
arch/x86/mm/mem_encrypt_boot.S, sme_encrypt_execute(), __enc_copy().
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hw.cpu import Cpu, Cr4
from ..hw.errors import KernelError
from ..hw.msr import Pat
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr, align_up
from ..kernel.cc import CcAttr, EncryptionState, cc_platform_has
from ..kernel.pgtable import (
    P4D_SIZE,
    PMD_FLAGS_DEC,
    PMD_FLAGS_DEC_WP,
    PMD_SIZE,
    PTE_FLAGS_DEC,
    PTE_FLAGS_DEC_WP,
    PUD_SIZE,
    encrypted,
    pgdir_shift,
    table_index,
)
from .identity_map import IdentityMapper, TablePool
from .image import KernelLayout

COPY_BUFFER_SIZE = PMD_SIZE
EXECUTE_SIZE = 2 * PAGE_SIZE + COPY_BUFFER_SIZE
"""Stack page, routine page, copy buffer: what the copy itself needs."""

PGDIR_SIZE_5_LEVEL = 1 << 48

PAT_INDEX_5_SHIFT = 40
PAT_TYPE_WP = 5


@dataclass(frozen=True)
class WorkArea:
    """Where the copy works, and how its size comes about; all physical.

    Attributes:
        start: 2 MiB aligned, behind the kernel.
        execute_end: end of stack, routine and buffer; the table pool begins here.
        pgtable_pages: pages that Linux's arithmetic reserves for tables.
        end: rounded up to 2 MiB.
    """

    start: PhysAddr
    execute_end: PhysAddr
    pgtable_pages: int
    end: PhysAddr

    @property
    def buffer(self) -> PhysAddr:
        """The 2 MiB between the two mappings."""
        return PhysAddr(self.start + 2 * PAGE_SIZE)


@dataclass(frozen=True)
class Encrypted:
    """What `sme_encrypt_kernel` did.

    Attributes:
        ranges: the encrypted ranges, the kernel first.
        workarea: the area it used.
        tables_used: pages of the pool that became tables.
        pgd: the table left in CR3.
        decrypted_base: offset of the second mapping.
    """

    ranges: tuple[tuple[PhysAddr, PhysAddr], ...]
    workarea: WorkArea
    tables_used: int
    pgd: PhysAddr
    decrypted_base: int


def sme_pgtable_calc(length: int, five_levels: bool) -> int:
    """Return how many bytes of tables a mapping of `length` bytes may need.

    Twice an upper bound: tables for the mapping, and tables to map those tables.

    Source: Linux 6.1.192 mem_encrypt_identity.c, sme_pgtable_calc().
    """
    spans = [P4D_SIZE, PUD_SIZE]
    if five_levels:
        spans.insert(0, PGDIR_SIZE_5_LEVEL)
    entries = sum((_div_up(length, span) + 1) * PAGE_SIZE for span in spans)
    entries += 2 * PAGE_SIZE  # unaligned ends use PTEs: one table each
    tables = sum(_div_up(entries, span) * PAGE_SIZE for span in spans)
    return entries + tables


def plan_workarea(
    layout: KernelLayout, initrd_length: int, five_levels: bool
) -> WorkArea:
    """Compute the work area as Linux does.

    Args:
        layout: the kernel's linked ranges.
        initrd_length: bytes, rounded up to a page; 0 for none.
        five_levels: LA57 is on.

    Raises:
        KernelError: it does not fit the area the kernel was linked with.
    """
    start = layout.workarea.start
    execute_end = start + EXECUTE_SIZE
    mapped = execute_end - layout.kernel_start  # the area's first part goes with it
    pgtable = PAGE_SIZE + 2 * sme_pgtable_calc(mapped, five_levels)
    if initrd_length:
        pgtable += 2 * sme_pgtable_calc(initrd_length, five_levels)
    # The tables that map the work area itself, tables included.
    pgtable += sme_pgtable_calc(EXECUTE_SIZE + pgtable, five_levels)
    end = align_up(execute_end + pgtable, PMD_SIZE)
    if end > layout.workarea.end:
        raise KernelError(
            f"work area [{start:#x}, {end:#x}) for {pgtable // PAGE_SIZE} table pages "
            f"exceeds the linked one, which ends at {layout.workarea.end:#x}"
        )
    return WorkArea(start, PhysAddr(execute_end), pgtable // PAGE_SIZE, PhysAddr(end))


def sme_encrypt_kernel(
    cpu: Cpu,
    state: EncryptionState,
    layout: KernelLayout,
    initrd: tuple[PhysAddr, int] | None,
) -> Encrypted | None:
    """Encrypt kernel and initrd in place; return None where there is nothing to do.

    Args:
        cpu: the boot core, on an identity map without C that covers everything named.
        state: the decision; only a host with an active mask encrypts.
        layout: where the kernel lies; its end is rounded up to 2 MiB.
        initrd: address and length in bytes, or None.

    Returns:
        What was done. CR3 holds the new table, without the C-bit, and CR4.PGE is 1.

    Raises:
        KernelError: the work area overlaps the initrd, or is too small.

    Context: boot core alone; nothing runs from the ranges meanwhile.

    Source: Linux 6.1.192 mem_encrypt_identity.c, sme_encrypt_kernel(); the refusal of
        an overlapping initrd is ours, Linux would destroy it.
    """
    if not cc_platform_has(state, CcAttr.HOST_MEM_ENCRYPT):
        return None
    five_levels = bool(Cr4(cpu.read_cr4()).la57)
    ranges = [(layout.kernel_start, layout.kernel_end)]
    initrd_length = 0
    if initrd is not None:
        initrd_start = initrd[0]
        initrd_end = PhysAddr(align_up(initrd_start + initrd[1], PAGE_SIZE))
        initrd_length = initrd_end - initrd_start
        ranges.append((initrd_start, initrd_end))
    area = plan_workarea(layout, initrd_length, five_levels)
    _refuse_overlap(area, ranges[1:])

    pool = TablePool(area.execute_end, layout.workarea.end)
    current = IdentityMapper(cpu, state, pool, cpu.read_cr3(), five_levels)
    # ORDER: before anything moves there: today's tables may map the work area large,
    # small, or not at all; existing entries stay.
    current.map_range(area.start, area.end, area.start, PMD_FLAGS_DEC, PTE_FLAGS_DEC)
    cpu.write_cr3(cpu.read_cr3())

    base = decrypted_base(area.end, ranges[1:], five_levels)
    pgd = pool.take(cpu)
    new = IdentityMapper(cpu, state, pool, pgd, five_levels)
    for start, end in ranges:
        enc = encrypted(state, PMD_FLAGS_DEC), encrypted(state, PTE_FLAGS_DEC)
        new.map_range(start, end, start, *enc)
        wp = PMD_FLAGS_DEC_WP, PTE_FLAGS_DEC_WP
        new.map_range(start, end, start + base, *wp)
    for offset in (0, base):
        new.map_range(
            area.start, area.end, area.start + offset, PMD_FLAGS_DEC, PTE_FLAGS_DEC
        )

    for start, end in ranges:
        source = VirtAddr(start + base)
        sme_encrypt_execute(cpu, VirtAddr(start), source, end - start, area, pgd)

    # ORDER: only now: the copies needed these aliases. Left in place, a stray read
    # through one would show ciphertext, a stray write would destroy it.
    for start, end in [*ranges, (area.start, area.end)]:
        new.clear_pgd(start + base, end + base)
    cpu.write_cr3(cpu.read_cr3())
    return Encrypted(tuple(ranges), area, pool.used, pgd, base)


def decrypted_base(
    workarea_end: int, others: list[tuple[PhysAddr, PhysAddr]], five_levels: bool
) -> int:
    """Return the offset of the second mapping: the first PGD slot that nobody uses.

    Source: Linux 6.1.192 mem_encrypt_identity.c, sme_encrypt_kernel().
    """
    shift = pgdir_shift(five_levels)
    ends = [workarea_end, *(end for _, end in others)]
    return max((table_index(end, shift) + 1) & 511 for end in ends) << shift


def sme_encrypt_execute(
    cpu: Cpu,
    encrypted_va: VirtAddr,
    decrypted_va: VirtAddr,
    length: int,
    area: WorkArea,
    pgd: PhysAddr,
) -> None:
    """Copy a range over itself: read without the C-bit, write with it.

    Args:
        cpu: the boot core.
        encrypted_va: mapping of the range with C = 1.
        decrypted_va: mapping of the same frames with C = 0, write-protected.
        length: bytes; 0 makes one empty pass.
        area: holds the buffer, mapped plain and identically in both tables.
        pgd: the tables with both mappings, loaded without the C-bit.

    Context: interrupts off; CR3 and CR4.PGE are not restored.

    Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_boot.S.
    """
    # ORDER: the tables first, then PGE off and on: global entries of the old tables
    # would survive the write of CR3 and translate without the C-bit.
    cpu.write_cr3(pgd)
    cr4 = Cr4(cpu.read_cr4())
    cpu.write_cr4(cr4.replace(pge=0).value)
    cpu.write_cr4(cr4.replace(pge=1).value)

    pat = cpu.rdmsr(Pat.ADDRESS)
    cleared = pat & ~(0xFF << PAT_INDEX_5_SHIFT)
    cpu.wrmsr(Pat.ADDRESS, cleared | PAT_TYPE_WP << PAT_INDEX_5_SHIFT)

    # ORDER: before the first byte is read: lines that the loader left dirty under
    # C = 0 would reach DRAM later, over the ciphertext.
    cpu.wbinvd()

    done = 0
    while True:
        step = min(COPY_BUFFER_SIZE, length - done)
        # ORDER: over the buffer, never straight: source and target are one frame, and
        # half of a 16-byte block under each tag decrypts to neither.
        cpu.copy(area.buffer, decrypted_va + done, step)
        cpu.copy(encrypted_va + done, area.buffer, step)
        done += step
        if done >= length:
            break
    cpu.wrmsr(Pat.ADDRESS, pat)


def _refuse_overlap(area: WorkArea, others: list[tuple[PhysAddr, PhysAddr]]) -> None:
    for start, end in others:
        if start < area.end and area.start < end:
            raise KernelError(
                f"initrd [{start:#x}, {end:#x}) overlaps the work area "
                f"[{area.start:#x}, {area.end:#x}) of the in-place encryption"
            )


def _div_up(value: int, divisor: int) -> int:
    return -(-value // divisor)
