"""BZ-13: the C-bit of a page in use changes without the flushes that belong to it.

The TLB goes on translating the old way until INVLPG. Lines that are dirty under the
old C-bit go on to DRAM whenever the cache likes, over what was stored meanwhile;
CLFLUSH finds them only through the old mapping. Coherent parts need no cache flush;
the TLB flush is needed on all.

Seen in microsoft/openvmm PR 3861 (and 3806: "stale cache lines can lead to data
corruption"). The tsme-test of AMDESE/mem-encryption-tests has the right order: TLB and
caches before the change, the TLB again after it.
"""

from collections.abc import Callable

import numpy as np
import pytest

from cbit.hw.types import CACHE_LINE_SIZE, PAGE_SIZE

from .own_table import FINE, FLAGS, FRAME, OwnTable

pytestmark = pytest.mark.req("BZ-13")

PARTS = [("rome", 47), ("milan", 51)]

Share = Callable[[OwnTable, int], None]
"""Take the C-bit out of entry 0."""


def clflush_page(table: OwnTable) -> None:
    for offset in range(0, PAGE_SIZE, CACHE_LINE_SIZE):
        table.cpu.clflush(table.va(0) + offset)


def wbinvd_then_change(table: OwnTable, c_mask: int) -> None:
    """Right."""
    table.cpu.wbinvd()
    table.set_entry(0, table.entry(0) & ~c_mask)
    table.cpu.invlpg(table.va(0))


def clflush_then_change(table: OwnTable, c_mask: int) -> None:
    """Right, and cheaper: line by line, through the mapping that is about to go."""
    clflush_page(table)
    table.set_entry(0, table.entry(0) & ~c_mask)
    table.cpu.invlpg(table.va(0))


def no_cache_flush(table: OwnTable, c_mask: int) -> None:
    """Faulty: the dirty lines stay behind."""
    table.set_entry(0, table.entry(0) & ~c_mask)
    table.cpu.invlpg(table.va(0))


def clflush_afterwards(table: OwnTable, c_mask: int) -> None:
    """Faulty: this flushes the lines of the new mapping."""
    table.set_entry(0, table.entry(0) & ~c_mask)
    table.cpu.invlpg(table.va(0))
    clflush_page(table)


def no_invlpg(table: OwnTable, c_mask: int) -> None:
    """Faulty: the old translation is still in the TLB."""
    table.cpu.wbinvd()
    table.set_entry(0, table.entry(0) & ~c_mask)


def page_in_use(model: str, c_bit: int) -> OwnTable:
    """Return a machine with a private page whose lines are dirty."""
    table = OwnTable(model)
    table.cpu.store(table.map(0, FRAME | 1 << c_bit | FLAGS), b"yesterday's data")
    return table


def check(share: Share, model: str, c_bit: int) -> str:
    """Share a page and store a request for a device."""
    table, request = page_in_use(model, c_bit), b"today's request."
    share(table, 1 << c_bit)
    table.cpu.store(table.va(0), request)
    if hazards := table.machine.caches.hazards_met:
        return hazards[0].describe()
    table.machine.caches.drain()
    seen = table.machine.snoop(FRAME, len(request))
    return FINE if seen == request else "the device reads ciphertext"


@pytest.mark.parametrize("share", [wbinvd_then_change, clflush_then_change])
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_flushes_on_both_sides_of_the_change(
    share: Share, model: str, c_bit: int
) -> None:
    assert check(share, model, c_bit) == FINE


@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_without_invlpg_the_old_translation_goes_on(model: str, c_bit: int) -> None:
    assert check(no_invlpg, model, c_bit) == "the device reads ciphertext"


@pytest.mark.parametrize("share", [no_cache_flush, clflush_afterwards])
def test_without_the_cache_flush_two_dirty_lines_race(share: Share) -> None:
    assert check(share, "rome", 47) == (
        "store through C=0 at [0x200000, 0x200040) meets dirty lines of C=1: "
        "flush before the C-bit changes"
    )


@pytest.mark.parametrize("share", [no_cache_flush, clflush_afterwards])
def test_a_coherent_part_forgives_that(share: Share) -> None:
    assert check(share, "milan", 51) == FINE


def check_input(share: Share) -> str:
    """Share a page of a part without coherence; a device stores, time passes."""
    table, stored = page_in_use("rome", 47), b"from the device."
    share(table, 1 << 47)
    cells = table.machine.dram.cells[FRAME : FRAME + len(stored)]
    cells[:] = np.frombuffer(stored, np.uint8)
    table.machine.caches.drain()
    if cells.tobytes() != stored:
        return "a late write-back destroyed what the device stored"
    same = table.cpu.load(table.va(0), len(stored)) == stored
    return FINE if same else "the driver reads garbage"


@pytest.mark.parametrize(
    ("share", "seen"),
    [
        (wbinvd_then_change, FINE),
        (clflush_then_change, FINE),
        (no_cache_flush, "a late write-back destroyed what the device stored"),
        (clflush_afterwards, "a late write-back destroyed what the device stored"),
        (no_invlpg, "the driver reads garbage"),
    ],
)
def test_what_a_device_stores_survives_only_the_right_order(
    share: Share, seen: str
) -> None:
    assert check_input(share) == seen
