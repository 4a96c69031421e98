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
