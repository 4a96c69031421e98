"""hw/types: sizes, and rounding to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.hw.types import (
    CACHE_LINE_SIZE,
    HUGE_PAGE_SIZE,
    LARGE_PAGE_SIZE,
    LINES_PER_PAGE,
    PAGE_OFFSET_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    align_down,
    align_up,
)

ALIGNMENTS = st.sampled_from([1, 16, 64, PAGE_SIZE, LARGE_PAGE_SIZE, HUGE_PAGE_SIZE])


def test_vector_sizes_of_the_architecture() -> None:
    # APM volume 2, 5.3: pages of 4 KiB, 2 MiB and 1 GiB; lines of 64 bytes.
    assert (PAGE_SIZE, LARGE_PAGE_SIZE, HUGE_PAGE_SIZE) == (4096, 2097152, 1073741824)
    assert (1 << PAGE_SHIFT, PAGE_OFFSET_MASK) == (0x1000, 0xFFF)
    assert (CACHE_LINE_SIZE, LINES_PER_PAGE) == (64, 64)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [(0, 0, 0), (1, 0, 0x1000), (0xFFF, 0, 0x1000), (0x1000, 0x1000, 0x1000)],
)
def test_rounding_to_pages(value: int, down: int, up: int) -> None:
    assert (align_down(value, PAGE_SIZE), align_up(value, PAGE_SIZE)) == (down, up)


@given(st.integers(0, (1 << 64) - 1), ALIGNMENTS)
def test_law_a_value_lies_between_its_neighbouring_multiples(
    value: int, alignment: int
) -> None:
    down, up = align_down(value, alignment), align_up(value, alignment)
    assert down % alignment == up % alignment == 0
    assert down <= value <= up
    assert up - down == (0 if value % alignment == 0 else alignment)
