"""hw/memory/dram: the cells, and the note of who wrote them that only tools read."""

import numpy as np

from cbit.hw.memory import SLOT_HOST, SLOT_NONE, Dram
from cbit.hw.types import LARGE_PAGE_SIZE, PAGE_SIZE


def test_a_new_module_was_never_written() -> None:
    dram = Dram(8 * LARGE_PAGE_SIZE)
    assert dram.count_pages() == {}
    assert list(dram.extents()) == []
    assert not dram.written_by.any()


def test_pages_are_counted_under_the_slot_that_wrote_them_last() -> None:
    dram = Dram(8 * LARGE_PAGE_SIZE)
    dram.mark_written(0, 10, SLOT_NONE)
    dram.mark_written(4, 6, SLOT_HOST)
    dram.mark_written(1000, 1001, 509)  # ASID 508
    assert dram.count_pages() == {SLOT_NONE: 8, SLOT_HOST: 2, 509: 1}
    assert dram.written_by[[3, 4, 6, 10, 1000]].tolist() == [1, 2, 1, 0, 510]


def test_extents_are_the_2_mib_regions_that_were_written() -> None:
    dram = Dram(8 * LARGE_PAGE_SIZE)
    dram.mark_written(511, 513, SLOT_HOST)  # touches regions 0 and 1
    dram.mark_written(512 * 6, 512 * 7, SLOT_NONE)  # region 6, no more
    starts = [start for start, _ in dram.extents()]
    assert starts == [0, LARGE_PAGE_SIZE, 6 * LARGE_PAGE_SIZE]
    dram.cells[LARGE_PAGE_SIZE + 5] = 0x77
    assert [cells.size for _, cells in dram.extents()] == [LARGE_PAGE_SIZE] * 3
    assert [int(cells[5]) for _, cells in dram.extents()] == [0, 0x77, 0]


def test_the_last_region_may_be_shorter_than_2_mib() -> None:
    dram = Dram(LARGE_PAGE_SIZE + 3 * PAGE_SIZE)
    dram.mark_written(514, 515, SLOT_HOST)
    [(start, cells)] = dram.extents()
    assert (start, cells.size) == (LARGE_PAGE_SIZE, 3 * PAGE_SIZE)
    assert dram.count_pages() == {SLOT_HOST: 1}


def test_law_the_count_is_that_of_a_list_of_pages() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        dram = Dram(3 * LARGE_PAGE_SIZE)
        last_writer: dict[int, int] = {}
        for _ in range(30):
            first = int(rng.integers(0, 1536))
            end = min(1536, first + int(rng.integers(1, 300)))
            slot = int(rng.integers(0, 4))
            dram.mark_written(first, end, slot)
            last_writer |= dict.fromkeys(range(first, end), slot)
        counts = {
            slot: sum(1 for writer in last_writer.values() if writer == slot)
            for slot in sorted(set(last_writer.values()))
        }
        assert dram.count_pages() == counts
