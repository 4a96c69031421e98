"""Registers of microcode, machine checks, speculation and configuration."""

import pytest

from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import MSRS, MsrFile

SPEC_CTRL, PRED_CMD = 0x48, 0x49
PATCH_LEVEL, PATCH_LOADER = 0x8B, 0xC001_0020
MCG_CAP, MCG_STATUS, MCG_CTL = 0x179, 0x17A, 0x17B
NB_CFG, LS_CFG, DE_CFG = 0xC001_001F, 0xC001_1020, 0xC001_1029
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


def with_word(name: str, leaf: int, register: str, word: int) -> MsrFile:
    """Return the registers of a part with one CPUID register replaced."""
    table = load_model(name).table
    changed = table.leaf(leaf)._replace(**{register: word})
    return MsrFile(CpuModel("other", "test", table.replace({(leaf, 0): changed})))


# --- speculation


@pytest.mark.parametrize(
    ("told", "bit"), [(14, 0), (15, 1), (24, 2), (28, 7)], ids=lambda b: f"bit{b}"
)
def test_cpuid_lets_software_set_a_bit_of_spec_ctrl(told: int, bit: int) -> None:
    msrs = with_word("rome", 0x8000_0008, "ebx", 1 << told)
    msrs.write(SPEC_CTRL, 1 << bit)
    assert msrs.read(SPEC_CTRL) == 1 << bit
    for other in {*range(64)} - {bit}:
        assert "reserved" in refused(msrs, SPEC_CTRL, 1 << other)


def test_without_these_bits_there_is_no_spec_ctrl() -> None:
    with pytest.raises(GeneralProtection, match="IBRS, STIBP, SSBD, PSFD"):
        with_word("rome", 0x8000_0008, "ebx", 1 << 12).read(SPEC_CTRL)


def test_the_prediction_barrier_is_a_command_with_one_bit(rome: MsrFile) -> None:
    told: list[tuple[int, int]] = []
    rome.on_write(lambda index, value: told.append((index, value)))
    rome.write(PRED_CMD, 1)
    assert told == [(PRED_CMD, 1)]
    assert "reserved" in refused(rome, PRED_CMD, 1 << 7)  # SBPB: newer microcode
    with pytest.raises(GeneralProtection, match="write-only"):
        rome.read(PRED_CMD)


def test_without_ibpb_there_is_no_prediction_command() -> None:
    with pytest.raises(GeneralProtection, match="IBPB"):
        with_word("rome", 0x8000_0008, "ebx", 1 << 14).write(PRED_CMD, 1)


# --- microcode


@pytest.mark.parametrize(
    ("name", "level"),
    [
        # Real levels, last byte left out: 0x0800126e, 0x08301055, 0x0a0011d1,
        # 0x0a101148, 0x0a201205, 0x0b002147 in public boot logs and linux-firmware.
        ("naples", 0x0800_1200),
        ("rome", 0x0830_1000),
        ("milan", 0x0A00_1100),
        ("genoa", 0x0A10_1100),
        ("turin", 0x0B00_2100),
    ],
)
def test_vector_a_patch_level_names_family_model_and_stepping(
    name: str, level: int
) -> None:
    assert MsrFile(load_model(name)).read(PATCH_LEVEL) & ~0xFF == level


@pytest.mark.parametrize("name", model_names())
def test_a_patch_level_is_never_0_and_cannot_be_written(name: str) -> None:
    msrs = MsrFile(load_model(name))
    assert msrs.read(PATCH_LEVEL) & 0xFF
    assert "read-only" in refused(msrs, PATCH_LEVEL, 0)


def test_loading_microcode_changes_no_level(rome: MsrFile) -> None:
    before = rome.read(PATCH_LEVEL)
    rome.write(PATCH_LOADER, 0xFFFF_8880_0123_4000)
    assert rome.read(PATCH_LEVEL) == before
    with pytest.raises(GeneralProtection, match="write-only"):
        rome.read(PATCH_LOADER)


# --- machine checks


def test_there_are_no_machine_check_banks(rome: MsrFile) -> None:
    assert rome.read(MCG_CAP) == 0x100  # MCG_CTL, no banks
    assert "read-only" in refused(rome, MCG_CAP, 0x100)


def test_linux_can_set_all_of_mcg_ctl_and_clear_the_status(rome: MsrFile) -> None:
    rome.write(MCG_CTL, U64)
    rome.write(MCG_STATUS, 0)
    assert (rome.read(MCG_CTL), rome.read(MCG_STATUS)) == (U64, 0)
    assert "reserved" in refused(rome, MCG_STATUS, 1 << 3)


def test_machine_check_registers_go_with_their_cpuid_bit() -> None:
    edx = load_model("rome").table.leaf(1).edx
    msrs = with_word("rome", 1, "edx", edx & ~(1 << 14))
    for index in (MCG_CAP, MCG_STATUS, MCG_CTL):
        with pytest.raises(GeneralProtection, match="MCA"):
            msrs.read(index)


# --- configuration


@pytest.mark.parametrize("index", [NB_CFG, LS_CFG, DE_CFG])
def test_configuration_registers_keep_bits_that_have_no_name(
    rome: MsrFile, index: int
) -> None:
    rome.write(index, 0x8421_0000_1234_5678)
    assert rome.read(index) == 0x8421_0000_1234_5678


def test_lfence_serializes_as_firmware_hands_over(rome: MsrFile) -> None:
    assert rome.read(DE_CFG) == 1 << 1


@pytest.mark.parametrize("index", [NB_CFG, LS_CFG, DE_CFG])
def test_configuration_registers_are_those_of_zen(index: int) -> None:
    family_15h = with_word("rome", 1, "eax", 0x0060_0F12)
    with pytest.raises(GeneralProtection, match="family 17h"):
        family_15h.read(index)


@pytest.mark.parametrize("index", [0xC001_0000, 0xC001_0004, 0xC001_0200, 0xC001_020B])
def test_performance_counters_are_absent(rome: MsrFile, index: int) -> None:
    assert index not in MSRS
    with pytest.raises(GeneralProtection, match="not present"):
        rome.read(index)
