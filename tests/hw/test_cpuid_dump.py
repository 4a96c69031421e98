"""Reading raw dumps of two tools, whole, cut and damaged."""

from pathlib import Path

import pytest

from cbit.hw.cpuid import CpuidLeaf, MemoryEncryption, parse_dump, read_dump_text
from cbit.hw.errors import InputError

ROWS = {
    (0, 0): CpuidLeaf(0x10, 0x6874_7541, 0x444D_4163, 0x6974_6E65),
    (1, 0): CpuidLeaf(0x0083_0F10, 0x0080_0800, 0x7EF8_320B, 0x178B_FBFF),
    (0x8000_0000, 0): CpuidLeaf(0x8000_0020, 0x6874_7541, 0x444D_4163, 0x6974_6E65),
    (0x8000_0008, 0): CpuidLeaf(0x3030, 0x018E_F757, 0x707F, 0x1_0000),
    (0x8000_001D, 0): CpuidLeaf(0x4121, 0x01C0_003F, 0x3F, 0),
    (0x8000_001D, 1): CpuidLeaf(0x4122, 0x01C0_003F, 0x3F, 0),
    (0x8000_001F, 0): CpuidLeaf(0x1_000F, 0x16F, 0x1FD, 1),
}
"""Leaves of an EPYC 7742: InstLatx64 AuthenticAMD0830F10_K17_Rome_CPUID."""

Rows = dict[tuple[int, int], CpuidLeaf]


def instlatx64(rows: Rows, labels: bool = True) -> str:
    """Print rows as InstLatx64's dumps do, sub-leaves labelled."""
    lines = []
    for (leaf, subleaf), registers in rows.items():
        label = f" [SL {subleaf:02X}]" if labels and leaf == 0x8000_001D else ""
        lines.append(
            f"CPUID {leaf:08X}: {'-'.join(f'{r:08X}' for r in registers)}{label}"
        )
    return "\n".join(lines) + "\n"


def cpuid_r(rows: Rows) -> str:
    """Print rows as `cpuid -r` does."""
    return "".join(
        f"   0x{leaf:08x} 0x{subleaf:02x}: "
        f"eax=0x{r.eax:08x} ebx=0x{r.ebx:08x} ecx=0x{r.ecx:08x} edx=0x{r.edx:08x}\n"
        for (leaf, subleaf), r in rows.items()
    )


def without(*keys: tuple[int, int]) -> Rows:
    return {key: row for key, row in ROWS.items() if key not in keys}


@pytest.mark.req("CM-1")
@pytest.mark.parametrize(
    "text",
    [
        instlatx64(ROWS),
        cpuid_r(ROWS),
        "CPU:\n" + cpuid_r(ROWS),
        "CPU 0:\n" + cpuid_r(ROWS),
        "# name: x\n# CPU 7 of 8\nCPU 0:\n" + cpuid_r(ROWS),
        "------[ CPUID Registers / Logical CPU #0 ]------\n\n" + instlatx64(ROWS),
        "CPU#000 AffMask: 0x01\n" + instlatx64(ROWS),
        instlatx64(ROWS).replace("\n", "\r\n"),
        instlatx64(ROWS).replace("\n", " \n"),
        instlatx64(ROWS).lower(),
        instlatx64(ROWS).replace("69746E65\n", "69746E65 [AuthenticAMD]\n"),
        instlatx64(ROWS).replace("[SL 00]", "[SL 00] [L1D: 32 KB] / L3: 16 MB]"),
        instlatx64(ROWS, labels=False),
        instlatx64(ROWS) + "\nMSR 0000001B: 0000-0000-FEE0-0900\n",
        cpuid_r(ROWS).rstrip("\n"),
    ],
)
def test_both_formats_and_their_habits_give_one_table(text: str) -> None:
    assert dict(parse_dump(text, "dump").raw) == ROWS


def test_vector_cpuid_r_of_an_aws_guest() -> None:
    # `cpuid -r` in an m6a guest, quoted in Firecracker's T2A template test.
    text = """\
CPU 0:
   0x00000000 0x00: eax=0x00000010 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x00000001 0x00: eax=0x000306f2 ebx=0x00020800 ecx=0xfffa3203 edx=0x178bfbff
   0x40000000 0x00: eax=0x40000001 ebx=0x4b4d564b ecx=0x564b4d56 edx=0x0000004d
   0x80000000 0x00: eax=0x8000001f ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65
   0x80000008 0x00: eax=0x00003030 ebx=0x030ed000 ecx=0x00007001 edx=0x00000000
   0x8000001f 0x00: eax=0x0101fd3f ebx=0x00004173 ecx=0x000001fd edx=0x000001fe
   0x80860000 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
   0xc0000000 0x00: eax=0x00000000 ebx=0x00000000 ecx=0x00000000 edx=0x00000000
"""
    found = MemoryEncryption.decode(parse_dump(text, "t2a"))
    assert (found.c_bit, found.phys_reduction, found.num_vmpl) == (51, 5, 4)
    assert (found.max_sev_guests, found.min_sev_no_es_asid) == (509, 510)


@pytest.mark.req("BZ-34")
@pytest.mark.parametrize(
    "heading",
    [
        "------[ CPUID Registers / Logical CPU #1 ]------\n",
        "------[ Logical CPU #1 ]------\n",
        "CPU#001 AffMask: 0x02\n",
        "CPU 1:\n",
        "",
    ],
)
def test_of_cpus_that_differ_the_first_one_counts(heading: str) -> None:
    # One Threadripper dump has another EDX of leaf 8000_001F on every CPU.
    second = {**ROWS, (0x8000_001F, 0): CpuidLeaf(0x1_000F, 0x16F, 0x1FD, 0x43B6_EB6C)}
    text = instlatx64(ROWS) + heading + instlatx64(second)
    assert parse_dump(text, "dump").leaf(0x8000_001F).edx == 1


def test_a_damaged_second_cpu_does_not_matter() -> None:
    text = f"CPU 0:\n{cpuid_r(ROWS)}CPU 1:\n   0x00000000 0x00: eax=0x0000"
    assert dict(parse_dump(text, "dump").raw) == ROWS


@pytest.mark.parametrize("text", [instlatx64(ROWS), cpuid_r(ROWS)])
def test_law_a_dump_cut_anywhere_in_its_first_cpu_is_refused(text: str) -> None:
    for length in range(len(text.rstrip())):
        with pytest.raises(InputError) as refused:
            parse_dump(text[:length], "cut.txt")
        assert str(refused.value).startswith("cut.txt: ")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damaged",
    [
        "CPUID 8000001F: 0001000F-0000016F-000001FD-0000000G",
        "CPUID 8000001F: 0001000F-0000016F-000001FD",
        "CPUID 8000001F: 0001000F-0000016F-000001FD-000000001",
        "CPUID 8000001F: 0001000F-0000016F-000001FD-00000001 [SL 0",
        "   0x8000001f 0x00: eax=0x0001000f ebx=0x0000016f ecx=0x000001fd edx=0x1",
        "0x8000001f",
        "CPUID 8000",
    ],
)
def test_a_damaged_line_is_named_by_its_number(damaged: str) -> None:
    text = instlatx64(without((0x8000_001F, 0))) + damaged + "\n"
    with pytest.raises(
        InputError, match=r"^d: line 7: cut or damaged, expected `CPUID"
    ):
        parse_dump(text, "d")


@pytest.mark.parametrize(
    "leaf", [0x0000_0000, 0x0000_0001, 0x8000_0000, 0x8000_0008, 0x8000_001F]
)
def test_a_needed_leaf_that_is_missing_is_named(leaf: int) -> None:
    with pytest.raises(InputError, match=f"^d: CPUID leaf {leaf:#010x} is missing"):
        parse_dump(instlatx64(without((leaf, 0))), "d")


def test_a_highest_leaf_that_is_announced_must_be_there() -> None:
    naples = ROWS[0x8000_0000, 0]._replace(eax=0x8000_001F)
    rows = {**without((0x8000_001F, 0)), (0x8000_0000, 0): naples}
    with pytest.raises(InputError, match="is the file cut short"):
        parse_dump(instlatx64(rows), "d")


def test_a_second_cpu_does_not_lend_its_leaves_to_the_first() -> None:
    second = {**ROWS, (5, 0): CpuidLeaf(1, 2, 3, 4)}
    assert not parse_dump(instlatx64(ROWS) + instlatx64(second), "d").has(5)


def test_unlabelled_repeats_of_a_leaf_are_its_sub_leaves() -> None:
    # Old InstLatx64 dumps: CPUID 00000004 three times, no [SL nn].
    rows = "".join(
        f"CPUID 00000004: 0000000{n}-00000000-00000000-00000000\n" for n in (1, 2, 3)
    )
    table = parse_dump(instlatx64(ROWS) + rows, "d")
    assert [table.leaf(4, n).eax for n in range(4)] == [1, 2, 3, 0]


def test_a_single_leaf_of_the_tool_is_not_enough() -> None:
    # What `cpuid -1 -r -l 0x8000001f` prints.
    row = cpuid_r({(0x8000_001F, 0): ROWS[0x8000_001F, 0]})
    with pytest.raises(InputError, match="expected a full dump of one CPU"):
        parse_dump("CPU:\n" + row, "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "d: empty, expected `CPUID"),
        (" \n\n", "d: empty"),
        ("hello\nworld\n", "d: no CPUID leaf found, expected"),
        ("\x7fELF\x02\0\0", "d: a binary file, expected"),
    ],
)
def test_what_is_no_dump_at_all_is_told_in_one_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_dump(text, "d")
    assert str(refused.value).startswith(message)


def test_a_file_is_read_with_a_byte_order_mark_or_foreign_letters(
    tmp_path: Path,
) -> None:
    file = tmp_path / "dump.txt"
    file.write_bytes(b"\xef\xbb\xbf" + instlatx64(ROWS).encode() + b"AMD\xae\n")
    assert dict(parse_dump(read_dump_text(file), "d").raw) == ROWS


def test_a_binary_file_and_an_endless_one_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "core"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="core: a binary file"):
        read_dump_text(file)
    file.write_bytes(b"x" * (17 << 20))
    with pytest.raises(InputError, match="longer than 0x1000000 bytes"):
        read_dump_text(file)
