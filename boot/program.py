"""The boot loader for a program of the user's own: freestanding, 64-bit, static.

The program's segments go to their physical addresses (p_paddr), and it is entered in
long mode, interrupts off, on the identity map of the first 4 GiB. What it must leave
alone as long as it uses it:

    0x7_0000   stack, 64 KiB, empty: RSP is 0x8_0000, as a process starts, aligned to
               16 and not as after a CALL
    0x8_0000   page tables, 7 pages
    0x8_7000   GDT: CS is 0x10, DS, ES and SS are 0x18

RDI is the C-bit's position if that was asked for, else 0; RSI is 0. There is no IDT.

Source: System V ABI, AMD64 supplement 1.0, 3.4.1 (alignment of the stack); System V
gABI, chapter 5 (program headers, dynamic section).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import pairwise
from typing import IO, Any, cast

from elftools.elf.elffile import ELFFile

from ..hw.cpu import Cpu
from ..hw.errors import InputError, KernelError
from ..hw.msr import Syscfg, TopMem
from ..hw.types import PAGE_SIZE, PhysAddr, VirtAddr
from .image import Range, Segment
from .image.elf import PARSE_ERRORS
from .image.source import ImageSource, SourceStream
from .loader import BOOT_TABLES, enter_long_mode
from .native_loader import GDT, GDT_ENTRIES, NativeEntry

STACK_SIZE = 64 << 10
STACK_TOP = PhysAddr(BOOT_TABLES)
OWN_MEMORY = Range(PhysAddr(STACK_TOP - STACK_SIZE), PhysAddr(GDT + PAGE_SIZE))
"""The loader's: stack, page tables, GDT."""

LOW_RAM_END = PhysAddr(0xA_0000)
HIGH_RAM_START = PhysAddr(0x10_0000)
"""Between them are the VGA window and ROM of a PC."""

HEADER_FACTS = (
    ("EI_CLASS", 4, ("ELFCLASS64",)),
    ("EI_DATA", 5, ("ELFDATA2LSB",)),
    ("e_type", 16, ("ET_EXEC", "ET_DYN")),
    ("e_machine", 18, ("EM_X86_64",)),
)
"""Field of the ELF header, its offset, and what it may be."""

PROGRAM_HEADER_SIZE = 56
DYNAMIC_ENTRY = struct.Struct("<qQ")
"""Tag and value."""
DT_NULL = 0
DYNAMIC_NEEDS = {
    1: "it needs shared libraries (DT_NEEDED)",
    7: "it needs relocations (DT_RELA)",
    17: "it needs relocations (DT_REL)",
    23: "it needs relocations (DT_JMPREL)",
    36: "it needs relocations (DT_RELR)",
}
"""What each tag of the dynamic section asks of a dynamic linker."""

NEAREST = 3
"""Symbols that are offered in place of an unknown one."""


def load_program(
    cpu: Cpu,
    path: str | os.PathLike[str],
    *,
    entry: str | None = None,
    five_levels: bool = False,
    pass_cbit: bool = False,
) -> NativeEntry:
    """Place a program and enter long mode; the caller sets the registers.

    Every refusal comes before the first store.

    Args:
        cpu: the boot core, after reset: paging off.
        path: an x86-64 ELF executable that needs neither relocations nor libraries.
        entry: a symbol, or an address in the manner of Python's literals; None takes
            the ELF header's. An address where a segment was linked (p_vaddr) stands
            for the place where it is loaded; one that no segment was linked at is
            physical.
        five_levels: enter with CR4.LA57 = 1.
        pass_cbit: RDI is the C-bit's position, 0 where SME cannot be used or firmware
            has not enabled it (SYSCFG[23]).

    Returns:
        Registers, and the range of the program under `kernel`; what only kernels get
        is empty.

    Raises:
        InputError: the file is no such program, is cut, or has no such entry.
        KernelError: a segment does not lie in RAM below 4 GiB, or lies on the
            loader's own memory; no LA57.
        OSError: the file cannot be opened.

    Context: paging off; nothing is encrypted yet.
    """
    source = ImageSource.of_file(path)
    elf = _open(source)
    segments = _segments(source, elf)
    wanted = _wanted_entry(source, elf, entry)
    rip = _physical(source, segments, wanted, entry)
    for segment in segments:
        _require_room(cpu, source.name, segment)
    if five_levels and not cpu.model.la57:
        raise KernelError(
            f"5-level paging: {cpu.model.name} has none (CPUID 7 ECX[16] is 0)"
        )

    for segment in segments:
        cpu.store(segment.paddr, segment.data)
        rest = segment.memory_size - len(segment.data)
        cpu.fill(segment.paddr + len(segment.data), 0, rest)
    cpu.store(GDT, b"".join(word.to_bytes(8, "little") for word in GDT_ENTRIES))
    enter_long_mode(cpu, five_levels)
    elf.close()
    nothing = Range(PhysAddr(0), PhysAddr(0))
    return NativeEntry(
        rip=rip,
        rsi=PhysAddr(0),
        rsp=STACK_TOP,
        rdi=_c_bit(cpu) if pass_cbit else 0,
        gdt_base=GDT,
        gdt_limit=8 * len(GDT_ENTRIES) - 1,
        name=source.name,
        kind="ELF",
        version=None,
        kernel=Range(segments[0].paddr, segments[-1].end),
        initrd=None,
        command_line=PhysAddr(0),
        acpi=nothing,
        e820=(),
    )


def _open(source: ImageSource) -> ELFFile:
    """Check the ELF header, and that nothing is left to a dynamic linker."""
    source.take(0, 64, "an ELF header")
    try:
        elf = ELFFile(cast("IO[bytes]", SourceStream(source)))
    except PARSE_ERRORS as wrong:
        raise source.error(0, f"no ELF program: {wrong}") from wrong
    facts: dict[str, Any] = {**elf.header, **elf.header["e_ident"]}
    for field, offset, expected in HEADER_FACTS:
        if facts[field] not in expected:
            raise source.error(
                offset, f"{field} is {facts[field]}; expected {' or '.join(expected)}"
            )
    count = facts["e_phnum"]
    if count and facts["e_phentsize"] != PROGRAM_HEADER_SIZE:
        raise source.error(
            0x36,
            f"program headers of {facts['e_phentsize']} bytes; expected "
            f"{PROGRAM_HEADER_SIZE}",
        )
    at = facts["e_phoff"] if count else 0
    source.take(at, PROGRAM_HEADER_SIZE * count, "program headers")
    try:
        needs = next(_dynamic_needs(source, elf), None)
    except PARSE_ERRORS as wrong:
        raise source.error(at, f"corrupt program headers: {wrong}") from wrong
    if needs:
        raise source.error(
            at,
            f"{needs}; expected a program that is loaded as it is: link it with "
            "-static -no-pie",
        )
    return elf


def _dynamic_needs(source: ImageSource, elf: ELFFile) -> Iterator[str]:
    """Yield what a program asks of a dynamic linker."""
    segments: Iterator[Any] = elf.iter_segments()
    for header in (segment.header for segment in segments):
        if header["p_type"] == "PT_INTERP":
            yield "it asks for a dynamic linker (PT_INTERP)"
        elif header["p_type"] == "PT_DYNAMIC":
            size = header["p_filesz"] // DYNAMIC_ENTRY.size * DYNAMIC_ENTRY.size
            table = source.take(header["p_offset"], size, "the dynamic section")
            tags = [tag for tag, _ in DYNAMIC_ENTRY.iter_unpack(table)]
            if DT_NULL in tags:
                tags = tags[: tags.index(DT_NULL)]
            yield from (DYNAMIC_NEEDS[tag] for tag in tags if tag in DYNAMIC_NEEDS)


def _segments(source: ImageSource, elf: ELFFile) -> tuple[Segment, ...]:
    """Return the PT_LOAD segments that take memory, lowest physical address first."""
    segments = []
    for part in elf.iter_segments("PT_LOAD"):
        header = part.header
        offset, file_size = header["p_offset"], header["p_filesz"]
        paddr, memory_size = header["p_paddr"], header["p_memsz"]
        if file_size > memory_size:
            raise source.error(
                offset,
                f"segment at {paddr:#x} has {file_size:#x} bytes in the file, more "
                f"than its {memory_size:#x} in memory",
            )
        data = source.take(offset, file_size, f"the segment at {paddr:#x}")
        if memory_size:
            place, linked = PhysAddr(paddr), VirtAddr(header["p_vaddr"])
            segments.append(Segment(place, linked, data, memory_size))
    if not segments:
        raise source.error(0x38, "no PT_LOAD segment; expected one or more")
    segments.sort(key=lambda segment: segment.paddr)
    for below, above in pairwise(segments):
        if above.paddr < below.end:
            raise source.error(
                0x20,
                f"segment [{above.paddr:#x}, {above.end:#x}) overlaps "
                f"[{below.paddr:#x}, {below.end:#x})",
            )
    return tuple(segments)


def _wanted_entry(source: ImageSource, elf: ELFFile, entry: str | None) -> int:
    """Return the entry's address as the user or the linker has it."""
    if entry is None:
        return int(elf.header["e_entry"])
    try:
        return int(entry, 0)
    except ValueError:
        symbols = _symbols(source, elf)
    if entry in symbols:
        return symbols[entry]
    if not symbols:
        raise InputError(
            f"{source.name}: entry {entry}: the file has no symbols; expected an "
            "address, or a file that is not stripped"
        )
    nearest = ", ".join(get_close_matches(entry, symbols, NEAREST, cutoff=0))
    raise InputError(
        f"{source.name}: entry {entry}: no such symbol; the nearest: {nearest}"
    )


def _symbols(source: ImageSource, elf: ELFFile) -> dict[str, int]:
    """Return labels and functions; of those with one name a global one."""
    try:
        table: Any = elf.get_section_by_name(".symtab")
        found = [(s.name, s.entry) for s in table.iter_symbols()] if table else []
    except PARSE_ERRORS as wrong:
        at = elf.header["e_shoff"]
        raise source.error(at, f"corrupt symbols: {wrong}") from wrong
    symbols: dict[str, int] = {}
    for name, fields in found:
        info = fields["st_info"]
        label = info["type"] in ("STT_NOTYPE", "STT_FUNC")
        if not name or not label or fields["st_shndx"] == "SHN_UNDEF":
            continue
        if name not in symbols or info["bind"] == "STB_GLOBAL":
            symbols[name] = fields["st_value"]
    return symbols


def _physical(
    source: ImageSource, segments: tuple[Segment, ...], address: int, entry: str | None
) -> PhysAddr:
    """Return where an address of the program is loaded."""
    for segment in segments:
        if 0 <= address - segment.vaddr < segment.memory_size:
            return PhysAddr(address - segment.vaddr + segment.paddr)
    if any(segment.paddr <= address < segment.end for segment in segments):
        return PhysAddr(address)
    places = ", ".join(f"[{s.paddr:#x}, {s.end:#x})" for s in segments)
    named = "e_entry" if entry is None else f"entry {entry}"
    raise InputError(
        f"{source.name}: {named}: {address:#x} is outside every segment: {places}"
    )


def _require_room(cpu: Cpu, name: str, segment: Segment) -> None:
    """Refuse a segment outside RAM, or where the loader's own things lie.

    RAM is what firmware says in TOP_MEM, in units of 8 MiB.
    """
    place = f"{name}: segment [{segment.paddr:#x}, {segment.end:#x})"
    top = TopMem(cpu.rdmsr(TopMem.ADDRESS)).value
    in_low_ram = segment.end <= LOW_RAM_END
    if not in_low_ram and not HIGH_RAM_START <= segment.paddr < segment.end <= top:
        raise KernelError(
            f"{place} is not in RAM; expected inside [0x0, {LOW_RAM_END:#x}) or "
            f"[{HIGH_RAM_START:#x}, {top:#x})"
        )
    if segment.paddr < OWN_MEMORY.end and OWN_MEMORY.start < segment.end:
        raise KernelError(
            f"{place} overlaps stack, page tables and GDT of the loader, "
            f"[{OWN_MEMORY.start:#x}, {OWN_MEMORY.end:#x})"
        )


def _c_bit(cpu: Cpu) -> int:
    """Return the C-bit's position, or 0 where it has no effect."""
    encryption = cpu.model.memory_encryption
    enabled = encryption.usable and Syscfg(cpu.rdmsr(Syscfg.ADDRESS)).mem_encrypt == 1
    return encryption.c_bit if enabled else 0
