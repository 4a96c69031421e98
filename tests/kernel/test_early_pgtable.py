"""kernel/early_pgtable.py: the early direct map, made by faults, dropped when full."""

from __future__ import annotations

import pytest

from cbit.boot.startup import Booted
from cbit.hw.faults import GeneralProtection, PageFault, PageFaultCode
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState
from cbit.kernel.early_pgtable import EARLY_DYNAMIC_PAGE_TABLES, EarlyPageTables

from ..boot.conftest import COHERENT, FIVE_LEVELS, GIB, INCOHERENT, MIB, Board, board

DIRECT_4, DIRECT_5 = 0xFFFF_8880_0000_0000, 0xFF11_0000_0000_0000
MODELS = [COHERENT, INCOHERENT, FIVE_LEVELS]


def booted(
    model: str = COHERENT, line: bytes = b"mem_encrypt=on", ram: int = 64 * MIB
) -> tuple[Board, Booted]:
    made = board(model, la57=model == FIVE_LEVELS, cmdline=line, ram=ram)
    return made, made.start()


def fault_at(address: int, code: int = 0) -> PageFault:
    return PageFault(address, PageFaultCode(code), "made by a test")


def top_entries(made: Board) -> dict[int, int]:
    """Return the entries of early_top_pgt that are not 0, as the core reads them."""
    cr3 = made.cpu.read_cr3()
    table = made.table(cr3 & ~made.c_mask, c_bit=bool(cr3 & made.c_mask))
    return {i: entry for i, entry in enumerate(table) if entry}


@pytest.mark.req("LB-70")
@pytest.mark.parametrize("model", MODELS)
def test_reset_keeps_the_last_entry_and_loads_cr3_with_the_mask(model: str) -> None:
    made, end = booted(model)
    end.tables.make(end.tables.direct_map(0), 0x0E3 | made.c_mask)
    assert len(top_entries(made)) == 2
    kernel = top_entries(made)[511]
    made.events.clear()
    end.tables.reset()
    assert top_entries(made) == {511: kernel}
    top = end.data.early_top_pgt
    assert made.facts("cr") == [("cr", "cr3", top | made.c_mask)]


@pytest.mark.req("LB-70")
def test_reset_of_an_inactive_kernel_has_no_mask() -> None:
    made, end = booted(line=b"")
    made.events.clear()
    end.tables.reset()
    assert made.facts("cr") == [("cr", "cr3", end.data.early_top_pgt)]


@pytest.mark.req("LB-72", "PT-36", "PT-44")
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b""], ids=["active", "inactive"])
@pytest.mark.parametrize("model", MODELS)
def test_a_fault_makes_a_2_mib_entry_encrypted_by_default(
    model: str, line: bytes
) -> None:
    made, end = booted(model, line)
    c = made.c_mask if line else 0
    pa, before = 0x321_4567, end.tables.faults
    va = end.tables.direct_map(pa)
    assert va == (DIRECT_5 if model == FIVE_LEVELS else DIRECT_4) + pa
    made.cpu.load(va, 1)
    leaf = made.walk(made.cpu.read_cr3(), va)
    assert leaf.entry == 0x320_0000 | 0x0E3 | c
    assert (leaf.pa, leaf.shift) == (pa, 21)
    assert leaf.c_bits == (bool(c),) * made.levels
    # Tables on the way: 0x063 and C, taken from the static pages, in the kernel.
    pages = end.data.early_dynamic_pgts
    entry = top_entries(made)[va >> (48 if made.levels == 5 else 39) & 511]
    assert entry & ~c & ~0xFFF in range(pages, end.data.end)
    assert entry & 0xFFF == 0x063
    assert end.tables.faults == before + 1
    made.cpu.load(va + MIB // 2, 1)
    assert end.tables.faults == before + 1


@pytest.mark.req("LB-72")
def test_a_fault_takes_the_flags_of_the_moment() -> None:
    made, end = booted()
    end.tables.pmd_flags = 0x0E3
    made.cpu.load(end.tables.direct_map(0x300_0000), 1)
    leaf = made.walk(made.cpu.read_cr3(), end.tables.direct_map(0x300_0000))
    assert leaf.entry == 0x300_0000 | 0x0E3
    assert leaf.c_bits == (True, True, True, False)


@pytest.mark.req("LB-72")
@pytest.mark.parametrize(
    ("model", "va"),
    [
        (COHERENT, DIRECT_4 - 1),
        (COHERENT, DIRECT_4 + (1 << 46)),
        (COHERENT, 0x100_0000),
        (COHERENT, 0xFFFF_FFFF_0000_0000),
        (FIVE_LEVELS, DIRECT_5 - 1),
        (FIVE_LEVELS, DIRECT_5 + (1 << 52)),
        (FIVE_LEVELS, DIRECT_4),
    ],
)
def test_other_addresses_stay_unmapped(model: str, va: int) -> None:
    made, end = booted(model)
    with pytest.raises(PageFault):
        made.cpu.load(va, 1)
    assert end.tables.faults == 0


@pytest.mark.req("LB-72")
def test_a_fault_that_is_not_about_presence_is_not_taken() -> None:
    made, end = booted()
    va = end.tables.direct_map(0x300_0000)
    for code in (PageFaultCode.PRESENT, PageFaultCode.PRESENT | PageFaultCode.RESERVED):
        assert not end.tables.handle_fault(made.cpu, fault_at(va, code))
    assert not end.tables.handle_fault(made.cpu, GeneralProtection("not a #PF"))
    assert end.tables.handle_fault(made.cpu, fault_at(va))
    assert end.tables.faults == 1


@pytest.mark.req("LB-73")
def test_an_entry_of_0_unmaps() -> None:
    made, end = booted()
    va = end.tables.direct_map(0x300_0000)
    made.cpu.load(va, 1)
    end.tables.make(va, 0)
    assert not made.maps(made.cpu.read_cr3(), va)


@pytest.mark.req("LB-70", "LB-72")
@pytest.mark.parametrize("model", [COHERENT, FIVE_LEVELS])
def test_when_the_static_pages_are_used_up_everything_is_made_anew(model: str) -> None:
    made, end = booted(model)
    tables = end.tables
    # Each GiB takes a table of its own; the levels above are shared.
    room = EARLY_DYNAMIC_PAGE_TABLES - (made.levels - 3)
    made.cpu.store(tables.direct_map(0x300_0000), b"kept")
    for gib in range(1, room):
        tables.make(tables.direct_map(gib * GIB), gib * GIB | 0x0E3)
    assert made.maps(made.cpu.read_cr3(), tables.direct_map(0x300_0000))
    made.events.clear()

    tables.make(tables.direct_map(room * GIB), room * GIB | 0x0E3)
    assert made.facts("cr") == [("cr", "cr3", made.cpu.read_cr3())]
    assert made.maps(made.cpu.read_cr3(), tables.direct_map(room * GIB))
    for gib in range(room):
        assert not made.maps(made.cpu.read_cr3(), tables.direct_map(gib * GIB))
    assert made.cpu.load(tables.direct_map(0x300_0000), 4) == b"kept"  # by a fault
    text = PhysAddr(0x100_0000)
    assert made.cpu.load(made.layout.virt(text), 4) == made.plain(text, text + 4)


def test_tables_may_lie_where_no_c_bit_counts() -> None:
    made = board()
    top, dynamic = PhysAddr(0x300_0000), PhysAddr(0x310_0000)
    tables = EarlyPageTables(
        made.cpu,
        EncryptionState(),
        top=top,
        dynamic=dynamic,
        kernel_va=VirtAddr,  # the boot loader's identity map
        five_levels=False,
        pmd_flags=0x0E3,
    )
    tables.make(tables.direct_map(0x40_0000), 0x40_0000 | 0x0E3)
    leaf = made.walk(top, tables.direct_map(0x40_0000))
    assert leaf.entry == 0x40_0000 | 0x0E3
    assert made.table(top, c_bit=False)[273] == dynamic | 0x063
