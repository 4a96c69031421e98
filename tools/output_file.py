"""Output files that appear whole or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_STREAMS = ("/dev/fd/", "/dev/std", "/proc/")
"""Names of files that somebody else already holds open; never renamed over."""


@contextmanager
def output_file(path: Path | str) -> Iterator[BinaryIO]:
    """Open `path` for writing; the name changes hands when the block ends well.

    The bytes go to a temporary file in the same directory, which is synced and
    renamed at the end. Any exception removes it: `path` is then what it was before.
    A symbolic link is followed. A device, pipe or socket is written directly, because
    a rename would put a file in its place.

    Args:
        path: a file that may exist; its mode is kept, its content replaced.

    Returns:
        A buffered binary file, seekable unless `path` is a pipe.

    Raises:
        OSError: the path cannot be written; `filename` is `path`.
    """
    name = os.fspath(path)
    opened = _opened_in_place(name) if _is_stream(name) else _replacement(name)
    try:
        with opened as file:
            yield file
    except OSError as error:
        if error.filename is None:  # a write or a sync: the kernel names no file
            error.filename = name
        raise


def _is_stream(name: str) -> bool:
    if os.path.abspath(name).startswith(_STREAMS):
        return True
    try:
        mode = os.stat(name).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _opened_in_place(name: str) -> Iterator[BinaryIO]:
    with open(name, "wb") as file:
        yield file


@contextmanager
def _replacement(name: str) -> Iterator[BinaryIO]:
    target = os.path.realpath(name)
    mode = _replaceable_mode(name)
    temporary = os.path.join(
        os.path.dirname(target), f".cbit-{secrets.token_hex(8)}.tmp"
    )
    with _named(name):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)
            yield file
            file.flush()
            # ORDER: the bytes before the name, or a power cut leaves an empty file.
            os.fsync(descriptor)
        with _named(name):
            os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _replaceable_mode(name: str) -> int | None:
    """Return the mode of the file in the way, None if there is none.

    Raises:
        OSError: `name` is a directory, or a file the caller may not write: a rename
            needs no permission on the file it replaces, so it is asked for here.
    """
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        mode = None
    if (mode is not None and stat.S_ISDIR(mode)) or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if mode is None:
        return None
    if not os.access(name, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
    return stat.S_IMODE(mode)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Make an `OSError` speak of `name`, not of the temporary file."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = name, None
        raise
