"""Control registers: their fields, and what MOV CR refuses.

Source: [APM2] 3.1.1 (CR0), 3.1.3 (CR4), 5.3.2 (CR3 in long mode), 7.10.1 (C-bit);
PCIDE, and what CR0 ignores: Linux arch/x86/kvm/x86.c, kvm_set_cr4(), kvm_set_cr0().
"""

from __future__ import annotations

from ..cpuid import CpuModel
from ..faults import GeneralProtection
from ..msr import Efer
from ..paging import AddressRules
from ..registers import Field, Register


class Cr0(Register):
    """Paging, protection, caching. Source: [APM2] 3.1.1."""

    protection = Field(0, about="PE: protected mode")
    monitor_coprocessor = Field(1, about="MP")
    emulation = Field(2, about="EM")
    task_switched = Field(3, about="TS")
    extension_type = Field(4, about="ET: reads 1")
    numeric_error = Field(5, about="NE")
    write_protect = Field(16, about="WP: supervisor stores honour R/W")
    alignment_mask = Field(18, about="AM")
    not_write_through = Field(29, about="NW")
    cache_disable = Field(30, about="CD")
    paging = Field(31, about="PG")


class Cr3(Register):
    """Top-level table. The C-bit, where SYSCFG[23] is 1, lies in `address`."""

    pcid = Field(11, 0, about="or PWT and PCD while CR4.PCIDE is 0")
    address = Field(62, 12, about="bits 62:12, the C-bit among them")
    no_flush = Field(63, about="with CR4.PCIDE: the TLB may be kept")


class Cr4(Register):
    """Extensions. Source: [APM2] 3.1.3."""

    vme = Field(0)
    pvi = Field(1)
    tsd = Field(2)
    de = Field(3)
    pse = Field(4)
    pae = Field(5, about="needed for long mode, and for the C-bit to count")
    mce = Field(6)
    pge = Field(7, about="global pages; a change flushes the whole TLB")
    pce = Field(8)
    osfxsr = Field(9)
    osxmmexcpt = Field(10)
    umip = Field(11)
    la57 = Field(12, about="5-level paging")
    fsgsbase = Field(16)
    pcide = Field(17)
    osxsave = Field(18)
    smep = Field(20)
    smap = Field(21)
    pke = Field(22)


def check_cr0(old: Cr0, new: Cr0, cr4: Cr4, efer: Efer) -> None:
    """Raise #GP(0) where MOV CR0 does."""
    if new.reserved >> 32:
        raise GeneralProtection(f"MOV CR0 {new.value:#x}: bits 63:32 must be 0")
    if new.paging and not new.protection:
        raise GeneralProtection(f"MOV CR0 {new.value:#x}: PG needs PE")
    if new.not_write_through and not new.cache_disable:
        raise GeneralProtection(f"MOV CR0 {new.value:#x}: NW needs CD")
    if new.paging and not old.paging and efer.lme and not cr4.pae:
        raise GeneralProtection(
            f"MOV CR0 {new.value:#x}: long mode (EFER.LME) needs CR4.PAE = 1"
        )
    if cr4.pcide and not new.paging:
        raise GeneralProtection(f"MOV CR0 {new.value:#x}: PCIDE needs PG")


def kept_cr0(new: Cr0) -> Cr0:
    """Return what CR0 holds after the write: ET set, no reserved bit."""
    return Cr0(new.value & Cr0.declared_mask()).replace(extension_type=1)


def check_cr4(
    old: Cr4, new: Cr4, cr3: Cr3, model: CpuModel, *, long_mode: bool
) -> None:
    """Raise #GP(0) where MOV CR4 does."""
    offered = {
        "pge": model.pge,
        "umip": model.umip,
        "la57": model.la57,
        "fsgsbase": model.fsgsbase,
        "pcide": model.pcid,
        "smep": model.smep,
        "smap": model.smap,
        "pke": model.pku,
    }
    if new.reserved:
        raise GeneralProtection(
            f"MOV CR4 {new.value:#x}: reserved bits {new.reserved:#x} must be 0"
        )
    for name, present in offered.items():
        field = Cr4.FIELDS[name]
        if new.value & field.mask and not present:
            raise GeneralProtection(
                f"MOV CR4 {new.value:#x}: {name.upper()} (bit {field.bits}) is not "
                f"offered by {model.name}"
            )
    if long_mode and not new.pae:
        raise GeneralProtection(f"MOV CR4 {new.value:#x}: PAE is needed in long mode")
    if long_mode and new.la57 != old.la57:
        raise GeneralProtection(
            f"MOV CR4 {new.value:#x}: LA57 cannot change in long mode"
        )
    if new.pcide and not old.pcide and (not long_mode or cr3.pcid):
        raise GeneralProtection(
            f"MOV CR4 {new.value:#x}: setting PCIDE needs long mode and "
            f"CR3[11:0] = 0, got {cr3.pcid:#x}"
        )


def check_cr3(new: Cr3, cr4: Cr4, rules: AddressRules) -> None:
    """Raise #GP(0) where MOV CR3 does: address bits above the reduced width.

    The C-bit is exempt, also where it lies above the width.
    """
    reserved = new.value & rules.root_reserved_mask
    if new.no_flush and not cr4.pcide:
        reserved |= Cr3.FIELDS["no_flush"].mask
    if reserved:
        raise GeneralProtection(
            f"MOV CR3 {new.value:#x}: bits {reserved:#x} must be 0 with "
            f"{rules.physical_bits} physical address bits, C-bit mask {rules.c_mask:#x}"
        )
