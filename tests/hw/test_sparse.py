"""hw/memory/sparse: as long as RAM, as costly as what is touched."""

from pathlib import Path

import numpy as np

from cbit.hw.memory.sparse import PAGES_PER_REGION, SparseMemory
from cbit.hw.types import CACHE_LINE_SIZE, LARGE_PAGE_SIZE, PAGE_SIZE


def resident_bytes() -> int:
    """Return how much memory of the host this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


def test_cells_pages_and_lines_are_the_same_bytes() -> None:
    memory = SparseMemory(16 * PAGE_SIZE)
    memory.cells[3 * PAGE_SIZE + 2 * CACHE_LINE_SIZE + 5] = 0x5A
    assert memory.pages[3, 2 * CACHE_LINE_SIZE + 5] == 0x5A
    assert memory.lines[3 * 64 + 2, 5] == 0x5A
    assert memory.pages.shape == (16, PAGE_SIZE)
    assert memory.lines.shape == (16 * 64, CACHE_LINE_SIZE)
    assert memory.size == memory.cells.size == 16 * PAGE_SIZE


def test_what_was_never_touched_is_zero() -> None:
    assert not SparseMemory(64 * PAGE_SIZE).cells.any()


def test_a_tebibyte_costs_the_pages_that_are_touched() -> None:
    before = resident_bytes()
    memory = SparseMemory(1 << 40)
    for pa in (0, 1 << 32, (1 << 40) - 1):
        memory.cells[pa] = 1
    assert resident_bytes() - before < 16 << 20  # the host's pages may have 2 MiB


def test_released_pages_read_as_zeros_and_their_neighbours_stay() -> None:
    memory = SparseMemory(16 * PAGE_SIZE)
    memory.cells[:] = 7
    memory.release(4, 9)
    assert not memory.pages[4:9].any()
    assert (np.delete(memory.pages, range(4, 9), axis=0) == 7).all()


def test_released_memory_goes_back_to_the_host_and_can_be_used_again() -> None:
    memory = SparseMemory(32 << 20)
    memory.cells[:] = 7
    full = resident_bytes()
    memory.release(0, memory.pages.shape[0])
    assert full - resident_bytes() > 24 << 20
    memory.cells[5] = 9
    assert memory.cells[4:7].tolist() == [0, 9, 0]


def test_bulk_advice_changes_no_byte_wherever_the_run_begins_and_ends() -> None:
    memory = SparseMemory(4 * LARGE_PAGE_SIZE + 3 * PAGE_SIZE)
    memory.cells[::PAGE_SIZE] = 3
    last = memory.pages.shape[0]
    for first, end in [(0, last), (1, 2), (511, 513), (512, 1024), (300, 300)]:
        memory.expect_bulk(first, end)
        memory.expect_bulk(first, end)
    assert (memory.cells[::PAGE_SIZE] == 3).all()
    assert PAGES_PER_REGION == 512
