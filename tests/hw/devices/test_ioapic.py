"""hw/devices/ioapic: the I/O APIC.

Expected behaviour: Intel 82093AA data sheet (290566), 3.1 (memory mapped registers)
and 3.2 (APIC registers). IRQ 0 at input 2: MultiProcessor
Specification 1.4, default configurations.
"""

import pytest

from cbit.hw.devices import VirtualClock
from cbit.hw.devices.ioapic import IoApic
from cbit.hw.devices.lapic import LocalApic
from cbit.hw.devices.pic import Pic

MASKED, LEVEL, REMOTE_IRR = 1 << 16, 1 << 15, 1 << 14
EOI, SVR = 0xB0, 0xF0


class Board:
    """Both APICs."""

    def __init__(self) -> None:
        self.local = LocalApic(VirtualClock(), Pic(lambda: None), lambda: None)
        self.chip = IoApic(self.local)

    def read(self, index: int) -> int:
        self.chip.write(0x00, bytes([index, 0, 0, 0]))
        return int.from_bytes(self.chip.read(0x10, 4), "little")

    def write(self, index: int, value: int) -> None:
        self.chip.write(0x00, bytes([index, 0, 0, 0]))
        self.chip.write(0x10, value.to_bytes(4, "little"))

    def entry(self, number: int, low: int) -> None:
        self.write(0x10 + 2 * number, low)

    def end(self) -> None:
        self.local.write(EOI, bytes(4))

    def take(self) -> int | None:
        return self.local.acknowledge() if self.local.pending else None


@pytest.fixture
def board() -> Board:
    return Board()


def test_select_and_window(board: Board) -> None:
    board.write(0x12, 0x0001_0042)
    board.write(0x14, 0x0001_0043)
    assert board.chip.read(0x00, 4) == b"\x14\0\0\0"
    assert (board.read(0x12), board.read(0x14)) == (0x0001_0042, 0x0001_0043)
    assert board.chip.read(0x20, 4) == bytes(4)


def test_identity(board: Board) -> None:
    assert board.read(1) == 0x0017_0011  # 24 entries, version 11h
    board.write(0, 0xF5FF_FFFF)
    assert (board.read(0), board.read(2)) == (0x0500_0000, 0x0500_0000)
    assert board.chip.read(0x10, 1) == b"\0"
    board.write(1, 0)
    assert board.read(1) == 0x0017_0011


def test_entries_come_up_masked_and_keep_what_can_be_written(board: Board) -> None:
    assert {board.read(0x10 + 2 * n) for n in range(24)} == {MASKED}
    assert {board.read(0x11 + 2 * n) for n in range(24)} == {0}
    board.write(0x3E, 0xFFFF_FFFF)
    board.write(0x3F, 0xFFFF_FFFF)
    # Delivery status and remote IRR are read-only, the rest is reserved.
    assert (board.read(0x3E), board.read(0x3F)) == (0x1_AFFF, 0xFF00_0000)
    assert board.read(0x40) == 0


def test_an_edge_gives_one_interrupt(board: Board) -> None:
    board.entry(4, 0x44)
    board.chip.set_irq(4, True)
    assert board.take() == 0x44
    board.end()
    board.chip.set_irq(4, True)
    assert board.take() is None
    board.chip.set_irq(4, False)
    board.chip.set_irq(4, True)
    assert board.take() == 0x44


def test_irq_0_arrives_at_input_2_and_the_cascade_nowhere(board: Board) -> None:
    board.entry(0, 0x40)
    board.entry(2, 0x42)
    board.chip.set_irq(2, True)
    assert board.take() is None
    board.chip.set_irq(0, True)
    assert board.take() == 0x42


def test_an_edge_at_a_masked_input_is_lost(board: Board) -> None:
    board.entry(4, MASKED | 0x44)
    board.chip.set_irq(4, True)
    board.entry(4, 0x44)
    assert board.take() is None


def test_a_level_asks_again_after_eoi_while_it_lasts(board: Board) -> None:
    board.entry(9, LEVEL | 0x49)
    board.chip.set_irq(9, True)
    assert board.read(0x22) == LEVEL | REMOTE_IRR | 0x49
    assert board.take() == 0x49
    assert board.take() is None
    board.end()
    assert board.take() == 0x49
    board.chip.set_irq(9, False)
    assert board.read(0x22) & REMOTE_IRR  # until it is ended
    board.end()
    assert board.read(0x22) == LEVEL | 0x49
    assert board.take() is None


def test_the_end_of_another_vector_leaves_remote_irr(board: Board) -> None:
    board.entry(9, LEVEL | 0x49)
    board.entry(4, 0x84)
    board.chip.set_irq(9, True)
    board.chip.set_irq(4, True)
    assert board.take() == 0x84
    board.end()
    assert board.read(0x22) & REMOTE_IRR


def test_each_level_waits_for_the_end_of_its_own_vector(board: Board) -> None:
    board.entry(9, LEVEL | 0x49)
    board.entry(10, LEVEL | 0x5A)
    board.chip.set_irq(9, True)
    board.chip.set_irq(10, True)
    assert board.take() == 0x5A
    board.chip.set_irq(10, False)
    board.end()
    assert (board.read(0x22), board.read(0x24)) == (
        LEVEL | REMOTE_IRR | 0x49,
        LEVEL | 0x5A,
    )


def test_an_entry_written_again_keeps_remote_irr_and_destination(board: Board) -> None:
    board.write(0x23, 0x0700_0000)
    board.entry(9, LEVEL | 0x49)
    board.chip.set_irq(9, True)
    assert board.take() == 0x49
    board.entry(9, LEVEL | 0x49)
    assert board.read(0x22) & REMOTE_IRR
    assert board.read(0x23) == 0x0700_0000
    board.chip.set_irq(9, False)
    board.end()
    assert board.take() is None


def test_a_level_that_nobody_accepts_leaves_no_remote_irr(board: Board) -> None:
    board.entry(9, LEVEL | 0x400)  # NMI
    board.chip.set_irq(9, True)
    assert board.read(0x22) == LEVEL | 0x400


def test_a_level_at_a_masked_input_asks_once_unmasked(board: Board) -> None:
    board.entry(9, MASKED | LEVEL | 0x49)
    board.chip.set_irq(9, True)
    assert board.take() is None
    board.entry(9, LEVEL | 0x49)
    assert board.take() == 0x49


def test_a_change_to_edge_and_back_clears_remote_irr(board: Board) -> None:
    # How a kernel ends an interrupt where there is no EOI register:
    # Linux 6.1.192 arch/x86/kernel/apic/io_apic.c, __eoi_ioapic_pin().
    board.entry(9, LEVEL | 0x49)
    board.chip.set_irq(9, True)
    board.chip.set_irq(9, False)
    board.entry(9, MASKED | 0x49)
    board.entry(9, MASKED | LEVEL | 0x49)
    assert board.read(0x22) == MASKED | LEVEL | 0x49


def test_remote_irr_wants_an_apic_that_accepts(board: Board) -> None:
    board.local.write(SVR, b"\xff\0\0\0")  # software disabled
    board.entry(9, LEVEL | 0x49)
    board.chip.set_irq(9, True)
    assert board.read(0x22) == LEVEL | 0x49


@pytest.mark.parametrize(
    ("mode", "taken"),
    [(0, True), (1, True), (2, False), (4, False), (5, False), (7, False)],
)
def test_fixed_and_lowest_priority_carry_vectors(
    board: Board, mode: int, taken: bool
) -> None:
    board.entry(4, mode << 8 | 0x44)
    board.chip.set_irq(4, True)
    assert (board.take() == 0x44) is taken
