"""MTRRs: what firmware leaves in them, and what software may put there."""

import pytest

from cbit.hw.cpuid import CpuidLeaf, CpuModel
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import MSRS, MsrFile, Syscfg, choices

CAP, DEFAULT = 0xFE, 0x2FF
BASES, MASKS = range(0x200, 0x210, 2), range(0x201, 0x211, 2)
FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
ALL = (CAP, DEFAULT, *BASES, *MASKS, *FIXED)
VALID, MODIFY = 1 << 11, 1 << 19


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


# --- at hand-over


@pytest.mark.parametrize("name", model_names())
def test_vector_capabilities_and_default_type(name: str) -> None:
    # Linux prints these two as "MTRR default type: write-back", 8 variable ranges.
    msrs = MsrFile(load_model(name))
    assert (msrs.read(CAP), msrs.read(DEFAULT)) == (0x508, 0xC06)


def test_memory_below_640_kib_is_write_back_and_the_rest_of_a_megabyte_is_not(
    rome: MsrFile,
) -> None:
    types = b"".join(rome.read(index).to_bytes(8, "little") for index in FIXED)
    sizes = [64 << 10] * 8 + [16 << 10] * 16 + [4 << 10] * 64
    at = 0
    for kind, size in zip(types, sizes, strict=True):
        assert kind == (6 if at < 0xA_0000 else 0)
        at += size
    assert at == 1 << 20


@pytest.mark.parametrize("smee", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("name", model_names())
def test_one_variable_range_makes_the_pci_hole_uncached(
    name: str, reduced: bool, smee: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "MTRR_WIDTH_REDUCED", reduced)
    model = load_model(name)
    msrs = MsrFile(model, smee)
    base, mask = msrs.read(0x200), msrs.read(0x201)
    assert (base & 0xFF, mask & 0xFFF) == (0, VALID)
    pages = mask & ~0xFFF
    inside = [0xC000_0000, 0xE000_0000, 0xFEE0_0000, 0xFFFF_F000]
    outside = [0, 0xBFFF_F000, 1 << 32, 0x1_C000_0000, 1 << model.phys_bits - 8]
    assert all((pa ^ base) & pages == 0 for pa in inside)
    assert all((pa ^ base) & pages for pa in outside)
    assert all(msrs.read(index) == 0 for index in range(0x202, 0x210))


# --- presence and access


def test_without_the_cpuid_bit_there_are_no_mtrrs() -> None:
    table = load_model("rome").table
    first = table.leaf(1)
    without = CpuidLeaf(*first[:3], first.edx & ~(1 << 12))
    msrs = MsrFile(CpuModel("bare", "test", table.replace({(1, 0): without})))
    for index in ALL:
        with pytest.raises(GeneralProtection, match=r"EDX\[12\] \(MTRR\)"):
            msrs.read(index)


def test_the_capabilities_are_read_only(rome: MsrFile) -> None:
    assert "read-only" in refused(rome, CAP, 0x508)


# --- types


@pytest.mark.parametrize("kind", range(8))
@pytest.mark.parametrize("index", [DEFAULT, *BASES])
def test_a_reserved_type_faults(rome: MsrFile, index: int, kind: int) -> None:
    if kind in (2, 3, 7):
        assert f"type {kind:#x} is reserved" in refused(rome, index, kind)
    else:
        rome.write(index, kind)
        assert rome.read(index) == kind


@pytest.mark.parametrize("byte", range(8))
@pytest.mark.parametrize("index", FIXED)
def test_each_byte_of_a_fixed_range_register_is_checked(
    rome: MsrFile, index: int, byte: int
) -> None:
    for kind in range(8):
        value = kind << 8 * byte
        if kind in (2, 3, 7):
            assert f"type {kind:#x} is reserved" in refused(rome, index, value)
        else:
            rome.write(index, value)
            assert rome.read(index) == value
    assert "reserved" in refused(rome, index, 0x20 << 8 * byte)


@pytest.mark.parametrize("bit", [8, 9, 12, 63])
def test_undefined_bits_of_the_default_type_are_reserved(
    rome: MsrFile, bit: int
) -> None:
    assert "reserved" in refused(rome, DEFAULT, 1 << bit)


def test_mtrrs_can_be_switched_off_and_on(rome: MsrFile) -> None:
    rome.write(DEFAULT, 0)  # as Linux does while it changes ranges
    rome.write(DEFAULT, 0xC06)
    assert rome.read(DEFAULT) == 0xC06


# --- RdMem and WrMem


def test_dram_bits_of_fixed_ranges_are_hidden_unless_syscfg_shows_them(
    rome: MsrFile,
) -> None:
    syscfg = rome.read(Syscfg.ADDRESS)
    rome.write(0x250, 0x1E1E_1E1E_1E1E_1E1E)
    assert rome.read(0x250) == 0x0606_0606_0606_0606
    rome.write(Syscfg.ADDRESS, syscfg | MODIFY)
    assert rome.read(0x250) == 0x0606_0606_0606_0606
    rome.write(0x250, 0x1E1E_1E1E_1E1E_1E1E)
    assert rome.read(0x250) == 0x1E1E_1E1E_1E1E_1E1E
    rome.write(Syscfg.ADDRESS, syscfg)
    assert rome.read(0x250) == 0x0606_0606_0606_0606


def test_a_write_without_syscfg_bit_19_leaves_hidden_dram_bits_alone(
    rome: MsrFile,
) -> None:
    syscfg = rome.read(Syscfg.ADDRESS)
    rome.write(Syscfg.ADDRESS, syscfg | MODIFY)
    rome.write(0x26F, 0x18)
    rome.write(Syscfg.ADDRESS, syscfg)
    rome.write(0x26F, 0x05)
    assert rome.read(0x26F) == 0x05
    rome.write(Syscfg.ADDRESS, syscfg | MODIFY)
    assert rome.read(0x26F) == 0x1D


# --- variable ranges


def test_every_variable_range_holds_a_base_a_type_and_a_mask(rome: MsrFile) -> None:
    for number, (base, mask) in enumerate(zip(BASES, MASKS, strict=True)):
        rome.write(base, number << 30 | 1)
        rome.write(mask, 0xFFFF_C000_0800)
    for number, (base, mask) in enumerate(zip(BASES, MASKS, strict=True)):
        assert rome.read(base) == number << 30 | 1
        assert rome.read(mask) == 0xFFFF_C000_0800


@pytest.mark.parametrize(
    ("index", "bit"), [(0x202, 8), (0x202, 11), (0x203, 0), (0x203, 10)]
)
def test_undefined_low_bits_of_a_variable_range_are_reserved(
    rome: MsrFile, index: int, bit: int
) -> None:
    assert "reserved" in refused(rome, index, 1 << bit)


@pytest.mark.parametrize("index", [0x202, 0x203])
def test_a_variable_range_has_the_width_of_physical_addresses(
    rome: MsrFile, index: int
) -> None:
    rome.write(index, 1 << 47)
    assert "48 bits" in refused(rome, index, 1 << 48)
    genoa = MsrFile(load_model("genoa"))
    genoa.write(index, 1 << 51)
    assert "reserved" in refused(genoa, index, 1 << 52)


def test_the_width_of_variable_ranges_can_follow_sme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choices, "MTRR_WIDTH_REDUCED", True)
    with_sme = MsrFile(load_model("rome"), smee=True)
    without = MsrFile(load_model("rome"), smee=False)
    assert "43 bits" in refused(with_sme, 0x203, 1 << 43)
    without.write(0x203, 1 << 43)
    without.write(Syscfg.ADDRESS, Syscfg.mem_encrypt.mask)
    assert "43 bits" in refused(without, 0x203, 1 << 43)


def test_names_say_which_range_a_register_is() -> None:
    assert MSRS[0x259].FIELDS["at_b4000"].bits == "44:40"
    assert MSRS[0x26F].FIELDS["at_ff000"].bits == "60:56"
    assert (MSRS[0x20E].NAME, MSRS[0x20F].NAME) == ("MTRRphysBase7", "MTRRphysMask7")
