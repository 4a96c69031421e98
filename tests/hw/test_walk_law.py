"""Random tables, random accesses: the machine against the second witness.

Tables point anywhere: to each other, to themselves, through the wrong C-bit, into ROM,
into the PCI hole, to where nothing is. Stores may hit tables. The machine and the
witness must agree on every byte, fault and missing answer, and at the end on every
byte of DRAM, accessed and dirty bits included.

One thing is the machine's choice: the accessed bit of an entry that was followed to a
fault below. kvm-unit-tests allows both; machine and witness set it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import PageFault
from cbit.hw.memory import SLOT_HOST
from cbit.hw.memory.bus import NothingThere
from cbit.hw.models import load_model
from cbit.hw.paging import (
    LONG_4_LEVEL,
    LONG_5_LEVEL,
    Access,
    AddressRules,
    PageWalker,
    Protection,
)

from .test_paging_witness import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_SMAP,
    CR4_SMEP,
    EFER,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    NX,
    PAGE,
    PS,
    A,
    Cells,
    D,
    Fault,
    Found,
    G,
    NoAnswer,
    P,
    Regime,
    Witness,
    long_mode,
)
from .test_paging_witness import RW as WRITABLE
from .test_paging_witness import US as FOR_USER

RAM = 6 << 20
TABLES = [0x10_0000 + n * PAGE for n in range(12)]
FRAMES = [0x0, 0x9_F000, 0x20_0000, 0x3F_F000, RAM - PAGE]
ODD = [0xA_0000, 0xF_8000, 0xFEE0_0000, RAM, 0x2_0000_0000]
LARGE = [0, 0x20_0000, 0x40_0000, 0x60_0000, 0xC000_0000, 0x4000_0000]
INDICES = [0, 1, 256, 511]


def without_huge_pages(name: str) -> CpuModel:
    model = load_model(name)
    leaf = model.table.leaf(0x8000_0001)
    leaves = {(0x8000_0001, 0): leaf._replace(edx=leaf.edx & ~(1 << 26))}
    return replace(model, table=model.table.replace(leaves))


MACHINES: dict[str, tuple[CpuModel | str, bool, Regime]] = {
    "naples": ("naples", True, Regime(43, 47)),
    "naples, SYSCFG[23] = 0": ("naples", False, Regime(48, None)),
    "milan": ("milan", True, Regime(43, 51)),
    "milan, SYSCFG[23] = 0": ("milan", False, Regime(48, None)),
    "raphael": ("raphael", True, Regime(46, 51)),
    "genoa": ("genoa", True, Regime(46, 51)),
    "genoa, 5 levels": ("genoa", True, Regime(46, 51, levels=5)),
    "genoa, SYSCFG[23] = 0": ("genoa", False, Regime(52, None, levels=5)),
    "genoa, no 1 GiB pages": (
        without_huge_pages("genoa"),
        True,
        Regime(46, 51, huge=False),
    ),
}
"""Widths and positions from CPUID 8000_0008 EAX and 8000_001F EBX of the dumps."""


def random_entry(rng: random.Random, regime: Regime, tags: dict[int, bool]) -> int:
    """Return an entry that is mostly right, with every bit wrong now and then."""
    kind = rng.random()
    if kind < 0.62:
        address = rng.choice(TABLES)
    elif kind < 0.80:
        address = rng.choice(FRAMES)
    elif kind < 0.95:
        address = rng.choice(LARGE) | PS
    else:
        address = rng.choice(ODD)
    entry = address | P * (rng.random() < 0.95)
    for bit, share in ((WRITABLE, 0.8), (FOR_USER, 0.7), (A, 0.4), (D, 0.4), (G, 0.2)):
        entry |= bit * (rng.random() < share)
    for bit, share in ((PS, 0.05), (NX, 0.1), (1 << 12, 0.02), (1 << 13, 0.02)):
        entry |= bit * (rng.random() < share)
    entry |= rng.getrandbits(64) & (0b11 << 3 | 0b111 << 9 | 0x7FF << 52)
    if regime.c_bit is not None:
        encrypted = tags.get(address, rng.random() < 0.5) ^ (rng.random() < 0.08)
        entry |= encrypted << regime.c_bit
    if rng.random() < 0.08:
        entry |= 1 << rng.randrange(32, 52)
    return entry


def lay_tables(rng: random.Random, machine: Machine, regime: Regime) -> int:
    """Fill every table at the indices in use, under a tag of its own; return CR3."""
    tags = {
        page: regime.c_bit is not None and rng.random() < 0.5
        for page in [*TABLES, *FRAMES]
    }
    for page in TABLES:
        for index in INDICES:
            entry = random_entry(rng, regime, tags).to_bytes(8, "little")
            slot = machine.controller.slot_for(tags[page])
            machine.bus.store(page + 8 * index, entry, slot)
    machine.caches.write_back_invalidate()
    cr3 = TABLES[0] | rng.choice([0, 0x18, 0x7])
    if regime.c_bit is not None:
        cr3 |= (tags[TABLES[0]] ^ (rng.random() < 0.05)) << regime.c_bit
    return cr3


def random_va(rng: random.Random, levels: int) -> int:
    va = rng.choice([0, 1, 0x123, 0x7F8, 0xFFF])
    for level in range(levels):
        va |= rng.choice(INDICES) << (12 + 9 * level)
    width = 12 + 9 * levels
    return va | ((1 << 64) - (1 << width)) * (va >> (width - 1))


class Duel:
    """A core and a witness that do the same accesses."""

    def __init__(self, seed: int, name: str, tsme: bool) -> None:
        model, smee, self.regime = MACHINES[name]
        self.rng = random.Random(f"{name} {seed}")
        self.machine = Machine(
            model, ram=RAM, smee=smee, tsme=tsme, coherent=True, seed=seed
        )
        self.cpu: Cpu = self.machine.cpu
        self.cr3 = lay_tables(self.rng, self.machine, self.regime)
        self.cells = Cells(self.machine)
        long_mode(self.cpu, self.cr3, cr4=CR4_LA57 * (self.regime.levels == 5))
        self.met: Counter[str] = Counter()

    def change_mode(self) -> None:
        """Draw CR0.WP, CR4.SMEP, CR4.SMAP, RFLAGS.AC and EFER.NXE anew."""
        wp, smep, smap, ac = (self.rng.random() < 0.5 for _ in range(4))
        nxe = self.rng.random() < 0.8
        self.regime = replace(self.regime, wp=wp, smep=smep, smap=smap, ac=ac, nxe=nxe)
        cpu, five = self.cpu, self.regime.levels == 5
        cpu.write_cr0(CR0_PE | CR0_PG | CR0_WP * wp)
        cpu.write_cr4(CR4_PAE | CR4_LA57 * five | CR4_SMEP * smep | CR4_SMAP * smap)
        cpu.alignment_check = ac
        cpu.wrmsr(EFER, EFER_LME | EFER_LMA | EFER_NXE * nxe)

    def access(self) -> None:
        """Do one access on both sides and compare what is to be seen of it."""
        rng = self.rng
        va = random_va(rng, self.regime.levels)
        length = rng.randint(1, min(8, PAGE - va % PAGE))
        data = rng.randbytes(length)
        kind, user = rng.choice(["read", "write", "fetch"]), rng.random() < 0.4
        self.cpu.cpl = 3 * user
        self.cpu.invlpg(va)
        expected = self.of_witness(va, data, kind, user)
        assert self.of_machine(va, data, kind) == expected, (hex(va), kind, user)
        self.count(expected, kind)

    def of_witness(self, va: int, data: bytes, kind: str, user: bool) -> object:
        witness = Witness(self.regime, self.cells)
        try:
            result = witness.walk(
                self.cr3, va, write=kind == "write", fetch=kind == "fetch", user=user
            )
            if isinstance(result, Fault):
                return result
            if kind == "write":
                self.cells.store(result.pa, data, result.encrypted)
                return result
            read = self.cells.load(result.pa, len(data), result.encrypted)
            return result, read
        except NoAnswer as nobody:
            return nobody.pa

    def of_machine(self, va: int, data: bytes, kind: str) -> object:
        cpu = self.cpu
        try:
            if kind == "write":
                cpu.store(va, data)
                return self.translation(va, write=True)
            do = cpu.load if kind == "read" else cpu.fetch
            read = do(va, len(data))
            return self.translation(va), read
        except PageFault as fault:
            if cpu.cr2 != va or fault.address != va:
                return cpu.cr2
            return as_fault(fault)
        except NothingThere as nobody:
            return nobody.pa

    def translation(self, va: int, *, write: bool = False) -> Found:
        """Return what the TLB keeps of the access, which needs no further walk."""
        if not write and self.regime.smap:
            self.cpu.alignment_check = True  # a fetch is no data access
        kept = self.cpu.translate(va, write=write)
        self.cpu.alignment_check = self.regime.ac
        encrypted = kept.slot == SLOT_HOST
        if self.machine.tsme:
            assert encrypted, "whatever the C-bit says"
            c_bit = self.regime.c_bit
            encrypted = c_bit is not None and bool(kept.entry >> c_bit & 1)
        return Found(kept.pa | va % PAGE, encrypted, kept.shift)

    def count(self, result: object, kind: str) -> None:
        if isinstance(result, int):
            self.met["nothing there"] += 1
        elif isinstance(result, Fault):
            why = "reserved" if result.code & 8 else "refused"
            self.met[f"{why if result.code & 1 else 'absent'} {result.level}"] += 1
        else:
            found = result[0] if isinstance(result, tuple) else result
            assert isinstance(found, Found)
            self.met[f"{kind} {found.size_shift}"] += 1
            self.met["encrypted" if found.encrypted else "plain"] += 1

    def finish(self) -> None:
        self.machine.caches.drain()
        assert self.machine.snoop(0, self.machine.dram.size) == self.cells.cells


def as_fault(fault: PageFault) -> Fault:
    assert fault.error_code == int(fault.code)
    assert fault.entry is not None
    return Fault(int(fault.code), fault.level, fault.entry)


def duel(seed: int, name: str, accesses: int, *, tsme: bool = False) -> Counter[str]:
    one = Duel(seed, name, tsme)
    for number in range(accesses):
        if number % 10 == 0:
            one.change_mode()
        one.access()
    one.finish()
    return one.met


@pytest.mark.req("PT-1", "PT-2", "PT-13", "PT-14", "PT-20", "PT-21", "PT-22", "PT-24")
@pytest.mark.req("PT-T1")
@pytest.mark.parametrize("name", MACHINES)
def test_law_the_machine_walks_as_the_witness_does(name: str) -> None:
    met: Counter[str] = Counter()
    for seed in range(40):
        met += duel(seed, name, accesses=60)
    regime = MACHINES[name][2]
    tables = ["PML5", "PML4", "PDPT", "PD", "PT"][5 - regime.levels :]
    expected = {f"{why} {table}" for why in ("absent", "reserved") for table in tables}
    expected |= {f"{kind} {s}" for kind in ("read", "write", "fetch") for s in (12, 21)}
    expected |= {"refused PT", "refused PD", "nothing there", "plain"}
    expected |= {"encrypted"} if regime.c_bit is not None else set()
    expected |= {"read 30"} if regime.huge else set()
    assert expected - set(met) == set(), "what the law has not tried"


@pytest.mark.parametrize("name", ["naples", "naples, SYSCFG[23] = 0"])
def test_law_transparent_encryption_changes_no_walk(name: str) -> None:
    for seed in range(20):
        duel(seed, name, accesses=40, tsme=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", MACHINES)
def test_law_the_machine_walks_as_the_witness_does_for_long(name: str) -> None:
    for seed in range(100, 600):
        duel(seed, name, accesses=200)


RULES = {
    "C inside the width": Regime(48, 47),
    "C is the highest address bit": Regime(52, 51),
    "nothing reserved": Regime(52, None),
    "as narrow as RAM": Regime(36, 39),
    "five levels": Regime(44, 46, levels=5),
}
"""Rules that no model gives the host; guests and other formats will."""


@pytest.mark.parametrize("name", RULES)
def test_law_the_walker_obeys_any_rules(name: str) -> None:
    for seed in range(20):
        walk_both(seed, RULES[name])


def walk_both(seed: int, regime: Regime) -> None:
    rng = random.Random(seed)
    machine = Machine("naples", ram=RAM, coherent=True, seed=seed)
    cr3 = lay_tables(rng, machine, regime)
    cells = Cells(machine)
    for _ in range(40):
        wp, smep, smap, nxe, huge = (rng.random() < 0.5 for _ in range(5))
        regime = replace(regime, wp=wp, smep=smep, smap=smap, nxe=nxe, huge=huge)
        c_mask = 0 if regime.c_bit is None else 1 << regime.c_bit
        walker = PageWalker(
            machine.bus,
            LONG_5_LEVEL if regime.levels == 5 else LONG_4_LEVEL,
            AddressRules(regime.width, c_mask, nxe, huge),
            Protection(write_protect=wp, smep=smep, smap=smap),
        )
        va = random_va(rng, regime.levels)
        access = rng.choice([Access.READ, Access.WRITE, Access.FETCH])
        access |= rng.choice([Access.READ, Access.USER])
        assert of_walker(walker, cr3, va, access) == of_witness(
            Witness(regime, cells), cr3, va, access
        )
    machine.caches.drain()
    assert machine.snoop(0, machine.dram.size) == cells.cells


def of_walker(walker: PageWalker, cr3: int, va: int, access: Access) -> object:
    try:
        kept = walker.walk(cr3, va, access)
    except PageFault as fault:
        return as_fault(fault)
    except NothingThere as nobody:
        return nobody.pa
    assert kept.is_global == bool(kept.entry & G)
    assert kept.dirty == bool(kept.entry & D)
    return Found(kept.pa | va % PAGE, kept.slot == SLOT_HOST, kept.shift)


def of_witness(witness: Witness, cr3: int, va: int, access: Access) -> object:
    try:
        return witness.walk(
            cr3,
            va,
            write=Access.WRITE in access,
            fetch=Access.FETCH in access,
            user=Access.USER in access,
        )
    except NoAnswer as nobody:
        return nobody.pa
