"""Accesses to many pages at once: each page as if it were alone.

The core looks at a run of page-table entries together; what comes of it must be what
single walks and the TLB would have done.
"""

from __future__ import annotations

import pytest

from cbit.hw.faults import PageFault

from .test_paging_witness import LARGE_RW, PAGE, PAGE_RW, RW, US, A, D, P
from .test_tlb import NEW, OLD, VA, Bench

C = 1 << 47
PAIR = bytes(2 * PAGE)


def first_page_kept() -> Bench:
    """Return a bench with two neighbours mapped, the first of them in the TLB."""
    bench = Bench()
    for page in (0, PAGE):
        bench.tables.map(VA + page, OLD + page | PAGE_RW)
    bench.cpu.store(VA, b"old")
    return bench


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
def test_a_bulk_access_writes_no_bit_into_an_entry_it_did_not_walk(store: bool) -> None:
    bench = first_page_kept()
    bench.tables.write(VA, 12, 0)
    if store:
        bench.cpu.store(VA, PAIR)
    else:
        bench.cpu.load(VA, 2 * PAGE)
    assert bench.tables.read(VA) == 0


def test_a_bulk_access_takes_no_data_page_for_a_table() -> None:
    bench = first_page_kept()
    bench.machine.bus.store(NEW, bytes(PAGE), 0)
    bench.tables.write(VA, 21, NEW | LARGE_RW)
    assert bench.cpu.load(VA, PAGE + 3) == bench.machine.bus.load(OLD, PAGE, 0) + b"new"
    assert bench.machine.bus.load(NEW, PAGE, 0) == bytes(PAGE)


@pytest.mark.parametrize("shift", [39, 30, 21])
@pytest.mark.parametrize("bit", [P, RW, US], ids=["absent", "read-only", "kernel's"])
def test_a_bulk_access_walks_for_every_page_that_is_not_kept(
    shift: int, bit: int
) -> None:
    bench = first_page_kept()
    bench.tables.write(VA, shift, bench.tables.read(VA, shift) & ~bit)
    bench.cpu.cpl = 3
    with pytest.raises(PageFault) as caught:
        bench.cpu.store(VA, PAIR)
    assert caught.value.address == VA + PAGE
    assert bench.machine.bus.load(OLD, PAGE, 0) == bytes(PAGE), "the first page is done"


@pytest.mark.parametrize("length", [2 * PAGE, 3 * PAGE])
def test_a_bulk_access_uses_what_the_tlb_keeps_of_later_pages(length: int) -> None:
    bench = Bench()
    for page in range(3):
        bench.tables.map(VA + page * PAGE, OLD + page * PAGE | PAGE_RW)
    bench.read(VA + PAGE)
    bench.tables.write(VA + PAGE, 12, NEW | PAGE_RW)
    seen = bench.cpu.load(VA, length)
    assert [seen[at : at + 3] for at in range(0, length, PAGE)] == (
        [b"old"] * (length // PAGE)
    )
    bench.cpu.invlpg(VA + PAGE)
    assert bench.cpu.load(VA, length)[PAGE : PAGE + 3] == b"new"


@pytest.mark.parametrize("store", [False, True], ids=["load", "store"])
def test_a_bulk_access_marks_the_pages_it_touches_and_no_other(store: bool) -> None:
    bench = Bench()
    pages = [VA + n * PAGE for n in range(6)]
    for number, va in enumerate(pages):
        bench.tables.map(va, OLD + number * PAGE | PAGE_RW)
    if store:
        bench.cpu.store(pages[1] + 0xFFF, bytes(2 * PAGE + 2))
    else:
        bench.cpu.load(pages[1] + 0xFFF, 2 * PAGE + 2)
    marks = A | D if store else A
    expected = [0, marks, marks, marks, marks, 0]
    assert [bench.tables.read(va) & (A | D) for va in pages] == expected


def test_a_bulk_access_goes_on_in_the_next_table() -> None:
    bench = Bench()
    last = VA + (1 << 21) - PAGE
    for number in range(4):
        at = last + (number - 1) * PAGE
        bench.tables.map(at, OLD + number * PAGE | PAGE_RW)
    bench.cpu.store(last - PAGE, bytes(range(256)) * 64)
    assert bench.machine.bus.load(OLD, 4 * PAGE, 0) == bytes(range(256)) * 64
    assert bench.tables.read(last + 2 * PAGE) & (A | D) == A | D


@pytest.mark.parametrize("how", ["frames apart", "other C-bit", "absent", "read-only"])
def test_a_run_ends_where_the_next_entry_differs(how: str) -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | PAGE_RW)
    bench.tables.map(VA + PAGE, OLD + PAGE | PAGE_RW)
    third = {
        "frames apart": NEW | PAGE_RW,
        "other C-bit": OLD + 2 * PAGE | C | PAGE_RW,
        "absent": 0,
        "read-only": OLD + 2 * PAGE | P | US,
    }[how]
    bench.tables.map(VA + 2 * PAGE, third)
    data = bytes(range(256)) * 48
    if third & RW:
        bench.cpu.store(VA, data)
        assert bench.cpu.load(VA, len(data)) == data
        behind = bench.machine.bus.load(OLD + 2 * PAGE, PAGE, 0)
        assert behind != data[2 * PAGE :]
    else:
        with pytest.raises(PageFault) as caught:
            bench.cpu.store(VA, data)
        assert caught.value.address == VA + 2 * PAGE
        assert bench.tables.read(VA + 2 * PAGE) == third
    assert bench.machine.bus.load(OLD, 2 * PAGE, 0) == data[: 2 * PAGE]


@pytest.mark.req("PT-22")
def test_a_page_kept_under_the_other_c_bit_is_read_through_it() -> None:
    bench = Bench()
    bench.tables.map(VA, OLD | PAGE_RW)
    bench.tables.map(VA + PAGE, OLD + PAGE | C | PAGE_RW)
    garbled = bench.cpu.load(VA + PAGE, PAGE)
    bench.tables.write(VA + PAGE, 12, OLD + PAGE | A | PAGE_RW)
    assert bench.cpu.load(VA, 2 * PAGE)[PAGE:] == garbled
    bench.cpu.invlpg(VA + PAGE)
    assert bench.cpu.load(VA, 2 * PAGE)[PAGE : PAGE + 3] == b"old"
