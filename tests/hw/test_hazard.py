"""hw/memory/hazard: accesses that silicon leaves open are named, and no others are."""

import pytest

from cbit.hw.cipher import MemoryCipher, Tweaks
from cbit.hw.machine import Machine
from cbit.hw.memory import SLOT_HOST, SLOT_NONE, Hazard, HazardError
from cbit.hw.memory.hazard import slot_name
from cbit.hw.trace import Event
from cbit.hw.types import PAGE_SIZE, PhysAddr

PAGE = 0x20_0000
GUEST = 2


def rome(hazards: str = "record") -> Machine:
    """Return a machine of which software must keep the tags apart."""
    machine = Machine("epyc-7742", ram=4 << 20, hazards=hazards, seed=1)
    tweaks = Tweaks([bytes([n] * 16) for n in range(48)])
    machine.controller.load_key(GUEST, MemoryCipher(b"a guest's key ..", tweaks, True))
    return machine


@pytest.fixture
def machine() -> Machine:
    return rome()


def met(machine: Machine) -> list[Hazard]:
    """Return the hazards since the last call."""
    found = list(machine.caches.hazards_met)
    machine.caches.hazards_met.clear()
    return found


def dirty(pa: int, length: int, slot: int, other: int, write: bool) -> Hazard:
    return Hazard("dirty-alias", PhysAddr(pa), length, slot, other, write)


def stale(pa: int, length: int, slot: int, other: int, write: bool) -> Hazard:
    return Hazard("stale-line", PhysAddr(pa), length, slot, other, write)


@pytest.mark.req("WP-31", "BZ-12")
def test_a_load_beside_another_tags_dirty_line(machine: Machine) -> None:
    machine.bus.store(PAGE + 0x87, b"secret", SLOT_HOST)
    assert met(machine) == []
    machine.bus.load(PAGE + 0x80, 4, SLOT_NONE)
    assert met(machine) == [dirty(PAGE + 0x80, 64, SLOT_NONE, SLOT_HOST, False)]


@pytest.mark.req("WP-31", "BZ-12")
def test_a_store_beside_another_tags_dirty_line(machine: Machine) -> None:
    machine.bus.store(PAGE, bytes(64), SLOT_NONE)
    machine.bus.store(PAGE, bytes(64), SLOT_HOST)
    assert met(machine) == [dirty(PAGE, 64, SLOT_HOST, SLOT_NONE, True)]


@pytest.mark.req("WP-31", "MC-32", "BZ-13")
def test_a_load_of_a_line_cached_before_another_tag_stored(machine: Machine) -> None:
    machine.bus.load(PAGE, 16, SLOT_NONE)
    machine.bus.store(PAGE, bytes(64), SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    machine.bus.load(PAGE + 32, 1, SLOT_NONE)
    assert met(machine) == [stale(PAGE, 64, SLOT_NONE, SLOT_HOST, False)]


def test_a_store_that_merges_with_a_stale_line(machine: Machine) -> None:
    machine.bus.load(PAGE, 128, SLOT_NONE)
    machine.bus.store(PAGE, bytes(128), SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    machine.caches.flush_line(SLOT_HOST, PAGE + 64)
    machine.bus.store(PAGE + 8, b"few bytes", SLOT_NONE)
    assert met(machine) == [stale(PAGE, 64, SLOT_NONE, SLOT_HOST, True)]
    machine.bus.store(PAGE + 64, bytes(64), SLOT_NONE)  # a whole line merges nothing
    assert met(machine) == []
    machine.bus.load(PAGE, 128, SLOT_NONE)  # its own bytes are the newest now
    assert met(machine) == []


def test_lines_that_touch_are_one_hazard_and_others_are_not(machine: Machine) -> None:
    machine.bus.store(PAGE + 0xFC0, bytes(0x80), SLOT_HOST)  # over a page border
    machine.bus.store(PAGE + 0x100, bytes(8), SLOT_HOST)
    machine.bus.load(PAGE, 2 * PAGE_SIZE, SLOT_NONE)
    assert met(machine) == [
        dirty(PAGE + 0x100, 0x40, SLOT_NONE, SLOT_HOST, False),
        dirty(PAGE + 0xFC0, 0x80, SLOT_NONE, SLOT_HOST, False),
    ]


@pytest.mark.parametrize("length", [1, 8, 64, 100, PAGE_SIZE, 3 * PAGE_SIZE])
def test_only_lines_that_the_access_touches_count(
    machine: Machine, length: int
) -> None:
    start = PAGE + 0x140
    machine.bus.store(start - 64, bytes(64), SLOT_HOST)
    beyond = -(-(start + length) // 64) * 64
    machine.bus.store(beyond, bytes(64), SLOT_HOST)
    machine.bus.load(start, length, SLOT_NONE)
    machine.bus.store(start, bytes(length), SLOT_NONE)
    assert met(machine) == []


def test_a_long_copy_is_checked_line_by_line_too(machine: Machine) -> None:
    # Reads of 64 pages and more do not stay cached; they are checked all the same.
    start, length = PAGE + 0x140, 80 * PAGE_SIZE
    machine.bus.store(start - 64, bytes(64), SLOT_HOST)
    machine.bus.store(start + length, bytes(64), SLOT_HOST)
    assert machine.bus.stream_ram(start, length, SLOT_NONE) is not None
    assert met(machine) == []
    machine.bus.store(PAGE + 9 * PAGE_SIZE, bytes(64), SLOT_HOST)
    machine.bus.stream_ram(start, length, SLOT_NONE)
    assert met(machine) == [
        dirty(PAGE + 9 * PAGE_SIZE, 64, SLOT_NONE, SLOT_HOST, False)
    ]


@pytest.mark.req("WP-43")
def test_the_tag_that_stored_is_named_among_several(machine: Machine) -> None:
    for slot in (SLOT_NONE, SLOT_HOST, GUEST):
        machine.bus.load(PAGE, 64, slot)
    machine.bus.store(PAGE, bytes(64), GUEST)
    machine.caches.flush_line(GUEST, PAGE)
    machine.bus.load(PAGE, 64, SLOT_HOST)
    assert met(machine) == [stale(PAGE, 64, SLOT_HOST, GUEST, False)]
    machine.bus.load(PAGE, 64, SLOT_NONE)
    assert met(machine) == [stale(PAGE, 64, SLOT_NONE, GUEST, False)]


def test_every_tag_with_dirty_lines_is_named(machine: Machine) -> None:
    machine.bus.store(PAGE, bytes(64), SLOT_HOST)
    machine.bus.store(PAGE + 64, bytes(64), GUEST)
    machine.bus.load(PAGE, 128, SLOT_NONE)
    assert sorted(met(machine)) == [
        dirty(PAGE, 64, SLOT_NONE, SLOT_HOST, False),
        dirty(PAGE + 64, 64, SLOT_NONE, GUEST, False),
    ]


# --- what is no hazard


@pytest.mark.req("PT-51", "PT-53", "WP-31")
@pytest.mark.parametrize(
    ("old", "new"), [(SLOT_NONE, SLOT_HOST), (SLOT_HOST, SLOT_NONE)]
)
def test_linux_converts_in_place_without_a_hazard(old: int, new: int) -> None:
    # Linux 6.1 mem_encrypt_boot.S: WBINVD; read a piece through the old mapping into
    # a buffer; write it through the new one. Afterwards nobody uses the old one.
    machine, text = rome("raise"), bytes(range(256)) * 32
    bus, caches = machine.bus, machine.caches
    bus.store(PAGE, text, old)
    caches.write_back_invalidate()
    for piece in range(0, len(text), PAGE_SIZE):
        buffer = bus.load(PAGE + piece, PAGE_SIZE, old)
        bus.store(PAGE + piece, buffer, new)
    caches.write_back_invalidate()
    assert bus.load(PAGE, len(text), new) == text


@pytest.mark.req("PT-51", "BZ-13")
def test_set_memory_is_no_hazard_with_clflush_through_the_old_mapping() -> None:
    # Linux 6.1 mm/pat/set_memory.c: flush under the old mapping, then change C.
    machine = rome("raise")
    machine.bus.store(PAGE, b"x" * PAGE_SIZE, SLOT_HOST)
    for line in range(PAGE, PAGE + PAGE_SIZE, 64):
        machine.caches.flush_line(SLOT_HOST, line)
    machine.bus.store(PAGE, b"shared with a device", SLOT_NONE)
    assert machine.bus.load(PAGE, 6, SLOT_NONE) == b"shared"


@pytest.mark.req("BZ-13")
def test_set_memory_without_the_flush_is_a_hazard() -> None:
    machine = rome("raise")
    machine.bus.store(PAGE, b"x" * PAGE_SIZE, SLOT_HOST)
    with pytest.raises(HazardError):
        machine.bus.store(PAGE, b"shared with a device", SLOT_NONE)


def test_clean_lines_of_two_tags_are_no_hazard() -> None:
    machine = rome("raise")
    for _ in range(2):
        machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)
        machine.bus.load(PAGE, PAGE_SIZE, SLOT_HOST)


@pytest.mark.req("WP-26")
def test_neighbouring_pages_of_two_tags_are_no_hazard() -> None:
    machine = rome("raise")
    machine.bus.store(PAGE, bytes(PAGE_SIZE), SLOT_NONE)
    machine.bus.store(PAGE + PAGE_SIZE, bytes(PAGE_SIZE), SLOT_HOST)
    machine.bus.load(PAGE, PAGE_SIZE, SLOT_NONE)


# --- record, raise, trace


def test_raising_stops_the_access_before_it_happens() -> None:
    machine = rome("raise")
    machine.bus.store(PAGE, b"newest", SLOT_HOST)
    with pytest.raises(HazardError) as error:
        machine.bus.store(PAGE, b"lost??", SLOT_NONE)
    assert error.value.hazard == dirty(PAGE, 64, SLOT_NONE, SLOT_HOST, True)
    assert str(error.value) == (
        "hazard dirty-alias: store through C=0 at [0x200000, 0x200040) meets dirty "
        "lines of C=1: flush before the C-bit changes"
    )
    machine.caches.write_back_invalidate()
    assert machine.bus.load(PAGE, 6, SLOT_HOST) == b"newest"


def test_recording_lets_the_access_happen(machine: Machine) -> None:
    machine.bus.store(PAGE, b"newest", SLOT_HOST)
    machine.bus.store(PAGE, b"lost??", SLOT_NONE)
    assert machine.bus.load(PAGE, 6, SLOT_NONE) == b"lost??"
    assert len(met(machine)) == 2


def test_a_hazard_is_an_event_with_all_its_facts(machine: Machine) -> None:
    events: list[Event] = []
    machine.trace.listen(events.append, frozenset({"hazard"}))
    machine.bus.load(PAGE, 1, SLOT_NONE)
    machine.bus.store(PAGE, bytes(64), SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, PAGE)
    machine.bus.load(PAGE, 1, SLOT_NONE)
    assert [dict(event.facts) for event in events] == [
        {
            "what": "stale-line",
            "pa": PAGE,
            "length": 64,
            "slot": 0,
            "other_slot": 1,
            "access": "load",
        }
    ]


def test_a_hazard_reads_as_one_line() -> None:
    assert stale(0x1000, 128, GUEST, SLOT_HOST, False).describe() == (
        "load through ASID 1 at [0x1000, 0x1080) meets lines cached before a store "
        "through C=1: flush before the C-bit changes"
    )


@pytest.mark.req("WP-44")
def test_slots_are_named_as_software_knows_them() -> None:
    names = [slot_name(slot) for slot in (0, 1, 2, 510)]
    assert names == ["C=0", "C=1", "ASID 1", "ASID 509"]
