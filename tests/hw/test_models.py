"""The shipped processors and the loading of others."""

from importlib.resources import files
from pathlib import Path

import pytest

from cbit.hw.cpuid import ABSENT, LeafRange, dump_header
from cbit.hw.errors import CallerError, InputError
from cbit.hw.models import DEFAULT_MODEL, load_model, model_aliases, model_names

PARTS = {
    # name: alias, InstLatx64 dump, brand, leaf 8000_001F in the order of the dump
    "epyc-7551p": (
        "naples",
        "AuthenticAMD0800F12_K17_Zen_CPUID",
        "AMD EPYC 7551P 32-Core Processor",
        "0000000F-0000016F-0000000F-00000001",
    ),
    "epyc-7742": (
        "rome",
        "AuthenticAMD0830F10_K17_Rome_CPUID",
        "AMD EPYC 7742 64-Core Processor",
        "0001000F-0000016F-000001FD-00000001",
    ),
    "epyc-7763": (
        "milan",
        "AuthenticAMD0A00F11_K19_Milan_CPUID2",
        "AMD EPYC 7763 64-Core Processor",
        "0001FC3F-00004173-000001FD-00000001",
    ),
    "epyc-9654": (
        "genoa",
        "AuthenticAMD0A10F11_K19_Genoa_01_CPUID",
        "AMD EPYC 9654 96-Core Processor",
        "030FFFEB-000041B3-000003EE-00000001",
    ),
    "epyc-9124": (
        "genoa-9124",
        "AuthenticAMD0A10F11_K19_Genoa_02_CPUID",
        "AMD EPYC 9124 16-Core Processor",
        "030FFFFB-000041B3-000003EE-00000001",
    ),
    "epyc-9655": (
        "turin",
        "AuthenticAMD0B00F21_K20_Turin_01_CPUID",
        "AMD EPYC 9655 96-Core Processor",
        "CFFFFFFB-000041B3-000003EE-00000001",
    ),
    "ryzen-7950x": (
        "raphael",
        "AuthenticAMD0A60F12_K19_Raphael_04_CPUID",
        "AMD Ryzen 9 7950X 16-Core Processor",
        "00000001-000000B3-00000000-00000000",
    ),
    "ryzen-5950x": (
        "vermeer",
        "AuthenticAMD0A20F10_K19_Vermeer_CPUID1",
        "AMD Ryzen 9 5950X 16-Core Processor",
        "0001780F-00000173-000001FD-00000001",
    ),
    "ryzen-4800h": (
        "renoir",
        "AuthenticAMD0860F01_K17_Renoir_CPUID2",
        "AMD Ryzen 7 4800H with Radeon Graphics",
        "0001000F-0000012F-0000000E-00000001",
    ),
    "ryzen-6800hs": (
        "rembrandt",
        "AuthenticAMD0A40F41_K19_Rembrandt_01_CPUID",
        "AMD Ryzen 7 6800HS with Radeon Graphics",
        "0001780F-00000000-00000000-00000001",
    ),
    "ryzen-1800x": (
        "zen1",
        "AuthenticAMD0800F11_K17_Zen_CPUID4",
        "AMD Ryzen 7 1800X Eight-Core Processor",
        "00000007-0000016F-0000000F-00000000",
    ),
    "epyc-7401p-guest": (
        "no-leaf",
        "AuthenticAMD0800F12_K17_Zen_CPUID4",
        "AMD EPYC 7401P 24-Core Processor",
        "00000000-00000000-00000000-00000000",
    ),
}


@pytest.mark.req("CM-T3", "CM-7")
@pytest.mark.parametrize("name", PARTS)
def test_vector_a_model_answers_as_its_part(name: str) -> None:
    alias, dump, brand, leaf = PARTS[name]
    model = load_model(name)
    assert model.name == name
    assert model.alias == alias
    assert model.source == f"InstLatx64 {dump}, logical CPU 0"
    assert (model.vendor, model.brand) == ("AuthenticAMD", brand)
    registers = model.table.leaf(0x8000_001F)
    assert "-".join(f"{word:08X}" for word in registers) == leaf
    assert load_model(alias) == model


def test_every_model_is_listed_and_the_default_is_one() -> None:
    assert set(model_names()) == set(PARTS)
    assert model_aliases() == {alias: name for name, (alias, *_) in PARTS.items()}
    assert DEFAULT_MODEL == "epyc-7742"


def test_every_data_file_says_what_it_is_and_is_named_so() -> None:
    for file in files("cbit.hw.models").iterdir():
        if file.name.endswith(".txt"):
            header = dump_header(file.read_text())
            assert header["name"] == file.name.removesuffix(".txt")
            assert load_model(header["name"]).brand in header["part"]


@pytest.mark.req("CM-4")
@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("naples", 0x0080_0F12),
        ("rome", 0x0083_0F10),
        ("milan", 0x00A0_0F11),
        ("genoa", 0x00A1_0F11),
        ("turin", 0x00B0_0F21),
    ],
)
def test_vector_family_model_and_stepping(name: str, signature: int) -> None:
    assert load_model(name).table.leaf(1).eax == signature


@pytest.mark.req("CM-5")
@pytest.mark.parametrize(
    ("name", "highest"),
    [
        ("naples", 0x8000_001F),
        ("rome", 0x8000_0020),
        ("milan", 0x8000_0023),
        ("genoa", 0x8000_0028),
        ("turin", 0x8000_0028),
        ("no-leaf", 0x8000_001E),
    ],
)
def test_vector_highest_extended_leaf(name: str, highest: int) -> None:
    table = load_model(name).table
    assert table.max_leaf(LeafRange.EXTENDED) == highest
    assert table.leaf(0x8000_0000)[1:] == table.leaf(0)[1:]
    assert table.leaf(highest + 1) == ABSENT


@pytest.mark.req("CM-6")
@pytest.mark.parametrize(
    ("name", "phys", "linear"),
    [("rome", 48, 48), ("genoa", 52, 57), ("raphael", 48, 48)],
)
def test_vector_widths(name: str, phys: int, linear: int) -> None:
    model = load_model(name)
    assert (model.phys_bits, model.linear_bits) == (phys, linear)


@pytest.mark.req("CM-20", "BZ-5")
@pytest.mark.parametrize("name", ["milan", "vermeer", "raphael"])
def test_the_c_bit_can_lie_above_the_physical_width(name: str) -> None:
    encryption = load_model(name).memory_encryption
    assert (encryption.c_bit, encryption.phys_bits) == (51, 48)
    assert encryption.usable


@pytest.mark.req("CM-21", "BZ-6")
def test_rembrandt_claims_sme_without_a_c_bit_and_raphael_has_nothing_else() -> None:
    rembrandt = load_model("rembrandt").memory_encryption
    raphael = load_model("raphael").memory_encryption
    assert (rembrandt.sme, rembrandt.c_bit, rembrandt.usable) == (True, 0, False)
    assert (raphael.sme, raphael.sev, raphael.usable) == (True, False, True)


@pytest.mark.req("CM-3", "CM-12")
def test_the_guest_shows_its_hypervisor_and_no_leaf() -> None:
    guest = load_model("no-leaf")
    assert guest.hypervisor
    assert not guest.memory_encryption.present
    # "Microsoft Hv", as the dump labels it
    signature = guest.table.leaf(0x4000_0000)[1:]
    assert b"".join(w.to_bytes(4, "little") for w in signature) == b"Microsoft Hv"
    assert [n for n in PARTS if load_model(n).hypervisor] == ["epyc-7401p-guest"]


@pytest.mark.req("CM-8", "CM-9", "CM-10", "CM-11")
def test_vector_other_leaves_near_the_encryption_leaf() -> None:
    genoa, turin = load_model("genoa").table, load_model("turin").table
    # InstLatx64 Genoa_01: EAX[0] of 8000_0023; topology sub-leaves 0 and 1.
    assert genoa.leaf(0x8000_0023).eax & 1
    assert genoa.leaf(0x8000_0025) == ABSENT
    assert genoa.leaf(0x8000_0026, 0)[:3] == (0x1, 0x2, 0x100)
    assert genoa.leaf(0x8000_0026, 1)[:3] == (0x4, 0x10, 0x201)
    # InstLatx64 Turin_01
    assert turin.leaf(0x8000_0025)[:2] == (0xAA4, 0x410)
    # Two threads per core: 8000_001E EBX[15:8] is one less.
    assert load_model("rome").table.leaf(0x8000_001E).ebx >> 8 & 0xFF == 1


def test_vector_what_the_core_asks_a_model_for() -> None:
    rome, genoa = load_model("rome"), load_model("genoa-9124")
    for name in (
        "nx",
        "page_1gb",
        "smep",
        "smap",
        "pge",
        "fsgsbase",
        "umip",
        "svm",
        "sev_supported",
    ):
        assert getattr(rome, name) is True, name
    # Protection keys and PCIDs came with Zen 3, 5-level paging with Zen 4.
    for name in ("pku", "pcid", "la57"):
        assert (getattr(rome, name), getattr(genoa, name)) == (False, True), name


def test_a_name_may_be_written_in_capitals() -> None:
    assert load_model("EPYC-7742") == load_model("Rome")


def test_an_unknown_name_is_answered_with_the_list() -> None:
    with pytest.raises(CallerError) as refused:
        load_model("epyc-7743")
    assert "'epyc-7743'" in str(refused.value)
    for name, (alias, *_) in PARTS.items():
        assert f"{name} ({alias})" in str(refused.value)


def test_a_path_of_a_dump_makes_a_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text((files("cbit.hw.models") / "epyc-7763.txt").read_text())
    model = load_model(file)
    assert (model.name, model.source) == ("mine", str(file))
    assert model.memory_encryption == load_model("milan").memory_encryption


def test_a_path_that_is_no_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CallerError, match="a directory"):
        load_model(tmp_path)
    file = tmp_path / "empty"
    file.touch()
    with pytest.raises(InputError, match="empty: empty"):
        load_model(str(file))
