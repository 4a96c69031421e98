"""Options on the kernel command line, as early boot looks them up.

The early functions know words and nothing else: no quotes, no escapes, no aliases. A
word ends at any byte up to a space, the line ends at a NUL or after
`COMMAND_LINE_SIZE` bytes.
"""

from __future__ import annotations

import re

from ..hw.errors import CallerError
from ..kernel.setup import COMMAND_LINE_SIZE

_WORD = re.compile(rb"[^\x00-\x20]+")


def cmdline_find_option(
    cmdline: bytes, option: bytes, buffer_size: int
) -> tuple[int, bytes]:
    """Find `option=value` on a command line; the last one counts.

    The value is what Linux leaves in the caller's buffer before the NUL, cut where the
    buffer is too small; the length is that of the whole value. A caller that compares
    the buffer alone therefore sees a prefix of a long value.

    Args:
        cmdline: the bytes at the command line pointer; a missing NUL is implied.
        option: the name without "=".
        buffer_size: bytes of the caller's buffer, NUL included; 0 stores nothing.

    Returns:
        Length of the value and at most `buffer_size - 1` bytes of it; (-1, b"") if no
        word is this option with a "=".

    Raises:
        CallerError: `buffer_size` is negative.

    Source: Linux 6.1.192 arch/x86/lib/cmdline.c.
    """
    if buffer_size < 0:
        raise CallerError(f"a buffer of 0 or more bytes, got {buffer_size}")
    prefix = option + b"="
    for word in reversed(_WORD.findall(_line(cmdline))):
        if word.startswith(prefix):
            value = word[len(prefix) :]
            return len(value), value[: max(buffer_size - 1, 0)]
    return -1, b""


def cmdline_find_option_bool(cmdline: bytes, option: bytes) -> int:
    """Find a word that is exactly `option`; the first one counts.

    Args:
        cmdline: the bytes at the command line pointer; a missing NUL is implied.
        option: the whole word.

    Returns:
        Position of the word, counted from 1, or 0 if there is none. A word that
        `COMMAND_LINE_SIZE` cuts off is not found: its end was not seen.

    Source: Linux 6.1.192 arch/x86/lib/cmdline.c.
    """
    for word in _WORD.finditer(_line(cmdline)):
        if word[0] == option and word.end() < COMMAND_LINE_SIZE:
            return word.start() + 1
    return 0


def _line(cmdline: bytes) -> bytes:
    """Return the part of the command line that is ever looked at."""
    return cmdline[:COMMAND_LINE_SIZE].partition(b"\0")[0]
