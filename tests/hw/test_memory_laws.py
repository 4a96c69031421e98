"""hw/memory as a whole against a slow, obvious model.

Random loads, stores, flushes, evictions and power losses through three tags, on a
small board with a ROM in the middle of RAM. After every step the bytes that were
loaded, every cell of DRAM, the hazards, and every live page view must agree.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from cbit.hw.cipher import MemoryCipher, Tweaks
from cbit.hw.memory import (
    CacheHierarchy,
    Dram,
    Hazard,
    HazardError,
    HazardPolicy,
    MemoryBus,
    MemoryController,
    MemoryMap,
    Region,
    RegionKind,
    cache,
    line_store,
)
from cbit.hw.trace import Trace
from cbit.hw.types import CACHE_LINE_SIZE, PAGE_SIZE, PhysAddr

from .memory_model import Model, SlowEngine

ROM_START, ROM_END, RAM_END = 0x6000, 0x7000, 0xC000
ROM_BYTES = random.Random("rom").randbytes(ROM_END - ROM_START)
STREAM_PAGES = 2
SLOTS = (0, 1, 2)  # no key, the host's, that of ASID 1
PAGES = [page for page in range(RAM_END // PAGE_SIZE) if page != ROM_START // PAGE_SIZE]


@dataclass
class Campaign:
    """One seeded run of random operations on both.

    Attributes:
        log: what was done, for the report of a failure.
        expected: hazards that the model foresaw for the access under way.
        seen: how often things of interest were met.
        held: live page views by (slot, page, write); the caches drop them.
    """

    seed: int
    coherent: bool
    policy: HazardPolicy = HazardPolicy.RECORD
    log: list[str] = field(default_factory=list)
    expected: list[Hazard] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    held: dict[tuple[int, int, bool], memoryview] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        constants = [rng.randbytes(16) for _ in range(48)]
        keys = {slot: rng.randbytes(16) for slot in SLOTS[1:]}
        self.dram = Dram(RAM_END)
        controller = MemoryController()
        for slot, key in keys.items():
            controller.load_key(slot, MemoryCipher(key, Tweaks(constants), True))
        trace = Trace()
        self.caches = CacheHierarchy(
            self.dram,
            controller,
            coherent=self.coherent,
            random_source=random.Random(self.seed),
            hazards=self.policy,
            trace=trace,
        )
        self.caches.hold_views(self.held.clear)
        edges = [(0, ROM_START), (ROM_START, ROM_END), (ROM_END, RAM_END)]
        kinds = [RegionKind.RAM, RegionKind.ROM, RegionKind.RAM]
        regions = [
            Region(PhysAddr(start), PhysAddr(end), kind, ROM_BYTES)
            for (start, end), kind in zip(edges, kinds, strict=True)
        ]
        self.bus = MemoryBus(MemoryMap(regions), self.caches, controller, trace)
        engines = {slot: SlowEngine(key, constants) for slot, key in keys.items()}
        self.model = Model(engines, RAM_END, coherent=self.coherent)
        cells = rng.randbytes(RAM_END)
        for page in PAGES:  # memory is never blank when power comes
            place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            self.dram.cells.data[place] = cells[place]
            self.model.dram[place] = cells[place]
        # Few places, so that tags meet.
        self.hot = rng.sample(PAGES, 3)

    def run(self, steps: int) -> None:
        operations = [
            (self.load, 30),
            (self.store, 30),
            (self.fill, 6),
            (self.change_some, 8),
            (self.stream, 12),
            (self.take_view, 12),
            (self.store_through_view, 12),
            (self.clflush, 12),
            (self.clflush_a_page, 2),
            (self.vm_page_flush, 2),
            (self.drain, 3),
            (self.wbinvd, 2),
            (self.evict, 4),
            (self.power_loss, 1),
            (self.change_a_cell, 6),
        ]
        calls, weights = zip(*operations, strict=True)
        try:
            for call in self.rng.choices(calls, weights, k=steps):
                call()
                self.compare()
        except AssertionError as error:
            error.add_note(f"{self.seed=} {self.coherent=}\n" + "\n".join(self.log))
            raise

    def compare(self) -> None:
        assert self.dram.cells.tobytes() == self.model.dram
        for page in PAGES:
            mark = int(self.dram.written_by[page])
            assert mark - 1 in self.model.writers.get(page, {-1})
        for (slot, page, write), view in self.held.items():
            assert self.model.is_quiet(slot, page, write=write)
            assert view == self.model.peek(slot, page)

    # Accesses

    def load(self) -> None:
        self.load_at(*self.place())

    def store(self) -> None:
        self.store_at(*self.place())

    def load_at(self, slot: int, pa: int, length: int) -> None:
        self.log.append(f"load {slot=} [{pa:#x}, {pa + length:#x})")
        expected = b""
        for start, end, kind in self.parts(pa, length):
            if kind is RegionKind.ROM:
                expected += ROM_BYTES[start - ROM_START : end - ROM_START]
                continue
            if self.is_refused(slot, start, end - start, write=False, merges=True):
                self.expect_refusal(lambda: self.bus.load(pa, length, slot))
                return
            expected += self.model.load(slot, start, end - start)
        assert self.bus.load(pa, length, slot) == expected
        self.compare_hazards()

    def store_at(self, slot: int, pa: int, length: int) -> None:
        self.log.append(f"store {slot=} [{pa:#x}, {pa + length:#x})")
        data = self.rng.randbytes(length)
        for start, end, kind in self.parts(pa, length):
            if kind is RegionKind.ROM:
                continue
            if self.is_refused(slot, start, end - start, write=True, merges=False):
                self.expect_refusal(lambda: self.bus.store(pa, data, slot))
                return
            self.model.store(slot, start, data[start - pa : end - pa])
        self.bus.store(pa, data, slot)
        self.compare_hazards()

    def fill(self) -> None:
        """Store every byte of a range through a claimed view."""
        slot, pa, length = self.place()
        self.log.append(f"fill {slot=} [{pa:#x}, {pa + length:#x})")
        if not self.is_ram(pa, length):
            assert self.bus.claim_ram(pa, length, slot) is None
            return
        if self.is_refused(slot, pa, length, write=True, merges=False):
            self.expect_refusal(lambda: self.bus.claim_ram(pa, length, slot))
            return
        view = self.bus.claim_ram(pa, length, slot)
        assert view is not None
        view.data[:] = data = self.rng.randbytes(length)
        self.model.store(slot, pa, data)
        self.compare_hazards()

    def change_some(self) -> None:
        """Claim a range and store into a few bytes of it."""
        slot, pa, length = self.place()
        if not self.is_ram(pa, length):
            return
        self.log.append(f"change some of {slot=} [{pa:#x}, {pa + length:#x})")
        if self.is_refused(slot, pa, length, write=True, merges=True):
            self.expect_refusal(lambda: self.caches.claim(slot, pa, length, write=True))
            return
        new = bytearray(self.model.load(slot, pa, length))
        view = self.caches.claim(slot, pa, length, write=True)
        assert view.tobytes() == new
        for _ in range(3):
            at = self.rng.randrange(length)
            view[at] = new[at] = self.rng.randrange(256)
        self.model.store(slot, pa, bytes(new))
        self.compare_hazards()

    def stream(self) -> None:
        """Read a range once, as a long copy does; most have no key."""
        slot, pa, length = self.place()
        if self.rng.random() < 0.7:
            slot, length = 0, min(2 * PAGE_SIZE + length, RAM_END - pa)
        self.log.append(f"stream {slot=} [{pa:#x}, {pa + length:#x})")
        if not self.is_ram(pa, length):
            assert self.bus.stream_ram(pa, length, slot) is None
            return
        if self.is_refused(slot, pa, length, write=False, merges=True):
            self.expect_refusal(lambda: self.bus.stream_ram(pa, length, slot))
            return
        first, last = pa // PAGE_SIZE, (pa + length - 1) // PAGE_SIZE
        passes = (
            slot == 0
            and last - first + 1 >= STREAM_PAGES
            and not any(self.model.holds(slot, n) for n in range(first, last + 1))
        )
        self.seen["streamed"] += passes
        expected = self.model.load(slot, pa, length, passes=passes)
        view = self.bus.stream_ram(pa, length, slot)
        assert view is not None
        assert view.tobytes() == expected
        self.compare_hazards()

    def take_view(self) -> None:
        """Ask for a page, often after an access that covers all of it."""
        slot, page = self.page()
        write = self.rng.random() < 0.5
        if self.rng.random() < 0.7:
            access = self.store_at if write else self.load_at
            access(slot, page * PAGE_SIZE, PAGE_SIZE)
        self.log.append(f"view {slot=} {page=:#x} {write=}")
        view = self.caches.page_view(slot, page, write=write)
        if view is not None:
            self.seen["view to write" if write else "view to read"] += 1
            self.held[slot, page, write] = view

    def store_through_view(self) -> None:
        writable = [key for key in self.held if key[2]]
        if not writable:
            return
        slot, page, _ = key = self.rng.choice(writable)
        at = self.rng.randrange(PAGE_SIZE - 8)
        self.log.append(f"store through view {slot=} {page * PAGE_SIZE + at:#x}")
        data = self.rng.randbytes(8)
        self.held[key][at : at + 8] = data
        self.model.store(slot, page * PAGE_SIZE + at, data)

    # Flushes

    def clflush(self) -> None:
        slot, page = self.page()
        pa = page * PAGE_SIZE + self.rng.randrange(PAGE_SIZE)
        self.log.append(f"clflush {slot=} {pa:#x}")
        self.flush_line(slot, pa)

    def clflush_a_page(self) -> None:
        slot, page = self.page()
        start, end = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
        self.log.append(f"clflush {slot=} [{start:#x}, {end:#x})")
        for line in range(start, end, CACHE_LINE_SIZE):
            self.flush_line(slot, line)

    def vm_page_flush(self) -> None:
        slot, page = self.page()
        self.log.append(f"vm page flush {slot=} {page=:#x}")
        self.bus.flush_page(page * PAGE_SIZE + self.rng.randrange(PAGE_SIZE), slot)
        self.model.write_back(
            lambda unit, tag: self.model.page_of(unit) == page and tag == slot,
            self.dram.cells.tobytes(),
            drop=True,
        )

    def flush_line(self, slot: int, pa: int) -> None:
        self.bus.flush_line(pa, slot)
        hit = pa // self.model.size
        self.model.write_back(
            lambda unit, tag: unit == hit and (self.coherent or tag == slot),
            self.dram.cells.tobytes(),
            drop=True,
        )

    def drain(self) -> None:
        self.log.append("drain")
        self.caches.drain()
        everything = self.dram.cells.tobytes()
        self.model.write_back(lambda unit, slot: True, everything, drop=False)

    def wbinvd(self) -> None:
        self.log.append("wbinvd")
        self.caches.write_back_invalidate()
        everything = self.dram.cells.tobytes()
        self.model.write_back(lambda unit, slot: True, everything, drop=True)

    def evict(self) -> None:
        share = self.rng.choice([0.0, 0.3, 0.7, 1.0])
        self.log.append(f"evict {share=}")
        self.caches.evict(share)
        # Which pages were drawn is the one thing that only the inside tells.
        left = {
            (page, slot)
            for slot, store in self.caches._stores.items()
            for page in PAGES
            if store.valid[page]
        }
        gone = {
            (unit, slot)
            for unit, slot in self.model.cached
            if (self.model.page_of(unit), slot) not in left
        }
        assert share not in {0.0, 1.0} or len(gone) == share * len(self.model.cached)
        self.model.write_back(
            lambda unit, slot: (unit, slot) in gone,
            self.dram.cells.tobytes(),
            drop=True,
        )

    def power_loss(self) -> None:
        self.log.append("power loss")
        self.caches.lose()
        self.model.cached.clear()

    def change_a_cell(self) -> None:
        """What a device or an attacker does: no cache hears of it."""
        pa = self.rng.choice(PAGES) * PAGE_SIZE + self.rng.randrange(PAGE_SIZE)
        self.log.append(f"change cell {pa:#x}")
        self.dram.cells[pa] ^= 0x10
        self.model.dram[pa] ^= 0x10

    # What the steps need

    def page(self) -> tuple[int, int]:
        pages = self.hot if self.rng.random() < 0.85 else PAGES
        return self.rng.choice(SLOTS), self.rng.choice(pages)

    def place(self) -> tuple[int, int, int]:
        """Draw slot, address and length: bytes, lines, a page, several pages."""
        slot, page = self.page()
        base = page * PAGE_SIZE
        rng = self.rng
        match rng.choice(["bytes", "bytes", "line", "lines", "page", "any", "pages"]):
            case "bytes":
                pa, length = base + rng.randrange(PAGE_SIZE), rng.randint(1, 16)
            case "line":
                pa, length = base + rng.randrange(64) * CACHE_LINE_SIZE, 64
            case "lines":
                first, end = sorted(rng.sample(range(65), 2))
                pa, length = base + first * 64, (end - first) * 64
            case "page":
                pa, length = base, PAGE_SIZE
            case "any":
                pa, length = base + rng.randrange(PAGE_SIZE), rng.randint(1, 3000)
            case _:
                pa = max(0, base - rng.choice([0, 1, 63, 64, 1000]))
                length = 2 * PAGE_SIZE + rng.choice([0, 1, 64, 65, 4000])
        return slot, pa, min(length, RAM_END - pa)

    def parts(self, pa: int, length: int) -> Iterator[tuple[int, int, RegionKind]]:
        for region in self.bus.map.regions:
            start, end = max(pa, region.start), min(pa + length, region.end)
            if start < end:
                yield start, end, region.kind

    def is_ram(self, pa: int, length: int) -> bool:
        return [kind for _, _, kind in self.parts(pa, length)] == [RegionKind.RAM]

    def is_refused(
        self, slot: int, pa: int, length: int, *, write: bool, merges: bool
    ) -> bool:
        """Note what the access will meet; tell whether the policy stops it."""
        found = self.model.hazards(slot, pa, length, write=write, merges=merges)
        self.seen.update(hazard.kind for hazard in found)
        self.expected += found
        return bool(found) and self.policy is HazardPolicy.RAISE

    def expect_refusal(self, access: Callable[[], object]) -> None:
        with pytest.raises(HazardError) as error:
            access()
        assert error.value.hazard in self.expected
        self.expected.clear()
        assert self.caches.hazards_met == []

    def compare_hazards(self) -> None:
        assert sorted(self.caches.hazards_met) == sorted(self.expected)
        self.caches.hazards_met.clear()
        self.expected.clear()


@pytest.fixture(autouse=True)
def _long_runs_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a dozen pages be enough for the paths that save the host's memory."""
    monkeypatch.setattr(cache, "PAGES_PER_RELEASE", STREAM_PAGES)
    monkeypatch.setattr(line_store, "PAGES_PER_RELEASE", 2)
    monkeypatch.setattr(cache, "STRETCH_PAGES", 3)


def run_campaigns(
    seeds: range, steps: int, *, coherent: bool, policy: HazardPolicy
) -> Counter[str]:
    """Run one campaign for each seed; return how often things of interest were met."""
    seen: Counter[str] = Counter()
    for seed in seeds:
        campaign = Campaign(seed, coherent, policy)
        campaign.run(steps)
        seen += campaign.seen + campaign.model.seen
    return seen


@pytest.mark.req("WP-32", "PT-52", "MC-5", "MC-22", "MC-28")
def test_law_coherent_caches_match_the_model() -> None:
    seen = run_campaigns(range(40), 100, coherent=True, policy=HazardPolicy.RAISE)
    assert {"handed over", "view to read", "view to write", "streamed"} <= seen.keys()
    assert not {"dirty-alias", "stale-line", "contested"} & seen.keys()


@pytest.mark.req("WP-31", "PT-50", "PT-51", "MC-5", "MC-29", "BZ-12", "BZ-13")
@pytest.mark.parametrize("policy", HazardPolicy)
def test_law_incoherent_caches_match_the_model(policy: HazardPolicy) -> None:
    seen = run_campaigns(range(40), 100, coherent=False, policy=policy)
    assert {"dirty-alias", "stale-line"} <= seen.keys()
    assert {"view to read", "view to write", "streamed"} <= seen.keys()
    # Where every hazard raises, no two tags are ever dirty at once.
    assert ("contested" in seen) == (policy is HazardPolicy.RECORD)


@pytest.mark.soak
@pytest.mark.parametrize("policy", HazardPolicy)
@pytest.mark.parametrize("coherent", [False, True])
def test_law_caches_match_the_model_for_long(
    coherent: bool, policy: HazardPolicy
) -> None:
    run_campaigns(range(1000, 1200), 600, coherent=coherent, policy=policy)
