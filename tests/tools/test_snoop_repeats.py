"""Ciphertext that repeats is counted: inside a snapshot and between two."""

import numpy as np
import pytest

from cbit.hw.types import PAGE_SIZE, PhysAddr
from cbit.tools import snoop_repeats
from cbit.tools.dram_file import ByteArray
from cbit.tools.snoop_repeats import Duplicates, DuplicateSearch, Repeats, RepeatSearch


def noise(num_pages: int, seed: int = 1) -> ByteArray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_pages, PAGE_SIZE), dtype=np.uint8)


class Snapshot:
    """A second snapshot held in memory."""

    def __init__(self, cells: ByteArray) -> None:
        self.cells = cells.reshape(-1)

    @property
    def size(self) -> int:
        return self.cells.size

    def read(self, pa: PhysAddr, length: int) -> ByteArray:
        assert pa + length <= self.size
        return self.cells[pa : pa + length]


def compared(
    first: ByteArray, second: ByteArray, encrypted: list[bool], step: int = 4
) -> Repeats:
    search = RepeatSearch(Snapshot(second))
    for page in range(0, len(first), step):
        flags = np.array(encrypted[page : page + step])
        chunk = first[page : page + step].reshape(-1)
        search.feed(page * PAGE_SIZE, chunk, flags)
    return search.finish()


def counted(*chunks: ByteArray) -> Duplicates:
    search = DuplicateSearch()
    for chunk in chunks:
        search.feed(chunk)
    return search.finish()


def test_equal_blocks_at_different_addresses_are_counted() -> None:
    pages = noise(10)
    pages[7, 32:64] = pages[2, 160:192]  # two blocks
    pages[9, :16] = pages[2, 160:176]  # one of them once more
    pages[4, 8:24] = pages[5, 8:24]  # not aligned: no block
    assert counted(pages) == Duplicates(3, exact=True)
    assert counted(pages[:3], pages[3:8], pages[8:]) == Duplicates(3, exact=True)


def test_blocks_of_zeros_are_no_ciphertext() -> None:
    pages = noise(4)
    pages[:, :64] = 0
    assert counted(pages) == Duplicates(0, exact=True)


def test_nothing_repeats_in_nothing() -> None:
    assert counted() == Duplicates(0, exact=True)
    assert counted(noise(0)) == Duplicates(0, exact=True)


def test_beyond_the_limit_the_count_is_an_estimate_from_a_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snoop_repeats, "SAMPLE_LIMIT", 1 << 14)
    once = noise(256)  # 2**16 blocks, each twice
    found = counted(*np.split(once, 16), *np.split(once, 16))
    assert not found.exact
    assert found.count == pytest.approx(1 << 16, rel=0.1)


def test_unchanged_changed_and_partly_changed_pages_are_told_apart() -> None:
    first = noise(12)
    second = first.copy()
    second[1] = noise(1, seed=2)
    second[2, 16:4000] = noise(1, seed=2)[0, 16:4000]
    second[3] = noise(1, seed=2)
    found = compared(first, second, [True] * 12)
    assert (found.pages, found.unchanged_pages, found.partly_equal_pages) == (12, 9, 1)
    assert found.blocks == 9 * 256 + 1 + 6
    assert found.num_ranges == 4
    assert found.ranges == (
        (0x0, 0x1000),
        (0x2000, 0x2010),
        (0x2FA0, 0x3000),
        (0x4000, 0xC000),
    )


@pytest.mark.parametrize("step", [1, 2, 5, 12])
def test_ranges_do_not_depend_on_the_chunks(step: int) -> None:
    first = noise(12)
    second = first.copy()
    second[5, :16] ^= 1
    found = compared(first, second, [True] * 12, step)
    assert found.ranges == ((0x0, 0x5000), (0x5010, 0xC000))
    assert found.num_ranges == 2


def test_only_encrypted_looking_pages_are_compared() -> None:
    first = noise(4)
    found = compared(first, first, [True, False, False, True])
    assert (found.pages, found.blocks) == (2, 512)
    assert found.ranges == ((0x0, 0x1000), (0x3000, 0x4000))


def test_a_smaller_second_snapshot_is_compared_as_far_as_it_goes() -> None:
    first = noise(8)
    found = compared(first, first[:3], [True] * 8, step=2)
    assert (found.pages, found.unchanged_pages) == (3, 3)


def test_words_of_zeros_do_not_count_as_repeated() -> None:
    first = noise(1)
    first[0, :32] = 0
    assert compared(first, first, [True]).blocks == 254


def test_ranges_beyond_the_limit_are_counted_but_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snoop_repeats, "RANGE_LIMIT", 3)
    first = noise(4)
    second = first.copy()
    second.reshape(-1, 32)[:, :16] ^= 1  # every second block differs
    found = compared(first, second, [True] * 4, step=1)
    assert (found.num_ranges, len(found.ranges)) == (512, 3)
    second = first.copy()
    second[:, 64:80] ^= 1  # ranges that go on across the seams
    found = compared(first, second, [True] * 4, step=1)
    assert found.num_ranges == 5
    assert found.ranges == ((0x0, 0x40), (0x50, 0x1040), (0x1050, 0x2040))
