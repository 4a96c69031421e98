"""boot/program.py: ELF programs made of bytes, where they go, and what is refused."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cbit.boot.native_loader import NativeEntry
from cbit.boot.program import load_program
from cbit.hw.errors import CbitError, InputError, KernelError
from cbit.hw.machine import Machine
from cbit.hw.types import PhysAddr

from .conftest import COHERENT, FIVE_LEVELS, GIB, INCOHERENT, KIB, MIB

EXEC, DYN = 2, 3
LOAD, DYNAMIC, INTERP = 1, 2, 3
NOTYPE, OBJECT, FUNC = 0, 1, 2
LOCAL, GLOBAL = 0, 1
CODE = bytes(range(1, 101))


@dataclass
class Part:
    """A program header and the bytes behind it."""

    paddr: int = 2 * MIB
    data: bytes = CODE
    memory: int | None = None
    vaddr: int | None = None
    kind: int = LOAD
    file_size: int | None = None


@dataclass
class Symbol:
    name: str
    value: int
    kind: int = FUNC
    bind: int = GLOBAL
    section: int = 1


@dataclass
class Elf:
    """An ELF64 file; `header` overrides fields by name."""

    parts: list[Part] = field(default_factory=lambda: [Part()])
    entry: int = 2 * MIB
    symbols: list[Symbol] = field(default_factory=list)
    header: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes:
        at = 64 + 56 * len(self.parts)
        headers, body = b"", b""
        for part in self.parts:
            size = len(part.data)
            headers += struct.pack(
                "<IIQQQQQQ",
                *(part.kind, 7, at + len(body)),
                part.paddr if part.vaddr is None else part.vaddr,
                part.paddr,
                size if part.file_size is None else part.file_size,
                size if part.memory is None else part.memory,
                0x1000,
            )
            body += part.data
        names, table = b"\0", bytes(24)
        for symbol in self.symbols:
            info = symbol.bind << 4 | symbol.kind
            place = symbol.section, symbol.value
            table += struct.pack("<IBBHQQ", len(names), info, 0, *place, 0)
            names += symbol.name.encode() + b"\0"
        strings = b"\0.symtab\0.strtab\0"
        first = at + len(body)
        sections = [
            (0, 0, 0, 0, 0, 0),
            (1, 2, first, len(table), 2, 24),
            (9, 3, first + len(table), len(names), 0, 0),
            (9, 3, first + len(table) + len(names), len(strings), 0, 0),
        ]
        behind = first + len(table) + len(names) + len(strings)
        fields = {
            "klass": 2,
            "type": EXEC,
            "machine": 62,
            "phentsize": 56,
            "phnum": len(self.parts),
            "shoff": behind if self.symbols else 0,
            "shnum": 4 if self.symbols else 0,
        } | self.header
        head = struct.pack(
            "<4sBBB9xHHIQQQIHHHHHH",
            *(b"\x7fELF", fields["klass"], 1, 1, fields["type"], fields["machine"]),
            *(1, self.entry, 64, fields["shoff"], 0, 64, fields["phentsize"]),
            *(fields["phnum"], 64, fields["shnum"], 3 if fields["shnum"] else 0),
        )
        tail = b"".join(
            struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, start, size, link, 0, 1, each)
            for name, kind, start, size, link, each in sections
        )
        return head + headers + body + table + names + strings + tail


class Loaded:
    """A machine with a program at its entry."""

    def __init__(
        self,
        folder: Path,
        elf: Elf | bytes,
        *,
        model: str = COHERENT,
        ram: int = 64 * MIB,
        smee: bool = True,
        **options: Any,
    ) -> None:
        file = folder / "prog.elf"
        file.write_bytes(elf if isinstance(elf, bytes) else elf.build())
        self.machine = Machine(model, ram=ram, smee=smee, seed=1)
        ones = b"\xff" * 0x1000
        self.machine.dram.cells[2 * MIB : 2 * MIB + 0x1000] = memoryview(ones)
        self.refusal: CbitError | None = None
        try:
            self.entry: NativeEntry = load_program(self.machine.cpu, file, **options)
        except CbitError as refusal:
            self.refusal = refusal

    def load(self, pa: int, size: int) -> bytes:
        """Return what a probe reads once the caches have come to rest."""
        self.machine.caches.drain()
        return self.machine.snoop(PhysAddr(pa), size)


def refusal(folder: Path, elf: Elf | bytes, **options: Any) -> CbitError:
    """Return why a program was refused; nothing may have been stored by then."""
    made = Loaded(folder, elf, **options)
    assert made.refusal is not None
    assert made.machine.cpu.read_cr0() & 1 << 31 == 0
    made.machine.caches.drain()
    assert set(made.machine.dram.cells[: 2 * MIB].tobytes()) == {0}
    assert made.load(2 * MIB, 0x1000) == b"\xff" * 0x1000
    return made.refusal


# What lies where


def test_segments_lie_plain_at_their_physical_addresses(tmp_path: Path) -> None:
    data = Part(paddr=5 * MIB + 3, data=b"data", vaddr=0x40_0000_0000)
    made = Loaded(tmp_path, Elf([data, Part()]))
    assert made.load(2 * MIB, len(CODE)) == CODE
    assert made.load(5 * MIB + 3, 4) == b"data"
    assert (made.entry.kernel.start, made.entry.kernel.end) == (
        2 * MIB,
        5 * MIB + 7,
    )
    assert set(made.machine.dram.count_pages()) == {0}


def test_bss_is_zero_and_no_byte_behind_it_is_touched(tmp_path: Path) -> None:
    made = Loaded(tmp_path, Elf([Part(memory=0x800)]))
    assert made.load(2 * MIB, 0x1000) == (
        CODE + bytes(0x800 - len(CODE)) + b"\xff" * 0x800
    )


@pytest.mark.parametrize("model", [INCOHERENT, FIVE_LEVELS])
def test_the_core_is_in_long_mode_with_an_empty_stack(
    tmp_path: Path, model: str
) -> None:
    five_levels = model == FIVE_LEVELS
    made = Loaded(tmp_path, Elf(), model=model, five_levels=five_levels)
    cpu, entry = made.machine.cpu, made.entry
    assert cpu.read_cr0() == 0x8000_0011
    assert cpu.read_cr4() == (0x1020 if five_levels else 0x20)
    assert cpu.read_cr3() == (0x8_0000 if five_levels else 0x8_1000)
    assert cpu.load(2 * MIB, 4) == CODE[:4]
    assert (entry.rip, entry.rsp, entry.rsi, entry.rdi) == (2 * MIB, 0x8_0000, 0, 0)
    assert (entry.gdt_base, entry.gdt_limit) == (0x8_7000, 0x1F)
    assert cpu.load64(0x8_7010) == 0x00AF_9B00_0000_FFFF
    assert cpu.load64(0x8_7018) == 0x00CF_9300_0000_FFFF


@pytest.mark.parametrize(
    "place", [(0, 0x100), (0x6_FF9C, 100), (0x8_8000, 0x1_8000), (64 * MIB - 100, 100)]
)
def test_ram_next_to_what_is_taken_can_be_used(
    tmp_path: Path, place: tuple[int, int]
) -> None:
    start, memory = place
    made = Loaded(tmp_path, Elf([Part(start, memory=memory)], entry=start))
    assert made.refusal is None
    assert made.load(start, 100) == CODE
    assert made.entry.rip == start


def test_a_position_independent_program_without_relocations_is_loaded(
    tmp_path: Path,
) -> None:
    # DT_FLAGS_1, the end, and a tag behind the end that nobody reads
    tags = struct.pack("<6Q", 0x6FFF_FFFB, 0x0800_0000, 0, 0, 7, 0)
    nothing = Part(paddr=2 * MIB, data=tags, kind=DYNAMIC)
    made = Loaded(tmp_path, Elf([Part(), nothing], header={"type": DYN}))
    assert made.entry.rip == 2 * MIB


# The C-bit in RDI


@pytest.mark.parametrize(
    ("model", "smee", "rdi"),
    [
        (INCOHERENT, True, 47),
        (COHERENT, True, 51),
        (COHERENT, False, 0),
        ("rembrandt", True, 0),  # the SME bit with C-bit 0
    ],
)
def test_rdi_is_the_c_bit_where_it_has_an_effect(
    tmp_path: Path, model: str, smee: bool, rdi: int
) -> None:
    made = Loaded(tmp_path, Elf(), model=model, smee=smee, pass_cbit=True)
    assert made.entry.rdi == rdi
    assert Loaded(tmp_path, Elf(), model=model, smee=smee).entry.rdi == 0


# Where it starts

SYMBOLS = [
    Symbol("twice", 2 * MIB + 1, bind=LOCAL),
    Symbol("_start", 2 * MIB + 8, kind=NOTYPE),
    Symbol("kernel_main", 2 * MIB + 0x10),
    Symbol("twice", 2 * MIB + 2),
    Symbol("twice", 2 * MIB + 3, bind=LOCAL),
    Symbol("table", 2 * MIB + 0x20, kind=OBJECT),
    Symbol("elsewhere", 0, section=0),
]


@pytest.mark.parametrize(
    ("entry", "offset"),
    [
        (None, 4),
        ("_start", 8),
        ("kernel_main", 0x10),
        ("twice", 2),
        ("0x200011", 0x11),
        ("2097154", 2),
        ("0b1000000000000000000001", 1),
        ("0o10000007", 7),
    ],
)
def test_the_entry_is_a_symbol_or_an_address_in_any_base(
    tmp_path: Path, entry: str | None, offset: int
) -> None:
    elf = Elf(entry=2 * MIB + 4, symbols=SYMBOLS)
    assert Loaded(tmp_path, elf, entry=entry).entry.rip == 2 * MIB + offset


@pytest.mark.parametrize("entry", [None, "start", "0xffffffff80000004", "0x200004"])
def test_an_entry_in_the_higher_half_is_entered_where_it_is_loaded(
    tmp_path: Path, entry: str | None
) -> None:
    high = 0xFFFF_FFFF_8000_0000
    elf = Elf([Part(vaddr=high)], high + 4, [Symbol("start", high + 4)])
    assert Loaded(tmp_path, elf, entry=entry).entry.rip == 2 * MIB + 4


def test_an_unknown_symbol_is_answered_with_the_nearest(tmp_path: Path) -> None:
    found = refusal(tmp_path, Elf(symbols=SYMBOLS), entry="kernel_mian")
    assert isinstance(found, InputError)
    assert str(found).startswith(
        "prog.elf: entry kernel_mian: no such symbol; the nearest: kernel_main, "
    )
    for absent in ("table", "elsewhere"):
        assert "no such symbol" in str(
            refusal(tmp_path, Elf(symbols=SYMBOLS), entry=absent)
        )


def test_without_symbols_an_address_is_asked_for(tmp_path: Path) -> None:
    found = refusal(tmp_path, Elf(), entry="main")
    assert "the file has no symbols; expected an address" in str(found)


@pytest.mark.parametrize(
    "entry", [None, "0x1fffff", "0x200064", "-1", "0xffffffff80000000"]
)
def test_an_entry_outside_every_segment_is_refused(
    tmp_path: Path, entry: str | None
) -> None:
    found = refusal(tmp_path, Elf(entry=0), entry=entry)
    assert isinstance(found, InputError)
    assert "is outside every segment: [0x200000, 0x200064)" in str(found)


# Refusals


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"MZ" + bytes(100), "no ELF program"),
        (b"\x7fELF", "an ELF header takes 0x40 bytes"),
        (Elf(header={"klass": 1}).build(), "expected ELFCLASS64"),
        (Elf(header={"type": 1}).build(), "ET_REL; expected ET_EXEC or ET_DYN"),
        (Elf(header={"machine": 183}).build(), "EM_AARCH64; expected EM_X86_64"),
        (Elf(header={"phentsize": 32}).build(), "program headers of 32 bytes"),
        (Elf(header={"phnum": 200}).build(), "program headers takes 0x2bc0 bytes"),
        (Elf([]).build(), "no PT_LOAD segment"),
        (Elf([Part(data=b"", memory=0)]).build(), "no PT_LOAD segment"),
        (Elf([Part(kind=6)]).build(), "no PT_LOAD segment"),
        (Elf([Part(file_size=0x5000, memory=0x5000)]).build(), "takes 0x5000 bytes"),
        (Elf([Part(memory=99)]).build(), "more than its 0x63 in memory"),
        (Elf([Part(), Part(paddr=2 * MIB + 99)]).build(), "overlaps [0x200000, 0x2000"),
        (Elf([Part(), Part(kind=INTERP, data=b"/ld\0")]).build(), "PT_INTERP"),
    ],
)
def test_what_is_no_static_program_is_refused(
    tmp_path: Path, content: bytes, words: str
) -> None:
    found = refusal(tmp_path, content)
    assert isinstance(found, InputError)
    assert str(found).startswith("prog.elf: ")
    assert words in str(found)


@pytest.mark.parametrize("size", [1, 63, 64, 100, 120, 219])
def test_a_program_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    assert isinstance(refusal(tmp_path, Elf().build()[:size]), InputError)


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (1, "shared libraries (DT_NEEDED)"),
        (7, "relocations (DT_RELA)"),
        (17, "relocations (DT_REL)"),
        (23, "relocations (DT_JMPREL)"),
        (36, "relocations (DT_RELR)"),
    ],
)
def test_what_a_dynamic_linker_would_do_is_not_done(
    tmp_path: Path, tag: int, words: str
) -> None:
    tags = struct.pack("<4Q", tag, 2 * MIB, 0, 0)
    part = Part(data=tags, kind=DYNAMIC)
    found = refusal(tmp_path, Elf([Part(), part], header={"type": DYN}))
    assert words in str(found)
    assert "-static -no-pie" in str(found)


@pytest.mark.parametrize(
    ("start", "size", "words"),
    [
        (0x9_FF9D, 100, "is not in RAM"),
        (0xA_0000, 100, "is not in RAM"),
        (0xF_0000, 0x2_0000, "is not in RAM"),
        (64 * MIB - 99, 100, "[0x100000, 0x4000000)"),
        (64 * MIB, 100, "is not in RAM"),
        (4 * GIB, 100, "is not in RAM"),
        ((1 << 64) - 100, 100, "is not in RAM"),
        (MIB, GIB, "is not in RAM"),
        (0x7_0000 - 99, 100, "overlaps stack, page tables and GDT"),
        (0x7_8000, 100, "[0x70000, 0x88000)"),
        (0x8_7FFF, 100, "overlaps stack, page tables and GDT"),
        (0x1000, 600 * KIB, "overlaps stack, page tables and GDT"),
    ],
)
def test_a_segment_that_finds_no_room_is_refused(
    tmp_path: Path, start: int, size: int, words: str
) -> None:
    found = refusal(tmp_path, Elf([Part(start, memory=size)], entry=start))
    assert isinstance(found, KernelError)
    assert f"segment [{start:#x}, {start + size:#x})" in str(found)
    assert words in str(found)


def test_ram_above_4_gib_is_not_on_the_identity_map(tmp_path: Path) -> None:
    elf = Elf([Part(4 * GIB)], entry=4 * GIB)
    assert "is not in RAM" in str(refusal(tmp_path, elf, ram=8 * GIB))


def test_five_levels_are_refused_where_the_processor_has_none(tmp_path: Path) -> None:
    found = refusal(tmp_path, Elf(), model=INCOHERENT, five_levels=True)
    assert "5-level paging: epyc-7742 has none" in str(found)


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_program(Machine(ram=64 * MIB).cpu, tmp_path / "absent")


def test_law_a_damaged_program_is_loaded_or_refused(tmp_path: Path) -> None:
    tags = struct.pack("<4Q", 0x6FFF_FFFB, 0x0800_0000, 0, 0)
    parts = [Part(), Part(data=tags, kind=DYNAMIC), Part(3 * MIB, memory=0x200)]
    whole = Elf(parts, symbols=SYMBOLS).build()
    outcomes = set()
    for seed in range(300):
        chance = random.Random(seed)
        content = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(4, len(content))] = chance.choice((0, 1, 255))
        made = Loaded(tmp_path, bytes(content), entry="_start")
        outcomes.add(made.refusal is None)
    assert outcomes == {True, False}
