"""hw/memory/memory_map: a PC's layout, and who answers at an address."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.hw.errors import CallerError
from cbit.hw.memory import MemoryMap, Region, RegionKind
from cbit.hw.types import PAGE_SIZE, PhysAddr

MIB, GIB = 1 << 20, 1 << 30
RAM, ROM, MMIO = RegionKind.RAM, RegionKind.ROM, RegionKind.MMIO


def kind_at(memory_map: MemoryMap, pa: int) -> RegionKind | None:
    region = memory_map.find(pa)
    return region.kind if region else None


def region(start: int, end: int, kind: RegionKind = RAM) -> Region:
    return Region(PhysAddr(start), PhysAddr(end), kind)


@pytest.mark.parametrize(
    ("pa", "kind"),
    [
        (0, RAM),
        (0x9_FFFF, RAM),
        (0xA_0000, MMIO),  # the VGA window
        (0xE_FFFF, MMIO),
        (0xF_0000, ROM),
        (0xF_FFFF, ROM),
        (0x10_0000, RAM),
        (64 * MIB - 1, RAM),
        (64 * MIB, None),  # between RAM and the PCI hole nobody answers
        (0xBFFF_FFFF, None),
        (0xC000_0000, MMIO),  # the PCI hole
        (0xFFFF_FFFF, MMIO),
        (4 * GIB, None),
        (-1, None),
    ],
)
def test_a_pc_with_64_mib(pa: int, kind: RegionKind | None) -> None:
    assert kind_at(MemoryMap.pc(64 * MIB), pa) is kind


def test_ram_above_3_gib_moves_above_the_hole() -> None:
    memory_map = MemoryMap.pc(8 * GIB)
    low, main, high = memory_map.ram()
    assert (low.start, low.end) == (0, 0xA_0000)
    assert (main.start, main.end) == (0x10_0000, 3 * GIB)
    assert (high.start, high.end) == (4 * GIB, 9 * GIB)
    assert memory_map.ram_end == 9 * GIB
    assert memory_map.ram_bytes == 8 * GIB - 0x6_0000
    assert kind_at(memory_map, 9 * GIB - 1) is RAM
    assert kind_at(memory_map, 9 * GIB) is None


def test_exactly_3_gib_needs_no_second_part() -> None:
    memory_map = MemoryMap.pc(3 * GIB)
    assert memory_map.ram_end == 3 * GIB
    assert kind_at(memory_map, 3 * GIB) is MMIO


@pytest.mark.parametrize("ram", [0, 4096, 2 * MIB - PAGE_SIZE, 2 * MIB + 1, -4096])
def test_a_size_that_cannot_be_is_refused(ram: int) -> None:
    with pytest.raises(CallerError) as refusal:
        MemoryMap.pc(ram)
    assert str(refusal.value).startswith(f"RAM of {ram:#x} bytes: 2 MiB or more")


@pytest.mark.parametrize("length", [0, 0xFFFF, 0x1_0001])
def test_a_rom_that_does_not_fill_its_window_is_refused(length: int) -> None:
    with pytest.raises(CallerError) as refusal:
        MemoryMap.pc(2 * MIB, bytes(length))
    assert f"{length:#x} bytes" in str(refusal.value)
    assert "0x10000 expected" in str(refusal.value)


def test_a_window_without_a_device_reads_as_ones_and_takes_anything() -> None:
    hole = MemoryMap.pc(2 * MIB).find(0xC000_0000)
    assert hole is not None
    hole.device.write(0x10, b"\0\0")
    assert hole.device.read(0x10, 3) == b"\xff\xff\xff"


class Registers:
    """A device that shows offsets."""

    def read(self, offset: int, size: int) -> bytes:
        return bytes([offset & 0xFF]) * size

    def write(self, offset: int, data: bytes) -> None:
        raise AssertionError("nobody writes")


def spans(memory_map: MemoryMap, start: int) -> list[tuple[int, int]]:
    return [(r.start, r.end) for r in memory_map.regions if r.start >= start]


def test_a_device_splits_the_window_around_it() -> None:
    memory_map = MemoryMap.pc(2 * MIB)
    device = Registers()
    memory_map.attach(0xFEE0_0000, 0x1000, device)
    assert spans(memory_map, 0xC000_0000) == [
        (0xC000_0000, 0xFEE0_0000),
        (0xFEE0_0000, 0xFEE0_1000),
        (0xFEE0_1000, 0x1_0000_0000),
    ]
    found = [memory_map.find(pa) for pa in (0xFEDF_FFFF, 0xFEE0_0FFF, 0xFEE0_1000)]
    assert [r is not None and r.device is device for r in found] == [False, True, False]
    assert kind_at(memory_map, 0xFEE0_1000) is MMIO


@pytest.mark.parametrize(
    ("start", "size", "pieces"),
    [
        (0xC000_0000, 0x1000, 2),
        (0xFFFF_F000, 0x1000, 2),
        (0xC000_0000, 0x4000_0000, 1),
    ],
)
def test_a_device_at_an_edge_leaves_no_empty_region(
    start: int, size: int, pieces: int
) -> None:
    memory_map = MemoryMap.pc(2 * MIB)
    memory_map.attach(start, size, Registers())
    assert len(spans(memory_map, 0xC000_0000)) == pieces
    assert all(r.start < r.end for r in memory_map.regions)
    assert memory_map.find(start) is memory_map.find(start + size - 1)


def test_several_devices_share_a_window() -> None:
    memory_map = MemoryMap.pc(2 * MIB)
    starts = (0xFEE0_0000, 0xFEC0_0000, 0xFEE0_1000)
    devices = {start: Registers() for start in starts}
    for start, device in devices.items():
        memory_map.attach(start, 0x1000, device)
    for start, device in devices.items():
        region = memory_map.find(start + 0x10)
        assert region is not None
        assert (region.start, region.end) == (start, start + 0x1000)
        assert region.device is device


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (0x10_0000, 0x1000),  # RAM
        (0xF_0000, 0x1000),  # ROM
        (0x200_0000, 0x1000),  # nothing
        (0xFFFF_F000, 0x2000),  # over the end of the window
        (0xE_F000, 0x2000),  # into the ROM
        (0xBFFF_F000, 0x2000),  # begins before it
        (-0x1000, 0x1000),
    ],
)
def test_a_device_where_no_window_is_is_refused(start: int, size: int) -> None:
    memory_map = MemoryMap.pc(2 * MIB)
    before = list(memory_map.regions)
    with pytest.raises(CallerError, match="no room for device registers"):
        memory_map.attach(start, size, Registers())
    assert memory_map.regions == before


@pytest.mark.parametrize("start", [0xFEE0_0000, 0xFEE0_0800, 0xFEDF_F800])
def test_a_device_over_another_is_refused(start: int) -> None:
    memory_map = MemoryMap.pc(2 * MIB)
    device = Registers()
    memory_map.attach(0xFEE0_0000, 0x1000, device)
    with pytest.raises(CallerError, match="where nothing answers"):
        memory_map.attach(start, 0x1000, Registers())
    region = memory_map.find(0xFEE0_0800)
    assert region is not None
    assert region.device is device


def test_overlapping_regions_are_refused_with_both_names() -> None:
    with pytest.raises(CallerError) as refusal:
        MemoryMap([region(0x8000, 0x9001), region(0x9000, 0xA000, MMIO)])
    assert str(refusal.value) == (
        "memory map: mmio at 0x9000 overlaps ram [0x8000, 0x9001)"
    )


def test_a_region_inside_another_is_refused_in_any_order() -> None:
    inner, outer = region(0x2000, 0x3000, MMIO), region(0x1000, 0x8000)
    for regions in ([inner, outer], [outer, inner]):
        with pytest.raises(CallerError, match="mmio at 0x2000 overlaps ram"):
            MemoryMap(regions)


def test_regions_may_touch_and_need_no_order() -> None:
    memory_map = MemoryMap([region(0x9000, 0xA000, ROM), region(0x8000, 0x9000)])
    assert [r.start for r in memory_map.regions] == [0x8000, 0x9000]
    assert kind_at(memory_map, 0x8FFF) is RAM
    assert kind_at(memory_map, 0x9000) is ROM


@given(
    st.lists(st.integers(1, 60), min_size=2, max_size=12, unique=True),
    st.integers(0, 70),
)
def test_law_find_agrees_with_a_look_at_every_region(edges: list[int], pa: int) -> None:
    edges.sort()
    kinds = [RAM, MMIO, ROM]
    regions = [
        region(start, end, kinds[n % 3])
        for n, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    holders = [r for r in regions if r.start <= pa < r.end]
    assert MemoryMap(regions[::-1]).find(pa) == (holders[0] if holders else None)
