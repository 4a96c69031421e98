"""16550A serial port: COM1 at 3F8h.

Sending takes no time: the holding register is always empty, and a FIFO below its
trigger level has timed out at once. Source: National Semiconductor PC16550D data sheet
(TL/C/8652).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

COM1, COM1_IRQ = 0x3F8, 4
DATA, IER, IIR, LCR, MCR, LSR, MSR, SCRATCH = range(8)
DLAB = 0x80
DATA_READY, OVERRUN, THR_EMPTY = 0x01, 0x02, 0x60
RECEIVE_INTERRUPT, SEND_INTERRUPT, LINE_INTERRUPT, MODEM_INTERRUPT = 1, 2, 4, 8
MODEM_CHANGE, SENT, RECEIVED, LINE_ERROR, TIMEOUT = 0x0, 0x2, 0x4, 0x6, 0xC
NO_CAUSE = 1
LOOP, OUT2 = 0x10, 0x08
FIFO_SIZE = 16
TRIGGERS = (1, 4, 8, 14)
RING = 0x40
CONNECTED = 0xB0
"""Modem status: DCD, DSR and CTS."""


class Uart:
    """The port.

    Args:
        sink: receives what the guest sends.
        line: drives the interrupt.
        base: first port.
    """

    STATE = (
        *("ier", "lcr", "mcr", "scratch", "divisor", "fifo", "trigger"),
        *("send_pending", "overrun", "modem_changes"),
    )

    def __init__(
        self,
        sink: Callable[[bytes], None],
        line: Callable[[bool], None],
        base: int = COM1,
    ) -> None:
        self.base = base
        self.ier = self.lcr = self.mcr = self.scratch = 0
        self.divisor = self.trigger = 1
        self.modem_changes = 0  # since the modem status was read
        self.fifo = False
        self.send_pending = False
        self.overrun = False
        self._received: deque[int] = deque()  # in the FIFO
        self._waiting: deque[int] = deque()  # on the other end of the wire
        self._sink = sink
        self._line = line
        self._active = False

    def feed(self, data: bytes) -> None:
        """Let bytes arrive; what the FIFO cannot take waits on the wire."""
        self._waiting.extend(data)
        self._refill()
        self._update()

    def read_port(self, port: int, size: int) -> int:
        """Read one register."""
        register = port - self.base
        if register == DATA:
            if self.lcr & DLAB:
                return self.divisor & 0xFF
            value = self._received.popleft() if self._received else 0
            self._refill()
            self._update()
            return value
        if register == IER:
            return self.divisor >> 8 if self.lcr & DLAB else self.ier
        if register == IIR:
            return self._identify()
        if register == LSR:
            value = THR_EMPTY | DATA_READY * bool(self._received)
            value |= OVERRUN * self.overrun
            self.overrun = False
            self._update()
            return value
        if register == MSR:
            value = self._modem_status() | self.modem_changes
            self.modem_changes = 0
            self._update()
            return value
        return {LCR: self.lcr, MCR: self.mcr, SCRATCH: self.scratch}[register]

    def write_port(self, port: int, value: int, size: int) -> None:
        """Write one register."""
        register = port - self.base
        value &= 0xFF
        if register == DATA:
            if self.lcr & DLAB:
                self.divisor = self.divisor & 0xFF00 | value
                return
            self._send(value)
        elif register == IER:
            if self.lcr & DLAB:
                self.divisor = self.divisor & 0xFF | value << 8
                return
            if value & SEND_INTERRUPT and not self.ier & SEND_INTERRUPT:
                self.send_pending = True
            self.ier = value & 0xF
        elif register == IIR:
            self._control_fifo(value)
        elif register == LCR:
            self.lcr = value
        elif register == MCR:
            self._control_modem(value & 0x1F)
        elif register == SCRATCH:
            self.scratch = value
        self._update()

    def _send(self, value: int) -> None:
        if self.mcr & LOOP:
            if len(self._received) >= self._room():
                self.overrun = True
                if not self.fifo:
                    self._received[0] = value
            else:
                self._received.append(value)
        else:
            self._sink(bytes([value]))
        self.send_pending = False
        self._update()  # the line falls while the register is full
        self.send_pending = True

    def _control_fifo(self, value: int) -> None:
        on = bool(value & 1)
        if on != self.fifo or value & 3 == 3:
            self._received.clear()
        if on:
            self.trigger = TRIGGERS[value >> 6 & 3]
        self.fifo = on
        self._refill()

    def _control_modem(self, value: int) -> None:
        before = self._modem_status()
        self.mcr = value
        after = self._modem_status()
        risen_ring = after & ~before & RING  # only its end is reported
        self.modem_changes |= ((before ^ after) & ~risen_ring) >> 4
        self._refill()

    def _room(self) -> int:
        return FIFO_SIZE if self.fifo else 1

    def _refill(self) -> None:
        cut_off = self.mcr & LOOP
        while self._waiting and not cut_off and len(self._received) < self._room():
            self._received.append(self._waiting.popleft())

    def _modem_status(self) -> int:
        if not self.mcr & LOOP:
            return CONNECTED
        # In loop-back DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
        mcr = self.mcr
        return (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _cause(self) -> int | None:
        if self.overrun and self.ier & LINE_INTERRUPT:
            return LINE_ERROR
        if self._received and self.ier & RECEIVE_INTERRUPT:
            full = not self.fifo or len(self._received) >= self.trigger
            return RECEIVED if full else TIMEOUT
        if self.send_pending and self.ier & SEND_INTERRUPT:
            return SENT
        if self.modem_changes and self.ier & MODEM_INTERRUPT:
            return MODEM_CHANGE
        return None

    def _identify(self) -> int:
        cause = self._cause()
        if cause == SENT:
            self.send_pending = False
            self._update()
        return (NO_CAUSE if cause is None else cause) | 0xC0 * self.fifo

    def _interrupts(self) -> bool:
        # The pin of OUT2 opens the way to the bus; loop-back makes it inactive.
        return self._cause() is not None and self.mcr & (OUT2 | LOOP) == OUT2

    def _update(self) -> None:
        active = self._interrupts()
        if active != self._active:
            self._active = active
            self._line(active)

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            **{key: getattr(self, key) for key in self.STATE},
            "received": list(self._received),
            "waiting": list(self._waiting),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        for key in self.STATE:
            setattr(self, key, type(getattr(self, key))(state[key]))
        self._received = deque(bytes(list(state["received"])))
        self._waiting = deque(bytes(list(state["waiting"])))
        self._active = self._interrupts()
