"""Reading a snapshot file from front to back, believing nothing.

What a length claims is compared with what can be before anything of that size is read
or allocated; what a digest covers is not looked at before the digest fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import BinaryIO, NoReturn

import numpy as np
import zstandard

from ..arrays import Bytes
from ..errors import InputError
from .container import (
    DIGEST_SIZE,
    LENGTH,
    MAGIC,
    MAX_HEADER,
    MAX_PIECE,
    PIECE_BYTES,
    START,
    VERSION,
)
from .facts import Facts


class ContainerReader:
    """Reads a snapshot file from front to back.

    Args:
        file: at the file's first byte; need not be seekable.
        name: what error messages call it.

    Attributes:
        facts: the header.
        offset: how many bytes were read.

    Raises:
        InputError: not a snapshot, from a newer version, damaged or cut short; with
            the offset. So do all methods.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.offset = 0
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_PIECE)
        start = self._read(START.size, "start of a snapshot", magic=MAGIC)
        _, version, length = START.unpack(start)
        if not 1 <= version <= VERSION:
            self._refuse(8, f"version {version}, this program reads 1 to {VERSION}")
        if length > MAX_HEADER:
            self._refuse(
                12, f"header of {length:#x} bytes, up to {MAX_HEADER:#x} expected"
            )
        header = self._read(length, "header")
        self._digest = b""
        self._check(start + header, START.size, "header")
        self.facts = Facts(
            self._parse(header), f"{name}: offset {START.size:#x}: header"
        )
        self._table = self._read_table()

    def section(self, name: str, most: int) -> Iterator[Bytes]:
        """Yield the pieces of the next section.

        Args:
            name: what it must be.
            most: bytes that it may have.
        """
        length = self.next_length(name, most)
        del self._table[0]
        for first in range(0, length, PIECE_BYTES):
            yield self._piece(name, min(PIECE_BYTES, length - first))

    def next_length(self, name: str, most: int) -> int:
        """Return the length of the next section, in bytes; arguments as `section`."""
        found, length = self._table[0] if self._table else ("the end", 0)
        if found != name:
            self._refuse(
                self.offset, f"section {name!r} expected, the header says {found!r}"
            )
        if length > most:
            self._refuse(
                self.offset,
                f"section {name!r} of {length:#x} bytes, up to {most:#x} expected",
            )
        return length

    def array(self, name: str, dtype: np.dtype, most: int) -> np.ndarray:
        """Return the next section as an array of up to `most` items."""
        length = self.next_length(name, most * dtype.itemsize)
        if length % dtype.itemsize:
            self._refuse(
                self.offset,
                f"section {name!r} of {length:#x} bytes, a multiple of "
                f"{dtype.itemsize} expected",
            )
        # What the file does not deliver is never allocated.
        pieces = list(self.section(name, length))
        data = np.concatenate(pieces) if pieces else np.empty(0, np.uint8)
        return data.view(dtype.newbyteorder("<")).astype(dtype)

    def finish(self) -> None:
        """See that nothing is left."""
        if self._table:
            self._refuse(self.offset, f"section {self._table[0][0]!r} is unknown")
        if self._file.read(1):
            self._refuse(self.offset, "end of file expected, more bytes follow")

    def _piece(self, name: str, length: int) -> Bytes:
        start = self.offset
        what = f"section {name!r}"
        prefix = self._read(LENGTH.size, what)
        (size,) = LENGTH.unpack(prefix)
        if not 0 < size <= MAX_PIECE:
            self._refuse(
                start, f"{what}: piece of {size:#x} bytes, 1 to {MAX_PIECE:#x} expected"
            )
        frame = self._read(size, what)
        self._check(prefix + frame, start, what)
        expected = f"{what}: one Zstandard frame of {length:#x} bytes expected"
        try:
            # The frame's own word for its length decides what would be allocated.
            if zstandard.frame_content_size(frame) != length:
                self._refuse(start, expected)
            data = self._decompressor.decompress(
                frame, max_output_size=length, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            self._refuse(start, f"{expected}, {error}")
        if len(data) != length:
            self._refuse(start, expected)
        return np.frombuffer(data, np.uint8)

    def _check(self, covered: bytes, start: int, what: str) -> None:
        """Compare the digest that follows with that of `covered`."""
        digest = hashlib.sha256(self._digest + covered).digest()
        if self._read(DIGEST_SIZE, f"digest of {what}") != digest:
            self._refuse(start, f"{what}: SHA-256 {digest.hex()} expected; damaged")
        self._digest = digest

    def _read(self, length: int, what: str, magic: bytes = b"") -> bytes:
        parts: list[bytes] = []
        missing = length
        while missing:
            part = self._file.read(missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        if magic and data[: len(magic)] != magic:
            self._refuse(
                0, f"not a snapshot, {magic!r} expected, got {data[: len(magic)]!r}"
            )
        if missing:
            self._refuse(
                self.offset + len(data),
                f"cut short, {missing:#x} bytes more expected ({what})",
            )
        self.offset += length
        return data

    def _parse(self, header: bytes) -> dict[str, object]:
        try:
            values = json.loads(header)
        except (ValueError, RecursionError) as error:
            self._refuse(START.size, f"header: JSON expected, {error}")
        if not isinstance(values, dict):
            self._refuse(START.size, "header: a JSON object expected")
        return values

    def _read_table(self) -> list[tuple[str, int]]:
        table = []
        for entry in self.facts.entries("sections"):
            match entry:
                case [str(name), int(length)] if 0 <= length < 1 << 63:
                    table.append((name, length))
                case _:
                    self._refuse(
                        START.size, "header, sections: [name, length] expected"
                    )
        return table

    def _refuse(self, offset: int, reason: str) -> NoReturn:
        raise InputError(f"{self._name}: offset {offset:#x}: {reason}")
