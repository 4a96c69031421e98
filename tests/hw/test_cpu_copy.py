"""REP MOVS: over every border, onto itself, between two tags of one frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.faults import CpuException, PageFault
from cbit.hw.memory.bus import NothingThere

from .test_paging_witness import (
    LARGE_RW,
    PAGE,
    PAGE_RW,
    A,
    Cells,
    Tables,
    long_mode,
)

RAM = 24 << 20
FRAME = 0x20_0000
PLAIN, PRIVATE, OTHER = 0x7F00_0000_0000, 0x7F00_0010_0000, 0x7F00_0020_0000
SMALL, LARGE = 0x7F00_0040_0000, 0x7F00_0080_0000
C = 1 << 47
TEXT = bytes(b % 251 for b in range(3 << 20))


class Bench:
    """Sixteen pages of one range mapped twice, C = 0 and C = 1; and room elsewhere.

    `PLAIN` and `PRIVATE` map `FRAME` and on; `OTHER` maps 16 other pages backwards, so
    that no two are neighbours; `LARGE` maps two large pages, C = 1 and C = 0.
    """

    def __init__(self, *, coherent: bool = True) -> None:
        self.machine = Machine("rome", ram=RAM, coherent=coherent, seed=1)
        self.tables = tables = Tables(self.machine)
        for at in range(0, 16 * PAGE, PAGE):
            tables.map(PLAIN + at, FRAME + at | PAGE_RW)
            tables.map(PRIVATE + at, FRAME + at | C | PAGE_RW)
            tables.map(OTHER + at, FRAME + 31 * PAGE - at | PAGE_RW)
        tables.map(LARGE, 0x40_0000 | C | LARGE_RW, 21)
        tables.map(LARGE + (1 << 21), 0x80_0000 | LARGE_RW, 21)
        self.cpu: Cpu = self.machine.cpu
        long_mode(self.cpu, tables.cr3)


def moved(data: bytes, target: int, source: int, length: int) -> bytes:
    """What REP MOVSB makes of `data`: byte after byte, upwards."""
    cells = bytearray(data)
    for done in range(length):
        cells[target + done] = cells[source + done]
    return bytes(cells)


# --- between different frames


@pytest.mark.parametrize("length", [1, 7, 8, 100, PAGE, PAGE + 1, 5 * PAGE + 77])
@pytest.mark.parametrize(
    ("target", "source"),
    [
        (OTHER, PLAIN),
        (OTHER + 3, PLAIN + 0xFFE),
        (OTHER + 0xFF9, PRIVATE + 1),
        (PRIVATE + 5, OTHER + 0x800),
        (LARGE + (1 << 21) - 50, OTHER + 9),
        (OTHER + 9, LARGE + (1 << 21) - 50),
        (LARGE + (1 << 21) - 0x1234, LARGE + 17),
    ],
)
def test_a_copy_crosses_every_border_on_both_sides(
    target: int, source: int, length: int
) -> None:
    cpu = Bench().cpu
    cpu.store(source, TEXT[:length])
    cpu.fill(target, 0xEE, length + 16)
    cpu.copy(target, source, length)
    assert cpu.load(target, length + 16) == TEXT[:length] + b"\xee" * 16
    assert cpu.load(source, length) == TEXT[:length]


def test_a_long_copy_between_large_pages_and_small_ones() -> None:
    bench = Bench()
    length = (2 << 20) + 3 * PAGE
    for at in range(0, length + PAGE, PAGE):
        bench.tables.map(SMALL + at, 0xC0_0000 + at ^ C * (at >> 13 & 1) | PAGE_RW)
    bench.cpu.store(LARGE + 100, TEXT[:length])
    bench.cpu.copy(SMALL + 5, LARGE + 100, length)
    assert bench.cpu.load(SMALL + 5, length) == TEXT[:length]
    bench.cpu.fill(LARGE + 100, 0, length)
    bench.cpu.copy(LARGE + 100, SMALL + 5, length)
    assert bench.cpu.load(LARGE + 100, length) == TEXT[:length]


@pytest.mark.req("WP-13")
def test_a_copy_deciphers_on_one_side_and_enciphers_on_the_other() -> None:
    bench = Bench()
    bench.cpu.store(PRIVATE, b"sixteen bytes..." * 256)
    bench.cpu.copy(OTHER, PRIVATE, PAGE)
    bench.cpu.copy(LARGE, OTHER, PAGE)
    bench.cpu.wbinvd()
    engine = bench.machine.controller.engine(1)
    snoop = bench.machine.snoop
    assert snoop(FRAME + 31 * PAGE, 16) == b"sixteen bytes..."
    for pa in (FRAME, 0x40_0000):
        assert snoop(pa, 16) != b"sixteen bytes..."
        assert engine.decrypt(pa, snoop(pa, PAGE)) == b"sixteen bytes..." * 256


# --- onto itself, one tag


@pytest.mark.parametrize("length", [0, 1, 30, 200, PAGE, 2 * PAGE + 40])
@pytest.mark.parametrize(
    "distance", [0, 1, 2, 3, 7, 8, 9, 15, 16, 63, 64, 100, PAGE - 1, PAGE, PAGE + 8]
)
@pytest.mark.parametrize("upwards", [True, False], ids=["up", "down"])
def test_a_copy_onto_itself_moves_byte_after_byte(
    distance: int, length: int, upwards: bool
) -> None:
    # With the target one byte up, REP MOVSB fills: compilers and libraries use it so.
    bench = Bench()
    room = TEXT[: 4 * PAGE]
    low, high = 0x123, 0x123 + distance
    target, source = (high, low) if upwards else (low, high)
    bench.cpu.store(PRIVATE, room)
    bench.cpu.copy(PRIVATE + target, PRIVATE + source, length)
    assert bench.cpu.load(PRIVATE, 4 * PAGE) == moved(room, target, source, length)


@pytest.mark.parametrize("distance", [1, 8, 24, PAGE + 16])
def test_a_copy_onto_itself_is_known_by_its_frames_not_its_addresses(
    distance: int,
) -> None:
    bench = Bench()
    for at in range(0, 16 * PAGE, PAGE):
        bench.tables.map(SMALL + at, FRAME + at | PAGE_RW)
    bench.cpu.store(PLAIN, TEXT[: 4 * PAGE])
    bench.cpu.copy(SMALL + distance, PLAIN, 2 * PAGE)
    assert bench.cpu.load(PLAIN, 4 * PAGE) == (
        moved(TEXT[: 4 * PAGE], distance, 0, 2 * PAGE)
    )


# --- onto itself, two tags


@pytest.mark.req("PT-53", "WP-13")
@pytest.mark.parametrize(
    ("target", "source"), [(PRIVATE, PLAIN), (PLAIN, PRIVATE)], ids=["en", "de"]
)
def test_converting_in_place_without_a_buffer_spoils_every_second_half(
    target: int, source: int
) -> None:
    bench = Bench()
    text = TEXT[:PAGE]
    bench.cpu.store(source, text)
    bench.cpu.wbinvd()
    cells = Cells(bench.machine)
    into_private = target == PRIVATE
    for at in range(FRAME, FRAME + PAGE, 8):
        part = cells.load(at, 8, encrypted=not into_private)
        cells.store(at, part, encrypted=into_private)
    bench.cpu.copy(target, source, PAGE)
    result = bench.cpu.load(target, PAGE)
    assert result == cells.load(FRAME, PAGE, encrypted=into_private)
    for block in range(0, PAGE, 16):
        assert result[block : block + 8] == text[block : block + 8]
        assert result[block + 8 : block + 16] != text[block + 8 : block + 16]


@pytest.mark.req("PT-53")
@pytest.mark.parametrize("coherent", [True, False], ids=["coherent", "incoherent"])
@pytest.mark.parametrize(
    ("target", "source"), [(PRIVATE, PLAIN), (PLAIN, PRIVATE)], ids=["en", "de"]
)
def test_converting_in_place_over_a_buffer_is_right(
    target: int, source: int, coherent: bool
) -> None:
    bench = Bench(coherent=coherent)
    text = TEXT[: 3 * PAGE]
    bench.cpu.store(source, text)
    bench.cpu.wbinvd()
    for at in range(0, 3 * PAGE, PAGE):
        bench.cpu.copy(OTHER, source + at, PAGE)
        bench.cpu.copy(target + at, OTHER, PAGE)
    bench.cpu.wbinvd()
    assert bench.cpu.load(target, 3 * PAGE) == text
    seen = bench.machine.snoop(FRAME, 3 * PAGE)
    assert (seen == text) == (target == PLAIN)


@pytest.mark.req("PT-53")
def test_converting_in_place_on_an_incoherent_part_is_reported() -> None:
    bench = Bench(coherent=False)
    bench.cpu.store(PLAIN, TEXT[:PAGE])
    bench.cpu.wbinvd()
    bench.cpu.copy(PRIVATE, PLAIN, PAGE)
    hazards = bench.machine.caches.hazards_met
    assert "dirty-alias" in {hazard.kind for hazard in hazards}
    assert {hazard.pa & -PAGE for hazard in hazards} == {FRAME}


@pytest.mark.parametrize("gap", [0, 1, 16, 100])
@pytest.mark.parametrize("length", [1, 16, 333, PAGE])
def test_neighbours_in_one_page_under_two_tags(length: int, gap: int) -> None:
    bench = Bench()
    bench.cpu.store(PRIVATE, TEXT[: 3 * PAGE])
    bench.cpu.wbinvd()
    for target, source in ((length + gap, 0), (0, length + gap)):
        cells = Cells(bench.machine)
        part = cells.load(FRAME + source, length, encrypted=True)
        cells.store(FRAME + target, part, encrypted=False)
        bench.cpu.copy(PLAIN + target, PRIVATE + source, length)
        bench.cpu.wbinvd()
        assert (
            bench.machine.snoop(FRAME, 3 * PAGE)
            == (cells.cells[FRAME : FRAME + 3 * PAGE])
        )


def test_long_neighbours_under_two_tags_share_a_page() -> None:
    # The target's pages leave the other tag in a long run; the last bytes of the
    # source lie in the first of them.
    bench = Bench()
    bench.tables.map(LARGE + (2 << 21), 0x40_0000 | LARGE_RW, 21)
    plain, length = LARGE + (2 << 21), 80 * PAGE
    bench.cpu.store(LARGE, TEXT[: 2 * length])
    for target, source in ((length + 50, 30), (10, length + 50)):
        data = bench.cpu.load(LARGE + source, length)
        bench.cpu.copy(plain + target, LARGE + source, length)
        assert bench.cpu.load(plain + target, length) == data


# --- faults on the way


@pytest.mark.parametrize("missing", ["source", "target"])
def test_a_fault_leaves_what_was_moved_and_names_the_page(missing: str) -> None:
    bench = Bench()
    bench.cpu.store(PLAIN, TEXT[: 4 * PAGE])
    bench.cpu.fill(OTHER, 0xEE, 4 * PAGE)
    va = (PLAIN if missing == "source" else OTHER) + 2 * PAGE
    bench.tables.write(va, 12, 0)
    bench.cpu.invlpg(va)
    with pytest.raises(PageFault) as caught:
        bench.cpu.copy(OTHER, PLAIN, 4 * PAGE)
    assert caught.value.address == va
    assert caught.value.error_code == (0 if missing == "source" else 2)
    assert bench.cpu.load(OTHER, 2 * PAGE) == TEXT[: 2 * PAGE]


def test_a_copy_goes_on_where_the_handler_mapped_a_page() -> None:
    bench = Bench()
    frames = iter(range(0x50_0000, 0x60_0000, PAGE))
    bench.cpu.store(PLAIN, TEXT[: 6 * PAGE])
    faults = []

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        assert isinstance(fault, PageFault)
        faults.append((fault.address, int(fault.code)))
        bench.tables.map(fault.address & -PAGE, next(frames) | PAGE_RW)
        return True

    bench.cpu.set_handler(14, handler)
    bench.cpu.copy(SMALL + 0x10, PLAIN, 3 * PAGE)
    assert bench.cpu.load(SMALL + 0x10, 3 * PAGE) == TEXT[: 3 * PAGE]
    first = (SMALL + 0x10, 2)
    assert faults == [first, *((SMALL + n * PAGE, 2) for n in (1, 2, 3))]


def test_a_target_that_cannot_be_stored_to_is_known_before_the_source_is_read() -> None:
    bench = Bench()
    bench.tables.map(SMALL, FRAME | 1)
    bench.tables.map(SMALL + PAGE, FRAME | PAGE_RW)
    with pytest.raises(PageFault) as caught:
        bench.cpu.copy(SMALL, SMALL + PAGE, 8)
    assert caught.value.error_code == 3
    assert bench.tables.read(SMALL + PAGE) & A == 0


# --- what is no RAM


@dataclass
class Port:
    """A device that remembers what was stored and answers with a pattern."""

    stored: list[bytes] = field(default_factory=list)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(at % 256 for at in range(offset, offset + size))

    def write(self, offset: int, data: bytes) -> None:
        self.stored.append(data)


def with_port() -> tuple[Bench, Port]:
    bench, port = Bench(), Port()
    regions = bench.machine.map.regions
    regions[-1] = replace(regions[-1], device=port)
    for at in (0, PAGE):
        bench.tables.map(SMALL + at, 0xFEE0_0000 + at | PAGE_RW)
    return bench, port


def test_a_copy_into_a_device_brings_every_byte_in_order() -> None:
    bench, port = with_port()
    bench.cpu.store(PLAIN, TEXT[:PAGE])
    bench.cpu.copy(SMALL + 0x10, PLAIN, 0x800)
    assert b"".join(port.stored) == TEXT[:0x800]


def test_a_copy_out_of_a_device_and_from_device_to_device() -> None:
    bench, port = with_port()
    bench.cpu.copy(PRIVATE, SMALL + 0x10, 0x20)
    assert bench.cpu.load(PRIVATE, 0x20) == bytes(range(0x10, 0x30))
    bench.cpu.copy(SMALL + 0x100, SMALL + 0x10, 0x20)
    assert b"".join(port.stored) == bytes(range(0x10, 0x30))


def off() -> Cpu:
    """Return a core with paging off."""
    return Machine("rome", ram=RAM, coherent=True, seed=1).cpu


def test_a_copy_into_rom_changes_nothing_and_out_of_it_reads_ones() -> None:
    cpu = off()
    cpu.store(0x5000, TEXT[:0x100])
    cpu.copy(0xF_0000, 0x5000, 0x100)
    cpu.copy(0x5000, 0xF_0000, 0x80)
    assert cpu.load(0x5000, 0x100) == b"\xff" * 0x80 + TEXT[0x80:0x100]


def test_a_copy_runs_from_ram_into_a_hole_and_back_into_ram() -> None:
    cpu = off()
    length = 0x6_2000
    cpu.store(0x20_0000, TEXT[:length])
    cpu.copy(0x9_F000, 0x20_0000, length)
    assert cpu.load(0x9_F000, PAGE) == TEXT[:PAGE]
    assert cpu.load(0x10_0000, PAGE) == TEXT[0x6_1000:length]
    cpu.copy(0x20_0000, 0x9_F000, length)
    holes = b"\xff" * 0x6_0000
    assert cpu.load(0x20_0000, length) == (TEXT[:PAGE] + holes + TEXT[0x6_1000:length])


@pytest.mark.parametrize("act", [Cpu.copy, lambda cpu, a, b, n: cpu.copy(b, a, n)])
def test_a_copy_beyond_ram_fails_with_the_address(
    act: Callable[[Cpu, int, int, int], None],
) -> None:
    with pytest.raises(NothingThere) as nobody:
        act(off(), RAM - 8, 0x20_0000, 16)
    assert nobody.value.pa == RAM
