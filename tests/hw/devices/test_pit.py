"""hw/devices/pit: the 8254 and port 61h.

Expected behaviour: Intel 8254 data sheet (231164), "Control word format", "Read
operations", "Counter latch command", "Read-back command", "Mode definitions"; the
pulse that loads a count is left out. Port 61h: IBM PC/AT technical reference.
"""

import random
from fractions import Fraction

import pytest

from cbit.hw.devices import NEVER, VirtualClock
from cbit.hw.devices.pit import Pit

HZ = 1_193_182
CONTROL, SPEAKER = 0x43, 0x61


class Board:
    """A PIT and what its interrupt line did: rising edges, in nanoseconds."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.edges: list[int] = []
        self.high = False
        self.pit = Pit(self.clock, self.line)

    def line(self, high: bool) -> None:
        if high and not self.high:
            self.edges.append(self.clock.now)
        self.high = high

    def out(self, port: int, *values: int) -> None:
        for value in values:
            self.pit.write_port(port, value, 1)

    def read(self, port: int) -> int:
        return self.pit.read_port(port, 1)

    def start(self, channel: int, mode: int, count: int) -> None:
        self.out(CONTROL, channel << 6 | 0x30 | mode << 1)
        self.out(0x40 + channel, count & 0xFF, count >> 8)
        self.edges.clear()

    def pulses(self, number: int) -> None:
        """Go on to the first nanosecond at which so many more pulses are over."""
        now = self.clock.now * HZ // 10**9 + number
        self.clock.advance_to(-(-now * 10**9 // HZ))

    def count(self, channel: int) -> int:
        self.out(CONTROL, channel << 6)
        return self.read(0x40 + channel) | self.read(0x40 + channel) << 8

    def status(self, channel: int) -> int:
        self.out(CONTROL, 0xE0 | 2 << channel)
        return self.read(0x40 + channel)

    def out_pin(self, channel: int) -> int:
        return self.status(channel) >> 7


@pytest.fixture
def board() -> Board:
    return Board()


def test_mode_0_the_output_rises_once_at_the_end_of_the_count(board: Board) -> None:
    board.start(0, 0, 100)
    assert board.out_pin(0) == 0
    board.pulses(99)
    assert (board.out_pin(0), board.count(0), board.edges) == (0, 1, [])
    board.pulses(1)
    assert (board.out_pin(0), board.count(0)) == (1, 0)
    board.pulses(1)
    assert board.count(0) == 0xFFFF  # it goes on counting
    board.pulses(70_000)
    assert board.edges == [100 * 10**9 // HZ]


def test_mode_0_a_new_count_lowers_the_output_again(board: Board) -> None:
    board.start(0, 0, 10)
    board.pulses(20)
    assert board.high
    board.out(0x40, 10, 0)
    assert (board.out_pin(0), board.high) == (0, False)
    board.pulses(10)
    assert board.out_pin(0) == 1
    assert len(board.edges) == 2


def test_mode_2_counts_n_to_1_and_is_low_for_one_pulse(board: Board) -> None:
    board.start(0, 2, 3)
    seen = []
    for _ in range(7):
        seen.append((board.count(0), board.out_pin(0)))
        board.pulses(1)
    assert seen == [(3, 1), (2, 1), (1, 0)] * 2 + [(3, 1)]


@pytest.mark.parametrize(
    ("count", "cycle"),
    [
        (4, [(4, 1), (2, 1), (4, 0), (2, 0)]),
        # Odd: count - 1 is loaded; high for (n + 1) / 2 pulses.
        (5, [(4, 1), (2, 1), (0, 1), (4, 0), (2, 0)]),
    ],
)
def test_mode_3_counts_by_two_with_half_a_cycle_high(
    board: Board, count: int, cycle: list[tuple[int, int]]
) -> None:
    board.start(0, 3, count)
    seen = []
    for _ in range(2 * count):
        seen.append((board.count(0), board.out_pin(0)))
        board.pulses(1)
    assert seen == cycle * 2


def test_mode_4_strobes_low_for_one_pulse_after_the_count(board: Board) -> None:
    board.start(0, 4, 50)
    pins = []
    for step in (0, 49, 1, 1, 5):
        board.pulses(step)
        pins.append(board.out_pin(0))
    assert pins == [1, 1, 0, 1, 1]
    board.pulses(100_000)
    assert board.edges == [51 * 10**9 // HZ]
    assert board.clock.next_deadline == NEVER


@pytest.mark.parametrize("mode", [1, 5])
def test_modes_1_and_5_wait_for_the_gate(board: Board, mode: int) -> None:
    board.start(2, mode, 10)
    board.pulses(30)
    assert board.out_pin(2) == 1
    board.out(SPEAKER, 1)
    board.pulses(9)
    assert board.out_pin(2) == (mode == 5)
    board.pulses(1)
    assert board.out_pin(2) == (mode == 1)
    board.out(SPEAKER, 0)  # the level of the gate does not matter
    board.pulses(1)
    assert board.out_pin(2) == 1


def test_a_count_of_0_is_65536(board: Board) -> None:
    board.start(0, 2, 0)
    board.pulses(65_535)
    assert (board.count(0), board.edges) == (1, [])
    board.pulses(1)
    assert board.count(0) == 0


def test_modes_6_and_7_are_2_and_3(board: Board) -> None:
    for mode in (6, 7):
        board.start(0, mode, 100)
        assert board.status(0) >> 1 & 7 == mode - 4


@pytest.mark.parametrize("reload", [1, 2, 1193, 4772, 11_932, 65_535, 65_536])
def test_the_nth_interrupt_of_a_long_run_comes_without_drift(reload: int) -> None:
    clock = VirtualClock()
    ticks: list[int] = []
    pit = Pit(clock, lambda high: ticks.append(clock.now) if high else None)
    clock.advance_to(123_457)
    for value in (0x34, reload & 0xFF, reload >> 8 & 0xFF):
        pit.write_port(CONTROL if value == 0x34 else 0x40, value, 1)
    ticks.clear()
    number = 20_000
    clock.advance_to(123_457 + number * reload * 10**9 // HZ)
    exact = [
        123_457 + int(Fraction(n * reload * 10**9, HZ)) for n in range(1, number + 1)
    ]
    assert sorted(set(ticks)) == exact


def test_at_the_interrupt_the_counter_has_just_been_reloaded() -> None:
    clock = VirtualClock()
    moments: list[int] = []
    pit = Pit(clock, lambda high: moments.append(clock.now) if high else None)
    for port, value in ((CONTROL, 0x34), (0x40, 0x34), (0x40, 0x12)):
        pit.write_port(port, value, 1)
    moments.clear()
    counts = set()
    for _ in range(100):
        clock.advance_to(clock.next_deadline)
        counts.add((pit.read_port(0x40, 1), pit.read_port(0x40, 1)))
    assert (counts, len(set(moments))) == ({(0x34, 0x12)}, 100)


def test_a_control_word_stops_the_interrupts(board: Board) -> None:
    board.start(0, 2, 1000)
    board.out(CONTROL, 0x30)
    board.pulses(100_000)
    assert board.edges == []
    assert board.clock.next_deadline == NEVER


def test_a_latched_count_stays_until_it_is_read(board: Board) -> None:
    board.start(0, 2, 0x8000)
    board.pulses(0x100)
    board.out(CONTROL, 0x00)
    board.pulses(0x100)
    board.out(CONTROL, 0x00)  # the second latch is ignored
    assert (board.read(0x40), board.read(0x40)) == (0x00, 0x7F)
    assert (board.read(0x40), board.read(0x40)) == (0x00, 0x7E)


def test_reprogramming_drops_a_latched_count(board: Board) -> None:
    board.start(0, 2, 0x8000)
    board.out(CONTROL, 0x00)
    board.start(0, 2, 0x1111)
    assert (board.read(0x40), board.read(0x40)) == (0x11, 0x11)


def test_one_byte_access_writes_and_reads_one_byte(board: Board) -> None:
    board.out(CONTROL, 0x14)  # low byte, mode 2
    board.out(0x40, 0x20)
    board.pulses(1)
    assert [board.read(0x40), board.read(0x40)] == [0x1F, 0x1F]
    board.out(CONTROL, 0x24)  # high byte
    board.out(0x40, 0x20)
    board.pulses(1)
    assert [board.read(0x40), board.read(0x40)] == [0x1F, 0x1F]
    assert board.count(0) == 0x1F1F  # 1FFFh: the byte that is read is the high one


def test_counting_starts_with_the_second_byte(board: Board) -> None:
    board.out(CONTROL, 0x30, 0xB0)
    board.out(0x42, 0x10)
    assert board.status(2) >> 6 & 1 == 1  # null count
    board.out(0x42, 0x00)
    assert board.status(2) >> 6 & 1 == 0


def test_a_control_word_starts_with_the_low_byte_and_no_count(board: Board) -> None:
    assert board.status(0) == 0xF6  # OUT, null count, lobyte/hibyte, mode 3
    board.start(0, 2, 0x1234)
    board.out(0x40, 0x55)  # half a count
    board.read(0x40)  # and half a reading
    board.out(CONTROL, 0x34)
    assert board.status(0) == 0xF4
    board.out(0x40, 0x22, 0x11)
    assert (board.read(0x40), board.read(0x40)) == (0x22, 0x11)


def test_a_latched_byte_is_read_once(board: Board) -> None:
    board.out(CONTROL, 0x14)
    board.out(0x40, 0x80)
    board.out(CONTROL, 0x00)
    board.pulses(0x10)
    assert [board.read(0x40), board.read(0x40)] == [0x80, 0x70]


def test_at_power_on_the_line_is_high_as_the_output_is(board: Board) -> None:
    assert board.high
    board.out(CONTROL, 0x34)
    assert board.high
    board.out(CONTROL, 0x30)
    assert not board.high


def test_read_back_gives_status_then_count(board: Board) -> None:
    board.start(0, 3, 0x4000)
    board.pulses(0x10)
    board.out(CONTROL, 0xC2)
    board.pulses(0x10)
    answer = [board.read(0x40) for _ in range(3)]
    assert answer == [0xB6, 0xE0, 0x3F]  # out, lobyte/hibyte, mode 3; 3FE0h


def test_read_back_latches_several_counters_at_once(board: Board) -> None:
    board.start(0, 2, 0x1000)
    board.start(1, 2, 0x2000)
    board.pulses(1)
    board.out(CONTROL, 0xDE)
    board.pulses(5)
    got = [board.read(port) | board.read(port) << 8 for port in (0x40, 0x41)]
    assert got == [0x0FFF, 0x1FFF]


def test_the_first_of_two_status_latches_counts(board: Board) -> None:
    board.start(0, 0, 100)
    board.out(CONTROL, 0xE2)
    board.pulses(200)
    board.out(CONTROL, 0xE2)
    assert board.read(0x40) == 0x30  # OUT was low


def test_the_control_word_cannot_be_read(board: Board) -> None:
    assert board.read(CONTROL) == 0xFF


def test_bit_5_of_port_61h_is_the_output_of_channel_2(board: Board) -> None:
    # As a kernel measures its time-stamp counter.
    board.out(SPEAKER, 1)
    board.start(2, 0, 0xFFFF)
    board.pulses(0xFFFE)
    assert board.read(SPEAKER) & 0x2F == 0x01
    board.pulses(1)
    assert board.read(SPEAKER) & 0x2F == 0x21


def test_mode_0_pauses_while_the_gate_is_closed(board: Board) -> None:
    board.out(SPEAKER, 1)
    board.start(2, 0, 100)
    board.pulses(40)
    board.out(SPEAKER, 0)
    board.pulses(1000)
    assert board.count(2) == 60
    board.out(SPEAKER, 1)
    assert board.count(2) == 60
    board.pulses(59)
    assert board.read(SPEAKER) & 0x20 == 0
    board.pulses(2)
    assert board.read(SPEAKER) & 0x20


def test_mode_0_may_be_loaded_while_the_gate_is_closed(board: Board) -> None:
    board.start(2, 0, 100)
    board.pulses(500)
    assert board.count(2) == 100
    board.out(SPEAKER, 1)
    board.pulses(101)
    assert board.read(SPEAKER) & 0x20


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_modes_start_again_when_the_gate_opens(
    board: Board, mode: int
) -> None:
    board.out(SPEAKER, 1)
    board.start(2, mode, 100)
    board.pulses(99)
    assert board.out_pin(2) == 0
    board.out(SPEAKER, 0)
    assert board.out_pin(2) == 1  # at once
    board.out(SPEAKER, 1)
    assert board.count(2) == 100


def test_port_61h_keeps_four_bits_and_shows_the_refresh(board: Board) -> None:
    board.out(SPEAKER, 0xFF)
    assert board.read(SPEAKER) & 0xCF == 0x0F
    bits = set()
    for _ in range(40):
        bits.add(board.read(SPEAKER) >> 4 & 1)
        board.clock.advance_to(board.clock.now + 5_000)
    assert bits == {0, 1}


def test_law_reading_the_counter_never_runs_backwards() -> None:
    for seed in range(25):
        rng = random.Random(seed)
        board = Board()
        reload = rng.randrange(2, 0x1_0000)
        board.start(0, 2, reload)
        start = board.clock.now
        for _ in range(50):
            board.clock.advance_to(board.clock.now + rng.randrange(2_000_000))
            # Pulse n is over at floor(n * 10**9 / HZ).
            gone = (board.clock.now - start + 1) * HZ // 10**9
            if int(Fraction(gone * 10**9, HZ)) > board.clock.now - start:
                gone -= 1
            assert board.count(0) == (reload - gone % reload) & 0xFFFF, seed
