"""hw/memory/line_store: valid, dirty and stale bits of the lines of one tag."""

from itertools import pairwise

import numpy as np
import pytest

from cbit.hw.memory.line_store import (
    ALL_LINES,
    PAGES_PER_RELEASE,
    LineStore,
    masks_to_lines,
    runs,
)
from cbit.hw.types import LARGE_PAGE_SIZE, PAGE_SIZE


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([], []),
        ([7], [(7, 8)]),
        ([0, 1, 2], [(0, 3)]),
        ([1, 3, 4, 9], [(1, 2), (3, 5), (9, 10)]),
    ],
)
def test_runs_are_half_open(pages: list[int], expected: list[tuple[int, int]]) -> None:
    assert runs(np.array(pages, np.intp)) == expected


def test_law_runs_name_every_page_once_and_never_touch() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        pages = np.flatnonzero(rng.random(500) < rng.random())
        found = runs(pages)
        listed = [page for first, end in found for page in range(first, end)]
        assert listed == pages.tolist()
        assert all(end < first for (_, end), (first, _) in pairwise(found))


def test_bit_n_of_a_mask_is_the_line_at_64_n() -> None:
    pages = np.array([2, 5, 6], np.intp)
    masks = np.array([0b101, 0, 1 << 63], np.uint64)
    assert masks_to_lines(pages, masks).tolist() == [2 * 64, 2 * 64 + 2, 6 * 64 + 63]
    every = masks_to_lines(pages[:1], np.array([ALL_LINES], np.uint64))
    assert every.tolist() == list(range(128, 192))


def test_words_are_the_arrays_seen_as_plain_integers() -> None:
    store = LineStore(1, LARGE_PAGE_SIZE)
    store.valid_word[3] |= 1 << 63
    store.dirty_word[4] = 5
    store.stale_word[5] = ALL_LINES
    assert int(store.valid[3]) == 1 << 63
    assert store.dirty[4] == 5
    assert int(store.stale[5]) == ALL_LINES
    assert type(store.valid_word[3]) is int


def test_a_search_finds_what_was_marked_in_ascending_order() -> None:
    store = LineStore(0, 4 * LARGE_PAGE_SIZE)
    assert store.pages_with(store.valid).tolist() == []
    for page in (1600, 511, 512, 3):
        store.valid[page] = 1
        store.mark_used(page, page + 1)
    store.valid[1023], store.valid[1024] = 2, 4
    store.mark_used(1023, 1025)
    assert store.pages_with(store.valid).tolist() == [3, 511, 512, 1023, 1024, 1600]
    assert store.pages_with(store.dirty).tolist() == []


def test_the_last_region_may_be_a_part_of_2_mib() -> None:
    store = LineStore(0, LARGE_PAGE_SIZE + 2 * PAGE_SIZE)
    store.dirty[513] = 1
    store.mark_used(513, 514)
    assert store.pages_with(store.dirty).tolist() == [513]


@pytest.mark.parametrize("count", [1, PAGES_PER_RELEASE, PAGES_PER_RELEASE + 1])
def test_invalid_lines_have_no_bit_left(count: int) -> None:
    store = LineStore(1, LARGE_PAGE_SIZE)
    for words in (store.valid, store.dirty, store.stale):
        words[:] = ALL_LINES
    store.data.cells[:] = 7
    store.mark_used(0, 512)
    store.invalidate(np.arange(100, 100 + count))
    kept = np.delete(np.arange(512), np.arange(100, 100 + count))
    for words in (store.valid, store.dirty, store.stale):
        assert not words[100 : 100 + count].any()
        assert (words[kept] == ALL_LINES).all()
    assert (store.data.pages[kept] == 7).all()


def test_forgetting_leaves_nothing_to_find() -> None:
    store = LineStore(1, 2 * LARGE_PAGE_SIZE)
    store.valid[[1, 700]] = ALL_LINES
    store.dirty[[1, 700]] = 1
    store.mark_used(1, 2)
    store.mark_used(700, 701)
    store.forget_all()
    for words in (store.valid, store.dirty, store.stale):
        assert not words.any()
    assert store.pages_with(store.valid).tolist() == []
