"""hw/memory/bus: RAM through the caches, ROM and devices directly, nothing else."""

import random

import pytest

from cbit.hw.cipher import MemoryCipher, Tweaks
from cbit.hw.errors import CbitError
from cbit.hw.memory import (
    SLOT_HOST,
    SLOT_NONE,
    CacheHierarchy,
    Dram,
    HazardPolicy,
    MemoryBus,
    MemoryController,
    MemoryMap,
    Region,
    RegionKind,
)
from cbit.hw.memory.bus import NothingThere
from cbit.hw.trace import Event, Trace
from cbit.hw.types import PAGE_SIZE, PhysAddr

ROM_BYTES = bytes(range(256)) * 16
DEVICE_START = 0x6000


class Recorder:
    """A device that answers with the offset asked and notes what it is told."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, bytes]] = []

    def read(self, offset: int, size: int) -> bytes:
        self.reads.append((offset, size))
        return offset.to_bytes(size, "little")

    def write(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))


class Board:
    """RAM, a ROM at 0x5000, a device at 0x6000, RAM from 0x7000 to 0x9000."""

    def __init__(self, *, coherent: bool = True, transparent: bool = False) -> None:
        self.device, self.trace = Recorder(), Trace()
        kinds = RegionKind
        memory_map = MemoryMap(
            [
                Region(PhysAddr(0), PhysAddr(0x5000), kinds.RAM),
                Region(PhysAddr(0x5000), PhysAddr(0x6000), kinds.ROM, ROM_BYTES),
                Region(
                    PhysAddr(DEVICE_START),
                    PhysAddr(0x7000),
                    kinds.MMIO,
                    device=self.device,
                ),
                Region(PhysAddr(0x7000), PhysAddr(0x9000), kinds.RAM),
            ]
        )
        self.dram = Dram(0x9000)
        controller = MemoryController(transparent=transparent)
        tweaks = Tweaks([bytes([n] * 16) for n in range(48)])
        self.engine = MemoryCipher(bytes(range(16)), tweaks, True)
        controller.load_key(SLOT_HOST, self.engine)
        self.caches = CacheHierarchy(
            self.dram,
            controller,
            coherent=coherent,
            random_source=random.Random(1),
            hazards=HazardPolicy.RECORD,
            trace=self.trace,
        )
        self.bus = MemoryBus(memory_map, self.caches, controller, self.trace)


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def bus(board: Board) -> MemoryBus:
    return board.bus


def test_ram_keeps_what_is_stored(bus: MemoryBus) -> None:
    bus.store(0x1FFE, b"over a page", SLOT_NONE)
    assert bus.load(0x1FFE, 11, SLOT_NONE) == b"over a page"
    bus.store(0x1FFF, memoryview(b"VER"), SLOT_NONE)
    assert bus.load(0x1FFD, 7, SLOT_NONE) == b"\0oVER a"


def test_what_is_loaded_is_a_copy(bus: MemoryBus) -> None:
    before = bus.load(0x1000, 4, SLOT_NONE)
    bus.store(0x1000, b"new!", SLOT_NONE)
    assert before == bytes(4)


def test_rom_answers_and_ignores_writes(board: Board) -> None:
    board.bus.store(0x5010, b"not me", SLOT_NONE)
    assert board.bus.load(0x5010, 4, SLOT_NONE) == b"\x10\x11\x12\x13"
    board.caches.write_back_invalidate()
    assert not board.dram.cells.any()


def test_a_device_sees_offset_and_bytes(board: Board) -> None:
    assert board.bus.load(DEVICE_START + 0x20, 4, SLOT_NONE) == b"\x20\0\0\0"
    board.bus.store(DEVICE_START + 0x30, b"\1\2", SLOT_NONE)
    assert board.device.reads == [(0x20, 4)]
    assert board.device.writes == [(0x30, b"\1\2")]
    assert board.bus.mmio_encrypted == 0


def test_an_access_over_several_regions_is_split_between_them(board: Board) -> None:
    board.bus.store(0x4FFC, b"ramm" + bytes(PAGE_SIZE) + b"dd", SLOT_NONE)
    assert board.device.writes == [(0, b"dd")]
    assert board.bus.load(0x4FFC, 6, SLOT_NONE) == b"ramm" + ROM_BYTES[:2]
    across = board.bus.load(0x5FFE, 4, SLOT_NONE)
    assert across == ROM_BYTES[-2:] + b"\0\0"
    assert board.device.reads == [(0, 2)]


# --- devices through C = 1


@pytest.mark.req("BZ-9")
def test_a_device_through_c_1_gets_plain_bytes_and_is_reported(board: Board) -> None:
    events: list[Event] = []
    board.trace.listen(events.append)
    board.bus.store(DEVICE_START + 8, b"\1\2\3\4", SLOT_HOST)
    board.bus.load(DEVICE_START + 8, 2, SLOT_HOST)
    assert board.device.writes == [(8, b"\1\2\3\4")]
    assert board.bus.mmio_encrypted == 2
    assert [(event.kind, dict(event.facts)) for event in events] == [
        (
            "mmio-encrypted",
            {"pa": 0x6008, "length": 4, "access": "store", "through": "C=1"},
        ),
        (
            "mmio-encrypted",
            {"pa": 0x6008, "length": 2, "access": "load", "through": "C=1"},
        ),
    ]


@pytest.mark.req("BZ-9")
def test_a_rom_through_c_1_is_reported_too(board: Board) -> None:
    assert board.bus.load(0x5000, 2, SLOT_HOST) == ROM_BYTES[:2]
    board.bus.store(0x5000, b"x", SLOT_HOST)
    assert board.bus.mmio_encrypted == 2


def test_under_tsme_no_device_access_is_an_error_of_the_mapping() -> None:
    board = Board(transparent=True)
    board.bus.load(DEVICE_START, 4, board.bus.slot_for(True))
    board.bus.load(DEVICE_START, 4, board.bus.slot_for(False))
    assert board.bus.mmio_encrypted == 0


# --- nothing there


@pytest.mark.parametrize("slot", [SLOT_NONE, SLOT_HOST])
@pytest.mark.parametrize(
    ("pa", "length", "first"),
    [(0x9000, 1, 0x9000), (0x8FFF, 2, 0x9000), (1 << 45, 8, 1 << 45)],
)
def test_where_nobody_answers_the_address_is_named(
    bus: MemoryBus, slot: int, pa: int, length: int, first: int
) -> None:
    for access in (
        lambda: bus.load(pa, length, slot),
        lambda: bus.store(pa, bytes(length), slot),
    ):
        with pytest.raises(NothingThere) as error:
            access()
        assert error.value.pa == first
        assert str(error.value).startswith(f"physical address {first:#x} (")
        assert "RAM ends at 0x9000" in str(error.value)
        assert isinstance(error.value, CbitError)


def test_what_came_before_the_end_of_memory_was_stored(bus: MemoryBus) -> None:
    with pytest.raises(NothingThere):
        bus.store(0x8FFE, b"abc", SLOT_NONE)
    assert bus.load(0x8FFE, 2, SLOT_NONE) == b"ab"


# --- bulk access


@pytest.mark.parametrize(
    ("pa", "length"), [(0x5000, 8), (0x6000, 8), (0x4FFF, 2), (0x6FFF, 2)]
)
def test_only_ram_is_given_out_in_bulk(bus: MemoryBus, pa: int, length: int) -> None:
    for slot in (SLOT_NONE, SLOT_HOST):
        assert bus.claim_ram(pa, length, slot) is None
        assert bus.stream_ram(pa, length, slot) is None


def test_claimed_ram_is_live_and_dirty(board: Board) -> None:
    view = board.bus.claim_ram(0x1800, 0x2000, SLOT_NONE)
    assert view is not None
    view[:] = 0x5A
    assert board.bus.load(0x17FF, 0x2002, SLOT_NONE) == b"\0" + b"\x5a" * 0x2000 + b"\0"
    board.caches.drain()
    assert board.dram.cells[0x1800:0x3800].tobytes() == b"\x5a" * 0x2000


@pytest.mark.parametrize("slot", [SLOT_NONE, SLOT_HOST])
def test_streamed_ram_shows_what_was_stored(board: Board, slot: int) -> None:
    board.bus.store(0x1234, b"read me once", slot)
    view = board.bus.stream_ram(0x1234, 12, slot)
    assert view is not None
    assert view.tobytes() == b"read me once"


def test_bulk_access_where_nobody_answers_names_the_address(bus: MemoryBus) -> None:
    for access in (bus.claim_ram, bus.stream_ram):
        with pytest.raises(NothingThere, match="physical address 0x9000"):
            access(0x9000, 8, SLOT_NONE)


def test_rom_and_devices_never_get_a_page_view(board: Board) -> None:
    board.bus.load(0x1000, 1, SLOT_NONE)
    for page in (9, 1 << 33):  # above RAM
        assert board.bus.page_view(SLOT_NONE, page, write=False) is None
    for page in (5, 6):
        board.bus.load(page * PAGE_SIZE, PAGE_SIZE // 512, SLOT_NONE)
        board.bus.store(page * PAGE_SIZE, b"x", SLOT_NONE)
        for write in (False, True):
            assert board.bus.page_view(SLOT_NONE, page, write=write) is None


# --- flushes


@pytest.mark.parametrize("slot", [SLOT_NONE, SLOT_HOST])
def test_lines_and_pages_are_flushed_by_address(slot: int) -> None:
    board = Board(coherent=False)
    lines = board.dram.lines[0x2000 // 64 : 0x3000 // 64]
    board.bus.store(0x2000, b"x" * 192, slot)
    board.bus.flush_line(0x207F, slot)
    assert [n for n in range(64) if lines[n].any()] == [1]
    board.bus.flush_page(0x2FFF, slot)
    assert [n for n in range(64) if lines[n].any()] == [0, 1, 2]


def test_flushing_what_has_no_lines_does_nothing(board: Board) -> None:
    events: list[Event] = []
    board.trace.listen(events.append)
    for pa in (0x5000, DEVICE_START, 0x9000, 1 << 45):
        board.bus.flush_line(pa, SLOT_HOST)
        board.bus.flush_page(pa, SLOT_HOST)
    assert events == []


@pytest.mark.req("WP-1", "WP-13")
@pytest.mark.parametrize("coherent", [False, True])
def test_ram_through_c_1_reaches_dram_as_ciphertext(coherent: bool) -> None:
    board = Board(coherent=coherent)
    secret = bytes(range(64))
    board.bus.store(0x7040, secret, SLOT_HOST)
    board.caches.drain()
    stored = board.dram.cells[0x7040:0x7080].tobytes()
    assert stored == board.engine.encrypt(0x7040, secret)
