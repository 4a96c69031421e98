"""The table of all registers: one `MsrRule` per MSR, and the functions they name."""

from __future__ import annotations

from collections.abc import Callable

from ..cpuid import CpuModel
from ..cpuid.words import (
    Extended21Eax,
    ExtendedEcx,
    ExtendedEdx,
    MultiKeyEax,
    SizesEbx,
)
from . import choices
from .configuration import CONFIGURATION_RULES
from .memory_types import MEMORY_TYPE_RULES
from .registers import (
    Efer,
    Ghcb,
    Hwcr,
    Msr,
    Pat,
    RmpBase,
    RmpEnd,
    SevStatus,
    SmmAddr,
    SmmBase,
    SmmMask,
    Syscfg,
    TopMem,
    TopMem2,
    VmHsavePa,
    VmPageFlush,
)
from .rule import Access, MsrRule, Write
from .system import SYSTEM_RULES

ALL_BITS = (1 << 64) - 1

PAT_AT_RESET = 0x0007_0406_0007_0406
"""WB, WT, UC-, UC, twice. Source: [APM2] 7.8; Linux 6.1.192 arch/x86/kernel/sev.c."""

PAT_RESERVED_TYPES = (2, 3)


def _constant(value: int) -> Callable[[CpuModel, bool], int]:
    return lambda model, smee: value


def _physical(register: type[Msr]) -> Callable[[CpuModel], int]:
    """Return the rule for an address: no bit above the physical width."""
    return lambda model: register.declared_mask() & ((1 << model.phys_bits) - 1)


# --- PAT and EFER


def _pat_objection(write: Write) -> str:
    for field, kind in Pat(write.new).fields():
        if kind in PAT_RESERVED_TYPES:
            return f"{field.name} has the reserved type {kind}, expected 0, 1 or 4 to 7"
    return ""


EFER_FEATURES: tuple[tuple[int, Callable[[CpuModel], int]], ...] = (
    (Efer.sce.mask, lambda model: model.table.word(ExtendedEdx).syscall),
    (Efer.lme.mask, lambda model: model.table.word(ExtendedEdx).long_mode),
    (Efer.lma.mask, lambda model: model.table.word(ExtendedEdx).long_mode),
    (Efer.nxe.mask, lambda model: model.nx),
    (Efer.svme.mask, lambda model: model.svm),
    (
        Efer.lmsle.mask,
        lambda model: not model.table.word(SizesEbx).efer_lmsle_unsupported,
    ),
    (Efer.ffxsr.mask, lambda model: model.table.word(ExtendedEdx).ffxsr),
    (Efer.tce.mask, lambda model: model.table.word(ExtendedEcx).tce),
    (Efer.mcommit.mask, lambda model: model.table.word(SizesEbx).mcommit),
    (Efer.intwb.mask, lambda model: model.table.word(SizesEbx).int_wbinvd),
    (
        Efer.uaie.mask,
        lambda model: model.table.word(Extended21Eax).upper_address_ignore,
    ),
    (Efer.auto_ibrs.mask, lambda model: model.table.word(Extended21Eax).automatic_ibrs),
)
"""Which CPUID bit lets software set which bit. Source: [APM2] 3.1.7."""

EFER_LOW_BITS = 0xFE


def _efer_writable(model: CpuModel) -> int:
    mask = EFER_LOW_BITS if choices.EFER_LOW_BITS_IGNORED else 0
    for bit, announced in EFER_FEATURES:
        if announced(model):
            mask |= bit
    return mask


def _efer_objection(write: Write) -> str:
    old, new = Efer(write.old), Efer(write.new)
    if write.paging and old.lme != new.lme:
        return f"LME changes while paging is on, expected LME {old.lme} or CR0.PG 0"
    if old.lma != new.lma:
        return f"LMA is the processor's, expected LMA {old.lma} as read"
    return ""


def _efer_kept(write: Write) -> int:
    return write.new & Efer.declared_mask()


# --- SYSCFG


def _syscfg_reset(model: CpuModel, smee: bool) -> int:
    if model.hypervisor:
        return 0
    on = smee and _has_mem_encrypt(model)
    return choices.SYSCFG_AT_HAND_OVER | (Syscfg.mem_encrypt.mask if on else 0)


def _has_mem_encrypt(model: CpuModel) -> bool:
    """Return whether SYSCFG[23] exists: not on a part whose C-bit makes no sense."""
    return model.memory_encryption.usable


def _syscfg_writable(model: CpuModel) -> int:
    if model.hypervisor:
        return ALL_BITS if choices.GUEST_SYSCFG_WRITES_IGNORED else 0
    mask = Syscfg.declared_mask()
    for field, exists in (
        (Syscfg.mem_encrypt, _has_mem_encrypt(model)),
        (Syscfg.snp_en, model.memory_encryption.sev_snp),
        (Syscfg.vmpl_en, model.memory_encryption.vmpl),
        (Syscfg.hmkee, model.table.word(MultiKeyEax).mem_hmk),
    ):
        if not exists:
            mask &= ~field.mask
    return mask


def _syscfg_objection(write: Write) -> str:
    if write.model.hypervisor:
        return ""
    old, new = Syscfg(write.old), Syscfg(write.new)
    encryption_mode = Syscfg.mem_encrypt.mask | Syscfg.hmkee.mask
    changes_mode = bool((write.old ^ write.new) & encryption_mode)
    if old.snp_en and not new.snp_en:
        return "bit 24 (SNPEn) stays set until reset, expected 1"
    if old.snp_en and old.vmpl_en != new.vmpl_en:
        return f"bit 25 (VMPLEn) is fixed once SNPEn is set, expected {old.vmpl_en}"
    if (old.snp_en or choices.MEM_ENCRYPT_STICKY) and (
        changes_mode and write.old & encryption_mode
    ):
        return (
            "bits 23 and 26 are fixed once one of them is set, "
            f"expected {write.old & encryption_mode:#x}"
        )
    if new.snp_en and not new.mem_encrypt:
        return "bit 24 (SNPEn) needs bit 23, expected both"
    return ""


def _syscfg_kept(write: Write) -> int:
    return write.old if write.model.hypervisor else write.new


# --- HWCR, SMM, SVM, SNP


def _hwcr_writable(model: CpuModel) -> int:
    return ALL_BITS if choices.HWCR_UNDECLARED_BITS_KEPT else Hwcr.declared_mask()


def _hwcr_kept(write: Write) -> int:
    return write.new | write.old & Hwcr.smm_lock.mask  # only reset clears the lock


def _smm_objection(write: Write) -> str:
    locked = write.msrs.get(Hwcr).smm_lock
    if locked and not choices.SMM_LOCKED_WRITES_IGNORED:
        return "SMM is locked, expected HWCR.SmmLock 0"
    return ""


def _smm_kept(write: Write) -> int:
    return write.old if write.msrs.get(Hwcr).smm_lock else write.new


def _flush_objection(write: Write) -> str:
    return "" if VmPageFlush(write.new).asid else "ASID 0, expected a guest's ASID"


def _rmp_objection(write: Write) -> str:
    if choices.RMP_LOCKED_BY_SNP and write.msrs.get(Syscfg).snp_en:
        return "the table is in use, expected SYSCFG.SNPEn 0"
    return ""


def _rmp_end_kept(write: Write) -> int:
    return write.new | choices.RMP_END_LOW_BITS


def _has_sev_status(model: CpuModel) -> bool:
    encryption = model.memory_encryption
    return encryption.sev or (encryption.sme and choices.SEV_STATUS_WITHOUT_SEV)


_ENCRYPTION_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        Pat,
        reset=_constant(PAT_AT_RESET),
        objection=_pat_objection,
    ),
    MsrRule(
        Efer,
        writable=_efer_writable,
        objection=_efer_objection,
        kept=_efer_kept,
    ),
    MsrRule(
        Syscfg,
        reset=_syscfg_reset,
        writable=_syscfg_writable,
        objection=_syscfg_objection,
        kept=_syscfg_kept,
    ),
    MsrRule(
        Hwcr,
        reset=_constant(choices.HWCR_AT_HAND_OVER),
        writable=_hwcr_writable,
        kept=_hwcr_kept,
    ),
    MsrRule(TopMem, writable=_physical(TopMem)),
    MsrRule(TopMem2, writable=_physical(TopMem2)),
    MsrRule(SmmBase, objection=_smm_objection, kept=_smm_kept),
    MsrRule(SmmAddr, objection=_smm_objection, kept=_smm_kept),
    MsrRule(SmmMask, objection=_smm_objection, kept=_smm_kept),
    MsrRule(
        VmHsavePa,
        present=lambda model: model.svm,
        needs="CPUID 8000_0001 ECX[2] (SVM)",
        writable=_physical(VmHsavePa),
    ),
    MsrRule(
        VmPageFlush,
        present=lambda model: model.memory_encryption.page_flush_msr,
        needs="CPUID 8000_001F EAX[2] (page flush MSR)",
        access=Access.WRITE,
        objection=_flush_objection,
        kept=lambda write: 0,
    ),
    MsrRule(
        Ghcb,
        present=lambda model: model.memory_encryption.sev_es,
        needs="CPUID 8000_001F EAX[3] (SEV-ES)",
        access=Access.NONE,
    ),
    MsrRule(
        SevStatus,
        present=_has_sev_status,
        needs="CPUID 8000_001F EAX[0] (SME) or EAX[1] (SEV)",
        access=Access.READ,
    ),
    MsrRule(
        RmpBase,
        present=lambda model: model.memory_encryption.sev_snp,
        needs="CPUID 8000_001F EAX[4] (SEV-SNP)",
        writable=_physical(RmpBase),
        objection=_rmp_objection,
    ),
    MsrRule(
        RmpEnd,
        present=lambda model: model.memory_encryption.sev_snp,
        needs="CPUID 8000_001F EAX[4] (SEV-SNP)",
        reset=_constant(choices.RMP_END_LOW_BITS),
        writable=_physical(RmpEnd),
        objection=_rmp_objection,
        kept=_rmp_end_kept,
    ),
)

RULES: tuple[MsrRule, ...] = tuple(
    sorted(
        (
            *_ENCRYPTION_RULES,
            *SYSTEM_RULES,
            *CONFIGURATION_RULES,
            *MEMORY_TYPE_RULES,
        ),
        key=lambda rule: rule.register.ADDRESS,
    )
)
"""Every register of a core, by address."""

RULE_BY_ADDRESS = {rule.register.ADDRESS: rule for rule in RULES}

MSRS: dict[int, type[Msr]] = {rule.register.ADDRESS: rule.register for rule in RULES}
"""Every declared register by address."""
