"""hw/snapshot: files that are cut, changed, foreign, newer, or lie are refused."""

import copy
import io
import random
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import zstandard

from cbit.hw import Machine
from cbit.hw.errors import InputError
from cbit.hw.memory import SLOT_HOST, SLOT_NONE
from cbit.hw.snapshot import load_snapshot

from .snapshot_files import START, built, forged, header_of, pieces_of, saved

BASE = 0x10_0000

Path = tuple[str | int, ...]


@cache
def file() -> bytes:
    """Return a small snapshot with something in every section."""
    machine = Machine(ram=2 << 20, coherent=False, seed=1)
    machine.bus.store(BASE, bytes(range(256)) * 30, SLOT_HOST)
    machine.bus.store(BASE + 8192, bytes(8192), SLOT_NONE)
    machine.caches.drain()
    machine.bus.load(BASE, 64, SLOT_NONE)
    machine.bus.store(BASE, b"dirty", SLOT_HOST)
    machine.bus.load(BASE, 64, SLOT_NONE)
    return saved(machine, {"caller": [1, 2]})


def refused(data: bytes) -> str:
    """Return why; the one line names the file."""
    with pytest.raises(InputError) as error:
        load_snapshot(io.BytesIO(data), "a.snap")
    message = str(error.value)
    assert message.startswith("a.snap: offset 0x")
    assert "\n" not in message
    return message


def test_the_file_of_these_tests_has_every_section_filled() -> None:
    load_snapshot(io.BytesIO(file()), "file")
    assert [name for name, length in header_of(file())["sections"] if not length] == []


# Damage


def test_law_no_changed_byte_is_overlooked() -> None:
    data = file()
    rng = random.Random(1)
    (length,) = struct.unpack_from("<I", data, 12)
    contents = START.size + length + 32
    # Behind the header every flip costs a machine.
    places = [*range(contents), *rng.sample(range(contents, len(data)), 300)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        refused(bytes(changed))


def test_law_no_cut_is_overlooked_and_the_offset_is_the_end() -> None:
    data = file()
    rng = random.Random(2)
    for end in {*range(100), *rng.sample(range(len(data)), 300), len(data) - 1}:
        if end >= 8:
            assert f"offset {end:#x}: cut short" in refused(data[:end])
        else:
            assert "offset 0x0: not a snapshot" in refused(data[:end])


def test_bytes_behind_the_end_are_refused() -> None:
    assert f"offset {len(file()):#x}: end of file expected" in refused(file() + b"\0")
    assert "end of file" in refused(file() * 2)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF" + bytes(100), b"\x28\xb5\x2f\xfd" + bytes(100), b"CBITSNA", b"{}"],
)
def test_a_foreign_file_is_refused_by_its_first_bytes(data: bytes) -> None:
    assert "offset 0x0: not a snapshot, b'CBITSNAP' expected" in refused(data)


def test_a_dropped_repeated_or_moved_piece_is_found() -> None:
    header, pieces = header_of(file()), pieces_of(file())
    records, at = [], len(built(header, []))
    whole = built(header, pieces)
    for piece in pieces:
        end = at + 4 + len(piece) + 32
        records.append(whole[at:end])
        at = end
    assert built(header, []) + b"".join(records) == whole
    for order in (
        records[1:],
        records[:-1],
        [records[1], records[0], *records[2:]],
        [records[0], *records],
    ):
        refused(built(header, []) + b"".join(order))


# Versions and sizes


@pytest.mark.parametrize("version", [0, 2, 1 << 31])
def test_another_version_is_refused_by_name(version: int) -> None:
    data = built(header_of(file()), pieces_of(file()), version)
    assert f"offset 0x8: version {version}, this program reads 1 to 1" in refused(data)


def test_a_header_that_claims_much_is_refused_before_it_is_read() -> None:
    data = START.pack(b"CBITSNAP", 1, 0xFFFF_FFFF) + bytes(100)
    assert "offset 0xc: header of 0xffffffff bytes" in refused(data)


@pytest.mark.parametrize("ram", [1 << 60, 1 << 51, 1 << 44, 0, 4095, (2 << 20) + 1])
def test_ram_that_cannot_be_is_refused(ram: int) -> None:
    header = header_of(file())
    header["ram"] = ram
    refused(built(header, pieces_of(file())))


def test_ram_that_no_host_has_is_refused_in_one_line() -> None:
    header = header_of(file())
    for row in header["model"]["leaves"]:
        if row[:2] == [0x8000_0008, 0]:
            row[2] = row[2] & ~0xFF | 52
        if row[:2] == [0x8000_001F, 0]:
            row[2:4] = [0, 0]
    header["ram"] = (1 << 52) - (2 << 30)
    assert "this host says" in refused(built(header, pieces_of(file())))


@pytest.mark.parametrize("length", [1 << 60, 1 << 20, (1 << 63) - 1, 1 << 63])
@pytest.mark.parametrize("number", range(6))
def test_a_section_that_claims_much_is_refused_before_it_is_read(
    length: int, number: int
) -> None:
    header = header_of(file())
    header["sections"][number][1] = length
    refused(built(header, pieces_of(file())))


def test_a_piece_that_claims_much_is_refused_before_it_is_read() -> None:
    start = built(header_of(file()), [])
    message = refused(start + struct.pack("<I", 0xFFFF_FFFF) + bytes(100))
    assert f"offset {len(start):#x}: section 'dram.regions': piece of" in message


def test_a_frame_that_unpacks_to_more_than_the_header_says_is_refused() -> None:
    header, pieces = header_of(file()), pieces_of(file())
    for bomb in (
        zstandard.compress(bytes(64 << 20)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(64 << 20)),
        zstandard.ZstdCompressor(level=1).compress(bytes(8)) * 2,
        zstandard.compress(bytes(8)) + b"\0",
        zstandard.compress(b""),
        b"\x28\xb5\x2f\xfd",
        b"plain",
    ):
        message = refused(built(header, [bomb, *pieces[1:]]))
        assert "one Zstandard frame of 0x8 bytes expected" in message


# Headers that lie, with digests that fit


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[1]", b"\xff\xfe", b"1" * 5000, b"[" * 100_000, b'{"sections":1}'],
)
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    assert "offset 0x10: header" in refused(built(header, []))


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the way to every fact; of a long list to its ends only."""
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            yield from paths(value[name], (*path, name))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1}):
            if index < len(value):
                yield from paths(value[index], (*path, index))


def parent_of(header: Any, path: Path) -> Any:
    for step in path[:-1]:
        header = header[step]
    return header


def complaint(data: bytes) -> str:
    """Return why a file is refused, or ""."""
    try:
        load_snapshot(io.BytesIO(data), "a.snap")
    except InputError as error:
        return str(error)
    return ""


def test_law_a_missing_fact_is_named() -> None:
    original = header_of(file())
    for path in paths(original):
        if isinstance(path[-1], str) and path[0] != "extra":
            header = copy.deepcopy(original)
            del parent_of(header, path)[path[-1]]
            message = refused(built(header, pieces_of(file())))
            assert f"{path[-1]!r} expected, it is missing" in message
    del original["extra"]
    assert "'extra' expected" in refused(built(original, pieces_of(file())))


def test_law_a_fact_of_another_kind_is_refused_or_harmless() -> None:
    original, pieces = header_of(file()), pieces_of(file())
    values: list[Any] = [None, True, -1, 1 << 70, 10**400, 0.5, "x", [], {}, [[]]]
    refusals = 0
    for path in paths(original):
        for value in values:
            header = copy.deepcopy(original)
            parent_of(header, path)[path[-1]] = value
            message = complaint(built(header, pieces))
            if message:
                refusals += 1
                assert re.match(r"a\.snap: offset 0x[0-9a-f]+: ", message)
                assert len(message) < 300
            else:
                free = path[:2] in {
                    ("model", name) for name in ("name", "source", "alias")
                }
                fits = type(value) is type(parent_of(original, path)[path[-1]])
                assert free or fits or path[0] == "extra", (path, value)
    assert refusals > 300


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("profile",), "zen9"),
        (("hazard_policy",), "ignore"),
        (("cores",), []),
        (("cores", 0, "cpl"), 1),
        (("cores", 0, "cr0"), 0x8000_0011),
        (("cores", 0, "msrs", 0), [0x1234_5678, 1]),
        (("keys",), []),  # whose lines could never leave
        (("keys", 0, "key"), "00" * 15),
        (("keys", 0, "constants"), "00" * 17),
        (("keys", 0, "constants"), "00" * 16 * 100),
        (("keys", 0, "slot"), 1 << 40),
        (("psp", "key"), "00" * 16),
        (("caches", "slots"), [1, 1]),
        (("caches", "slots"), [1]),
        (("caches", "slots"), [0, 1]),
        (("caches", "slots"), [1, 0, 2]),
        (("caches", "random", "words"), [0] * 623),
        (("caches", "random", "position"), 625),
        (("model", "leaves"), []),
    ],
)
def test_a_machine_that_cannot_be_is_refused(path: Path, value: object) -> None:
    header = header_of(file())
    parent_of(header, path)[path[-1]] = value
    refused(built(header, pieces_of(file())))


# Sections that lie


def words(*values: int) -> Callable[[bytes], bytes]:
    return lambda old: np.array(values, np.uint64).tobytes()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dram.regions", words(1)),  # RAM has one region, number 0
        ("dram.regions", words()),  # and then no page may be filled
        ("dram.regions", words(0, 0)),
        ("dram.written_by", lambda old: old[:-2]),
        ("dram.written_by", lambda old: old + b"\0\0"),
        ("dram.pages", words(5, (1 << 64) - 1)),
        ("dram.pages", words(5, (1 << 63), (1 << 63))),
        ("dram.pages", words(1 << 63)),
        ("dram.pages", words(512)),
        ("dram.pages", words(5, 0)),
        ("dram.pages", lambda old: old[:-1]),
        ("dram.cells", lambda old: old + bytes(4096)),
        ("dram.cells", lambda old: old[:-4096]),
        ("dram.cells", lambda old: old[:-1]),
        ("slot1.pages", words(0)),
        ("slot1.valid", lambda old: bytes(len(old))),
        ("slot1.dirty", lambda old: b"\xff" * len(old)),
        ("slot0.stale", lambda old: b"\xff" * len(old)),
        ("slot0.lines", lambda old: old[64:]),
        ("slot1.whole", lambda old: old[4096:]),
        ("owners", lambda old: b"\x09\0" * (len(old) // 2)),
        ("owners", lambda old: old[2:]),
        ("owned", words()),
        ("writers", lambda old: old + b"\0\0"),
        ("writers", lambda old: b""),
        ("hazards", lambda old: b"\x02" + old[1:]),
        ("hazards", lambda old: old[:1] + b"\x02" + old[2:]),
        ("hazards", lambda old: old[:-1]),
    ],
)
def test_a_section_that_does_not_fit_is_refused(
    name: str, change: Callable[[bytes], bytes]
) -> None:
    refused(forged(file(), name, change))


def test_a_section_under_another_name_is_refused() -> None:
    header = header_of(file())
    for number in range(len(header["sections"])):
        wrong = copy.deepcopy(header)
        wrong["sections"][number][0] = "other"
        assert "the header says 'other'" in refused(built(wrong, pieces_of(file())))
    header["sections"].append(["more", 0])
    assert "section 'more' is unknown" in refused(built(header, pieces_of(file())))


def test_a_forger_can_change_what_fits() -> None:
    # Digests are no signature; the tests above change files with the same means.
    data = forged(file(), "dram.cells", lambda old: bytes(len(old)))
    machine, extra = load_snapshot(io.BytesIO(data), "file")
    assert not machine.dram.cells.any()
    assert extra == {"caller": [1, 2]}
