"""hw/devices/rtc: the MC146818 and the memory sizes in CMOS.

Expected behaviour: Motorola MC146818A data sheet, "Time, calendar, and alarm
locations" (table 3: ranges by mode) and "Registers"; dates from the host's calendar.
"""

import calendar
import random
from datetime import UTC, datetime, timedelta

import pytest

from cbit.hw.devices import VirtualClock
from cbit.hw.devices.rtc import Rtc
from cbit.hw.memory import MemoryMap

MIB, GIB = 1 << 20, 1 << 30
SECOND = 10**9
A, B, C, D = 0xA, 0xB, 0xC, 0xD
SET, BINARY, H24 = 0x80, 0x04, 0x02


class Board:
    """The chip on a board with `ram` bytes, at `date`."""

    def __init__(self, date: datetime, ram: int = 256 * MIB) -> None:
        self.clock = VirtualClock()
        epoch = calendar.timegm(date.timetuple())
        self.rtc = Rtc(self.clock, MemoryMap.pc(ram), epoch)

    def read(self, cell: int) -> int:
        self.rtc.write_port(0x70, cell, 1)
        return self.rtc.read_port(0x71, 1)

    def write(self, cell: int, value: int) -> None:
        self.rtc.write_port(0x70, cell, 1)
        self.rtc.write_port(0x71, value, 1)

    def date(self) -> list[int]:
        return [self.read(cell) for cell in (0x32, 9, 8, 7, 4, 2, 0)]


@pytest.fixture
def board() -> Board:
    return Board(datetime(2024, 2, 28, 23, 59, 58, tzinfo=UTC))


def test_bcd_and_24_hours_at_power_on(board: Board) -> None:
    assert board.read(B) == H24
    assert board.date() == [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x58]
    assert board.read(6) == 4  # Wednesday; Sunday is 1


def test_binary(board: Board) -> None:
    board.write(B, BINARY | H24)
    assert board.date() == [20, 24, 2, 28, 23, 59, 58]


def test_the_date_goes_on_with_the_clock(board: Board) -> None:
    board.clock.advance_to(2 * SECOND - 1)
    assert board.date()[-1] == 0x59
    board.clock.advance_to(2 * SECOND)
    assert board.date() == [0x20, 0x24, 0x02, 0x29, 0, 0, 0]
    board.clock.advance_to((2 + 86_400) * SECOND)
    assert board.date() == [0x20, 0x24, 0x03, 0x01, 0, 0, 0]


@pytest.mark.parametrize(
    ("hour", "bcd", "binary"),
    # Table 3: 01 to 12 and 81 to 92 (BCD), 01 to 0C and 81 to 8C (binary).
    [(0, 0x12, 0x0C), (1, 1, 1), (11, 0x11, 0x0B), (12, 0x92, 0x8C), (23, 0x91, 0x8B)],
)
def test_12_hours_have_a_bit_for_the_afternoon(
    hour: int, bcd: int, binary: int
) -> None:
    board = Board(datetime(2024, 1, 1, hour, tzinfo=UTC))
    board.write(B, 0)
    assert board.read(4) == bcd
    board.write(B, BINARY)
    assert board.read(4) == binary


def test_an_update_is_announced_in_the_last_244_us_of_a_second(board: Board) -> None:
    board.clock.advance_to(SECOND - 244_001)
    assert board.read(A) == 0x26
    board.clock.advance_to(SECOND - 244_000)
    assert board.read(A) == 0xA6
    board.write(B, SET | H24)  # no updates while the date is being set
    assert board.read(A) == 0x26
    board.write(B, H24)
    board.clock.advance_to(SECOND)
    assert board.read(A) == 0x26


def test_the_memory_is_valid_and_no_interrupt_waits(board: Board) -> None:
    board.write(D, 0)
    board.write(C, 0xFF)
    assert (board.read(D), board.read(C)) == (0x80, 0)


def test_cells_keep_what_is_written_and_the_nmi_bit_is_no_part_of_the_index(
    board: Board,
) -> None:
    board.write(0x80 | 0x40, 0x5A)
    assert board.read(0x40) == 0x5A
    assert board.rtc.read_port(0x70, 1) == 0xFF


@pytest.mark.parametrize(
    ("ram", "extended_kib", "above_16m", "above_4g"),
    # 64 KiB units from 16 MiB up to 3 GiB, and from 4 GiB up; KiB stop at 65535.
    [
        (2 * MIB, 1024, 0, 0),
        (256 * MIB, 65_535, 240 * 16, 0),
        (4 * GIB, 65_535, 3056 * 16, 1 << 14),
        (6 * GIB, 65_535, 3056 * 16, 3 << 14),
    ],
)
def test_memory_sizes(
    ram: int, extended_kib: int, above_16m: int, above_4g: int
) -> None:
    board = Board(datetime(2024, 1, 1, tzinfo=UTC), ram)

    def number(cell: int, size: int) -> int:
        return int.from_bytes(
            bytes(board.read(cell + n) for n in range(size)), "little"
        )

    assert number(0x15, 2) == 640
    assert number(0x17, 2) == number(0x30, 2) == extended_kib
    assert number(0x34, 2) == above_16m
    assert number(0x5B, 3) == above_4g


def test_law_the_date_is_the_calendars() -> None:
    for seed in range(25):
        rng = random.Random(seed)
        start = datetime(1999, 12, 31, 23, 59, tzinfo=UTC)
        start += timedelta(seconds=rng.randrange(3 * 10**9))
        board = Board(start)
        board.write(B, BINARY | H24)
        for _ in range(10):
            board.clock.advance_to(board.clock.now + rng.randrange(10**17))
            at = start + timedelta(seconds=board.clock.now // SECOND)
            assert board.date() == [
                *(at.year // 100, at.year % 100, at.month, at.day),
                *(at.hour, at.minute, at.second),
            ], seed
            assert board.read(6) == at.isoweekday() % 7 + 1, seed
