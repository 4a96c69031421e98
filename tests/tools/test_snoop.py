"""One pass over a machine's DRAM tells what an attacker learns."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from cbit.hw.errors import CallerError
from cbit.hw.types import PAGE_SIZE
from cbit.tools.dram_file import CHUNK_SIZE, ByteArray, DramFile, Extent
from cbit.tools.dram_file import write_dram_file as write
from cbit.tools.snoop import PageCounts, snoop

GIB = 1 << 30
SECRET = b"the password is swordfish"

MEASURED = """
import sys, time
from cbit.tools.cli import run
start = time.monotonic()
code = run(sys.argv[1:])
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM:"))
print(time.monotonic() - start, peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


class Image:
    """A machine's cells held in memory."""

    def __init__(self, size: int, *extents: Extent) -> None:
        self.size = size
        self._extents = extents

    def extents(self) -> Iterable[Extent]:
        return iter(self._extents)


def ciphertext(num_pages: int, seed: int = 1) -> ByteArray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, num_pages * PAGE_SIZE, dtype=np.uint8)


def plaintext(num_pages: int, text: bytes = SECRET, offset: int = 100) -> ByteArray:
    cells = np.zeros(num_pages * PAGE_SIZE, np.uint8)
    cells[offset : offset + len(text)] = np.frombuffer(text, np.uint8)
    cells[2048::PAGE_SIZE] = 1  # no page is zero
    return cells


def test_pages_are_counted_by_class_and_holes_are_zero() -> None:
    image = Image(
        64 * GIB,
        (0x3000, ciphertext(5)),
        (0x10_0000, np.zeros(7 * PAGE_SIZE, np.uint8)),
        (63 * GIB, plaintext(2)),
    )
    report = snoop(image)
    assert report.size == 64 * GIB
    assert report.pages == PageCounts(64 * GIB // PAGE_SIZE - 7, 2, 5)


def test_a_secret_in_plaintext_is_found_and_its_ciphertext_is_not() -> None:
    plain = Image(1 << 20, (0x4000, plaintext(1)))
    report = snoop(plain, needles=(SECRET,))
    assert report.finds == {SECRET: [0x4000 + 100]}
    assert [one.text for one in report.strings.shown] == [SECRET.decode()]
    hidden = Image(1 << 20, (0x4000, ciphertext(1)))
    assert snoop(hidden, needles=(SECRET,)).finds == {SECRET: []}


@pytest.mark.parametrize("boundary", [CHUNK_SIZE, 3 * PAGE_SIZE])
def test_a_secret_across_a_chunk_or_an_extent_is_found(boundary: int) -> None:
    cells = plaintext(CHUNK_SIZE // PAGE_SIZE + 2, offset=boundary - 9)
    extents = (
        [(0, cells)]
        if boundary == CHUNK_SIZE
        else [(0, cells[:boundary]), (boundary, cells[boundary:])]
    )
    report = snoop(Image(2 * CHUNK_SIZE, *extents), needles=(SECRET, b"password"))
    assert report.finds[SECRET] == [boundary - 9]
    assert report.finds[b"password"] == [boundary - 5]
    assert SECRET.decode() in [one.text for one in report.strings.shown]


def test_two_halves_of_a_secret_around_a_page_of_zeros_are_not_joined() -> None:
    cells = plaintext(3)
    cells[: PAGE_SIZE - 4] = 1
    cells[PAGE_SIZE - 4 : PAGE_SIZE] = list(b"pass")
    cells[PAGE_SIZE : 2 * PAGE_SIZE] = 0
    cells[2 * PAGE_SIZE : 2 * PAGE_SIZE + 4] = list(b"word")
    report = snoop(Image(1 << 20, (0, cells)), needles=(b"password",))
    assert report.finds == {b"password": []}


def test_ciphertext_repeats_need_a_second_snapshot(tmp_path: Path) -> None:
    first = Image(1 << 30, (0, plaintext(4)), (0x10_0000, ciphertext(6)))
    assert snoop(first).repeats is None
    cells = ciphertext(6)
    cells[0x1000:0x2000] = ciphertext(1, seed=2)
    cells[0x3000:0x3010] ^= 0xFF
    write(tmp_path / "d", 1 << 30, [(0, plaintext(4)), (0x10_0000, cells)])
    with DramFile(tmp_path / "d") as second:
        repeats = snoop(first, second=second).repeats
    assert repeats is not None
    assert (repeats.pages, repeats.unchanged_pages) == (6, 4)
    assert repeats.partly_equal_pages == 1
    assert repeats.blocks == 5 * 256 - 1
    assert repeats.ranges == (
        (0x10_0000, 0x10_1000),
        (0x10_2000, 0x10_3000),
        (0x10_3010, 0x10_6000),
    )


def test_blocks_enciphered_without_a_tweak_give_themselves_away() -> None:
    cells = ciphertext(64)
    cells.reshape(64, PAGE_SIZE)[:, 0x100:0x110] = cells[:16]
    assert snoop(Image(1 << 20, (0, cells))).duplicates.count == 64


def test_progress_is_told_in_bytes() -> None:
    told: list[int] = []
    cells = ciphertext(300)
    snoop(Image(1 << 30, (0, cells), (1 << 29, cells)), progress=told.append)
    assert sum(told) == 600 * PAGE_SIZE
    assert max(told) <= CHUNK_SIZE


def test_an_image_that_breaks_the_rules_is_refused() -> None:
    with pytest.raises(CallerError, match="expected one within"):
        snoop(Image(0x2000, (0x1000, ciphertext(2))))
    with pytest.raises(CallerError, match="to find"):
        snoop(Image(0x2000), needles=(b"",))


def test_64_gib_with_little_present_takes_little_time_and_memory(
    tmp_path: Path,
) -> None:
    path = tmp_path / "big"
    extents = [
        (0, ciphertext(2048)),
        (2 * GIB, plaintext(2048)),
        (64 * GIB - 0x1000, plaintext(1)),
    ]
    write(path, 64 * GIB, extents)
    assert path.stat().st_blocks * 512 < 32 << 20
    command = [sys.executable, "-c", MEASURED, "dram", "snoop", str(path), "--json"]
    command += ["--find", "swordfish"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, memory = done.stderr.split()
    assert float(seconds) < 20
    assert int(memory) < 200 << 10  # KiB
    facts = json.loads(done.stdout)
    assert facts["find"]["swordfish"] == ["0x80000074", "0xffffff074"]
    assert facts["pages"]["encrypted"] == 2048
    assert facts["pages"]["plain"] == 2049


@pytest.mark.parametrize("kind", ["ciphertext", "prose"])
def test_speed_of_a_snoop(benchmark: BenchmarkFixture, kind: str) -> None:
    cells = ciphertext(8192)
    if kind == "prose":
        cells = np.resize(np.frombuffer(SECRET + b"\0", np.uint8), cells.size)
    benchmark(snoop, Image(1 << 30, (0, cells)))
