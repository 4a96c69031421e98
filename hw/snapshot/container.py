"""The snapshot file, and how it is written: a JSON header, then compressed pieces.

    offset 0     "CBITSNAP"
           8     version, u32
          12     length of the header, u32
          16     header, JSON in UTF-8; "sections" lists [name, length] in order
                 SHA-256 of everything so far
    then, for every 4 MiB of every section, the last piece shorter:
                 length of the compressed piece, u32
                 the piece, one Zstandard frame (RFC 8878)
                 SHA-256 of the digest before, the length and the frame

Numbers are little-endian. A digest covers the one before it, so that no piece can be
changed, dropped, repeated or moved. Nothing follows the last piece. Digests find
damage; they are no signature: whoever writes a file can write a fitting one.

Source: none; the format is this project's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from struct import Struct
from typing import BinaryIO, NamedTuple

import numpy as np
import zstandard

from ..arrays import Bytes
from ..errors import CallerError

MAGIC = b"CBITSNAP"
VERSION = 1

PIECE_BYTES = 4 << 20
"""How much of a section is compressed at once, and what a reader holds at most."""

MAX_PIECE = PIECE_BYTES + (PIECE_BYTES >> 7)
"""Zstandard adds less to what it cannot compress."""

MAX_HEADER = 64 << 20
LEVEL = 1
THREADS = min(2, os.cpu_count() or 1)
DIGEST_SIZE = 32

START = Struct("<8sII")
LENGTH = Struct("<I")


class Section(NamedTuple):
    """Bytes to be written: `part(start, end)` gives them, a piece at a time."""

    name: str
    length: int
    part: Callable[[int, int], Bytes]


def array_section(name: str, array: np.ndarray) -> Section:
    """Return a section that holds an array's bytes, little-endian."""
    order = array.dtype.newbyteorder("<")
    data = np.ascontiguousarray(array, order).view(np.uint8).reshape(-1)
    return Section(name, data.size, lambda start, end: data[start:end])


def encode_header(facts: Mapping[str, object], sections: list[Section]) -> bytes:
    """Return the header's bytes, the same for the same facts.

    Raises:
        CallerError: a fact is not JSON, a key is no string, or all is too long.
    """
    table = [[section.name, section.length] for section in sections]
    whole = {**facts, "sections": table}
    try:
        _check_keys(whole)
        text = json.dumps(
            whole, sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CallerError(f"snapshot: JSON expected, {error}") from None
    if len(text) > MAX_HEADER:
        raise CallerError(
            f"snapshot: header of {len(text):#x} bytes, up to {MAX_HEADER:#x} expected"
        )
    return text


def _check_keys(value: object) -> None:
    """Refuse keys that JSON would make strings of without a word."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {key!r}, no string")
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for inner in value:
        _check_keys(inner)


def write_container(file: BinaryIO, header: bytes, sections: list[Section]) -> None:
    """Write a snapshot file; `header` comes from `encode_header`."""
    start = START.pack(MAGIC, VERSION, len(header)) + header
    digest = hashlib.sha256(start).digest()
    file.write(start + digest)
    for frame in _frames(sections):
        length = LENGTH.pack(len(frame))
        digest = hashlib.sha256(digest + length + frame).digest()
        file.write(length)
        file.write(frame)
        file.write(digest)


def _frames(sections: list[Section]) -> Iterator[bytes]:
    """Yield the compressed pieces in order, while the next ones are in the making."""
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(THREADS, "cbit-snapshot") as pool:
        for section in sections:
            for first in range(0, section.length, PIECE_BYTES):
                waiting.append(pool.submit(_compress, section, first))
                if len(waiting) > THREADS:
                    yield waiting.popleft().result()
        for last in waiting:
            yield last.result()


def _compress(section: Section, first: int) -> bytes:
    part = section.part(first, min(first + PIECE_BYTES, section.length))
    return zstandard.ZstdCompressor(level=LEVEL).compress(part.data)
