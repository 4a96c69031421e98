"""Decompress the payload of a bzImage: six formats, told apart by their first bytes.

The kernel's build puts the length of the plain bytes into the last four bytes of the
payload (gzip has it there anyway). So the output is allocated once, at its size, and
a stream that would grow beyond it is refused while it grows.

Source: Linux 6.1.192 scripts/Makefile.lib, size_append; lib/decompress*.c.
"""

from __future__ import annotations

import bz2
import lzma
import mmap
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ...hw.types import PAGE_SIZE
from .source import ImageSource

INPUT_STEP = 4096
"""Bytes fed at once: no format makes more than some 100 MiB of them."""

LZMA_MEMORY_LIMIT = 256 << 20
"""The kernel's build asks for dictionaries of at most 32 MiB."""

LZ4_BLOCK_SIZE = 8 << 20
"""Most that one block of the legacy format holds. Source: lz4_Frame_format.md."""

ZERO_PAGE = bytes(PAGE_SIZE)


class Corrupt(Exception):
    """The compressed stream is wrong; the message says how."""


class Output:
    """Plain bytes in one private mapping; runs of zeros are never written.

    A kernel has megabytes of them, in .bss and between its sections: pages that then
    take no memory.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._view = memoryview(mmap.mmap(-1, size, flags=flags))

    def append(self, chunk: bytes) -> None:
        """Add `chunk` behind what is there.

        Raises:
            Corrupt: there would be more than `size` bytes.
        """
        if len(chunk) > self.size - self.length:
            raise Corrupt(f"more than the {self.size:#x} bytes that its end promises")
        chunk_view = memoryview(chunk)
        copied = 0
        for at in range(0, len(chunk) - PAGE_SIZE + 1, PAGE_SIZE):
            if chunk.startswith(ZERO_PAGE, at):
                self._copy(chunk_view, copied, at)
                copied = at + PAGE_SIZE
        self._copy(chunk_view, copied, len(chunk))
        self.length += len(chunk)

    def _copy(self, chunk: memoryview, start: int, end: int) -> None:
        self._view[self.length + start : self.length + end] = chunk[start:end]

    def finish(self) -> memoryview:
        """Return a read-only view of the bytes.

        Raises:
            Corrupt: there are fewer than `size`.
        """
        if self.length != self.size:
            raise Corrupt(
                f"{self.length:#x} bytes, not the {self.size:#x} that its end promises"
            )
        return self._view.toreadonly()


class Decompressor(Protocol):
    """What the incremental decompressors of the standard library share."""

    def decompress(self, data: bytes, /) -> bytes:
        """Take the next compressed bytes, return plain ones."""

    @property
    def eof(self) -> bool:
        """Say whether the end of the stream was seen and verified."""

    @property
    def unused_data(self) -> bytes:
        """Return what followed the end of the stream."""


def decompress(
    source: ImageSource, offset: int, length: int, limit: int
) -> tuple[ImageSource, str]:
    """Return the plain bytes of a payload and the name of its format.

    Args:
        source: the file.
        offset: of the payload in the file.
        length: of the payload, in bytes.
        limit: most plain bytes to accept.

    Returns:
        The plain bytes as a source of their own, and "gzip", "bzip2", "lzma", "xz",
        "lz4", "zstd", or "none" for a payload that is an ELF file already.

    Raises:
        InputError: the format is none of these, the stream is corrupt or cut, its
            size is not the promised one or is over the limit.
    """
    payload = source.take(offset, length, "the payload")
    name = f"{source.name} (decompressed)"
    chosen = next((f for f in FORMATS if payload[: len(f.magic)] == f.magic), None)
    if chosen is None:
        found = bytes(payload[:6]).hex(" ")
        names = ", ".join(f.name for f in FORMATS)
        raise source.error(offset, f"payload begins {found}; expected {names}")
    if chosen.read is None:
        return ImageSource(name, payload), chosen.name

    size = source.number(offset + length - 4, 4, "the decompressed size")
    if not 0 < size <= limit:
        raise source.error(
            offset + length - 4,
            f"decompressed size {size:#x}; expected 1 to {limit:#x} bytes",
        )
    stream = payload if chosen.keeps_size else payload[:-4]
    try:
        plain = chosen.read(stream, size)
    except Corrupt as wrong:
        raise source.error(offset, f"{chosen.name} stream: {wrong}") from wrong
    return ImageSource(name, plain), chosen.name


def _read_stream(
    decompressor: Decompressor, stream: memoryview, size: int
) -> memoryview:
    output = Output(size)
    for at in range(0, len(stream), INPUT_STEP):
        if decompressor.eof:
            raise Corrupt(f"ends at {at:#x}, {len(stream) - at:#x} bytes too early")
        try:
            chunk = decompressor.decompress(bytes(stream[at : at + INPUT_STEP]))
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as wrong:
            raise Corrupt(f"bad before {at + INPUT_STEP:#x}: {wrong}") from wrong
        output.append(chunk)
    if not decompressor.eof:
        raise Corrupt(f"cut off at {len(stream):#x}")
    if decompressor.unused_data:
        raise Corrupt(f"ends {len(decompressor.unused_data):#x} bytes too early")
    return output.finish()


def _read_gzip(stream: memoryview, size: int) -> memoryview:
    return _read_stream(zlib.decompressobj(16 + zlib.MAX_WBITS), stream, size)


def _read_bzip2(stream: memoryview, size: int) -> memoryview:
    return _read_stream(bz2.BZ2Decompressor(), stream, size)


def _read_lzma(stream: memoryview, size: int) -> memoryview:
    plain = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY_LIMIT)
    return _read_stream(plain, stream, size)


def _read_xz(stream: memoryview, size: int) -> memoryview:
    plain = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_LIMIT)
    return _read_stream(plain, stream, size)


def _read_lz4(stream: memoryview, size: int) -> memoryview:
    """Read the legacy frame: magic, then blocks, each with its length before it."""
    from lz4.block import LZ4BlockError
    from lz4.block import decompress as read_block

    output = Output(size)
    at = len(LZ4_MAGIC)
    while at < len(stream):
        length = int.from_bytes(stream[at : at + 4], "little")
        block = stream[at + 4 : at + 4 + length]
        if stream[at : at + 4] == LZ4_MAGIC:  # another frame
            at += 4
            continue
        if not 0 < length == len(block):
            raise Corrupt(f"block of {length:#x} bytes at {at:#x}, got {len(block):#x}")
        room = min(LZ4_BLOCK_SIZE, size - output.length)
        try:
            output.append(read_block(block, uncompressed_size=room))
        except (LZ4BlockError, ValueError, OverflowError) as wrong:
            raise Corrupt(
                f"bad block at {at:#x}, or more bytes than its end promises"
            ) from wrong
        at += 4 + length
    return output.finish()


def _read_zstd(stream: memoryview, size: int) -> memoryview:
    """Read one frame in one call: the library needs no window of its own for that."""
    import zstandard

    try:
        promised = zstandard.frame_content_size(stream)
        if promised not in (-1, size):
            raise Corrupt(f"frame of {promised:#x} bytes, its end promises {size:#x}")
        plain = zstandard.ZstdDecompressor().decompress(
            stream, max_output_size=size, allow_extra_data=False
        )
    except (zstandard.ZstdError, ValueError) as wrong:
        raise Corrupt(str(wrong)) from wrong
    if len(plain) != size:
        raise Corrupt(f"{len(plain):#x} bytes, its end promises {size:#x}")
    return memoryview(plain)


class Format(NamedTuple):
    """A compression the kernel's build knows.

    Attributes:
        name: as messages print it.
        magic: first bytes of a stream.
        read: from stream and plain size to the plain bytes; None: they are plain.
        keeps_size: the last four bytes belong to the stream itself.
    """

    name: str
    magic: bytes
    read: Callable[[memoryview, int], memoryview] | None
    keeps_size: bool = False


LZ4_MAGIC = b"\x02\x21\x4c\x18"
FORMATS = (
    Format("gzip", b"\x1f\x8b", _read_gzip, keeps_size=True),
    Format("bzip2", b"BZh", _read_bzip2),
    Format("lzma", b"\x5d\x00\x00", _read_lzma),
    Format("xz", b"\xfd7zXZ\x00", _read_xz),
    Format("lz4", LZ4_MAGIC, _read_lz4),
    Format("zstd", b"\x28\xb5\x2f\xfd", _read_zstd),
    Format("none", b"\x7fELF", None),
)
