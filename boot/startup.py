"""The order of it all: from the boot loader's door to the line that says SME.

Every step of `startup` is one of Linux's, in Linux's order; the boot log says in a
reader's words what each one found or did.

Source: Linux 6.1.192 arch/x86/kernel/head_64.S, head64.c, setup.c; init/main.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ..hw.cpu import Cpu, Cr0, Cr4
from ..hw.faults import PageFault
from ..hw.msr import Efer, Syscfg
from ..hw.types import PhysAddr, VirtAddr, align_up
from ..kernel.cc import CcAttr, EncryptionState, cc_platform_has
from ..kernel.early_pgtable import EarlyPageTables
from ..kernel.mem_encrypt import (
    mem_encrypt_init,
    sme_early_init,
    sme_map_bootdata,
    sme_unmap_bootdata,
)
from ..kernel.pat import pat_init
from ..kernel.pgtable import PMD_FLAGS_DEC
from ..kernel.setup import BOOT_PARAMS_SIZE, COMMAND_LINE_SIZE
from .early_tables import KernelData, share_bss_decrypted, startup_64_tables
from .encrypt import Encrypted, sme_encrypt_kernel
from .loader import HandOver
from .params import BootParams
from .sme import Detection, sme_enable


class Stage(Enum):
    """Moments at which an observer may look at the machine."""

    LOADED = "everything lies in plain memory"
    TABLES_BUILT = "__startup_64's tables are written, nothing is encrypted"
    ENCRYPTED = "kernel and initrd are encrypted, CR3 holds the work area's tables"
    DONE = "mem_encrypt_init is over"


Observer = Callable[[Stage, EncryptionState], None]
"""Gets the stage and what is decided so far."""


@dataclass
class BootLog:
    """The lines of the boot, as dmesg would show them.

    Attributes:
        messages: every line so far, without time stamp.
        sink: called with each finished line.
    """

    sink: Callable[[str], None] = lambda line: None
    messages: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add a line; before the clock runs, every time stamp is zero."""
        self.messages.append(text)
        self.sink(f"[    0.000000] {text}")


@dataclass(frozen=True)
class Booted:
    """The state that `startup` leaves behind.

    Attributes:
        detection: what `sme_enable` found, with its reason.
        encrypted: what was encrypted in place; None if nothing.
        data: where the kernel's own variables lie.
        tables: the early direct map, still served by the page-fault handler.
        physical_bits: width of a physical address as the kernel counts it.
        command_line: as the kernel copied it.
    """

    detection: Detection
    encrypted: Encrypted | None
    data: KernelData
    tables: EarlyPageTables
    physical_bits: int
    command_line: bytes

    @property
    def state(self) -> EncryptionState:
        """What early boot decided."""
        return self.detection.state


def startup(
    cpu: Cpu,
    hand_over: HandOver,
    log: BootLog,
    observe: Observer = lambda stage, state: None,
    data: KernelData | None = None,
) -> Booted:
    """Boot the reference kernel from its 64-bit entry to `mem_encrypt_init`.

    Args:
        cpu: the boot core in long mode, on the boot loader's identity map.
        hand_over: what the loader placed where.
        log: receives what happens.
        observe: called at each `Stage`; may look, must not touch.
        data: where the kernel's own variables go; None places them in .bss.

    Raises:
        KernelError: the kernel refuses to boot; nothing was encrypted yet.
    """
    observe(Stage.LOADED, EncryptionState())
    layout = hand_over.layout
    five_levels = bool(Cr4(cpu.read_cr4()).la57)
    data = data or KernelData.place(layout)
    detection = sme_enable(cpu, VirtAddr(hand_over.boot_params))
    state = detection.state
    _say_detection(cpu, detection, log)

    startup_64_tables(cpu, state, layout, data, five_levels)
    observe(Stage.TABLES_BUILT, state)
    done = sme_encrypt_kernel(cpu, state, layout, _initrd(cpu, hand_over))
    if done is not None:
        _say_encrypted(done, log)
    observe(Stage.ENCRYPTED, state)
    # ORDER: after the encryption, which covers level2_kernel_pgt: through the identity
    # map with C it is written as what it will be read as.
    share_bss_decrypted(cpu, state, layout, data)

    switch_to_kernel_tables(cpu, state, data, five_levels)
    tables = EarlyPageTables(
        cpu,
        state,
        top=data.early_top_pgt,
        dynamic=data.early_dynamic_pgts,
        kernel_va=layout.virt,
        five_levels=five_levels,
        pmd_flags=PMD_FLAGS_DEC,
    )
    command_line = _x86_64_start_kernel(cpu, state, hand_over, data, tables, log)
    physical_bits = early_detect_mem_encrypt(cpu)
    pat_init(cpu)
    _say_setup(cpu, state, hand_over, physical_bits, log)
    line = mem_encrypt_init(state)
    if line is not None:
        log.say(line)
    observe(Stage.DONE, state)
    return Booted(detection, done, data, tables, physical_bits, command_line)


def set_up_efer(cpu: Cpu) -> None:
    """Turn SYSCALL on, and no-execute where the processor has it.

    Source: Linux 6.1.192 arch/x86/kernel/head_64.S ("Setup EFER").
    """
    efer = Efer(cpu.rdmsr(Efer.ADDRESS))
    cpu.wrmsr(Efer.ADDRESS, efer.replace(sce=1, nxe=int(cpu.model.nx)).value)


def switch_to_kernel_tables(
    cpu: Cpu, state: EncryptionState, data: KernelData, five_levels: bool
) -> None:
    """Load early_top_pgt with the C-bit and leave the identity map behind.

    Source: Linux 6.1.192 arch/x86/kernel/head_64.S, behind the call of __startup_64.
    """
    old = Cr4(cpu.read_cr4())
    # ORDER: PGE before CR3 only sets the bit; the toggle after it is what drops the
    # global entries of the tables left behind.
    cpu.write_cr4(Cr4.of(pae=1, pge=1, mce=old.mce, la57=int(five_levels)).value)
    cpu.write_cr3(state.with_mask(data.early_top_pgt))
    new = Cr4(cpu.read_cr4())
    cpu.write_cr4(new.replace(pge=0).value)
    cpu.write_cr4(new.value)
    # ORDER: only now, as Linux does: no table up to here has an NX bit.
    set_up_efer(cpu)
    cr0 = Cr0(cpu.read_cr0())
    cpu.write_cr0(cr0.replace(write_protect=1, numeric_error=1).value)


def early_detect_mem_encrypt(cpu: Cpu) -> int:
    """Return x86_phys_bits: reduced as soon as SYSCFG[23] is 1, active or not.

    Source: Linux 6.1.192 arch/x86/kernel/cpu/amd.c, early_detect_mem_encrypt().
    """
    bits = cpu.cpuid(0x8000_0008).eax & 0xFF
    if cpu.cpuid(0x8000_0000).eax < 0x8000_001F:
        return bits
    leaf = cpu.cpuid(0x8000_001F)
    if leaf.eax & 1 and Syscfg(cpu.rdmsr(Syscfg.ADDRESS)).mem_encrypt:
        bits -= leaf.ebx >> 6 & 63
    return bits


def _x86_64_start_kernel(
    cpu: Cpu,
    state: EncryptionState,
    hand_over: HandOver,
    data: KernelData,
    tables: EarlyPageTables,
    log: BootLog,
) -> bytes:
    """Run on kernel addresses: reset tables, clear .bss, fetch the boot data.

    Source: Linux 6.1.192 arch/x86/kernel/head64.c, x86_64_start_kernel().
    """
    tables.reset()
    _clear_bss(cpu, hand_over, data)
    tables.pmd_flags = sme_early_init(state).early_pmd_flags
    cpu.set_handler(PageFault.vector, tables.handle_fault)
    return _copy_bootdata(cpu, state, hand_over, data, tables, log)


def _clear_bss(cpu: Cpu, hand_over: HandOver, data: KernelData) -> None:
    """Zero .bss through its own mappings; the decrypted part becomes readable now.

    The reference's own variables, which Linux keeps elsewhere, are left out.
    """
    layout = hand_over.layout
    bss = layout.bss
    first = data.end if data.early_top_pgt in bss else bss.start
    cpu.fill(layout.virt(PhysAddr(first)), 0, bss.end - first)


def _copy_bootdata(
    cpu: Cpu,
    state: EncryptionState,
    hand_over: HandOver,
    data: KernelData,
    tables: EarlyPageTables,
    log: BootLog,
) -> bytes:
    """Copy zero page and command line from plain memory into the kernel's own.

    Source: Linux 6.1.192 arch/x86/kernel/head64.c, copy_bootdata().
    """
    boot_params = hand_over.boot_params
    own_params = hand_over.layout.virt(data.boot_params)
    own_line = hand_over.layout.virt(data.boot_command_line)
    # ORDER: before the first touch: the fault handler would map the pages with C.
    command_line = sme_map_bootdata(tables, cpu, state, boot_params)
    cpu.copy(own_params, tables.direct_map(boot_params), BOOT_PARAMS_SIZE)
    if command_line:
        cpu.copy(own_line, tables.direct_map(command_line), COMMAND_LINE_SIZE)
    sme_unmap_bootdata(tables, cpu, state, boot_params)
    line = cpu.load(own_line, COMMAND_LINE_SIZE).split(b"\0", 1)[0]
    shown = line.decode("ascii", "backslashreplace")
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
    log.say(f"Command line: {shown}")
    return line


def _initrd(cpu: Cpu, hand_over: HandOver) -> tuple[PhysAddr, int] | None:
    """Return the initrd as boot_params name it."""
    params = BootParams.parse(cpu.load(hand_over.boot_params, BOOT_PARAMS_SIZE))
    if not params.initrd_len:
        return None
    return params.initrd_start, params.initrd_len


def _span(start: int, end: int) -> str:
    return f"[mem {start:#018x}-{end - 1:#018x}]"


def _say_detection(cpu: Cpu, detection: Detection, log: BootLog) -> None:
    if not detection.state.me_mask:
        log.say(f"SME: not active: {detection.reason}")
        return
    position = detection.state.me_mask.bit_length() - 1
    log.say(
        f"SME: active ({detection.reason}); C-bit is bit {position} of a "
        "page-table entry"
    )


def _say_encrypted(done: Encrypted, log: BootLog) -> None:
    area = done.workarea
    for name, (start, end) in zip(("kernel", "initrd"), done.ranges, strict=False):
        log.say(f"SME: {name} {_span(start, end)} encrypted in place")
    log.say(
        f"SME: work area {_span(area.start, area.end)}, {done.tables_used} of "
        f"{area.pgtable_pages} page-table pages used, second mapping at "
        f"{done.decrypted_base:#x}"
    )


def _say_setup(
    cpu: Cpu,
    state: EncryptionState,
    hand_over: HandOver,
    physical_bits: int,
    log: BootLog,
) -> None:
    full = cpu.cpuid(0x8000_0008).eax & 0xFF
    if physical_bits != full:
        log.say(f"SME: physical addresses have {physical_bits} bits, not {full}")
    shared = hand_over.layout.bss_decrypted
    if cc_platform_has(state, CcAttr.MEM_ENCRYPT) and shared.size:
        log.say(f"SME: .bss..decrypted {_span(shared.start, shared.end)} stays plain")
    if hand_over.initrd is not None:
        start, size = hand_over.initrd
        log.say(f"RAMDISK: {_span(start, align_up(start + size, 4096))}")
