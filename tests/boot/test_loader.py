"""boot/loader.py: what lies where when the kernel is entered, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cbit.boot.image import KernelImage, Range
from cbit.boot.loader import enter_long_mode, load_kernel, place_initrd
from cbit.boot.params import BootParams, E820Entry, E820Type, SetupData, SetupDataType
from cbit.hw.errors import KernelError
from cbit.hw.machine import Machine
from cbit.hw.types import PhysAddr
from cbit.tools.boot_run import firmware_memory_map

from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    GIB,
    INCOHERENT,
    MIB,
    board,
    cached_builtin,
    random_bytes,
)

TABLES = 0x8_0000  # PML5, PML4, PDPT, four directories
KERNEL = Range(PhysAddr(0x100_0000), PhysAddr(0x1A0_0000))  # with its work area


def ram(*ranges: tuple[int, int]) -> list[E820Entry]:
    return [
        E820Entry(PhysAddr(start), end - start, E820Type.RAM) for start, end in ranges
    ]


# The kernel's door


@pytest.mark.req("PT-43", "PT-27", "WP-16")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_the_identity_map_is_the_decompressors(model: str) -> None:
    five_levels = model == FIVE_LEVELS
    made = board(model, la57=five_levels)
    pml5, pml4, pdpt, *directories = [TABLES + i * 4096 for i in range(7)]
    assert made.cpu.read_cr3() == (pml5 if five_levels else pml4)
    assert made.table(pml5, c_bit=False)[0] & ~0x60 == pml4 | 0x007
    assert made.table(pml4, c_bit=False)[0] & ~0x60 == pdpt | 0x007
    for table, used in ((pml5, 1), (pml4, 1), (pdpt, 4)):
        assert not any(made.table(table, c_bit=False)[used:])
    for i, directory in enumerate(directories):
        entry = made.table(pdpt, c_bit=False)[i]
        assert entry & ~0x60 == directory | 0x007
        for j, leaf in enumerate(made.table(directory, c_bit=False)):
            assert leaf & ~0x60 == i * GIB + j * 2 * MIB | 0x183
    for va in (0, 0x100_0123, 4 * GIB - 1):
        found = made.walk(made.cpu.read_cr3(), va)
        assert found.pa == va
        assert not any(found.c_bits)
    assert not made.maps(made.cpu.read_cr3(), 4 * GIB)


def test_the_core_is_in_long_mode_and_nothing_else_is_on() -> None:
    made = board()
    assert made.cpu.read_cr0() == 0x8000_0011  # PG, ET, PE
    assert made.cpu.read_cr4() == 0x20  # PAE
    assert made.cpu.rdmsr(0xC000_0080) == 0x500  # LMA, LME
    assert board(FIVE_LEVELS, la57=True).cpu.read_cr4() == 0x1020


def test_tables_are_built_in_memory_that_held_something_else() -> None:
    machine = Machine(COHERENT, ram=64 * MIB)
    machine.cpu.fill(TABLES, 0xFF, 7 * 4096)
    enter_long_mode(machine.cpu, five_levels=False)
    assert machine.cpu.load(0x100_0000, 8) == bytes(8)


def test_the_image_lies_in_plain_memory_as_linked() -> None:
    machine = Machine(INCOHERENT, ram=64 * MIB)
    image = cached_builtin(1)
    layout = image.layout
    machine.cpu.fill(layout.text_start, 0xFF, layout.end - layout.text_start)
    load_kernel(machine.cpu, image, e820=firmware_memory_map(machine), command_line=b"")
    machine.caches.drain()
    plain = image.plain_bytes(layout.text_start, layout.end)
    assert machine.snoop(layout.text_start, len(plain)) == plain
    assert machine.controller.slot_for(False) == 0
    assert set(machine.dram.count_pages()) == {0}


# Boot parameters


def test_the_zero_page_says_what_lies_where() -> None:
    data = random_bytes(3 * MIB + 5)
    made = board(cmdline=b"quiet mem_encrypt=on", initrd=data)
    at = made.hand_over.boot_params
    params = BootParams.parse(made.cpu.load(at, 4096))
    assert params.cmd_line == made.hand_over.command_line
    assert made.cpu.load(params.cmd_line, 21) == b"quiet mem_encrypt=on\0"
    assert made.hand_over.initrd == (params.initrd_start, len(data))
    assert params.initrd_len == len(data)
    assert params.initrd_start % 4096 == 0
    assert params.initrd_end == 64 * MIB
    assert made.cpu.load(params.initrd_start, len(data)) == data
    assert list(params.e820_table) == firmware_memory_map(made.machine)
    assert params.type_of_loader == 0xFF
    head = SetupData.parse(made.cpu.load(params.setup_data, 48))
    assert head.type == SetupDataType.RNG_SEED
    assert (head.next, len(head.data)) == (0, 32)


def test_without_an_initrd_the_zero_page_names_none() -> None:
    for nothing in (None, b""):
        made = board(initrd=nothing)
        params = BootParams.parse(made.cpu.load(made.hand_over.boot_params, 4096))
        assert (params.initrd_start, params.initrd_len) == (0, 0)
        assert made.hand_over.initrd is None


def test_the_setup_header_of_the_image_is_passed_on() -> None:
    header = bytearray(range(0x70))
    header[0x1FE - 0x1F1 : 0x200 - 0x1F1] = b"\x55\xaa"
    header[0x22C - 0x1F1 : 0x230 - 0x1F1] = (40 * MIB - 1).to_bytes(4, "little")
    image = replace(cached_builtin(1), setup_header=bytes(header))
    made = board(image=image, initrd=bytes(4096))
    page = made.cpu.load(made.hand_over.boot_params, 4096)
    own = {0x210, *range(0x218, 0x220), *range(0x228, 0x22C), *range(0x250, 0x258)}
    for at in range(0x1F1, 0x1F1 + len(header)):
        assert at in own or page[at] == header[at - 0x1F1]
    # initrd_addr_max is the highest address of its last byte.
    assert made.hand_over.initrd == (40 * MIB - 4096, 4096)


# Places


@pytest.mark.parametrize(
    ("e820", "size", "limit", "place"),
    [
        (ram((0, 64 * MIB)), 4096, 0x7FFF_FFFF, 64 * MIB - 4096),
        (ram((0, 64 * MIB)), 1, 0x7FFF_FFFF, 64 * MIB - 4096),
        (ram((0, 64 * MIB)), 4097, 0x7FFF_FFFF, 64 * MIB - 8192),
        (ram((0, 4 * GIB)), 8192, 0x7FFF_FFFF, 2 * GIB - 8192),
        (ram((0, 4 * GIB)), 8192, 0x37FF_FFFE, 0x37FF_D000),
        (ram((MIB, GIB), (4 * GIB, 8 * GIB)), MIB, 0x7FFF_FFFF, GIB - MIB),
        (ram((MIB, GIB), (4 * GIB, 8 * GIB)), MIB, (1 << 46) - 1, 8 * GIB - MIB),
        # A range that is too small is passed over, in whatever order they come.
        (ram((60 * MIB, 61 * MIB), (MIB, 40 * MIB)), 2 * MIB, GIB, 38 * MIB),
        (ram((MIB, 40 * MIB), (60 * MIB, 61 * MIB)), 2 * MIB, GIB, 38 * MIB),
        # Exactly between the kernel and the end.
        (ram((MIB, 64 * MIB)), 64 * MIB - 0x1A0_0000, GIB, 0x1A0_0000),
    ],
)
def test_an_initrd_goes_as_high_as_it_may(
    e820: list[E820Entry], size: int, limit: int, place: int
) -> None:
    assert place_initrd(e820, KERNEL, size, limit) == place


@pytest.mark.parametrize(
    ("e820", "size", "said"),
    [
        (ram((MIB, 64 * MIB)), 64 * MIB - 0x1A0_0000 + 1, "overlaps the kernel"),
        (ram((MIB, 64 * MIB)), 60 * MIB, "overlaps the kernel"),
        (ram((MIB, 64 * MIB)), 63 * MIB + 1, "no RAM for it up to"),
        (ram((0, 0xA_0000)), 4096, "no RAM for it up to"),
        (ram((8 * GIB, 9 * GIB)), 4096, "no RAM for it up to 0x7fffffff"),
        ([], 4096, "no RAM for it"),
        ([E820Entry(PhysAddr(MIB), GIB, E820Type.RESERVED)], 4096, "no RAM for it"),
    ],
)
def test_an_initrd_without_a_place_is_refused(
    e820: list[E820Entry], size: int, said: str
) -> None:
    with pytest.raises(KernelError, match=f"initrd of {size:#x} bytes.*{said}"):
        place_initrd(e820, KERNEL, size, 0x7FFF_FFFF)


@pytest.mark.req("LB-32", "BZ-14")
@pytest.mark.parametrize(
    ("e820", "top"),
    [
        (ram((MIB, 0x1A0_0000 - 1)), 0x1A0_0000 - 1),
        (ram((MIB, 0x160_0000), (0x160_0000, GIB)), GIB),
        (ram((0x100_1000, GIB)), GIB),
        ([E820Entry(PhysAddr(0), GIB, E820Type.ACPI)], 0),
        ([], 0),
    ],
)
def test_kernel_and_work_area_must_lie_in_one_piece_of_ram(
    e820: list[E820Entry], top: int
) -> None:
    machine = Machine(COHERENT, ram=64 * MIB)
    with pytest.raises(KernelError, match=f"work area included; RAM ends at {top:#x}"):
        load_kernel(machine.cpu, cached_builtin(1), e820=e820, command_line=b"")
    assert machine.cpu.load(0x100_0000, 4096) == bytes(4096)
    assert machine.cpu.read_cr0() & 1 << 31 == 0


def test_exactly_enough_ram_is_enough() -> None:
    board(ram=0x1A0_0000).start()
    with pytest.raises(KernelError, match="RAM ends at 0x19ff000"):
        board(ram=0x1A0_0000 - 4096)


@pytest.mark.parametrize(("length", "fits"), [(2047, True), (2048, False)])
def test_a_command_line_that_is_too_long_is_refused(length: int, fits: bool) -> None:
    if fits:
        assert len(board(cmdline=b"x" * length).start().command_line) == length
    else:
        with pytest.raises(
            KernelError, match="command line of 2048 bytes: built-in takes up to 2047"
        ):
            board(cmdline=b"x" * length)


def test_the_limit_of_the_command_line_is_the_images() -> None:
    image: KernelImage = replace(cached_builtin(1), command_line_size=10)
    board(image=image, cmdline=b"x" * 10)
    with pytest.raises(KernelError, match="takes up to 10"):
        board(image=image, cmdline=b"x" * 11)


def test_five_levels_need_a_processor_that_has_them() -> None:
    with pytest.raises(KernelError, match="5-level paging: epyc-7763 has none"):
        board(COHERENT, la57=True)
