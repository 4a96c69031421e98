"""Bytes from outside under a name: reading past the end is a refusal with an offset."""

from __future__ import annotations

import io
import mmap
import os
import stat
from pathlib import Path

from ...hw.errors import InputError


class ImageSource:
    """The bytes of one file, or of what was compressed inside of it.

    Attributes:
        name: what error messages begin with.
        data: read-only view of all bytes; nothing is copied.
    """

    def __init__(self, name: str, data: memoryview) -> None:
        self.name = name
        self.data = data

    @classmethod
    def of_file(cls, path: str | os.PathLike[str]) -> ImageSource:
        """Map a file into memory.

        Raises:
            InputError: the file is empty or not a regular file.
            OSError: the file cannot be opened.
        """
        name = Path(path).name or str(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{name}: not a regular file; expected a kernel image")
            if not status.st_size:
                raise InputError(f"{name}: empty; expected a kernel image")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(name, memoryview(mapped))

    @property
    def size(self) -> int:
        """Number of bytes there are."""
        return len(self.data)

    def take(self, offset: int, size: int, what: str) -> memoryview:
        """Return a view of [offset, offset + size).

        Args:
            offset: from the first byte of the source.
            size: in bytes.
            what: the thing that should be there, for the message.

        Raises:
            InputError: the range does not lie within the source.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise self.error(
                offset, f"{what} takes {size:#x} bytes, the end is at {self.size:#x}"
            )
        return self.data[offset : offset + size]

    def number(self, offset: int, size: int, what: str) -> int:
        """Return the little-endian number of `size` bytes at `offset`."""
        return int.from_bytes(self.take(offset, size, what), "little")

    def error(self, offset: int, fact: str) -> InputError:
        """Return, not raise, the refusal that names this source and an offset."""
        return InputError(f"{self.name}: offset {offset:#x}: {fact}")


class SourceStream(io.RawIOBase):
    """A source as a file object, for libraries that want to seek and read."""

    def __init__(self, source: ImageSource) -> None:
        self._data = source.data
        self._position = 0

    def close(self) -> None:
        """Let the bytes go: the objects of the library live on, in cycles."""
        self._data = memoryview(b"")
        super().close()

    def seekable(self) -> bool:
        """Say that `seek` works."""
        return True

    def readable(self) -> bool:
        """Say that `read` works."""
        return True

    def tell(self) -> int:
        """Return the position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; beyond the end is allowed and reads nothing, as in a file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(
            whence, len(self._data)
        )
        self._position = max(base + offset, 0)
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, never more than there are, so no size is too big."""
        end = len(self._data) if size < 0 else self._position + size
        found = bytes(self._data[self._position : end])
        self._position += len(found)
        return found
