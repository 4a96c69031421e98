"""Registers of system calls, segment bases, time and local APIC, with their rules."""

from __future__ import annotations

from ..cpuid import CpuModel
from ..registers import Field
from .registers import Msr
from .rule import Access, MsrRule, Write

_U64 = (1 << 64) - 1
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


class PatchLevel(Msr):
    """Microcode patch level. Source: Linux 6.1.192 asm/msr-index.h."""

    ADDRESS, NAME = 0x0000_008B, "PATCH_LEVEL"

    level = Field(31, 0)


class McgCap(Msr):
    """Machine-check banks. Source: [APM2] 9.3.1."""

    ADDRESS, NAME = 0x0000_0179, "MCG_CAP"

    count = Field(7, 0, about="banks; this machine has none")
    ctl_present = Field(8)


class McgStatus(Msr):
    """Machine-check status. Source: [APM2] 9.3.1."""

    ADDRESS, NAME = 0x0000_017A, "MCG_STATUS"

    ripv = Field(0, about="the interrupted program can go on")
    eipv = Field(1)
    mcip = Field(2, about="a machine check is being handled")


class SysenterCs(Msr):
    """Code segment of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0174, "SYSENTER_CS"

    selector = Field(31, 0)


class SysenterEsp(Msr):
    """Stack of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0175, "SYSENTER_ESP"

    address = Field(63, 0)


class SysenterEip(Msr):
    """Entry of SYSENTER. Source: [APM2] 6.1.2."""

    ADDRESS, NAME = 0x0000_0176, "SYSENTER_EIP"

    address = Field(63, 0)


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
    """What RDTSCP puts into ECX. Source: [APM2] 13.2.4; [APM3] RDTSCP."""

    ADDRESS, NAME = 0xC000_0103, "TSC_AUX"

    value32 = Field(31, 0)


class NbCfg(Msr):
    """Northbridge configuration; only what Linux 6.1 sets has a name.

    Source: Linux 6.1.192 asm/msr-index.h, MSR_AMD64_NB_CFG; arch/x86/pci/amd_bus.c.
    """

    ADDRESS, NAME = 0xC001_001F, "NB_CFG"

    enable_cf8_ext_cfg = Field(46, about="extended configuration space by CF8h")


class DeCfg(Msr):
    """Decode configuration; only what Linux 6.1 uses has a name.

    Source: Linux 6.1.192 asm/msr-index.h, MSR_AMD64_DE_CFG.
    """

    ADDRESS, NAME = 0xC001_1029, "DE_CFG"

    lfence_serialize = Field(1, about="LFENCE serializes")


def _canonical(write: Write) -> str:
    top = write.new >> 47 if not write.model.la57 else write.new >> 56
    ones = (1 << 17) - 1 if not write.model.la57 else (1 << 8) - 1
    return "" if top in (0, ones) else "not canonical, expected a canonical address"


def _apic_objection(write: Write) -> str:
    old, new = ApicBase(write.old), ApicBase(write.new)
    if new.boot_core != old.boot_core:
        return f"BSC is read-only, expected {old.boot_core}"
    if new.x2apic:
        return "this machine's APIC has no x2APIC mode, expected bit 10 clear"
    if new.page != old.page:
        return f"this machine's APIC stays where it is, expected page {old.page:#x}"
    return ""


def _apic_writable(model: CpuModel) -> int:
    return ApicBase.declared_mask() & ((1 << model.phys_bits) - 1)


def _patch_level(model: CpuModel, smee: bool) -> int:
    """Return a level formed as the real ones are from family and model: unverified."""
    version = model.table.leaf(1).eax
    family = version >> 20 & 0xFF
    extended_model, base_model, stepping = (
        version >> 16 & 0xF,
        version >> 4 & 0xF,
        version & 0xF,
    )
    return (
        0x0800_0000
        | family << 20 & 0xF0_0000
        | extended_model << 16
        | base_model << 12
        | stepping << 8
        | 0x10
    )


SYSTEM_RULES: tuple[MsrRule, ...] = (
    MsrRule(Tsc),
    MsrRule(
        ApicBase,
        reset=lambda model, smee: APIC_ENABLED_BOOT_CORE,
        writable=_apic_writable,
        objection=_apic_objection,
    ),
    MsrRule(PatchLevel, access=Access.READ, reset=_patch_level),
    MsrRule(McgCap, access=Access.READ),
    MsrRule(McgStatus),
    MsrRule(SysenterCs),
    MsrRule(SysenterEsp, objection=_canonical),
    MsrRule(SysenterEip, objection=_canonical),
    MsrRule(Star),
    MsrRule(Lstar, objection=_canonical),
    MsrRule(Cstar, objection=_canonical),
    MsrRule(Sfmask),
    MsrRule(FsBase, objection=_canonical),
    MsrRule(GsBase, objection=_canonical),
    MsrRule(KernelGsBase, objection=_canonical),
    MsrRule(
        TscAux,
        present=lambda model: bool(model.table.leaf(0x8000_0001).edx >> 27 & 1),
        needs="CPUID 8000_0001 EDX[27] (RDTSCP)",
    ),
    MsrRule(NbCfg, writable=lambda model: _U64),
    MsrRule(
        DeCfg,
        reset=lambda model, smee: DeCfg.lfence_serialize.mask,
        writable=lambda model: _U64,
    ),
)
"""System registers, by address."""
