"""Where no source says what a register does, what we chose; one constant per question.

Each is a default that a better source may overturn: change it here and nowhere else.
"""

from .registers import Hwcr

SYSCFG_AT_HAND_OVER = 0
"""SYSCFG as firmware leaves it, bit 23 apart.

One public transcript of an EPYC with SME shows 0xF4_0000, so real firmware also sets
18, 20, 21 and 22. They change nothing here, because memory types are not modelled.
"""

MEM_ENCRYPT_STICKY = True
"""Clearing SYSCFG[23], or changing it once bit 26 is set, gives #GP.

[APM2] 3.2.1 says that the bit "cannot be changed" once set, but not whether a write
that tries faults or is ignored. False: bit 23 can be cleared until SNPEn is set.
"""

GUEST_SYSCFG_WRITES_IGNORED = True
"""Under a hypervisor SYSCFG reads 0 and a write is dropped. False: it gives #GP.

Source: a comment in Linux 6.1.192 mem_encrypt_identity.c says "ignored or refused".
"""

HWCR_AT_HAND_OVER = Hwcr.of(smm_lock=1, tsc_freq_sel=1).value
"""SEV needs SmmLock, and Linux reports a firmware bug where TscFreqSel is 0."""

HWCR_UNDECLARED_BITS_KEPT = True
"""HWCR has bits that differ from part to part: they are stored. False: #GP."""

SMM_LOCKED_WRITES_IGNORED = True
"""With SmmLock set the SMM registers are read-only (PPR of family 17h): a write is
dropped. False: it gives #GP."""

RMP_LOCKED_BY_SNP = True
"""After SNPEn "certain MSRs may no longer be written" ([APM2] 3.2.1; their list, in
15.36.2, was not at hand): RMP_BASE and RMP_END give #GP."""

RMP_END_LOW_BITS = 0x1FFF
"""Bits 12:0 of RMP_END read as ones after reset, whatever is written.

Source: [LKML] A. Kalra on snp_get_rmptable_info(): "a default value of 0x1fff".
"""

SEV_STATUS_WITHOUT_SEV = True
"""Parts with SME alone have SEV_STATUS and read 0: Linux 6.1 reads it there too, and
boots. False: #GP."""

EFER_LOW_BITS_IGNORED = True
"""EFER[7:1] is "reserved, RAZ" in [APM2] 3.1.7: a 1 is dropped. False: #GP."""

MTRR_WIDTH_REDUCED = False
"""Once SYSCFG[23] is set, the bits that SME takes from physical addresses are reserved
in the variable MTRRs too, as [APM2] 7.10.1 has it for page tables. False: they keep the
width of CPUID 8000_0008.

Linux 6.1 computes masks with the full width (kernel/cpu/mtrr/mtrr.c, mtrr_bp_init()).
With True it would be refused what it writes; reading /proc/mtrr it calls the firmware's
mask wrong and taints itself (seen here with 6.1.0-50-cloud-amd64).
"""

APIC_STAYS = True
"""Moving the local APIC gives #GP: the devices here have fixed places. False: the
register takes the address, and the APIC stays all the same."""

PATCH_REVISION = 0x10
"""Lowest byte of the microcode patch level; the others name the processor. It is below
what real parts have, so that no mitigation that needs newer microcode is believed in.

Source of the layout: [LNX] arch/x86/kernel/cpu/microcode/amd.c.
"""
