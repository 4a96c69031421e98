"""Registers of system calls, segment bases, time and local APIC."""

import pytest

from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import MsrFile, choices

TSC, APIC_BASE = 0x10, 0x1B
SYSENTER = (0x174, 0x175, 0x176)
STAR, LSTAR, CSTAR, SFMASK = 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084
BASES = (0xC000_0100, 0xC000_0101, 0xC000_0102)
TSC_AUX = 0xC000_0103
U64 = (1 << 64) - 1


@pytest.fixture
def rome() -> MsrFile:
    return MsrFile(load_model("rome"))


def refused(msrs: MsrFile, index: int, value: int) -> str:
    """Return the message of a WRMSR that must fault and must change nothing."""
    before = msrs.state()
    with pytest.raises(GeneralProtection) as fault:
        msrs.write(index, value)
    assert msrs.state() == before
    return str(fault.value)


def without(name: str, leaf: int, register: str, *bits: int) -> MsrFile:
    """Return the registers of a part that lacks some bits of one CPUID register."""
    table = load_model(name).table
    word = getattr(table.leaf(leaf), register)
    for bit in bits:
        word &= ~(1 << bit)
    changed = table.leaf(leaf)._replace(**{register: word})
    return MsrFile(CpuModel("less", "test", table.replace({(leaf, 0): changed})))


# --- presence


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "indices"),
    [
        (1, "edx", 4, (TSC,)),
        (1, "edx", 9, (APIC_BASE,)),
        (1, "edx", 11, SYSENTER),
        (0x8000_0001, "edx", 11, (STAR, LSTAR, CSTAR, SFMASK)),
        (0x8000_0001, "edx", 29, BASES),
    ],
)
def test_a_register_goes_with_its_cpuid_bit(
    leaf: int, register: str, bit: int, indices: tuple[int, ...]
) -> None:
    msrs = without("rome", leaf, register, bit)
    for index in indices:
        MsrFile(load_model("rome")).read(index)
        with pytest.raises(GeneralProtection, match=rf"\[{bit}\]"):
            msrs.read(index)


def test_tsc_aux_is_there_for_rdtscp_or_rdpid() -> None:
    without("rome", 0x8000_0001, "edx", 27).read(TSC_AUX)  # Rome has RDPID too
    without("zen1", 7, "ecx", 22).read(TSC_AUX)
    with pytest.raises(GeneralProtection, match="RDTSCP"):
        without("zen1", 0x8000_0001, "edx", 27).read(TSC_AUX)


# --- addresses


@pytest.mark.parametrize("index", [LSTAR, CSTAR, *BASES])
@pytest.mark.parametrize(
    ("model", "bits"), [("rome", 48), ("milan", 48), ("genoa", 57), ("turin", 57)]
)
def test_a_linear_address_is_canonical_for_the_part(
    index: int, model: str, bits: int
) -> None:
    msrs = MsrFile(load_model(model))
    lowest_high = U64 ^ (1 << bits - 1) - 1
    for value in (0, 0x1234, (1 << bits - 1) - 1, lowest_high, U64):
        msrs.write(index, value)
        assert msrs.read(index) == value
    for value in (1 << bits - 1, lowest_high - 1, 1 << 63, U64 >> 1):
        assert "not canonical" in refused(msrs, index, value)


# --- system calls


def test_star_keeps_all_that_linux_puts_there(rome: MsrFile) -> None:
    value = 0x0023_0010_0000_0000  # __USER32_CS and __KERNEL_CS
    rome.write(STAR, value)
    assert rome.read(STAR) == value


def test_sfmask_has_32_bits(rome: MsrFile) -> None:
    rome.write(SFMASK, 0x0025_7FD5)
    assert rome.read(SFMASK) == 0x0025_7FD5
    assert "reserved" in refused(rome, SFMASK, 1 << 32)


@pytest.mark.parametrize("index", [0x175, 0x176, TSC_AUX])
def test_vector_amd_ignores_the_upper_half_of_registers_of_32_bits(
    rome: MsrFile, index: int
) -> None:
    # Linux writes 64-bit addresses to SYSENTER_ESP and _EIP on every part.
    rome.write(index, 0xFFFF_FE00_0000_3000 | 7 << 60)
    assert rome.read(index) == 0x0000_3000
    rome.write(index, 0xFFFF_FFFF)
    assert rome.read(index) == 0xFFFF_FFFF


def test_the_segment_of_sysenter_has_32_bits(rome: MsrFile) -> None:
    rome.write(0x174, 0x10)
    assert rome.read(0x174) == 0x10
    assert "reserved" in refused(rome, 0x174, 1 << 32)


# --- time


def test_the_time_stamp_counter_can_be_set(rome: MsrFile) -> None:
    rome.write(TSC, U64)
    assert rome.read(TSC) == U64


# --- local APIC


@pytest.mark.parametrize("name", model_names())
def test_vector_the_boot_cores_apic_is_on_at_its_usual_place(name: str) -> None:
    assert MsrFile(load_model(name)).read(APIC_BASE) == 0xFEE0_0900


def test_vector_other_cores_are_told_that_they_did_not_boot() -> None:
    msrs = MsrFile(load_model("rome"), boot_core=False)
    assert msrs.read(APIC_BASE) == 0xFEE0_0800
    assert "BSC is read-only" in refused(msrs, APIC_BASE, 0xFEE0_0900)
    msrs.write(APIC_BASE, 0xFEE0_0000)
    msrs.reset()
    assert msrs.read(APIC_BASE) == 0xFEE0_0800


def test_the_apic_can_be_switched_off(rome: MsrFile) -> None:
    rome.write(APIC_BASE, 0xFEE0_0100)
    assert rome.read(APIC_BASE) == 0xFEE0_0100


def test_the_boot_core_stays_the_boot_core(rome: MsrFile) -> None:
    assert "BSC is read-only" in refused(rome, APIC_BASE, 0xFEE0_0800)


@pytest.mark.parametrize("name", ["rome", "zen1"])
def test_there_is_no_x2apic_mode(name: str) -> None:
    msrs = MsrFile(load_model(name))
    assert "no x2APIC mode" in refused(msrs, APIC_BASE, 0xFEE0_0D00)


def test_the_apic_stays_where_the_devices_are(
    rome: MsrFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "stays where it is" in refused(rome, APIC_BASE, 0xFED0_0900)
    monkeypatch.setattr(choices, "APIC_STAYS", False)
    rome.write(APIC_BASE, 0xFED0_0900)
    assert rome.read(APIC_BASE) == 0xFED0_0900


@pytest.mark.parametrize("bit", [0, 7, 9, 48, 63])
def test_undefined_bits_and_wide_addresses_of_the_apic_base_are_reserved(
    rome: MsrFile, bit: int
) -> None:
    assert "reserved" in refused(rome, APIC_BASE, 0xFEE0_0900 | 1 << bit)
