"""DRAM dumps: sparse both ways, and refused if they are no dumps."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cbit.hw.errors import CallerError, InputError
from cbit.hw.types import PAGE_SIZE, PhysAddr
from cbit.tools.dram_file import (
    CHUNK_SIZE,
    ByteArray,
    DramFile,
    Extent,
    page_chunks,
    write_dram_file,
)

GIB = 1 << 30


def noise(num_pages: int, seed: int = 1) -> ByteArray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 256, num_pages * PAGE_SIZE, dtype=np.uint8)


def written(path: Path, size: int, *extents: Extent) -> Path:
    write_dram_file(path, size, extents)
    return path


def read_back(path: Path, size: int) -> ByteArray:
    cells = np.zeros(size, np.uint8)
    with DramFile(path) as dump:
        assert dump.size == size
        for address, run in dump.extents():
            cells[address : address + run.size] = run
    return cells


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    size = 40 * PAGE_SIZE
    first, second = noise(3), noise(5, seed=2)
    path = written(tmp_path / "d", size, (0x2000, first), (0x1_0000, second))
    expected = np.zeros(size, np.uint8)
    expected[0x2000:0x5000] = first
    expected[0x1_0000:0x1_5000] = second
    assert (np.frombuffer(path.read_bytes(), np.uint8) == expected).all()
    assert (read_back(path, size) == expected).all()


def test_the_file_is_as_long_as_ram_and_as_big_as_what_is_present(
    tmp_path: Path,
) -> None:
    cells = np.zeros(4 << 20, np.uint8)
    cells[5 * PAGE_SIZE] = cells[(3 << 20) + 7] = 1
    path = written(tmp_path / "d", 64 * GIB, (0, cells), (60 * GIB, noise(2)))
    assert path.stat().st_size == 64 * GIB
    assert path.stat().st_blocks * 512 <= 64 * PAGE_SIZE
    with DramFile(path) as dump:
        assert 4 * PAGE_SIZE <= dump.present_bytes <= 64 * PAGE_SIZE
        present = dict(dump.extents())
        assert 60 * GIB in present
        assert present[60 * GIB].tobytes() == noise(2).tobytes()


def test_an_extent_bigger_than_a_chunk_and_not_contiguous_is_written(
    tmp_path: Path,
) -> None:
    columns = np.repeat(noise(600), 2).reshape(-1, 2)
    path = written(tmp_path / "d", 600 * PAGE_SIZE, (0, columns[:, 0]))
    assert path.read_bytes() == noise(600).tobytes()


@pytest.mark.parametrize(
    ("size", "extents"),
    [
        (0x1_0000, [(0x800, noise(1))]),
        (0x1_0000, [(0, noise(1)[:100])]),
        (0x1_0000, [(0xF000, noise(2))]),
        (0x1_0000, [(0x3000, noise(2)), (0x4000, noise(1))]),
        (0x1_0000, [(0x3000, noise(1)), (0, noise(1))]),
        (0x1_0001, []),
    ],
    ids=["address", "length", "end of RAM", "overlap", "order", "size"],
)
def test_extents_that_break_the_rules_are_refused_and_leave_no_file(
    tmp_path: Path, size: int, extents: list[Extent]
) -> None:
    with pytest.raises(CallerError, match="0x"):
        write_dram_file(tmp_path / "d", size, extents)
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_source_leaves_no_file(tmp_path: Path) -> None:
    def failing() -> Iterator[Extent]:
        yield 0, noise(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dram_file(tmp_path / "d", 0x1_0000, failing())
    assert os.listdir(tmp_path) == []


def test_a_device_takes_a_dump_and_stays_a_device() -> None:
    write_dram_file("/dev/null", 0x1_0000, [(0x3000, noise(1))])
    with pytest.raises(OSError, match="No space left") as caught:
        write_dram_file("/dev/full", 0x1_0000, [(0x3000, noise(1))])
    assert caught.value.filename == "/dev/full"
    assert Path("/dev/full").is_char_device()


def test_law_chunks_are_the_extents_cut_at_most_at_the_chunk_size() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        extents, address = [], 0
        for _ in range(3):
            address += int(rng.integers(0, 9)) * PAGE_SIZE
            cells = noise(int(rng.integers(0, 600)), seed)
            extents.append((address, cells))
            address += cells.size
        chunks = list(page_chunks(address, extents))
        assert all(chunk.size <= CHUNK_SIZE for _, chunk in chunks)
        for start, cells in extents:
            own = [c for a, c in chunks if start <= a < start + cells.size]
            assert b"".join(c.tobytes() for c in own) == cells.tobytes()


def test_without_support_for_holes_everything_is_present(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "d", 32 * PAGE_SIZE, (0x9000, noise(2)))

    def no_holes(descriptor: int, place: int, how: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "lseek", no_holes)
    with DramFile(path) as dump:
        assert dump.present_bytes == 32 * PAGE_SIZE
    assert read_back(path, 32 * PAGE_SIZE).tobytes() == path.read_bytes()


def test_a_dump_that_is_all_hole_has_nothing_present(tmp_path: Path) -> None:
    with DramFile(written(tmp_path / "d", GIB)) as dump:
        assert (dump.present_bytes, list(dump.extents())) == (0, [])


def test_bytes_after_the_last_whole_page_are_counted_and_left_out(
    tmp_path: Path,
) -> None:
    path = tmp_path / "d"
    path.write_bytes(noise(3).tobytes()[:-100])
    with DramFile(path) as dump:
        assert (dump.size, dump.tail_bytes) == (2 * PAGE_SIZE, PAGE_SIZE - 100)
    assert read_back(path, 2 * PAGE_SIZE).tobytes() == noise(2).tobytes()


def test_an_empty_a_tiny_and_a_special_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "tiny").write_bytes(b"x" * 4095)
    os.mkfifo(tmp_path / "pipe")
    for path, what in [
        (tmp_path / "empty", "0 bytes, expected at least one page"),
        (tmp_path / "tiny", "4095 bytes, expected at least one page"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "a directory"),
        (Path("/dev/zero"), "not a regular file"),
    ]:
        with pytest.raises(InputError, match=what) as caught:
            DramFile(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError):
        DramFile(tmp_path / "missing")


def test_a_dump_cut_short_while_it_is_read_is_an_error_with_the_address(
    tmp_path: Path,
) -> None:
    path = written(tmp_path / "d", 3 * CHUNK_SIZE, (0, noise(3 * 256)))
    with DramFile(path) as dump:
        extents = iter(dump.extents())
        next(extents)
        os.truncate(path, CHUNK_SIZE + 0x1000)
        with pytest.raises(InputError, match="ends at 0x101000"):
            list(extents)


def test_holes_read_as_zeros(tmp_path: Path) -> None:
    path = written(tmp_path / "d", GIB, (0x9000, noise(1)))
    with DramFile(path) as dump:
        cells = dump.read(PhysAddr(0x8000), 3 * PAGE_SIZE)
    assert not cells[:PAGE_SIZE].any()
    assert cells[PAGE_SIZE:-PAGE_SIZE].tobytes() == noise(1).tobytes()
    assert not cells[-PAGE_SIZE:].any()
