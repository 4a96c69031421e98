"""The page walk by example: C-bits by level, rights, A and D, tables in odd places."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.faults import PageFault
from cbit.hw.memory import SLOT_HOST, MemoryBus, MemoryMap
from cbit.hw.memory.bus import NothingThere
from cbit.hw.memory.memory_map import ROM_START
from cbit.hw.paging import (
    LONG_4_LEVEL,
    Access,
    AddressRules,
    PageWalker,
    Protection,
)

from .test_paging_witness import (
    CR4_SMAP,
    CR4_SMEP,
    LARGE_RW,
    NX,
    PAGE,
    PAGE_RW,
    POINTER,
    RW,
    US,
    A,
    Cells,
    D,
    Found,
    P,
    Regime,
    Tables,
    Witness,
    long_mode,
)

RAM = 8 << 20
FRAME = 0x20_0000
VA = 0x7F12_3456_7000
ROME = Regime(width=43, c_bit=47)
C = 1 << 47
SHIFTS = (39, 30, 21, 12)
LEVELS = {39: "PML4", 30: "PDPT", 21: "PD", 12: "PT"}


def rome(seed: int = 1) -> Machine:
    return Machine("rome", ram=RAM, coherent=True, seed=seed)


def mapped(
    tags: dict[int, bool] | None = None, entry: int = FRAME | PAGE_RW, seed: int = 1
) -> tuple[Machine, Tables]:
    """Return a machine in long mode that maps `VA`."""
    machine = rome(seed)
    tables = Tables(machine, tags=tags)
    tables.map(VA, entry)
    long_mode(machine.cpu, tables.cr3)
    return machine, tables


# --- encryption, level by level


@pytest.mark.req("PT-20", "PT-21", "PT-23", "CM-70")
@pytest.mark.parametrize(
    "tagged",
    list(itertools.product([False, True], repeat=5)),
    ids=lambda t: str([*map(int, t)]),
)
def test_each_level_has_a_c_bit_of_its_own(tagged: tuple[bool, ...]) -> None:
    *tables_tagged, leaf_tagged = tagged
    tags = dict(zip(SHIFTS, tables_tagged, strict=True))
    machine, tables = mapped(tags, FRAME | PAGE_RW | C * leaf_tagged)
    machine.cpu.store(VA, b"through five C-bits")
    machine.cpu.wbinvd()
    assert machine.cpu.load(VA, 19) == b"through five C-bits"
    seen = machine.snoop(FRAME, 19)
    assert (seen == b"through five C-bits") != leaf_tagged
    for shift in SHIFTS:
        entry = tables.read(VA, shift).to_bytes(8, "little")
        machine.cpu.wbinvd()
        assert (machine.snoop(tables.slot(VA, shift), 8) == entry) != tags[shift]


@pytest.mark.req("PT-20", "PT-21", "PT-23", "CM-70")
@pytest.mark.parametrize("encrypted", [True, False], ids=["forgotten", "too many"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_table_through_the_wrong_c_bit_is_what_the_cipher_makes_of_it(
    shift: int, encrypted: bool
) -> None:
    faults = 0
    for seed in range(20):
        machine, tables = mapped(dict.fromkeys(SHIFTS, encrypted), seed=seed)
        cr3 = tables.cr3
        if shift == 39:
            cr3 ^= C
        else:
            upper = shift + 9
            tables.write(VA, upper, tables.read(VA, upper) ^ C)
        machine.caches.write_back_invalidate()
        where = tables.slot(VA, shift)
        garbage = machine.snoop(where & -16, 16)
        if not encrypted:
            garbage = machine.controller.engine(SLOT_HOST).decrypt(where & -16, garbage)
        entry = int.from_bytes(garbage[where % 16 :][:8], "little")
        expected = Witness(ROME, Cells(machine)).walk(cr3, VA)
        machine.cpu.write_cr3(cr3)
        if isinstance(expected, Found):
            found = machine.cpu.translate(VA)
            assert expected == Found(found.pa, bool(found.slot), found.shift)
            continue
        faults += 1
        with pytest.raises(PageFault) as caught:
            machine.cpu.load(VA, 1)
        fault = caught.value
        assert (fault.level, fault.entry) == (LEVELS[shift], entry)
        assert fault.error_code == expected.code == (0x9 if entry & P else 0)
    assert faults >= 19, "8 or 9 of 43 to 51 must be 0: one entry in 500 passes"


@pytest.mark.req("PT-22", "WP-13")
def test_the_leaf_decides_for_data_and_for_fetches() -> None:
    machine, tables = mapped(entry=FRAME | PAGE_RW)
    tables.map(VA + PAGE, FRAME | C | PAGE_RW)
    cpu = machine.cpu
    cpu.store(VA, b"\x0f\x01\xd9 plain code")
    seen = cpu.load(VA + PAGE, 14)
    assert seen != b"\x0f\x01\xd9 plain code"
    assert cpu.fetch(VA + PAGE, 14) == seen
    assert cpu.fetch(VA, 14) == b"\x0f\x01\xd9 plain code"
    cpu.store(VA + PAGE, b"\x0f\x01\xd9 secret one")
    assert cpu.fetch(VA + PAGE, 14) == b"\x0f\x01\xd9 secret one"
    assert cpu.fetch(VA, 14) == cpu.load(VA, 14) != b"\x0f\x01\xd9 secret one"


@pytest.mark.req("WP-13")
def test_the_frame_keeps_no_memory_of_a_c_bit() -> None:
    machine, tables = mapped(entry=FRAME | C | PAGE_RW)
    tables.map(VA + PAGE, FRAME | PAGE_RW)
    cpu = machine.cpu
    cpu.store(VA, b"written privately")
    seen = cpu.load(VA + PAGE, 4096)
    cpu.store(VA + PAGE, seen)  # the ciphertext itself, byte for byte
    assert cpu.load(VA, 17) == b"written privately"


@pytest.mark.req("PT-24")
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_accessed_and_dirty_are_stored_with_the_tables_own_encryption(
    encrypted: bool,
) -> None:
    machine, tables = mapped(dict.fromkeys(SHIFTS, encrypted))
    machine.caches.write_back_invalidate()
    before = {shift: tables.read(VA, shift) for shift in SHIFTS}
    machine.caches.write_back_invalidate()
    cells = Cells(machine)
    machine.cpu.store(VA, b"x")
    machine.caches.write_back_invalidate()
    for shift in SHIFTS:
        slot = tables.slot(VA, shift)
        bits = A | D if shift == 12 else A
        cells.store(slot, (before[shift] | bits).to_bytes(8, "little"), encrypted)
        page = slot & -PAGE
        assert machine.snoop(page, PAGE) == cells.cells[page : page + PAGE]


# --- rights


@dataclass(frozen=True)
class Rule:
    """One row of the manual: a page, an access, the mode; the error code or None."""

    page: int
    access: str
    code: int | None
    user: bool = False
    wp: bool = True
    cr4: int = 0
    ac: bool = False


RULES = [
    Rule(P, "load", None),
    Rule(P, "store", 0x03),
    Rule(P, "store", None, wp=False),
    Rule(P | RW, "store", None),
    Rule(P | RW, "load", 0x05, user=True),
    Rule(P | RW, "store", 0x07, user=True),
    Rule(P | RW, "fetch", 0x15, user=True),
    Rule(P | US, "load", None, user=True),
    Rule(P | US, "store", 0x07, user=True),
    Rule(P | US, "store", 0x07, user=True, wp=False),
    Rule(P | US | RW, "store", None, user=True),
    Rule(P, "fetch", None),
    Rule(P | NX, "fetch", 0x11),
    Rule(P | US | NX, "fetch", 0x15, user=True),
    Rule(P | NX, "load", None),
    Rule(P | US, "fetch", None),
    Rule(P | US, "fetch", 0x11, cr4=CR4_SMEP),
    Rule(P | US, "fetch", None, user=True, cr4=CR4_SMEP),
    Rule(P | US, "load", None, cr4=CR4_SMEP),
    Rule(P | US, "load", 0x01, cr4=CR4_SMAP),
    Rule(P | US | RW, "store", 0x03, cr4=CR4_SMAP),
    Rule(P | US | RW, "store", 0x03, cr4=CR4_SMAP, wp=False),
    Rule(P | US, "load", None, cr4=CR4_SMAP, ac=True),
    Rule(P | US, "store", 0x03, cr4=CR4_SMAP, ac=True),
    Rule(P | US, "load", None, cr4=CR4_SMAP, user=True),
    Rule(P | US, "fetch", None, cr4=CR4_SMAP),
    Rule(P | RW, "store", None, cr4=CR4_SMAP | CR4_SMEP),
]


def do(cpu: Cpu, access: str) -> None:
    if access == "store":
        cpu.store(VA, b"x")
    elif access == "fetch":
        cpu.fetch(VA, 1)
    else:
        cpu.load(VA, 1)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_vector_rights(rule: Rule) -> None:
    # [APM2] 5.6 (protection) and 8.2.15 (error code).
    machine = rome()
    tables = Tables(machine)
    tables.map(VA, FRAME | rule.page)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3, cr4=rule.cr4, wp=rule.wp)
    cpu.alignment_check = rule.ac
    cpu.cpl = 3 if rule.user else 0
    if rule.code is None:
        do(cpu, rule.access)
        return
    with pytest.raises(PageFault) as caught:
        do(cpu, rule.access)
    assert caught.value.error_code == rule.code
    assert caught.value.level == "PT"
    assert tables.read(VA) & (A | D) == 0, "a refused access leaves no mark"


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(
    ("bit", "access", "code"),
    [(RW, "store", 0x03), (US, "load", 0x05), (NX, "fetch", 0x11)],
)
def test_a_right_is_gone_if_one_level_withholds_it(
    shift: int, bit: int, access: str, code: int
) -> None:
    machine, tables = mapped()
    cpu = machine.cpu
    tables.write(VA, shift, tables.read(VA, shift) ^ bit)
    cpu.cpl = 3 if bit == US else 0
    with pytest.raises(PageFault) as caught:
        do(cpu, access)
    assert caught.value.error_code == code
    assert caught.value.level == "PT", "rights are judged at the leaf"


@pytest.mark.parametrize(
    ("nxe", "smep", "code"), [(0, 0, 0x0), (1, 0, 0x10), (0, 1, 0x10), (1, 1, 0x10)]
)
def test_a_fetch_is_told_apart_only_with_nxe_or_smep(
    nxe: int, smep: int, code: int
) -> None:
    machine = rome()
    tables = Tables(machine)
    long_mode(machine.cpu, tables.cr3, cr4=CR4_SMEP * smep, nxe=bool(nxe))
    with pytest.raises(PageFault) as caught:
        machine.cpu.fetch(VA, 1)
    assert caught.value.error_code == code


# --- accessed and dirty


@pytest.mark.parametrize("shift", [12, 21, 30])
def test_a_load_sets_accessed_and_a_store_dirties_the_leaf_alone(shift: int) -> None:
    machine = rome()
    tables = Tables(machine)
    va = VA & -1 << shift
    tables.map(va, PAGE_RW if shift == 12 else LARGE_RW, shift)
    long_mode(machine.cpu, tables.cr3)
    levels = [s for s in SHIFTS if s >= shift]
    machine.cpu.load(va, 1)
    assert [tables.read(va, s) & (A | D) for s in levels] == [A] * len(levels)
    machine.cpu.store(va, b"x")
    upper = [A] * (len(levels) - 1)
    assert [tables.read(va, s) & (A | D) for s in levels] == [*upper, A | D]


def test_a_walk_that_ends_in_a_fault_marks_the_tables_it_used_and_no_leaf() -> None:
    machine, tables = mapped(entry=FRAME | P)
    with pytest.raises(PageFault):
        machine.cpu.store(VA, b"x")
    assert tables.read(VA) == FRAME | P
    assert [tables.read(VA, s) & A for s in (39, 30, 21)] == [A, A, A]


def test_a_reserved_bit_above_stops_the_walk_before_it_marks_anything() -> None:
    machine, tables = mapped()
    tables.write(VA, 30, tables.read(VA, 30) | 1 << 45)
    with pytest.raises(PageFault):
        machine.cpu.load(VA, 1)
    assert [tables.read(VA, s) & A for s in SHIFTS] == [A, 0, 0, 0]


# --- CR3


@pytest.mark.req("CM-71")
def test_low_bits_of_cr3_are_no_address() -> None:
    machine, tables = mapped()
    machine.cpu.write_cr3(tables.cr3 | 0xFFF)
    assert machine.cpu.translate(VA).pa == FRAME
    assert machine.cpu.read_cr3() == tables.cr3 | 0xFFF


def test_one_walker_serves_several_roots() -> None:
    machine, tables = mapped()
    others = Tables(machine, 0x18_0000)
    others.map(VA, FRAME + PAGE | PAGE_RW)
    walker = PageWalker(machine.bus, LONG_4_LEVEL, AddressRules(43, C), Protection())
    for _ in range(4):
        assert walker.walk(tables.cr3, VA, int(Access.READ)).pa == FRAME
        assert walker.walk(tables.cr3, VA, int(Access.WRITE)).pa == FRAME
        assert walker.walk(others.cr3, VA, int(Access.READ)).pa == FRAME + PAGE


# --- tables in odd places


@pytest.mark.parametrize("shift", SHIFTS)
def test_a_table_where_nothing_is_names_the_entry_that_was_looked_for(
    shift: int,
) -> None:
    machine, tables = mapped()
    nowhere = 0x1_2345_6000
    if shift == 39:
        machine.cpu.write_cr3(nowhere)
    else:
        tables.write(VA, shift + 9, nowhere | POINTER)
    pa = nowhere + 8 * (VA >> shift & 511)
    with pytest.raises(NothingThere, match=f"physical address {pa:#x}") as nobody:
        machine.cpu.load(VA, 1)
    assert nobody.value.pa == pa


@pytest.mark.parametrize("place", [0xA_0000, 0xF_F000, 0xFEE0_0000])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_table_in_a_hole_or_an_erased_rom_reads_as_ones_and_faults(
    shift: int, place: int
) -> None:
    machine, tables = mapped()
    if shift == 39:
        machine.cpu.write_cr3(place)
    else:
        tables.write(VA, shift + 9, place | POINTER)
    with pytest.raises(PageFault) as caught:
        machine.cpu.load(VA, 1)
    fault = caught.value
    assert (fault.error_code, fault.entry) == (0x9, (1 << 64) - 1)
    assert fault.level == LEVELS[shift]


@dataclass
class Window:
    """A device that remembers what was stored."""

    cells: bytearray = field(default_factory=lambda: bytearray(PAGE))
    stores: list[int] = field(default_factory=list)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self.cells[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.stores.append(offset)
        self.cells[offset : offset + len(data)] = data


def test_a_table_in_a_device_is_read_anew_and_marked_at_every_walk() -> None:
    machine, tables = mapped()
    region = machine.map.find(0xC000_0000)
    assert region is not None
    window = Window()
    machine.map.regions[-1] = replace(region, device=window)
    offset = 8 * (VA >> 12 & 511)
    tables.write(VA, 21, 0xC000_0000 | POINTER)
    for frame in (0x30_0000, 0x40_0000):
        window.cells[offset : offset + 8] = (frame | PAGE_RW).to_bytes(8, "little")
        machine.cpu.invlpg(VA)
        assert machine.cpu.translate(VA).pa == frame
        assert window.cells[offset] & A
    assert window.stores == [offset, offset]


def test_a_device_read_as_a_table_through_c_counts_as_an_error_of_the_mapping() -> None:
    machine, tables = mapped()
    tables.write(VA, 21, 0xFEE0_0000 | C | POINTER)
    with pytest.raises(PageFault):
        machine.cpu.load(VA, 1)
    assert machine.bus.mmio_encrypted == 1


def test_a_table_in_rom_translates_and_keeps_no_marks() -> None:
    machine = rome()
    rom = bytearray(0x1_0000)
    for page in range(4):  # four tables, one entry each, at index 0
        below = ROM_START + (page + 1) * PAGE if page < 3 else FRAME
        rom[page * PAGE : page * PAGE + 8] = (below | PAGE_RW).to_bytes(8, "little")
    bus = MemoryBus(
        MemoryMap.pc(RAM, bytes(rom)),
        machine.caches,
        machine.controller,
        machine.trace,
    )
    walker = PageWalker(bus, LONG_4_LEVEL, AddressRules(43, C), Protection())
    for _ in range(2):
        found = walker.walk(ROM_START, 0x123, int(Access.WRITE))
        assert (found.pa, found.entry) == (FRAME, FRAME | PAGE_RW | A | D)
    assert bus.load(ROM_START, 0x1_0000, 0) == bytes(rom)


def test_a_table_may_map_itself() -> None:
    # The recursive slot of many kernels: entry 510 of the PML4 names the PML4.
    machine, tables = mapped(dict.fromkeys(SHIFTS, True))
    cpu = machine.cpu
    recursive = 0xFFFF_FF7F_BFDF_E000  # 510 four times
    tables.write(recursive, 39, tables.root | C | POINTER)
    index = VA >> 39 & 511
    assert cpu.load64(recursive + 8 * index) == tables.read(VA, 39)
    cpu.store64(recursive + 8 * index, 0)
    with pytest.raises(PageFault) as caught:
        cpu.load(VA, 1)
    assert caught.value.level == "PML4"


# --- what the fault says


@pytest.mark.req("PT-14")
def test_the_message_names_address_level_entry_and_cause() -> None:
    machine, _ = mapped(entry=FRAME | 1 << 44 | PAGE_RW)
    with pytest.raises(PageFault) as caught:
        machine.cpu.load(VA + 0x123, 1)
    assert str(caught.value) == (
        "#PF(0x9): address 0x7f1234567123: reserved bit set in PT[359] = "
        "0x0000100000200007"
    )
    assert (machine.cpu.cr2, caught.value.index) == (VA + 0x123, 359)
