"""boot/cmdline.py against an obvious model, and the cases that decide about SME."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.boot.cmdline import (
    cmdline_find_option,
    cmdline_find_option_bool,
)
from cbit.hw.errors import CallerError
from cbit.kernel.setup import COMMAND_LINE_SIZE

OPTION = b"mem_encrypt"
BUFFER = 16  # what sme_enable() offers: Linux 6.1.192 mem_encrypt_identity.c

# Few letters, so that options occur; several kinds of blank, a NUL, a byte over 0x7F.
lines = st.lists(
    st.sampled_from(
        [b"a", b"b", b"=", b"a=", b"ab", b" ", b"\t", b"\n", b"\0", b"\xff"]
    ),
    max_size=24,
).map(b"".join)
options = st.sampled_from([b"a", b"ab", b"b", b"aba", b"a=b"])


def seen(line: bytes) -> bytes:
    """Return what the model looks at, with a blank at both ends."""
    text = bytearray()
    for byte in line[:COMMAND_LINE_SIZE]:
        if byte == 0:
            break
        text.append(byte if byte > 0x20 else 0x20)
    return b" " + bytes(text) + b" "


def model(line: bytes, option: bytes, buffer_size: int) -> tuple[int, bytes]:
    """Try every position of the line, one after the other."""
    text, found = seen(line), (-1, b"")
    needle = b" " + option + b"="
    for at in range(len(text)):
        if text[at : at + len(needle)] == needle:
            value = text[at + len(needle) : text.index(b" ", at + len(needle))]
            found = (len(value), value[: max(buffer_size - 1, 0)])
    return found


def model_bool(line: bytes, option: bytes) -> int:
    """Count positions from 1; the blank before the line stands at 0."""
    return seen(line).find(b" " + option + b" ") + 1


@given(lines, options, st.integers(0, 5))
def test_law_the_option_is_found_where_the_model_finds_it(
    line: bytes, option: bytes, buffer_size: int
) -> None:
    expected = model(line, option, buffer_size)
    assert cmdline_find_option(line, option, buffer_size) == expected


@given(lines, options)
def test_law_the_word_is_found_where_the_model_finds_it(
    line: bytes, option: bytes
) -> None:
    assert cmdline_find_option_bool(line, option) == model_bool(line, option)


@pytest.mark.req("LB-9")
@pytest.mark.parametrize(
    ("line", "length", "value"),
    [
        (b"mem_encrypt=on", 2, b"on"),
        (b"quiet mem_encrypt=on splash", 2, b"on"),
        (b"mem_encrypt=only", 4, b"only"),
        (b"mem_encrypt=on1", 3, b"on1"),
        (b"mem_encrypt=ON", 2, b"ON"),
        (b"mem_encrypt=on,off", 6, b"on,off"),
        (b"mem_encrypt=off", 3, b"off"),
        (b"mem_encrypt=on mem_encrypt=off", 3, b"off"),
        (b"mem_encrypt=off mem_encrypt=on", 2, b"on"),
        (b"mem_encrypt=on mem_encrypt", 2, b"on"),
        (b"mem_encrypt=on mem_encrypt=", 0, b""),
        (b"mem_encrypt=on -- mem_encrypt=off", 3, b"off"),
        (b"\tmem_encrypt=on\tquiet", 2, b"on"),
        (b"quiet\x01mem_encrypt=on\x1fquiet", 2, b"on"),
        (b"mem_encrypt=on\0mem_encrypt=off", 2, b"on"),
        (b'mem_encrypt="on"', 4, b'"on"'),
        (b'x="a mem_encrypt=on b"', 2, b"on"),
        (b"mem_encrypt==on", 3, b"=on"),
    ],
)
def test_a_value_is_the_rest_of_the_last_word_that_matches(
    line: bytes, length: int, value: bytes
) -> None:
    assert cmdline_find_option(line, OPTION, BUFFER) == (length, value)


@pytest.mark.req("LB-9")
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"mem_encrypt",
        b"mem_encrypt =on",
        b"xmem_encrypt=on",
        b"mem_encryptx=on",
        b"mem-encrypt=on",
        b"Mem_encrypt=on",
        b"x=mem_encrypt=on",
        b'"mem_encrypt=on"',
        b"\0mem_encrypt=on",
        b"mem_encryp\0t=on",
    ],
)
def test_no_other_word_is_taken_for_the_option(line: bytes) -> None:
    assert cmdline_find_option(line, OPTION, BUFFER) == (-1, b"")


@pytest.mark.parametrize(
    ("buffer_size", "stored"),
    [
        (0, b""),
        (1, b""),
        (2, b"o"),
        (3, b"on"),
        (4, b"onl"),
        (5, b"only"),
        (6, b"only"),
    ],
)
def test_a_small_buffer_cuts_the_value_but_not_its_length(
    buffer_size: int, stored: bytes
) -> None:
    assert cmdline_find_option(b"a=only", b"a", buffer_size) == (4, stored)


def test_a_negative_buffer_is_refused() -> None:
    with pytest.raises(CallerError, match="-1"):
        cmdline_find_option(b"a=b", b"a", -1)


@pytest.mark.parametrize(
    ("beyond", "expected"),
    [(0, (2, b"on")), (1, (1, b"o")), (2, (0, b"")), (3, (-1, b"")), (4, (-1, b""))],
)
def test_nothing_counts_behind_2048_bytes(
    beyond: int, expected: tuple[int, bytes]
) -> None:
    line = b"a=on".rjust(COMMAND_LINE_SIZE + beyond)
    assert cmdline_find_option(line, b"a", BUFFER) == expected


@pytest.mark.parametrize(
    ("line", "position"),
    [
        (b"quiet", 1),
        (b"  quiet", 3),
        (b"a quiet quiet", 3),
        (b"quiet=1", 0),
        (b"quieter", 0),
        (b"qui et", 0),
        (b"a\0quiet", 0),
        (b"", 0),
    ],
)
def test_a_word_is_found_whole_and_the_first_one_counts(
    line: bytes, position: int
) -> None:
    assert cmdline_find_option_bool(line, b"quiet") == position


def test_a_word_whose_end_is_not_seen_is_not_found() -> None:
    # Linux leaves the loop at COMMAND_LINE_SIZE before it sees what ends the word.
    room = COMMAND_LINE_SIZE - len(b"quiet")
    assert cmdline_find_option_bool(b" " * (room - 1) + b"quiet", b"quiet") == room
    assert cmdline_find_option_bool(b" " * room + b"quiet", b"quiet") == 0
