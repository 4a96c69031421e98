"""The CPUID registers that somebody here decodes, one class per register."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..registers import Field, Register


class CpuidWord(Register):
    """One 32-bit register that CPUID returns for one leaf.

    Attributes:
        LEAF: EAX before the instruction.
        SUBLEAF: ECX before the instruction.
        REGISTER: which of the four results this is.
    """

    WIDTH_BITS = 32
    LEAF: ClassVar[int]
    SUBLEAF: ClassVar[int] = 0
    REGISTER: ClassVar[Literal["eax", "ebx", "ecx", "edx"]]


class FeatureEcx(CpuidWord):
    """Leaf 1 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 4."""

    LEAF, REGISTER = 0x0000_0001, "ecx"

    pcid = Field(17, about="process-context identifiers")
    hypervisor = Field(31, about="running under a hypervisor; 0 on bare metal")


class FeatureEdx(CpuidWord):
    """Leaf 1 EDX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 0."""

    LEAF, REGISTER = 0x0000_0001, "edx"

    pse = Field(3, about="large pages")
    pae = Field(6, about="physical-address extensions")
    pge = Field(13, about="global pages")
    pat = Field(16, about="page attribute table")


class StructuredEbx(CpuidWord):
    """Leaf 7 EBX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 9."""

    LEAF, REGISTER = 0x0000_0007, "ebx"

    fsgsbase = Field(0, about="RDFSBASE and its kin")
    smep = Field(7, about="no supervisor execution of user pages")
    smap = Field(20, about="no supervisor access to user pages")


class StructuredEcx(CpuidWord):
    """Leaf 7 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 16."""

    LEAF, REGISTER = 0x0000_0007, "ecx"

    umip = Field(2, about="user-mode instruction prevention")
    pku = Field(3, about="protection keys for user pages")
    la57 = Field(16, about="5-level paging")


class ExtendedMaxEax(CpuidWord):
    """Leaf 8000_0000 EAX. Source: [APM3] appendix E."""

    LEAF, REGISTER = 0x8000_0000, "eax"

    max_leaf = Field(31, 0, about="highest extended leaf")


class ExtendedEcx(CpuidWord):
    """Leaf 8000_0001 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 6."""

    LEAF, REGISTER = 0x8000_0001, "ecx"

    svm = Field(2, about="secure virtual machine")
    tce = Field(17, about="translation cache extension")


class ExtendedEdx(CpuidWord):
    """Leaf 8000_0001 EDX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 1."""

    LEAF, REGISTER = 0x8000_0001, "edx"

    syscall = Field(11, about="SYSCALL and SYSRET")
    nx = Field(20, about="no-execute pages")
    ffxsr = Field(25, about="fast FXSAVE and FXRSTOR")
    page_1gb = Field(26, about="1 GiB pages")
    long_mode = Field(29, about="64-bit mode")


class AddressSizes(CpuidWord):
    """Leaf 8000_0008 EAX. Source: [APM3] appendix E; [EDK2]; Linux cpu/common.c."""

    LEAF, REGISTER = 0x8000_0008, "eax"

    phys_bits = Field(7, 0, about="physical address bits before reduction")
    linear_bits = Field(15, 8, about="linear address bits")
    guest_phys_bits = Field(23, 16, about="guest physical bits; 0: as phys_bits")


class SizesEbx(CpuidWord):
    """Leaf 8000_0008 EBX. Source: [APM3] appendix E; [APM2] 3.1.7 for bit 20."""

    LEAF, REGISTER = 0x8000_0008, "ebx"

    mcommit = Field(8, about="MCOMMIT")
    int_wbinvd = Field(13, about="WBINVD can be interrupted")
    efer_lmsle_unsupported = Field(20, about="EFER.LMSLE is gone")


class MemEncryptEax(CpuidWord):
    """Leaf 8000_001F EAX: which kinds of memory encryption there are.

    Bit 20 is set on Turin and has no published name that we found.

    Source: [APM3] E.4.17; [SIL] CcxReg.h; [OVM] cpuid.rs; Linux asm/cpufeatures.h
    word 19. Bit 22 stands in [OVM] alone: unverified.
    """

    LEAF, REGISTER = 0x8000_001F, "eax"

    sme = Field(0, about="secure memory encryption")
    sev = Field(1, about="secure encrypted virtualization")
    page_flush_msr = Field(2, about="MSR C001_011E is present")
    sev_es = Field(3, about="encrypted register state")
    sev_snp = Field(4, about="secure nested paging")
    vmpl = Field(5, about="VM permission levels")
    rmpquery = Field(6, about="RMPQUERY instruction")
    vmpl_sss = Field(7, about="VMPL supervisor shadow stack")
    secure_tsc = Field(8, about="secure TSC")
    tsc_aux_virtualization = Field(9, about="TSC_AUX is virtualised")
    hw_enf_cache_coh = Field(10, about="caches coherent across encryption domains")
    host_64bit = Field(11, about="SEV guests only from a 64-bit host")
    restricted_injection = Field(12, about="restricted interrupt injection")
    alternate_injection = Field(13, about="alternate interrupt injection")
    debug_swap = Field(14, about="full swap of debug registers")
    prevent_host_ibs = Field(15, about="host IBS can be prevented")
    vte = Field(16, about="virtual transparent encryption")
    vmgexit_parameter = Field(17, about="VMGEXIT parameter")
    virtual_tom_msr = Field(18, about="virtual top-of-memory MSR")
    ibs_virt_guest_ctl = Field(19, about="IBS virtualisation for SEV-ES guests")
    rmpread = Field(21, about="RMPREAD instruction")
    guest_intercept_control = Field(22, about="guest intercept control")
    segmented_rmp = Field(23, about="segmented RMP")
    vmsa_reg_prot = Field(24, about="VMSA register protection")
    smt_protection = Field(25, about="SMT protection")
    secure_avic = Field(26, about="secure AVIC")
    allowed_sev_features = Field(27, about="VMCB can limit SEV_FEATURES")
    svsm_comm_page_msr = Field(28, about="MSR C001_F000 is present")
    nested_virt_snp_msr = Field(29, about="MSR C001_F001 is present")
    hv_in_use_wr_allowed = Field(30, about="host pages in use may be written")
    ibpb_on_entry = Field(31, about="IBPB on VM entry")


class MemEncryptEbx(CpuidWord):
    """Leaf 8000_001F EBX: where the C-bit is, and what it costs.

    The reduction is six bits wide; [EDK2] Cpuid.h declares five, which shifts its
    later fields.

    Source: [APM3] E.4.17; [SIL]; [OVM]; Linux 6.1.192 arch/x86/kernel/cpu/amd.c.
    """

    LEAF, REGISTER = 0x8000_001F, "ebx"

    c_bit_position = Field(5, 0, about="bit of a page-table entry that encrypts")
    phys_addr_reduction = Field(11, 6, about="address bits lost with SYSCFG[23]=1")
    num_vmpl = Field(15, 12, about="number of VM permission levels")
    coherency_sfw_no = Field(31, about="SNP needs no software coherency measure")


class MemEncryptEcx(CpuidWord):
    """Leaf 8000_001F ECX. Source: [APM3] E.4.17; Linux 6.1.192 kvm/svm/sev.c."""

    LEAF, REGISTER = 0x8000_001F, "ecx"

    max_sev_guests = Field(31, 0, about="highest ASID of an encrypted guest")


class MemEncryptEdx(CpuidWord):
    """Leaf 8000_001F EDX. Source: [APM2] 15.35.2; Linux 6.1.192 kvm/svm/sev.c."""

    LEAF, REGISTER = 0x8000_001F, "edx"

    min_sev_no_es_asid = Field(31, 0, about="lowest ASID of a guest without SEV-ES")


class Extended21Eax(CpuidWord):
    """Leaf 8000_0021 EAX. Source: [APM3] appendix E; Linux asm/cpufeatures.h."""

    LEAF, REGISTER = 0x8000_0021, "eax"

    upper_address_ignore = Field(7, about="bits 63:57 can be excluded from checks")
    automatic_ibrs = Field(8, about="automatic IBRS")


class MultiKeyEax(CpuidWord):
    """Leaf 8000_0023 EAX. Source: [TSMET], one place only: unverified."""

    LEAF, REGISTER = 0x8000_0023, "eax"

    mem_hmk = Field(0, about="multi-key memory encryption of the host")
