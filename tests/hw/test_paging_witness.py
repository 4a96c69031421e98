"""The second witness of the page walk: slow, obvious, and written from the manual.

`Cells` is a memory without caches: every access goes through the AES engine to the
bytes a probe would see. `Witness` walks tables in such a memory, one rule a line.
`Tables` lays tables out by hand. The tests here hold the witness against entries that
were worked out on paper; the files beside this one hold the machine against it.

Source: [APM2] 5.3 to 5.6, 7.10.1; the rules for the error code and for A and D are
those that kvm-unit-tests expects of hardware (x86/access.c, ac_emulate_access).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.memory import SLOT_HOST, SLOT_NONE

PAGE = 0x1000

CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_PAE, CR4_PGE, CR4_LA57 = 1 << 5, 1 << 7, 1 << 12
CR4_PCIDE, CR4_SMEP, CR4_SMAP = 1 << 17, 1 << 20, 1 << 21
EFER, EFER_LME, EFER_LMA, EFER_NXE = 0xC000_0080, 1 << 8, 1 << 10, 1 << 11
SYSCFG, SYSCFG_SMEE = 0xC001_0010, 1 << 23

P, RW, US, A, D, PS, G, NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
POINTER = P | RW | US
PAGE_RW = P | RW | US
LARGE_RW = PAGE_RW | PS

NAMES = {5: "PML5", 4: "PML4", 3: "PDPT", 2: "PD", 1: "PT"}


@dataclass(frozen=True)
class Regime:
    """What CPUID, MSRs and control registers say about a walk."""

    width: int
    c_bit: int | None
    levels: int = 4
    huge: bool = True
    nxe: bool = True
    wp: bool = True
    smep: bool = False
    smap: bool = False
    ac: bool = False


@dataclass(frozen=True)
class Found:
    """A translation of one byte."""

    pa: int
    encrypted: bool
    size_shift: int


@dataclass(frozen=True)
class Fault:
    """#PF: error code, and the entry that caused it."""

    code: int
    level: str
    entry: int


class NoAnswer(Exception):
    """Neither memory nor a device at `pa`."""

    def __init__(self, pa: int) -> None:
        self.pa = pa
        super().__init__(hex(pa))


@dataclass
class Cells:
    """What a machine without caches would have in DRAM, as a copy of `machine`'s."""

    machine: Machine
    cells: bytearray = field(init=False)

    def __post_init__(self) -> None:
        size = self.machine.dram.size
        self.cells = bytearray(self.machine.snoop(0, size))

    def load(self, pa: int, length: int, encrypted: bool) -> bytes:
        region = self.machine.map.find(pa)
        if region is None:
            raise NoAnswer(pa)
        if region.kind.value != "ram":
            return b"\xff" * length  # open bus, or an erased ROM
        first, end = pa & -16, (pa + length + 15) & -16
        blocks = bytes(self.cells[first:end])
        if encrypted or self.machine.tsme:
            blocks = self.machine.controller.engine(SLOT_HOST).decrypt(first, blocks)
        return blocks[pa - first : pa - first + length]

    def store(self, pa: int, data: bytes, encrypted: bool) -> None:
        region = self.machine.map.find(pa)
        if region is None:
            raise NoAnswer(pa)
        if region.kind.value != "ram":
            return
        first, end = pa & -16, (pa + len(data) + 15) & -16
        blocks = bytearray(self.load(first, end - first, encrypted))
        blocks[pa - first : pa - first + len(data)] = data
        if encrypted or self.machine.tsme:
            engine = self.machine.controller.engine(SLOT_HOST)
            self.cells[first:end] = engine.encrypt(first, bytes(blocks))
        else:
            self.cells[first:end] = blocks


@dataclass
class Witness:
    """Walks tables under a regime; stores A and D as it goes."""

    regime: Regime
    memory: Cells

    def walk(
        self,
        cr3: int,
        va: int,
        *,
        write: bool = False,
        user: bool = False,
        fetch: bool = False,
    ) -> Found | Fault:
        code = (write << 1) | (user << 2)
        if fetch and (self.regime.nxe or self.regime.smep):
            code |= 1 << 4
        writable = for_user = executable = True
        table, encrypted = self.split(cr3)
        for level in range(self.regime.levels, 0, -1):
            low_bit = 12 + 9 * (level - 1)
            where = table + 8 * ((va >> low_bit) % 512)
            entry = int.from_bytes(self.memory.load(where, 8, encrypted), "little")
            if not entry & P:
                return Fault(code, NAMES[level], entry)
            leaf = self.is_leaf(level, entry)
            if any(entry >> bit & 1 for bit in self.must_be_zero(level, leaf)):
                return Fault(code | 1 | 1 << 3, NAMES[level], entry)
            writable = writable and bool(entry & RW)
            for_user = for_user and bool(entry & US)
            executable = executable and not entry & NX
            if leaf:
                break
            self.set_bits(where, encrypted, entry, A)
            table, encrypted = self.split(entry)

        if self.forbids(writable, for_user, executable, write, user, fetch):
            return Fault(code | 1, NAMES[level], entry)
        self.set_bits(where, encrypted, entry, A | D if write else A)
        frame, encrypted = self.split(entry)
        size = 1 << low_bit
        return Found(frame // size * size + va % size, encrypted, low_bit)

    def is_leaf(self, level: int, entry: int) -> bool:
        if level == 1:
            return True
        if level == 2:
            return bool(entry & PS)
        return level == 3 and bool(entry & PS) and self.regime.huge

    def must_be_zero(self, level: int, leaf: bool) -> list[int]:
        bits = [b for b in range(self.regime.width, 52) if b != self.regime.c_bit]
        if leaf and level == 2:
            bits += range(13, 21)
        if leaf and level == 3:
            bits += range(13, 30)
        if level >= 4 or (level == 3 and not self.regime.huge):
            bits += [7]
        if not self.regime.nxe:
            bits += [63]
        return bits

    def split(self, entry: int) -> tuple[int, bool]:
        """Return the address in CR3 or in an entry, and whether C is set."""
        address = sum(
            1 << bit
            for bit in range(12, self.regime.width)
            if entry >> bit & 1 and bit != self.regime.c_bit
        )
        c_bit = self.regime.c_bit
        return address, c_bit is not None and bool(entry >> c_bit & 1)

    def forbids(
        self,
        writable: bool,
        for_user: bool,
        executable: bool,
        write: bool,
        user: bool,
        fetch: bool,
    ) -> bool:
        regime = self.regime
        if user and not for_user:
            return True
        if write and not writable and (user or regime.wp):
            return True
        if fetch and not executable:
            return True
        if fetch and regime.smep and for_user and not user:
            return True
        return not fetch and not user and for_user and regime.smap and not regime.ac

    def set_bits(self, where: int, encrypted: bool, entry: int, bits: int) -> None:
        if entry & bits != bits:
            data = (entry | bits).to_bytes(8, "little")
            self.memory.store(where, data, encrypted)


class Tables:
    """Page tables laid out by hand through the bus, the core having no part in it.

    Args:
        machine: where.
        start: first table page, the top table; more are taken upwards.
        tags: which tables are encrypted, by the shift that their entries have in an
            address (39 is the PML4, 12 the page table); CR3 and the entries that
            `map` makes agree with it.
    """

    def __init__(
        self,
        machine: Machine,
        start: int = 0x10_0000,
        *,
        five_levels: bool = False,
        tags: Mapping[int, bool] | None = None,
    ) -> None:
        self.machine = machine
        self.c_mask = 1 << machine.model.memory_encryption.c_bit if machine.smee else 0
        self.shifts = (48, 39, 30, 21, 12)[not five_levels :]
        self.tags = tags or {}
        self._next = start
        self._pages: dict[tuple[int, int], int] = {}
        self.root = self._page(self.shifts[0], 0)

    @property
    def cr3(self) -> int:
        return self.root | self._c(self.shifts[0])

    def map(
        self, va: int, entry: int, shift: int = 12, pointers: int = POINTER
    ) -> None:
        """Set the leaf of `va` at the level of `shift`, making the tables above it."""
        for upper, lower in zip(self.shifts, self.shifts[1:], strict=False):
            if upper == shift:
                break
            if (lower, self._prefix(va, upper)) not in self._pages:
                page = self._page(lower, self._prefix(va, upper))
                self.write(va, upper, page | pointers | self._c(lower))
        self.write(va, shift, entry)

    def slot(self, va: int, shift: int) -> int:
        """Return the physical address of the entry of `va` at a level."""
        index = self.shifts.index(shift)
        above = self._prefix(va, self.shifts[index - 1]) if index else 0
        return self._pages[shift, above] + 8 * (va >> shift & 511)

    def read(self, va: int, shift: int = 12) -> int:
        data = self.machine.bus.load(self.slot(va, shift), 8, self._tag(shift))
        return int.from_bytes(data, "little")

    def write(self, va: int, shift: int, entry: int) -> None:
        data = entry.to_bytes(8, "little")
        self.machine.bus.store(self.slot(va, shift), data, self._tag(shift))

    def page_of(self, va: int, shift: int) -> int:
        """Return the table page that holds the entry of `va` at a level."""
        return self.slot(va, shift) & -PAGE

    def _prefix(self, va: int, shift: int) -> int:
        return va % (1 << (self.shifts[0] + 9)) >> shift

    def _page(self, shift: int, prefix: int) -> int:
        page = self._pages[shift, prefix] = self._next
        self._next += PAGE
        self.machine.bus.store(page, bytes(PAGE), self._tag(shift))
        return page

    def _c(self, shift: int) -> int:
        return self.c_mask if self.tags.get(shift) else 0

    def _tag(self, shift: int) -> int:
        return self.machine.controller.slot_for(bool(self._c(shift)))


def long_mode(
    cpu: Cpu, cr3: int, *, cr4: int = 0, nxe: bool = True, wp: bool = True
) -> None:
    """Enter long mode from reset as an operating system does: PAE, LME, CR3, PG."""
    cpu.write_cr4(CR4_PAE | cr4)
    cpu.wrmsr(EFER, EFER_LME | EFER_NXE * nxe)
    cpu.write_cr3(cr3)
    cpu.write_cr0(CR0_PE | CR0_PG | CR0_WP * wp)


# --- the witness held against paper


class OneTable(Cells):
    """Every table is the same page: `entries[index]`, the index counted in the page."""

    def __init__(self, entries: dict[int, int]) -> None:
        self.entries = entries

    def load(self, pa: int, length: int, encrypted: bool) -> bytes:
        return self.entries.get(pa % PAGE // 8, 0).to_bytes(8, "little")

    def store(self, pa: int, data: bytes, encrypted: bool) -> None:
        self.entries[pa % PAGE // 8] = int.from_bytes(data, "little")


NAPLES = Regime(width=43, c_bit=47)

# 1 in the PML4, 2 in the PDPT, 3 in the PD, 4 in the PT, offset 0x567.
VA_1234 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x567


def tables_1234(**changes: int) -> OneTable:
    entries = {"pml4": 0x1007, "pdpt": 0x2007, "pd": 0x3007, "pt": 0x8000_0ABC_D007}
    return OneTable(dict(enumerate({**entries, **changes}.values(), start=1)))


def test_the_witness_finds_a_page_through_four_levels() -> None:
    memory = tables_1234()
    found = Witness(NAPLES, memory).walk(0x5000, VA_1234, write=True)
    assert found == Found(0xABCD567, encrypted=True, size_shift=12)
    assert [memory.entries[n] for n in (1, 2, 3, 4)] == [
        0x1027,
        0x2027,
        0x3027,
        0x8000_0ABC_D067,
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"pml4": 0x1006}, Fault(0x02, "PML4", 0x1006)),
        ({"pml4": 0x1087}, Fault(0x0B, "PML4", 0x1087)),  # PS in the PML4
        ({"pdpt": 0x0085}, Fault(0x03, "PDPT", 0x0085)),  # 1 GiB, read-only
        ({"pdpt": 0x4087}, Fault(0x0B, "PDPT", 0x4087)),  # 1 GiB, bit 14
        ({"pd": 0x10_0087}, Fault(0x0B, "PD", 0x10_0087)),  # 2 MiB, bit 20
        ({"pt": 0x800_0000_0007}, Fault(0x0B, "PT", 0x800_0000_0007)),  # bit 43
        ({"pt": 0x9005}, Fault(0x03, "PT", 0x9005)),
    ],
)
def test_the_witness_names_the_entry_that_refuses_a_store(
    changes: dict[str, int], fault: Fault
) -> None:
    witness = Witness(NAPLES, tables_1234(**changes))
    assert witness.walk(0x5000, VA_1234, write=True) == fault


def test_the_witness_splits_an_address_into_five_indices() -> None:
    entries = {9: 0x1007, 1: 0x2007, 2: 0x3007, 3: 0x4007, 4: 0x7007}
    walk = Witness(Regime(46, 51, levels=5), OneTable(entries)).walk
    assert walk(0, 9 << 48 | VA_1234) == Found(0x7567, False, 12)
    assert walk(0, 8 << 48 | VA_1234) == Fault(0, "PML5", 0)


def test_cells_keep_what_a_probe_sees() -> None:
    machine = Machine("milan", ram=4 << 20, seed=7)
    machine.bus.store(0x1000, b"sixteen bytes...", SLOT_HOST)
    machine.bus.store(0x2000, b"plain", SLOT_NONE)
    machine.caches.drain()
    cells = Cells(machine)
    assert cells.load(0x1003, 5, encrypted=True) == b"teen "
    assert cells.load(0x2000, 5, encrypted=False) == b"plain"
    cells.store(0x1003, b"TEEN", encrypted=True)
    machine.bus.store(0x1003, b"TEEN", SLOT_HOST)
    machine.caches.drain()
    assert cells.cells == machine.snoop(0, machine.dram.size)
