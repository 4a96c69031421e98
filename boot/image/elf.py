"""A vmlinux: an ELF64 file for x86-64, read into segments."""

from __future__ import annotations

from itertools import pairwise
from typing import IO, Any, Literal, cast

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from ...hw.types import PhysAddr, VirtAddr
from ...kernel.setup import COMMAND_LINE_SIZE
from .elf_layout import Section, find_layout
from .kernel import KernelImage, Segment
from .layout import KERNEL_MAPPING_SIZE
from .source import ImageSource, SourceStream

PARSE_ERRORS = (ELFError, AttributeError, LookupError, TypeError, ValueError)
"""What pyelftools raises on corrupt tables: its own error, and what slips through
(TypeError in 0.31)."""

HEADER_FACTS = (
    ("EI_CLASS", 4, "ELFCLASS64"),
    ("EI_DATA", 5, "ELFDATA2LSB"),
    ("e_type", 16, "ET_EXEC"),
    ("e_machine", 18, "EM_X86_64"),
)
"""Field of the ELF header, its offset, and the only value a vmlinux has there."""

TABLES = (
    ("ph", "program headers", 0x36, 56),
    ("sh", "section headers", 0x3A, 64),
)
"""Prefix of the header's fields, what it is, offset of the entry size, that size."""


def read_vmlinux(
    source: ImageSource,
    *,
    name: str = "",
    kind: Literal["bzImage", "ELF"] = "ELF",
    setup_header: bytes | None = None,
    version: str | None = None,
    compression: str = "none",
    command_line_size: int = COMMAND_LINE_SIZE - 1,
) -> KernelImage:
    """Read a vmlinux; the keywords are what a bzImage around it says.

    Args:
        source: the ELF file; bytes behind it, such as a bzImage's relocations, are
            ignored.
        name: as in `KernelImage`; the source's if left out.
        kind: as in `KernelImage`, like the keywords that follow.

    Raises:
        InputError: not an executable for x86-64, cut, or with segments or addresses
            that cannot be a kernel.
    """
    elf = _open(source)
    segments = _segments(source, elf)
    entry = elf.header["e_entry"]
    if not any(s.paddr <= entry < s.end for s in segments):
        raise source.error(
            0x18, f"entry {entry:#x}; expected a physical address in a segment"
        )
    layout = find_layout(source, _sections(source, elf), segments)
    elf.close()
    return KernelImage(
        name=name or source.name,
        kind=kind,
        segments=segments,
        entry=PhysAddr(entry),
        layout=layout,
        setup_header=setup_header,
        version=version,
        compression=compression,
        command_line_size=command_line_size,
    )


def _open(source: ImageSource) -> ELFFile:
    """Check the ELF header, and that both header tables lie within the file."""
    source.take(0, 64, "an ELF header")
    try:
        elf = ELFFile(cast("IO[bytes]", SourceStream(source)))
    except PARSE_ERRORS as wrong:
        raise source.error(0, f"no ELF header: {wrong}") from wrong
    facts: dict[str, Any] = {**elf.header, **elf.header["e_ident"]}
    for field, offset, expected in HEADER_FACTS:
        if facts[field] != expected:
            raise source.error(
                offset, f"{field} is {facts[field]}; expected {expected}"
            )
    for key, what, size_offset, size in TABLES:
        count, entry_size = facts[f"e_{key}num"], facts[f"e_{key}entsize"]
        if count and entry_size != size:
            raise source.error(
                size_offset, f"{what} of {entry_size} bytes; expected {size}"
            )
        source.take(facts[f"e_{key}off"] if count else 0, size * count, what)
    if facts["e_shstrndx"] >= max(facts["e_shnum"], 1):
        raise source.error(
            0x3E, f"e_shstrndx is {facts['e_shstrndx']} of {facts['e_shnum']} sections"
        )
    return elf


def _segments(source: ImageSource, elf: ELFFile) -> tuple[Segment, ...]:
    """Return the PT_LOAD segments, lowest physical address first.

    Raises:
        InputError: there is none, one is cut, two overlap, or they span over 1 GiB.
    """
    try:
        headers = [segment.header for segment in elf.iter_segments("PT_LOAD")]
    except PARSE_ERRORS as wrong:
        at = elf.header["e_phoff"]
        raise source.error(at, f"corrupt program headers: {wrong}") from wrong
    segments = [_segment(source, header) for header in headers if header["p_memsz"]]
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
    if segments[-1].end - segments[0].paddr > KERNEL_MAPPING_SIZE:
        raise source.error(
            0x20,
            f"segments from {segments[0].paddr:#x} to {segments[-1].end:#x}; expected "
            "up to 1 GiB",
        )
    return tuple(segments)


def _segment(source: ImageSource, header: Any) -> Segment:
    offset, file_size = header["p_offset"], header["p_filesz"]
    paddr, memory_size = header["p_paddr"], header["p_memsz"]
    if file_size > memory_size:
        raise source.error(
            offset,
            f"segment at {paddr:#x} has {file_size:#x} bytes in the file, more than "
            f"its {memory_size:#x} in memory",
        )
    data = source.take(offset, file_size, f"the segment at {paddr:#x}")
    return Segment(PhysAddr(paddr), VirtAddr(header["p_vaddr"]), data, memory_size)


def _sections(source: ImageSource, elf: ELFFile) -> dict[str, Section]:
    """Return the sections by name; none if the file has no section headers."""
    if not elf.header["e_shnum"]:
        return {}
    try:
        named = [(section.name, section.header) for section in elf.iter_sections()]
    except PARSE_ERRORS as wrong:
        at = elf.header["e_shoff"]
        raise source.error(at, f"corrupt section headers: {wrong}") from wrong
    return {
        name: Section(header["sh_addr"], header["sh_offset"], header["sh_size"])
        for name, header in named
    }
