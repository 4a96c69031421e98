"""BZ-12: two mappings of one page differ in the C-bit.

On parts whose caches do not keep the two apart by themselves (up to Rome, and client
parts after it) both mappings have lines of their own: each sees its own stores, and
DRAM gets the last one written back. On coherent parts the bytes do travel from one to
the other, but what C = 1 stored is ciphertext for C = 0.

Seen in sev-step issue 5 (a lock shared by kernel and user space, once with C, once
without); microsoft/openvmm PR 3861 (lines of the old mapping when a page is accepted).
AMDESE/mem-encryption-tests relies on such aliases to tell whether TSME is on.
"""

from collections.abc import Callable

import pytest

from cbit.hw import Machine
from cbit.hw.memory import HazardError
from cbit.hw.types import VirtAddr

from .own_table import FINE, FLAGS, FRAME, OwnTable

pytestmark = pytest.mark.req("BZ-12")

FREE, TAKEN = 0, 1
PARTS = [("rome", 47), ("milan", 51)]

Alias = Callable[[OwnTable], VirtAddr]


def kmap_plain(table: OwnTable) -> VirtAddr:
    """Faulty: the kernel maps the frame anew, with flags of its own choice."""
    return table.map(1, FRAME | FLAGS)


def kmap_same(table: OwnTable) -> VirtAddr:
    """Right: the frame's C-bit is part of what is copied."""
    return table.map(1, table.entry(0))


def check(kernel_alias: Alias, model: str, c_bit: int) -> list[str]:
    """Pass a lock to and fro between two mappings."""
    table = OwnTable(model)
    cpu = table.cpu
    user = table.map(0, FRAME | 1 << c_bit | FLAGS)
    cpu.store64(user, FREE)
    kernel = kernel_alias(table)

    seen = []
    cpu.store64(user, TAKEN)
    if cpu.load64(kernel) != TAKEN:
        seen.append("the kernel sees another lock")
    cpu.store64(kernel, FREE)
    if cpu.load64(user) != FREE:
        seen.append("the user never gets it")
    hazards = sorted({hazard.kind for hazard in table.machine.caches.hazards_met})
    return [*seen, *hazards] or [FINE]


@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_mappings_with_one_c_bit_share_a_lock(model: str, c_bit: int) -> None:
    assert check(kmap_same, model, c_bit) == [FINE]


def test_without_coherence_both_lines_live_and_the_alias_is_reported() -> None:
    assert not Machine("rome").caches.coherent
    assert check(kmap_plain, "rome", 47) == [
        "the kernel sees another lock",
        "the user never gets it",
        "dirty-alias",
        "stale-line",
    ]


def test_with_coherence_there_is_one_line_and_it_reads_as_ciphertext() -> None:
    assert Machine("milan").caches.coherent
    assert check(kmap_plain, "milan", 51) == [
        "the kernel sees another lock",
        "the user never gets it",
    ]


def test_a_strict_machine_stops_at_the_access() -> None:
    table = OwnTable("rome", hazards="raise")
    table.cpu.store64(table.map(0, FRAME | 1 << 47 | FLAGS), TAKEN)
    with pytest.raises(HazardError, match=r"load through C=0 .* meets dirty lines"):
        table.cpu.load64(kmap_plain(table))
