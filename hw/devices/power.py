"""How a guest ends: ACPI power-off, the reset lines, a debug exit; and the PM timer.

Source: ACPI specification 6.4, chapter 4.8 (fixed registers); keyboard controller
command FEh and port 92h: IBM PC/AT and PS/2 technical references; CF9h: Intel 82371AB
data sheet (RC).
"""

from __future__ import annotations

from collections.abc import Callable

from .clock import VirtualClock

PM1_STATUS, PM1_ENABLE, PM1_CONTROL, PM_TIMER = 0x600, 0x602, 0x604, 0x608
PM_TIMER_HZ = 3_579_545
SCI_ENABLE = 1
SLEEP_ENABLE = 1 << 13
SLEEP_TYPE_OFF = 5
KEYBOARD_STATUS, KEYBOARD_RESET = 0x64, 0xFE
FAST_GATE, RESET_CONTROL, DEBUG_EXIT = 0x92, 0xCF9, 0xF4

Ask = Callable[[str, int], None]
"""Called with "shutdown", "reset" or "exit", and the exit code."""


class PowerManagement:
    """PM1a event and control blocks, and the timer."""

    def __init__(self, clock: VirtualClock, ask: Ask) -> None:
        self._clock = clock
        self._ask = ask
        self._enable = 0
        self._control = 0

    def read_port(self, port: int, size: int) -> int:
        """Read a block; the timer has 24 bits."""
        mask = (1 << 8 * size) - 1
        if port >= PM_TIMER:
            ticks = self._clock.now * PM_TIMER_HZ // 1_000_000_000 & 0xFF_FFFF
            return ticks >> 8 * (port - PM_TIMER) & mask
        block = self._enable << 16 | (self._control | SCI_ENABLE) << 32
        return block >> 8 * (port - PM1_STATUS) & mask

    def write_port(self, port: int, value: int, size: int) -> None:
        """Write a block; SLP_EN with the type of S5 switches off."""
        if port == PM1_STATUS and size == 4:
            self._enable = value >> 16
        elif port == PM1_ENABLE:
            self._enable = value & 0xFFFF
        elif port == PM1_CONTROL:
            self._control = value & 0x1C02  # GBL_RLS and SLP_EN read as 0
            if value & SLEEP_ENABLE and value >> 10 & 7 == SLEEP_TYPE_OFF:
                self._ask("shutdown", 0)

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {"enable": self._enable, "control": self._control}

    def restore(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        self._enable, self._control = int(state["enable"]), int(state["control"])


class ResetLines:
    """The keyboard controller's reset (there is no keyboard), 92h, CF9h, F4h."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._gate = 2  # A20 is on

    def read_port(self, port: int, size: int) -> int:
        """All ones where a controller would be; 92h reads back."""
        if port == FAST_GATE:
            return self._gate
        return 0 if port == RESET_CONTROL else (1 << 8 * size) - 1

    def write_port(self, port: int, value: int, size: int) -> None:
        """Reset or end the run where the value asks for it."""
        value &= 0xFF
        if port == KEYBOARD_STATUS and value == KEYBOARD_RESET:
            self._ask("reset", 0)
        elif port == FAST_GATE:
            self._gate = value & 2
            if value & 1:
                self._ask("reset", 0)
        elif port == RESET_CONTROL and value & 4:
            self._ask("reset", 0)
        elif port == DEBUG_EXIT:
            self._ask("exit", value)

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {"gate": self._gate}

    def restore(self, state: dict[str, int]) -> None:
        """Set what `state` returned."""
        self._gate = int(state["gate"])


class Sink:
    """Ports whose writes matter to nobody, or only to a reader of bytes.

    Args:
        take: receives each byte written.
    """

    def __init__(self, take: Callable[[bytes], None] = lambda data: None) -> None:
        self._take = take

    def read_port(self, port: int, size: int) -> int:
        """The debug console answers with its own number, as it is known for."""
        return port & 0xFF

    def write_port(self, port: int, value: int, size: int) -> None:
        """Hand the byte on."""
        self._take(bytes([value & 0xFF]))
