"""Output files appear whole or not at all, and errors name the file."""

import errno
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbit.tools.output_file import output_file


def write(path: Path, content: bytes) -> None:
    with output_file(path) as file:
        file.write(content)


def write_half_and_stop(path: Path) -> None:
    with output_file(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt


@pytest.fixture
def one_megabyte_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_content_is_there_after_the_block_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with output_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_half_and_stop(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_order_the_bytes_are_on_disk_before_the_name_changes_hands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, replace = os.fsync, os.replace
    steps: list[tuple[str, int]] = []

    def noted_sync(descriptor: int) -> None:
        steps.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def noted_replace(source: str, target: str) -> None:
        steps.append(("replace", os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path / "out", b"four")
    assert steps == [("fsync", 4), ("replace", 4)]


@pytest.mark.usefixtures("one_megabyte_disk")
def test_a_full_disk_is_an_error_with_the_name_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "out"
    with pytest.raises(OSError, match="large") as caught:
        write(path, bytes(3 << 20))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert os.listdir(tmp_path) == []


def test_a_missing_directory_is_an_error_with_the_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "out"
    with pytest.raises(FileNotFoundError) as caught:
        write(path, b"")
    assert caught.value.filename == str(path)


@pytest.mark.parametrize("name", ["folder", "folder/", "new/"])
def test_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught, output_file(f"{tmp_path}/{name}"):
        pass
    assert caught.value.filename == f"{tmp_path}/{name}"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_device_is_written_and_not_replaced() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        write(Path("/dev/full"), b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")
    assert Path("/dev/full").is_char_device()
    write(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()))
    reader.start()
    write(path, b"through the pipe")
    reader.join(10)
    assert received == [b"through the pipe"]
    assert path.is_fifo()


def test_a_file_that_somebody_holds_open_under_dev_fd_is_written_in_place(
    tmp_path: Path,
) -> None:
    path = tmp_path / "redirected"
    with path.open("wb") as held:
        write(Path(f"/dev/fd/{held.fileno()}"), b"bytes")
        assert os.fstat(held.fileno()).st_nlink == 1
    assert path.read_bytes() == b"bytes"


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real/out")
    write(link, b"1")
    write(link, b"22")
    assert link.is_symlink()
    assert (tmp_path / "real" / "out").read_bytes() == b"22"


def test_the_mode_is_that_of_the_old_file_or_follows_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = os.umask(0o027)
    try:
        write(path, b"")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o600)
        write(path, b"")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_without_write_permission_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"precious")
    path.chmod(0o444)
    with pytest.raises(PermissionError):
        write(path, b"new")
    assert path.read_bytes() == b"precious"


def test_a_name_of_255_characters_works(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write(path, b"long")
    assert path.read_bytes() == b"long"
