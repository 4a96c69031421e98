"""boot/identity_map.py: the pool, the leaves of a range, what is mapped already."""

from __future__ import annotations

from random import Random

import pytest

from cbit.boot.identity_map import IdentityMapper, TablePool
from cbit.hw.errors import KernelError
from cbit.hw.types import PhysAddr

from .conftest import COHERENT, FIVE_LEVELS, GIB, MIB, TABLE_ADDRESS, Board, board

POOL, POOL_END = PhysAddr(0x200_0000), PhysAddr(0x220_0000)
DEC, DEC_PTE = 0x0E3, 0x063
WP, WP_PTE = 0x10EB, 0x0EB


class Tables:
    """A new PGD in memory full of rubbish, and the mapper that fills it."""

    def __init__(self, made: Board) -> None:
        self.board = made
        made.cpu.fill(POOL, 0xDB, POOL_END - POOL)
        self.pool = TablePool(POOL, POOL_END)
        self.pgd = self.pool.take(made.cpu)
        self.mapper = IdentityMapper(
            made.cpu, made.state, self.pool, self.pgd, made.levels == 5
        )

    def map(
        self, start: int, end: int, va: int, pmd: int = DEC, pte: int = DEC_PTE
    ) -> None:
        self.mapper.map_range(start, end, va, pmd, pte)

    def entry(self, va: int) -> tuple[int, int] | None:
        """Return the flags of the leaf and its size's log2, None where none is."""
        if not self.board.maps(self.pgd, va):
            return None
        leaf = self.board.walk(self.pgd, va)
        flags = leaf.entry & ~TABLE_ADDRESS
        if leaf.shift == 21:
            flags |= leaf.entry & 0x1000  # PAT of a large page
        return flags, leaf.shift


@pytest.fixture(params=[COHERENT, FIVE_LEVELS], ids=["4-level", "5-level"])
def tables(request: pytest.FixtureRequest) -> Tables:
    return Tables(board(request.param, la57=request.param == FIVE_LEVELS))


@pytest.mark.req("LB-51")
def test_pages_of_the_pool_are_zeroed_and_go_upwards() -> None:
    made = board()
    made.cpu.fill(POOL, 0xDB, 0x3000)
    pool = TablePool(POOL, PhysAddr(POOL + 0x2000))
    assert [pool.take(made.cpu), pool.take(made.cpu)] == [POOL, POOL + 0x1000]
    assert pool.used == 2
    assert made.cpu.load(POOL, 0x3000) == bytes(0x2000) + b"\xdb" * 0x1000
    with pytest.raises(KernelError, match="used up after 2 pages"):
        pool.take(made.cpu)
    assert pool.used == 2


@pytest.mark.req("LB-51")
def test_a_new_pgd_maps_nothing(tables: Tables) -> None:
    assert tables.board.table(tables.pgd, c_bit=False) == [0] * 512


@pytest.mark.req("LB-52", "PT-38", "PT-39", "PT-42")
def test_tables_carry_0x063_and_leaves_their_flags(tables: Tables) -> None:
    c = tables.board.c_mask
    tables.map(0x3F_F000, 0x80_1000, 0x3F_F000, DEC | c, DEC_PTE | c)
    assert tables.entry(0x3F_E000) is None
    assert tables.entry(0x3F_F000) == (DEC_PTE | c & ~TABLE_ADDRESS, 12)
    assert tables.board.walk(tables.pgd, 0x3F_F000).c_bits[-1]
    assert tables.board.walk(tables.pgd, 0x40_0000).entry == 0x40_0000 | DEC | c
    assert tables.board.walk(tables.pgd, 0x80_0000).entry == 0x80_0000 | DEC_PTE | c
    assert tables.entry(0x80_1000) is None
    table: int = tables.pgd
    for shift in (48, 39, 30)[5 - tables.board.levels :]:
        entry = tables.board.table(table, c_bit=False)[0x40_0000 >> shift & 511]
        assert entry & ~TABLE_ADDRESS == 0x063
        table = entry & TABLE_ADDRESS


@pytest.mark.req("LB-53")
def test_an_offset_keeps_the_frames(tables: Tables) -> None:
    base = 1 << (48 if tables.board.levels == 5 else 39)
    tables.map(0x20_0000, 0x60_1000, 0x20_0000 + base, WP, WP_PTE)
    for pa in (0x20_0000, 0x4F_F123, 0x60_0FFF):
        assert tables.board.walk(tables.pgd, pa + base).pa == pa
        assert not tables.board.maps(tables.pgd, pa)
    assert tables.entry(base + 0x20_0000) == (WP, 21)
    assert tables.entry(base + 0x60_0000) == (WP_PTE, 12)


@pytest.mark.req("LB-50", "LB-52")
def test_what_is_mapped_already_stays_as_it_is(tables: Tables) -> None:
    tables.map(0x40_0000, 0x60_0000, 0x40_0000, WP, WP_PTE)
    tables.map(0x80_0000, 0x80_1000, 0x80_0000, WP, WP_PTE)
    used = tables.pool.used
    tables.map(0x40_0000, 0x40_3000, 0x40_0000)  # small pages into a large one
    tables.map(0x40_0000, 0x60_0000, 0x40_0000)
    tables.map(0x80_0000, 0x80_2000, 0x80_0000)
    assert tables.entry(0x40_0000) == tables.entry(0x40_2000) == (WP, 21)
    assert tables.entry(0x80_0000) == (WP_PTE, 12)
    assert tables.entry(0x80_1000) == (DEC_PTE, 12)
    assert tables.pool.used == used


@pytest.mark.req("LB-50")
def test_a_1_gib_page_is_left_alone(tables: Tables) -> None:
    tables.map(0, 2 * MIB, 0)
    table: int = tables.pgd
    for shift in (48, 39)[5 - tables.board.levels :]:
        entries = tables.board.table(table, c_bit=False)
        table = entries[GIB >> shift & 511] & TABLE_ADDRESS
    tables.board.cpu.store64(table + 8, GIB | 0x1E3)
    tables.map(GIB, GIB + 4 * MIB + 4096, GIB)
    assert tables.entry(GIB + 4096) == (0x1E3, 30)


@pytest.mark.req("LB-50")
def test_a_table_of_small_pages_gives_way_to_a_large_page(tables: Tables) -> None:
    tables.map(0x40_1000, 0x40_2000, 0x40_1000, WP, WP_PTE)
    tables.map(0x40_0000, 0x60_0000, 0x40_0000)
    assert tables.entry(0x40_1000) == (DEC, 21)


@pytest.mark.req("LB-52")
def test_an_unaligned_start_is_mapped_up_to_the_next_2_mib(tables: Tables) -> None:
    # Linux's __sme_map_range() ends the first stretch of PTEs there, come what may.
    tables.map(0x40_1234, 0x40_1235, 0x40_1234)
    assert tables.entry(0x40_0000) is None
    assert tables.entry(0x40_1000) == tables.entry(0x5F_F000) == (DEC_PTE, 12)
    assert tables.entry(0x60_0000) is None


def test_an_empty_range_at_a_boundary_maps_nothing(tables: Tables) -> None:
    tables.map(0x40_0000, 0x40_0000, 0x40_0000)
    assert tables.entry(0x40_0000) is None


@pytest.mark.req("LB-58")
def test_clearing_drops_the_pgd_slots_of_a_range_and_no_others(tables: Tables) -> None:
    shift = 48 if tables.board.levels == 5 else 39
    slots = range(5)
    for slot in slots:
        tables.map(0, 2 * MIB, slot << shift)
    tables.mapper.clear_pgd((1 << shift) + 5, (3 << shift) + 7)
    top = tables.board.table(tables.pgd, c_bit=False)
    assert [bool(top[slot]) for slot in slots] == [True, False, False, False, True]


@pytest.mark.req("LB-52", "LB-53", "LB-54")
@pytest.mark.parametrize("seed", range(20))
def test_law_every_page_of_every_range_and_no_other_is_mapped(seed: int) -> None:
    rng = Random(seed)
    five_levels = rng.random() < 0.5
    tables = Tables(board(FIVE_LEVELS, la57=five_levels))
    offset = rng.choice([0, 1 << 39, 5 << 30])
    # Ranges that share no 2 MiB, in any order; a model of single pages beside them.
    starts = rng.sample(range(0, 6 * GIB, 16 * MIB), 8)
    ranges = []
    for start in starts:
        first = start + rng.choice([0, 0x1000 * rng.randrange(512), rng.randrange(MIB)])
        end = first + rng.choice([4096, 2 * MIB, rng.randrange(1, 9 * MIB)])
        tables.map(first, end, first + offset)
        ranges.append((first, end))
    for first, end in ranges:
        low, high = first & -4096, -(-end // 4096) * 4096
        for pa in (low, high - 4096, rng.randrange(low, high)):
            leaf = tables.board.walk(tables.pgd, pa + offset)
            assert leaf.pa == pa
            whole = low <= pa & -2 * MIB and (pa & -2 * MIB) + 2 * MIB <= end
            assert leaf.shift == (21 if whole else 12)
        for pa in (low - 1, max(high, -(-low // (2 * MIB)) * 2 * MIB)):
            assert not tables.board.maps(tables.pgd, pa + offset)
