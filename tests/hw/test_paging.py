"""Formats and address rules: levels, widths, reserved bits, where the C-bit lies."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cbit.hw import Machine
from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import GeneralProtection, PageFault
from cbit.hw.memory.bus import NothingThere
from cbit.hw.models import load_model
from cbit.hw.paging import LONG_4_LEVEL, LONG_5_LEVEL, AddressRules

from .test_paging_witness import (
    CR4_LA57,
    LARGE_RW,
    NAMES,
    NX,
    PAGE,
    PAGE_RW,
    PS,
    RW,
    SYSCFG,
    SYSCFG_SMEE,
    D,
    G,
    P,
    Tables,
    long_mode,
)

RAM = 8 << 20
FRAME = 0x20_0000
VA = 0x7F12_3456_7000

GEOMETRY = {
    "naples": (48, 5, 47),
    "rome": (48, 5, 47),
    "milan": (48, 5, 51),
    "genoa": (52, 6, 51),
    "turin": (52, 6, 51),
    "raphael": (48, 2, 51),
}
"""M, R, C of InstLatx64's dumps: 8000_0008 EAX[7:0], 8000_001F EBX[11:6] and [5:0]."""


def machine_with(
    model: CpuModel | str = "rome", *, smee: bool = True, five: bool = False
) -> tuple[Machine, Tables]:
    """Return a machine in long mode and its tables, still empty."""
    machine = Machine(model, ram=RAM, smee=smee, seed=1)
    tables = Tables(machine, five_levels=five)
    long_mode(machine.cpu, tables.cr3, cr4=CR4_LA57 * five)
    return machine, tables


def reserved_fault(machine: Machine, va: int = VA) -> PageFault:
    with pytest.raises(PageFault) as caught:
        machine.cpu.load(va, 1)
    assert caught.value.error_code == 0x9, "P and RSVD of a supervisor's load"
    return caught.value


# --- levels


@pytest.mark.req("PT-1")
def test_vector_four_levels_take_nine_bits_each() -> None:
    # PML4 [47:39], PDPT [38:30], PD [29:21], PT [20:12]: asm/pgtable_64_types.h.
    levels = [(level.name, level.shift) for level in LONG_4_LEVEL.levels]
    assert levels == [("PML4", 39), ("PDPT", 30), ("PD", 21), ("PT", 12)]


@pytest.mark.req("PT-2")
def test_vector_five_levels_add_one_on_top() -> None:
    names = [(level.name, level.shift) for level in LONG_5_LEVEL.levels]
    assert names[0] == ("PML5", 48)
    assert LONG_5_LEVEL.levels[1:] == LONG_4_LEVEL.levels


@pytest.mark.req("PT-3")
def test_vector_what_an_entry_spans() -> None:
    # 256 TiB, 512 GiB, 1 GiB, 2 MiB, 4 KiB: asm/pgtable_64_types.h.
    spans = [level.page_size for level in LONG_5_LEVEL.levels]
    assert spans == [1 << 48, 1 << 39, 1 << 30, 1 << 21, 1 << 12]


@pytest.mark.req("PT-1", "PT-2", "PT-3")
@pytest.mark.parametrize("five", [False, True], ids=["4 levels", "5 levels"])
def test_an_entry_covers_its_span_and_no_byte_more(five: bool) -> None:
    machine, tables = machine_with("genoa", five=five)
    shifts = [48, 39, 30, 21, 12][not five :]
    va = sum((5 + n) << shift for n, shift in enumerate(shifts))
    tables.map(va, FRAME | PAGE_RW)
    assert machine.cpu.translate(va + 0xFFF).pa == FRAME
    for level, shift in enumerate(shifts):
        for step in (-1 << shift, 1 << shift):
            with pytest.raises(PageFault) as caught:
                machine.cpu.load(va + step, 1)
            assert caught.value.level == NAMES[len(shifts) - level]
            assert caught.value.error_code == 0


@pytest.mark.req("PT-1", "PT-2")
@pytest.mark.parametrize(
    ("five", "last_low", "first_high"),
    [
        (False, 0x0000_7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000),
        (True, 0x00FF_FFFF_FFFF_FFFF, 0xFF00_0000_0000_0000),
    ],
    ids=["4 levels", "5 levels"],
)
def test_canonical_ends_where_the_sign_bit_says(
    five: bool, last_low: int, first_high: int
) -> None:
    machine, _ = machine_with("genoa", five=five)
    for va in (0, last_low, first_high, (1 << 64) - 1):
        with pytest.raises(PageFault):
            machine.cpu.load(va, 1)
    for va in (last_low + 1, first_high - 1, 1 << 63, 1 << 64, -1):
        with pytest.raises(GeneralProtection) as caught:
            machine.cpu.load(va, 1)
        assert caught.value.error_code == 0


def test_an_access_that_leaves_the_canonical_half_faults_there() -> None:
    machine, tables = machine_with()
    tables.map(0x7FFF_FFFF_F000, FRAME | PAGE_RW)
    with pytest.raises(GeneralProtection, match="0x800000000000 is not canonical"):
        machine.cpu.load(0x7FFF_FFFF_FFFC, 8)


# --- width and C-bit


@pytest.mark.req("PT-10", "PT-11", "PT-13", "WP-17", "CM-20")
@pytest.mark.parametrize("name", GEOMETRY)
def test_vector_reserved_bits_begin_at_the_reduced_width(name: str) -> None:
    width, reduction, c_bit = GEOMETRY[name]
    machine, tables = machine_with(name)
    for bit in range(36, 52):
        tables.map(VA, FRAME | 1 << bit | PAGE_RW)
        if bit == c_bit:
            assert machine.cpu.translate(VA).pa == FRAME
        elif bit < width - reduction:
            assert machine.cpu.translate(VA).pa == FRAME | 1 << bit
        else:
            assert reserved_fault(machine).entry == FRAME | 1 << bit | PAGE_RW
        machine.cpu.invlpg(VA)


@pytest.mark.req("PT-10", "PT-15", "WP-34")
@pytest.mark.parametrize("name", GEOMETRY)
def test_vector_the_whole_width_is_there_while_syscfg_23_is_0(name: str) -> None:
    width, _, c_bit = GEOMETRY[name]
    machine, tables = machine_with(name, smee=False)
    for bit in range(36, 52):
        tables.map(VA, FRAME | 1 << bit | PAGE_RW)
        if bit < width:
            assert machine.cpu.translate(VA).pa == FRAME | 1 << bit
        else:
            reserved_fault(machine)
        machine.cpu.invlpg(VA)
    assert (c_bit < width) == (name not in ("milan", "raphael"))


@pytest.mark.req("PT-15")
def test_bit_47_is_an_address_and_bit_51_reserved_while_syscfg_23_is_0() -> None:
    rome, tables = machine_with("rome", smee=False)
    tables.map(VA, 1 << 47 | FRAME | PAGE_RW)
    with pytest.raises(NothingThere) as nobody:
        rome.cpu.load(VA, 1)
    assert nobody.value.pa == 1 << 47 | FRAME

    milan, tables = machine_with("milan", smee=False)
    tables.map(VA, 1 << 51 | FRAME | PAGE_RW)
    reserved_fault(milan)


@pytest.mark.req("PT-10", "WP-15", "WP-34")
def test_the_width_shrinks_with_the_msr_though_nobody_uses_the_c_bit() -> None:
    machine, tables = machine_with("rome", smee=False)
    tables.map(VA, FRAME | 1 << 43 | PAGE_RW)
    tables.map(VA + PAGE, FRAME | PAGE_RW)
    assert machine.cpu.translate(VA).pa == FRAME | 1 << 43
    machine.cpu.wrmsr(SYSCFG, machine.cpu.rdmsr(SYSCFG) | SYSCFG_SMEE)
    reserved_fault(machine)  # the old translation did not outlive the write
    assert machine.cpu.translate(VA + PAGE).pa == FRAME


@pytest.mark.req("WP-15")
def test_the_c_bit_counts_from_the_moment_syscfg_23_is_set() -> None:
    machine, tables = machine_with("rome", smee=False)
    tables.map(VA, FRAME | PAGE_RW)
    machine.cpu.store(VA, b"plain")
    machine.cpu.wbinvd()
    machine.cpu.wrmsr(SYSCFG, SYSCFG_SMEE)
    tables.write(VA, 12, FRAME | 1 << 47 | PAGE_RW)
    machine.cpu.invlpg(VA)
    assert machine.cpu.load(VA, 5) != b"plain"
    machine.cpu.store(VA, b"private")
    machine.cpu.wbinvd()
    assert machine.snoop(FRAME, 7) != b"private"


@pytest.mark.req("PT-12")
def test_the_c_bit_is_no_part_of_the_address() -> None:
    machine, tables = machine_with()
    tables.map(VA, FRAME | 1 << 47 | PAGE_RW)
    machine.cpu.store(VA, b"lands in the frame")
    machine.cpu.wbinvd()
    engine = machine.controller.engine(1)
    block = engine.decrypt(FRAME, machine.snoop(FRAME, 32))
    assert block[:18] == b"lands in the frame"


@pytest.mark.req("WP-12")
@pytest.mark.parametrize("position", [44, 45, 47, 49, 51])
def test_the_position_is_what_cpuid_says(position: int) -> None:
    rome = load_model("rome")
    leaf = rome.table.leaf(0x8000_001F)
    leaves = {(0x8000_001F, 0): leaf._replace(ebx=5 << 6 | position)}
    model = replace(rome, table=rome.table.replace(leaves))
    machine, tables = machine_with(model)
    for bit in range(43, 52):
        tables.map(VA, FRAME | 1 << bit | PAGE_RW)
        if bit == position:
            machine.cpu.store(VA, b"enciphered bytes")
            machine.cpu.wbinvd()
            assert machine.snoop(FRAME, 16) != b"enciphered bytes"
        else:
            reserved_fault(machine)
        machine.cpu.invlpg(VA)


def test_a_part_whose_c_bit_makes_no_sense_reserves_nothing_more() -> None:
    # InstLatx64, Rembrandt: the SME bit is 1 and EBX is 0. Bit 0 is no C-bit.
    machine, tables = machine_with("rembrandt")
    tables.map(VA, FRAME | 1 << 47 | PAGE_RW)
    assert machine.cpu.translate(VA).pa == FRAME | 1 << 47
    tables.map(VA + PAGE, FRAME | 1 << 48 | PAGE_RW)
    reserved_fault(machine, VA + PAGE)


# --- entries


@pytest.mark.req("PT-14")
@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("shift", [39, 30, 21, 12])
def test_a_reserved_bit_faults_at_every_level(name: str, shift: int) -> None:
    width, reduction, c_bit = GEOMETRY[name]
    machine, tables = machine_with(name)
    tables.map(VA, FRAME | PAGE_RW)
    good = tables.read(VA, shift)
    for bit in {width - reduction, 50, 51} - {c_bit}:
        tables.write(VA, shift, good | 1 << bit)
        fault = reserved_fault(machine)
        assert (fault.level, fault.entry) == (
            NAMES[(shift - 3) // 9],
            good | 1 << bit,
        )
    tables.write(VA, shift, good)
    machine.cpu.load(VA, 1)


@pytest.mark.req("PT-14")
@pytest.mark.parametrize("shift", [39, 30, 21, 12])
def test_reserved_bits_are_not_looked_at_while_p_is_0(shift: int) -> None:
    machine, tables = machine_with()
    tables.map(VA, FRAME | PAGE_RW)
    tables.write(VA, shift, tables.read(VA, shift) & ~P | 0xF_F800_0000_0000)
    with pytest.raises(PageFault) as caught:
        machine.cpu.load(VA, 1)
    assert caught.value.error_code == 0


@pytest.mark.req("PT-T1")
@pytest.mark.parametrize(
    ("shift", "reserved"), [(30, range(13, 30)), (21, range(13, 21))]
)
def test_a_large_page_has_zeros_between_pat_and_frame(
    shift: int, reserved: range
) -> None:
    machine, tables = machine_with()
    va = VA & -1 << shift
    for bit in range(12, 30):
        tables.map(va, 1 << bit | LARGE_RW, shift)
        if bit in reserved:
            reserved_fault(machine, va)
        elif bit == 12:
            assert machine.cpu.translate(va).pa == 0, "PAT, no address bit"
        else:
            assert machine.cpu.translate(va).pa == 1 << bit
        machine.cpu.invlpg(va)


@pytest.mark.req("PT-T1")
@pytest.mark.parametrize(("five", "shift"), [(False, 39), (True, 39), (True, 48)])
def test_no_page_is_larger_than_1_gib(five: bool, shift: int) -> None:
    machine, tables = machine_with("genoa", five=five)
    tables.map(VA, FRAME | PAGE_RW)
    tables.write(VA, shift, tables.read(VA, shift) | PS)
    assert reserved_fault(machine).level == NAMES[(shift - 3) // 9]


def test_a_part_without_1_gib_pages_reserves_their_bit() -> None:
    rome = load_model("rome")
    leaf = rome.table.leaf(0x8000_0001)
    leaves = {(0x8000_0001, 0): leaf._replace(edx=leaf.edx & ~(1 << 26))}
    model = replace(rome, table=rome.table.replace(leaves))
    machine, tables = machine_with(model)
    tables.map(0, LARGE_RW, 30)
    assert reserved_fault(machine, 0).level == "PDPT"
    tables.map(1 << 39, LARGE_RW, 21)
    machine.cpu.load(1 << 39, 1)


@pytest.mark.req("PT-T1")
def test_software_bits_and_cache_bits_translate_nothing() -> None:
    machine, tables = machine_with()
    free = 0b11 << 3 | PS | G | D | 0b111 << 9 | 0x7FF << 52
    tables.map(VA, FRAME | PAGE_RW | free)
    assert machine.cpu.translate(VA).pa == FRAME
    upper = free & ~PS
    for shift in (21, 30, 39):
        tables.write(VA, shift, tables.read(VA, shift) | upper)
    machine.cpu.invlpg(VA)
    assert machine.cpu.translate(VA).pa == FRAME


@pytest.mark.req("PT-T1")
@pytest.mark.parametrize("shift", [39, 30, 21, 12])
def test_nx_is_a_reserved_bit_while_nxe_is_0(shift: int) -> None:
    machine = Machine("rome", ram=RAM, seed=1)
    tables = Tables(machine)
    tables.map(VA, FRAME | PAGE_RW)
    tables.write(VA, shift, tables.read(VA, shift) | NX)
    long_mode(machine.cpu, tables.cr3, nxe=False)
    assert reserved_fault(machine).entry == tables.read(VA, shift)


# --- the masks that other readers of tables use


@pytest.mark.req("PT-12", "PT-13", "CM-20")
@pytest.mark.parametrize("name", GEOMETRY)
def test_vector_masks(name: str) -> None:
    width, reduction, c_bit = GEOMETRY[name]
    rules = AddressRules(width - reduction, 1 << c_bit)
    table = LONG_4_LEVEL.levels[-1]
    expected = {43: 0x7FF_FFFF_F000, 46: 0x3FFF_FFFF_F000}[width - reduction]
    assert rules.address_mask == expected
    assert rules.reserved_mask(table, leaf=True) == (
        0xF_FFFF_FFFF_F000 & ~expected & ~(1 << c_bit)
    )


def test_a_c_bit_inside_the_width_costs_one_address_bit() -> None:
    rules = AddressRules(48, 1 << 47)
    assert rules.address_mask == 0x7FFF_FFFF_F000
    assert rules.leaf_address_mask(LONG_4_LEVEL.levels[2]) == 0x7FFF_FFE0_0000
    assert rules.reserved_mask(LONG_4_LEVEL.levels[0], leaf=False) == (
        0xF_0000_0000_0080
    )


def test_an_entry_without_rw_is_readable() -> None:
    machine, tables = machine_with()
    tables.map(VA, FRAME | P)
    machine.cpu.load(VA, 1)
    with pytest.raises(PageFault) as caught:
        machine.cpu.store(VA, b"x")
    assert caught.value.error_code == 0x3
    tables.write(VA, 12, FRAME | P | RW)
    machine.cpu.store(VA, b"x")
