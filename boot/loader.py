"""The boot loader: kernel, initrd and boot parameters into plain memory.

It runs before paging, stores everything with C = 0, and leaves the core in long mode
on an identity map of the first 4 GiB, as the decompressor's boot tables are.

Source: Linux 6.1.192 Documentation/x86/boot.rst (64-bit boot protocol);
arch/x86/boot/compressed/head_64.S (identity map).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..hw.cpu import Cpu, Cr0, Cr4
from ..hw.errors import KernelError
from ..hw.msr import Efer
from ..hw.types import PAGE_SIZE, PhysAddr, align_down
from ..kernel.pgtable import BOOT_PMD_FLAGS, BOOT_TABLE_FLAGS, PMD_SIZE
from .image import KernelImage, KernelLayout, Range, Segment
from .params import BootParams, E820Entry, E820Type, SetupData, SetupDataType

BOOT_TABLES = PhysAddr(0x8_0000)
"""PML5 (if any), PML4, PDPT and four page directories, one page each."""

BOOT_PARAMS = PhysAddr(0x9_0000)
COMMAND_LINE = PhysAddr(0x9_1000)
SETUP_DATA = PhysAddr(0x9_2000)
COMMAND_LINE_ROOM = SETUP_DATA - COMMAND_LINE

INITRD_LIMIT = 0x7FFF_FFFF
"""Highest byte of an initrd where the kernel names no other (initrd_addr_max)."""

IDENTITY_MAP_BYTES = 4 << 30
LOADER_TYPE_UNKNOWN = 0xFF
RNG_SEED_SIZE = 32


@dataclass(frozen=True)
class HandOver:
    """What the loader leaves behind; all physical addresses.

    Attributes:
        layout: where the kernel lies.
        boot_params: the zero page.
        initrd: address and length in bytes, or None.
        command_line: address of the NUL-terminated line.
    """

    layout: KernelLayout
    boot_params: PhysAddr
    initrd: tuple[PhysAddr, int] | None
    command_line: PhysAddr


@dataclass(frozen=True)
class LoadPlan:
    """What is particular to a kernel: everything else is the same for all.

    Attributes:
        name: of the image, for messages.
        segments: what to store, lowest address first.
        taken: memory of the kernel alone, its work area included.
        params: the zero page so far: clean, then the kernel's setup header.
        command_line_size: most bytes a command line may have, its NUL not counted.
    """

    name: str
    segments: tuple[Segment, ...]
    taken: Range
    params: BootParams
    command_line_size: int


def load_kernel(
    cpu: Cpu,
    image: KernelImage,
    *,
    e820: Sequence[E820Entry],
    command_line: bytes,
    initrd: bytes | memoryview | None = None,
    five_levels: bool = False,
    rng_seed: bytes = bytes(RNG_SEED_SIZE),
) -> HandOver:
    """Place everything and enter long mode at the kernel's door.

    Args:
        cpu: the boot core, after reset: paging off.
        image: the kernel, decompressed.
        e820: the firmware's memory map.
        command_line: without NUL; up to what the kernel's header allows.
        initrd: its bytes; placed as high as the kernel allows, page aligned.
        five_levels: enter with CR4.LA57 = 1.
        rng_seed: what a SETUP_RNG_SEED node carries, 32 bytes.

    Raises:
        KernelError: RAM too small or too full, command line too long, no LA57.

    Context: paging off; nothing is encrypted yet.
    """
    place = carry_out(
        cpu,
        plan_of(image),
        e820=e820,
        command_line=command_line,
        initrd=initrd,
        five_levels=five_levels,
        rng_seed=rng_seed,
    )
    return HandOver(image.layout, BOOT_PARAMS, place, COMMAND_LINE)


def plan_of(image: KernelImage) -> LoadPlan:
    """Return what loading a decompressed kernel comes to."""
    return LoadPlan(
        name=image.name,
        segments=image.segments,
        taken=Range(image.layout.kernel_start, image.layout.workarea.end),
        params=BootParams.from_setup_header(image.setup_header),
        command_line_size=image.command_line_size,
    )


def carry_out(
    cpu: Cpu,
    plan: LoadPlan,
    *,
    e820: Sequence[E820Entry],
    command_line: bytes,
    initrd: bytes | memoryview | None,
    five_levels: bool,
    rng_seed: bytes,
) -> tuple[PhysAddr, int] | None:
    """Store what a plan says and what every kernel gets; enter long mode.

    Every refusal comes before the first store.

    Args:
        plan: what is particular to the kernel.
        e820: as in `load_kernel`, like what follows.

    Returns:
        Address and length of the initrd, None without one.

    Raises:
        KernelError: as `load_kernel`.
    """
    limit = min(plan.command_line_size, COMMAND_LINE_ROOM - 1)
    if len(command_line) > limit:
        raise KernelError(
            f"command line of {len(command_line)} bytes: {plan.name} takes up to "
            f"{limit}"
        )
    if five_levels and not cpu.model.la57:
        raise KernelError(
            f"5-level paging: {cpu.model.name} has none (CPUID 7 ECX[16] is 0)"
        )
    _require_ram(e820, plan.taken, plan.name)
    params, place = plan.params, None
    if initrd:
        highest = params.initrd_addr_max or INITRD_LIMIT
        place = place_initrd(e820, plan.taken, len(initrd), highest), len(initrd)
        params = params.with_initrd(*place)

    for segment in plan.segments:
        cpu.store(segment.paddr, segment.data)
        rest = segment.memory_size - len(segment.data)
        cpu.fill(segment.paddr + len(segment.data), 0, rest)
    if place and initrd:
        cpu.store(place[0], initrd)
    cpu.store(COMMAND_LINE, command_line + b"\0")
    cpu.store(SETUP_DATA, SetupData(SetupDataType.RNG_SEED, rng_seed).build())
    params = replace(
        params.with_cmd_line(COMMAND_LINE),
        e820_table=tuple(e820),
        setup_data=SETUP_DATA,
        type_of_loader=LOADER_TYPE_UNKNOWN,
    )
    cpu.store(BOOT_PARAMS, params.build())
    enter_long_mode(cpu, five_levels)
    return place


def place_initrd(
    e820: Sequence[E820Entry], kernel: Range, size: int, limit: int
) -> PhysAddr:
    """Return the highest page-aligned place for an initrd.

    Args:
        e820: the memory map.
        kernel: the kernel with its work area, which stays free.
        size: bytes.
        limit: highest address of the initrd's last byte.

    Raises:
        KernelError: there is no such place; says what is in the way.
    """
    for entry in sorted(e820, key=lambda e: -e.addr):
        end = min(entry.addr + entry.size, limit + 1)
        start = align_down(end - size, PAGE_SIZE)
        if entry.type != E820Type.RAM or start < max(entry.addr, 1 << 20):
            continue
        if start >= kernel.end:
            return PhysAddr(start)
        raise KernelError(
            f"initrd of {size:#x} bytes at [{start:#x}, {start + size:#x}) overlaps "
            f"the kernel and its work area [{kernel.start:#x}, {kernel.end:#x}): "
            "more RAM is needed"
        )
    raise KernelError(f"initrd of {size:#x} bytes: no RAM for it up to {limit:#x}")


def enter_long_mode(cpu: Cpu, five_levels: bool) -> None:
    """Build the identity map of the first 4 GiB and turn paging on.

    2 MiB pages, no C-bit anywhere. Source: boot/compressed/head_64.S.
    """
    tables = [BOOT_TABLES + i * PAGE_SIZE for i in range(7)]
    first = 0 if five_levels else 1
    pml5, pml4, pdpt, *directories = tables
    cpu.fill(BOOT_TABLES, 0, len(tables) * PAGE_SIZE)
    cpu.store64(pml5, pml4 | BOOT_TABLE_FLAGS)
    cpu.store64(pml4, pdpt | BOOT_TABLE_FLAGS)
    for i, directory in enumerate(directories):
        cpu.store64(pdpt + 8 * i, directory | BOOT_TABLE_FLAGS)
    frames = np.arange(0, IDENTITY_MAP_BYTES, PMD_SIZE, dtype=np.uint64)
    cpu.store_array(directories[0], frames | np.uint64(BOOT_PMD_FLAGS))

    cpu.write_cr4(Cr4.of(pae=1, la57=int(five_levels)).value)
    cpu.write_cr3(tables[first])
    efer = Efer(cpu.rdmsr(Efer.ADDRESS))
    cpu.wrmsr(Efer.ADDRESS, efer.replace(lme=1).value)
    cpu.write_cr0(Cr0.of(protection=1, extension_type=1, paging=1).value)


def _require_ram(e820: Sequence[E820Entry], taken: Range, name: str) -> None:
    for entry in e820:
        end = entry.addr + entry.size
        if (
            entry.type == E820Type.RAM
            and entry.addr <= taken.start
            and taken.end <= end
        ):
            return
    top = max((e.addr + e.size for e in e820 if e.type == E820Type.RAM), default=0)
    raise KernelError(
        f"{name} needs RAM at [{taken.start:#x}, {taken.end:#x}), work area included; "
        f"RAM ends at {top:#x}"
    )
