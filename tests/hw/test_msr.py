"""RDMSR and WRMSR: which registers exist, and what software may do to them."""

import random

import pytest

from cbit.hw.cpuid import CpuidLeaf, CpuModel
from cbit.hw.cpuid.words import AddressSizes
from cbit.hw.errors import CallerError
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import (
    MSRS,
    RULES,
    Access,
    Efer,
    Ghcb,
    Msr,
    MsrFault,
    MsrFile,
    Pat,
    RmpBase,
    RmpEnd,
    SevStatus,
    Syscfg,
    TopMem2,
    VmHsavePa,
    VmPageFlush,
)

SMEE, SNP_EN, VMPL_EN = 1 << 23, 1 << 24, 1 << 25
COMMANDS = {rule.register.ADDRESS for rule in RULES if rule.access is Access.WRITE}


@pytest.fixture
def rome() -> MsrFile:
    return MsrFile(load_model("rome"))


@pytest.fixture
def genoa() -> MsrFile:
    """A part with SEV-SNP, and without the page-flush MSR."""
    return MsrFile(load_model("genoa-9124"))


def refused(msrs: MsrFile, index: int, value: int, *, paging: bool = False) -> str:
    """Return the message of a WRMSR that must fault and must change nothing."""
    before = {kind: msrs.get(kind) for kind in MSRS.values()}
    with pytest.raises(GeneralProtection) as fault:
        msrs.write(index, value, paging=paging)
    assert {kind: msrs.get(kind) for kind in MSRS.values()} == before
    assert fault.value.error_code == 0
    return str(fault.value)


# --- the layouts


@pytest.mark.req(
    "CM-30", "CM-31", "CM-32", "CM-33", "CM-34", "CM-35", "CM-36", "CM-37", "CM-41"
)
def test_vector_addresses() -> None:
    # Linux asm/msr-index.h, [SIL] MsrReg.h, [APM2] appendix A
    names = {kind.NAME: address for address, kind in MSRS.items()}
    assert {name: at for name, at in names.items() if "MTRR" in name} == {
        "MTRRcap": 0xFE,
        **{f"MTRRphysBase{n}": 0x200 + 2 * n for n in range(8)},
        **{f"MTRRphysMask{n}": 0x201 + 2 * n for n in range(8)},
        "MTRRfix64K_00000": 0x250,
        "MTRRfix16K_80000": 0x258,
        "MTRRfix16K_A0000": 0x259,
        **{f"MTRRfix4K_{0xC0 + 8 * n:X}000": 0x268 + n for n in range(8)},
        "MTRRdefType": 0x2FF,
    }
    assert {name: at for name, at in names.items() if "MTRR" not in name} == {
        "TSC": 0x10,
        "APIC_BASE": 0x1B,
        "SPEC_CTRL": 0x48,
        "PRED_CMD": 0x49,
        "PATCH_LEVEL": 0x8B,
        "SYSENTER_CS": 0x174,
        "SYSENTER_ESP": 0x175,
        "SYSENTER_EIP": 0x176,
        "MCG_CAP": 0x179,
        "MCG_STATUS": 0x17A,
        "MCG_CTL": 0x17B,
        "STAR": 0xC000_0081,
        "LSTAR": 0xC000_0082,
        "CSTAR": 0xC000_0083,
        "SFMASK": 0xC000_0084,
        "FS_BASE": 0xC000_0100,
        "GS_BASE": 0xC000_0101,
        "KERNEL_GS_BASE": 0xC000_0102,
        "TSC_AUX": 0xC000_0103,
        "NB_CFG": 0xC001_001F,
        "PATCH_LOADER": 0xC001_0020,
        "LS_CFG": 0xC001_1020,
        "DE_CFG": 0xC001_1029,
        "PAT": 0x277,
        "EFER": 0xC000_0080,
        "SYSCFG": 0xC001_0010,
        "HWCR": 0xC001_0015,
        "TOP_MEM": 0xC001_001A,
        "TOP_MEM2": 0xC001_001D,
        "SMM_BASE": 0xC001_0111,
        "SMM_ADDR": 0xC001_0112,
        "SMM_MASK": 0xC001_0113,
        "VM_HSAVE_PA": 0xC001_0117,
        "VM_PAGE_FLUSH": 0xC001_011E,
        "GHCB": 0xC001_0130,
        "SEV_STATUS": 0xC001_0131,
        "RMP_BASE": 0xC001_0132,
        "RMP_END": 0xC001_0133,
    }


@pytest.mark.req("CM-T4", "CM-T5", "CM-36")
@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (
            # [APM2] 3.2.1; [SIL] CcxReg.h
            Syscfg,
            {
                "mtrr_fix_dram_en": 18,
                "mtrr_fix_dram_mod_en": 19,
                "mtrr_var_dram_en": 20,
                "mtrr_tom2_en": 21,
                "tom2_force_mem_type_wb": 22,
                "mem_encrypt": 23,
                "snp_en": 24,
                "vmpl_en": 25,
                "hmkee": 26,
            },
        ),
        (
            # [APM2] 15.34.10; Linux asm/msr-index.h
            SevStatus,
            {
                "sev": 0,
                "sev_es": 1,
                "sev_snp": 2,
                "vtom": 3,
                "reflect_vc": 4,
                "restricted_injection": 5,
                "alternate_injection": 6,
                "debug_swap": 7,
                "prevent_host_ibs": 8,
                "snp_btb_isolation": 9,
                "vmpl_sss": 10,
                "secure_tsc": 11,
                "vmgexit_parameter": 12,
                "pmc_virtualization": 13,
                "ibs_virtualization": 14,
                "guest_intercept_ctl": 15,
                "vmsa_reg_prot": 16,
                "smt_protection": 17,
                "secure_avic": 18,
                "ibpb_on_entry": 23,
            },
        ),
        (
            # [APM2] 3.1.7
            Efer,
            {
                "sce": 0,
                "lme": 8,
                "lma": 10,
                "nxe": 11,
                "svme": 12,
                "lmsle": 13,
                "ffxsr": 14,
                "tce": 15,
                "mcommit": 17,
                "intwb": 18,
                "uaie": 20,
                "auto_ibrs": 21,
            },
        ),
    ],
)
def test_vector_every_bit_by_name(kind: type[Msr], bits: dict[str, int]) -> None:
    assert {name: field.mask for name, field in kind.FIELDS.items()} == {
        name: 1 << bit for name, bit in bits.items()
    }


@pytest.mark.req("CM-33", "CM-34")
def test_vector_fields_that_are_numbers() -> None:
    flush = VmPageFlush(0xFFFF_8880_1234_5007)
    assert (flush.page, flush.asid) == (0xF_FFF8_8801_2345, 7)
    # GHCB MSR protocol, SEV information: [63:48] maximum, [47:32] minimum, 31:24 C-bit.
    assert Ghcb(0x0002_0001_3300_0001).info == 1
    assert Ghcb(0x7F00_0000).page << 12 == 0x7F00_0000


# --- presence


@pytest.mark.req("CM-60", "CM-61")
@pytest.mark.parametrize("name", model_names())
def test_sev_status_is_there_with_sme_or_sev_and_reads_0_on_bare_metal(
    name: str,
) -> None:
    msrs = MsrFile(load_model(name))
    encryption = msrs.model.memory_encryption
    if encryption.sme or encryption.sev:
        assert msrs.read(SevStatus.ADDRESS) == 0
    else:
        with pytest.raises(GeneralProtection) as fault:
            msrs.read(SevStatus.ADDRESS)
        assert str(fault.value) == (
            "#GP(0x0): RDMSR 0xc0010131 (SEV_STATUS): not present on epyc-7401p-guest, "
            "expected CPUID 8000_001F EAX[0] (SME) or EAX[1] (SEV)"
        )


@pytest.mark.parametrize(
    ("kind", "model", "there"),
    [
        (VmPageFlush, "rome", True),
        (VmPageFlush, "genoa", False),
        (RmpBase, "milan", True),
        (RmpEnd, "genoa", False),  # SNP is off in that dump's firmware
        (RmpEnd, "rome", False),
        (RmpBase, "rome", False),
        (Ghcb, "zen1", False),  # SEV without SEV-ES
        (VmHsavePa, "no-leaf", False),
        (VmHsavePa, "zen1", True),
    ],
)
@pytest.mark.req("CM-34", "CM-35")
def test_a_register_exists_where_cpuid_says_so(
    kind: type[Msr], model: str, there: bool
) -> None:
    message = ""
    msrs = MsrFile(load_model(model))
    try:
        msrs.read(kind.ADDRESS)
    except GeneralProtection as fault:
        message = str(fault)
    assert ("not present" not in message) == there


def test_an_unknown_msr_faults_both_ways_with_its_facts(rome: MsrFile) -> None:
    with pytest.raises(MsrFault) as fault:
        rome.read(0x1234)
    assert (fault.value.index, fault.value.value) == (0x1234, None)
    assert "RDMSR 0x00001234: not present on epyc-7742" in str(fault.value)
    with pytest.raises(MsrFault) as fault:
        rome.write(0x1234, 0x56)
    assert (fault.value.index, fault.value.value) == (0x1234, 0x56)
    assert "WRMSR 0x00001234 <- 0x56: not present" in str(fault.value)


@pytest.mark.parametrize(("index", "value"), [(1 << 32, 0), (-1, 0)])
def test_an_address_wider_than_ecx_is_the_callers_mistake(
    rome: MsrFile, index: int, value: int
) -> None:
    with pytest.raises(CallerError):
        rome.read(index)
    with pytest.raises(CallerError):
        rome.write(index, value)


def test_a_value_wider_than_edx_eax_is_the_callers_mistake(rome: MsrFile) -> None:
    with pytest.raises(CallerError, match="64 bits"):
        rome.write(Pat.ADDRESS, 1 << 64)


# --- read-only, write-only, guest-only


@pytest.mark.req("CM-32")
def test_sev_status_cannot_be_written(rome: MsrFile) -> None:
    assert "read-only" in refused(rome, SevStatus.ADDRESS, 0)


@pytest.mark.req("CM-32")
def test_the_hardware_shows_in_sev_status_what_it_enabled(rome: MsrFile) -> None:
    rome.set(SevStatus.of(sev=1, sev_es=1))
    assert rome.read(SevStatus.ADDRESS) == 3


@pytest.mark.req("CM-33")
def test_the_host_cannot_touch_the_ghcb_msr(rome: MsrFile) -> None:
    assert "guest" in refused(rome, Ghcb.ADDRESS, 0x1000)
    with pytest.raises(GeneralProtection, match="guest"):
        rome.read(Ghcb.ADDRESS)


@pytest.mark.req("CM-34")
def test_vm_page_flush_is_a_command_and_needs_an_asid(rome: MsrFile) -> None:
    commands: list[tuple[int, int]] = []
    rome.on_write(lambda index, value: commands.append((index, value)))
    with pytest.raises(GeneralProtection, match="write-only"):
        rome.read(VmPageFlush.ADDRESS)
    assert "ASID 0" in refused(rome, VmPageFlush.ADDRESS, 0xFFFF_8880_0000_1000)
    rome.write(VmPageFlush.ADDRESS, 0xFFFF_8880_0000_1007)
    assert commands == [(VmPageFlush.ADDRESS, 0xFFFF_8880_0000_1007)]
    assert rome.get(VmPageFlush).value == 0


# --- what holds for all


@pytest.mark.parametrize("name", model_names())
def test_law_a_register_accepts_the_value_it_shows(name: str) -> None:
    # Software reads, changes one bit and writes: what it did not touch must pass.
    msrs = MsrFile(load_model(name))
    for rule in RULES:
        if rule.access is Access.BOTH and rule.present(msrs.model):
            index = rule.register.ADDRESS
            before = msrs.read(index)
            msrs.write(index, before)
            assert msrs.read(index) == before


@pytest.mark.parametrize("name", model_names())
def test_law_reset_values_have_no_reserved_bits(name: str) -> None:
    for smee in (False, True):
        msrs = MsrFile(load_model(name), smee)
        for kind in MSRS.values():
            assert msrs.get(kind).reserved == 0


def test_law_a_write_changes_its_register_and_tells_or_faults_and_changes_nothing() -> (
    None
):
    told: list[tuple[int, int]] = []
    for seed in range(60):
        rng = random.Random(seed)
        msrs = MsrFile(load_model(rng.choice(model_names())), rng.random() < 0.5)
        msrs.on_write(lambda index, value: told.append((index, value)))
        for _ in range(50):
            index = rng.choice([*MSRS, 0x10, 0xC000_0081])
            value = 0
            for _ in range(rng.randrange(4)):
                value |= 1 << rng.randrange(64)
            before = {kind: msrs.get(kind).value for kind in MSRS.values()}
            told.clear()
            try:
                msrs.write(index, value, paging=rng.random() < 0.5)
            except GeneralProtection:
                assert told == []
                assert {k: msrs.get(k).value for k in MSRS.values()} == before
                continue
            ((told_index, told_value),) = told
            assert told_index == index
            if index not in COMMANDS:
                assert told_value == msrs.read(index)
            others = {k: v for k, v in before.items() if k is not MSRS[index]}
            assert {k: msrs.get(k).value for k in others} == others


def test_hardware_changes_call_nobody_and_reset_undoes_everything(
    rome: MsrFile,
) -> None:
    def never(index: int, value: int) -> None:
        raise AssertionError(f"called for {index:#x}")

    rome.on_write(never)
    rome.set(Efer.of(lme=1, lma=1))
    rome.set(Syscfg(0))
    rome.reset()
    assert (rome.get(Efer).value, rome.get(Syscfg).value) == (0, SMEE)


def test_a_class_that_is_no_msr_of_the_machine_is_refused(rome: MsrFile) -> None:
    class Unknown(Msr):
        ADDRESS, NAME = 0x1, "UNKNOWN"

    with pytest.raises(CallerError, match="Unknown"):
        rome.set(Unknown(0))
    with pytest.raises(CallerError, match="Unknown"):
        rome.get(Unknown)


def test_every_core_has_its_own_registers() -> None:
    first, second = (MsrFile(load_model("rome")) for _ in range(2))
    first.write(Pat.ADDRESS, 0)
    assert second.read(Pat.ADDRESS) != 0


def test_the_width_of_an_address_follows_the_processor() -> None:
    narrow = load_model("rome").table.replace(
        {(AddressSizes.LEAF, 0): CpuidLeaf(0x3028, 0, 0, 0)}
    )
    msrs = MsrFile(CpuModel("narrow", "test", narrow))
    assert "reserved" in refused(msrs, TopMem2.ADDRESS, 1 << 40)
