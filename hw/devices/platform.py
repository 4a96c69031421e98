"""The PC around the processor: every device wired to ports, memory and interrupts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..memory import MemoryMap
from . import ioapic, lapic, pci, pic, power, uart
from .clock import VirtualClock
from .ioapic import IoApic
from .lapic import LocalApic
from .pci import PciHost
from .pic import Pic
from .pit import Pit
from .ports import PortSpace
from .power import PowerManagement, ResetLines, Sink
from .rtc import DEFAULT_EPOCH, Rtc
from .uart import Uart

RTC_PORTS = (0x70, 0x71)
POST_CODE, DEBUG_CONSOLE, ACPI_COMMAND = 0x80, 0xE9, 0xB2


class Interrupts:
    """What the core sees of the interrupt controllers.

    Attributes:
        on_change: called when `pending` may have become true.
    """

    def __init__(self, apic: Callable[[], LocalApic]) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._apic = apic

    @property
    def pending(self) -> bool:
        """An interrupt waits for the core."""
        return self._apic().pending

    def acknowledge(self) -> int:
        """Take the interrupt; return its vector."""
        return self._apic().acknowledge()


class Platform:
    """The devices of one machine.

    Args:
        memory_map: of the machine; the local APIC is put into its PCI hole.
        console: receives what the guest writes to COM1 or the debug console.
        epoch: date of the real-time clock at power-on, seconds since 1970.

    Attributes:
        clock, ports, pic, pit, lapic, ioapic, uart, rtc, pci, power, resets: the
            parts.
        interrupts: what a core asks.
        request: None, "shutdown", "reset" or ("exit", code): what the guest asked for.
        on_request: called when it asks.
    """

    def __init__(
        self,
        memory_map: MemoryMap,
        *,
        console: Callable[[bytes], None],
        epoch: int = DEFAULT_EPOCH,
    ) -> None:
        self.clock = VirtualClock()
        self.ports = PortSpace()
        self.request: str | tuple[str, int] | None = None
        self.on_request: Callable[[], None] = lambda: None
        self.interrupts = Interrupts(lambda: self.lapic)
        self.pic = Pic(self._changed)
        self.lapic = LocalApic(self.clock, self.pic, self._changed)
        self.ioapic = IoApic(self.lapic)
        self.pit = Pit(self.clock, lambda high: self._set_irq(0, high))
        self.uart = Uart(console, lambda high: self._set_irq(uart.COM1_IRQ, high))
        self.rtc = Rtc(self.clock, memory_map, epoch)
        self.pci = PciHost()
        self.power = PowerManagement(self.clock, self._ask)
        memory_map.attach(lapic.BASE, lapic.SIZE, self.lapic)
        memory_map.attach(ioapic.BASE, ioapic.SIZE, self.ioapic)
        self.resets = ResetLines(self._ask)
        for first, last, device in (
            (pic.MASTER, pic.MASTER + 1, self.pic),
            (pic.SLAVE, pic.SLAVE + 1, self.pic),
            (pic.EDGE_LEVEL, pic.EDGE_LEVEL + 1, self.pic),
            (0x40, 0x43, self.pit),
            (0x61, 0x61, self.pit),
            (*RTC_PORTS, self.rtc),
            (uart.COM1, uart.COM1 + 7, self.uart),
            (pci.ADDRESS, pci.ADDRESS, self.pci),
            (pci.DATA, pci.DATA + 3, self.pci),
            (power.PM1_STATUS, power.PM1_CONTROL + 1, self.power),
            (power.PM_TIMER, power.PM_TIMER + 3, self.power),
            (0x60, 0x60, self.resets),
            (power.KEYBOARD_STATUS, power.KEYBOARD_STATUS, self.resets),
            (power.FAST_GATE, power.FAST_GATE, self.resets),
            (power.RESET_CONTROL, power.RESET_CONTROL, self.resets),
            (power.DEBUG_EXIT, power.DEBUG_EXIT, self.resets),
            (POST_CODE, POST_CODE, Sink()),
            (ACPI_COMMAND, ACPI_COMMAND, Sink()),
            (DEBUG_CONSOLE, DEBUG_CONSOLE, Sink(console)),
        ):
            self.ports.attach(first, last, device)

    def state(self) -> dict[str, Any]:
        """Return the state of all devices, for JSON, and what the guest asked for."""
        request = self.request
        return {
            "now": self.clock.now,
            "request": list(request) if isinstance(request, tuple) else request,
            **{name: getattr(self, name).state() for name in _STATEFUL},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned, on a platform that has not run.

        Nothing is asked for again; an interrupt that waits is announced.

        Raises:
            KeyError, TypeError, ValueError: not what `state` returns.
        """
        self.request = _request(state["request"])
        self.clock.now = int(state["now"])
        for name in _STATEFUL:
            getattr(self, name).restore(state[name])
        self._changed()

    def _set_irq(self, irq: int, high: bool) -> None:
        """Drive an interrupt line: it leads to both controllers."""
        self.pic.set_line(irq, high)
        self.ioapic.set_irq(irq, high)

    def _ask(self, what: str, code: int) -> None:
        self.request = ("exit", code) if what == "exit" else what
        self.on_request()

    def _changed(self) -> None:
        if self.lapic.pending:
            self.interrupts.on_change()


def _request(saved: Any) -> str | tuple[str, int] | None:
    match saved:
        case None | "shutdown" | "reset":
            return str(saved) if saved else None
        case ["exit", int(code)]:
            return "exit", code
    raise ValueError(f"nothing that a guest asks for: {saved!r}")


_STATEFUL = (
    *("pic", "lapic", "ioapic", "pit", "uart", "rtc", "pci", "power", "resets"),
)
