"""Registers of system calls, segment bases, time and local APIC, with their rules."""

from __future__ import annotations

from ..cpuid import CpuModel
from ..cpuid.words import ExtendedEdx, FeatureEdx, StructuredEcx
from ..registers import Field
from . import choices
from .registers import Msr
from .rule import MsrRule, Write

_U32, _U64 = (1 << 32) - 1, (1 << 64) - 1
APIC_ENABLED_BOOT_CORE = 0xFEE0_0900


class Tsc(Msr):
    """Time-stamp counter. Source: [APM2] 13.2.4."""

    ADDRESS, NAME = 0x0000_0010, "TSC"

    count = Field(63, 0, about="ticks since reset")


class ApicBase(Msr):
    """Where the local APIC answers. Source: [APM2] 16.3.1."""

    ADDRESS, NAME = 0x0000_001B, "APIC_BASE"

    boot_core = Field(8, about="BSC: this is the boot core; read-only")
    x2apic = Field(10, about="x2APIC mode")
    enable = Field(11, about="AE: the APIC is on")
    page = Field(51, 12, about="physical page number of its registers")


class SysenterCs(Msr):
    """Code segment of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0174, "SYSENTER_CS"

    selector = Field(31, 0)


class SysenterEsp(Msr):
    """Stack of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0175, "SYSENTER_ESP"

    address = Field(31, 0, about="legacy mode only, so 32 bits")


class SysenterEip(Msr):
    """Entry of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0176, "SYSENTER_EIP"

    address = Field(31, 0, about="legacy mode only, so 32 bits")


class Star(Msr):
    """Segments of SYSCALL and SYSRET. Source: [APM2] 6.1.1."""

    ADDRESS, NAME = 0xC000_0081, "STAR"

    eip = Field(31, 0, about="entry in legacy mode")
    syscall = Field(47, 32, about="CS of SYSCALL, SS is 8 above")
    sysret = Field(63, 48, about="CS of SYSRET is 16 above in 64-bit mode")


class Lstar(Msr):
    """Entry of SYSCALL from 64-bit code. Source: [APM2] 6.1.1."""

    ADDRESS, NAME = 0xC000_0082, "LSTAR"

    address = Field(63, 0)


class Cstar(Msr):
    """Entry of SYSCALL from compatibility mode. Source: [APM2] 6.1.1."""

    ADDRESS, NAME = 0xC000_0083, "CSTAR"

    address = Field(63, 0)


class Sfmask(Msr):
    """Flags that SYSCALL clears. Source: [APM2] 6.1.1."""

    ADDRESS, NAME = 0xC000_0084, "SFMASK"

    mask = Field(31, 0)


class FsBase(Msr):
    """Base of FS. Source: [APM2] 4.5.3."""

    ADDRESS, NAME = 0xC000_0100, "FS_BASE"

    address = Field(63, 0)


class GsBase(Msr):
    """Base of GS. Source: [APM2] 4.5.3."""

    ADDRESS, NAME = 0xC000_0101, "GS_BASE"

    address = Field(63, 0)


class KernelGsBase(Msr):
    """What SWAPGS exchanges with the base of GS. Source: [APM2] 6.1.3."""

    ADDRESS, NAME = 0xC000_0102, "KERNEL_GS_BASE"

    address = Field(63, 0)


class TscAux(Msr):
    """What RDTSCP and RDPID return. Source: [APM2] 13.2.4; [APM3] RDTSCP."""

    ADDRESS, NAME = 0xC000_0103, "TSC_AUX"

    value32 = Field(31, 0, about="Linux: number of core and node")


def _all_bits(model: CpuModel) -> int:
    return _U64


def _low_half(write: Write) -> int:
    """Keep 32 bits; AMD ignores what is above.

    Source: Linux 6.1.192 arch/x86/kvm/x86.c, __kvm_set_msr() on TSC_AUX and SYSENTER;
    arch/x86/kernel/cpu/common.c, syscall_init().
    """
    return write.new & _U32


def _canonical_objection(write: Write) -> str:
    """Refuse an address that no mode of the part could use: unverified for 57 bits."""
    bits = 57 if write.model.la57 else 48
    if write.new >> bits - 1 in (0, _U64 >> bits - 1):
        return ""
    return f"not canonical, expected bits 63:{bits} to repeat bit {bits - 1}"


def _apic_objection(write: Write) -> str:
    old, new = ApicBase(write.old), ApicBase(write.new)
    if new.boot_core != old.boot_core:
        return f"BSC is read-only, expected {old.boot_core}"
    if new.x2apic:
        return "this machine's APIC has no x2APIC mode, expected bit 10 clear"
    if choices.APIC_STAYS and new.page != old.page:
        return f"this machine's APIC stays where it is, expected page {old.page:#x}"
    return ""


def _apic_writable(model: CpuModel) -> int:
    return ApicBase.declared_mask() & ((1 << model.phys_bits) - 1)


def _address_rule(register: type[Msr], field: Field, needs: str) -> MsrRule:
    """Return the rule of a 64-bit linear address; `field` of 8000_0001 EDX has it."""
    return MsrRule(
        register,
        present=lambda model: bool(model.table.word(ExtendedEdx).value & field.mask),
        needs=needs,
        objection=_canonical_objection,
    )


def _has_apic(model: CpuModel) -> bool:
    return bool(model.table.word(FeatureEdx).apic)


def _has_sysenter(model: CpuModel) -> bool:
    return bool(model.table.word(FeatureEdx).sep)


def _has_syscall(model: CpuModel) -> bool:
    return bool(model.table.word(ExtendedEdx).syscall)


def _has_tsc_aux(model: CpuModel) -> bool:
    table = model.table
    return bool(table.word(ExtendedEdx).rdtscp or table.word(StructuredEcx).rdpid)


SEP = "CPUID 1 EDX[11] (SEP)"
SYSCALL = "CPUID 8000_0001 EDX[11] (SYSCALL)"
LONG_MODE = "CPUID 8000_0001 EDX[29] (long mode)"

SYSTEM_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        Tsc,
        present=lambda model: bool(model.table.word(FeatureEdx).tsc),
        needs="CPUID 1 EDX[4] (TSC)",
    ),
    MsrRule(
        ApicBase,
        present=_has_apic,
        needs="CPUID 1 EDX[9] (APIC)",
        reset=lambda model, smee: APIC_ENABLED_BOOT_CORE,
        writable=_apic_writable,
        objection=_apic_objection,
    ),
    MsrRule(SysenterCs, present=_has_sysenter, needs=SEP),
    *(
        MsrRule(
            register,
            present=_has_sysenter,
            needs=SEP,
            writable=_all_bits,
            kept=_low_half,
        )
        for register in (SysenterEsp, SysenterEip)
    ),
    MsrRule(Star, present=_has_syscall, needs=SYSCALL),
    _address_rule(Lstar, ExtendedEdx.syscall, SYSCALL),
    _address_rule(Cstar, ExtendedEdx.syscall, SYSCALL),
    MsrRule(Sfmask, present=_has_syscall, needs=SYSCALL),
    _address_rule(FsBase, ExtendedEdx.long_mode, LONG_MODE),
    _address_rule(GsBase, ExtendedEdx.long_mode, LONG_MODE),
    _address_rule(KernelGsBase, ExtendedEdx.long_mode, LONG_MODE),
    MsrRule(
        TscAux,
        present=_has_tsc_aux,
        needs="CPUID 8000_0001 EDX[27] (RDTSCP) or 7 ECX[22] (RDPID)",
        writable=_all_bits,
        kept=_low_half,
    ),
)
"""System registers, by address."""
