"""The map covers all of RAM once, in few rows."""

import numpy as np
import pytest

from cbit.hw.types import PAGE_SIZE
from cbit.tools.snoop import PageCounts, PageSpan, SnoopReport
from cbit.tools.snoop_map import (
    BOTH,
    ENCRYPTED,
    OUTSIDE,
    PLAIN,
    ZERO,
    Gap,
    MemoryMap,
    Row,
    memory_map,
    size_text,
)
from cbit.tools.snoop_repeats import Duplicates
from cbit.tools.snoop_strings import FoundStrings

GIB = 1 << 30


def report(size: int, *spans: tuple[int, list[int]]) -> SnoopReport:
    return SnoopReport(
        size=size,
        pages=PageCounts(0, 0, 0),
        spans=tuple(PageSpan(first, np.array(c, np.uint8)) for first, c in spans),
        strings=FoundStrings(0, ()),
        strings_by_chance=0,
        finds={},
        duplicates=Duplicates(0, exact=True),
        repeats=None,
    )


def described(layout: MemoryMap) -> list[tuple[int, int | list[int]]]:
    return [
        (part.address, part.length if isinstance(part, Gap) else part.cells.tolist())
        for part in layout.parts
    ]


def test_a_small_dump_has_one_cell_a_page_and_ends_where_ram_ends() -> None:
    layout = memory_map(report(6 * PAGE_SIZE, (1, [1, 2, 0, 2])), 4, 10)
    assert layout.region_size == PAGE_SIZE
    assert described(layout) == [
        (0, [ZERO, PLAIN, ENCRYPTED, ZERO]),
        (4 * PAGE_SIZE, [ENCRYPTED, ZERO, OUTSIDE, OUTSIDE]),
    ]


def test_regions_grow_until_the_rows_fit_and_mix_their_pages() -> None:
    classes = [PLAIN, ENCRYPTED, PLAIN, PLAIN, ENCRYPTED, ZERO, ZERO, ZERO]
    layout = memory_map(report(16 * PAGE_SIZE, (0, classes)), 2, 2)
    assert layout.region_size == 2 * PAGE_SIZE
    assert described(layout) == [
        (0, [BOTH, PLAIN]),
        (4 * PAGE_SIZE, [ENCRYPTED, ZERO]),
        (8 * PAGE_SIZE, 8 * PAGE_SIZE),
    ]


def test_holes_collapse_and_keep_their_length() -> None:
    spans = [(16, [2]), (60 * GIB // PAGE_SIZE, [1])]
    layout = memory_map(report(64 * GIB, *spans), 4, 20)
    assert described(layout) == [
        (0, 0x1_0000),
        (0x1_0000, [ENCRYPTED, ZERO, ZERO, ZERO]),
        (0x1_4000, 60 * GIB - 0x1_4000),
        (60 * GIB, [PLAIN, ZERO, ZERO, ZERO]),
        (60 * GIB + 0x4000, 4 * GIB - 0x4000),
    ]


def test_ram_without_a_byte_is_one_hole() -> None:
    layout = memory_map(report(64 * GIB), 64, 20)
    assert described(layout) == [(0, 64 * GIB)]


@pytest.mark.parametrize("columns", [1, 4, 64])
def test_law_the_parts_cover_ram_once_and_tell_the_contents(columns: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        num_pages = int(rng.integers(1, 5000))
        density = rng.choice([0.001, 0.05, 0.9])
        classes = rng.integers(1, 3, num_pages) * (rng.random(num_pages) < density)
        layout = memory_map(
            report(num_pages * PAGE_SIZE, (0, classes.tolist())), columns, 7
        )
        end = 0
        for part in layout.parts:
            assert part.address == end
            if isinstance(part, Gap):
                end += part.length
                assert not classes[part.address // PAGE_SIZE : end // PAGE_SIZE].any()
                continue
            for cell in part.cells.tolist():
                first = end // PAGE_SIZE
                end += layout.region_size
                inside = classes[first : end // PAGE_SIZE]
                expected = np.bitwise_or.reduce(inside) if inside.size else OUTSIDE
                assert cell == expected
        assert end >= num_pages * PAGE_SIZE
        assert sum(isinstance(part, Row) for part in layout.parts) <= 7


def test_vector_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 4096, 1536 << 10, 60 * GIB, 1 << 42)] == [
        "0 bytes",
        "1023 bytes",
        "4.0 KiB",
        "1.5 MiB",
        "60.0 GiB",
        "4.0 TiB",
    ]
