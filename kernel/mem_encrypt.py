"""Memory encryption after the kernel runs at its own addresses.

Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_amd.c, mem_encrypt.c.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hw.cpu import Cpu
from ..hw.errors import KernelError
from ..hw.msr import Pat
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr, align_down, align_up
from .cc import CcAttr, EncryptionState, cc_platform_has
from .early_pgtable import EarlyPageTables
from .pgtable import (
    DEFAULT_SUPPORTED_PTE_MASK,
    PMD_FLAGS_DEC,
    PMD_SIZE,
    PTE_FLAGS,
    PTE_FLAGS_DEC_WP,
    Page,
    encrypted,
)
from .setup import BOOT_PARAMS_SIZE, COMMAND_LINE_SIZE

PAT_TYPE_WP = 5

_READ = int(Page.PRESENT | Page.USER | Page.ACCESSED)
_NO_EXEC = int(Page.NX)
_NONE = int(Page.GLOBAL | Page.ACCESSED)  # PROTNONE shares the bit of GLOBAL
_PRIVATE = (_NONE, *[_READ | _NO_EXEC] * 3, *[_READ] * 4)
_WRITE = _READ | Page.RW
_SHARED = (
    _NONE,
    _READ | _NO_EXEC,
    *[_WRITE | _NO_EXEC] * 2,
    *[_READ] * 2,
    *[_WRITE] * 2,
)
PROTECTION_MAP = tuple(int(flags) for flags in (*_PRIVATE, *_SHARED))
"""Protections of user mappings, indexed by VM_READ 1, VM_WRITE 2, VM_EXEC 4,
VM_SHARED 8, without the C-bit. Source: Linux 6.1.192 arch/x86/mm/pgprot.c."""


@dataclass(frozen=True)
class PageDefaults:
    """What new mappings carry, decided once by `sme_early_init`.

    Attributes:
        early_pmd_flags: 2 MiB entries of the early direct map.
        supported_pte_mask: __supported_pte_mask.
        protection_map: 16 user protections, see `PROTECTION_MAP`.
    """

    early_pmd_flags: int
    supported_pte_mask: int
    protection_map: tuple[int, ...]


def sme_early_init(state: EncryptionState) -> PageDefaults:
    """Put the C-bit into every default, so that what is mapped from now on has it.

    Source: Linux 6.1.192 mem_encrypt_amd.c, sme_early_init().
    """
    return PageDefaults(
        encrypted(state, PMD_FLAGS_DEC),
        encrypted(state, DEFAULT_SUPPORTED_PTE_MASK & ~state.me_mask),
        tuple(encrypted(state, flags) for flags in PROTECTION_MAP),
    )


def sme_map_bootdata(
    tables: EarlyPageTables, cpu: Cpu, state: EncryptionState, boot_params: PhysAddr
) -> PhysAddr:
    """Map the zero page and the command line as the boot loader left them: plain.

    Args:
        tables: the early direct map.
        cpu: the boot core.
        state: only a host with SME does this.
        boot_params: physical address of the 4096-byte zero page.

    Returns:
        Physical address of the command line, 0 for none.

    Source: Linux 6.1.192 mem_encrypt_amd.c, sme_map_bootdata().
    """
    host = cc_platform_has(state, CcAttr.HOST_MEM_ENCRYPT)
    if host:
        _map_bootdata(tables, cpu, boot_params, BOOT_PARAMS_SIZE, mapped=True)
    command_line = _command_line_pointer(tables, cpu, boot_params)
    if host and command_line:
        _map_bootdata(tables, cpu, command_line, COMMAND_LINE_SIZE, mapped=True)
    return command_line


def sme_unmap_bootdata(
    tables: EarlyPageTables, cpu: Cpu, state: EncryptionState, boot_params: PhysAddr
) -> None:
    """Drop the mappings of `sme_map_bootdata`; later touches map them encrypted.

    Source: Linux 6.1.192 mem_encrypt_amd.c, sme_unmap_bootdata().
    """
    if not cc_platform_has(state, CcAttr.HOST_MEM_ENCRYPT):
        return
    # ORDER: the pointer is read while its page is still mapped plain.
    command_line = _command_line_pointer(tables, cpu, boot_params)
    _map_bootdata(tables, cpu, boot_params, BOOT_PARAMS_SIZE, mapped=False)
    if command_line:
        _map_bootdata(tables, cpu, command_line, COMMAND_LINE_SIZE, mapped=False)


def sme_early_encrypt(
    cpu: Cpu, state: EncryptionState, window: EarlyWindow, pa: PhysAddr, size: int
) -> None:
    """Encrypt a range in place through two temporary mappings; see `_enc_dec`."""
    _enc_dec(cpu, state, window, pa, size, encrypt=True)


def sme_early_decrypt(
    cpu: Cpu, state: EncryptionState, window: EarlyWindow, pa: PhysAddr, size: int
) -> None:
    """Decrypt a range in place through two temporary mappings; see `_enc_dec`."""
    _enc_dec(cpu, state, window, pa, size, encrypt=False)


def mem_encrypt_init(state: EncryptionState) -> str | None:
    """Return the line that says which features are active; None if none is.

    Source: Linux 6.1.192 arch/x86/mm/mem_encrypt.c,
    print_mem_encrypt_feature_info().
    """
    if not cc_platform_has(state, CcAttr.MEM_ENCRYPT):
        return None
    line = "Memory Encryption Features active: AMD"
    if cc_platform_has(state, CcAttr.HOST_MEM_ENCRYPT):
        # SME is exclusive: a guest never sees it.
        return f"{line} SME"
    for attribute, name in (
        (CcAttr.GUEST_MEM_ENCRYPT, "SEV"),
        (CcAttr.GUEST_STATE_ENCRYPT, "SEV-ES"),
        (CcAttr.GUEST_SEV_SNP, "SEV-SNP"),
    ):
        if cc_platform_has(state, attribute):
            line += f" {name}"
    return line


@dataclass(frozen=True)
class EarlyWindow:
    """Two fixmap slots and a page of the kernel: what an early conversion needs.

    Attributes:
        source_va, target_va: virtual pages whose PTEs lie at the next two.
        source_slot, target_slot: virtual addresses of those PTEs.
        buffer: one page of the kernel's own memory.
    """

    source_va: VirtAddr
    source_slot: VirtAddr
    target_va: VirtAddr
    target_slot: VirtAddr
    buffer: VirtAddr


def _enc_dec(
    cpu: Cpu,
    state: EncryptionState,
    window: EarlyWindow,
    pa: PhysAddr,
    size: int,
    *,
    encrypt: bool,
) -> None:
    """Convert [pa, pa + size) page by page, over a buffer.

    Args:
        cpu: the boot core.
        state: with me_mask = 0 nothing happens.
        window: where source and target are mapped.
        pa: physical, any alignment.
        size: bytes.
        encrypt: from plain to encrypted, or back.

    Raises:
        KernelError: PAT index 5 is not WP, so the source cannot be mapped.

    Context: other cores idle; nobody uses the range meanwhile.

    Source: Linux 6.1.192 mem_encrypt_amd.c, __sme_early_enc_dec().
    """
    if not state.me_mask:
        return
    if Pat(cpu.rdmsr(Pat.ADDRESS)).pa5 != PAT_TYPE_WP:
        raise KernelError(
            f"in-place conversion of [{pa:#x}, {pa + size:#x}): PAT index 5 is not WP, "
            "the source cannot be mapped write-protected"
        )
    # ORDER: before the first page: lines of the old tag would be written back later.
    cpu.wbinvd()
    while size:
        step = min(PAGE_SIZE - pa % PAGE_SIZE, size)
        frame, offset = align_down(pa, PAGE_SIZE), pa % PAGE_SIZE
        source = frame | int(PTE_FLAGS_DEC_WP)
        target = frame | int(PTE_FLAGS)
        if encrypt:
            target = encrypted(state, target)
        else:
            source = encrypted(state, source)
        for slot, va, entry in (
            (window.source_slot, window.source_va, source),
            (window.target_slot, window.target_va, target),
        ):
            cpu.store64(slot, entry)
            cpu.invlpg(va)
        # ORDER: over the buffer, as source and target are the same frame.
        cpu.copy(window.buffer, window.source_va + offset, step)
        cpu.copy(window.target_va + offset, window.buffer, step)
        for slot, va in (
            (window.source_slot, window.source_va),
            (window.target_slot, window.target_va),
        ):
            cpu.store64(slot, 0)
            cpu.invlpg(va)
        pa = PhysAddr(pa + step)
        size -= step


def _map_bootdata(
    tables: EarlyPageTables, cpu: Cpu, pa: int, size: int, *, mapped: bool
) -> None:
    for frame in range(
        align_down(pa, PMD_SIZE), align_up(pa + size, PMD_SIZE), PMD_SIZE
    ):
        entry = frame + PMD_FLAGS_DEC if mapped else 0
        tables.make(tables.direct_map(frame), entry)
    # ORDER: last: the TLB may still hold what the fault handler mapped encrypted.
    cpu.write_cr3(cpu.read_cr3())


def _command_line_pointer(
    tables: EarlyPageTables, cpu: Cpu, boot_params: PhysAddr
) -> PhysAddr:
    """Read cmd_line_ptr (0x228) and ext_cmd_line_ptr (0x0C8) of the zero page."""
    page = tables.direct_map(boot_params)
    low = int.from_bytes(cpu.load(page + 0x228, 4), "little")
    high = int.from_bytes(cpu.load(page + 0x0C8, 4), "little")
    return PhysAddr(low | high << 32)
