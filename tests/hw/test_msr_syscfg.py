"""SYSCFG: who switches memory encryption on, and that nobody switches it off."""

import pytest

from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import MsrFile, RmpBase, RmpEnd, Syscfg, choices

SYSCFG = Syscfg.ADDRESS
MFDM, SMEE, SNP_EN, VMPL_EN, HMKEE = (1 << bit for bit in (19, 23, 24, 25, 26))


def core(name: str = "genoa-9124", smee: bool = True) -> MsrFile:
    return MsrFile(load_model(name), smee)


def refused(msrs: MsrFile, value: int) -> str:
    before = msrs.read(SYSCFG)
    with pytest.raises(GeneralProtection) as fault:
        msrs.write(SYSCFG, value)
    assert msrs.read(SYSCFG) == before
    return str(fault.value)


@pytest.mark.req("CM-30", "CM-50")
@pytest.mark.parametrize("name", model_names())
def test_bit_23_is_the_firmwares_decision_where_there_is_a_c_bit(name: str) -> None:
    usable = load_model(name).memory_encryption.usable
    assert core(name, smee=True).read(SYSCFG) == (SMEE if usable else 0)
    assert core(name, smee=False).read(SYSCFG) == 0


@pytest.mark.req("CM-21", "CM-50", "BZ-6", "BZ-7")
def test_rembrandt_stays_without_encryption_whatever_cpuid_claims() -> None:
    msrs = core("rembrandt")
    assert msrs.model.memory_encryption.sme
    assert msrs.get(Syscfg).mem_encrypt == 0
    assert "bits 0x800000 are reserved on ryzen-6800hs" in refused(msrs, SMEE)


@pytest.mark.req("CM-52")
def test_a_core_that_lacks_bit_23_gets_it_by_read_change_and_write() -> None:
    late = core("rome", smee=False)
    told: list[tuple[int, int]] = []
    late.on_write(lambda index, value: told.append((index, value)))
    late.write(SYSCFG, late.read(SYSCFG) | SMEE)
    assert late.get(Syscfg).mem_encrypt == 1
    assert told == [(SYSCFG, SMEE)]


@pytest.mark.req("CM-55")
@pytest.mark.parametrize("bit", [*range(18), *range(27, 64)])
def test_a_bit_without_a_name_faults(bit: int) -> None:
    # [APM2] 3.2.1: 17:0 and 63:27 must be zero.
    assert f"bits {1 << bit:#x} are reserved" in refused(core(), SMEE | 1 << bit)


@pytest.mark.req("CM-T4")
@pytest.mark.parametrize("bit", range(18, 23))
def test_the_mtrr_bits_can_be_set_and_cleared(bit: int) -> None:
    msrs = core()
    msrs.write(SYSCFG, SMEE | 1 << bit)
    assert msrs.read(SYSCFG) == SMEE | 1 << bit
    msrs.write(SYSCFG, SMEE)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("rome", SNP_EN), ("rome", VMPL_EN), ("genoa", SNP_EN), ("milan", HMKEE)],
)
def test_a_feature_that_cpuid_lacks_cannot_be_enabled(name: str, bits: int) -> None:
    # "genoa" is the dump of a machine whose firmware has SNP off.
    assert "reserved" in refused(core(name), SMEE | bits)


@pytest.mark.req("CM-54")
def test_bit_23_cannot_be_cleared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # [APM2] 3.2.1: once it is set it cannot be changed.
    msrs = core("rome")
    assert "bits 23 and 26 are fixed" in refused(msrs, 0)
    assert "bits 23 and 26 are fixed" in refused(core(), SMEE | HMKEE)
    monkeypatch.setattr(choices, "MEM_ENCRYPT_STICKY", False)
    msrs.write(SYSCFG, 0)
    assert msrs.read(SYSCFG) == 0


def test_multi_key_mode_excludes_bit_23_once_it_is_on() -> None:
    msrs = core(smee=False)
    msrs.write(SYSCFG, HMKEE)
    assert "bits 23 and 26 are fixed" in refused(msrs, HMKEE | SMEE)


@pytest.mark.req("CM-59")
def test_snp_is_enabled_with_vmpls_in_one_write_after_bit_19() -> None:
    msrs = core()
    msrs.write(SYSCFG, msrs.read(SYSCFG) | MFDM)
    msrs.write(SYSCFG, msrs.read(SYSCFG) | SNP_EN | VMPL_EN)
    assert msrs.read(SYSCFG) == SMEE | MFDM | SNP_EN | VMPL_EN


def test_snp_needs_bit_23_before_or_in_the_same_write() -> None:
    # [APM2] 3.2.1
    assert "needs bit 23" in refused(core(smee=False), SNP_EN)
    core(smee=False).write(SYSCFG, SMEE | SNP_EN)


@pytest.mark.req("CM-54", "CM-58")
@pytest.mark.parametrize("sticky", [True, False])
@pytest.mark.parametrize(
    ("value", "bit"),
    [
        (SMEE | VMPL_EN, "24"),
        (0, "24"),
        (SNP_EN | VMPL_EN, "23"),
        (SMEE | SNP_EN, "25"),
        (SMEE | SNP_EN | VMPL_EN | HMKEE, "26"),
    ],
)
def test_after_snp_nothing_of_it_can_be_taken_back(
    value: int, bit: str, sticky: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MEM_ENCRYPT_STICKY", sticky)
    msrs = core()
    msrs.write(SYSCFG, SMEE | SNP_EN | VMPL_EN)
    assert bit in refused(msrs, value).partition(": ")[2]
    msrs.write(SYSCFG, msrs.read(SYSCFG) | MFDM)
    assert msrs.get(Syscfg).snp_en == 1


@pytest.mark.req("CM-58")
def test_vmpls_cannot_be_added_after_snp_but_reset_starts_afresh() -> None:
    msrs = core()
    msrs.write(SYSCFG, SMEE | SNP_EN)
    assert "bit 25" in refused(msrs, SMEE | SNP_EN | VMPL_EN)
    msrs.reset()
    assert msrs.read(SYSCFG) == SMEE


@pytest.mark.req("CM-58")
def test_the_firmware_can_take_snp_away() -> None:
    msrs = core()
    msrs.write(SYSCFG, SMEE | SNP_EN)
    msrs.set(msrs.get(Syscfg).replace(snp_en=0))
    assert msrs.read(SYSCFG) == SMEE


@pytest.mark.req("CM-56", "BZ-7")
def test_a_guest_reads_0_and_its_writes_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    msrs = core("no-leaf")
    msrs.write(SYSCFG, SMEE)
    assert msrs.read(SYSCFG) == 0
    monkeypatch.setattr(choices, "GUEST_SYSCFG_WRITES_IGNORED", False)
    assert "reserved" in refused(msrs, SMEE)


@pytest.mark.req("CM-56", "BZ-7")
def test_a_guest_that_sees_the_leaf_still_reads_0() -> None:
    # A hypervisor may show the host's leaf 8000_001F.
    milan = load_model("milan")
    first = milan.table.leaf(1)
    shown = milan.table.replace({(1, 0): first._replace(ecx=first.ecx | 1 << 31)})
    guest = MsrFile(CpuModel("guest", "test", shown))
    assert guest.model.memory_encryption.usable
    assert guest.read(SYSCFG) == 0
    for value in (SMEE, SNP_EN):
        guest.write(SYSCFG, value)
        assert guest.read(SYSCFG) == 0


@pytest.mark.req("CM-35")
def test_the_rmps_bounds_are_fixed_once_snp_is_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    msrs = core()
    # RMP_END reads 0x1FFF after reset: [LKML] A. Kalra on snp_get_rmptable_info().
    assert (msrs.read(RmpBase.ADDRESS), msrs.read(RmpEnd.ADDRESS)) == (0, 0x1FFF)
    msrs.write(RmpBase.ADDRESS, 0x1000_0000)
    msrs.write(RmpEnd.ADDRESS, 0x1FFF_E000)
    assert msrs.read(RmpEnd.ADDRESS) == 0x1FFF_FFFF
    msrs.write(SYSCFG, SMEE | SNP_EN | VMPL_EN)
    for index in (RmpBase.ADDRESS, RmpEnd.ADDRESS):
        with pytest.raises(GeneralProtection, match="the table is in use"):
            msrs.write(index, 0x2000_0000)
    monkeypatch.setattr(choices, "RMP_LOCKED_BY_SNP", False)
    msrs.write(RmpBase.ADDRESS, 0x2000_0000)


def test_an_rmp_that_is_not_8_kib_aligned_or_beyond_the_width_faults() -> None:
    with pytest.raises(GeneralProtection, match="bits 0x1000 are reserved"):
        core().write(RmpBase.ADDRESS, 0x1000_1000)
    for index in (RmpBase.ADDRESS, RmpEnd.ADDRESS):  # Milan has 48 address bits
        with pytest.raises(
            GeneralProtection, match="bits 0x1000000000000 are reserved"
        ):
            core("milan").write(index, 1 << 48)
