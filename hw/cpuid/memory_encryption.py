"""`MemoryEncryption`: what CPUID says about SME and SEV, decoded and judged."""

from __future__ import annotations

from dataclasses import dataclass

from .table import CpuidTable, LeafRange
from .words import (
    AddressSizes,
    MemEncryptEax,
    MemEncryptEbx,
    MemEncryptEcx,
    MemEncryptEdx,
)

LEAF = MemEncryptEax.LEAF

MIN_C_BIT = 32
"""A lower position is a field nobody filled in: Cezanne and Rembrandt set the SME bit
and report EBX = 0, which would make the Present bit the C-bit. The bound is our choice.

Source: InstLatx64 AuthenticAMD0A50F00_K19_Cezanne_CPUID6, 0A40F41_K19_Rembrandt_01.
"""

MAX_C_BIT = 51
"""Bits 52 and up of an entry are not address bits. Source: [APM2] 5.3."""

MIN_PHYS_BITS = 32
MAX_PHYS_BITS = 52
"""Widths that an address field of an entry can hold; the lower bound is our choice."""


@dataclass(frozen=True)
class MemoryEncryption:
    """The memory-encryption leaf of one processor.

    What the fields say is what CPUID says; whether encryption is switched on stands in
    SYSCFG and SEV_STATUS.

    Attributes:
        present: leaf 8000_001F exists; otherwise all that follows is 0.
        sme, sev, sev_es, sev_snp, page_flush_msr, vmpl, hw_coherent, host_64bit, vte:
            bits of EAX.
        c_bit: the C-bit's position as EBX has it, sense or nonsense.
        phys_reduction: address bits lost while SYSCFG[23] is 1.
        num_vmpl: number of VM permission levels.
        max_sev_guests: highest ASID of an encrypted guest.
        min_sev_no_es_asid: lowest ASID of a guest without SEV-ES.
        phys_bits: width of physical addresses, before the reduction.
        phys_bits_with_sme: the width that remains, never below 0.
        usable: SME can be switched on and its C-bit makes sense.
        reason: why not, or "" when usable.

    Source: [APM3] E.4.17.
    """

    present: bool
    sme: bool
    sev: bool
    sev_es: bool
    sev_snp: bool
    page_flush_msr: bool
    vmpl: bool
    hw_coherent: bool
    host_64bit: bool
    vte: bool
    c_bit: int
    phys_reduction: int
    num_vmpl: int
    max_sev_guests: int
    min_sev_no_es_asid: int
    phys_bits: int
    phys_bits_with_sme: int
    usable: bool
    reason: str

    @classmethod
    def decode(cls, table: CpuidTable) -> MemoryEncryption:
        """Decode the leaf out of a processor's table."""
        eax = table.word(MemEncryptEax)
        ebx = table.word(MemEncryptEbx)
        phys_bits = table.word(AddressSizes).phys_bits
        reason = _why_unusable(table)
        return cls(
            present=table.has(LEAF),
            sme=bool(eax.sme),
            sev=bool(eax.sev),
            sev_es=bool(eax.sev_es),
            sev_snp=bool(eax.sev_snp),
            page_flush_msr=bool(eax.page_flush_msr),
            vmpl=bool(eax.vmpl),
            hw_coherent=bool(eax.hw_enf_cache_coh),
            host_64bit=bool(eax.host_64bit),
            vte=bool(eax.vte),
            c_bit=ebx.c_bit_position,
            phys_reduction=ebx.phys_addr_reduction,
            num_vmpl=ebx.num_vmpl,
            max_sev_guests=table.word(MemEncryptEcx).max_sev_guests,
            min_sev_no_es_asid=table.word(MemEncryptEdx).min_sev_no_es_asid,
            phys_bits=phys_bits,
            phys_bits_with_sme=max(0, phys_bits - ebx.phys_addr_reduction),
            usable=not reason,
            reason=reason,
        )


def _why_unusable(table: CpuidTable) -> str:
    """Return why SME cannot be used on this processor, or ""."""
    eax = table.word(MemEncryptEax)
    ebx = table.word(MemEncryptEbx)
    c_bit, reduction = ebx.c_bit_position, ebx.phys_addr_reduction
    phys_bits = table.word(AddressSizes).phys_bits
    remaining = phys_bits - reduction
    if not table.has(LEAF):
        highest = table.max_leaf(LeafRange.EXTENDED)
        return f"no CPUID leaf {LEAF:#x}; the highest extended leaf is {highest:#x}"
    if not eax.sme:
        also = ", only SEV is there, as inside a guest" if eax.sev else ""
        return f"the SME bit (EAX[0] of leaf {LEAF:#x}) is 0{also}"
    if c_bit < MIN_C_BIT:
        return (
            f"the SME bit is 1 but the C-bit position is {c_bit}, "
            f"expected {MIN_C_BIT} to {MAX_C_BIT}"
        )
    if c_bit > MAX_C_BIT:
        return (
            f"the C-bit position is {c_bit}, expected {MIN_C_BIT} to {MAX_C_BIT}: "
            "the bits above are no address bits"
        )
    if not MIN_PHYS_BITS <= phys_bits <= MAX_PHYS_BITS:
        return (
            f"the physical width is {phys_bits} bits, "
            f"expected {MIN_PHYS_BITS} to {MAX_PHYS_BITS}"
        )
    if remaining < MIN_PHYS_BITS:
        return (
            f"a reduction of {reduction} leaves {max(0, remaining)} of {phys_bits} "
            f"physical address bits, expected {MIN_PHYS_BITS} or more"
        )
    if c_bit < remaining:
        return (
            f"the C-bit position {c_bit} lies inside the {remaining} physical address "
            "bits that remain"
        )
    return ""
