"""hw/layouts.py: declared by offset, nothing lost, mistakes raise at import."""

import pytest
from construct import Array, Bytes, Int8ul, Int16ul, Int32ul
from hypothesis import given
from hypothesis import strategies as st

from cbit.hw.errors import CallerError
from cbit.hw.layouts import layout

RECORD = layout(
    16,
    (0x02, "small", Int8ul),
    (0x04, "wide", Int32ul),
    (0x08, "pair", Array(2, Int16ul)),
)


@given(st.binary(min_size=16, max_size=16))
def test_law_building_what_was_parsed_gives_the_same_bytes(page: bytes) -> None:
    assert RECORD.build(RECORD.parse(page)) == page


def test_a_field_lies_at_its_offset_in_little_endian() -> None:
    values = RECORD.parse(bytes(range(16)))
    assert values["small"] == 2
    assert values["wide"] == 0x0706_0504
    assert values["pair"] == [0x0908, 0x0B0A]


def test_every_byte_belongs_to_a_field_or_a_reserved_run() -> None:
    assert RECORD.offsets == {
        "reserved_000": 0,
        "small": 2,
        "reserved_003": 3,
        "wide": 4,
        "pair": 8,
        "reserved_00c": 12,
    }


def test_a_reserved_run_that_is_left_out_is_zero() -> None:
    built = RECORD.build({"small": 1, "wide": 2, "pair": [3, 4]})
    assert built.hex(" ", 4) == "00000100 02000000 03000400 00000000"


@given(st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF_FFFF))
def test_put_changes_one_field_and_get_reads_it(page: bytes, value: int) -> None:
    changed = bytearray(page)
    RECORD.put(changed, "wide", value)
    assert RECORD.get(changed, "wide") == value
    assert changed[:4] + changed[8:] == page[:4] + page[8:]


def test_get_reads_from_a_view_without_its_owner() -> None:
    assert RECORD.get(memoryview(bytes(range(32)))[16:], "small") == 18


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ([(0, "a", Int32ul), (3, "b", Int8ul)], "b at 0x3 overlaps"),
        ([(4, "a", Int8ul), (0, "b", Int8ul)], "b at 0x0 overlaps"),
        ([(0, "a", Int8ul), (1, "a", Int8ul)], "a is declared twice"),
        ([(7, "a", Int16ul)], "beyond the 0x8"),
        ([(0, "a", Bytes(9))], "beyond the 0x8"),
    ],
)
def test_a_wrong_declaration_raises(
    fields: list[tuple[int, str, object]], fact: str
) -> None:
    with pytest.raises(TypeError, match=fact):
        layout(8, *fields)


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_page_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(CallerError, match="16 bytes"):
        RECORD.parse(bytes(length))


@pytest.mark.parametrize("value", [-1, 1 << 32, "x", None])
def test_a_value_that_does_not_fit_is_refused(value: object) -> None:
    with pytest.raises(CallerError):
        RECORD.build({"small": 1, "wide": value, "pair": [3, 4]})
    page = bytearray(16)
    with pytest.raises(CallerError, match="wide"):
        RECORD.put(page, "wide", value)
    assert page == bytes(16)


def test_a_missing_or_unknown_field_is_refused() -> None:
    with pytest.raises(CallerError):
        RECORD.build({"small": 1})
    with pytest.raises(CallerError, match="no field 'widest'"):
        RECORD.get(bytes(16), "widest")
