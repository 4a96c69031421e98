"""Find the addresses of the linker script in a vmlinux: by symbols, sections, segments.

A distribution's kernel has its symbols stripped but keeps the section headers; an
image that went through other hands may have lost those too.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from ...hw.types import LARGE_PAGE_SIZE, PAGE_SIZE, PhysAddr, VirtAddr, align_up
from .kernel import Segment
from .layout import (
    WORKAREA_SIZE,
    FoundBy,
    KernelLayout,
    Range,
    flaw_of,
    workarea_behind,
)
from .source import ImageSource

SYMBOL = struct.Struct("<IBBHQQ")  # st_name, st_info, st_other, st_shndx, value, size
NEEDED_SYMBOLS = ("_text", "_end", "__bss_start", "__bss_stop")
DECRYPTED_SYMBOLS = ("__start_bss_decrypted", "__end_bss_decrypted")
SYMBOLS = (*NEEDED_SYMBOLS, *DECRYPTED_SYMBOLS, "sme_workarea")


class Section(NamedTuple):
    """A section header: link address, offset in the file, bytes."""

    address: int
    offset: int
    size: int


def find_layout(
    source: ImageSource, sections: dict[str, Section], segments: tuple[Segment, ...]
) -> KernelLayout:
    """Return the layout by the best witness the file has.

    Args:
        source: the file, for messages and bytes.
        sections: its section headers by name.
        segments: lowest physical address first, not empty.

    Raises:
        InputError: the tables are corrupt, or the addresses contradict each other.

    Source: Linux 6.1.192 arch/x86/kernel/vmlinux.lds.S.
    """
    layout = (
        _by_symbols(source, sections, segments)
        or _by_sections(sections, segments)
        or _by_segments(segments)
    )
    if flaw := flaw_of(layout):
        raise source.error(0, f"{flaw} (found by {layout.found_by})")
    return layout


def _layout(
    segments: tuple[Segment, ...],
    found_by: FoundBy,
    *,
    end: int,
    bss: Range,
    bss_decrypted: Range | None = None,
    workarea: int | None = None,
) -> KernelLayout:
    """Fill in what every witness has in common."""
    first = segments[0]
    if workarea is None:
        area = workarea_behind(max(end, segments[-1].end))
    else:
        area = Range(PhysAddr(workarea), PhysAddr(workarea + WORKAREA_SIZE))
    return KernelLayout(
        text_start=first.paddr,
        end=PhysAddr(end),
        bss=bss,
        bss_decrypted=bss_decrypted or Range(bss.end, bss.end),
        workarea=area,
        virtual_base=first.vaddr,
        found_by=found_by,
    )


def _phys(segments: tuple[Segment, ...], va: int) -> PhysAddr:
    """Return where a link address is loaded; wraps, so that a wild one stays wild."""
    first = segments[0]
    return PhysAddr((va - first.vaddr + first.paddr) % (1 << 64))


def _by_symbols(
    source: ImageSource, sections: dict[str, Section], segments: tuple[Segment, ...]
) -> KernelLayout | None:
    if not {".symtab", ".strtab"} <= sections.keys():
        return None
    found = {
        name: _phys(segments, va)
        for name, va in _symbols(
            _bytes(source, sections[".symtab"]), _bytes(source, sections[".strtab"])
        ).items()
    }
    if not found.keys() >= set(NEEDED_SYMBOLS):
        return None
    if found["_text"] != segments[0].paddr:
        raise source.error(
            0, f"_text at {found['_text']:#x}, first segment at {segments[0].paddr:#x}"
        )
    decrypted = None
    if found.keys() >= set(DECRYPTED_SYMBOLS):
        decrypted = Range(*(found[name] for name in DECRYPTED_SYMBOLS))
    return _layout(
        segments,
        "symbols",
        end=found["_end"],
        bss=Range(found["__bss_start"], found["__bss_stop"]),
        bss_decrypted=decrypted,
        workarea=found.get("sme_workarea"),
    )


def _symbols(table: memoryview, names: memoryview) -> dict[str, VirtAddr]:
    """Return the values of `SYMBOLS` that a symbol table has.

    A vmlinux has 100,000 symbols; this looks at their name offsets only. A linker may
    let one name be the tail of another, so every match in the string table counts.
    """
    text = bytes(names)
    wanted: dict[int, str] = {}
    for name in SYMBOLS:
        needle = name.encode() + b"\0"
        at = text.find(needle)
        while at >= 0:
            wanted[at] = name
            at = text.find(needle, at + 1)
    whole = len(table) - len(table) % SYMBOL.size
    return {
        wanted[entry[0]]: VirtAddr(entry[4])
        for entry in SYMBOL.iter_unpack(table[:whole])
        if entry[0] in wanted and entry[3]  # st_shndx 0: undefined here
    }


def _by_sections(
    sections: dict[str, Section], segments: tuple[Segment, ...]
) -> KernelLayout | None:
    if ".bss" not in sections:
        return None
    bss = _range(sections[".bss"], segments)
    last = _range(sections.get(".brk", sections[".bss"]), segments)
    scratch = sections.get(".init.scratch")

    # The linker script ends .bss with .bss..decrypted, both its ends 2 MiB aligned.
    # Without symbols its start is unknown; what 6.1 keeps there fits in one 2 MiB.
    decrypted = None
    start = PhysAddr(bss.end - LARGE_PAGE_SIZE)
    if bss.end % LARGE_PAGE_SIZE == 0 and start >= bss.start:
        decrypted = Range(start, bss.end)
    return _layout(
        segments,
        "sections",
        end=align_up(last.end, PAGE_SIZE),
        bss=bss,
        bss_decrypted=decrypted,
        workarea=_range(scratch, segments).start if scratch else None,
    )


def _by_segments(segments: tuple[Segment, ...]) -> KernelLayout:
    last = segments[-1]
    bss = Range(PhysAddr(last.paddr + len(last.data)), last.end)
    end = align_up(last.end, PAGE_SIZE)
    return _layout(segments, "segments", end=end, bss=bss)


def _bytes(source: ImageSource, section: Section) -> memoryview:
    return source.take(section.offset, section.size, "a symbol section")


def _range(section: Section, segments: tuple[Segment, ...]) -> Range:
    start = _phys(segments, section.address)
    return Range(start, PhysAddr(start + section.size))
