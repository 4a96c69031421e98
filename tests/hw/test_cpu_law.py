"""Random instructions on random mappings, with and without flushes, against a model.

The model has no caches and no views: memory is `Cells`, deciphered at every access.
Its TLB is a set per page of every translation the core may still hold: those it used
since the page was last flushed. An access may go by one of them that grants it, or by
the tables as they are; a fault must come from the tables as they are. Which choice the
core made is asked afterwards, and then every byte must follow from it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from cbit.hw import Machine
from cbit.hw.faults import PageFault, PageFaultCode
from cbit.hw.memory import SLOT_HOST

from .test_paging_witness import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    NX,
    PAGE,
    PAGE_RW,
    PS,
    RW,
    US,
    A,
    Cells,
    D,
    G,
    P,
    Tables,
    long_mode,
)

RAM = 10 << 20
C = 1 << 47
LARGE = 1 << 21
BORDER = 0x7F00_0020_0000  # between two large pages
PAGES = range(BORDER - 6 * PAGE, BORDER + 6 * PAGE, PAGE)
WINDOW = 0x6000_0000_0000
PLAIN_FRAMES, PRIVATE_FRAMES = 0x40_0000, 0x60_0000
POINTER = PAGE_RW | A | D


@dataclass(frozen=True)
class Leaf:
    """A translation: an entry and the size of what it maps."""

    entry: int
    shift: int

    def pa(self, va: int) -> int:
        size = 1 << self.shift
        return (self.entry & 0x7FF_FFFF_F000) // size * size + va % size

    @property
    def encrypted(self) -> bool:
        return bool(self.entry & C)

    def grants(self, kind: str, user: bool, wp: bool) -> bool:
        if user and not self.entry & US:
            return False
        if kind == "fetch":
            return not self.entry & NX
        return kind == "read" or bool(self.entry & RW) or not (wp or user)


class Rig:
    """A core and its model.

    Args:
        coherent: frames are touched under both tags; otherwise each keeps one, and no
            hazard may be reported.
    """

    def __init__(self, seed: int, *, coherent: bool) -> None:
        self.rng = random.Random(seed)
        self.coherent = coherent
        self.machine = machine = Machine(
            "rome", ram=RAM, coherent=coherent, cores=1, seed=seed
        )
        self.cpu = machine.cpu
        tags = dict.fromkeys((39, 30, 21, 12), True)
        self.tables = Tables(machine, tags=tags)
        self.regions = (BORDER - LARGE, BORDER)
        for region in self.regions:
            self.tables.map(region, 0, pointers=POINTER)
        self.windows = {}
        for number, page in enumerate(
            {self.tables.page_of(r, s) for r in self.regions for s in (12, 21)}
        ):
            self.windows[page] = WINDOW + number * PAGE
            entry = page | C | P | RW | A | D
            self.tables.map(self.windows[page], entry, pointers=POINTER)
        machine.caches.write_back_invalidate()
        self.cells = Cells(machine)
        self.pdes = {r: self.tables.read(r, 21) for r in self.regions}
        self.page_tables = dict(self.pdes)
        self.ptes = dict.fromkeys(PAGES, 0)
        self.kept: dict[int, set[Leaf]] = {page: set() for page in PAGES}
        self.wp = self.pge = True
        long_mode(self.cpu, self.tables.cr3, cr4=CR4_PGE)
        self.met: Counter[str] = Counter()

    # Tables

    def region(self, page: int) -> int:
        return page & -LARGE

    def current(self, page: int) -> Leaf | None:
        pde = self.pdes[self.region(page)]
        if not pde & P:
            return None
        if pde & PS:
            return Leaf(pde, 21)
        pte = self.ptes[page]
        return Leaf(pte, 12) if pte & P else None

    def write_entry(self, va: int, shift: int, entry: int) -> None:
        """Store an entry as the kernel does, through its own mapping of the table."""
        slot = self.tables.slot(va, shift)
        self.cpu.store64(self.windows[slot & -PAGE] + slot % PAGE, entry)
        self.cells.store(slot, entry.to_bytes(8, "little"), encrypted=True)
        (self.pdes if shift == 21 else self.ptes)[va] = entry

    def random_flags(self) -> int:
        rng = self.rng
        flags = P | A | D | RW * (rng.random() < 0.8) | US * (rng.random() < 0.7)
        return flags | NX * (rng.random() < 0.2) | G * (rng.random() < 0.3)

    def random_frame(self) -> int:
        """Return a frame with its C-bit, one of 12 pages of either large page."""
        base = self.rng.choice([PLAIN_FRAMES, PRIVATE_FRAMES])
        at = self.rng.choice([*range(6), *range(506, 512)]) * PAGE
        c_bit = base == PRIVATE_FRAMES
        if self.coherent and self.rng.random() < 0.3:
            c_bit = not c_bit
        return int(base + at | C * c_bit)

    def change_pages(self) -> None:
        """Map some pages, often frame after frame, or unmap them."""
        first = self.rng.randrange(len(PAGES))
        count = self.rng.choice([1, 1, 2, 4])
        frame, flags = self.random_frame(), self.random_flags()
        unmap = self.rng.random() < 0.25
        flush = self.rng.random() < 0.6
        for number, page in enumerate(PAGES[first : first + count]):
            if self.rng.random() < 0.2:
                frame, flags = self.random_frame(), self.random_flags()
            entry = 0 if unmap else (frame + number * PAGE) | flags
            if frame % LARGE + number * PAGE >= LARGE:
                break
            self.write_entry(page, 12, entry)
            if flush:
                self.invlpg(page)

    def change_region(self) -> None:
        """Make a region one large page, many small ones, or nothing."""
        region = self.rng.choice(self.regions)
        kind = self.rng.choice(["large", "small", "small", "nothing"])
        if kind == "large":
            base = self.random_frame()
            entry = base & ~(LARGE - 1) | self.random_flags() | PS
        else:
            entry = self.page_tables[region] if kind == "small" else 0
        self.write_entry(region, 21, entry)
        if self.rng.random() < 0.6:
            for page in PAGES:
                if self.region(page) == region:
                    self.invlpg(page)

    # Flushes

    def invlpg(self, page: int) -> None:
        self.cpu.invlpg(page + self.rng.randrange(PAGE))
        self.kept[page].clear()
        for other in PAGES:
            if self.region(other) == self.region(page):
                self.kept[other] = {k for k in self.kept[other] if k.shift == 12}

    def flush(self) -> None:
        kind = self.rng.choice(["invlpg", "cr3", "pge", "caches", "caches"])
        if kind == "invlpg":
            self.invlpg(self.rng.choice(PAGES))
        elif kind == "cr3":
            self.cpu.write_cr3(self.tables.cr3)
            for page, kept in self.kept.items():
                self.kept[page] = {k for k in kept if self.pge and k.entry & G}
        elif kind == "pge":
            self.pge = not self.pge
            self.cpu.write_cr4(CR4_PAE | CR4_PGE * self.pge)
            for kept in self.kept.values():
                kept.clear()
        else:
            caches = self.machine.caches
            self.rng.choice(
                [self.cpu.wbinvd, caches.drain, caches.evict, self.flush_a_line]
            )()

    def flush_a_line(self) -> None:
        table = self.tables.page_of(BORDER, 21)
        self.cpu.clflush(self.windows[table] + self.rng.randrange(PAGE))

    def change_mode(self) -> None:
        self.wp = self.rng.random() < 0.7
        self.cpu.write_cr0(CR0_PE | CR0_PG | CR0_WP * self.wp)

    # Accesses

    def access(self) -> None:
        rng = self.rng
        page = rng.choice(PAGES)
        va = page + rng.choice([0, 1, 8, 0x7F9, 0xFF8, 0xFFD, rng.randrange(PAGE)])
        room = PAGES.stop - va
        length = min(room, rng.choice([1, 8, 8, 50, PAGE, rng.randrange(1, 3 * PAGE)]))
        user = rng.random() < 0.25
        self.cpu.cpl = 3 * user
        kind = rng.choice(["read", "read", "write", "write", "fetch", "copy"])
        self.may_keep(va, min(room, max(length, 8)))
        if kind == "copy":
            self.copy(va, min(length, 6 * PAGE), user)
        elif kind == "write":
            self.write(va, length, user)
        else:
            self.read(va, length, user, kind)
        self.cpu.cpl = 0

    def read(self, va: int, length: int, user: bool, kind: str) -> None:
        how = self.rng.choice(["bytes", "64", "array"]) if kind == "read" else kind
        cpu = self.cpu
        try:
            if how == "fetch":
                data = cpu.fetch(va, length)
            elif how == "64":
                length = min(8, PAGES.stop - va)
                data = (
                    cpu.load64(va).to_bytes(8, "little")
                    if length == 8
                    else cpu.load(va, length)
                )
            elif how == "array":
                length = length // 8 * 8
                data = cpu.load_array(va, length // 8).tobytes()
            else:
                data = cpu.load(va, length)
        except PageFault as fault:
            self.check_fault(fault, va, length, kind, user)
            return
        assert data == self.load(va, length, kind, user), (hex(va), length)
        self.met[f"{how} crossing" if va % PAGE + length > PAGE else how] += 1

    def write(self, va: int, length: int, user: bool) -> None:
        how = self.rng.choice(["store", "store64", "store_array", "fill"])
        if how == "store64":
            if va + 8 > PAGES.stop:
                return
            length = 8
        length = length // 8 * 8 if how == "store_array" else length
        data = self.rng.randbytes(length)
        if how == "fill":
            data = data[:1] * length
        end = va + length
        try:
            if how == "store":
                self.cpu.store(va, data)
            elif how == "store64":
                self.cpu.store64(va, int.from_bytes(data, "little"))
            elif how == "store_array":
                self.cpu.store_array(va, np.frombuffer(data, "<u8"))
            else:
                self.cpu.fill(va, data[0], length)
        except PageFault as fault:
            end = self.check_fault(fault, va, length, "write", user)
            if how == "store64":
                end = va  # all or nothing
        self.store(va, data[: end - va], user)
        self.met[how] += 1

    def copy(self, target: int, length: int, user: bool) -> None:
        source = self.rng.choice(PAGES) + self.rng.randrange(PAGE)
        length = min(length, PAGES.stop - source)
        self.may_keep(source, length)
        if self.is_open(target, source, length, user):
            return
        end = target + length
        try:
            self.cpu.copy(target, source, length)
        except PageFault as fault:
            if PageFaultCode.WRITE in fault.code:
                end = self.check_fault(fault, target, length, "write", user)
            else:
                end = self.check_fault(fault, source, length, "read", user)
                end += target - source
        while target < end:
            step = min(end - target, PAGE - target % PAGE, PAGE - source % PAGE)
            self.copy_run(target, source, step, user)
            target, source = target + step, source + step
        self.met["copy"] += 1

    def copy_run(self, target: int, source: int, length: int, user: bool) -> None:
        """Copy bytes that lie in one page on either side, byte after byte, upwards."""
        into = self.choice(target, "write", user)
        out = self.choice(source, "read", user)
        distance = into.pa(target) - out.pa(source)
        data = self.cells.load(out.pa(source), length, out.encrypted)
        if 0 < distance < length:  # what is stored is loaded again
            data = (data[:distance] * (length // distance + 1))[:length]
        self.cells.store(into.pa(target), data, into.encrypted)

    def is_open(self, target: int, source: int, length: int, user: bool) -> bool:
        """Tell whether the choices of a copy cannot be told apart afterwards.

        That is where a frame may be on both sides under different tags; where a large
        page is one of several choices; and where a fault, which drops what it finds,
        may come after a choice.
        """
        sides, several, may_fault = [], False, False
        for va, kind in ((target, "write"), (source, "read")):
            side = set()
            for page in PAGES:
                if not va - PAGE < page < va + length:
                    continue
                kept, now = self.kept[page], self.current(page)
                may_fault |= now is None or not now.grants(kind, user, self.wp)
                several |= len(kept) > 1
                near = self.kept_near(page)
                large = any(leaf.shift == 21 for leaf in near)
                if large and (len(near) > 1 or not kept):
                    return True
                side |= {(leaf.pa(page), leaf.encrypted) for leaf in kept}
            sides.append(side)
        if may_fault and several:
            return True
        return any((pa, not encrypted) in sides[1] for pa, encrypted in sides[0])

    def kept_near(self, page: int) -> set[Leaf]:
        """Return what may be kept of any page of the region."""
        near = [self.kept[p] for p in PAGES if self.region(p) == self.region(page)]
        return set().union(*near)

    # What must be so

    def may_keep(self, va: int, length: int) -> None:
        """Note that an access, whatever becomes of it, may fill the TLB."""
        for page in range(va & -PAGE, va + length, PAGE):
            if leaf := self.current(page):
                self.kept[page].add(leaf)

    def choice(self, va: int, kind: str, user: bool) -> Leaf:
        """Ask by which translation the core went, and judge that it may."""
        page = va & -PAGE
        self.cpu.cpl = 3 * user
        if len(self.kept[page]) == 1:
            return next(iter(self.kept[page]))
        used = self.cpu.translate(page, write=kind == "write")
        leaf = Leaf(used.entry, used.shift)
        assert used.pa == leaf.pa(page)
        assert used.slot == (SLOT_HOST if leaf.encrypted else 0)
        assert leaf in self.kept[page], hex(va)
        assert leaf.grants(kind, user, self.wp)
        self.met["stale"] += leaf != self.current(page)
        return leaf

    def pieces(
        self, va: int, length: int, kind: str, user: bool
    ) -> Iterator[tuple[int, int, Leaf]]:
        """Yield start, length and translation; one walk serves a page of any size."""
        end = va + length
        while va < end:
            leaf = self.choice(va, kind, user)
            stop = min(end, (va | (1 << leaf.shift) - 1) + 1)
            yield va, stop - va, leaf
            va = stop

    def load(self, va: int, length: int, kind: str, user: bool) -> bytes:
        return b"".join(
            self.cells.load(leaf.pa(at), size, leaf.encrypted)
            for at, size, leaf in self.pieces(va, length, kind, user)
        )

    def store(self, va: int, data: bytes, user: bool) -> None:
        for at, size, leaf in self.pieces(va, len(data), "write", user):
            part = data[at - va : at - va + size]
            self.cells.store(leaf.pa(at), part, leaf.encrypted)

    def check_fault(
        self, fault: PageFault, va: int, length: int, kind: str, user: bool
    ) -> int:
        """Judge a fault by the tables as they are; return where it stopped."""
        at = fault.address
        assert at == va or (va < at < va + length and at % PAGE == 0)
        leaf = self.current(at & -PAGE)
        assert leaf is None or not leaf.grants(kind, user, self.wp), hex(at)
        code = (kind == "write") << 1 | user << 2 | (kind == "fetch") << 4
        assert fault.error_code == code | (leaf is not None)
        self.met["fault"] += 1
        return at

    def run(self, steps: int) -> Counter[str]:
        for _ in range(steps):
            step = self.rng.choices(
                [
                    self.access,
                    self.change_pages,
                    self.change_region,
                    self.flush,
                    self.change_mode,
                ],
                [60, 20, 5, 8, 3],
            )[0]
            step()
        self.machine.caches.drain()
        assert self.machine.snoop(0, RAM) == self.cells.cells
        if not self.coherent:
            assert self.machine.caches.hazards_met == []
        return self.met


@pytest.mark.req("PT-22", "PT-52", "WP-13")
@pytest.mark.parametrize("coherent", [True, False], ids=["coherent", "incoherent"])
def test_law_every_byte_follows_from_a_translation_the_core_may_hold(
    coherent: bool,
) -> None:
    met: Counter[str] = Counter()
    for seed in range(24):
        met += Rig(seed, coherent=coherent).run(250)
    kinds = "bytes 64 array fetch store store64 store_array fill copy stale fault"
    assert {kind for kind in kinds.split() if met[kind] < 30} == set()


@pytest.mark.soak
@pytest.mark.parametrize("coherent", [True, False], ids=["coherent", "incoherent"])
def test_law_every_byte_follows_from_a_translation_for_long(coherent: bool) -> None:
    for seed in range(1000, 1400):
        Rig(seed, coherent=coherent).run(1000)
