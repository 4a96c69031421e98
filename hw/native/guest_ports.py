"""IN and OUT of machine code: who may, when it happens, and the refusal.

The engine lets every program at every port and only then calls back, from the middle
of a block. A refusal therefore notes all registers as they stand before the
instruction, lets the block run out and takes them back: of the code behind the refused
instruction only stores of the same block remain, in a process that is about to die.

Source: [APM2] 12.2.5 (I/O-permission bitmap), [APM3] IN, OUT.
"""

from __future__ import annotations

from typing import Any

from ..devices import PortSpace
from ..faults import CpuException, GeneralProtection
from .delivery import Delivery
from .engine import Engine
from .guest_time import GuestTime
from .state import TR, EngineState

PORT_ACCESS_NS = 1_000
"""An access to an ISA port takes about a microsecond."""

TSS_IO_MAP_BASE = 0x66


class GuestPorts:
    """The port hooks of one core.

    Args:
        engine: is stopped after a refusal.
        state: its registers.
        delivery: reads the TSS.
        ports: the devices.
        time: accesses see the clock as it is and take time.
    """

    def __init__(
        self,
        engine: Engine,
        state: EngineState,
        delivery: Delivery,
        ports: PortSpace,
        time: GuestTime,
    ) -> None:
        self._engine = engine
        self._state = state
        self._delivery = delivery
        self._ports = ports
        self._time = time
        self._refused: tuple[bytes, int, int, str] | None = None

    def read(self, _uc: Any, port: int, size: int, _user: Any) -> int:
        """IN of `size` bytes: the hook's form."""
        if self._state.cpl and self._refuses(port, size):
            return 0
        self._time.sync()
        value = self._ports.read(port, size)
        self._time.block_clock.charge(PORT_ACCESS_NS)
        return value

    def write(self, _uc: Any, port: int, size: int, value: int, _user: Any) -> None:
        """OUT of `size` bytes: the hook's form."""
        if self._state.cpl and self._refuses(port, size):
            return
        self._time.sync()
        self._ports.write(port, value, size)
        self._time.block_clock.charge(PORT_ACCESS_NS)
        self._time.shorten_slice()

    @property
    def refused(self) -> bool:
        """An instruction was refused, and what the engine does now will not count."""
        return self._refused is not None

    def take_back(self) -> GeneralProtection:
        """Go back to the refused instruction; return what it raises."""
        assert self._refused is not None
        registers, rflags, rip, what = self._refused
        self._refused = None
        state = self._state
        state.regs.cast("B")[:] = registers
        state.rflags, state.rip = rflags, rip
        return GeneralProtection(what)

    def _refuses(self, port: int, size: int) -> bool:
        if self._refused is None and not self._allowed(port, size):
            state = self._state
            what = f"port {port:#x} from user mode"
            self._refused = bytes(state.regs), state.rflags, state.rip, what
            self._engine.stop()
        return self._refused is not None

    def _allowed(self, port: int, size: int) -> bool:
        if self._state.system_flags >> 12 & 3 == 3:
            return True
        tss = self._state.segments[TR]
        if tss.limit < TSS_IO_MAP_BASE + 1:
            return False
        try:
            at = self._delivery.load(tss.base + TSS_IO_MAP_BASE, 2) + port // 8
            if at + 1 > tss.limit:
                return False
            bits = self._delivery.load(tss.base + at, 2) >> port % 8
        except CpuException:
            return False
        return not bits & (1 << size) - 1
