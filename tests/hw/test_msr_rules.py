"""What single registers refuse: PAT, EFER, HWCR, the SMM registers, TOP_MEM."""

import pytest

from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model
from cbit.hw.msr import (
    MSRS,
    Efer,
    Hwcr,
    Msr,
    MsrFile,
    Pat,
    SmmAddr,
    SmmBase,
    SmmMask,
    TopMem,
    TopMem2,
    VmHsavePa,
    choices,
)


@pytest.fixture
def rome() -> MsrFile:
    return MsrFile(load_model("rome"))


def refused(msrs: MsrFile, index: int, value: int, *, paging: bool = False) -> str:
    """Return the message of a WRMSR that must fault and must change nothing."""
    before = {kind: msrs.get(kind) for kind in MSRS.values()}
    with pytest.raises(GeneralProtection) as fault:
        msrs.write(index, value, paging=paging)
    assert {kind: msrs.get(kind) for kind in MSRS.values()} == before
    assert fault.value.error_code == 0
    return str(fault.value)


# --- PAT


@pytest.mark.req("CM-37")
def test_vector_pat_after_reset_and_in_linux(rome: MsrFile) -> None:
    assert rome.read(0x277) == 0x0007_0406_0007_0406
    rome.write(0x277, 0x0407_0506_0007_0106)
    assert rome.get(Pat).types() == (6, 1, 7, 0, 6, 5, 7, 4)


@pytest.mark.req("CM-38")
def test_vector_linux_layout_is_wb_wc_ucm_uc_wb_wp_ucm_wt() -> None:
    uc, wc, wt, wp, wb, uc_minus = 0, 1, 4, 5, 6, 7
    linux = Pat.of(
        pa0=wb, pa1=wc, pa2=uc_minus, pa3=uc, pa4=wb, pa5=wp, pa6=uc_minus, pa7=wt
    )
    assert linux.value == 0x0407_0506_0007_0106


@pytest.mark.req("CM-37")
@pytest.mark.parametrize("entry", range(8))
@pytest.mark.parametrize("kind", range(8))
def test_pat_types_2_and_3_fault_in_every_entry(
    rome: MsrFile, entry: int, kind: int
) -> None:
    if kind in (2, 3):
        assert f"pa{entry} has the reserved type {kind}" in refused(
            rome, 0x277, kind << 8 * entry
        )
    else:
        rome.write(0x277, kind << 8 * entry)
        assert rome.get(Pat).types()[entry] == kind


def test_the_upper_five_bits_of_a_pat_entry_are_reserved(rome: MsrFile) -> None:
    assert "bits 0x800 are reserved" in refused(rome, 0x277, 0x0800)


@pytest.mark.req("CM-39")
def test_one_pat_entry_can_be_changed_and_put_back(rome: MsrFile) -> None:
    before = rome.read(0x277)
    rome.write(0x277, Pat(before).replace(pa5=5).value)
    assert rome.get(Pat).types() == (6, 4, 7, 0, 6, 5, 7, 0)
    rome.write(0x277, before)
    assert rome.read(0x277) == before


# --- EFER


@pytest.mark.req("CM-36")
def test_efer_accepts_what_cpuid_announces_and_nothing_else(rome: MsrFile) -> None:
    announced = Efer.of(
        sce=1, lme=1, nxe=1, svme=1, lmsle=1, ffxsr=1, tce=1, mcommit=0, intwb=1
    )
    rome.write(Efer.ADDRESS, announced.value)
    assert rome.get(Efer) == announced
    for bit in (9, 16, 19, 20, 21, 22, 63):  # reserved, or not on Rome
        assert "reserved" in refused(rome, Efer.ADDRESS, 1 << bit)


@pytest.mark.parametrize(
    ("name", "field", "accepted"),
    [
        ("no-leaf", "svme", False),
        ("no-leaf", "nxe", True),
        ("genoa-9124", "auto_ibrs", True),
        ("milan", "auto_ibrs", False),
        ("rome", "lmsle", True),
        ("genoa-9124", "lmsle", False),
    ],
)
@pytest.mark.req("CM-36")
def test_an_enable_bit_needs_its_cpuid_bit(
    name: str, field: str, accepted: bool
) -> None:
    msrs = MsrFile(load_model(name))
    value = Efer.of(**{field: 1}).value
    if accepted:
        msrs.write(Efer.ADDRESS, value)
        assert msrs.read(Efer.ADDRESS) == value
    else:
        assert "reserved" in refused(msrs, Efer.ADDRESS, value)


@pytest.mark.req("CM-36")
def test_lme_is_fixed_while_paging_is_on(rome: MsrFile) -> None:
    rome.write(Efer.ADDRESS, Efer.of(lme=1).value)
    assert "LME" in refused(rome, Efer.ADDRESS, 0, paging=True)
    rome.write(Efer.ADDRESS, Efer.of(lme=1, nxe=1).value, paging=True)
    rome.write(Efer.ADDRESS, 0, paging=False)


@pytest.mark.req("CM-36")
def test_lma_belongs_to_the_processor(rome: MsrFile) -> None:
    # [APM2] 3.1.7: a value other than the hardware's gives #GP.
    assert "LMA" in refused(rome, Efer.ADDRESS, Efer.of(lme=1, lma=1).value)
    rome.set(Efer.of(lme=1, lma=1))
    rome.write(Efer.ADDRESS, Efer.of(lme=1, lma=1, sce=1).value, paging=True)
    assert "LMA" in refused(rome, Efer.ADDRESS, Efer.of(lme=1).value, paging=True)


def test_efer_bits_that_read_as_zero_are_dropped(
    rome: MsrFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome.write(Efer.ADDRESS, 0xFE | 1)
    assert rome.read(Efer.ADDRESS) == 1
    monkeypatch.setattr(choices, "EFER_LOW_BITS_IGNORED", False)
    assert "reserved" in refused(rome, Efer.ADDRESS, 0x80)


# --- HWCR and SMM


@pytest.mark.req("CM-31")
def test_firmware_locks_smm_and_only_reset_unlocks_it(rome: MsrFile) -> None:
    assert rome.get(Hwcr).smm_lock == 1
    rome.write(Hwcr.ADDRESS, 0)
    assert Hwcr(rome.read(Hwcr.ADDRESS)).smm_lock == 1


@pytest.mark.parametrize("kind", [SmmBase, SmmAddr, SmmMask])
def test_smm_registers_are_read_only_while_locked(
    kind: type[Msr], rome: MsrFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome.write(kind.ADDRESS, 0x6_0000)
    assert rome.read(kind.ADDRESS) == 0
    monkeypatch.setattr(choices, "SMM_LOCKED_WRITES_IGNORED", False)
    assert "locked" in refused(rome, kind.ADDRESS, 0x6_0000)
    rome.set(Hwcr.of(smm_lock=0))
    rome.write(kind.ADDRESS, 0x6_0000)
    assert rome.read(kind.ADDRESS) == 0x6_0000


def test_hwcr_keeps_bits_that_have_no_name_here(
    rome: MsrFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome.write(Hwcr.ADDRESS, 1 << 18 | 1)
    assert rome.read(Hwcr.ADDRESS) == 1 << 18 | 1
    monkeypatch.setattr(choices, "HWCR_UNDECLARED_BITS_KEPT", False)
    assert "reserved" in refused(rome, Hwcr.ADDRESS, 1 << 18 | 1)


# --- addresses of DRAM


@pytest.mark.req("CM-41")
@pytest.mark.parametrize("kind", [TopMem, TopMem2])
def test_top_of_memory_is_a_multiple_of_8_mib_below_the_width(
    rome: MsrFile, kind: type[Msr]
) -> None:
    rome.write(kind.ADDRESS, 0x8000_0000)
    assert rome.read(kind.ADDRESS) == 0x8000_0000
    assert "reserved" in refused(rome, kind.ADDRESS, 0x8000_0000 | 1 << 22)
    assert "reserved" in refused(rome, kind.ADDRESS, 1 << 48)  # Rome has 48 bits


def test_the_hosts_save_area_is_a_page_below_the_width(rome: MsrFile) -> None:
    rome.write(VmHsavePa.ADDRESS, 0x1234_5000)
    assert rome.read(VmHsavePa.ADDRESS) == 0x1234_5000
    assert "reserved" in refused(rome, VmHsavePa.ADDRESS, 0x1234_5800)
    assert "reserved" in refused(rome, VmHsavePa.ADDRESS, 1 << 48)
