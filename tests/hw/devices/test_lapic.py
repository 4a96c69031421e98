"""hw/devices/lapic: the local APIC.

Expected behaviour: [APM2] chapter 16: 16.3 (registers and offsets), 16.4 (local
interrupts, the timer), 16.5 (interprocessor interrupts), 16.6 (priorities, EOI),
16.4.7 (spurious vector, software enable).
"""

import pytest

from cbit.hw.devices import NEVER, VirtualClock
from cbit.hw.devices.lapic import LocalApic
from cbit.hw.devices.pic import Pic

ID, VERSION, TPR, PPR, EOI = 0x20, 0x30, 0x80, 0xA0, 0xB0
LDR, DFR, SVR, ISR, TMR, IRR, ESR = 0xD0, 0xE0, 0xF0, 0x100, 0x180, 0x200, 0x280
ICR, ICR_HIGH = 0x300, 0x310
TIMER, THERMAL, PERF, LINT0, LINT1, ERROR = range(0x320, 0x380, 0x10)
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC, ENABLE = 1 << 16, 1 << 17, 1 << 8
COUNT_NS = 10
"""The bus clock of 100 MHz, divided by 1."""


class Core:
    """The APIC with what surrounds it."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.pic = Pic(lambda: None)
        self.calls = 0
        self.ended: list[int] = []
        self.apic = LocalApic(self.clock, self.pic, self.changed)
        self.apic.on_eoi = self.ended.append

    def changed(self) -> None:
        self.calls += 1

    def read(self, offset: int) -> int:
        return int.from_bytes(self.apic.read(offset, 4), "little")

    def write(self, offset: int, value: int) -> None:
        self.apic.write(offset, value.to_bytes(4, "little"))

    def take_all(self) -> list[int]:
        """Take and end every interrupt that may be delivered."""
        vectors = []
        while self.apic.pending:
            vectors.append(self.apic.acknowledge())
            self.write(EOI, 0)
        return vectors

    def pass_counts(self, number: int, divisor: int = 1) -> None:
        self.clock.advance_to(self.clock.now + number * divisor * COUNT_NS)

    def raise_8259(self, irq: int) -> None:
        for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1)):
            self.pic.write_port(port, value, 1)
        self.pic.write_port(0x21, 0, 1)
        self.pic.set_line(irq, True)


@pytest.fixture
def core() -> Core:
    return Core()


def test_the_highest_vector_goes_first(core: Core) -> None:
    for vector in (0x31, 0xEC, 0x80):
        core.apic.request(vector)
    assert core.take_all() == [0xEC, 0x80, 0x31]


def test_the_class_in_service_keeps_its_own_class_waiting(core: Core) -> None:
    core.apic.request(0x42)
    assert core.apic.acknowledge() == 0x42
    core.apic.request(0x4F)  # higher, of the same class
    assert not core.apic.pending
    core.apic.request(0x50)
    assert core.apic.acknowledge() == 0x50
    core.write(EOI, 0)
    core.write(EOI, 0)
    assert core.apic.acknowledge() == 0x4F


def test_eoi_ends_the_highest_in_service(core: Core) -> None:
    core.apic.request(0x31)
    core.apic.acknowledge()
    core.apic.request(0x61)
    core.apic.acknowledge()
    core.write(EOI, 0)
    assert (core.read(ISR + 0x10), core.read(ISR + 0x30)) == (1 << 0x11, 0)


@pytest.mark.parametrize(
    ("tpr", "pending"), [(0x2F, True), (0x30, False), (0x3F, False), (0xF0, False)]
)
def test_the_task_priority_holds_back_its_class(
    core: Core, tpr: int, pending: bool
) -> None:
    core.write(TPR, tpr)
    core.apic.request(0x38)
    assert core.apic.pending is pending
    core.write(TPR, 0)
    assert core.apic.pending


@pytest.mark.parametrize(
    ("tpr", "serving", "ppr"),
    [(0x00, None, 0x00), (0x35, None, 0x35), (0x35, 0x4A, 0x40), (0x45, 0x4A, 0x45)],
)
def test_the_processor_priority_is_the_higher_of_two(
    core: Core, tpr: int, serving: int | None, ppr: int
) -> None:
    if serving:
        core.apic.request(serving)
        core.apic.acknowledge()
    core.write(TPR, tpr)
    assert core.read(PPR) == ppr


def test_requests_are_seen_in_irr_service_in_isr(core: Core) -> None:
    core.apic.request(0xEC)
    assert core.read(IRR + 0x70) == 1 << 0x0C
    core.apic.acknowledge()
    assert (core.read(IRR + 0x70), core.read(ISR + 0x70)) == (0, 1 << 0x0C)


def test_only_level_triggered_vectors_are_told_of_their_end(core: Core) -> None:
    core.apic.request(0x51, level=True)
    assert core.read(TMR + 0x20) == 1 << 0x11
    core.take_all()
    core.apic.request(0x51)
    assert core.read(TMR + 0x20) == 0
    core.take_all()
    assert core.ended == [0x51]


def test_an_end_without_service_is_nothing(core: Core) -> None:
    core.write(EOI, 0)
    assert core.ended == []


def test_the_listener_is_called_for_a_deliverable_request(core: Core) -> None:
    core.write(TPR, 0x40)
    core.calls = 0
    core.apic.request(0x30)
    assert core.calls == 0
    core.write(TPR, 0x20)
    assert core.calls > 0


def test_acknowledge_without_a_request_is_spurious(core: Core) -> None:
    core.write(SVR, ENABLE | 0xEF)
    assert core.apic.acknowledge() == 0xEF
    assert core.read(ISR + 0x70) == 0  # and puts nothing in service


@pytest.mark.parametrize(
    ("code", "divisor"),
    # [APM2] 16.4.1, divide configuration register: bits 3, 1, 0.
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)],
)
def test_one_shot_counts_down_once(core: Core, code: int, divisor: int) -> None:
    core.write(TIMER, 0xEC)
    core.write(DIVIDE, code)
    core.write(INITIAL, 1000)
    core.pass_counts(400, divisor)
    assert core.read(CURRENT) == 600
    core.pass_counts(599, divisor)
    assert (core.read(CURRENT), core.apic.pending) == (1, False)
    core.pass_counts(1, divisor)
    assert (core.read(CURRENT), core.take_all()) == (0, [0xEC])
    core.pass_counts(5000, divisor)
    assert (core.read(CURRENT), core.take_all()) == (0, [])


def test_periodic_interrupts_come_without_drift(core: Core) -> None:
    core.write(TIMER, PERIODIC | 0xEC)
    core.write(DIVIDE, 0xB)
    core.clock.advance_to(7)
    core.write(INITIAL, 333)
    times = []
    for _ in range(5000):
        core.clock.advance_to(core.clock.next_deadline)
        assert core.take_all() == [0xEC]
        times.append(core.clock.now)
    assert times == [7 + 3330 * n for n in range(1, 5001)]
    core.pass_counts(33)
    assert (core.read(CURRENT), core.read(INITIAL)) == (300, 333)


def test_a_periodic_timer_made_one_shot_ends_its_period(core: Core) -> None:
    core.write(TIMER, PERIODIC | 0xEC)
    core.write(DIVIDE, 0xB)
    core.write(INITIAL, 100)
    core.pass_counts(250)
    core.take_all()
    core.write(TIMER, 0xEC)
    assert core.read(CURRENT) == 50
    core.pass_counts(50)
    assert core.take_all() == [0xEC]
    assert core.clock.next_deadline == NEVER


def test_a_timer_that_has_run_out_stays_out_in_any_mode(core: Core) -> None:
    core.write(TIMER, 0xEC)
    core.write(INITIAL, 10)
    core.pass_counts(100)
    core.take_all()
    core.write(TIMER, PERIODIC | 0xEC)
    assert (core.read(CURRENT), core.clock.next_deadline) == (0, NEVER)


@pytest.mark.parametrize("periodic", [0, PERIODIC])
def test_another_divisor_goes_on_from_the_count(core: Core, periodic: int) -> None:
    core.write(TIMER, periodic | 0x40)
    core.write(DIVIDE, 0b1011)  # by 1
    core.write(INITIAL, 1000)
    core.pass_counts(400)
    core.write(DIVIDE, 0b0001)  # by 4
    assert core.read(CURRENT) == 600
    core.pass_counts(599, divisor=4)
    assert (core.read(CURRENT), core.take_all()) == (1, [])
    core.pass_counts(1, divisor=4)
    assert core.take_all() == [0x40]
    assert core.read(CURRENT) == (1000 if periodic else 0)


def test_a_masked_timer_counts_without_a_word(core: Core) -> None:
    core.write(TIMER, MASKED | PERIODIC | 0xEC)
    core.write(DIVIDE, 0xB)
    core.write(INITIAL, 100)
    core.pass_counts(130)
    assert (core.read(CURRENT), core.apic.pending) == (70, False)
    core.write(TIMER, PERIODIC | 0xEC)
    core.pass_counts(70)
    assert core.apic.pending


def test_an_initial_count_of_0_stops_the_timer(core: Core) -> None:
    core.write(TIMER, 0xEC)
    core.write(INITIAL, 100)
    core.write(INITIAL, 0)
    assert (core.read(CURRENT), core.clock.next_deadline) == (0, NEVER)


def test_software_disable_masks_the_local_vectors_for_good(core: Core) -> None:
    for lvt in range(TIMER, ERROR + 1, 0x10):
        core.write(lvt, 0x40)
    core.write(SVR, 0xFF)
    assert all(core.read(lvt) == MASKED | 0x40 for lvt in range(TIMER, 0x380, 0x10))
    core.write(TIMER, 0x40)  # the bit cannot be cleared
    assert core.read(TIMER) == MASKED | 0x40
    core.write(SVR, ENABLE | 0xFF)
    assert core.read(TIMER) == MASKED | 0x40
    core.write(TIMER, 0x40)
    assert core.read(TIMER) == 0x40


def test_software_disable_holds_what_waits_and_takes_nothing_new(core: Core) -> None:
    core.apic.request(0x41)
    core.write(SVR, 0xFF)
    assert not core.apic.request(0x51)
    assert not core.apic.pending
    core.write(SVR, ENABLE | 0xFF)
    assert core.take_all() == [0x41]


def test_extint_passes_the_8259_through_without_eoi(core: Core) -> None:
    core.raise_8259(4)  # LINT0 is ExtINT, as firmware leaves it
    assert core.apic.pending
    assert core.apic.acknowledge() == 0x34
    assert all(core.read(ISR + n * 0x10) == 0 for n in range(8))


def test_extint_does_not_look_at_the_task_priority(core: Core) -> None:
    core.raise_8259(4)
    core.write(TPR, 0xFF)
    assert core.apic.acknowledge() == 0x34


@pytest.mark.parametrize("lint0", [MASKED | 0x700, 0x030])
def test_without_extint_the_8259_is_not_heard(core: Core, lint0: int) -> None:
    core.raise_8259(4)
    core.write(LINT0, lint0)
    assert not core.apic.pending


def test_a_vector_of_the_apic_goes_before_extint(core: Core) -> None:
    core.raise_8259(4)
    core.apic.request(0x31)
    assert core.apic.acknowledge() == 0x31
    assert core.apic.acknowledge() == 0x34


SELF, EVERYBODY, OTHERS = 1 << 18, 2 << 18, 3 << 18


@pytest.mark.parametrize(
    ("command", "high", "vectors"),
    [
        (SELF | 0x61, 0, [0x61]),
        (EVERYBODY | 0x61, 0, [0x61]),
        (OTHERS | 0x61, 0, []),
        (0x61, 0x0000_0000, [0x61]),  # physical: our ID
        (0x61, 0x0100_0000, []),
        (0x61, 0xFF00_0000, [0x61]),  # all of them
        (0x861, 0x0200_0000, [0x61]),  # logical, flat: our bit
        (0x861, 0x0D00_0000, []),
        (0x161, 0x0000_0000, [0x61]),  # lowest priority of one core
        (SELF | 0x461, 0, []),  # NMI: not modelled
    ],
)
def test_interprocessor_interrupts_to_oneself(
    core: Core, command: int, high: int, vectors: list[int]
) -> None:
    core.write(LDR, 0x0200_0000)
    core.write(ICR_HIGH, high)
    core.write(ICR, command)
    assert core.take_all() == vectors
    assert core.read(ICR) & 1 << 12 == 0  # idle


def test_cluster_destinations_name_cluster_and_core(core: Core) -> None:
    core.write(DFR, 0)
    core.write(LDR, 0x3400_0000)
    for high, heard in (
        (0x3400_0000, True),
        (0x3300_0000, False),
        (0x2400_0000, False),
    ):
        core.write(ICR_HIGH, high)
        core.write(ICR, 0x861)
        assert bool(core.take_all()) is heard


def test_vectors_below_16_are_errors(core: Core) -> None:
    core.write(ERROR, 0xFE)
    core.apic.request(15)
    core.write(ICR, SELF | 3)
    assert core.take_all() == [0xFE]
    core.write(ESR, 0)
    assert core.read(ESR) == 0x60


def test_a_write_shows_the_errors_since_the_last_and_two_clear_them(core: Core) -> None:
    # Intel SDM volume 3, 10.5.3: write before reading; back-to-back writes clear.
    core.write(ICR, SELF | 3)
    assert core.read(ESR) == 0, "not yet"
    core.write(ESR, 0)
    core.apic.request(15)
    assert core.read(ESR) == 0x20
    core.write(ESR, 0)
    assert core.read(ESR) == 0x40
    core.write(ESR, 0)
    assert core.read(ESR) == 0


def test_registers_lie_at_16_byte_strides(core: Core) -> None:
    core.write(TPR, 0x25)
    assert core.apic.read(TPR, 4) == b"\x25\0\0\0"
    assert core.apic.read(TPR, 1) == b"\x25"
    assert core.apic.read(TPR + 4, 4) == bytes(4)
    core.apic.write(TPR + 4, b"\x77\0\0\0")
    core.apic.write(TPR, b"\x77")
    assert core.read(TPR) == 0x25


def test_identity(core: Core) -> None:
    assert core.read(VERSION) == 0x0005_0010
    assert core.read(SVR) == 0x1FF
    assert core.read(DFR) == 0xFFFF_FFFF
    core.write(DFR, 0)
    assert core.read(DFR) == 0x0FFF_FFFF
    core.write(ID, 0x0712_3456)
    assert core.read(ID) == 0x0700_0000


@pytest.mark.parametrize("offset", [VERSION, PPR, ISR, TMR, IRR, CURRENT])
def test_read_only_registers_ignore_stores(core: Core, offset: int) -> None:
    before = core.read(offset)
    core.write(offset, 0xFFFF_FFFF)
    assert core.read(offset) == before
    assert not core.apic.pending
