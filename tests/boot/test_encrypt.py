"""boot/encrypt.py: the actions in their order, the copy, and what DRAM shows then.

The arithmetic is in test_encrypt_sizes.py.
"""

from __future__ import annotations

import pytest

from cbit.boot.encrypt import (
    Encrypted,
    plan_workarea,
    sme_encrypt_execute,
    sme_encrypt_kernel,
)
from cbit.hw.cpu import Cpu
from cbit.hw.errors import KernelError
from cbit.hw.faults import PageFault
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState

from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    GIB,
    INCOHERENT,
    MIB,
    TABLE_ADDRESS,
    Board,
    board,
    equal_blocks,
    random_bytes,
)

TEXT, KERNEL_END = 0x100_0000, 0x160_0000  # the built-in kernel: _end is 0x141_0000
WORKAREA = KERNEL_END
BUFFER = WORKAREA + 0x2000
POOL = WORKAREA + 0x20_2000
AREA_END = WORKAREA + 4 * MIB
BASE = 0x80_0000_0000

INITRD, INITRD_END = 0x260_1000, 0x2B0_2000
INITRD_DATA = random_bytes(5 * MIB + 100)
"""Neither end on 2 MiB: 511 small pages, a large one, 258 small ones."""

PGE = 1 << 7


class Stopped(Exception):
    """The core has come to the WBINVD of the copy."""


class StopsBeforeTheCopy(Cpu):
    def wbinvd(self) -> None:
        raise Stopped


class NotesCopies(Cpu):
    copies: list[tuple[int, int, int]]

    def copy(self, target: VirtAddr | int, source: VirtAddr | int, length: int) -> None:
        self.copies.append((target, source, length))
        super().copy(target, source, length)


def encrypt(made: Board, start: int = 0, data: bytes = b"") -> Encrypted:
    """Run sme_encrypt_kernel alone, with an initrd if there is data."""
    initrd = None
    if data:
        made.machine.bus.store(start, data, slot=0)
        initrd = PhysAddr(start), len(data)
    done = sme_encrypt_kernel(made.cpu, made.state, made.layout, initrd)
    assert done is not None
    return done


def before_the_copy(
    model: str, start: int = 0, data: bytes = b""
) -> tuple[Board, int, int]:
    """Return the board with both mappings made, the PGD and the alias's offset."""
    five_levels = model == FIVE_LEVELS
    made = board(model, core=StopsBeforeTheCopy, la57=five_levels)
    with pytest.raises(Stopped):
        encrypt(made, start, data)
    return made, made.cpu.read_cr3(), 1 << 48 if five_levels else BASE


def page_directory(made: Board) -> int:
    """Return where the boot loader's directory of the first GiB lies."""
    pdpt = made.cpu.load64(made.cpu.read_cr3()) & TABLE_ADDRESS
    return made.cpu.load64(pdpt) & TABLE_ADDRESS


def set_directory(made: Board, start: int, entries: list[int]) -> None:
    """Replace entries of the boot loader's map from `start` on, and flush."""
    for number, entry in enumerate(entries):
        slot = page_directory(made) + 8 * ((start >> 21) + number)
        made.cpu.store64(slot, entry)
    made.cpu.write_cr3(made.cpu.read_cr3())


@pytest.mark.req("LB-30")
@pytest.mark.parametrize(
    "state",
    [EncryptionState(), EncryptionState(1 << 51, 1), EncryptionState(1 << 51, 7)],
    ids=["inactive", "sev", "sev-snp"],
)
def test_only_a_host_with_a_mask_encrypts(state: EncryptionState) -> None:
    made = board()
    made.events.clear()
    assert sme_encrypt_kernel(made.cpu, state, made.layout, None) is None
    assert made.events == []
    assert made.cells(TEXT, KERNEL_END).tobytes() == made.plain(TEXT, KERNEL_END)


# Mappings


@pytest.mark.req("LB-50")
def test_the_work_area_is_mapped_plain_in_tables_that_do_not_have_it() -> None:
    made = board()
    cr3 = made.cpu.read_cr3()
    set_directory(made, WORKAREA, [0, 0])
    made.events.clear()
    encrypt(made)
    for at in (WORKAREA, POOL, AREA_END - 1):
        leaf = made.walk(cr3, at)
        assert (leaf.pa, leaf.shift, leaf.c_bits) == (at, 21, (False,) * 4)
        assert leaf.entry & 0xFFF == 0x0E3
    assert made.walk(cr3, AREA_END).entry & 0xF9F == 0x183  # the loader's
    assert made.facts("cr")[0] == ("cr", "cr3", cr3)


@pytest.mark.req("LB-50")
def test_large_entries_that_exist_are_left_alone() -> None:
    made = board()
    cr3 = made.cpu.read_cr3()
    encrypt(made)
    for at in (WORKAREA, WORKAREA + 2 * MIB):
        assert made.walk(cr3, at).entry & ~0x60 == at | 0x183


@pytest.mark.req("LB-50")
def test_a_table_of_small_pages_gives_way_to_a_large_one() -> None:
    made = board()
    cr3 = made.cpu.read_cr3()
    made.cpu.fill(0x9_8000, 0, 4096)
    set_directory(made, WORKAREA, [0x9_8063])
    encrypt(made)
    assert made.walk(cr3, WORKAREA).entry == WORKAREA | 0x0E3


@pytest.mark.req("LB-51", "LB-52", "LB-53", "LB-55", "LB-59", "PT-38")
@pytest.mark.req("PT-39", "PT-40", "PT-41", "LB-30", "LB-39")
def test_the_new_tables_are_those_of_the_sheet_entry_by_entry() -> None:
    made, pgd, _ = before_the_copy(COHERENT)
    assert pgd == POOL
    top = made.table(pgd, c_bit=False)
    assert [i for i, entry in enumerate(top) if entry] == [0, 1]
    leaves = []
    for slot in (0, 1):
        assert top[slot] & ~TABLE_ADDRESS == 0x063
        pud = made.table(top[slot] & TABLE_ADDRESS, c_bit=False)
        assert [(i, e & ~TABLE_ADDRESS) for i, e in enumerate(pud) if e] == [(0, 0x63)]
        pmd = made.table(pud[0] & TABLE_ADDRESS, c_bit=False)
        leaves.append({i: entry for i, entry in enumerate(pmd) if entry})
    kernel = range(TEXT >> 21, KERNEL_END >> 21)
    area = {i: i << 21 | 0x0E3 for i in range(WORKAREA >> 21, AREA_END >> 21)}
    assert leaves[0] == {i: i << 21 | 0x0E3 | 1 << 51 for i in kernel} | area
    assert leaves[1] == {i: i << 21 | 0x10EB for i in kernel} | area
    # All of it lies in plain memory: DRAM shows the entries as they are.
    made.machine.caches.drain()
    assert made.machine.snoop(pgd, 16) == made.through(False, pgd, 16)


@pytest.mark.req("LB-52", "LB-53", "LB-55", "LB-59", "LB-39")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_both_mappings_at_every_level(model: str) -> None:
    made, pgd, base = before_the_copy(model)
    tables = (False,) * (made.levels - 1)  # CR3 and all levels above the leaf's
    for pa in range(TEXT, KERNEL_END, 2 * MIB):
        leaf, alias = made.walk(pgd, pa + 0x1234), made.walk(pgd, pa + base)
        assert leaf.c_bits == (*tables, True)
        assert alias.c_bits == (*tables, False)
        assert leaf.entry == pa | 0x0E3 | made.c_mask
        assert alias.entry == pa | 0x10EB
    for pa in range(WORKAREA, AREA_END, 2 * MIB):
        for offset in (0, base):
            leaf = made.walk(pgd, pa + offset)
            assert (leaf.entry, leaf.c_bits) == (pa | 0x0E3, (*tables, False))
    for outside in (0, TEXT - 1, AREA_END):
        assert not made.maps(pgd, outside)
        assert not made.maps(pgd, outside + base)


@pytest.mark.req("LB-31", "LB-52", "LB-53", "LB-54", "PT-42")
@pytest.mark.parametrize("model", [COHERENT, FIVE_LEVELS])
def test_an_initrd_gets_the_same_two_mappings_small_pages_at_its_ends(
    model: str,
) -> None:
    made, pgd, base = before_the_copy(model, INITRD, INITRD_DATA)
    shifts = []
    for pa in range(INITRD, INITRD_END, 4096):
        leaf, alias = made.walk(pgd, pa), made.walk(pgd, pa + base)
        assert leaf.pa == alias.pa == pa
        shifts.append(leaf.shift)
        enc, wp = (0x0E3, 0x10EB) if leaf.shift == 21 else (0x063, 0x0EB)
        frame = pa & -(1 << leaf.shift)
        assert leaf.entry == frame | enc | made.c_mask
        assert alias.entry == frame | wp
    assert shifts == [12] * 511 + [21] * 512 + [12] * 258
    for outside in (INITRD - 1, INITRD_END):
        assert not made.maps(pgd, outside)
        assert not made.maps(pgd, outside + base)


@pytest.mark.req("LB-31")
@pytest.mark.parametrize("offset", [0x010, 0x7F0])  # whole blocks of the engine
def test_an_initrd_may_start_within_a_page(offset: int) -> None:
    start = 0x220_0000 - 0x1000 + offset
    made, pgd, base = before_the_copy(COHERENT, start, INITRD_DATA)
    for pa in (start, 0x220_0000, 0x240_0000, 0x26F_F000):
        leaf, alias = made.walk(pgd, pa), made.walk(pgd, pa + base)
        assert leaf.pa == alias.pa == pa
        assert leaf.entry & 0xFFF == (0x0E3 if leaf.shift == 21 else 0x063)
        assert alias.entry & 0xFFF == 0x0EB

    made = board()
    made.machine.bus.store(start - offset, b"before", slot=0)
    encrypt(made, start, INITRD_DATA)
    assert made.through(True, start, len(INITRD_DATA)) == INITRD_DATA
    made.machine.caches.drain()
    assert made.machine.snoop(start - offset, 6) == b"before"


@pytest.mark.req("LB-31", "LB-39", "LB-54", "LB-57", "LB-58")
def test_an_initrd_above_512_gib_moves_the_second_mapping() -> None:
    made = board(ram=513 * GIB)
    start, data = 512 * GIB + 0x3000, random_bytes(3 * MIB)
    done = encrypt(made, start, data)
    assert done.decrypted_base == 0x100_0000_0000
    assert made.through(True, start, len(data)) == data
    cells = made.cells(start, start + len(data))
    assert equal_blocks(cells, data) == []
    top = made.table(done.pgd, c_bit=False)
    assert [i for i, entry in enumerate(top) if entry] == [0, 1]


# The copy


@pytest.mark.req("LB-56", "LB-57", "LB-60", "LB-65")
def test_the_kernel_first_then_the_initrd_by_2_mib_over_the_buffer() -> None:
    made = board(core=NotesCopies)
    assert isinstance(made.cpu, NotesCopies)
    made.cpu.copies = []
    encrypt(made, INITRD, INITRD_DATA)
    expected = []
    for start, end in ((TEXT, KERNEL_END), (INITRD, INITRD_END)):
        for at in range(start, end, 2 * MIB):
            length = min(2 * MIB, end - at)
            expected += [(BUFFER, at + BASE, length), (at, BUFFER, length)]
    assert made.cpu.copies == expected


@pytest.mark.req("LB-65")
def test_length_zero_ends_after_one_empty_pass() -> None:
    made = board(core=NotesCopies)
    assert isinstance(made.cpu, NotesCopies)
    made.cpu.copies = []
    area = plan_workarea(made.layout, 0, five_levels=False)
    pgd = PhysAddr(made.cpu.read_cr3())
    sme_encrypt_execute(made.cpu, VirtAddr(TEXT), VirtAddr(TEXT + BASE), 0, area, pgd)
    assert made.cpu.copies == [(BUFFER, TEXT + BASE, 0), (TEXT, BUFFER, 0)]
    assert made.cells(TEXT, KERNEL_END).tobytes() == made.plain(TEXT, KERNEL_END)


@pytest.mark.req("LB-59", "LB-61", "LB-62", "LB-63", "LB-64", "LB-66", "PT-T2")
@pytest.mark.parametrize("pge", [0, PGE])
@pytest.mark.parametrize("initrd", [b"", INITRD_DATA], ids=["", "initrd"])
def test_registers_and_flushes_in_exact_order(initrd: bytes, pge: int) -> None:
    made = board(INCOHERENT)
    made.cpu.write_cr4(made.cpu.read_cr4() | pge)
    cr3, cr4 = made.cpu.read_cr3(), 1 << 5  # PAE
    made.events.clear()
    encrypt(made, INITRD, initrd)
    copy = [
        ("cr", "cr3", POOL),
        ("cr", "cr4", cr4),
        ("cr", "cr4", cr4 | PGE),
        ("wrmsr", 0x277, 0x0007_0506_0007_0406),  # PA5 is WP, the others stay
        ("flush", "wbinvd"),
        ("wrmsr", 0x277, 0x0007_0406_0007_0406),
    ]
    assert made.facts("cr", "wrmsr", "flush") == [
        ("cr", "cr3", cr3),
        *copy,
        *(copy if initrd else []),
        ("cr", "cr3", POOL),
    ]
    assert made.cpu.read_cr3() == POOL
    assert made.cpu.read_cr4() == cr4 | PGE


@pytest.mark.req("LB-63", "LB-66")
def test_a_pat_of_the_firmware_is_kept_apart_from_entry_5() -> None:
    made = board()
    own = 0x0105_0006_0401_0700
    made.cpu.wrmsr(0x277, own)
    made.events.clear()
    encrypt(made)
    assert made.facts("wrmsr") == [
        ("wrmsr", 0x277, 0x0105_0506_0401_0700),
        ("wrmsr", 0x277, own),
    ]


# What is left


@pytest.mark.req("LB-58", "LB-59", "LB-55")
@pytest.mark.parametrize("initrd", [b"", INITRD_DATA], ids=["", "initrd"])
def test_the_plain_aliases_are_gone_and_the_identity_maps_stay(initrd: bytes) -> None:
    made = board()
    done = encrypt(made, INITRD, initrd)
    assert done.pgd == made.cpu.read_cr3() == POOL
    assert made.table(POOL, c_bit=False)[1:] == [0] * 511
    for pa in (TEXT, KERNEL_END - 1, *((INITRD, INITRD_END - 1) if initrd else ())):
        assert made.walk(POOL, pa).c_bits[-1]
        with pytest.raises(PageFault):
            made.cpu.load(pa + BASE, 1)
    for pa in (WORKAREA, AREA_END - 1):
        assert not made.walk(POOL, pa).c_bits[-1]
        with pytest.raises(PageFault):
            made.cpu.load(pa + BASE, 1)


@pytest.mark.req("LB-T3", "LB-30", "LB-31", "LB-56", "LB-57", "LB-59", "WP-13")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_dram_holds_what_the_engine_makes_of_the_plaintext(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS)
    encrypt(made, INITRD, INITRD_DATA)
    tail = bytes(INITRD_END - INITRD - len(INITRD_DATA))
    engine = made.machine.controller.engine(1)
    for start, plain in (
        (TEXT, made.plain(TEXT, KERNEL_END)),  # up to 2 MiB behind _end
        (INITRD, INITRD_DATA + tail),
    ):
        end = start + len(plain)
        cells = made.cells(start, end)
        assert engine.decrypt(start, cells.tobytes()) == plain
        assert equal_blocks(cells, plain) == []
        assert made.through(True, start, len(plain)) == plain
    # What lies around is as it was.
    for start, end in ((0x9_0000, 0xA_0000), (INITRD_END, INITRD_END + 4096)):
        assert made.cells(start, end).tobytes() == made.through(
            False, start, end - start
        )
    # The buffer keeps the last 2 MiB that went through it: plaintext.
    last = INITRD_DATA[4 * MIB :]
    assert made.machine.snoop(BUFFER, len(last)) == last


def test_the_pool_counts_what_it_gave_out() -> None:
    made = board()
    done = encrypt(made)
    assert done.tables_used == 5  # PGD, and PUD and PMD for each of both mappings
    assert made.through(False, POOL + 5 * 4096, 4096) == bytes(4096)
    made = board(FIVE_LEVELS, la57=True)
    assert encrypt(made, INITRD, INITRD_DATA).tables_used == 7 + 4  # 2 PTE tables each


@pytest.mark.req("BZ-14")
@pytest.mark.parametrize(
    ("start", "size"),
    [(WORKAREA - 4096, 4097), (WORKAREA + MIB, 10), (AREA_END - 1, 4096)],
)
def test_an_initrd_in_the_work_area_is_refused_and_untouched(
    start: int, size: int
) -> None:
    made = board()
    data = random_bytes(size)
    made.events.clear()
    with pytest.raises(KernelError, match="overlaps the work area"):
        encrypt(made, start, data)
    assert made.through(False, start, size) == data
    assert made.facts("cr", "flush", "wrmsr") == []


# Steps that may not move


@pytest.mark.req("LB-50")
def test_order_the_work_area_is_mapped_before_it_is_used() -> None:
    made = board()
    set_directory(made, WORKAREA, [0, 0])
    encrypt(made)  # without the step: #PF at the first page of the pool
    assert made.through(True, TEXT, KERNEL_END - TEXT) == made.plain(TEXT, KERNEL_END)


@pytest.mark.req("LB-62")
def test_order_no_global_entry_of_the_old_tables_survives() -> None:
    made = board()
    made.cpu.write_cr4(made.cpu.read_cr4() | PGE)
    for va in range(TEXT, KERNEL_END, 4096):
        made.cpu.store(va, made.cpu.load(va, 1))  # the loader's map: global, C = 0
    made.events.clear()
    encrypt(made)
    cells = made.cells(TEXT, KERNEL_END)
    assert equal_blocks(cells, made.plain(TEXT, KERNEL_END)) == []
    _, load, clear, toggle, *_ = made.facts("cr")
    assert load == ("cr", "cr3", POOL)
    assert (int(clear[2]) & PGE, int(toggle[2]) & PGE) == (0, PGE)


@pytest.mark.req("LB-64", "PT-51", "PT-53", "BZ-13")
@pytest.mark.parametrize("seed", range(5))
def test_order_the_loaders_dirty_lines_leave_before_the_copy(seed: int) -> None:
    made = board(INCOHERENT, seed=seed)
    data = INITRD_DATA[: 256 * 1024]
    encrypt(made, INITRD, data)
    made.machine.caches.evict()
    cells = made.cells(TEXT, KERNEL_END)
    assert equal_blocks(cells, made.plain(TEXT, KERNEL_END)) == []
    assert equal_blocks(made.cells(INITRD, INITRD + len(data)), data) == []
    assert made.machine.caches.hazards_met == []


@pytest.mark.req("LB-67", "PT-53")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_order_never_straight_from_one_mapping_to_the_other(model: str) -> None:
    made = board(model)
    made.cpu.fill(BUFFER, 0xEE, 0x2000)
    encrypt(made)
    first = made.plain(TEXT, TEXT + 0x2000)
    assert made.cpu.load(TEXT, 0x2000) == first
    assert made.machine.caches.hazards_met == []
    assert made.cpu.load(BUFFER, 0x2000) != b"\xee" * 0x2000

    # Why: straight, a block is read through one tag when half of it is stored through
    # the other. Coherent tags make garbage of it, others leave it to chance.
    made, _, base = before_the_copy(model)
    made.machine.caches.write_back_invalidate()
    made.cpu.copy(TEXT, TEXT + base, 0x2000)
    broken = made.cpu.load(TEXT, 0x2000) != first
    assert broken == (model == COHERENT)
    assert bool(made.machine.caches.hazards_met) == (model == INCOHERENT)


@pytest.mark.req("LB-58")
def test_order_the_aliases_go_when_the_copies_are_done() -> None:
    made = board()
    done = encrypt(made, INITRD, INITRD_DATA)  # cleared before: #PF in the copy
    assert made.cpu.load(INITRD, len(INITRD_DATA)) == INITRD_DATA
    for pa in (TEXT, INITRD, WORKAREA):
        with pytest.raises(PageFault):
            made.cpu.load(pa + done.decrypted_base, 1)
