"""hw/devices/power: how a guest ends, and the PM timer.

Expected behaviour: ACPI specification 6.4, 4.8.3 (PM1 status, enable, control: SLP_EN
and GBL_RLS are write-only), 4.8.3.3 (PM timer, 3.579545 MHz, 24 bits); keyboard
controller FEh, port 92h: IBM PS/2 technical reference; CF9h: Intel 82371AB, RC.
"""

import pytest

from cbit.hw.devices import VirtualClock
from cbit.hw.devices.power import PowerManagement, ResetLines, Sink

STATUS, ENABLE, CONTROL, TIMER = 0x600, 0x602, 0x604, 0x608
SLEEP_ENABLE = 1 << 13


class Asked:
    """Both devices, and what they asked for."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.asked: list[tuple[str, int]] = []
        self.power = PowerManagement(self.clock, self.ask)
        self.resets = ResetLines(self.ask)

    def ask(self, what: str, code: int) -> None:
        self.asked.append((what, code))


@pytest.fixture
def board() -> Asked:
    return Asked()


@pytest.mark.parametrize("kind", range(8))
def test_sleep_enable_with_type_5_switches_off(board: Asked, kind: int) -> None:
    board.power.write_port(CONTROL, kind << 10, 2)
    assert board.asked == []
    board.power.write_port(CONTROL, kind << 10 | SLEEP_ENABLE, 2)
    assert board.asked == ([("shutdown", 0)] if kind == 5 else [])


def test_acpi_mode_is_on_and_write_only_bits_read_as_0(board: Asked) -> None:
    assert board.power.read_port(CONTROL, 2) == 1
    board.power.write_port(CONTROL, 0xDFFF, 2)
    assert board.power.read_port(CONTROL, 2) == 0x1C03


def test_enables_read_back_and_no_event_is_pending(board: Asked) -> None:
    board.power.write_port(ENABLE, 0x0321, 2)
    assert board.power.read_port(ENABLE, 2) == 0x0321
    assert board.power.read_port(STATUS, 2) == 0
    assert board.power.read_port(STATUS, 4) == 0x0321_0000
    board.power.write_port(STATUS, 0x0120_FFFF, 4)
    assert board.power.read_port(STATUS, 4) == 0x0120_0000


def test_the_pm_timer_counts_3579545_in_a_second(board: Asked) -> None:
    board.clock.advance_to(10**9)
    assert board.power.read_port(TIMER, 4) == 3_579_545
    assert board.power.read_port(TIMER + 1, 1) == 3_579_545 >> 8 & 0xFF


def test_the_pm_timer_has_24_bits(board: Asked) -> None:
    board.clock.advance_to(-(-((1 << 24) + 5) * 10**9 // 3_579_545))
    assert board.power.read_port(TIMER, 4) == 5


@pytest.mark.parametrize(
    ("port", "value", "asked"),
    [
        (0x64, 0xFE, [("reset", 0)]),
        (0x64, 0xAA, []),
        (0x60, 0xFE, []),
        (0x92, 0x01, [("reset", 0)]),
        (0x92, 0x02, []),
        (0xCF9, 0x02, []),
        (0xCF9, 0x06, [("reset", 0)]),
        (0xCF9, 0x0E, [("reset", 0)]),
        (0xF4, 0, [("exit", 0)]),
        (0xF4, 31, [("exit", 31)]),
        (0xF4, 0x1FF, [("exit", 0xFF)]),
    ],
)
def test_reset_and_exit(
    board: Asked, port: int, value: int, asked: list[tuple[str, int]]
) -> None:
    board.resets.write_port(port, value, 1)
    assert board.asked == asked


def test_there_is_no_keyboard_controller_and_a20_is_on(board: Asked) -> None:
    assert board.resets.read_port(0x64, 1) == 0xFF
    assert board.resets.read_port(0x92, 1) == 2
    board.resets.write_port(0x92, 0, 1)
    assert board.resets.read_port(0x92, 1) == 0
    assert board.resets.read_port(0xCF9, 1) == 0


def test_the_debug_console_hands_bytes_on_and_answers_e9() -> None:
    out = bytearray()
    console = Sink(out.extend)
    console.write_port(0xE9, 0x141, 2)
    assert (bytes(out), console.read_port(0xE9, 1)) == (b"A", 0xE9)
