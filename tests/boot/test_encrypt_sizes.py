"""boot/encrypt.py: how much room the in-place encryption takes, in Linux's numbers."""

from __future__ import annotations

from random import Random

import pytest

from cbit.boot.encrypt import decrypted_base, plan_workarea, sme_pgtable_calc
from cbit.boot.image import KernelLayout, Range
from cbit.hw.errors import KernelError
from cbit.hw.types import PhysAddr, VirtAddr

from .conftest import GIB, MIB

TIB = 1 << 40
TEXT = 0x100_0000


def a_layout(size: int, start: int = TEXT) -> KernelLayout:
    """The layout of a kernel of `size` bytes, its work area right behind."""
    end = PhysAddr(start + size)
    area = PhysAddr(-(-end // (2 * MIB)) * 2 * MIB)
    return KernelLayout(
        text_start=PhysAddr(start),
        end=end,
        bss=Range(end, end),
        bss_decrypted=Range(end, end),
        workarea=Range(area, PhysAddr(area + 4 * MIB)),
        virtual_base=VirtAddr(0xFFFF_FFFF_8000_0000 + start),
        found_by="symbols",
    )


def pages_for(length: int, five_levels: bool) -> int:
    """Count table pages for a length as the sheet says, in pages and by hand."""
    spans = [39, 30] + [48] * five_levels
    entries = 2 + sum(-(-length >> shift) + 1 for shift in spans)
    return entries + sum(-(-entries * 4096 >> shift) for shift in spans)


@pytest.mark.req("LB-35", "LB-36")
@pytest.mark.parametrize(
    ("length", "four", "five"),
    [
        (1, 8, 11),
        (2 * MIB, 8, 11),
        (GIB, 8, 11),
        (GIB + 1, 9, 12),
        (512 * GIB, 519, 522),
        (512 * GIB + 1, 521, 524),
    ],
)
def test_vector_pages_for_a_length(length: int, four: int, five: int) -> None:
    # The sheet: 8 and 11 up to 1 GiB; the others counted on paper from LB-35, LB-36.
    assert sme_pgtable_calc(length, five_levels=False) == four * 4096
    assert sme_pgtable_calc(length, five_levels=True) == five * 4096


@pytest.mark.req("LB-35", "LB-36")
@pytest.mark.parametrize("seed", range(20))
def test_law_pages_for_a_length_follow_the_formula(seed: int) -> None:
    rng = Random(seed)
    for _ in range(50):
        length = rng.randrange(1, 1 << rng.randrange(1, 52))
        for five_levels in (False, True):
            expected = pages_for(length, five_levels) * 4096
            assert sme_pgtable_calc(length, five_levels) == expected


@pytest.mark.req("LB-37")
@pytest.mark.parametrize(
    ("initrd", "five_levels", "pages"),
    [(0, False, 25), (5 * MIB, False, 41), (0, True, 34), (5 * MIB, True, 56)],
)
def test_vector_pages_of_the_pool(initrd: int, five_levels: bool, pages: int) -> None:
    # The sheet's numbers for a small kernel.
    area = plan_workarea(a_layout(5 * MIB), initrd, five_levels)
    assert area.pgtable_pages == pages


@pytest.mark.req("LB-37")
def test_the_pool_counts_the_execute_area_behind_the_kernel() -> None:
    # 1022 MiB of kernel and 0x20_2000 of execute area are more than 1 GiB: 9 pages
    # each instead of 8. PGD, both mappings, the work area itself.
    area = plan_workarea(a_layout(1022 * MIB), 0, five_levels=False)
    assert area.pgtable_pages == 1 + 2 * 9 + 8
    area = plan_workarea(a_layout(1020 * MIB), 0, five_levels=False)
    assert area.pgtable_pages == 1 + 2 * 8 + 8


@pytest.mark.req("LB-37")
@pytest.mark.parametrize("seed", range(20))
def test_law_the_pool_follows_the_formula(seed: int) -> None:
    rng = Random(seed)
    layout = a_layout(rng.randrange(1, 1020 * MIB))
    initrd = rng.choice([0, 4096, rng.randrange(1, 100 * GIB)])
    five_levels = rng.random() < 0.5
    kernel = layout.workarea.start + 0x20_2000 - layout.text_start
    pages = 1 + 2 * pages_for(kernel, five_levels)
    if initrd:
        pages += 2 * pages_for(initrd, five_levels)
    pages += pages_for(0x20_2000 + pages * 4096, five_levels)
    area = plan_workarea(layout, initrd, five_levels)
    assert area.pgtable_pages == pages


@pytest.mark.req("LB-33", "LB-34", "LB-38")
@pytest.mark.parametrize("initrd", [0, 30 * MIB])
def test_the_work_area_is_laid_out_as_linux_does(initrd: int) -> None:
    layout = a_layout(5 * MIB)
    area = plan_workarea(layout, initrd, five_levels=True)
    assert area.start == layout.workarea.start == 0x160_0000
    assert area.buffer == area.start + 0x2000
    assert area.execute_end - area.start == 0x20_2000
    assert layout.workarea.end - area.execute_end == 510 * 4096 == 0x1F_E000
    assert area.end == area.start + 4 * MIB


@pytest.mark.req("LB-34", "LB-38")
def test_a_pool_that_exceeds_the_linked_area_is_refused() -> None:
    # 300 GiB of initrd need 2 * 304 pages and more; 510 were linked.
    with pytest.raises(KernelError, match="exceeds the linked one"):
        plan_workarea(a_layout(5 * MIB), 300 * GIB, five_levels=False)


@pytest.mark.req("LB-39")
@pytest.mark.parametrize(
    ("area_end", "initrd_end", "five_levels", "base"),
    [
        (0x1A0_0000, None, False, 0x80_0000_0000),
        (0x1A0_0000, 0x8000_0000, False, 0x80_0000_0000),
        (512 * GIB - 2 * MIB, None, False, 0x80_0000_0000),
        (512 * GIB, None, False, 0x100_0000_0000),
        (0x1A0_0000, 512 * GIB - 4096, False, 0x80_0000_0000),
        (0x1A0_0000, 512 * GIB, False, 0x100_0000_0000),
        (0x1A0_0000, 3 * TIB + 4096, False, 0x380_0000_0000),
        (2 * TIB, 4 * MIB, False, 0x280_0000_0000),
        (0x1A0_0000, None, True, 1 << 48),
        (0x1A0_0000, 3 * TIB, True, 1 << 48),
        (0x1A0_0000, 1 << 48, True, 2 << 48),
    ],
)
def test_vector_the_second_mapping_takes_the_next_pgd_slot(
    area_end: int, initrd_end: int | None, five_levels: bool, base: int
) -> None:
    others = [(PhysAddr(0x20_0000), PhysAddr(initrd_end))] if initrd_end else []
    assert decrypted_base(area_end, others, five_levels) == base
