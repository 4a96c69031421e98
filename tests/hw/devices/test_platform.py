"""hw/devices/platform: the devices wired together, saved and restored."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from cbit.hw.devices import NEVER, Platform
from cbit.hw.errors import CallerError
from cbit.hw.memory import MemoryMap, Mmio

LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
EOI, LINT0 = 0xB0, 0x350


class Pc:
    """A platform, its memory map, and everything a guest can see of it."""

    def __init__(self) -> None:
        self.map = MemoryMap.pc(64 << 20)
        self.console = bytearray()
        self.platform = Platform(self.map, console=self.console.extend)
        self.changes = 0
        self.asked: list[object] = []
        self.platform.interrupts.on_change = self.changed
        self.platform.on_request = self.requested

    def changed(self) -> None:
        self.changes += 1

    def requested(self) -> None:
        self.asked.append(self.platform.request)

    def device(self, pa: int) -> Mmio:
        region = self.map.find(pa)
        assert region is not None
        return region.device

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.platform.ports.write(port, value, 1)

    def store(self, pa: int, value: int) -> None:
        self.device(pa).write(pa & 0xFFF, value.to_bytes(4, "little"))

    def program_8259s(self) -> None:
        self.out(0x20, 0x11)
        self.out(0x21, 0x30, 4, 1, 0)
        self.out(0xA0, 0x11)
        self.out(0xA1, 0x38, 2, 1, 0)

    def start_timer(self, mode: int = 2, count: int = 11_932) -> None:
        self.out(0x43, 0x30 | mode << 1)
        self.out(0x40, count & 0xFF, count >> 8)


@pytest.fixture
def pc() -> Pc:
    return Pc()


def test_both_apics_answer_in_the_pci_hole(pc: Pc) -> None:
    assert pc.device(LAPIC).read(0x30, 4) == b"\x10\x00\x05\x00"
    pc.store(IOAPIC, 1)
    assert pc.device(IOAPIC).read(0x10, 4) == b"\x11\x00\x17\x00"
    for pa in (LAPIC - 1, LAPIC + 0x1000, IOAPIC - 1, IOAPIC + 0x1000):
        assert pc.device(pa).read(0, 4) == b"\xff" * 4


def test_a_second_platform_on_one_map_is_refused(pc: Pc) -> None:
    with pytest.raises(CallerError):
        Platform(pc.map, console=pc.console.extend)


def test_the_timer_reaches_the_core_through_8259_and_lint0(pc: Pc) -> None:
    pc.program_8259s()
    pc.start_timer()
    pc.platform.clock.advance_to(9_999_000)
    assert not pc.platform.interrupts.pending
    pc.platform.clock.advance_to(10_001_000)
    assert pc.changes
    assert pc.platform.interrupts.acknowledge() == 0x30


def test_the_timer_reaches_the_core_through_input_2_of_the_io_apic(pc: Pc) -> None:
    pc.store(LAPIC + LINT0, 1 << 16)
    pc.store(IOAPIC, 0x14)
    pc.store(IOAPIC + 0x10, 0x60)
    pc.start_timer()
    pc.platform.clock.advance_to(10_001_000)
    assert pc.platform.interrupts.acknowledge() == 0x60
    pc.store(LAPIC + EOI, 0)
    assert not pc.platform.interrupts.pending
    pc.platform.clock.advance_to(20_001_000)
    assert pc.platform.interrupts.acknowledge() == 0x60


def test_the_serial_port_has_irq_4(pc: Pc) -> None:
    pc.program_8259s()
    pc.out(0x3FC, 8)
    pc.out(0x3F9, 1)
    pc.platform.uart.feed(b"x")
    assert pc.platform.interrupts.acknowledge() == 0x34


def test_serial_port_and_debug_console_share_the_console(pc: Pc) -> None:
    pc.out(0x3F8, *b"se")
    pc.out(0xE9, *b"bug")
    assert pc.console == b"sebug"


def test_requests_carry_the_exit_code(pc: Pc) -> None:
    assert pc.platform.request is None
    pc.platform.ports.write(0x604, 5 << 10 | 1 << 13, 2)
    pc.out(0x64, 0xFE)
    pc.out(0xF4, 31)
    assert pc.asked == ["shutdown", "reset", ("exit", 31)]
    assert pc.platform.request == ("exit", 31)


def test_cf9_is_no_part_of_the_pci_latch(pc: Pc) -> None:
    pc.platform.ports.write(0xCF8, 0x8000_0600, 4)
    assert pc.asked == []
    pc.out(0xCF9, 0x06)
    assert pc.asked == ["reset"]
    assert pc.platform.ports.read(0xCF8, 4) == 0x8000_0600


def test_at_power_on_no_timer_runs(pc: Pc) -> None:
    assert pc.platform.clock.next_deadline == NEVER
    assert not pc.platform.interrupts.pending


def test_the_state_is_a_copy(pc: Pc) -> None:
    state = pc.platform.state()
    before = json.dumps(state)
    exercise(pc, random.Random(1), 200)
    assert json.dumps(state) == before


@pytest.mark.parametrize("damage", [{}, {"now": "soon"}, {"now": 1, "pic": {}}])
def test_a_state_that_is_none_is_refused(pc: Pc, damage: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        pc.platform.restore(damage)


def places(state: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a state."""
    if way:
        yield way
    if isinstance(state, dict | list):
        keys = state if isinstance(state, dict) else range(len(state))
        for key in keys:
            yield from places(state[key], (*way, key))


def test_a_state_with_any_one_value_of_a_wrong_kind_is_refused() -> None:
    pc = Pc()
    prepare(pc)
    pc.platform.uart.feed(b"four")
    text = json.dumps(pc.platform.state())
    for way in places(json.loads(text)):
        damaged = json.loads(text)
        inner = damaged
        for key in way[:-1]:
            inner = inner[key]
        value = inner[way[-1]]
        if isinstance(value, bool):
            continue  # anything is true or false
        inner[way[-1]] = 7 if isinstance(value, list | dict) else ["no"]
        with pytest.raises((KeyError, TypeError, ValueError)):
            Pc().platform.restore(damaged)


def test_what_the_guest_asked_for_is_restored_but_not_asked_again(pc: Pc) -> None:
    for port, value, request in (
        (0x64, 0xFE, "reset"),
        (0xF4, 31, ("exit", 31)),
    ):
        pc.out(port, value)
        other = restored(pc)
        assert other.platform.request == request
        assert other.asked == []


def test_a_restored_interrupt_is_announced(pc: Pc) -> None:
    pc.program_8259s()
    pc.start_timer()
    pc.platform.clock.advance_to(10_001_000)
    other = restored(pc)
    assert other.changes
    assert other.platform.interrupts.acknowledge() == 0x30


def test_a_timer_set_before_goes_on_after(pc: Pc) -> None:
    pc.program_8259s()
    pc.start_timer()
    pc.platform.clock.advance_to(9_000_000)
    other = restored(pc)
    assert other.platform.clock.next_deadline == pc.platform.clock.next_deadline
    other.platform.clock.advance_to(10_001_000)
    assert other.platform.interrupts.acknowledge() == 0x30


PORTS = (
    *(0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71),
    *range(0x3F8, 0x400),
    *(0xCF8, 0xCFC, 0xCFE, 0x600, 0x602, 0x604, 0x608, 0x60, 0x64, 0x92, 0xCF9, 0xF4),
    *(0x80, 0xB2, 0xE9, 0x300),
)
LOCAL = (0x20, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310)
LOCAL_LVT = tuple(range(0x320, 0x3A0, 0x10))
LOCAL_BITS = tuple(range(0x100, 0x280, 0x10))


def exercise(pc: Pc, rng: random.Random, steps: int) -> list[object]:
    """Do random things to a PC; return what could be seen of it."""
    seen: list[object] = []
    platform = pc.platform
    for _ in range(steps):
        match rng.randrange(12):
            case 0 | 1 | 2:
                port, size = rng.choice(PORTS), rng.choice((1, 1, 1, 2, 4))
                seen.append((port, size, platform.ports.read(port, size)))
            case 3 | 4 | 5:
                port, size = rng.choice(PORTS), rng.choice((1, 1, 1, 2, 4))
                platform.ports.write(port, rng.getrandbits(8 * size), size)
            case 6:
                offset = rng.choice((*LOCAL, *LOCAL_LVT, *LOCAL_BITS))
                seen.append(pc.device(LAPIC).read(offset, 4))
            case 7:
                # Mostly enabled, vectors above 15, short counts.
                offset = rng.choice((*LOCAL, *LOCAL_LVT, 0x3E0, 0xB0, 0xB0))
                value = rng.getrandbits(18) & ~0x1_0700 | 0x120
                pc.store(LAPIC + offset, value >> 4 if offset == 0x380 else value)
            case 8:
                pc.store(IOAPIC, 0x10 + rng.randrange(48))
                if rng.random() < 0.5:
                    pc.store(IOAPIC + 0x10, rng.getrandbits(17) & ~0x1_0700 | 0x20)
                seen.append(pc.device(IOAPIC).read(0x10, 4))
            case 9:
                wait = rng.choice((10, 3_000, 400_000, 20_000_000))
                platform.clock.advance_to(platform.clock.now + rng.randrange(wait))
            case 10:
                platform.uart.feed(rng.randbytes(rng.randrange(20)))
            case 11:
                for _ in range(4):
                    if platform.interrupts.pending:
                        seen.append(platform.interrupts.acknowledge())
                        pc.store(LAPIC + EOI, 0)
                        pc.out(0x20, 0x20)
                        pc.out(0xA0, 0x20)
        seen.append((platform.interrupts.pending, platform.clock.next_deadline))
    return [*seen, pc.asked[:], bytes(pc.console), pc.changes, platform.clock.now]


def prepare(pc: Pc) -> None:
    """Let every source of interrupts run."""
    pc.program_8259s()
    pc.start_timer()
    pc.out(0x3FC, 8)
    pc.out(0x3F9, 0xF)
    pc.store(LAPIC + 0x320, 1 << 17 | 0xEC)
    pc.store(LAPIC + 0x380, 5000)
    pc.store(IOAPIC, 0x18)
    pc.store(IOAPIC + 0x10, 0x54)


def restored(pc: Pc) -> Pc:
    """Return a fresh PC with the state of another, through JSON."""
    other = Pc()
    other.platform.restore(json.loads(json.dumps(pc.platform.state())))
    return other


@pytest.mark.parametrize("seed", range(25))
def test_law_a_restored_platform_goes_on_as_the_one_that_was_saved(seed: int) -> None:
    rng = random.Random(seed)
    pc = Pc()
    prepare(pc)
    exercise(pc, rng, rng.randrange(50, 600))
    other = restored(pc)
    assert other.platform.state() == pc.platform.state()
    pc.console.clear()
    pc.asked.clear()
    pc.changes = other.changes = 0
    going_on = rng.getrandbits(64)
    first, second = (exercise(p, random.Random(going_on), 800) for p in (pc, other))
    assert first == second


def test_the_law_sees_interrupts_of_every_source() -> None:
    """Random words must not have silenced what the law is about."""
    vectors: set[object] = set()
    asked: set[str] = set()
    for seed in range(25):
        pc = Pc()
        prepare(pc)
        seen = exercise(pc, random.Random(seed), 800)
        vectors |= {entry for entry in seen if isinstance(entry, int)}
        asked |= {str(request) for request in pc.asked}
    assert {0x30, 0x34, 0xEC, 0x54} <= vectors
    assert {"reset", "shutdown"} <= asked
