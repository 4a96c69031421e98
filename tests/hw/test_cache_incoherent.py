"""hw/memory/cache on a part without coherence between tags: lines side by side."""

import pytest

from cbit.hw.machine import Machine
from cbit.hw.memory import SLOT_HOST, SLOT_NONE
from cbit.hw.trace import Event
from cbit.hw.types import CACHE_LINE_SIZE, PAGE_SIZE

PAGE = 0x20_0000
NUMBER = PAGE // PAGE_SIZE
LINE = CACHE_LINE_SIZE
PLAIN = b"stored with C=0 " * 4
SECRET = b"stored with C=1 " * 4


@pytest.fixture
def machine() -> Machine:
    return Machine("epyc-7742", ram=4 << 20, seed=1)


def enciphered(machine: Machine, pa: int, data: bytes) -> bytes:
    return machine.controller.engine(SLOT_HOST).encrypt(pa, data)


@pytest.mark.req("WP-31", "PT-50", "MC-29", "BZ-12")
def test_lines_of_two_tags_live_side_by_side(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == PLAIN
    assert machine.bus.load(PAGE, LINE, SLOT_HOST) == SECRET
    assert machine.snoop(PAGE, LINE) == bytes(LINE)


@pytest.mark.req("WP-31", "MC-32", "BZ-13")
def test_a_stale_clean_line_is_returned_as_it_is(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.caches.write_back_invalidate()
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == PLAIN
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    # DRAM has moved on, this tag's line has not.
    assert machine.snoop(PAGE, LINE) == enciphered(machine, PAGE, SECRET)
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == PLAIN
    machine.caches.flush_line(SLOT_NONE, PAGE)
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == machine.snoop(PAGE, LINE)


@pytest.mark.req("MC-32")
def test_the_other_tag_reads_old_dram_while_new_bytes_are_cached(
    machine: Machine,
) -> None:
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == bytes(LINE)


WAYS_OUT = {
    "wbinvd": lambda machine: machine.caches.write_back_invalidate(),
    "drain": lambda machine: machine.caches.drain(),
    "eviction": lambda machine: machine.caches.evict(1.0),
}


@pytest.mark.req("PT-50", "WP-31")
@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_of_two_dirty_lines_the_one_written_back_last_wins_as_the_seed_has_it(
    way_out: str,
) -> None:
    def outcome(seed: int) -> bytes:
        machine, pa = Machine("epyc-7742", ram=4 << 20, seed=seed), PAGE + 5 * LINE
        machine.bus.store(pa, PLAIN, SLOT_NONE)
        machine.bus.store(pa, SECRET, SLOT_HOST)
        WAYS_OUT[way_out](machine)
        stored = machine.snoop(pa, LINE)
        assert stored in (PLAIN, enciphered(machine, pa, SECRET))
        return stored

    plain_won = [outcome(seed) == PLAIN for seed in range(20)]
    assert {True, False} == set(plain_won)
    assert plain_won == [outcome(seed) == PLAIN for seed in range(20)]


@pytest.mark.req("PT-50")
@pytest.mark.parametrize("way_out", ["wbinvd", "drain"])
def test_every_contested_line_is_drawn_by_itself(
    machine: Machine, way_out: str
) -> None:
    machine.bus.store(PAGE, PLAIN * 128, SLOT_NONE)
    machine.bus.store(PAGE, SECRET * 128, SLOT_HOST)
    WAYS_OUT[way_out](machine)
    lines = range(PAGE, PAGE + 128 * LINE, LINE)
    plain_won = sum(machine.snoop(pa, LINE) == PLAIN for pa in lines)
    secret_won = sum(
        machine.snoop(pa, LINE) == enciphered(machine, pa, SECRET) for pa in lines
    )
    assert plain_won + secret_won == 128
    assert min(plain_won, secret_won) > 30


@pytest.mark.req("PT-50")
def test_lines_that_are_dirty_under_one_tag_only_are_never_drawn(
    machine: Machine,
) -> None:
    # Even and odd lines of one page, each tag its own: all of them arrive.
    for line in range(0, 64, 2):
        machine.bus.store(PAGE + line * LINE, PLAIN, SLOT_NONE)
        machine.bus.store(PAGE + (line + 1) * LINE, SECRET, SLOT_HOST)
    machine.caches.drain()
    assert machine.caches.hazards_met == []
    for line in range(0, 64, 2):
        assert machine.snoop(PAGE + line * LINE, LINE) == PLAIN
        odd = PAGE + (line + 1) * LINE
        assert machine.snoop(odd, LINE) == enciphered(machine, odd, SECRET)


# --- flushes


@pytest.mark.req("PT-51", "BZ-13")
def test_clflush_drops_only_the_line_of_the_mapping_it_names(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    machine.caches.flush_line(SLOT_NONE, PAGE + 5)
    assert machine.snoop(PAGE, LINE) == PLAIN
    assert machine.bus.load(PAGE, LINE, SLOT_HOST) == SECRET  # still cached, dirty
    machine.caches.flush_line(SLOT_HOST, PAGE + 63)
    assert machine.snoop(PAGE, LINE) == enciphered(machine, PAGE, SECRET)


def test_clflush_takes_the_line_of_the_address_and_no_other(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN * 3, SLOT_NONE)
    machine.caches.flush_line(SLOT_NONE, PAGE + LINE + 17)
    assert machine.snoop(PAGE, LINE) == bytes(LINE)
    assert machine.snoop(PAGE + LINE, LINE) == PLAIN
    assert machine.snoop(PAGE + 2 * LINE, LINE) == bytes(LINE)


def test_clflush_of_what_is_not_dirty_writes_nothing(machine: Machine) -> None:
    machine.caches.flush_line(SLOT_HOST, PAGE)
    machine.bus.load(PAGE, LINE, SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    assert machine.snoop(PAGE, LINE) == bytes(LINE)
    assert machine.dram.count_pages() == {}


@pytest.mark.req("PT-51")
def test_wbinvd_leaves_nothing_of_any_tag(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.bus.store(PAGE + LINE, SECRET, SLOT_HOST)
    machine.caches.write_back_invalidate()
    assert machine.snoop(PAGE, LINE) == PLAIN
    assert machine.snoop(PAGE + LINE, LINE) == enciphered(machine, PAGE + LINE, SECRET)
    machine.dram.cells[PAGE : PAGE + 2 * LINE] = 0
    for slot in (SLOT_NONE, SLOT_HOST):
        fresh = machine.bus.load(PAGE, 2 * LINE, slot)
        assert fresh not in (PLAIN + SECRET, SECRET + PLAIN)
    assert machine.bus.load(PAGE, 2 * LINE, SLOT_NONE) == bytes(2 * LINE)


def test_draining_writes_back_and_keeps_the_lines(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.caches.drain()
    assert machine.snoop(PAGE, LINE) == PLAIN
    machine.dram.cells[PAGE : PAGE + LINE] = 0  # a device, behind the cache's back
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == PLAIN
    machine.caches.drain()  # clean lines are not written again
    assert machine.snoop(PAGE, LINE) == bytes(LINE)


@pytest.mark.parametrize("coherent", [False, True])
def test_eviction_takes_about_the_share_it_is_told(coherent: bool) -> None:
    pages = 400
    for share, low, high in ((0.0, 0, 0), (0.25, 60, 140), (1.0, pages, pages)):
        machine = Machine(ram=4 << 20, coherent=coherent, seed=3)
        machine.bus.store(PAGE, b"\x5a" * pages * PAGE_SIZE, SLOT_NONE)
        machine.caches.evict(share)
        arrived = machine.snoop(PAGE, pages * PAGE_SIZE).count(b"\x5a") / PAGE_SIZE
        assert low <= arrived <= high
        assert machine.bus.load(PAGE, 16, SLOT_NONE) == b"\x5a" * 16


def test_what_capacity_takes_depends_on_the_seed_alone() -> None:
    def left(seed: int) -> bytes:
        machine = Machine("epyc-7742", ram=4 << 20, seed=seed)
        machine.bus.store(PAGE, b"x" * 64 * PAGE_SIZE, SLOT_NONE)
        machine.caches.evict()
        return machine.snoop(PAGE, 64 * PAGE_SIZE)

    assert left(1) == left(1)
    assert left(1) != left(2)


def test_power_loss_takes_every_dirty_line(machine: Machine) -> None:
    machine.bus.store(PAGE, PLAIN, SLOT_NONE)
    machine.caches.drain()
    machine.bus.store(PAGE, SECRET, SLOT_NONE)
    machine.bus.store(PAGE + LINE, SECRET, SLOT_HOST)
    machine.caches.lose()
    machine.caches.drain()
    assert machine.snoop(PAGE, 2 * LINE) == PLAIN + bytes(LINE)
    assert machine.bus.load(PAGE, LINE, SLOT_NONE) == PLAIN


def test_flushes_are_events(machine: Machine) -> None:
    events: list[Event] = []
    machine.trace.listen(events.append)
    machine.caches.write_back_invalidate()
    machine.caches.flush_line(SLOT_HOST, PAGE + 5)
    machine.caches.flush_page(2, PAGE)
    machine.caches.drain()  # no instruction
    assert [(event.kind, dict(event.facts)) for event in events] == [
        ("flush", {"what": "wbinvd"}),
        ("flush", {"what": "clflush", "pa": PAGE + 5, "slot": 1}),
        ("flush", {"what": "vm-page-flush", "pa": PAGE, "slot": 2}),
    ]


# --- partial lines and page views


@pytest.mark.req("MC-5")
def test_a_store_of_some_bytes_merges_with_what_dram_decrypts_to(
    machine: Machine,
) -> None:
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    machine.caches.write_back_invalidate()
    machine.bus.store(PAGE + 20, b"***", SLOT_HOST)
    machine.caches.write_back_invalidate()
    merged = SECRET[:20] + b"***" + SECRET[23:]
    assert machine.bus.load(PAGE, LINE, SLOT_HOST) == merged
    assert machine.snoop(PAGE, LINE) == enciphered(machine, PAGE, merged)


@pytest.mark.parametrize(
    ("start", "length"),
    [(0, LINE), (LINE, 5 * LINE), (0, 2 * PAGE_SIZE), (PAGE_SIZE - LINE, 2 * LINE)],
)
def test_whole_lines_are_stored_without_reading_them(
    machine: Machine, start: int, length: int
) -> None:
    # ASID 4 has no key: a fill would raise, and only the write-back needs one.
    machine.bus.store(PAGE + start, b"x" * length, 5)
    assert machine.bus.load(PAGE + start, length, 5) == b"x" * length


def test_a_view_to_write_needs_every_line_dirty(machine: Machine) -> None:
    caches = machine.caches
    machine.bus.store(PAGE, bytes(PAGE_SIZE - 1), SLOT_NONE)
    assert caches.page_view(SLOT_NONE, NUMBER, write=True) is not None
    caches.flush_line(SLOT_NONE, PAGE)
    assert caches.page_view(SLOT_NONE, NUMBER, write=False) is None
    machine.bus.load(PAGE, 1, SLOT_NONE)
    assert caches.page_view(SLOT_NONE, NUMBER, write=False) is not None
    assert caches.page_view(SLOT_NONE, NUMBER, write=True) is None


def test_no_view_hides_an_access_that_must_be_reported(machine: Machine) -> None:
    caches = machine.caches
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)
    machine.bus.store(PAGE, bytes(PAGE_SIZE), SLOT_HOST)
    assert caches.page_view(SLOT_NONE, NUMBER, write=False) is None
    assert caches.page_view(SLOT_HOST, NUMBER, write=True) is None
    machine.bus.load(PAGE, 1, SLOT_NONE)  # stale: reported, and again not viewed
    assert caches.page_view(SLOT_NONE, NUMBER, write=False) is None
    caches.flush_line(SLOT_HOST, PAGE)
    assert caches.page_view(SLOT_NONE, NUMBER, write=False) is None


def test_no_view_outlives_a_store_of_the_tag_that_came_last(machine: Machine) -> None:
    # Both tags hold the page, clean; the one that came last stores without a word.
    dropped = []
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_HOST)
    view = machine.caches.page_view(SLOT_NONE, NUMBER, write=False)
    machine.caches.hold_views(lambda: dropped.append(True))
    machine.bus.store(PAGE, b"x", SLOT_HOST)
    assert view is None or dropped


def test_a_store_drops_the_view_of_the_other_tag(machine: Machine) -> None:
    told = []
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)
    assert machine.caches.page_view(SLOT_NONE, NUMBER, write=False) is not None
    machine.caches.hold_views(lambda: told.append(True))
    machine.bus.store(PAGE, b"x", SLOT_HOST)
    assert told
