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


class FeatureEax(CpuidWord):
    """Leaf 1 EAX: which processor. Source: [APM3] appendix E; Linux cpuid.c."""

    LEAF, REGISTER = 0x0000_0001, "eax"

    stepping = Field(3, 0)
    base_model = Field(7, 4)
    base_family = Field(11, 8)
    extended_model = Field(19, 16)
    extended_family = Field(27, 20)

    @property
    def family(self) -> int:
        """The family as manuals count it: 17h is Zen and Zen 2."""
        return self.base_family + self.extended_family


class FeatureEbx(CpuidWord):
    """Leaf 1 EBX. Source: [APM3] appendix E."""

    LEAF, REGISTER = 0x0000_0001, "ebx"

    clflush_size = Field(15, 8, about="line in units of 8 bytes")
    logical_count = Field(23, 16, about="threads of the package")
    apic_id = Field(31, 24)


class FeatureEcx(CpuidWord):
    """Leaf 1 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 4."""

    LEAF, REGISTER = 0x0000_0001, "ecx"

    sse3 = Field(0)
    pclmulqdq = Field(1, about="carry-less multiplication")
    monitor = Field(3, about="MONITOR and MWAIT")
    ssse3 = Field(9)
    fma = Field(12)
    cmpxchg16b = Field(13)
    pcid = Field(17, about="process-context identifiers")
    sse4_1 = Field(19)
    sse4_2 = Field(20)
    x2apic = Field(21, about="APIC registers as MSRs")
    movbe = Field(22)
    popcnt = Field(23)
    aes = Field(25)
    xsave = Field(26, about="XSAVE and its kin")
    osxsave = Field(27, about="follows CR4.OSXSAVE")
    avx = Field(28)
    f16c = Field(29)
    rdrand = Field(30)
    hypervisor = Field(31, about="running under a hypervisor; 0 on bare metal")


class FeatureEdx(CpuidWord):
    """Leaf 1 EDX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 0."""

    LEAF, REGISTER = 0x0000_0001, "edx"

    fpu = Field(0)
    vme = Field(1, about="virtual-8086 mode extensions")
    de = Field(2, about="debugging extensions")
    pse = Field(3, about="large pages")
    tsc = Field(4, about="time-stamp counter")
    msr = Field(5, about="RDMSR and WRMSR")
    pae = Field(6, about="physical-address extensions")
    mce = Field(7, about="machine-check exception")
    cmpxchg8b = Field(8)
    apic = Field(9, about="local APIC")
    sep = Field(11, about="SYSENTER and SYSEXIT")
    mtrr = Field(12, about="memory-type range registers")
    pge = Field(13, about="global pages")
    mca = Field(14, about="machine-check architecture")
    cmov = Field(15)
    pat = Field(16, about="page attribute table")
    pse36 = Field(17)
    clflush = Field(19)
    mmx = Field(23)
    fxsr = Field(24, about="FXSAVE and FXRSTOR")
    sse = Field(25)
    sse2 = Field(26)
    htt = Field(28, about="more than one logical processor")


class PowerEcx(CpuidWord):
    """Leaf 6 ECX. Source: [APM3] appendix E; Linux 6.1.192 kernel/cpu/common.c."""

    LEAF, REGISTER = 0x0000_0006, "ecx"

    effective_frequency = Field(0, about="MPERF and APERF")


class StructuredEax(CpuidWord):
    """Leaf 7 EAX. Source: [APM3] appendix E."""

    LEAF, REGISTER = 0x0000_0007, "eax"

    max_subleaf = Field(31, 0, about="highest sub-leaf")


class StructuredEbx(CpuidWord):
    """Leaf 7 EBX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 9."""

    LEAF, REGISTER = 0x0000_0007, "ebx"

    fsgsbase = Field(0, about="RDFSBASE and its kin")
    tsc_adjust = Field(1, about="MSR 003B is present")
    bmi1 = Field(3)
    avx2 = Field(5)
    smep = Field(7, about="no supervisor execution of user pages")
    bmi2 = Field(8)
    erms = Field(9, about="fast REP MOVSB and STOSB")
    invpcid = Field(10)
    pqm = Field(12, about="resource monitoring")
    pqe = Field(15, about="resource enforcement")
    avx512f = Field(16)
    avx512dq = Field(17)
    rdseed = Field(18)
    adx = Field(19)
    smap = Field(20, about="no supervisor access to user pages")
    avx512_ifma = Field(21)
    clflushopt = Field(23)
    clwb = Field(24)
    avx512cd = Field(28)
    sha = Field(29)
    avx512bw = Field(30)
    avx512vl = Field(31)


class StructuredEcx(CpuidWord):
    """Leaf 7 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 16."""

    LEAF, REGISTER = 0x0000_0007, "ecx"

    avx512_vbmi = Field(1)
    umip = Field(2, about="user-mode instruction prevention")
    pku = Field(3, about="protection keys for user pages")
    ospke = Field(4, about="follows CR4.PKE")
    avx512_vbmi2 = Field(6)
    shstk = Field(7, about="shadow stacks")
    gfni = Field(8)
    vaes = Field(9)
    vpclmulqdq = Field(10)
    avx512_vnni = Field(11)
    avx512_bitalg = Field(12)
    avx512_vpopcntdq = Field(14)
    la57 = Field(16, about="5-level paging")
    rdpid = Field(22)
    bus_lock_detect = Field(24)
    movdiri = Field(27)
    movdir64b = Field(28)


class StructuredEdx(CpuidWord):
    """Leaf 7 EDX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 18."""

    LEAF, REGISTER = 0x0000_0007, "edx"

    fsrm = Field(4, about="fast short REP MOVSB")
    avx512_vp2intersect = Field(8)
    flush_l1d = Field(28, about="MSR 010B is present")


class ExtendedMaxEax(CpuidWord):
    """Leaf 8000_0000 EAX. Source: [APM3] appendix E."""

    LEAF, REGISTER = 0x8000_0000, "eax"

    max_leaf = Field(31, 0, about="highest extended leaf")


class ExtendedEcx(CpuidWord):
    """Leaf 8000_0001 ECX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 6."""

    LEAF, REGISTER = 0x8000_0001, "ecx"

    lahf = Field(0, about="LAHF and SAHF in 64-bit mode")
    cmp_legacy = Field(1, about="several cores, told the old way")
    svm = Field(2, about="secure virtual machine")
    ext_apic = Field(3, about="extended APIC registers")
    cr8_legacy = Field(4, about="LOCK MOV CR0 is MOV CR8")
    abm = Field(5, about="LZCNT")
    sse4a = Field(6)
    misaligned_sse = Field(7, about="MXCSR.MM")
    prefetchw = Field(8)
    osvw = Field(9, about="OS-visible workarounds")
    ibs = Field(10, about="instruction-based sampling")
    skinit = Field(12)
    wdt = Field(13, about="watchdog timer")
    tce = Field(17, about="translation cache extension")
    topology_extensions = Field(22, about="leaves 8000_001D and 8000_001E")
    perfctr_core = Field(23, about="six counters of the core")
    perfctr_nb = Field(24, about="counters of the data fabric")
    data_breakpoint = Field(26, about="address masks of breakpoints")
    perf_tsc = Field(27)
    perfctr_llc = Field(28, about="counters of the L3 cache")
    mwaitx = Field(29, about="MONITORX and MWAITX")
    address_mask_31 = Field(30, about="32-bit masks of breakpoints")


class ExtendedEdx(CpuidWord):
    """Leaf 8000_0001 EDX. Source: [APM3] appendix E; Linux asm/cpufeatures.h word 1."""

    LEAF, REGISTER = 0x8000_0001, "edx"

    fpu = Field(0)
    vme = Field(1, about="virtual-8086 mode extensions")
    de = Field(2, about="debugging extensions")
    pse = Field(3, about="large pages")
    tsc = Field(4, about="time-stamp counter")
    msr = Field(5, about="RDMSR and WRMSR")
    pae = Field(6, about="physical-address extensions")
    mce = Field(7, about="machine-check exception")
    cmpxchg8b = Field(8)
    apic = Field(9, about="local APIC")
    syscall = Field(11, about="SYSCALL and SYSRET")
    mtrr = Field(12, about="memory-type range registers")
    pge = Field(13, about="global pages")
    mca = Field(14, about="machine-check architecture")
    cmov = Field(15)
    pat = Field(16, about="page attribute table")
    pse36 = Field(17)
    nx = Field(20, about="no-execute pages")
    mmxext = Field(22)
    mmx = Field(23)
    fxsr = Field(24, about="FXSAVE and FXRSTOR")
    ffxsr = Field(25, about="fast FXSAVE and FXRSTOR")
    page_1gb = Field(26, about="1 GiB pages")
    rdtscp = Field(27)
    long_mode = Field(29, about="64-bit mode")


class RasEbx(CpuidWord):
    """Leaf 8000_0007 EBX. Source: [APM3] appendix E; Linux asm/cpufeatures.h."""

    LEAF, REGISTER = 0x8000_0007, "ebx"

    overflow_recov = Field(0, about="MCA overflow can be recovered")
    succor = Field(1, about="errors can be contained")
    hwa = Field(2, about="hardware assertions")
    smca = Field(3, about="scalable MCA")


class PowerEdx(CpuidWord):
    """Leaf 8000_0007 EDX. Source: [APM3] appendix E; Linux cpu/powerflags.c."""

    LEAF, REGISTER = 0x8000_0007, "edx"

    temperature_sensor = Field(0)
    frequency_id = Field(1)
    voltage_id = Field(2)
    thermal_trip = Field(3)
    thermal_monitor = Field(4)
    software_thermal_control = Field(5)
    multiplier_100mhz = Field(6)
    hardware_pstate = Field(7)
    invariant_tsc = Field(8, about="TSC of constant rate")
    boost = Field(9, about="core performance boost")
    effective_frequency_read_only = Field(10)
    processor_feedback = Field(11)
    power_reporting = Field(12)
    connected_standby = Field(13)
    rapl = Field(14, about="running average power limit")


class AddressSizes(CpuidWord):
    """Leaf 8000_0008 EAX. Source: [APM3] appendix E; [EDK2]; Linux cpu/common.c."""

    LEAF, REGISTER = 0x8000_0008, "eax"

    phys_bits = Field(7, 0, about="physical address bits before reduction")
    linear_bits = Field(15, 8, about="linear address bits")
    guest_phys_bits = Field(23, 16, about="guest physical bits; 0: as phys_bits")


class SizesEbx(CpuidWord):
    """Leaf 8000_0008 EBX: instructions, and what bounds speculation.

    Source: [APM3] appendix E; Linux asm/cpufeatures.h word 13; [APM2] 3.1.7 for bit 20.
    """

    LEAF, REGISTER = 0x8000_0008, "ebx"

    clzero = Field(0)
    irperf = Field(1, about="MSR C000_00E9 is present")
    xsave_error_pointers = Field(2)
    invlpgb = Field(3, about="INVLPGB and TLBSYNC")
    rdpru = Field(4)
    mba = Field(6, about="memory bandwidth allocation")
    mcommit = Field(8, about="MCOMMIT")
    wbnoinvd = Field(9)
    ibpb = Field(12, about="MSR 0049 bit 0")
    int_wbinvd = Field(13, about="WBINVD can be interrupted")
    ibrs = Field(14, about="MSR 0048 bit 0")
    stibp = Field(15, about="MSR 0048 bit 1")
    ibrs_always_on = Field(16)
    stibp_always_on = Field(17, about="STIBP may stay on")
    ibrs_preferred = Field(18)
    ibrs_same_mode = Field(19, about="IBRS protects within one mode")
    efer_lmsle_unsupported = Field(20, about="EFER.LMSLE is gone")
    invlpgb_nested = Field(21, about="INVLPGB of nested pages")
    ppin = Field(23, about="MSR C001_02F1 is present")
    ssbd = Field(24, about="MSR 0048 bit 2")
    virt_ssbd = Field(25, about="MSR C001_011F is present")
    ssb_no = Field(26, about="no speculative store bypass")
    cppc = Field(27, about="collaborative performance control")
    psfd = Field(28, about="MSR 0048 bit 7")
    btc_no = Field(29, about="no branch type confusion")
    ibpb_ret = Field(30, about="IBPB clears return predictions")
    branch_sampling = Field(31)


class SizesEcx(CpuidWord):
    """Leaf 8000_0008 ECX. Source: [APM3] appendix E; Linux 6.1.192 cpu/amd.c."""

    LEAF, REGISTER = 0x8000_0008, "ecx"

    nc = Field(7, 0, about="threads of the package less one")
    apic_id_size = Field(15, 12, about="bits of an APIC id that name a thread")


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

    no_nested_data_breakpoint = Field(0)
    lfence_serializing = Field(2, about="LFENCE always serializes")
    null_selector_clears_base = Field(6)
    upper_address_ignore = Field(7, about="bits 63:57 can be excluded from checks")
    automatic_ibrs = Field(8, about="automatic IBRS")
    no_smm_ctl_msr = Field(9)
    prefetch_ctl_msr = Field(13, about="MSR C000_0108 is present")


class MultiKeyEax(CpuidWord):
    """Leaf 8000_0023 EAX. Source: [TSMET], one place only: unverified."""

    LEAF, REGISTER = 0x8000_0023, "eax"

    mem_hmk = Field(0, about="multi-key memory encryption of the host")
