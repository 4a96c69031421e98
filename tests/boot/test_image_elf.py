"""boot/image: segments and layout of a vmlinux, by symbols, sections and segments."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from cbit.boot.image import KernelImage, Range, load_image
from cbit.hw.errors import InputError
from cbit.hw.types import PhysAddr, VirtAddr

MAP = 0xFFFF_FFFF_8000_0000  # __START_KERNEL_map
PROGBITS, SYMTAB, STRTAB, NOBITS = 1, 2, 3, 8


class Load(NamedTuple):
    """A PT_LOAD segment; `memory` is its size in memory."""

    paddr: int
    vaddr: int
    data: bytes
    memory: int


class Part(NamedTuple):
    """A section header with its bytes, if it has any."""

    name: str
    kind: int
    address: int = 0
    size: int = 0
    data: bytes = b""
    link: int = 0


def elf(
    loads: Sequence[Load],
    parts: Sequence[Part] = (),
    entry: int = 0x100_0000,
) -> bytes:
    """An ELF file: header, program headers, data, section headers last."""
    at = 64 + 56 * len(loads)
    programs, body = b"", b""
    for load in loads:
        fields = (1, 7, at + len(body), load.vaddr, load.paddr, len(load.data))
        programs += struct.pack("<IIQQQQQQ", *fields, load.memory, 0x1000)
        body += load.data
    rows, names = [], b"\0"
    if parts:
        parts = (Part("", 0), *parts, Part(".shstrtab", STRTAB))
        texts = b"".join(part.name.encode() + b"\0" for part in parts)
        for part in parts:
            data = texts if part.name == ".shstrtab" else part.data
            size = len(data) or part.size
            entry_size = 24 if part.kind == SYMTAB else 0
            rows.append(
                struct.pack(
                    "<IIQQQQIIQQ",
                    texts.index(part.name.encode() + b"\0"),
                    *(part.kind, 0, part.address, at + len(body), size),
                    *(part.link, 0, 1, entry_size),
                )
            )
            body += data
    body += names
    tables = (64, at + len(body) if rows else 0)
    counts = (64, 56, len(loads), 64, len(rows), max(len(rows) - 1, 0))
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, *tables, 0, *counts)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    return ident + header + programs + body + b"".join(rows)


def symbol_parts(symbols: dict[str, int], link: int = 2) -> list[Part]:
    """A symbol table in which every name is the tail of one string, as linkers do."""
    strings, rows = b"\0", bytes(24)
    for name, value in symbols.items():
        strings += b"unused" + name.encode() + b"\0my" + name.encode() + b"\0"
        start = len(strings) - len(name) - 3
        rows += struct.pack("<IBBHQQ", start, 0x10, 0, 1, 0xBAD, 0)
        rows += struct.pack("<IBBHQQ", start + 2, 0x10, 0, 1, value, 0)
        rows += struct.pack("<IBBHQQ", start + 2, 0x10, 0, 0, 0xBAD, 0)  # undefined
    return [
        Part(".symtab", SYMTAB, data=rows, link=link),
        Part(".strtab", STRTAB, data=strings),
    ]


def load(tmp_path: Path, content: bytes) -> KernelImage:
    path = tmp_path / "vmlinux"
    path.write_bytes(content)
    return load_image(path)


TEXT = Load(0x100_0000, MAP + 0x100_0000, Random(1).randbytes(0x1234), 0x20_0000)
DATA = Load(0x120_0000, MAP + 0x120_0000, Random(2).randbytes(0x800), 0x48_0000)
SYMBOLS = {
    "_text": MAP + 0x100_0000,
    "__bss_start": MAP + 0x121_0000,
    "__start_bss_decrypted": MAP + 0x140_0000,
    "__end_bss_decrypted": MAP + 0x160_0000,
    "__bss_stop": MAP + 0x160_0000,
    "_end": MAP + 0x168_0000,
    "sme_workarea": MAP + 0x180_0000,
}


def span(start: int, end: int) -> Range:
    return Range(PhysAddr(start), PhysAddr(end))


@pytest.mark.req("LB-23", "LB-30", "LB-32")
def test_vector_the_layout_of_debian_6_1_192_is_found_by_its_sections(
    tmp_path: Path,
) -> None:
    # readelf -lSW of the vmlinux in vmlinuz-6.1.0-56-cloud-amd64, contents left out.
    image = load(
        tmp_path,
        elf(
            [
                Load(0x100_0000, MAP + 0x100_0000, b"text", 0x182_6634),
                Load(0x2A0_0000, MAP + 0x2A0_0000, b"data", 0x61_A000),
                Load(0x301_A000, 0, b"per-cpu", 0x3_4000),
                Load(0x304_E000, MAP + 0x304_E000, b"init", 0xDB_2000),
            ],
            [
                Part(".text", PROGBITS, MAP + 0x100_0000, 0xE0_1EF2),
                Part(".bss", NOBITS, MAP + 0x32B_1000, 0x54_F000),
                Part(".brk", NOBITS, MAP + 0x380_0000, 0x3_0000),
                Part(".init.scratch", NOBITS, MAP + 0x3A0_0000, 0x40_0000),
            ],
        ),
    )
    layout = image.layout
    assert layout.found_by == "sections"
    assert (layout.text_start, layout.end) == (0x100_0000, 0x383_0000)
    assert layout.bss == span(0x32B_1000, 0x380_0000)
    assert layout.bss_decrypted == span(0x360_0000, 0x380_0000)
    assert layout.workarea == span(0x3A0_0000, 0x3E0_0000)
    assert layout.virtual_base == 0xFFFF_FFFF_8100_0000
    assert (layout.kernel_start, layout.kernel_end) == (0x100_0000, 0x3A0_0000)
    assert [s.vaddr for s in image.segments][2] == 0


@pytest.mark.req("LB-30", "LB-32")
def test_symbols_are_believed_before_sections(tmp_path: Path) -> None:
    misleading = [Part(".bss", NOBITS, MAP + 0x130_0000, 0x1000)]
    parts = [*symbol_parts(SYMBOLS), *misleading]
    layout = load(tmp_path, elf([TEXT, DATA], parts)).layout
    assert layout.found_by == "symbols"
    assert layout.bss == span(0x121_0000, 0x160_0000)
    assert layout.bss_decrypted == span(0x140_0000, 0x160_0000)
    assert (layout.end, layout.kernel_end) == (0x168_0000, 0x180_0000)
    assert layout.workarea == span(0x180_0000, 0x1C0_0000)


def test_a_kernel_built_without_memory_encryption_has_an_empty_decrypted_part(
    tmp_path: Path,
) -> None:
    names = ("_text", "_end", "__bss_start", "__bss_stop")
    some = {name: SYMBOLS[name] for name in names}
    layout = load(tmp_path, elf([TEXT, DATA], symbol_parts(some))).layout
    assert layout.bss_decrypted.size == 0
    assert layout.workarea == span(0x180_0000, 0x1C0_0000)  # behind _end, rounded up


def test_a_work_area_of_our_own_lies_behind_every_segment(tmp_path: Path) -> None:
    some = {name: va for name, va in SYMBOLS.items() if name != "sme_workarea"}
    modules = Load(0x1A0_0000, 0, b"modules", 0x1000)
    layout = load(tmp_path, elf([TEXT, DATA, modules], symbol_parts(some))).layout
    assert layout.end == 0x168_0000
    assert layout.workarea == span(0x1C0_0000, 0x200_0000)


def test_segments_that_span_more_than_1_gib_are_refused(tmp_path: Path) -> None:
    far = Load(0x5000_0000, 0, b"far", 0x1000)
    with pytest.raises(InputError, match="segments from 0x1000000 to 0x50001000"):
        load(tmp_path, elf([TEXT, DATA, far], symbol_parts(SYMBOLS)))


def test_a_symbol_table_without_the_linker_scripts_names_is_passed_over(
    tmp_path: Path,
) -> None:
    parts = symbol_parts({"main": MAP + 0x100_0000})
    assert load(tmp_path, elf([TEXT, DATA], parts)).layout.found_by == "segments"


@pytest.mark.parametrize(
    ("bss_end", "decrypted"),
    [
        (0x160_0000, (0x140_0000, 0x160_0000)),
        (0x160_1000, (0x160_1000, 0x160_1000)),  # ends elsewhere: there is none
        (0x140_0000, (0x120_0000, 0x140_0000)),
        (0x130_0000, (0x130_0000, 0x130_0000)),
    ],
)
def test_sections_place_the_decrypted_part_at_the_end_of_bss(
    tmp_path: Path, bss_end: int, decrypted: tuple[int, int]
) -> None:
    bss = Part(".bss", NOBITS, MAP + 0x120_0000, bss_end - 0x120_0000)
    layout = load(tmp_path, elf([TEXT, DATA], [bss])).layout
    assert layout.found_by == "sections"
    assert layout.bss_decrypted == span(*decrypted)
    assert layout.end == layout.bss.end == bss_end


def test_a_bss_of_less_than_2_mib_has_no_decrypted_part(tmp_path: Path) -> None:
    bss = Part(".bss", NOBITS, MAP + 0x13F_0000, 0x1_0000)
    layout = load(tmp_path, elf([TEXT, DATA], [bss])).layout
    assert layout.bss_decrypted == span(0x140_0000, 0x140_0000)


def test_the_end_is_the_page_behind_brk(tmp_path: Path) -> None:
    bss = Part(".bss", NOBITS, MAP + 0x120_0000, 0x1000)
    brk = Part(".brk", NOBITS, MAP + 0x120_1000, 0x1_0123)
    assert load(tmp_path, elf([TEXT, DATA], [bss, brk])).layout.end == 0x121_2000


def test_segments_alone_give_the_end_and_a_work_area_behind_it(tmp_path: Path) -> None:
    layout = load(tmp_path, elf([TEXT, DATA])).layout
    assert layout.found_by == "segments"
    assert (layout.end, layout.kernel_end) == (0x168_0000, 0x180_0000)
    assert layout.bss == span(0x120_0800, 0x168_0000)
    assert layout.bss_decrypted.size == 0
    assert layout.workarea == span(0x180_0000, 0x1C0_0000)


def test_virtual_and_physical_addresses_are_inverse(tmp_path: Path) -> None:
    layout = load(tmp_path, elf([TEXT, DATA])).layout
    assert layout.phys(VirtAddr(MAP + 0x123_4567)) == 0x123_4567
    assert layout.virt(PhysAddr(0x123_4567)) == MAP + 0x123_4567


def test_a_range_holds_its_start_and_not_its_end() -> None:
    assert 0x1000 in span(0x1000, 0x2000)
    assert 0x1FFF in span(0x1000, 0x2000)
    assert 0x2000 not in span(0x1000, 0x2000)
    assert "text" not in span(0x1000, 0x2000)


def test_segments_come_sorted_and_as_views_of_the_file(tmp_path: Path) -> None:
    empty = Load(0, 0, b"", 0)
    image = load(tmp_path, elf([DATA, empty, TEXT]))
    assert [s.paddr for s in image.segments] == [0x100_0000, 0x120_0000]
    assert image.segments[0].data == TEXT.data
    assert image.segments[0].data.readonly
    assert (image.kind, image.compression, image.setup_header) == ("ELF", "none", None)
    assert (image.name, image.version, image.command_line_size) == (
        "vmlinux",
        None,
        2047,
    )


def patched(offset: int, value: bytes) -> bytes:
    whole = bytearray(elf([TEXT, DATA], symbol_parts(SYMBOLS)))
    whole[offset : offset + len(value)] = value
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (patched(4, b"\x01"), "EI_CLASS is ELFCLASS32; expected ELFCLASS64"),
        (patched(5, b"\x02"), "EI_DATA is ELFDATA2MSB"),
        (patched(16, b"\x01"), "e_type is ET_REL; expected ET_EXEC"),
        (patched(16, b"\x03"), "e_type is ET_DYN; expected ET_EXEC"),
        (patched(18, b"\x03"), "e_machine is EM_386; expected EM_X86_64"),
        (patched(18, b"\xff\xfe"), "e_machine is 65279; expected EM_X86_64"),
        (patched(0x36, b"\x20"), "offset 0x36: program headers of 32 bytes"),
        (patched(0x3A, b"\x20"), "offset 0x3a: section headers of 32 bytes"),
        (patched(0x3E, b"\x04"), "offset 0x3e: e_shstrndx is 4 of 4"),
        (patched(0x38, b"\xff\xff"), "program headers takes"),
        (patched(0x38, b"\0\0"), "no PT_LOAD segment"),
        (elf([TEXT], entry=0x120_0000), "entry 0x1200000"),
        (elf([TEXT], entry=MAP + 0x100_0000), "expected a physical address"),
        (elf([TEXT, TEXT]), "overlaps"),
        (elf([TEXT._replace(memory=0x1233)]), "0x1234 bytes in the file, more than"),
        (elf([TEXT._replace(memory=1 << 31)]), "up to 1 GiB"),
        (elf([TEXT, DATA._replace(paddr=1 << 63)]), "up to 1 GiB"),
        (elf([TEXT, DATA._replace(paddr=(1 << 64) - 1)]), "up to 1 GiB"),
        (
            elf([TEXT._replace(paddr=0x100_1000)], entry=0x100_1000),
            "_text at 0x1001000",
        ),
    ],
)
def test_an_odd_file_is_refused_with_the_fact(
    tmp_path: Path, content: bytes, fact: str
) -> None:
    with pytest.raises(InputError, match=f"vmlinux: .*{fact}"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("_text", MAP + 0x120_0000, "first segment at 0x1000000"),
        ("_end", MAP + 0x150_0000, r"\.bss .* is not within the kernel"),
        ("_end", 0x1000, r"\.bss .* is not within the kernel|_end at"),
        ("_end", MAP + 0x6000_0000, "_end at 0x60000000; expected up to 1 GiB"),
        ("__bss_start", MAP, r"\.bss .* is not within the kernel"),
        ("__start_bss_decrypted", MAP + 0x150_0000, "expected multiples of 2 MiB"),
        ("__end_bss_decrypted", MAP + 0x180_0000, r"is not within \.bss"),
        ("__end_bss_decrypted", MAP + 0x120_0000, r"is not within \.bss"),
        ("sme_workarea", MAP + 0x160_0000, "sme_workarea at 0x1600000"),
        ("sme_workarea", MAP + 0x181_0000, "sme_workarea at 0x1810000"),
    ],
)
def test_symbols_that_contradict_each_other_are_refused(
    tmp_path: Path, name: str, value: int, fact: str
) -> None:
    parts = symbol_parts({**SYMBOLS, name: value})
    with pytest.raises(InputError, match=fact):
        load(tmp_path, elf([TEXT, DATA], parts))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = elf([TEXT, DATA], symbol_parts(SYMBOLS))
    for length in [*range(0, 300, 3), *range(300, len(whole), 101), len(whole) - 1]:
        with pytest.raises(InputError, match="vmlinux: "):
            load(tmp_path, whole[:length])


def test_a_symbol_table_that_names_itself_for_its_strings_is_refused(
    tmp_path: Path,
) -> None:
    parts = symbol_parts(SYMBOLS, link=1)
    with pytest.raises(InputError, match="corrupt section headers"):
        load(tmp_path, elf([TEXT, DATA], parts))


@pytest.mark.parametrize("seed", range(20))
def test_no_corrupt_table_raises_anything_but_a_refusal(
    tmp_path: Path, seed: int
) -> None:
    whole = elf([TEXT, DATA], symbol_parts(SYMBOLS))
    tables = len(whole) - 4 * 64
    rng = Random(seed)
    for _ in range(40):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            at = rng.choice([rng.randrange(4, 176), rng.randrange(tables, len(whole))])
            broken[at] = rng.choice(
                [0, 1, 2, 4, 6, 9, 11, 0x7F, 0xFF, rng.randrange(256)]
            )
        with suppress(InputError):
            load(tmp_path, bytes(broken))
