"""hw/memory/cache on a part that keeps tags coherent: one owner for every page."""

import pytest

from cbit.hw.machine import Machine
from cbit.hw.memory import SLOT_HOST, SLOT_NONE
from cbit.hw.memory.controller import NoKeyError
from cbit.hw.trace import Event
from cbit.hw.types import PAGE_SIZE

PAGE = 0x20_0000
NUMBER = PAGE // PAGE_SIZE
SECRET = b"sixteen bytes..."


@pytest.fixture
def machine() -> Machine:
    return Machine("epyc-7763", ram=4 << 20, hazards="raise", seed=1)


def engine_bytes(machine: Machine, pa: int, data: bytes) -> bytes:
    """Return what the host key makes of whole blocks."""
    return machine.controller.engine(SLOT_HOST).encrypt(pa, data)


@pytest.mark.req("WP-32", "PT-52")
def test_a_touch_through_the_other_tag_writes_back_first(machine: Machine) -> None:
    machine.bus.store(PAGE + 0x40, SECRET, SLOT_HOST)
    assert machine.snoop(PAGE + 0x40, 16) == bytes(16)
    raw = machine.bus.load(PAGE + 0x40, 16, SLOT_NONE)
    assert raw == machine.snoop(PAGE + 0x40, 16)
    assert raw == engine_bytes(machine, PAGE + 0x40, SECRET)
    assert machine.bus.load(PAGE + 0x40, 16, SLOT_HOST) == SECRET


@pytest.mark.req("WP-32")
def test_a_page_has_one_owner(machine: Machine) -> None:
    machine.bus.store(PAGE, SECRET, SLOT_HOST)
    machine.bus.load(PAGE + 0x800, 1, SLOT_NONE)
    # Had the encrypted line stayed, this store would not be what it decrypts to.
    machine.bus.store(PAGE, bytes(16), SLOT_NONE)
    machine.caches.drain()
    assert machine.snoop(PAGE, 16) == bytes(16)
    garbage = machine.controller.engine(SLOT_HOST).decrypt(PAGE, bytes(16))
    assert machine.bus.load(PAGE, 16, SLOT_HOST) == garbage


def test_the_neighbouring_page_keeps_its_owner(machine: Machine) -> None:
    machine.bus.store(PAGE, SECRET * 512, SLOT_HOST)  # two pages
    machine.bus.load(PAGE, 1, SLOT_NONE)
    assert machine.snoop(PAGE, 16) == engine_bytes(machine, PAGE, SECRET)
    assert machine.snoop(PAGE + PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert machine.caches.tag_changes == 1


def test_a_run_of_pages_changes_hands_at_once_and_says_so(machine: Machine) -> None:
    events: list[Event] = []
    machine.trace.listen(events.append, frozenset({"tag-change"}))
    machine.bus.store(PAGE, bytes(3 * PAGE_SIZE), SLOT_HOST)
    machine.bus.store(PAGE + 4 * PAGE_SIZE, b"x", SLOT_HOST)
    machine.bus.load(PAGE, 6 * PAGE_SIZE, SLOT_NONE)
    assert [dict(event.facts) for event in events] == [
        {"pa": PAGE, "pages": 3, "from_slot": 1, "to_slot": 0},
        {"pa": PAGE + 4 * PAGE_SIZE, "pages": 1, "from_slot": 1, "to_slot": 0},
    ]
    assert machine.caches.tag_changes == 4


def test_clean_pages_change_hands_without_a_write(machine: Machine) -> None:
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_HOST)
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)
    assert machine.dram.count_pages() == {}


@pytest.mark.req("WP-32", "PT-52")
def test_no_sequence_is_a_hazard(machine: Machine) -> None:
    # hazards="raise": any report would end the test.
    for turn in range(20):
        machine.bus.store(PAGE + 8 * turn, b"plain", SLOT_NONE)
        machine.bus.store(PAGE + 64 * turn, b"enciphered", SLOT_HOST)
        machine.bus.load(PAGE, 2 * PAGE_SIZE, turn % 2)
    assert machine.caches.hazards_met == []


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_whole_pages_are_stored_without_reading_them(
    machine: Machine, pages: int
) -> None:
    # ASID 4 has no key: a fill would raise, and only the write-back needs one.
    machine.bus.store(PAGE, b"x" * pages * PAGE_SIZE, 5)
    assert machine.bus.load(PAGE, pages * PAGE_SIZE, 5) == b"x" * pages * PAGE_SIZE
    with pytest.raises(NoKeyError, match="key slot 5"):
        machine.caches.drain()


# --- flushes


@pytest.mark.parametrize("through", [SLOT_NONE, SLOT_HOST])
def test_clflush_through_either_mapping_reaches_the_line(
    machine: Machine, through: int
) -> None:
    machine.bus.store(PAGE + 0x80, SECRET, SLOT_HOST)
    machine.caches.flush_line(through, PAGE + 0x8F)
    assert machine.snoop(PAGE + 0x80, 16) == engine_bytes(machine, PAGE + 0x80, SECRET)
    # The line is gone: what a device stores now is what the next load brings.
    machine.dram.cells[PAGE + 0x80 : PAGE + 0x90] = 0
    assert machine.bus.load(PAGE + 0x80, 16, SLOT_NONE) == bytes(16)


def test_clflush_of_a_clean_line_writes_nothing(machine: Machine) -> None:
    machine.bus.load(PAGE, 16, SLOT_HOST)
    machine.bus.load(PAGE + PAGE_SIZE, 16, SLOT_NONE)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    assert machine.dram.count_pages() == {}


def test_eviction_of_clean_pages_writes_nothing(machine: Machine) -> None:
    machine.bus.load(PAGE, 64 * PAGE_SIZE, SLOT_HOST)
    machine.bus.load(PAGE, 8 * PAGE_SIZE, SLOT_NONE)
    machine.caches.evict(1.0)
    assert machine.dram.count_pages() == {}


# --- page views


def test_a_page_that_was_loaded_can_be_viewed_and_one_not_stored_cannot_be_changed(
    machine: Machine,
) -> None:
    machine.bus.load(PAGE, 1, SLOT_HOST)
    view = machine.caches.page_view(SLOT_HOST, NUMBER, write=False)
    assert view is not None
    assert bytes(view) == machine.bus.load(PAGE, PAGE_SIZE, SLOT_HOST)
    assert machine.caches.page_view(SLOT_HOST, NUMBER, write=True) is None
    machine.bus.store(PAGE, b"x", SLOT_HOST)
    assert machine.caches.page_view(SLOT_HOST, NUMBER, write=True) is not None


def test_a_store_through_a_view_is_as_any_store(machine: Machine) -> None:
    machine.bus.store(PAGE, b"x", SLOT_HOST)
    view = machine.caches.page_view(SLOT_HOST, NUMBER, write=True)
    assert view is not None
    view[0x100:0x110] = SECRET
    assert machine.bus.load(PAGE + 0x100, 16, SLOT_HOST) == SECRET
    machine.caches.drain()
    expected = engine_bytes(machine, PAGE + 0x100, SECRET)
    assert machine.snoop(PAGE + 0x100, 16) == expected


def test_whoever_holds_views_is_told_before_they_go_bad(machine: Machine) -> None:
    caches, told = machine.caches, []
    caches.hold_views(lambda: told.append(True))
    endings = {
        "another tag": lambda: machine.bus.load(PAGE, 1, SLOT_NONE),
        "clflush": lambda: caches.flush_line(SLOT_HOST, PAGE),
        "vm page flush": lambda: caches.flush_page(SLOT_HOST, PAGE),
        "wbinvd": caches.write_back_invalidate,
        "drain": caches.drain,
        "evict": lambda: caches.evict(1.0),
        "power loss": caches.lose,
    }
    for name, end in endings.items():
        machine.bus.store(PAGE, b"x", SLOT_HOST)
        assert caches.page_view(SLOT_HOST, NUMBER, write=True) is not None
        told.clear()
        end()
        assert told, name
        assert caches.page_view(SLOT_HOST, NUMBER, write=True) is None, name


def test_every_page_and_tag_has_a_view_of_its_own(machine: Machine) -> None:
    slots = {page: page % 2 for page in range(8)}
    for page, slot in slots.items():
        machine.bus.store(page * PAGE_SIZE, bytes([page]) * PAGE_SIZE, slot)
    for _ in range(2):
        for page, slot in slots.items():
            view = machine.caches.page_view(slot, page, write=False)
            assert view is not None
            assert bytes(view) == bytes([page]) * PAGE_SIZE


def test_the_other_tag_has_no_view_of_the_page(machine: Machine) -> None:
    machine.bus.store(PAGE, bytes(PAGE_SIZE), SLOT_HOST)
    for write in (False, True):
        assert machine.caches.page_view(SLOT_NONE, NUMBER, write=write) is None
        assert machine.caches.page_view(2, NUMBER, write=write) is None
