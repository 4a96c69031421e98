"""What a load costs: a TLB hit against plain Python, a page walk against a hit."""

from typing import Any

from .conftest import Ratios
from .pages import PLAIN_BASE, machine_with_pages

PAGES = 8192
SIZE = PAGES * 4096


def test_load64_on_a_hit_and_on_a_miss(benchmark: Any, ratios: Ratios) -> None:
    machine = machine_with_pages(SIZE)
    cpu = machine.cpu
    cpu.fill(PLAIN_BASE, 7, SIZE)
    addresses = [PLAIN_BASE + 4096 * i for i in range(PAGES)]
    offsets = [4096 * i for i in range(PAGES)]
    flat = memoryview(bytearray(SIZE))
    root = cpu.read_cr3()

    def python() -> None:
        for a in offsets:
            int.from_bytes(flat[a : a + 8], "little")

    def hits() -> None:
        load64 = cpu.load64
        for address in addresses:
            load64(address)

    def misses() -> None:
        cpu.write_cr3(root)  # drops the whole TLB
        load64 = cpu.load64
        for address in addresses:
            load64(address)

    hits()
    benchmark.pedantic(hits, rounds=5)
    base, hit = ratios.times(python, hits)
    miss = ratios.times(misses)[0]
    hit_again = ratios.times(hits)[0]
    what = "load64, TLB hit: time / int.from_bytes of a memoryview"
    assert ratios.note(what, hit / base, "<= 8") <= 8
    what = "load64, miss with a 4-level walk: time / hit, same addresses"
    assert ratios.note(what, miss / max(hit, hit_again), "<= 12") <= 12
