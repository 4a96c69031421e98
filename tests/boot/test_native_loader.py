"""boot/native_loader.py: what lies where when real machine code is entered."""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cbit.boot.image import load_image
from cbit.boot.image.source import ImageSource
from cbit.boot.loader import load_kernel
from cbit.boot.native_loader import NativeEntry, carve_acpi, load_native
from cbit.boot.params import BootParams, E820Entry, E820Type, SetupData, SetupDataType
from cbit.hw.errors import InputError, KernelError
from cbit.hw.machine import Machine
from cbit.hw.types import PhysAddr
from cbit.tools.boot_run import firmware_memory_map

from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    GIB,
    INCOHERENT,
    MIB,
    cached_builtin,
    random_bytes,
)
from .test_image import CODE, bzimage, payload, vmlinux

NATIVE = {
    "version": 0x20F,
    "init_size": 3 * MIB + 0x1000,
    "cmdline_size": 2047,
}
EXTRA = {
    "loadflags": (0x211, "B", 0x80),
    "initrd_addr_max": (0x22C, "I", 0x7FFF_FFFF),
    "kernel_alignment": (0x230, "I", 0x20_0000),
    "relocatable_kernel": (0x234, "B", 1),
    "xloadflags": (0x236, "H", 0x7F),
    "pref_address": (0x258, "Q", 16 * MIB),
}
LOAD = 16 * MIB
TAKEN_END = LOAD + 4 * MIB + 4 * MIB
"""init_size rounded up to 2 MiB, and the work area."""
ACPI_SIZE = 0x1_0000


def image(**changes: int) -> bytes:
    """A bzImage with a 64-bit entry, not signed; its code is no machine code."""
    packed = payload("gzip", vmlinux())
    content = bytearray(bzimage(packed, **(NATIVE | changes)))
    for name, (offset, kind, value) in EXTRA.items():
        struct.pack_into("<" + kind, content, offset, changes.get(name, value))
    return bytes(content)


def source(content: bytes) -> ImageSource:
    return ImageSource("vmlinuz-test", memoryview(content))


def pieces(*ranges: tuple[int, int, int]) -> list[E820Entry]:
    return [E820Entry(PhysAddr(a), b - a, E820Type(kind)) for a, b, kind in ranges]


class Loaded:
    """A machine with a kernel at its door."""

    def __init__(
        self, kernel: Any, *, model: str = COHERENT, ram: int = 64 * MIB, **options: Any
    ) -> None:
        self.machine = Machine(model, ram=ram, seed=1)
        self.firmware = firmware_memory_map(self.machine)
        if isinstance(kernel, bytes):
            kernel = source(kernel)
        options = {"e820": self.firmware, "command_line": b"quiet"} | options
        self.entry: NativeEntry = load_native(self.machine.cpu, kernel, **options)
        self.page = self.load(self.entry.rsi, 4096)
        self.params = BootParams.parse(self.page)

    def load(self, pa: int, size: int) -> bytes:
        """Return what a probe reads once the caches have come to rest."""
        self.machine.caches.drain()
        return self.machine.snoop(PhysAddr(pa), size)


# A bzImage as it is


def test_the_code_of_a_bzimage_lies_plain_at_its_preferred_address() -> None:
    content = image()
    made = Loaded(content + b"a signature")
    code = content[1024:]
    assert made.load(LOAD, len(code)) == code
    assert made.load(LOAD + len(code), 11) == bytes(11)
    assert (made.entry.rip, made.entry.rsi) == (LOAD + 0x200, 0x9_0000)
    assert (made.entry.kind, made.entry.name) == ("bzImage", "vmlinuz-test")
    assert not made.entry.decompressed
    assert set(made.machine.dram.count_pages()) == {0}


def test_the_setup_header_is_passed_on_and_nothing_before_it() -> None:
    content = image()
    made = Loaded(content, initrd=bytes(5))
    own = {
        *(0x210, 0x211),  # loader type, loadflags
        *range(0x214, 0x220),  # code32_start, initrd
        *range(0x228, 0x22C),  # command line
        *range(0x250, 0x258),  # setup data
    }
    for at in range(0x1F1, 0x26C):
        assert at in own or made.page[at] == content[at]
    assert made.page[0x1EF] == 0  # the sentinel
    params = made.params
    assert (params.type_of_loader, params.loadflags) == (0xFF, 0x81)
    assert params.code32_start == LOAD
    assert made.load(params.cmd_line, 6) == b"quiet\0"
    assert made.entry.command_line == params.cmd_line


def test_a_seed_for_random_numbers_is_in_the_list_of_setup_data() -> None:
    seed = random_bytes(32)
    made = Loaded(image(), rng_seed=seed)
    node = SetupData.parse(made.load(made.params.setup_data, 48))
    assert (node.type, node.data, node.next) == (SetupDataType.RNG_SEED, seed, 0)


def test_the_initrd_lies_below_the_acpi_range_and_clear_of_the_kernel() -> None:
    data = random_bytes(3 * MIB + 5)
    made = Loaded(image(), initrd=data)
    start, size = made.params.initrd_start, made.params.initrd_len
    assert (start, size) == made.entry.initrd
    assert made.load(start, size) == data
    assert start >= made.entry.kernel.end
    assert made.params.initrd_end == made.entry.acpi.start == 64 * MIB - ACPI_SIZE


@pytest.mark.parametrize(
    ("changes", "ram", "kernel"),
    [
        ({}, 64 * MIB, (LOAD, TAKEN_END)),
        # Not a byte more than needed; ACPI tables have their own.
        ({}, TAKEN_END + ACPI_SIZE, (LOAD, TAKEN_END)),
        # Preferred places that are not aligned, or too low for this machine.
        ({"pref_address": 17 * MIB}, 64 * MIB, (18 * MIB, 26 * MIB)),
        ({"pref_address": 17 * MIB, "relocatable_kernel": 0}, 64 * MIB, None),
        ({"pref_address": 0}, 64 * MIB, (2 * MIB, 10 * MIB)),
        ({"kernel_alignment": 32 * MIB}, 64 * MIB, (32 * MIB, 40 * MIB)),
        ({"init_size": 4 * MIB}, 64 * MIB, (LOAD, TAKEN_END)),
        ({"init_size": 4 * MIB + 1}, 64 * MIB, (LOAD, TAKEN_END + 2 * MIB)),
    ],
)
def test_the_place_of_a_bzimage(
    changes: dict[str, int], ram: int, kernel: tuple[int, int] | None
) -> None:
    entry = Loaded(image(**changes), ram=ram).entry
    if kernel is None:  # it cannot be moved: where it asks to be, aligned or not
        kernel = 17 * MIB, 26 * MIB
    assert (entry.kernel.start, entry.kernel.end) == kernel
    assert entry.rip == entry.kernel.start + 0x200


def test_a_bzimage_goes_to_the_next_ram_where_the_first_is_too_small() -> None:
    e820 = pieces((0, 0xA_0000, 1), (MIB, 20 * MIB, 1), (33 * MIB, 64 * MIB, 1))
    made = Loaded(image(), e820=e820)
    assert made.entry.rip == 34 * MIB + 0x200
    assert made.params.code32_start == 34 * MIB


# The kernel itself


@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_a_decompressed_kernel_is_loaded_as_the_reference_is(model: str) -> None:
    built_in = cached_builtin(1)
    initrd = random_bytes(MIB)
    made = Loaded(built_in, model=model, initrd=initrd)
    other = Machine(model, ram=64 * MIB, seed=1)
    hand_over = load_kernel(
        other.cpu,
        built_in,
        e820=made.entry.e820,
        command_line=b"quiet",
        initrd=initrd,
    )
    assert made.entry.hand_over == hand_over
    assert made.entry.rip == built_in.entry
    assert made.entry.decompressed
    assert made.entry.layout == built_in.layout
    other.caches.drain()
    expected = bytearray(other.dram.cells.tobytes())
    expected[0x9_0070:0x9_0078] = made.entry.acpi.start.to_bytes(8, "little")
    expected[0x8_7000:0x8_7020] = made.load(0x8_7000, 0x20)
    acpi = made.entry.acpi
    expected[acpi.start : acpi.end] = made.load(acpi.start, acpi.size)
    made.machine.caches.drain()
    assert made.machine.dram.cells.tobytes() == bytes(expected)


def test_an_elf_file_is_loaded_by_its_segments(tmp_path: Path) -> None:
    file = tmp_path / "vmlinux"
    file.write_bytes(vmlinux())
    made = Loaded(file)
    assert (made.entry.kind, made.entry.name) == ("ELF", "vmlinux")
    assert made.entry.rip == LOAD
    assert made.load(LOAD, len(CODE)) == CODE


def test_the_layout_behind_a_bzimage_is_read_when_it_is_asked_for() -> None:
    layout = Loaded(image()).entry.layout
    assert layout is not None
    assert layout.text_start == LOAD
    broken = Loaded(image(payload_length=0))
    assert broken.entry.layout is None
    with pytest.raises(KernelError, match="vmlinuz-test: no layout"):
        _ = broken.entry.hand_over


# What firmware leaves


def test_the_segments_of_the_gdt_are_flat() -> None:
    made = Loaded(image())
    entry = made.entry
    assert (entry.gdt_base, entry.gdt_limit) == (0x8_7000, 0x1F)
    null, unused, code, data = struct.unpack("<4Q", made.load(entry.gdt_base, 32))
    assert null == unused == 0
    for descriptor, kind in ((code, 0xB), (data, 0x3)):
        assert descriptor & 0xFFFF == descriptor >> 48 & 0xF | 0xFFF0  # the limit
        assert descriptor >> 16 & 0xFF_FFFF == descriptor >> 56 == 0  # the base
        assert descriptor >> 40 & 0xFF == 0x90 | kind  # present, ring 0, accessed
        assert descriptor >> 55 & 1 == 1  # in pages
    assert (code >> 53 & 3, data >> 53 & 3) == (0b01, 0b10)  # L, D


def test_stack_gdt_and_page_tables_do_not_share_a_page() -> None:
    entry = Loaded(image()).entry
    pages = {
        "tables": range(0x80, 0x87),
        "gdt": range(entry.gdt_base >> 12, (entry.gdt_base >> 12) + 1),
        "stack": range((entry.rsp >> 12) - 1, entry.rsp >> 12),
        "params": range(0x90, 0x93),
    }
    used = [page for held in pages.values() for page in held]
    assert len(set(used)) == len(used)
    assert max(used) < 0x9F
    assert entry.rsp % 16 == 0


def test_the_acpi_tables_are_where_the_zero_page_says_and_not_in_ram() -> None:
    made = Loaded(image(), ram=64 * MIB)
    rsdp = made.params.acpi_rsdp_addr
    assert int.from_bytes(made.page[0x70:0x78], "little") == rsdp
    assert rsdp == made.entry.acpi.start == 64 * MIB - ACPI_SIZE
    assert made.load(rsdp, 8) == b"RSD PTR "
    xsdt = int.from_bytes(made.load(rsdp + 24, 8), "little")
    assert made.load(xsdt, 4) == b"XSDT"
    assert xsdt in made.entry.acpi
    kinds = [(e.addr, e.addr + e.size, e.type) for e in made.params.e820_table]
    assert (rsdp, 64 * MIB, E820Type.ACPI) in kinds
    assert tuple(made.params.e820_table) == made.entry.e820
    assert sum(e.size for e in made.entry.e820) == sum(e.size for e in made.firmware)


@pytest.mark.parametrize(
    ("ranges", "carved"),
    [
        ([(0, 64 * MIB, 1)], [(0, 0x3FF_0000, 1), (0x3FF_0000, 64 * MIB, 3)]),
        # Above 4 GiB no table lies, and a reserved end is stepped over.
        (
            [(MIB, GIB, 1), (GIB, GIB + MIB, 2), (4 * GIB, 8 * GIB, 1)],
            [
                (MIB, GIB - ACPI_SIZE, 1),
                (GIB - ACPI_SIZE, GIB, 3),
                (GIB, GIB + MIB, 2),
                (4 * GIB, 8 * GIB, 1),
            ],
        ),
        (
            [(MIB, 5 * GIB, 1)],
            [
                (MIB, 4 * GIB - ACPI_SIZE, 1),
                (4 * GIB - ACPI_SIZE, 4 * GIB, 3),
                (4 * GIB, 5 * GIB, 1),
            ],
        ),
        # Whole pages; a range of just this size; one that is too small.
        ([(MIB, 9 * MIB + 5, 1)], [(MIB, 0x8F_0000, 1), (0x8F_0000, 9 * MIB + 5, 3)]),
        ([(MIB, MIB + ACPI_SIZE, 1)], [(MIB, MIB + ACPI_SIZE, 3)]),
        (
            [(8 * MIB, 8 * MIB + 0xF000, 1), (MIB, 2 * MIB, 1)],
            [
                (8 * MIB, 8 * MIB + 0xF000, 1),
                (MIB, 0x1F_0000, 1),
                (0x1F_0000, 2 * MIB, 3),
            ],
        ),
    ],
)
def test_the_acpi_range_is_cut_from_the_end_of_low_ram(
    ranges: list[tuple[int, int, int]], carved: list[tuple[int, int, int]]
) -> None:
    found, acpi = carve_acpi(pieces(*ranges))
    assert found == pieces(*carved)
    assert (acpi.start, acpi.end) in [(a, b) for a, b, kind in carved if kind == 3]


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, 0xA_0000, 1)],
        [(MIB, MIB + ACPI_SIZE - 1, 1)],
        [(MIB, GIB, 2)],
        [(4 * GIB, 5 * GIB, 1)],
    ],
)
def test_without_low_ram_there_is_no_place_for_acpi(
    ranges: list[tuple[int, int, int]],
) -> None:
    with pytest.raises(KernelError, match="ACPI tables need 64 KiB of RAM"):
        carve_acpi(pieces(*ranges))


@pytest.mark.parametrize("model", [COHERENT, FIVE_LEVELS])
def test_the_core_is_in_long_mode_on_the_identity_map(model: str) -> None:
    five_levels = model == FIVE_LEVELS
    cpu = Loaded(image(), model=model, five_levels=five_levels).machine.cpu
    assert cpu.read_cr0() == 0x8000_0011
    assert cpu.read_cr4() == (0x1020 if five_levels else 0x20)
    assert cpu.read_cr3() == (0x8_0000 if five_levels else 0x8_1000)
    assert cpu.load64(0x8_7010) == 0x00AF_9B00_0000_FFFF


# Refusals


def test_ram_that_is_a_page_too_small_is_refused_before_anything_is_stored() -> None:
    machine = Machine(COHERENT, ram=TAKEN_END + ACPI_SIZE - 4096)
    with pytest.raises(
        KernelError,
        match="vmlinuz-test needs 0x800000 bytes of RAM at or above 0x1000000",
    ):
        load_native(
            machine.cpu,
            source(image()),
            e820=firmware_memory_map(machine),
            command_line=b"",
        )
    assert machine.cpu.load(LOAD, 4096) == bytes(4096)
    assert machine.cpu.read_cr0() & 1 << 31 == 0


def test_an_initrd_that_would_meet_the_kernel_is_refused() -> None:
    ram = TAKEN_END + ACPI_SIZE + MIB
    assert Loaded(image(), ram=ram, initrd=bytes(MIB)).entry.initrd == (
        TAKEN_END,
        MIB,
    )
    with pytest.raises(KernelError, match=r"initrd of 0x100001 bytes .* overlaps"):
        Loaded(image(), ram=ram, initrd=bytes(MIB + 1))


@pytest.mark.parametrize(
    ("changes", "length", "limit"),
    [
        ({}, 2048, 2047),
        ({"cmdline_size": 9}, 10, 9),
        ({"cmdline_size": 1 << 31}, 4096, 4095),
    ],
)
def test_a_command_line_that_is_too_long_is_refused(
    changes: dict[str, int], length: int, limit: int
) -> None:
    line = b"x" * limit
    made = Loaded(image(**changes), command_line=line)
    assert made.load(made.entry.command_line, limit + 1) == line + b"\0"
    with pytest.raises(KernelError, match=f"vmlinuz-test takes up to {limit}"):
        Loaded(image(**changes), command_line=b"x" * length)


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"xloadflags": 0x7E}, "offset 0x236: boot protocol 2.15, xloadflags 0x7e"),
        ({"version": 0x20B}, "offset 0x236: boot protocol 2.11"),
        ({"version": 0x207}, "offset 0x206: boot protocol 2.07"),
        ({"kernel_alignment": 0}, "offset 0x230: kernel_alignment 0x0"),
        ({"kernel_alignment": 0x30_0000}, "offset 0x230: kernel_alignment 0x300000"),
        ({"init_size": 0x100}, "offset 0x260: init_size 0x100"),
        ({"syssize": 0xFFFF}, "protected-mode code takes 0xffff0 bytes"),
    ],
)
def test_a_header_that_promises_no_64_bit_entry_is_refused(
    changes: dict[str, int], fact: str
) -> None:
    with pytest.raises(InputError, match=fact):
        Loaded(image(**changes))


def test_a_bzimage_cut_anywhere_is_refused() -> None:
    whole = image()
    for length in [*range(0, 0x280, 13), *range(0x280, len(whole), 331)]:
        with pytest.raises(InputError, match="vmlinuz-test: "):
            Loaded(whole[:length])


def test_five_levels_need_a_processor_that_has_them() -> None:
    with pytest.raises(KernelError, match="5-level paging: epyc-7763 has none"):
        Loaded(image(), five_levels=True)


# A distribution's kernel


@cache
def real_one(path: Path) -> Loaded:
    initrd = random_bytes(MIB + 7)
    return Loaded(path, model=INCOHERENT, ram=256 * MIB, initrd=initrd)


def test_the_real_bzimage_is_in_memory_byte_for_byte(real_kernel_path: Path) -> None:
    made, content = real_one(real_kernel_path), real_kernel_path.read_bytes()
    start = (content[0x1F1] + 1) * 512
    code = content[start : start + 16 * int.from_bytes(content[0x1F4:0x1F8], "little")]
    assert made.load(made.entry.kernel.start, len(code)) == code
    assert made.entry.rip == made.params.pref_address + 0x200
    assert made.params.code32_start == made.params.pref_address
    init_size = int.from_bytes(content[0x260:0x264], "little")
    assert made.entry.kernel.size >= init_size
    assert made.load(made.params.initrd_start, MIB + 7) == random_bytes(MIB + 7)


def test_the_real_kernel_with_its_work_area_lies_in_what_is_kept_free(
    real_kernel_path: Path,
) -> None:
    made = real_one(real_kernel_path)
    layout = made.entry.layout
    assert layout is not None
    assert layout == load_image(real_kernel_path).layout
    assert made.entry.kernel.start <= layout.text_start
    assert layout.workarea.end <= made.entry.kernel.end
    assert made.entry.version == load_image(real_kernel_path).version
