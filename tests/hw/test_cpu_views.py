"""Accesses that were fast once: whatever happens in between, the next one is right.

The core keeps views of pages that need no check. Nothing here looks at them: every
test warms a page up, lets something happen that a view must not outlive, and looks at
what the next access does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.faults import GeneralProtection, PageFault
from cbit.hw.memory import SLOT_HOST, SLOT_NONE

from .test_paging_witness import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_SMAP,
    LARGE_RW,
    NX,
    PAGE,
    PAGE_RW,
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
FRAME, OTHER = 0x20_0000, 0x40_0000
PLAIN, PRIVATE, ALIAS = 0x7F00_0000_0000, 0x7F00_0000_1000, 0x7F00_0000_2000
C = 1 << 47
FLAGS = PAGE_RW | A | D
OLD = int.from_bytes(b"old_data", "little")
NEW = int.from_bytes(b"new_data", "little")

COHERENT = pytest.mark.parametrize(
    "coherent", [True, False], ids=["coherent", "incoherent"]
)


class Bench:
    """`PLAIN` and `PRIVATE` map one frame with C = 0 and C = 1, `ALIAS` the first's."""

    def __init__(self, coherent: bool = True, *, cores: int = 1) -> None:
        self.machine = Machine("rome", ram=RAM, coherent=coherent, cores=cores, seed=1)
        self.tables = Tables(self.machine)
        self.tables.map(PLAIN, FRAME | FLAGS)
        self.tables.map(PRIVATE, FRAME | C | FLAGS)
        self.tables.map(ALIAS, FRAME | FLAGS)
        for pa, value in ((FRAME, OLD), (OTHER, NEW)):
            self.machine.bus.store(pa, value.to_bytes(8, "little") * 512, SLOT_NONE)
        self.machine.caches.write_back_invalidate()
        for cpu in self.machine.cpus:
            long_mode(cpu, self.tables.cr3, cr4=CR4_PGE)
        self.cpu = self.machine.cpu

    def dma(self, data: bytes) -> None:
        """Write as a device does, past every cache."""
        self.machine.dram.cells[FRAME : FRAME + len(data)] = np.frombuffer(
            data, np.uint8
        )

    def warm(self, va: int = PLAIN) -> None:
        """Load and store often enough that nothing is left to be checked."""
        for cpu in self.machine.cpus:
            value = cpu.load64(va)
            cpu.store(va, cpu.load(va, PAGE))
            for _ in range(2):
                cpu.store64(va, cpu.load64(va))
                cpu.store(va + 8, cpu.load(va + 8, 8))
            assert cpu.load64(va) == value

    def walk_often(self) -> None:
        """Walk to three neighbours until there is nothing left to learn of the way."""
        for va in [PLAIN, PRIVATE, ALIAS] * 3:
            self.cpu.translate(va)
            self.cpu.invlpg(va)


LOADS: dict[str, Callable[[Cpu, int], int]] = {
    "load64": lambda cpu, va: cpu.load64(va),
    "load": lambda cpu, va: int.from_bytes(cpu.load(va, 8), "little"),
    "load_array": lambda cpu, va: int(cpu.load_array(va, 1)[0]),
    "fetch": lambda cpu, va: int.from_bytes(cpu.fetch(va, 8), "little"),
}

STORES: dict[str, Callable[[Cpu, int], None]] = {
    "store64": lambda cpu, va: cpu.store64(va, NEW),
    "store": lambda cpu, va: cpu.store(va, NEW.to_bytes(8, "little")),
    "store_array": lambda cpu, va: cpu.store_array(va, np.array([NEW], np.uint64)),
}

EACH_LOAD = pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
EACH_STORE = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


def redirect(bench: Bench, va: int = PLAIN) -> None:
    bench.tables.write(va, 12, OTHER | FLAGS)


# --- the TLB changes


def by_invlpg(bench: Bench) -> None:
    redirect(bench)
    bench.cpu.invlpg(PLAIN + 0x18)


def by_cr3(bench: Bench) -> None:
    redirect(bench)
    bench.cpu.write_cr3(bench.tables.cr3)


def by_other_tables(bench: Bench) -> None:
    tables = Tables(bench.machine, 0x18_0000)
    tables.map(PLAIN, OTHER | FLAGS)
    bench.cpu.write_cr3(tables.cr3)


def by_pge(bench: Bench) -> None:
    redirect(bench)
    bench.cpu.write_cr4(CR4_PAE)


def by_paging_off_and_on(bench: Bench) -> None:
    redirect(bench)
    bench.cpu.write_cr0(CR0_PE)
    bench.cpu.write_cr0(CR0_PE | CR0_PG)


@EACH_LOAD
@pytest.mark.parametrize(
    "flush",
    [by_invlpg, by_cr3, by_other_tables, by_pge, by_paging_off_and_on],
)
def test_a_flush_of_the_tlb_is_seen_by_loads(
    load: Callable[[Cpu, int], int], flush: Callable[[Bench], None]
) -> None:
    bench = Bench()
    bench.warm()
    assert load(bench.cpu, PLAIN) == OLD
    flush(bench)
    assert load(bench.cpu, PLAIN) == NEW


@EACH_STORE
@pytest.mark.parametrize(
    "flush",
    [by_invlpg, by_cr3, by_other_tables, by_pge, by_paging_off_and_on],
)
def test_a_flush_of_the_tlb_is_seen_by_stores(
    store: Callable[[Cpu, int], None], flush: Callable[[Bench], None]
) -> None:
    bench = Bench()
    bench.warm()
    bench.machine.bus.store(OTHER, bytes(8), SLOT_NONE)
    flush(bench)
    store(bench.cpu, PLAIN)
    assert bench.machine.bus.load(FRAME, 8, SLOT_NONE) == b"old_data"
    assert bench.machine.bus.load(OTHER, 8, SLOT_NONE) == b"new_data"


def test_a_global_page_stays_fast_and_stale_over_a_write_of_cr3() -> None:
    bench = Bench()
    bench.tables.write(PLAIN, 12, FRAME | FLAGS | G)
    bench.warm()
    redirect(bench)
    bench.cpu.write_cr3(bench.tables.cr3)
    assert bench.cpu.load64(PLAIN) == OLD
    bench.cpu.invlpg(PLAIN)
    assert bench.cpu.load64(PLAIN) == NEW


def test_invlpg_of_one_piece_slows_every_piece_of_a_large_page_down() -> None:
    bench = Bench()
    va = 0x7F00_4000_0000
    bench.tables.map(va, FRAME | A | D | LARGE_RW, 21)
    for piece in range(0, 1 << 21, 1 << 18):
        bench.warm(va + piece)
    bench.tables.write(va, 21, OTHER | LARGE_RW)
    bench.cpu.invlpg(va + 0x1F_FFFF)
    bench.cpu.store64(va + 0x4_0000, 5)
    assert bench.cpu.load64(va) == NEW
    assert bench.machine.bus.load(OTHER + 0x4_0000, 1, SLOT_NONE) == b"\x05"


def test_a_walk_for_the_dirty_bit_moves_loads_as_well() -> None:
    bench = Bench()
    bench.tables.write(PLAIN, 12, FRAME | PAGE_RW | A)
    assert bench.cpu.load64(PLAIN) == bench.cpu.load64(PLAIN) == OLD
    redirect(bench)
    bench.cpu.store64(PLAIN + 8, 5)
    assert bench.cpu.load64(PLAIN) == NEW


def test_a_walk_for_a_fetch_moves_loads_and_stores_as_well() -> None:
    bench = Bench()
    bench.tables.write(PLAIN, 12, FRAME | FLAGS | NX)
    bench.cpu.invlpg(PLAIN)
    bench.warm()
    redirect(bench)
    assert bench.cpu.load64(PLAIN) == OLD
    bench.cpu.fetch(PLAIN, 8)  # refused by what is kept, so it walks
    bench.cpu.store64(PLAIN + 8, 5)
    assert bench.cpu.load64(PLAIN) == NEW
    assert bench.machine.bus.load(OTHER + 8, 1, SLOT_NONE) == b"\x05"


# --- the mode changes


def at_cpl_3(bench: Bench) -> None:
    bench.tables.write(PLAIN, 12, FRAME | P | RW | A | D)
    bench.cpu.invlpg(PLAIN)
    bench.warm()
    bench.cpu.cpl = 3


def under_smap(bench: Bench) -> None:
    bench.warm()
    bench.cpu.write_cr4(CR4_PAE | CR4_SMAP)


def after_clac(bench: Bench) -> None:
    bench.cpu.write_cr4(CR4_PAE | CR4_SMAP)
    bench.cpu.alignment_check = True
    bench.warm()
    bench.cpu.alignment_check = False


def beyond_the_limit(bench: Bench) -> None:
    bench.warm()
    bench.cpu.write_cr0(CR0_PE)


@pytest.mark.parametrize("change", [at_cpl_3, under_smap, after_clac, beyond_the_limit])
@pytest.mark.parametrize(
    "act", [LOADS["load64"], LOADS["load"], STORES["store64"], STORES["store"]]
)
def test_a_change_of_mode_is_seen_at_once(
    change: Callable[[Bench], None], act: Callable[[Cpu, int], object]
) -> None:
    bench = Bench()
    change(bench)
    with pytest.raises((PageFault, GeneralProtection)):
        act(bench.cpu, PLAIN)


@EACH_STORE
def test_write_protect_is_seen_at_once(store: Callable[[Cpu, int], None]) -> None:
    bench = Bench()
    bench.tables.write(PLAIN, 12, FRAME | P | US | A | D)
    bench.cpu.write_cr0(CR0_PE | CR0_PG)
    bench.warm()
    bench.cpu.write_cr0(CR0_PE | CR0_PG | CR0_WP)
    with pytest.raises(PageFault):
        store(bench.cpu, PLAIN)
    assert bench.cpu.load64(PLAIN) == OLD


def test_what_may_be_fetched_may_not_be_loaded_under_smap() -> None:
    bench = Bench()
    bench.warm()
    bench.cpu.write_cr4(CR4_PAE | CR4_SMAP)
    for act in (LOADS["load64"], LOADS["load"], *STORES.values()):
        for _ in range(2):
            assert bench.cpu.fetch(PLAIN, 8) == b"old_data"
        with pytest.raises(PageFault):
            act(bench.cpu, PLAIN)


def test_a_store_view_gives_no_right_to_load_elsewhere() -> None:
    bench = Bench()
    bench.warm()
    bench.tables.write(PLAIN, 12, 0)
    bench.cpu.invlpg(PLAIN)
    for act in (*LOADS.values(), *STORES.values()):
        with pytest.raises(PageFault):
            act(bench.cpu, PLAIN)


@pytest.mark.req("PT-10", "PT-15")
def test_turning_memory_encryption_on_is_seen_at_once() -> None:
    machine = Machine("milan", ram=RAM, smee=False, seed=1)
    tables = Tables(machine)
    tables.map(PLAIN, FRAME | FLAGS | 1 << 44)
    tables.map(ALIAS, FRAME | FLAGS)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3)
    cpu.store(ALIAS, bytes(PAGE))
    cpu.store64(ALIAS, OLD)
    cpu.wrmsr(SYSCFG, SYSCFG_SMEE)
    assert cpu.load64(ALIAS) == OLD
    with pytest.raises(PageFault):
        cpu.load64(PLAIN)


def test_reset_forgets_everything() -> None:
    bench = Bench()
    bench.warm()
    bench.machine.reset()
    with pytest.raises(GeneralProtection):
        bench.cpu.load64(PLAIN)
    assert bench.cpu.load64(FRAME) == OLD


# --- the caches change


def by_wbinvd(bench: Bench) -> None:
    bench.cpu.wbinvd()


def by_clflush(bench: Bench) -> None:
    bench.cpu.clflush(PLAIN + 63)


def by_eviction(bench: Bench) -> None:
    bench.machine.caches.evict(share=1.0)


def by_power_loss(bench: Bench) -> None:
    bench.machine.caches.lose()


@EACH_LOAD
@COHERENT
@pytest.mark.parametrize("flush", [by_wbinvd, by_clflush, by_eviction, by_power_loss])
def test_what_a_device_stored_is_seen_after_a_flush(
    load: Callable[[Cpu, int], int], coherent: bool, flush: Callable[[Bench], None]
) -> None:
    bench = Bench(coherent)
    bench.warm()
    bench.dma(b"new_data")
    assert load(bench.cpu, PLAIN) == OLD, "cached"
    flush(bench)
    bench.dma(b"new_data")
    assert load(bench.cpu, PLAIN) == NEW


@EACH_STORE
@COHERENT
@pytest.mark.parametrize("flush", [by_wbinvd, by_clflush, by_eviction])
def test_a_store_after_a_flush_reaches_dram_at_the_next(
    store: Callable[[Cpu, int], None], coherent: bool, flush: Callable[[Bench], None]
) -> None:
    bench = Bench(coherent)
    bench.warm()
    flush(bench)
    store(bench.cpu, PLAIN)
    assert bench.machine.snoop(FRAME, 8) == b"old_data"
    flush(bench)
    assert bench.machine.snoop(FRAME, 8) == b"new_data"


@EACH_STORE
@COHERENT
def test_lines_that_came_to_rest_are_dirty_again_after_a_store(
    store: Callable[[Cpu, int], None], coherent: bool
) -> None:
    bench = Bench(coherent)
    bench.warm()
    bench.machine.caches.drain()
    assert bench.cpu.load64(PLAIN) == OLD
    store(bench.cpu, PLAIN)
    bench.machine.caches.drain()
    assert bench.machine.snoop(FRAME, 8) == b"new_data"


# --- another tag takes the page


@EACH_LOAD
@EACH_STORE
def test_a_store_through_the_other_c_bit_is_seen_by_loads(
    load: Callable[[Cpu, int], int], store: Callable[[Cpu, int], None]
) -> None:
    bench = Bench()
    bench.warm()
    store(bench.cpu, PRIVATE)
    engine = bench.machine.controller.engine(SLOT_HOST)
    private = engine.decrypt(FRAME, b"old_data" * 2)
    expected = engine.encrypt(FRAME, b"new_data" + private[8:])
    assert load(bench.cpu, PLAIN) == int.from_bytes(expected[:8], "little")
    assert load(bench.cpu, PRIVATE) == NEW


@pytest.mark.req("WP-13")
def test_two_tags_take_turns_without_losing_a_store() -> None:
    bench = Bench()
    engine = bench.machine.controller.engine(SLOT_HOST)
    cells = bytearray(b"old_data" * 2)
    for turn in range(20):
        bench.cpu.store64(PLAIN, turn)
        cells[:8] = turn.to_bytes(8, "little")
        bench.cpu.store64(PRIVATE + 8, turn)
        private = bytearray(engine.decrypt(FRAME, bytes(cells)))
        private[8:] = turn.to_bytes(8, "little")
        cells[:] = engine.encrypt(FRAME, bytes(private))
        assert bench.cpu.load(PRIVATE, 16) == private
        assert bench.cpu.load(PLAIN, 16) == cells


def test_another_core_takes_the_page_through_the_other_c_bit() -> None:
    bench = Bench(cores=2)
    bench.warm()
    first, second = bench.machine.cpus
    second.store64(PRIVATE, NEW)
    assert first.load64(PLAIN) != OLD
    assert first.load64(PRIVATE) == NEW
    first.store64(PLAIN, 7)
    assert second.load64(PLAIN) == 7
    second.wbinvd()
    bench.dma(b"new_data")
    assert first.load64(PLAIN) == second.load64(PLAIN) == NEW


@pytest.mark.req("PT-50")
def test_on_an_incoherent_part_a_stale_line_is_seen_and_reported() -> None:
    bench = Bench(coherent=False)
    bench.warm()
    bench.cpu.store64(PRIVATE, NEW)
    assert bench.cpu.load64(PLAIN) == OLD, "the old line is still there"
    assert bench.machine.caches.hazards_met
    kinds = {hazard.kind for hazard in bench.machine.caches.hazards_met}
    assert kinds <= {"dirty-alias", "stale-line"}
    met = len(bench.machine.caches.hazards_met)
    bench.cpu.load64(PLAIN)
    assert len(bench.machine.caches.hazards_met) > met, "at each access"


@pytest.mark.parametrize("act", ["copy", "fill", "store_array", "store", "alias"])
def test_every_kind_of_store_is_seen_by_fast_loads(act: str) -> None:
    bench = Bench()
    bench.warm()
    cpu = bench.cpu
    cpu.load64(ALIAS)
    tables = bench.tables
    tables.map(ALIAS + PAGE, OTHER | FLAGS)
    if act == "copy":
        cpu.copy(PLAIN, ALIAS + PAGE, PAGE)
    elif act == "fill":
        cpu.fill(PLAIN, 0x41, PAGE)
    elif act == "store_array":
        cpu.store_array(PLAIN, np.full(512, NEW, np.uint64))
    elif act == "store":
        cpu.store(PLAIN, b"new_data" * 512)
    else:
        cpu.store64(ALIAS, NEW)
    expected = int.from_bytes(b"A" * 8, "little") if act == "fill" else NEW
    assert cpu.load64(PLAIN) == cpu.load64(ALIAS) == expected


# --- tables are seen through views too


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@COHERENT
def test_a_walk_sees_an_entry_stored_a_moment_ago(
    coherent: bool, encrypted: bool
) -> None:
    machine = Machine("rome", ram=RAM, coherent=coherent, seed=1)
    tables = Tables(machine, tags=dict.fromkeys((39, 30, 21, 12), encrypted))
    tables.map(PLAIN, FRAME | PAGE_RW)
    window = 0x6000_0000_0000
    table = tables.page_of(PLAIN, 12)
    tables.map(window, table | C * encrypted | PAGE_RW)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3)
    for frame in range(FRAME, FRAME + 20 * PAGE, PAGE):
        cpu.store64(window + 8 * (PLAIN >> 12 & 511), frame | PAGE_RW)
        cpu.invlpg(PLAIN)
        assert cpu.translate(PLAIN).pa == frame
        assert cpu.load64(window + 8 * (PLAIN >> 12 & 511)) == frame | PAGE_RW | A
    assert machine.caches.hazards_met == []


@pytest.mark.parametrize("shift", [12, 21, 30, 39])
def test_a_walk_sees_what_a_device_did_to_a_table_after_a_flush(shift: int) -> None:
    bench = Bench()
    bench.walk_often()
    slot = bench.tables.slot(PLAIN, shift)
    bench.cpu.wbinvd()
    bench.machine.dram.cells[slot] = 0
    bench.cpu.invlpg(PLAIN)
    with pytest.raises(PageFault) as caught:
        bench.cpu.load64(PLAIN)
    assert caught.value.entry is not None
    assert caught.value.entry & P == 0


@pytest.mark.req("PT-21")
@pytest.mark.parametrize("shift", [12, 21, 30, 39])
def test_a_walk_sees_that_a_table_was_rewritten_through_the_other_c_bit(
    shift: int,
) -> None:
    bench = Bench()
    bench.walk_often()
    slot = bench.tables.slot(PLAIN, shift)
    bench.machine.bus.store(slot, bytes(8), SLOT_HOST)
    engine = bench.machine.controller.engine(SLOT_HOST)
    bench.machine.caches.drain()
    cells = bench.machine.snoop(slot & -16, 16)
    assert engine.decrypt(slot & -16, cells)[slot % 16 :][:8] == bytes(8)
    bench.cpu.invlpg(PLAIN)
    with pytest.raises(PageFault) as caught:
        bench.cpu.load64(PLAIN)
    entry = int.from_bytes(cells[slot % 16 :][:8], "little")
    assert caught.value.entry == entry
