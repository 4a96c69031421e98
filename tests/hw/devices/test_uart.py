"""hw/devices/uart: the 16550A.

Expected behaviour: National Semiconductor PC16550D data sheet (TL/C/8652), section 8
(registers, interrupt identification, FIFO modes, loop-back). OUT2 as the gate of the
interrupt: IBM PC/AT technical reference, serial adapter.
"""

import pytest

from cbit.hw.devices.uart import Uart

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(0x3F8, 0x400)
FCR = IIR
OUT2, LOOP = 0x08, 0x10
RX, TX, LINE, MODEM = 1, 2, 4, 8


class Port:
    """A serial port, what left it, and its interrupt line."""

    def __init__(self, *, mcr: int = OUT2) -> None:
        self.sent = bytearray()
        self.edges: list[bool] = []
        self.uart = Uart(self.sent.extend, self.edges.append)
        self.out(MCR, mcr)

    def out(self, port: int, value: int) -> None:
        self.uart.write_port(port, value, 1)

    def read(self, port: int) -> int:
        return self.uart.read_port(port, 1)

    @property
    def high(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def receive(self) -> bytes:
        got = bytearray()
        while self.read(LSR) & 1:
            got.append(self.read(DATA))
        return bytes(got)


@pytest.fixture
def port() -> Port:
    return Port()


def test_bytes_written_leave_at_once(port: Port) -> None:
    for byte in b"cbit\n":
        assert port.read(LSR) == 0x60
        port.out(DATA, byte)
    assert port.sent == b"cbit\n"


def test_dlab_shows_the_divisor_in_place_of_data_and_ier(port: Port) -> None:
    port.out(IER, 0x05)
    port.out(LCR, 0x83)
    port.out(DATA, 0x0C)
    port.out(IER, 0x34)
    assert (port.read(DATA), port.read(IER)) == (0x0C, 0x34)
    port.out(LCR, 0x03)
    assert (port.read(DATA), port.read(IER), port.read(LCR)) == (0, 0x05, 0x03)
    assert port.uart.divisor == 0x340C
    assert port.sent == b""


def test_registers_keep_the_bits_that_exist(port: Port) -> None:
    for register, kept in ((IER, 0x0F), (LCR, 0x7F), (MCR, 0x1F), (SCRATCH, 0xFF)):
        port.out(register, 0xFF & ~0x80 if register == LCR else 0xFF)
        assert port.read(register) == kept


def test_without_a_cause_iir_says_so(port: Port) -> None:
    assert port.read(IIR) == 0x01
    port.out(FCR, 0x01)
    assert port.read(IIR) == 0xC1


def test_allowing_the_send_interrupt_raises_it(port: Port) -> None:
    port.out(IER, TX)
    assert port.high
    assert port.read(IIR) == 0x02  # this read ends it
    assert not port.high
    assert port.read(IIR) == 0x01


def test_each_byte_sent_raises_the_send_interrupt_again(port: Port) -> None:
    port.out(IER, TX)
    port.read(IIR)
    port.edges.clear()
    port.out(DATA, 0x41)
    port.out(DATA, 0x42)
    assert port.edges == [True, False, True]  # an edge for each
    port.read(IIR)
    assert port.edges == [True, False, True, False]


def test_a_received_byte_interrupts_until_it_is_read(port: Port) -> None:
    port.out(IER, RX)
    port.uart.feed(b"x")
    assert port.high
    assert port.read(IIR) == 0x04
    assert port.high
    assert port.read(DATA) == 0x78
    assert not port.high
    assert port.read(IIR) == 0x01


def test_priorities_line_then_data_then_send_then_modem(port: Port) -> None:
    port.out(MCR, LOOP)
    port.out(IER, RX | TX | LINE | MODEM)
    port.out(DATA, 1)
    port.out(DATA, 2)  # no room: overrun
    seen = [port.read(IIR)]
    port.read(LSR)
    seen.append(port.read(IIR))
    port.read(DATA)
    seen.append(port.read(IIR))
    seen.append(port.read(IIR))
    port.read(MSR)
    seen.append(port.read(IIR))
    assert seen == [0x06, 0x04, 0x02, 0x00, 0x01]


def test_overrun_is_told_once_and_ends_its_interrupt(port: Port) -> None:
    port.out(MCR, LOOP)
    port.out(DATA, 1)
    port.out(DATA, 2)
    port.out(MCR, OUT2)
    port.out(IER, LINE)
    assert port.high
    assert port.read(LSR) == 0x63
    assert not port.high
    assert port.read(LSR) == 0x61
    assert port.read(DATA) == 2  # without FIFO the later byte replaces the earlier


@pytest.mark.parametrize(
    ("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)]
)
def test_the_fifo_tells_its_trigger_level_from_a_timeout(fcr: int, level: int) -> None:
    port = Port()
    port.out(FCR, fcr)
    port.out(IER, RX)
    port.uart.feed(bytes(level - 1))
    assert port.read(IIR) == (0xCC if level > 1 else 0xC1)
    port.uart.feed(b"\0")
    assert port.read(IIR) == 0xC4


@pytest.mark.parametrize("fifo", [0x00, 0x01])
def test_more_than_16_bytes_wait_on_the_wire_and_none_is_lost(fifo: int) -> None:
    port = Port()
    port.out(FCR, fifo)
    data = bytes(range(100))
    port.uart.feed(data[:70])
    port.uart.feed(data[70:])
    assert port.receive() == data
    assert port.read(LSR) == 0x60


def test_reading_an_empty_receiver_gives_0(port: Port) -> None:
    assert port.read(DATA) == 0


@pytest.mark.parametrize("fcr", [0x03, 0x00])  # reset; FIFO mode off
def test_the_fifo_can_be_emptied(port: Port, fcr: int) -> None:
    port.out(FCR, 0x01)
    port.uart.feed(b"0123456789")
    port.out(FCR, fcr)
    assert port.receive() == b""


def test_resets_without_the_enable_bit_do_nothing(port: Port) -> None:
    port.uart.feed(b"a")
    port.out(FCR, 0x02)
    assert port.receive() == b"a"


def test_loop_back_sends_to_itself_and_nothing_leaves(port: Port) -> None:
    port.out(FCR, 0x01)
    port.out(MCR, LOOP)
    for byte in b"0123456789abcdef":
        port.out(DATA, byte)
    assert port.sent == b""
    port.out(DATA, 0x21)
    assert port.read(LSR) == 0x63  # overrun: the FIFO keeps what it has
    assert port.receive() == b"0123456789abcdef"


def test_loop_back_cuts_the_wire_off(port: Port) -> None:
    port.out(MCR, LOOP)
    port.uart.feed(b"later")
    assert port.read(LSR) == 0x60
    port.out(MCR, OUT2)
    assert port.receive() == b"later"


@pytest.mark.parametrize(
    ("mcr", "msr"),
    # DTR to DSR, RTS to CTS, OUT1 to RI, OUT2 to DCD.
    [(0x1, 0x20), (0x2, 0x10), (0x4, 0x40), (0x8, 0x80), (0xF, 0xF0), (0xA, 0x90)],
)
def test_loop_back_shows_the_modem_outputs_as_inputs(
    port: Port, mcr: int, msr: int
) -> None:
    port.out(MCR, LOOP | mcr)
    assert port.read(MSR) & 0xF0 == msr


def test_changes_of_the_modem_inputs_are_told_once(port: Port) -> None:
    assert port.read(MSR) == 0xB0  # somebody is connected
    port.out(MCR, LOOP)
    port.read(MSR)
    port.out(MCR, LOOP | 0x4)
    assert port.read(MSR) == 0x40  # a ring that begins is no change
    port.out(MCR, LOOP | 0x3)
    assert port.read(MSR) == 0x37  # its end is; CTS, DSR
    assert port.read(MSR) == 0x30


def test_out2_opens_the_way_to_the_interrupt_controller() -> None:
    port = Port(mcr=0)
    port.out(IER, RX)
    port.uart.feed(b"x")
    assert port.edges == []
    assert port.read(IIR) == 0x04
    port.out(MCR, OUT2)
    assert port.edges == [True]
    port.out(MCR, OUT2 | LOOP)  # the pins are inactive
    assert port.edges == [True, False]


def test_causes_that_are_not_allowed_do_not_interrupt(port: Port) -> None:
    port.uart.feed(b"x")
    port.out(DATA, 0x41)
    assert not port.high
    assert port.read(IIR) == 0x01
