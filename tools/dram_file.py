"""DRAM dump files: raw and sparse, file offset = physical address.

The length of the file is the end of RAM, often 64 GiB with a few MiB really present.
What was never written is a hole of the file and is never read.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeAlias

import numpy as np

from ..hw.arrays import Bytes
from ..hw.errors import CallerError, InputError
from ..hw.types import PAGE_SIZE, PhysAddr, align_down, align_up
from .output_file import output_file

ByteArray: TypeAlias = Bytes

Extent: TypeAlias = "tuple[int, ByteArray]"
"""A physical address and the bytes stored from there on."""

CHUNK_SIZE = 1 << 20
"""Bytes looked at in one go: enough for numpy, few enough for the L2 cache."""


class DramImage(Protocol):
    """The cells of a machine as a probe reads them."""

    @property
    def size(self) -> int:
        """End of RAM in bytes, a multiple of 4096."""

    def extents(self) -> Iterable[Extent]:
        """Yield what may be non-zero: whole pages, ascending, without overlap."""


def page_chunks(size: int, extents: Iterable[Extent]) -> Iterator[Extent]:
    """Cut extents into contiguous chunks of at most `CHUNK_SIZE` bytes.

    Args:
        size: end of RAM in bytes.
        extents: runs of whole pages, ascending, without overlap.

    Returns:
        The same bytes, each chunk a whole number of pages.

    Raises:
        CallerError: a run is not made of whole pages, or stands out of order, or
            reaches beyond `size`.
    """
    end = 0
    for address, cells in extents:
        if address % PAGE_SIZE or cells.size % PAGE_SIZE:
            raise CallerError(
                f"extent of {cells.size:#x} bytes at {address:#x}: "
                f"expected whole pages of {PAGE_SIZE:#x}"
            )
        if address < end or address + cells.size > size:
            raise CallerError(
                f"extent of {cells.size:#x} bytes at {address:#x}: expected one "
                f"within {end:#x}..{size:#x}"
            )
        end = address + cells.size
        for first in range(0, cells.size, CHUNK_SIZE):
            chunk = cells[first : first + CHUNK_SIZE]
            yield address + first, np.ascontiguousarray(chunk)


def write_dram_file(path: Path | str, size: int, extents: Iterable[Extent]) -> None:
    """Write a dump, whole or not at all; pages of zeros become holes.

    Args:
        path: the file to write or replace.
        size: end of RAM in bytes, a multiple of 4096; the length of the file.
        extents: runs of whole pages, ascending, without overlap.

    Raises:
        CallerError: `size` or an extent is not made of whole pages, or out of order.
        OSError: the file cannot be written.
    """
    if size % PAGE_SIZE:
        raise CallerError(f"size {size:#x}: expected a multiple of {PAGE_SIZE:#x}")
    with output_file(path) as file:
        for address, chunk in page_chunks(size, extents):
            for first, end in _nonzero_runs(chunk):
                file.seek(address + first)
                file.write(chunk[first:end].data)
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.truncate(size)


def _nonzero_runs(chunk: ByteArray) -> list[tuple[int, int]]:
    """Return the byte ranges of the chunk whose pages are not all zero."""
    present = chunk.reshape(-1, PAGE_SIZE).view(np.uint64).any(axis=1)
    edges = np.flatnonzero(np.diff(present, prepend=False, append=False)) * PAGE_SIZE
    return list(zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True))


class DramFile:
    """A dump opened for reading; a context manager.

    The bytes are read, not mapped: a file cut short meanwhile is then an error with
    an address and no SIGBUS, and resident memory stays at one chunk.

    Raises:
        InputError: not a regular file, or not one whole page long.
        OSError: missing or unreadable.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = os.fspath(path)
        # O_NONBLOCK: opening a pipe must not wait for somebody who writes into it.
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            self._length = self._checked_length()
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """End of RAM in bytes: the whole pages of the file."""
        return align_down(self._length, PAGE_SIZE)

    @property
    def tail_bytes(self) -> int:
        """Bytes after the last whole page; they are left out. 0 in a sound dump."""
        return self._length - self.size

    @property
    def present_bytes(self) -> int:
        """Bytes that `extents` is going to yield; the rest are holes."""
        return sum(end - start for start, end in self._data_ranges())

    def extents(self) -> Iterator[Extent]:
        """Yield what is present, in chunks of at most `CHUNK_SIZE` bytes."""
        for start, end in self._data_ranges():
            for address in range(start, end, CHUNK_SIZE):
                length = min(CHUNK_SIZE, end - address)
                yield address, self.read(PhysAddr(address), length)

    def read(self, pa: PhysAddr, length: int) -> ByteArray:
        """Return `length` bytes from `pa` on; holes read as zeros.

        Raises:
            InputError: the file ends before `pa + length`.
            OSError: the disk does not answer.
        """
        cells = np.empty(length, np.uint8)
        done = 0
        while done < length:
            try:
                got = os.preadv(self._descriptor, [cells.data[done:]], pa + done)
            except OSError as error:
                error.filename = self.path
                raise
            if not got:
                raise InputError(
                    f"{self.path}: ends at {pa + done:#x}, "
                    f"expected {pa + length:#x} bytes"
                )
            done += got
        return cells

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    def __enter__(self) -> "DramFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked_length(self) -> int:
        status = os.fstat(self._descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{self.path}: a directory, expected a DRAM dump")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.path}: not a regular file, expected a DRAM dump")
        if status.st_size < PAGE_SIZE:
            raise InputError(
                f"{self.path}: {status.st_size} bytes, "
                f"expected at least one page of {PAGE_SIZE}"
            )
        return status.st_size

    def _data_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges that are no holes, widened to whole pages."""
        end = 0
        while end < self.size:
            try:
                found = os.lseek(self._descriptor, end, os.SEEK_DATA)
                hole = os.lseek(self._descriptor, found, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                # A file system that knows no holes: everything is present.
                found, hole = end, self.size
            start = max(end, align_down(found, PAGE_SIZE))
            end = min(self.size, align_up(hole, PAGE_SIZE))
            if start < end:
                yield start, end
