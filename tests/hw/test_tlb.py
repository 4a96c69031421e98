"""The TLB is real: a changed entry translates the old way until it is flushed."""

from __future__ import annotations

import pytest

from cbit.hw import Machine
from cbit.hw.faults import PageFault
from cbit.hw.paging import Tlb, Translation
from cbit.hw.paging.tlb import CAPACITY

from .test_paging_witness import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    LARGE_RW,
    NX,
    PAGE,
    PAGE_RW,
    PS,
    RW,
    SYSCFG,
    SYSCFG_SMEE,
    US,
    A,
    D,
    G,
    P,
    Tables,
    long_mode,
)

RAM = 16 << 20
OLD, NEW = 0x20_0000, 0x40_0000
VA = 0x7F00_0000_0000
C = 1 << 47


class Bench:
    """A machine whose frames `OLD` and `NEW` tell which one was read."""

    def __init__(self, *, cr4: int = 0, cores: int = 1, smee: bool = True) -> None:
        self.machine = Machine(
            "rome", ram=RAM, coherent=True, cores=cores, smee=smee, seed=1
        )
        self.tables = Tables(self.machine)
        for pa in range(0, 4 << 20, PAGE):
            self.machine.bus.store(OLD + pa, b"old" if pa < NEW - OLD else b"new", 0)
        self.cpu = self.machine.cpu
        self.cr4 = CR4_PAE | cr4
        for cpu in self.machine.cpus:
            long_mode(cpu, self.tables.cr3, cr4=cr4)

    def read(self, va: int = VA) -> str:
        return self.cpu.load(va, 3).decode()


def remapped(
    shift: int = 12, flags: int = 0, *, cr4: int = 0, smee: bool = True
) -> Bench:
    """Return a bench that has read `VA` as old; its entry says new now."""
    bench = Bench(cr4=cr4, smee=smee)
    flags |= PAGE_RW | PS * (shift != 12)
    bench.tables.map(VA, OLD | flags, shift)
    assert bench.read() == "old"
    bench.tables.write(VA, shift, NEW | flags)
    return bench


# --- stale until flushed


@pytest.mark.parametrize("shift", [12, 21])
def test_a_changed_entry_translates_the_old_way_until_invlpg(shift: int) -> None:
    bench = remapped(shift)
    for _ in range(3):
        assert bench.read() == "old"
    bench.cpu.invlpg(VA)
    assert bench.read() == "new"


def test_a_removed_entry_still_translates_until_invlpg() -> None:
    bench = remapped()
    bench.tables.write(VA, 12, 0)
    assert bench.read() == "old"
    bench.cpu.invlpg(VA)
    with pytest.raises(PageFault):
        bench.read()


@pytest.mark.parametrize("shift", [39, 30, 21])
def test_a_removed_table_is_not_missed_until_invlpg(shift: int) -> None:
    bench = remapped()
    bench.tables.write(VA, shift, 0)
    assert bench.read() == "old"
    bench.cpu.invlpg(VA)
    with pytest.raises(PageFault):
        bench.read()


def walked_often(bench: Bench, tables: Tables, frame: int) -> None:
    """Map four pages frame after frame and walk to each of them twice."""
    for page in range(0, 4 * PAGE, PAGE):
        tables.map(VA + page, frame + page | PAGE_RW)
    bench.cpu.write_cr3(tables.cr3)
    for page in [*range(0, 4 * PAGE, PAGE)] * 2:
        assert bench.cpu.translate(VA + page).pa == frame + page
        bench.cpu.invlpg(VA + page)


@pytest.mark.parametrize("shift", [39, 30, 21])
def test_a_walk_reads_every_level_however_often_it_went_there(shift: int) -> None:
    bench = Bench()
    others = Tables(bench.machine, 0x18_0000)
    walked_often(bench, others, NEW)
    walked_often(bench, bench.tables, OLD)
    bench.tables.write(VA, shift, others.read(VA, shift))
    assert bench.cpu.translate(VA + PAGE).pa == NEW + PAGE
    bench.tables.write(VA, shift, 0)
    with pytest.raises(PageFault):
        bench.cpu.translate(VA + 2 * PAGE)


def test_address_spaces_take_turns() -> None:
    bench = Bench()
    others = Tables(bench.machine, 0x18_0000)
    walked_often(bench, others, NEW)
    walked_often(bench, bench.tables, OLD)
    for _ in range(3):
        for tables, frame in ((others, NEW), (bench.tables, OLD)):
            bench.cpu.write_cr3(tables.cr3)
            assert bench.cpu.translate(VA + PAGE).pa == frame + PAGE


def test_a_missing_entry_is_never_kept() -> None:
    bench = Bench()
    bench.tables.map(VA, 0)
    with pytest.raises(PageFault):
        bench.read()
    bench.tables.write(VA, 12, OLD | PAGE_RW)
    assert bench.read() == "old"


@pytest.mark.req("PT-22")
def test_a_changed_c_bit_counts_after_the_flush() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | PAGE_RW)
    assert bench.read() == "old"
    bench.tables.write(VA, 12, OLD | C | PAGE_RW)
    assert bench.read() == "old"
    bench.cpu.invlpg(VA)
    assert bench.cpu.load(VA, 3) != b"old"


def test_only_the_page_named_is_dropped() -> None:
    bench = Bench()
    for page in range(3):
        bench.tables.map(VA + page * PAGE, OLD | PAGE_RW)
        bench.read(VA + page * PAGE)
        bench.tables.write(VA + page * PAGE, 12, NEW | PAGE_RW)
    bench.cpu.invlpg(VA + PAGE + 0x7FF)
    assert [bench.read(VA + n * PAGE) for n in range(3)] == ["old", "new", "old"]


@pytest.mark.parametrize("shift", [21, 30])
def test_invlpg_of_any_byte_drops_a_large_page_whole(shift: int) -> None:
    bench = Bench()
    size = 1 << shift
    pieces = [VA + n * (size // 8) for n in range(8)]
    bench.tables.map(VA, LARGE_RW, shift)
    bench.tables.map(VA + size, LARGE_RW, shift)
    for va in [*pieces, VA + size]:
        bench.cpu.translate(va)
        assert bench.cpu.translate(va).shift == shift
    bench.tables.write(VA, shift, 0)
    bench.tables.write(VA + size, shift, 0)
    bench.cpu.invlpg(VA + size - 1)
    for va in pieces:
        with pytest.raises(PageFault):
            bench.cpu.translate(va)
    bench.cpu.translate(VA + size)  # the neighbour was not named


def test_a_large_page_that_was_split_needs_one_invlpg() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | LARGE_RW, 21)
    for page in (0, 5, 511):
        assert bench.read(VA + page * PAGE) == "old"
    bench.tables.map(VA, NEW | PAGE_RW)  # the page table, not linked yet
    bench.tables.map(VA + 5 * PAGE, NEW | PAGE_RW)
    table = bench.tables.page_of(VA, 12)
    bench.tables.write(VA, 21, table | PAGE_RW)
    assert bench.read(VA + 5 * PAGE) == "old"
    bench.cpu.invlpg(VA + 5 * PAGE)
    assert bench.read(VA + 5 * PAGE) == bench.read(VA) == "new"
    with pytest.raises(PageFault):
        bench.read(VA + 511 * PAGE)


def test_small_pages_that_became_a_large_one_are_dropped_one_by_one() -> None:
    bench = Bench()
    for page in (0, 1):
        bench.tables.map(VA + page * PAGE, OLD + page * PAGE | PAGE_RW)
        assert bench.read(VA + page * PAGE) == "old"
    bench.tables.write(VA, 21, NEW | LARGE_RW)
    assert bench.read(VA + 2 * PAGE) == "new"
    bench.cpu.invlpg(VA)
    assert bench.read(VA) == "new"
    bench.cpu.invlpg(VA + PAGE)
    assert bench.read(VA + PAGE) == "new"


def test_invlpg_of_an_address_that_cannot_be_does_nothing() -> None:
    bench = remapped()
    bench.cpu.invlpg(1 << 63)
    bench.cpu.invlpg(VA | 1 << 47)
    assert bench.read() == "old"


# --- CR3, CR4, CR0, SYSCFG


@pytest.mark.req("CM-74")
@pytest.mark.parametrize("is_global", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("pge", [False, True], ids=["PGE=0", "PGE=1"])
def test_a_write_of_cr3_keeps_global_pages_where_pge_is_set(
    pge: bool, is_global: bool
) -> None:
    bench = remapped(flags=G * is_global, cr4=CR4_PGE * pge)
    bench.cpu.write_cr3(bench.cpu.read_cr3())
    assert bench.read() == ("old" if pge and is_global else "new")
    bench.cpu.invlpg(VA)
    assert bench.read() == "new", "INVLPG drops global pages too"


@pytest.mark.req("CM-74")
@pytest.mark.parametrize("shift", [12, 21])
def test_a_global_page_outlives_a_change_of_address_space(shift: int) -> None:
    bench = remapped(shift, flags=G, cr4=CR4_PGE)
    others = Tables(bench.machine, 0x18_0000)
    bench.cpu.write_cr3(others.cr3)
    assert bench.read() == "old"
    bench.cpu.write_cr4(bench.cr4 ^ CR4_PGE)
    with pytest.raises(PageFault):
        bench.read()


@pytest.mark.req("CM-74")
@pytest.mark.parametrize("pge", [False, True], ids=["set", "cleared"])
def test_toggling_pge_drops_global_pages(pge: bool) -> None:
    bench = remapped(flags=G, cr4=CR4_PGE * pge)
    bench.cpu.write_cr4(bench.cr4)
    assert bench.read() == "old", "writing the same value toggles nothing"
    bench.cpu.write_cr4(bench.cr4 ^ CR4_PGE)
    assert bench.read() == "new"


def test_g_in_a_table_pointer_makes_nothing_global() -> None:
    bench = Bench(cr4=CR4_PGE)
    bench.tables.map(VA, OLD | PAGE_RW, pointers=PAGE_RW | G)
    bench.read()
    bench.tables.write(VA, 12, NEW | PAGE_RW)
    bench.cpu.write_cr3(bench.tables.cr3)
    assert bench.read() == "new"


def test_paging_off_and_on_drops_everything() -> None:
    bench = remapped(flags=G, cr4=CR4_PGE)
    bench.cpu.write_cr0(CR0_PE)
    bench.cpu.write_cr0(CR0_PE | CR0_PG)
    assert bench.read() == "new"


@pytest.mark.req("PT-10")
def test_turning_memory_encryption_on_drops_everything() -> None:
    bench = remapped(flags=G, cr4=CR4_PGE, smee=False)
    bench.cpu.wrmsr(SYSCFG, SYSCFG_SMEE)
    assert bench.read() == "new"


def test_every_core_has_a_tlb_of_its_own() -> None:
    bench = Bench(cores=2)
    first, second = bench.machine.cpus
    bench.tables.map(VA, OLD | PAGE_RW)
    assert first.load(VA, 3) == second.load(VA, 3) == b"old"
    bench.tables.write(VA, 12, NEW | PAGE_RW)
    first.invlpg(VA)
    assert (first.load(VA, 3), second.load(VA, 3)) == (b"new", b"old")
    second.write_cr3(second.read_cr3())
    assert second.load(VA, 3) == b"new"


# --- accessed and dirty


@pytest.mark.parametrize("shift", [12, 21])
def test_dirty_is_set_by_the_first_store_only(shift: int) -> None:
    bench = Bench()
    flags = PAGE_RW | PS * (shift != 12)
    bench.tables.map(VA, OLD | flags, shift)
    bench.read()
    assert bench.tables.read(VA, shift) & (A | D) == A
    bench.cpu.store(VA, b"x")
    assert bench.tables.read(VA, shift) & (A | D) == A | D

    bench.tables.write(VA, shift, OLD | flags)  # as software cleans a page
    bench.cpu.store(VA, b"y")
    bench.read()
    assert bench.tables.read(VA, shift) & (A | D) == 0, "without a flush nobody looks"
    bench.cpu.invlpg(VA)
    bench.cpu.store64(VA, 1)
    assert bench.tables.read(VA, shift) & (A | D) == A | D


def test_a_store_after_a_load_walks_again_for_the_dirty_bit() -> None:
    bench = remapped()
    assert bench.read() == "old"
    bench.cpu.store(VA, b"xyz")  # the walk for D finds the new frame
    assert bench.machine.bus.load(NEW, 3, 0) == b"xyz"
    assert bench.machine.bus.load(OLD, 3, 0) == b"old"
    assert bench.read() == "xyz"


def test_a_page_mapped_dirty_is_stored_to_without_a_walk() -> None:
    bench = remapped(flags=A | D)
    bench.cpu.store(VA, b"xyz")
    assert bench.machine.bus.load(OLD, 3, 0) == b"xyz"


# --- rights


def test_an_upgrade_of_rights_needs_no_flush() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | P | NX)
    cpu = bench.cpu
    bench.read()
    for act in (lambda: cpu.store(VA, b"x"), lambda: cpu.fetch(VA, 1)):
        with pytest.raises(PageFault):
            act()
    bench.tables.write(VA, 12, OLD | P | RW)
    cpu.store(VA, b"x")
    assert cpu.fetch(VA, 1) == b"x"
    cpu.cpl = 3
    with pytest.raises(PageFault):
        cpu.load(VA, 1)
    bench.tables.write(VA, 12, OLD | P | US)
    for shift in (21, 30, 39):
        assert bench.tables.read(VA, shift) & US
    assert cpu.load(VA, 1) == b"x"


def test_a_downgrade_of_rights_counts_after_the_flush() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | PAGE_RW)
    cpu = bench.cpu
    cpu.store(VA, b"x")
    bench.tables.write(VA, 12, OLD | P | NX)
    cpu.store(VA, b"y")
    cpu.fetch(VA, 1)
    cpu.invlpg(VA)
    for act in (lambda: cpu.store(VA, b"z"), lambda: cpu.fetch(VA, 1)):
        with pytest.raises(PageFault):
            act()


def test_a_fault_drops_the_translation_that_was_refused() -> None:
    bench = remapped(flags=0)
    bench.tables.write(VA, 12, NEW | P | US)
    with pytest.raises(PageFault):
        bench.cpu.store(VA, b"x")
    assert bench.read() == "new"


def test_a_kept_translation_is_judged_by_the_mode_of_the_access() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | P | US | A)
    bench.tables.map(VA + PAGE, OLD | P | RW | A | D)
    cpu = bench.cpu
    bench.read()
    bench.read(VA + PAGE)
    cpu.cpl = 3
    assert cpu.load(VA, 3) == b"old"
    with pytest.raises(PageFault) as caught:
        cpu.load(VA + PAGE, 3)
    assert caught.value.error_code == 0x5
    cpu.cpl = 0
    cpu.write_cr4(CR4_PAE | CR4_SMAP)
    with pytest.raises(PageFault):
        bench.read()
    cpu.alignment_check = True
    assert bench.read() == "old"
    cpu.fetch(VA, 1)
    cpu.write_cr4(CR4_PAE | CR4_SMEP)
    with pytest.raises(PageFault):
        cpu.fetch(VA, 1)


def test_write_protect_is_judged_at_each_store() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | P | A | D)
    cpu = bench.cpu
    with pytest.raises(PageFault):
        cpu.store(VA, b"x")
    cpu.write_cr0(CR0_PE | CR0_PG)
    cpu.store(VA, b"xyz")
    cpu.store(VA, b"abc")
    cpu.write_cr0(CR0_PE | CR0_PG | CR0_WP)
    with pytest.raises(PageFault) as caught:
        cpu.store(VA, b"no!")
    assert caught.value.error_code == 0x3
    assert bench.read() == "abc"


# --- capacity


def test_a_full_tlb_forgets_the_oldest_and_still_drops_large_pages_whole() -> None:
    bench = Bench()
    bench.tables.map(VA, LARGE_RW, 30)
    for page in range(CAPACITY + 3):
        bench.cpu.translate(VA + page * PAGE)
    bench.tables.write(VA, 30, 1 << 30 | LARGE_RW)
    newest = VA + CAPACITY * PAGE
    assert bench.cpu.translate(newest).pa == CAPACITY * PAGE
    assert bench.cpu.translate(VA + 2 * PAGE).pa == (1 << 30) + 2 * PAGE
    bench.cpu.invlpg(VA)
    assert bench.cpu.translate(newest).pa == (1 << 30) + CAPACITY * PAGE


def test_a_page_that_a_full_tlb_forgot_is_walked_to_by_loads_as_well() -> None:
    bench = remapped()
    assert bench.cpu.load64(VA) == int.from_bytes(b"old", "little")
    others = VA + (1 << 30)
    bench.tables.map(others, LARGE_RW, 30)
    for page in range(CAPACITY):
        bench.cpu.translate(others + page * PAGE)
    bench.cpu.store(VA + 8, b"x")  # to the new frame
    assert bench.read() == "new"
    assert bench.cpu.load64(VA) == int.from_bytes(b"new", "little")


def test_vector_a_tlb_by_itself() -> None:
    tlb = Tlb()
    small = Translation(0x5000, 0, 7, 12, 0x5067)
    local, shared = 0x20_00E7, 0x20_01E7  # bit 8 is G
    for page in (512, 513, 1023):
        tlb.insert(page, Translation(0x20_0000, 0, 7, 21, local))
    tlb.insert(1024, Translation(0x20_0000, 0, 7, 21, shared))
    tlb.insert(5, small)
    assert tlb.drop(700) == {512, 513, 700, 1023}
    assert sorted(tlb.entries) == [5, 1024]
    tlb.flush(keep_global=True)
    assert sorted(tlb.entries) == [1024]
    assert tlb.drop(1025) == {1024, 1025}
    tlb.insert(5, small)
    tlb.flush(keep_global=False)
    assert tlb.entries == {}
