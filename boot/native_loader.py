"""The boot loader for real machine code: a kernel as it is, at its own 64-bit door.

Beside what `boot/loader.py` does it takes a bzImage without unpacking it, and leaves
what firmware leaves: ACPI tables in a range of their own, and a flat GDT. Low memory,
one page each unless said otherwise:

    0x8_0000   page tables, 7 pages      0x9_0000   zero page
    0x8_7000   GDT                       0x9_1000   command line
    0x8_8000   stack                     0x9_2000   setup data

Source: Linux 6.1.192 Documentation/x86/boot.rst, 64-bit boot protocol.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from ..hw.cpu import Cpu
from ..hw.errors import InputError, KernelError
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr, align_down, align_up
from .acpi import build_acpi
from .image import KernelImage, KernelLayout, Range, Segment
from .image.bzimage import BzImage, open_bzimage, read_bzimage
from .image.layout import workarea_behind
from .image.load import is_elf, read_image
from .image.source import ImageSource
from .loader import (
    BOOT_PARAMS,
    BOOT_TABLES,
    COMMAND_LINE,
    IDENTITY_MAP_BYTES,
    RNG_SEED_SIZE,
    HandOver,
    LoadPlan,
    carry_out,
    plan_of,
)
from .params import BootParams, E820Entry, E820Type

GDT = PhysAddr(BOOT_TABLES + 7 * PAGE_SIZE)
GDT_ENTRIES = (
    0,
    0,
    0x00AF_9B00_0000_FFFF,  # selector 0x10: 64-bit code, ring 0
    0x00CF_9300_0000_FFFF,  # selector 0x18: data, flat 4 GiB, ring 0
)
"""Flat segments, already accessed. Source: boot.rst, 64-bit boot protocol: __BOOT_CS
is 0x10, __BOOT_DS is 0x18."""

STACK_TOP = PhysAddr(GDT + 2 * PAGE_SIZE)

ACPI_RANGE_SIZE = 64 << 10
LOWEST_ACPI = 1 << 20

ENTRY_64_OFFSET = 0x200
"""Of a bzImage's 64-bit entry in its protected-mode code."""
ENTRY_64_PROTOCOL = 0x20C
"""First protocol with xloadflags."""
XLF_KERNEL_64 = 1 << 0
LOADED_HIGH = 1 << 0

Kernel = str | os.PathLike[str] | ImageSource | KernelImage


@dataclass(frozen=True)
class NativeEntry:
    """A core's first registers, and what was placed where; all addresses physical.

    Attributes:
        rip: the 64-bit entry.
        rsi: the zero page.
        rsp: behind the last byte of an empty stack of one page.
        rdi: nothing, for a kernel.
        gdt_base: of the flat GDT: CS is 0x10, DS, ES and SS are 0x18.
        gdt_limit: its length in bytes, less one.
        name: of the image, for messages.
        kind: what the image is.
        version: the version string of a bzImage.
        kernel: memory that is the kernel's alone, its work area included.
        initrd: address and length in bytes, or None.
        command_line: address of the NUL-terminated line.
        acpi: the ACPI range; the RSDP is its first byte.
        e820: the memory map that the kernel was given.
        source: of a bzImage that was loaded as it is.
        loaded_layout: of a kernel that was loaded decompressed.
    """

    rip: PhysAddr
    rsi: PhysAddr
    rsp: PhysAddr
    gdt_base: PhysAddr
    gdt_limit: int
    name: str
    kind: Literal["bzImage", "ELF", "built-in"]
    version: str | None
    kernel: Range
    initrd: tuple[PhysAddr, int] | None
    command_line: PhysAddr
    acpi: Range
    e820: tuple[E820Entry, ...] = field(repr=False)
    source: ImageSource | None = field(default=None, repr=False)
    loaded_layout: KernelLayout | None = field(default=None, repr=False)
    rdi: int = 0

    @property
    def decompressed(self) -> bool:
        """The kernel itself was loaded; else its decompressor runs first."""
        return self.source is None

    @cached_property
    def layout(self) -> KernelLayout | None:
        """The decompressed kernel as it was linked; None where that cannot be read.

        A bzImage is decompressed for it, once. Where its own decompressor puts the
        kernel, address randomization decides.
        """
        if self.source is None:
            return self.loaded_layout
        try:
            return read_bzimage(self.source).layout
        except InputError:
            return None

    @property
    def hand_over(self) -> HandOver:
        """The same as the reference kernel takes it.

        Raises:
            KernelError: the layout cannot be read.
        """
        if self.layout is None:
            raise KernelError(f"{self.name}: no layout of the decompressed kernel")
        return HandOver(self.layout, self.rsi, self.initrd, self.command_line)


def load_native(
    cpu: Cpu,
    kernel: Kernel,
    *,
    e820: Sequence[E820Entry],
    command_line: bytes,
    initrd: bytes | memoryview | None = None,
    five_levels: bool = False,
    rng_seed: bytes = bytes(RNG_SEED_SIZE),
) -> NativeEntry:
    """Place everything and enter long mode; the caller sets the registers.

    Args:
        cpu: the boot core, after reset: paging off.
        kernel: a file or its bytes: an ELF vmlinux, or a bzImage, which is loaded as
            it is. A `KernelImage`, as `load_image` makes it of either, is loaded
            decompressed.
        e820: the firmware's memory map, without a range for ACPI.
        command_line: without NUL; up to what the kernel's header allows.
        initrd: its bytes; placed as high as the kernel allows, page aligned.
        five_levels: enter with CR4.LA57 = 1.
        rng_seed: what a SETUP_RNG_SEED node carries, 32 bytes.

    Raises:
        InputError: the file is no kernel, cut, or has no 64-bit entry.
        KernelError: RAM too small or too full, command line too long, no LA57.
        OSError: the file cannot be opened.

    Context: paging off; nothing is encrypted yet.
    """
    memory_map, acpi = carve_acpi(e820)
    image = _open(kernel)
    if isinstance(image, KernelImage):
        plan, entry = plan_of(image), image.entry
    else:
        plan = _plan_of_bzimage(image, memory_map)
        entry = PhysAddr(plan.taken.start + ENTRY_64_OFFSET)
    plan = replace(
        plan,
        segments=(*plan.segments, *_firmware(acpi)),
        params=replace(plan.params, acpi_rsdp_addr=acpi.start),
    )
    place = carry_out(
        cpu,
        plan,
        e820=memory_map,
        command_line=command_line,
        initrd=initrd,
        five_levels=five_levels,
        rng_seed=rng_seed,
    )
    return NativeEntry(
        rip=entry,
        rsi=BOOT_PARAMS,
        rsp=STACK_TOP,
        gdt_base=GDT,
        gdt_limit=8 * len(GDT_ENTRIES) - 1,
        name=plan.name,
        kind=image.kind if isinstance(image, KernelImage) else "bzImage",
        version=image.version,
        kernel=plan.taken,
        initrd=place,
        command_line=COMMAND_LINE,
        acpi=acpi,
        e820=tuple(memory_map),
        source=None if isinstance(image, KernelImage) else image.source,
        loaded_layout=image.layout if isinstance(image, KernelImage) else None,
    )


def carve_acpi(e820: Sequence[E820Entry]) -> tuple[list[E820Entry], Range]:
    """Turn the end of low RAM into a range for ACPI tables.

    Args:
        e820: a memory map.

    Returns:
        The map with 64 KiB, or little more for whole pages, of type ACPI at the end
        of the highest RAM below 4 GiB; and that range.

    Raises:
        KernelError: there are no 64 KiB of RAM between 1 MiB and 4 GiB.
    """
    for entry in sorted(e820, key=lambda e: -e.addr):
        end = min(entry.addr + entry.size, IDENTITY_MAP_BYTES)
        start = align_down(end - ACPI_RANGE_SIZE, PAGE_SIZE)
        if entry.type != E820Type.RAM or start < max(entry.addr, LOWEST_ACPI):
            continue
        pieces = (
            (entry.addr, start, E820Type.RAM),
            (start, end, E820Type.ACPI),
            (end, entry.addr + entry.size, E820Type.RAM),
        )
        carved = [
            E820Entry(PhysAddr(first), last - first, kind)
            for first, last, kind in pieces
            if first < last
        ]
        at = list(e820).index(entry)
        acpi = Range(PhysAddr(start), PhysAddr(end))
        return [*e820[:at], *carved, *e820[at + 1 :]], acpi
    raise KernelError(
        f"ACPI tables need {ACPI_RANGE_SIZE >> 10} KiB of RAM between 1 MiB and 4 GiB"
    )


def _open(kernel: Kernel) -> BzImage | KernelImage:
    """Return a bzImage as it is, or a kernel that needs no decompressor."""
    if isinstance(kernel, KernelImage):
        return kernel
    if not isinstance(kernel, ImageSource):
        kernel = ImageSource.of_file(kernel)
    return read_image(kernel) if is_elf(kernel) else open_bzimage(kernel)


def _plan_of_bzimage(image: BzImage, e820: Sequence[E820Entry]) -> LoadPlan:
    taken = _place_bzimage(image, e820)
    params = BootParams.from_setup_header(image.setup_header)
    return LoadPlan(
        name=image.source.name,
        segments=(_segment(taken.start, image.code),),
        taken=taken,
        params=replace(
            params,
            loadflags=params.loadflags | LOADED_HIGH,
            code32_start=taken.start,
        ),
        command_line_size=params.cmdline_size,
    )


def _place_bzimage(image: BzImage, e820: Sequence[E820Entry]) -> Range:
    """Return the lowest place that the kernel's header allows, work area included.

    The kernel brings no word of its work area; it begins where init_size ends, or
    below, on a 2 MiB boundary.
    """
    source, fields = image.source, image.fields
    version, flags = fields["version"], fields["xloadflags"]
    if version < ENTRY_64_PROTOCOL or not flags & XLF_KERNEL_64:
        raise source.error(
            0x236,
            f"boot protocol {version >> 8}.{version & 0xFF:02}, xloadflags {flags:#x}; "
            "expected 2.12 or later and bit 0, a 64-bit entry",
        )
    alignment, init_size = fields["kernel_alignment"], fields["init_size"]
    if alignment < PAGE_SIZE or alignment & alignment - 1:
        raise source.error(
            0x230, f"kernel_alignment {alignment:#x}; expected a power of two"
        )
    if init_size < len(image.code):
        raise source.error(
            0x260,
            f"init_size {init_size:#x}; expected {len(image.code):#x}, the size of "
            "the code, or more",
        )
    preferred = fields["pref_address"]
    for entry in sorted(e820, key=lambda e: e.addr):
        if entry.type != E820Type.RAM:
            continue
        start = preferred
        if fields["relocatable_kernel"]:
            start = align_up(max(preferred, entry.addr), alignment)
        taken = Range(PhysAddr(start), workarea_behind(start + init_size).end)
        end = min(entry.addr + entry.size, IDENTITY_MAP_BYTES)
        if entry.addr <= start and taken.end <= end:
            return taken
    room = workarea_behind(preferred + init_size).end - preferred
    where = "at or above" if fields["relocatable_kernel"] else "at"
    raise KernelError(
        f"{source.name} needs {room:#x} bytes of RAM {where} {preferred:#x}, below "
        f"4 GiB, work area included (init_size is {init_size:#x})"
    )


def _firmware(acpi: Range) -> tuple[Segment, Segment]:
    gdt = b"".join(entry.to_bytes(8, "little") for entry in GDT_ENTRIES)
    return _segment(GDT, gdt), _segment(acpi.start, build_acpi(acpi.start))


def _segment(pa: PhysAddr, data: bytes | memoryview) -> Segment:
    return Segment(pa, VirtAddr(0), memoryview(data), len(data))
