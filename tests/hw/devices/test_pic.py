"""hw/devices/pic: the 8259A pair.

Expected behaviour: Intel 8259A data sheet (231468), sections "Interrupt sequence",
"Initialization command words", "Operation command words", "Fully nested mode",
"End of interrupt", "Automatic rotation", "Special mask mode", "Poll command",
"Reading the 8259A status", "Edge and level triggered modes", "Special fully nested
mode", "Cascade mode"; ELCR: Intel 82371AB data sheet (290562), 4D0h and 4D1h.
"""

import pytest

from cbit.hw.devices.pic import Pic

MASTER, SLAVE = 0x20, 0xA0
EOI, ROTATE_EOI = 0x20, 0xA0


def out(pic: Pic, port: int, *values: int) -> None:
    for value in values:
        pic.write_port(port, value, 1)


def programmed(icw4: int = 1, slave_icw4: int = 1) -> Pic:
    """Return a pair set up as a PC's kernel does, nothing masked."""
    pic = Pic(lambda: None)
    out(pic, MASTER, 0x11)
    out(pic, MASTER + 1, 0x30, 0x04, icw4, 0)
    out(pic, SLAVE, 0x11)
    out(pic, SLAVE + 1, 0x38, 0x02, slave_icw4, 0)
    return pic


def raise_lines(pic: Pic, *irqs: int) -> None:
    for irq in irqs:
        pic.set_line(irq, True)


def in_service(pic: Pic, port: int = MASTER) -> int:
    out(pic, port, 0x0B)
    return pic.read_port(port, 1)


def requested(pic: Pic, port: int = MASTER) -> int:
    out(pic, port, 0x0A)
    return pic.read_port(port, 1)


def test_before_initialisation_nothing_interrupts() -> None:
    pic = Pic(lambda: None)
    raise_lines(pic, *range(16))
    assert not pic.pending


def test_input_0_has_the_highest_priority() -> None:
    pic = programmed()
    raise_lines(pic, 5, 1, 3)
    vectors = []
    while pic.pending:
        vectors.append(pic.acknowledge())
        out(pic, MASTER, EOI)
    assert vectors == [0x31, 0x33, 0x35]


def test_vectors_take_five_bits_of_icw2() -> None:
    pic = programmed()
    out(pic, MASTER, 0x11)
    out(pic, MASTER + 1, 0x47, 4, 1)
    raise_lines(pic, 3)
    assert pic.acknowledge() == 0x43


def test_an_interrupt_in_service_keeps_its_own_and_lower_inputs_waiting() -> None:
    pic = programmed()
    raise_lines(pic, 3)
    assert pic.acknowledge() == 0x33
    raise_lines(pic, 4)
    pic.set_line(3, False)
    raise_lines(pic, 3)
    assert not pic.pending
    raise_lines(pic, 1)
    assert pic.acknowledge() == 0x31
    assert in_service(pic) == 0b1010


def test_the_mask_reads_back_and_a_masked_request_stays() -> None:
    pic = programmed()
    out(pic, MASTER + 1, 0x5A)
    out(pic, SLAVE + 1, 0xA5)
    assert (pic.read_port(0x21, 1), pic.read_port(0xA1, 1)) == (0x5A, 0xA5)
    raise_lines(pic, 1)
    assert not pic.pending
    assert requested(pic) == 0b10
    out(pic, MASTER + 1, 0)
    assert pic.acknowledge() == 0x31


def test_icw1_clears_the_mask_and_wants_edges_again() -> None:
    pic = programmed()
    raise_lines(pic, 1)
    out(pic, MASTER + 1, 0xFF)
    out(pic, MASTER, 0x11)
    out(pic, MASTER + 1, 0x30, 4, 1)
    assert pic.read_port(0x21, 1) == 0
    assert not pic.pending  # the line is still high
    pic.set_line(1, False)
    raise_lines(pic, 1)
    assert pic.pending


def test_icw1_takes_back_what_was_chosen_before() -> None:
    # Data sheet, ICW1: IR7 is the lowest, special mask mode is off, status reads IRR;
    # without IC4 all functions of ICW4 are off.
    pic = programmed(icw4=0x13)
    out(pic, MASTER, 0xC0 | 3, 0x80, 0x68, 0x0F)
    out(pic, MASTER, 0x10)
    out(pic, MASTER + 1, 0x30, 4, 0)
    raise_lines(pic, 1, 6)
    assert pic.read_port(MASTER, 1) == 0b100_0010
    assert pic.acknowledge() == 0x31
    assert in_service(pic) == 0b10
    out(pic, MASTER + 1, 0b10)
    assert not pic.pending  # 1 is masked and in service, and holds 6 back
    pic.set_line(8, True)
    assert not pic.pending


def test_without_ic4_and_with_sngl_icw2_is_the_last_word() -> None:
    pic = Pic(lambda: None)
    out(pic, MASTER, 0x12)
    out(pic, MASTER + 1, 0x50, 0xEF)  # the second is a mask already
    assert pic.read_port(0x21, 1) == 0xEF


def test_cascade_the_slave_comes_in_at_input_2() -> None:
    pic = programmed()
    raise_lines(pic, 3, 12, 9)
    assert pic.acknowledge() == 0x39
    assert (in_service(pic), in_service(pic, SLAVE)) == (0b100, 0b10)
    assert not pic.pending  # 12 waits in the slave, 3 is lower than 2
    out(pic, SLAVE, EOI)
    out(pic, MASTER, EOI)
    assert pic.acknowledge() == 0x3C
    out(pic, SLAVE, EOI)
    out(pic, MASTER, EOI)
    assert pic.acknowledge() == 0x33


def test_cascade_a_mask_on_input_2_closes_the_slave() -> None:
    pic = programmed()
    out(pic, MASTER + 1, 0x04)
    raise_lines(pic, 8)
    assert not pic.pending


def test_an_end_that_is_not_specific_ends_the_highest() -> None:
    pic = programmed()
    for irq in (6, 4, 1):
        raise_lines(pic, irq)
        pic.acknowledge()
    out(pic, MASTER, EOI)
    assert in_service(pic) == 0b101_0000
    out(pic, MASTER, EOI)
    assert in_service(pic) == 0b100_0000


def test_a_specific_end_names_the_input() -> None:
    pic = programmed()
    for irq in (6, 4, 1):
        raise_lines(pic, irq)
        pic.acknowledge()
    out(pic, MASTER, 0x60 | 4)
    assert in_service(pic) == 0b100_0010
    out(pic, MASTER, 0x40 | 1)  # OCW2 010: no operation
    assert in_service(pic) == 0b100_0010


def test_automatic_end_leaves_nothing_in_service() -> None:
    pic = programmed(icw4=3)
    raise_lines(pic, 4)
    assert pic.acknowledge() == 0x34
    assert in_service(pic) == 0
    raise_lines(pic, 5)
    assert pic.acknowledge() == 0x35


def test_automatic_end_in_the_slave_serves_both_requests() -> None:
    pic = programmed(icw4=3, slave_icw4=3)
    raise_lines(pic, 9, 12)
    assert [pic.acknowledge(), pic.acknowledge()] == [0x39, 0x3C]
    assert not pic.pending


def test_a_request_that_does_not_last_becomes_spurious_7() -> None:
    # "If the IR input goes low before this time a DEFAULT IR7 will occur".
    pic = programmed()
    raise_lines(pic, 4)
    pic.set_line(4, False)
    assert not pic.pending
    assert pic.acknowledge() == 0x37
    assert in_service(pic) == 0  # that is how software tells it from a real one


def test_a_slave_that_has_changed_its_mind_gives_spurious_15() -> None:
    pic = programmed()
    raise_lines(pic, 10)
    pic.slave.imr = 0xFF  # between the two acknowledge pulses
    assert pic.acknowledge() == 0x3F
    assert (in_service(pic), in_service(pic, SLAVE)) == (0b100, 0)


def test_rotation_on_an_end_makes_the_input_the_lowest() -> None:
    pic = programmed()
    raise_lines(pic, 4, 6)
    assert pic.acknowledge() == 0x34
    out(pic, MASTER, ROTATE_EOI)  # the data sheet's figure: IR4 becomes the lowest
    pic.set_line(4, False)
    raise_lines(pic, 4, 5, 3)
    order = []
    while pic.pending:
        order.append(pic.acknowledge() & 7)
        out(pic, MASTER, EOI)
    assert order == [5, 6, 3, 4]


def test_rotation_on_a_specific_end() -> None:
    pic = programmed()
    raise_lines(pic, 2 + 1)
    pic.acknowledge()
    out(pic, MASTER, 0xE0 | 3)
    raise_lines(pic, 0, 4)
    assert pic.acknowledge() == 0x34
    assert in_service(pic) == 0b1_0000


def test_the_priority_can_be_set_without_an_end() -> None:
    pic = programmed()
    out(pic, MASTER, 0xC0 | 5)  # IR5 lowest, IR6 highest
    raise_lines(pic, 0, 5, 7)
    order = []
    while pic.pending:
        order.append(pic.acknowledge() & 7)
        out(pic, MASTER, EOI)
    assert order == [7, 0, 5]


def test_rotation_with_automatic_end_is_switched_on_and_off() -> None:
    pic = programmed(icw4=3)
    out(pic, MASTER, 0x80)
    raise_lines(pic, 0, 1)
    assert pic.acknowledge() == 0x30
    pic.set_line(0, False)
    raise_lines(pic, 0)
    assert pic.acknowledge() == 0x31  # 0 is the lowest now
    out(pic, MASTER, 0x00)
    assert pic.acknowledge() == 0x30
    pic.set_line(5, True)
    assert pic.acknowledge() == 0x35
    pic.set_line(1, False)
    raise_lines(pic, 1, 3)
    assert pic.acknowledge() == 0x33  # still turned to 2 first: nothing rotates


def test_special_mask_mode_lets_lower_inputs_through() -> None:
    pic = programmed()
    raise_lines(pic, 3)
    pic.acknowledge()
    raise_lines(pic, 6)
    assert not pic.pending
    out(pic, MASTER, 0x68)
    out(pic, MASTER + 1, 0b1000)
    assert pic.acknowledge() == 0x36
    out(pic, MASTER, EOI)
    assert in_service(pic) == 0b1000  # a masked one is not ended
    out(pic, MASTER, 0x48)
    out(pic, MASTER, EOI)
    assert in_service(pic) == 0


def test_special_fully_nested_the_slave_may_interrupt_itself() -> None:
    pic = programmed(icw4=0x11)
    raise_lines(pic, 12)
    assert pic.acknowledge() == 0x3C
    raise_lines(pic, 9)
    assert pic.acknowledge() == 0x39


def test_fully_nested_the_slave_may_not() -> None:
    pic = programmed()
    raise_lines(pic, 12)
    assert pic.acknowledge() == 0x3C
    raise_lines(pic, 9)
    assert not pic.pending


def test_a_poll_answers_once_and_takes_the_request() -> None:
    pic = programmed()
    raise_lines(pic, 5)
    out(pic, MASTER, 0x0C)
    assert pic.read_port(MASTER, 1) == 0x85
    assert in_service(pic) == 0b10_0000
    raise_lines(pic, 6)
    out(pic, MASTER, 0x0C)
    assert pic.read_port(MASTER, 1) & 0x80 == 0  # 5 is in service
    out(pic, MASTER, 0x0A)
    assert pic.read_port(MASTER, 1) == 0b100_0000
    out(pic, MASTER, EOI)
    out(pic, MASTER, 0x0C)
    assert pic.read_port(MASTER, 1) == 0x86
    raise_lines(pic, 7)
    assert pic.read_port(MASTER, 1) == 0b1000_0000  # no poll: IRR


def test_a_poll_of_the_slave_lowers_its_output() -> None:
    pic = programmed()
    raise_lines(pic, 9)
    assert pic.pending
    out(pic, SLAVE, 0x0C)
    assert pic.read_port(SLAVE, 1) == 0x81
    assert not pic.pending


def test_edges_a_line_that_stays_high_asks_once() -> None:
    pic = programmed()
    raise_lines(pic, 5)
    pic.acknowledge()
    out(pic, MASTER, EOI)
    raise_lines(pic, 5)
    assert not pic.pending


def test_levels_a_line_that_stays_high_asks_again() -> None:
    pic = programmed()
    out(pic, 0x4D0, 1 << 5)
    raise_lines(pic, 5)
    pic.acknowledge()
    assert not pic.pending
    out(pic, MASTER, EOI)
    assert pic.acknowledge() == 0x35
    pic.set_line(5, False)
    out(pic, MASTER, EOI)
    assert not pic.pending


def test_levels_of_the_slave() -> None:
    pic = programmed()
    out(pic, 0x4D1, 1 << 3)
    raise_lines(pic, 11)
    for _ in range(2):
        assert pic.acknowledge() == 0x3B
        out(pic, SLAVE, EOI)
        out(pic, MASTER, EOI)
    pic.set_line(11, False)
    assert not pic.pending


def test_a_high_line_that_becomes_a_level_input_asks() -> None:
    pic = programmed()
    raise_lines(pic, 5)
    pic.acknowledge()
    out(pic, MASTER, EOI)
    out(pic, 0x4D0, 1 << 5)
    assert pic.pending


@pytest.mark.parametrize(("port", "kept"), [(0x4D0, 0xF8), (0x4D1, 0xDE)])
def test_timer_keyboard_cascade_clock_and_fpu_are_edges_always(
    port: int, kept: int
) -> None:
    pic = programmed()
    out(pic, port, 0xFF)
    assert pic.read_port(port, 1) == kept


def test_the_listener_is_called_when_the_output_rises() -> None:
    calls: list[bool] = []
    pic = Pic(lambda: calls.append(True))
    raise_lines(pic, 4)
    assert not calls
    out(pic, MASTER, 0x11)
    out(pic, MASTER + 1, 0x30, 4, 1, 0)
    pic.set_line(4, False)
    raise_lines(pic, 4)
    assert calls
