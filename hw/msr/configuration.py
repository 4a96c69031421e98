"""Registers of microcode, machine checks, speculation and configuration, with rules.

Of the configuration registers there are those that Linux 6.1 touches without asking
CPUID; bits without a name are kept, because they differ from part to part. Performance
counters are left out on purpose: Linux finds none then, and uses no counter that does
not count.

Source: Linux 6.1.192 asm/msr-index.h; who touches what stands with each register.
"""

from __future__ import annotations

from ..cpuid import CpuModel
from ..cpuid.words import FeatureEax, FeatureEdx, SizesEbx
from ..registers import Field
from . import choices
from .registers import Msr
from .rule import Access, MsrRule, Write

_U64 = (1 << 64) - 1
ZEN_FAMILY = 0x17


class SpecCtrl(Msr):
    """Bounds of speculation. Source: Linux 6.1.192 asm/msr-index.h, cpu/bugs.c."""

    ADDRESS, NAME = 0x0000_0048, "SPEC_CTRL"

    ibrs = Field(0, about="indirect branches are restricted")
    stibp = Field(1, about="the other thread trains no indirect branch")
    ssbd = Field(2, about="no speculative store bypass")
    psfd = Field(7, about="no predictive store forwarding")


class PredCmd(Msr):
    """Command: forget predictions. Source: Linux 6.1.192 asm/msr-index.h, cpu/amd.c."""

    ADDRESS, NAME = 0x0000_0049, "PRED_CMD"

    ibpb = Field(0, about="indirect branch prediction barrier")


class PatchLevel(Msr):
    """Microcode patch level. Source: Linux 6.1.192 cpu/amd.c, early_init_amd()."""

    ADDRESS, NAME = 0x0000_008B, "PATCH_LEVEL"

    revision = Field(7, 0)
    stepping = Field(11, 8)
    base_model = Field(15, 12)
    extended_model = Field(23, 20)
    extended_family = Field(31, 24, about="family less 0Fh")


class McgCap(Msr):
    """Machine-check banks. Source: [APM2] 9.3.1."""

    ADDRESS, NAME = 0x0000_0179, "MCG_CAP"

    count = Field(7, 0, about="banks; this machine has none")
    ctl_present = Field(8, about="MCG_CTL is present")


class McgStatus(Msr):
    """Machine-check status. Source: [APM2] 9.3.1."""

    ADDRESS, NAME = 0x0000_017A, "MCG_STATUS"

    ripv = Field(0, about="the interrupted program can go on")
    eipv = Field(1, about="the saved RIP belongs to the error")
    mcip = Field(2, about="a machine check is being handled")


class McgCtl(Msr):
    """Machine-check reporting, a bit per bank. Source: [APM2] 9.3.1."""

    ADDRESS, NAME = 0x0000_017B, "MCG_CTL"

    banks = Field(63, 0, about="1: the bank reports; Linux sets all")


class NbCfg(Msr):
    """Northbridge configuration; Linux turns on what it needs for configuration space.

    Source: Linux 6.1.192 asm/msr-index.h, MSR_AMD64_NB_CFG; arch/x86/pci/amd_bus.c.
    """

    ADDRESS, NAME = 0xC001_001F, "NB_CFG"

    cf8_ext_cfg = Field(46, about="CF8h addresses extended configuration space")


class PatchLoader(Msr):
    """Command: load microcode from a linear address.

    Source: Linux 6.1.192 arch/x86/kernel/cpu/microcode/amd.c.
    """

    ADDRESS, NAME = 0xC001_0020, "PATCH_LOADER"

    address = Field(63, 0)


class LsCfg(Msr):
    """Load-store configuration. Source: Linux 6.1.192 cpu/amd.c, bsp_init_amd()."""

    ADDRESS, NAME = 0xC001_1020, "LS_CFG"

    ssbd = Field(10, about="family 17h: no speculative store bypass")


class DeCfg(Msr):
    """Decode configuration. Source: Linux 6.1.192 cpu/amd.c, MSR_AMD64_DE_CFG."""

    ADDRESS, NAME = 0xC001_1029, "DE_CFG"

    lfence_serialize = Field(1, about="LFENCE serializes")
    zen2_fp_backup_fix = Field(9, about="Zen 2: work-around for Zenbleed")


SPEC_CTRL_FEATURES: tuple[tuple[Field, Field], ...] = (
    (SpecCtrl.ibrs, SizesEbx.ibrs),
    (SpecCtrl.stibp, SizesEbx.stibp),
    (SpecCtrl.ssbd, SizesEbx.ssbd),
    (SpecCtrl.psfd, SizesEbx.psfd),
)
"""Which bit of 8000_0008 EBX lets software set which bit."""


def _spec_ctrl_writable(model: CpuModel) -> int:
    word = model.table.word(SizesEbx).value
    return sum(bit.mask for bit, told in SPEC_CTRL_FEATURES if word & told.mask)


def _has_ibpb(model: CpuModel) -> bool:
    return bool(model.table.word(SizesEbx).ibpb)


def _has_mca(model: CpuModel) -> bool:
    return bool(model.table.word(FeatureEdx).mca)


def _is_zen(model: CpuModel) -> bool:
    return model.table.word(FeatureEax).family >= ZEN_FAMILY


def _patch_level(model: CpuModel, smee: bool) -> int:
    version = model.table.word(FeatureEax)
    return PatchLevel.of(
        extended_family=version.extended_family,
        extended_model=version.extended_model,
        base_model=version.base_model,
        stepping=version.stepping,
        revision=choices.PATCH_REVISION,
    ).value


def _all_bits(model: CpuModel) -> int:
    return _U64


def _nothing_kept(write: Write) -> int:
    return 0


def _zen_rule(register: type[Msr], reset: int = 0) -> MsrRule:
    """Return the rule of a configuration register that keeps whatever it is given."""
    return MsrRule(
        register,
        present=_is_zen,
        needs="family 17h or later",
        reset=lambda model, smee: reset,
        writable=_all_bits,
    )


MCA = "CPUID 1 EDX[14] (MCA)"

CONFIGURATION_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        SpecCtrl,
        present=lambda model: bool(_spec_ctrl_writable(model)),
        needs="CPUID 8000_0008 EBX[14], [15], [24] or [28] (IBRS, STIBP, SSBD, PSFD)",
        writable=_spec_ctrl_writable,
    ),
    MsrRule(
        PredCmd,
        present=_has_ibpb,
        needs="CPUID 8000_0008 EBX[12] (IBPB)",
        access=Access.WRITE,
        kept=_nothing_kept,
    ),
    MsrRule(PatchLevel, access=Access.READ, reset=_patch_level),
    MsrRule(
        McgCap,
        present=_has_mca,
        needs=MCA,
        access=Access.READ,
        reset=lambda model, smee: McgCap.of(ctl_present=1).value,
    ),
    MsrRule(McgStatus, present=_has_mca, needs=MCA),
    MsrRule(McgCtl, present=_has_mca, needs=MCA),
    _zen_rule(NbCfg),
    MsrRule(PatchLoader, access=Access.WRITE, kept=_nothing_kept),
    _zen_rule(LsCfg),
    _zen_rule(DeCfg, DeCfg.lfence_serialize.mask),
)
"""Configuration registers, by address."""
