"""Loads and stores of a core: every size, every border, every kind of memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.errors import CallerError
from cbit.hw.faults import GeneralProtection, PageFault
from cbit.hw.memory.bus import NothingThere
from cbit.hw.trace import Event

from .test_paging_witness import (
    LARGE_RW,
    PAGE,
    PAGE_RW,
    SYSCFG,
    SYSCFG_SMEE,
    P,
    Tables,
    long_mode,
)

RAM = 16 << 20
VA = 0x7F00_0000_0000
C = 1 << 47
MMIO, ROM = 0xFEE0_0000, 0xF_0000

TEXT = bytes(range(1, 256)) * 64


def rome() -> Machine:
    return Machine("rome", ram=RAM, coherent=True, seed=1)


@dataclass
class Patchwork:
    """A virtual range sewn from small and large pages, plain and encrypted.

    There is room for 16 bytes more on either side of what the tests touch.

    Attributes:
        pieces: start, length, frame, C-bit of each leaf, ascending, without gaps.
    """

    machine: Machine = field(default_factory=rome)
    pieces: list[tuple[int, int, int, bool]] = field(init=False)

    def __post_init__(self) -> None:
        tables = Tables(self.machine)
        large = VA + (1 << 21)
        self.pieces = [
            (large - 4 * PAGE, PAGE, 0x30_5000, True),
            (large - 3 * PAGE, PAGE, 0x30_3000, False),
            (large - 2 * PAGE, PAGE, 0x30_1000, True),
            (large - PAGE, PAGE, 0x30_2000, True),
            (large, 1 << 21, 0x40_0000, True),
            (large + (1 << 21), 1 << 21, 0x60_0000, False),
            (large + (2 << 21), PAGE, 0x30_7000, False),
            (large + (2 << 21) + PAGE, PAGE, 0x30_8000, False),
            (large + (2 << 21) + 2 * PAGE, PAGE, 0x30_9000, False),
        ]
        for start, length, frame, encrypted in self.pieces:
            shift = length.bit_length() - 1
            leaf = frame | C * encrypted | (PAGE_RW if shift == 12 else LARGE_RW)
            tables.map(start, leaf, shift)
        long_mode(self.machine.cpu, tables.cr3)

    @property
    def cpu(self) -> Cpu:
        return self.machine.cpu

    def seen(self, va: int, length: int) -> bytes:
        """Return the bytes by way of the bus, one at a time."""
        return b"".join(
            self.machine.bus.load(frame + at - start, 1, int(encrypted))
            for at in range(va, va + length)
            for start, size, frame, encrypted in self.pieces
            if start <= at < start + size
        )


BORDERS = [
    ("inside a page", (1 << 21) - 3 * PAGE + 5, 11),
    ("up to the end of a page", (1 << 21) - 2 * PAGE - 8, 8),
    ("C=0 to C=1, frames not adjacent", (1 << 21) - 2 * PAGE - 5, 9),
    ("adjacent frames", (1 << 21) - PAGE - 3, 8),
    ("4 KiB to 2 MiB", (1 << 21) - 1, 2),
    ("three small pages", (1 << 21) - 3 * PAGE + 1, 2 * PAGE + 100),
    ("2 MiB to 2 MiB, C=1 to C=0", (2 << 21) - 100, 300),
    ("2 MiB to 4 KiB", (3 << 21) - 7, 15),
    ("whole pages", (3 << 21), 2 * PAGE),
    ("whole pages, frames not adjacent", (1 << 21) - 3 * PAGE, 2 * PAGE),
    ("nothing", (1 << 21) - 4, 0),
]


@pytest.mark.parametrize(
    ("offset", "length"), [b[1:] for b in BORDERS], ids=[b[0] for b in BORDERS]
)
def test_bytes_cross_every_border(offset: int, length: int) -> None:
    quilt = Patchwork()
    va = VA + offset
    quilt.cpu.fill(va - 8, 0xEE, length + 16)
    data = TEXT[:length]
    quilt.cpu.store(va, data)
    assert quilt.seen(va, length) == data
    assert quilt.cpu.load(va, length) == quilt.cpu.fetch(va, length) == data
    assert quilt.cpu.load(va - 8, 8) == quilt.cpu.load(va + length, 8) == b"\xee" * 8
    quilt.cpu.store(va, memoryview(bytes(length)))
    assert quilt.cpu.load(va, length) == bytes(length)
    quilt.cpu.store(va, b"first"[:length])
    assert quilt.seen(va, length) == b"first".ljust(length, b"\0")[:length]


@pytest.mark.parametrize("offset", range(-9, 3))
@pytest.mark.parametrize("border", [(1 << 21) - 2 * PAGE, 1 << 21, 2 << 21])
def test_eight_bytes_cross_a_border_at_any_alignment(border: int, offset: int) -> None:
    quilt = Patchwork()
    va = VA + border + offset
    quilt.cpu.fill(va - 8, 0xEE, 24)
    quilt.cpu.store64(va, 0x0807_0605_0403_0201)
    assert quilt.seen(va, 8) == bytes(range(1, 9))
    assert quilt.cpu.load64(va) == 0x0807_0605_0403_0201
    assert quilt.cpu.load(va - 8, 8) == quilt.cpu.load(va + 8, 8) == b"\xee" * 8


@pytest.mark.parametrize(
    ("offset", "length"), [b[1:] for b in BORDERS], ids=[b[0] for b in BORDERS]
)
def test_arrays_cross_every_border(offset: int, length: int) -> None:
    quilt = Patchwork()
    words = np.arange(length // 8, dtype=np.uint64) * 0x0101_0101
    va = VA + offset
    quilt.cpu.store_array(va, words)
    assert quilt.seen(va, 8 * words.size) == words.astype("<u8").tobytes()
    loaded = quilt.cpu.load_array(va, words.size)
    assert (loaded.dtype, loaded.shape) == (np.dtype("<u8"), words.shape)
    assert (loaded == words).all()
    quilt.cpu.store_array(va, words[::-1])
    assert (quilt.cpu.load_array(va, words.size) == words[::-1]).all()


def test_an_array_that_was_loaded_is_a_copy() -> None:
    quilt = Patchwork()
    va = quilt.pieces[4][0]
    quilt.cpu.fill(va, 0, PAGE)
    words = quilt.cpu.load_array(va, 512)
    quilt.cpu.fill(va, 0xFF, PAGE)
    assert not words.any()


@pytest.mark.parametrize(
    ("offset", "length"), [b[1:] for b in BORDERS], ids=[b[0] for b in BORDERS]
)
def test_fill_crosses_every_border(offset: int, length: int) -> None:
    quilt = Patchwork()
    va = VA + offset
    quilt.cpu.store(va - 8, b"\xee" * (length + 16))
    quilt.cpu.fill(va, 0x41, length)
    assert quilt.seen(va, length) == b"A" * length
    assert quilt.cpu.load(va - 8, 8) == quilt.cpu.load(va + length, 8) == b"\xee" * 8


def test_zero_bytes_touch_nothing_not_even_an_address_that_cannot_be() -> None:
    quilt = Patchwork()
    for va in (0, 1 << 47, quilt.pieces[0][0]):
        assert quilt.cpu.load(va, 0) == quilt.cpu.fetch(va, 0) == b""
        assert quilt.cpu.load_array(va, 0).size == 0
        quilt.cpu.store(va, b"")
        quilt.cpu.store_array(va, np.empty(0, np.uint64))
        quilt.cpu.fill(va, 1, 0)
        quilt.cpu.copy(va, va, 0)
    assert quilt.cpu.cr2 == 0


# --- faults in the middle


def half_mapped() -> tuple[Machine, Tables]:
    """Return a machine whose page at `VA` is mapped and the next one is not."""
    machine = rome()
    tables = Tables(machine)
    tables.map(VA, 0x20_0000 | PAGE_RW)
    tables.map(VA + PAGE, 0)
    long_mode(machine.cpu, tables.cr3)
    return machine, tables


def test_a_fault_names_the_first_byte_of_the_page_that_is_missing() -> None:
    machine, _ = half_mapped()
    cpu = machine.cpu
    for act in (
        lambda: cpu.load(VA + 0xFFD, 8),
        lambda: cpu.load64(VA + 0xFFD),
        lambda: cpu.fetch(VA + 0xFFD, 8),
        lambda: cpu.store(VA + 0xFFD, bytes(8)),
        lambda: cpu.store64(VA + 0xFFD, 0),
        lambda: cpu.fill(VA + 0xFFD, 0, 8),
    ):
        with pytest.raises(PageFault) as caught:
            act()
        assert caught.value.address == cpu.cr2 == VA + PAGE


def test_a_fault_below_names_the_byte_that_was_asked_for() -> None:
    machine, tables = half_mapped()
    tables.write(VA, 12, 0)
    with pytest.raises(PageFault) as caught:
        machine.cpu.load64(VA + 0xFFD)
    assert caught.value.address == VA + 0xFFD


def test_stores_of_many_bytes_keep_the_pages_before_the_fault() -> None:
    machine, _ = half_mapped()
    with pytest.raises(PageFault):
        machine.cpu.store(VA + 0xFF0, b"sixteen bytes or more")
    assert machine.cpu.load(VA + 0xFF0, 16) == b"sixteen bytes or"


@pytest.mark.parametrize("offset", range(0xFF9, 0x1000))
def test_one_instruction_of_eight_bytes_stores_all_or_nothing(offset: int) -> None:
    # MOV is restartable: a fault on its second page leaves the first untouched.
    machine, tables = half_mapped()
    machine.cpu.store64(VA + 0xFF8, 0)
    with pytest.raises(PageFault) as caught:
        machine.cpu.store64(VA + offset, (1 << 64) - 1)
    assert caught.value.address == VA + PAGE
    assert machine.cpu.load64(VA + 0xFF8) == 0
    tables.write(VA + PAGE, 12, 0x20_1000 | PAGE_RW)
    machine.cpu.store64(VA + offset, (1 << 64) - 1)
    assert machine.cpu.load64(VA + offset) == (1 << 64) - 1


# --- paging off


@pytest.mark.req("PT-27", "WP-16", "CM-73")
def test_with_paging_off_every_access_is_plain() -> None:
    machine = Machine("milan", ram=RAM, seed=1)
    cpu = machine.cpu
    assert cpu.rdmsr(SYSCFG) & SYSCFG_SMEE
    cpu.store(0x1234, b"in the clear")
    assert cpu.fetch(0x1234, 12) == b"in the clear"
    cpu.wbinvd()
    assert machine.snoop(0x1234, 12) == b"in the clear"


@pytest.mark.req("PT-27", "CM-73")
def test_cr3_and_its_c_bit_mean_nothing_with_paging_off() -> None:
    machine = Machine("milan", ram=RAM, seed=1)
    machine.cpu.write_cr3(0x5000 | 1 << 51)
    machine.cpu.store(0x1234, b"in the clear")
    machine.cpu.wbinvd()
    assert machine.snoop(0x1234, 12) == b"in the clear"


@pytest.mark.req("WP-28")
def test_with_paging_off_transparent_encryption_still_encrypts() -> None:
    machine = Machine("milan", ram=RAM, tsme=True, seed=1)
    machine.cpu.store(0x1230, b"sixteen bytes...")
    machine.cpu.wbinvd()
    assert machine.snoop(0x1230, 16) != b"sixteen bytes..."
    assert machine.cpu.load(0x1230, 16) == b"sixteen bytes..."


@pytest.mark.parametrize("va", [1 << 32, 1 << 47, (1 << 64) - 8, -8])
def test_with_paging_off_an_address_has_32_bits(va: int) -> None:
    cpu = rome().cpu
    for act in (lambda: cpu.load64(va), lambda: cpu.store64(va, 0)):
        with pytest.raises(GeneralProtection, match="32 bits with paging off"):
            act()


def test_with_paging_off_an_access_may_reach_the_limit_and_not_cross_it() -> None:
    cpu = rome().cpu
    assert cpu.load((1 << 32) - 8, 8) == b"\xff" * 8
    with pytest.raises(GeneralProtection):
        cpu.load((1 << 32) - 4, 8)


def test_with_paging_off_a_long_access_needs_no_page() -> None:
    cpu = rome().cpu
    cpu.store(0x12_3456, TEXT * 4)
    assert cpu.load(0x12_3456, len(TEXT) * 4) == TEXT * 4
    assert (cpu.load_array(0x12_3456, 7) == np.frombuffer(TEXT[:56], "<u8")).all()


# --- what is no RAM


@dataclass
class Register:
    """A device with one register that answers what was stored last, inverted."""

    value: bytes = bytes(8)
    met: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, offset: int, size: int) -> bytes:
        self.met.append(("read", offset, size))
        return bytes(255 - b for b in self.value[:size])

    def write(self, offset: int, data: bytes) -> None:
        self.met.append(("write", offset, len(data)))
        self.value = data + self.value[len(data) :]


def with_device() -> tuple[Machine, Tables, Register]:
    """Return a machine in long mode; `VA` maps a device, one page further RAM."""
    machine, device = rome(), Register()
    machine.map.regions[-1] = replace(machine.map.regions[-1], device=device)
    tables = Tables(machine)
    tables.map(VA, MMIO | PAGE_RW)
    tables.map(VA + PAGE, 0x20_0000 | PAGE_RW)
    long_mode(machine.cpu, tables.cr3)
    return machine, tables, device


def test_a_device_sees_each_access_once_and_as_it_is() -> None:
    machine, _, device = with_device()
    cpu = machine.cpu
    offset = MMIO - 0xC000_0000
    cpu.store64(VA + 0x10, 1)
    assert cpu.load64(VA + 0x10) == (1 << 64) - 2
    cpu.store(VA + 0x20, b"\x55\xaa")
    assert cpu.load(VA + 0x20, 2) == b"\xaa\x55"
    cpu.fill(VA + 0x30, 7, 4)
    assert device.met == [
        ("write", offset + 0x10, 8),
        ("read", offset + 0x10, 8),
        ("write", offset + 0x20, 2),
        ("read", offset + 0x20, 2),
        ("write", offset + 0x30, 4),
    ]


def test_an_access_may_begin_in_a_device_and_end_in_ram() -> None:
    machine, _, device = with_device()
    machine.cpu.store(VA + 0xFFE, b"abcd")
    assert (device.value[:2], machine.cpu.load(VA + PAGE, 2)) == (b"ab", b"cd")


def test_a_device_through_c_is_served_and_counted() -> None:
    machine, tables, device = with_device()
    events: list[Event] = []
    machine.trace.listen(events.append, frozenset({"mmio-encrypted"}))
    tables.write(VA, 12, MMIO | C | PAGE_RW)
    machine.cpu.store(VA, b"abcd")
    assert device.value[:4] == b"abcd", "nobody enciphers what a device gets"
    machine.cpu.load(VA, 4)
    assert machine.bus.mmio_encrypted == 2
    assert [(e.facts["pa"], e.facts["access"]) for e in events] == [
        (MMIO, "store"),
        (MMIO, "load"),
    ]


def test_rom_is_read_and_ignores_stores() -> None:
    cpu = rome().cpu
    for _ in range(2):
        assert cpu.load(ROM + 0xFFF0, 16) == b"\xff" * 16
        cpu.store64(ROM + 0xFFF0, 0)
        cpu.store(ROM + 0xFF00, b"firmware")
        cpu.fill(ROM, 0, 0x1_0000)
    assert cpu.load_array(ROM, 2).tolist() == [(1 << 64) - 1] * 2


def test_bytes_run_from_ram_over_a_hole_and_a_rom_into_ram_again() -> None:
    cpu = rome().cpu
    cpu.store(0x9_FFF0, bytes(range(16)))
    cpu.store(0x10_0000, bytes(range(16)))
    span = cpu.load(0x9_FFF0, 0x6_0020)
    assert span == bytes(range(16)) + b"\xff" * 0x6_0000 + bytes(range(16))
    cpu.fill(0x9_FFF0, 0, 0x6_0020)
    assert cpu.load(0x9_FFF0, 16) == cpu.load(0x10_0000, 16) == bytes(16)
    assert cpu.load(0xA_0000, 0x6_0000) == b"\xff" * 0x6_0000


def test_beyond_the_last_byte_of_ram_nobody_answers() -> None:
    cpu = rome().cpu
    cpu.store64(RAM - 8, 1)
    for act in (
        lambda: cpu.load64(RAM - 4),
        lambda: cpu.store64(RAM, 0),
        lambda: cpu.fill(RAM - 8, 0, 16),
    ):
        with pytest.raises(NothingThere) as nobody:
            act()
        assert nobody.value.pa == RAM


@pytest.mark.parametrize("pa", [MMIO, 0xA_0000, ROM, 0xFFFF_FFC0])
def test_a_flush_of_what_is_no_ram_does_nothing(pa: int) -> None:
    cpu = rome().cpu
    cpu.store(0x1000, b"dirty")
    cpu.clflush(pa)
    assert cpu.load(0x1000, 5) == b"dirty"


# --- flushes


@pytest.mark.req("PT-51")
@pytest.mark.parametrize("coherent", [True, False])
def test_clflush_writes_back_the_line_under_the_tag_of_the_mapping(
    coherent: bool,
) -> None:
    machine = Machine("rome", ram=RAM, coherent=coherent, seed=1)
    tables = Tables(machine)
    tables.map(VA, 0x20_0000 | C | PAGE_RW)
    tables.map(VA + PAGE, 0x20_0000 | PAGE_RW)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3)
    cpu.store(VA, b"sixteen bytes..." * 8)
    cpu.clflush(VA + PAGE + 64)  # the other mapping
    if not coherent:
        assert machine.snoop(0x20_0040, 16) == bytes(16)
    cpu.clflush(VA + 64 + 63)
    engine = machine.controller.engine(1)
    assert engine.decrypt(0x20_0040, machine.snoop(0x20_0040, 16)) == (
        b"sixteen bytes..."
    )


def test_clflush_needs_a_page_that_can_be_read() -> None:
    machine, tables = half_mapped()
    with pytest.raises(PageFault):
        machine.cpu.clflush(VA + PAGE)
    tables.write(VA, 12, 0x20_0000 | P)
    machine.cpu.clflush(VA)  # a store is not meant


# --- the caller's mistakes


def test_a_privilege_level_is_0_or_3() -> None:
    cpu = rome().cpu
    for level in (1, 2, 4, -1):
        with pytest.raises(CallerError, match="0 or 3"):
            cpu.cpl = level
    cpu.cpl = 3
    assert cpu.cpl == 3
