"""Strings and given bytes are found wherever chunks and extents are cut."""

import re
from itertools import pairwise

import numpy as np
import pytest

from cbit.hw.errors import CallerError
from cbit.tools.dram_file import ByteArray
from cbit.tools.snoop_strings import (
    TEXT_LIMIT,
    ByteSearch,
    FoundStrings,
    StringSearch,
    strings_by_chance,
)


def cells(content: bytes) -> ByteArray:
    return np.frombuffer(content, np.uint8)


def strings_of(
    *chunks: tuple[int, bytes], min_length: int = 8, limit: int = 100
) -> FoundStrings:
    search = StringSearch(min_length, limit)
    for address, chunk in chunks:
        search.feed(address, cells(chunk))
    return search.finish()


def places(found: FoundStrings) -> list[tuple[int, str]]:
    return sorted((one.address, one.text) for one in found.shown)


def test_strings_are_found_with_their_address() -> None:
    found = strings_of((0x1000, b"\0\0Linux version\0short\0a longer one\xff"))
    assert found.count == 2
    assert places(found) == [(0x1002, "Linux version"), (0x1016, "a longer one")]


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_string_across_a_seam_is_one_string(cut: int) -> None:
    content = b"\0\0\0across the seam\0"
    found = strings_of((0, content[:cut]), (cut, content[cut:]))
    assert (found.count, places(found)) == (1, [(3, "across the seam")])


def test_a_hole_between_extents_ends_a_string() -> None:
    found = strings_of((0, b"\0half a string"), (0x1000, b"and the rest\0"))
    assert places(found) == [(1, "half a string"), (0x1000, "and the rest")]


def test_a_string_over_many_chunks_keeps_its_length_and_its_start() -> None:
    found = strings_of(*[(i * 1000, b"abcdefghij" * 100) for i in range(50)])
    assert found.count == 1
    (one,) = found.shown
    assert (one.address, one.length) == (0, 50_000)
    assert one.text == ("abcdefghij" * 100)[:TEXT_LIMIT]


def test_printable_means_0x20_to_0x7e() -> None:
    for value in range(256):
        found = strings_of((0, b"\n" + bytes([value]) * 8 + b"\n"))
        assert found.count == (0x20 <= value <= 0x7E)


@pytest.mark.parametrize("min_length", [1, 2, 3, 5, 8, 13, 64])
def test_law_the_same_strings_as_a_regular_expression(min_length: int) -> None:
    pattern = re.compile(rb"[\x20-\x7e]{%d,}" % min_length)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        content = rng.choice(
            np.array([0, 9, 0x41, 0x7E, 0x20], np.uint8),
            4000,
            p=[0.05, 0.02, 0.5, 0.03, 0.4],
        ).tobytes()
        cuts = [0, *sorted(rng.integers(0, 4000, 9).tolist()), 4000]
        chunks = [
            (start, content[start:end]) for start, end in pairwise(cuts) if start < end
        ]
        expected = list(pattern.finditer(content))
        found = strings_of(*chunks, min_length=min_length, limit=5000)
        assert found.count == len(expected)
        texts = {match[0][:TEXT_LIMIT].decode() for match in expected}
        assert {one.text for one in found.shown} == texts
        lengths = {match.start(): len(match[0]) for match in expected}
        assert all(lengths[one.address] == one.length for one in found.shown)


def test_words_come_before_noise_and_equal_texts_once() -> None:
    noise = b"".join(b"0x%08x#%%&*\0" % i for i in range(3000))
    prose = b"The quick brown fox jumps over the lazy dog\0Copyright holders\0"
    found = strings_of((0, noise + prose + noise + prose), limit=3)
    assert found.count == 6004
    assert [one.text for one in found.shown][:2] == [
        "The quick brown fox jumps over the lazy dog",
        "Copyright holders",
    ]
    assert found.shown[0].address == len(noise)
    assert len(found.shown) == 3


def test_nothing_is_shown_if_nothing_is_asked_for() -> None:
    found = strings_of((0, b"\0something to see\0"), limit=0)
    assert (found.count, found.shown) == (1, ())


def test_random_bytes_hold_as_many_strings_as_chance_says() -> None:
    content = np.random.default_rng(1).integers(0, 256, 1 << 23, dtype=np.uint8)
    found = strings_of((0, content.tobytes()), limit=0)
    expected = strings_by_chance(1 << 23, 8)
    assert abs(found.count - expected) < 5 * expected**0.5


def test_bytes_are_found_across_seams_and_only_once() -> None:
    content = b"...swordfish..swordfish"
    for cut in range(1, len(content)):
        for second in range(cut, len(content) + 1):
            search = ByteSearch((b"swordfish", b"."))
            for start, end in ((0, cut), (cut, second), (second, len(content))):
                if start < end:
                    search.feed(start, cells(content[start:end]))
            assert search.finish() == {
                b"swordfish": [3, 14],
                b".": [0, 1, 2, 12, 13],
            }


def test_bytes_longer_than_several_chunks_are_found() -> None:
    needle = bytes(range(1, 256)) * 40
    content = b"x" * 777 + needle + b"y" * 777
    search = ByteSearch((needle, b"xx\1"))
    for start in range(0, len(content), 100):
        search.feed(0x5000 + start, cells(content[start : start + 100]))
    assert search.finish() == {needle: [0x5000 + 777], b"xx\1": [0x5000 + 775]}


def test_bytes_on_both_sides_of_a_hole_are_not_joined() -> None:
    search = ByteSearch((b"swordfish",))
    search.feed(0, cells(b"..sword"))
    search.feed(0x1000, cells(b"fish..."))
    assert search.finish() == {b"swordfish": []}


def test_overlapping_occurrences_are_all_found() -> None:
    search = ByteSearch((b"aa",))
    search.feed(0, cells(b"aaa"))
    search.feed(3, cells(b"a"))
    assert search.finish() == {b"aa": [0, 1, 2]}


@pytest.mark.parametrize("needle", [b"", b"with\0zero"])
def test_bytes_that_a_hole_could_hide_are_refused(needle: bytes) -> None:
    with pytest.raises(CallerError, match="to find"):
        ByteSearch((needle,))


def test_a_minimum_below_one_is_refused() -> None:
    with pytest.raises(CallerError, match="expected 1 or more"):
        StringSearch(0, 1)
