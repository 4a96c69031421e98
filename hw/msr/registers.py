"""The model-specific registers of the machine, field by field."""

from __future__ import annotations

from typing import ClassVar

from ..registers import Field, Register


class Msr(Register):
    """A model-specific register, 64 bits.

    Attributes:
        ADDRESS: ECX of RDMSR and WRMSR.
        NAME: as the manuals print it.
    """

    ADDRESS: ClassVar[int]
    NAME: ClassVar[str]


class Pat(Msr):
    """Page attribute table: eight memory types. Linux calls them PA0 to PA7.

    Source: [APM2] 7.8; Linux 6.1.192 arch/x86/mm/pat/memtype.c.
    """

    ADDRESS, NAME = 0x0000_0277, "PAT"

    pa0 = Field(2, 0, about="0 UC, 1 WC, 4 WT, 5 WP, 6 WB, 7 UC-")
    pa1 = Field(10, 8)
    pa2 = Field(18, 16)
    pa3 = Field(26, 24)
    pa4 = Field(34, 32)
    pa5 = Field(42, 40)
    pa6 = Field(50, 48)
    pa7 = Field(58, 56)

    def types(self) -> tuple[int, ...]:
        """Return the eight types, PA0 first."""
        return tuple(kind for _, kind in self.fields())


class Efer(Msr):
    """Extended feature enable register.

    Source: [APM2] 3.1.7; Linux 6.1.192 arch/x86/include/asm/msr-index.h.
    """

    ADDRESS, NAME = 0xC000_0080, "EFER"

    sce = Field(0, about="SYSCALL enable")
    lme = Field(8, about="long mode enable")
    lma = Field(10, about="long mode active, set by the processor")
    nxe = Field(11, about="no-execute enable")
    svme = Field(12, about="secure virtual machine enable")
    lmsle = Field(13, about="long mode segment limit enable")
    ffxsr = Field(14, about="fast FXSAVE and FXRSTOR")
    tce = Field(15, about="translation cache extension")
    mcommit = Field(17, about="MCOMMIT enable")
    intwb = Field(18, about="interruptible WBINVD enable")
    uaie = Field(20, about="upper address ignore enable")
    auto_ibrs = Field(21, about="automatic IBRS enable")


class Syscfg(Msr):
    """System configuration, one per core.

    Source: [APM2] 3.2.1; [SIL] CcxReg.h; [XEN] msr-index.h.
    """

    ADDRESS, NAME = 0xC001_0010, "SYSCFG"

    mtrr_fix_dram_en = Field(18, about="RdMem and WrMem of fixed MTRRs count")
    mtrr_fix_dram_mod_en = Field(19, about="RdMem and WrMem can be changed (MFDM)")
    mtrr_var_dram_en = Field(20, about="TOP_MEM and the IORRs count")
    mtrr_tom2_en = Field(21, about="TOP_MEM2 counts")
    tom2_force_mem_type_wb = Field(22, about="4 GiB to TOP_MEM2 is write-back")
    mem_encrypt = Field(23, about="memory encryption on: the C-bit counts (SMEE)")
    snp_en = Field(24, about="secure nested paging on")
    vmpl_en = Field(25, about="VM permission levels on")
    hmkee = Field(26, about="multi-key encryption of the host, in place of bit 23")


class Hwcr(Msr):
    """Hardware configuration; only the bits that Linux 6.1 looks at have names.

    Source: [APM2] 15.34.3; Linux 6.1.192 asm/msr-index.h and kernel/cpu/amd.c.
    """

    ADDRESS, NAME = 0xC001_0015, "HWCR"

    smm_lock = Field(0, about="SMM is locked; SEV guests need it")
    tsc_freq_sel = Field(24, about="TSC counts at the P0 frequency")
    cpb_dis = Field(25, about="core performance boost off")
    irperf_en = Field(30, about="instructions-retired counter on")


class TopMem(Msr):
    """Top of DRAM below 4 GiB. Source: [APM2] 7.9.4, from memory: unverified."""

    ADDRESS, NAME = 0xC001_001A, "TOP_MEM"

    tom = Field(51, 23, about="first 8 MiB unit above the DRAM")


class TopMem2(Msr):
    """Top of DRAM above 4 GiB. Source: [APM2] 7.9.4, from memory: unverified."""

    ADDRESS, NAME = 0xC001_001D, "TOP_MEM2"

    tom2 = Field(51, 23, about="first 8 MiB unit above the DRAM")


class SmmBase(Msr):
    """Base of the SMM save area. Source: PPR of family 17h, unverified."""

    ADDRESS, NAME = 0xC001_0111, "SMM_BASE"

    smm_base = Field(31, 0, about="physical address")


class SmmAddr(Msr):
    """Base of TSeg. Source: PPR of family 17h, unverified."""

    ADDRESS, NAME = 0xC001_0112, "SMM_ADDR"

    tseg_base = Field(47, 17, about="base in units of 128 KiB")


class SmmMask(Msr):
    """Mask and attributes of ASeg and TSeg.

    Source: PPR of family 17h as restated in public firmware code: unverified.
    """

    ADDRESS, NAME = 0xC001_0113, "SMM_MASK"

    a_valid = Field(0, about="ASeg protected")
    t_valid = Field(1, about="TSeg protected")
    a_close = Field(2, about="data accesses to ASeg go to MMIO")
    t_close = Field(3, about="data accesses to TSeg go to MMIO")
    a_mtype_io_wc = Field(4, about="ASeg outside SMM is write-combining")
    t_mtype_io_wc = Field(5, about="TSeg outside SMM is write-combining")
    a_mtype_dram = Field(10, 8, about="memory type of ASeg")
    t_mtype_dram = Field(14, 12, about="memory type of TSeg")
    tseg_mask = Field(47, 17, about="mask in units of 128 KiB")


class VmHsavePa(Msr):
    """Page where VMRUN saves the host's state; 0 before SNP is switched on.

    Source: [APM2] 15.30.4; Linux 6.1.192 asm/msr-index.h.
    """

    ADDRESS, NAME = 0xC001_0117, "VM_HSAVE_PA"

    page = Field(51, 12, about="physical page number")


class VmPageFlush(Msr):
    """Command: write back and drop one guest page's lines from every cache.

    Source: [APM2] 15.34.9; Linux 6.1.192 arch/x86/kvm/svm/sev.c.
    """

    ADDRESS, NAME = 0xC001_011E, "VM_PAGE_FLUSH"

    asid = Field(11, 0, about="guest ASID, not 0")
    page = Field(63, 12, about="virtual page number in the host's tables")


class Ghcb(Msr):
    """Guest-hypervisor communication, guest mode only.

    Source: [APM2] 15.35.7; Linux 6.1.192 arch/x86/include/asm/sev-common.h.
    """

    ADDRESS, NAME = 0xC001_0130, "GHCB"

    info = Field(11, 0, about="protocol code; 0: the rest is the GHCB's page")
    page = Field(63, 12, about="guest physical page number, or data of the protocol")


class SevStatus(Msr):
    """What the last VMRUN enabled; bits 2 and up are SEV_FEATURES of the VMSA.

    Source: [APM2] 15.34.10; [EDK2] SevSnpMsr.h; Linux 6.1.192 asm/msr-index.h. Bit 15
    is reserved in [EDK2].
    """

    ADDRESS, NAME = 0xC001_0131, "SEV_STATUS"

    sev = Field(0, about="SEV on")
    sev_es = Field(1, about="SEV-ES on")
    sev_snp = Field(2, about="SEV-SNP active")
    vtom = Field(3, about="virtual top of memory")
    reflect_vc = Field(4, about="#VC goes to a lower VMPL")
    restricted_injection = Field(5)
    alternate_injection = Field(6)
    debug_swap = Field(7, about="debug registers are swapped")
    prevent_host_ibs = Field(8)
    snp_btb_isolation = Field(9)
    vmpl_sss = Field(10, about="VMPL supervisor shadow stack")
    secure_tsc = Field(11)
    vmgexit_parameter = Field(12)
    pmc_virtualization = Field(13)
    ibs_virtualization = Field(14)
    guest_intercept_ctl = Field(15)
    vmsa_reg_prot = Field(16)
    smt_protection = Field(17)
    secure_avic = Field(18)
    ibpb_on_entry = Field(23)


class RmpBase(Msr):
    """First byte of the reverse map table.

    Source: [LNX] arch/x86/virt/svm/sev.c, RMP_ADDR_MASK; [SHOST].
    """

    ADDRESS, NAME = 0xC001_0132, "RMP_BASE"

    rmp_base = Field(51, 13, about="address in units of 8 KiB")


class RmpEnd(Msr):
    """Last byte of the reverse map table.

    Source: [LNX] arch/x86/virt/svm/sev.c, RMP_ADDR_MASK; [SHOST].
    """

    ADDRESS, NAME = 0xC001_0133, "RMP_END"

    low_ones = Field(12, 0, about="reserved, all ones")
    rmp_end = Field(51, 13, about="address in units of 8 KiB")
