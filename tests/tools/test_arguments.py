"""tools/arguments.py: integers in any base, sizes with units, and what is neither."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.tools.arguments import INTEGER, SIZE


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("23", 23),
        ("0x17", 23),
        ("0b1_0111", 23),
        ("0o27", 23),
        ("-5", -5),
        ("0", 0),
        ("1_000", 1000),
        ("0xC001_0010", 0xC001_0010),
    ],
)
def test_integers_are_written_as_in_python(text: str, value: int) -> None:
    assert INTEGER.convert(text, None, None) == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "0x", "010", "1__0", "_", "12K"])
def test_what_is_no_integer_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        INTEGER.convert(text, None, None)
    assert f"{text!r} is no integer, expected 23 or 0x17" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("0", 0),
        ("256M", 256 << 20),
        ("256m", 256 << 20),
        ("256MB", 256 << 20),
        ("256MiB", 256 << 20),
        ("256 MiB", 256 << 20),
        ("64G", 64 << 30),
        ("1T", 1 << 40),
        ("12k", 12 << 10),
        ("0x4000_0000", 1 << 30),
        ("0X10M", 16 << 20),
        ("1_024K", 1 << 20),
        ("100B", 100),
    ],
)
def test_sizes_have_units_of_1024(text: str, value: int) -> None:
    assert SIZE.convert(text, None, None) == value


@pytest.mark.parametrize(
    "text",
    ["", "M", "x", "1.5G", "-1", "1P", "010", "_", "1__0K", "0x", "0x_", "1 2M", "1MM"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        SIZE.convert(text, None, None)
    assert f"{text!r} is no size, expected 256M or 4G" in str(caught.value)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_misuse(text: str) -> None:
    for kind in (INTEGER, SIZE):
        try:
            assert isinstance(kind.convert(text, None, None), int)
        except click.BadParameter:
            continue


def test_numbers_pass_as_they_are() -> None:
    assert INTEGER.convert(7, None, None) == SIZE.convert(7, None, None) == 7
