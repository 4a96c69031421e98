"""A core that executes machine code over the same machine as the Python core.

The engine (Unicorn) translates and runs instructions. Everything that has a meaning of
its own is asked of the machine: page walks of hw/paging, tags of hw/memory, registers
of hw/msr and hw/cpuid through the machine's `Cpu`, devices of hw/devices. Control
registers and MSRs are shared with that `Cpu`: after a run it goes on where the machine
code stopped.

Time comes from the executed code (block_clock.py), so a run repeats to the event: same
machine, same seed, same input, same result. HLT jumps to the next timer.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..devices import Platform
from ..faults import CpuException, InvalidOpcode, PageFault, PageFaultCode
from ..machine import Machine
from ..msr import Efer, Tsc
from ..types import PAGE_SHIFT
from .bulk import Bulk
from .delivery import AC, IF, WITH_ERROR_CODE, Delivery, TripleFault
from .engine import (
    ERR_EXCEPTION,
    HOOK_INSN,
    HOOK_INSN_INVALID,
    HOOK_INTR,
    INS_IN,
    INS_OUT,
    INS_SYSCALL,
    INTERRUPT,
    INVALID,
    OK,
    PORT_IN,
    PORT_OUT,
    SYSCALL,
    Engine,
)
from .exits import (
    ENGINE_OWNED,
    LSTAR,
    SFMASK,
    STAR,
    Exits,
)
from .fill import NativeFailure, TlbFiller
from .guest_ports import GuestPorts
from .guest_time import GuestTime
from .instruction import InstructionReader
from .memory import NativeMemory
from .state import GDTR, LDTR, R11, RCX, RFLAGS_RF, SS, TR, EngineState

TSC_HZ = 1_000_000_000
"""The time-stamp counter counts the clock's nanoseconds."""

SYSCALL_LENGTH = 2

CODE_64 = 0x00AF_9B00_0000_FFFF
_NEVER = 1 << 62


class Ending(Enum):
    """Why a run ended."""

    STOPPED = "stopped"
    HALTED = "halted"
    SHUTDOWN = "shutdown"
    RESET = "reset"
    TIMEOUT = "timeout"
    FAULT = "fault"


@dataclass(frozen=True)
class Stop:
    """The end of a run: why, and in words."""

    ending: Ending
    reason: str = ""


class NativeCore:
    """Executes machine code on the boot core of a machine.

    Args:
        machine: shared; its `cpu` holds control registers and MSRs.
        platform: the devices, clock and interrupt controllers.
        wall_clock: time is the host's, and HLT waits; such a run does not repeat.

    Attributes:
        exceptions: delivered events by vector, interrupts left out.
        interrupts: delivered interrupts.
        every_slice: called between slices of code; may ask to stop.
        before_idle: called before HLT lets time pass, with nanoseconds.

    Raises:
        EngineError: the engine is missing or not the build that is known.
    """

    def __init__(
        self, machine: Machine, platform: Platform, *, wall_clock: bool = False
    ) -> None:
        self.machine = machine
        self.platform = platform
        self.exceptions: Counter[int] = Counter()
        self.interrupts = 0
        self.every_slice: Callable[[], None] = lambda: None
        self.before_idle: Callable[[int], None] = lambda nanoseconds: None
        self._stop: Stop | None = None
        self._failure: BaseException | None = None
        self._host_deadline = float("inf")

        cpu = machine.cpu
        self._cpu = cpu
        self.engine = Engine()
        self.state = EngineState(self.engine)
        self.memory = NativeMemory(self.engine, machine)
        for c_bit in (False, True):
            self.memory.add_slot(machine.controller.slot_for(c_bit))
        self.time = GuestTime(
            self.engine,
            self.state.leaving_address,
            platform.clock,
            self._guarded(self._slice_over),
            wall_clock=wall_clock,
        )
        self.block_clock = self.time.block_clock
        self.memory.before_device = self.time.sync
        self.memory.after_store = self.time.shorten_slice
        self._bulk = Bulk(self.state, cpu, self.memory.ram)
        self.filler = TlbFiller(
            self.engine, self.state, self.memory, cpu, machine.caches, self._bulk
        )
        self.reader = InstructionReader(
            self.state, cpu, machine.bus, lambda: self.filler.fetched
        )
        self._bulk.code_at = self.reader.code_at
        self._delivery = Delivery(self.state, cpu, machine.bus, self._noted)
        self._ports = GuestPorts(
            self.engine, self.state, self._delivery, platform.ports, self.time
        )
        self.exits = Exits(
            self.engine,
            self.state,
            cpu,
            self.filler,
            self.reader,
            halt=self._halt,
            interrupt=self._take_interrupt,
            tsc=self.time.read_tsc,
            task_priority=self._task_priority,
        )
        self._install_hooks()
        for index in sorted(ENGINE_OWNED):
            self.exits.own_msr(index)
        if cpu.msrs.declares(Tsc.ADDRESS):
            cpu.msrs.serve(Tsc, self.time.read_tsc, self.time.write_tsc)
        platform.interrupts.on_change = self._interrupt_line
        platform.on_request = self._platform_request

    # Entering and running

    def enter(
        self,
        rip: int,
        *,
        rsp: int = 0,
        rsi: int = 0,
        rdi: int = 0,
        gdt_base: int = 0,
        gdt_limit: int = 0,
    ) -> None:
        """Take over from the Python core: its mode, these registers, flat segments."""
        state = self.state
        self.exits.enter_state()
        for index, value in ((4, rsp), (6, rsi), (7, rdi)):
            state.regs[index] = value
        self._delivery.enter_segment(0x10, CODE_64, 0)
        for segment in (0, SS, 3, 4, 5):
            state.segments[segment].load(0x18, 0, 0xFFFF_FFFF, 0x00CF_9300)
        state.segments[8].load(0, gdt_base, gdt_limit, 0)
        state.segments[9].load(0, 0, 0, 0)
        state.rflags = 2
        state.rip = rip

    def run(self, timeout: float | None = None) -> Stop:
        """Execute until something ends the run.

        Args:
            timeout: host seconds.

        Raises:
            NativeFailure: something is not emulated.
        """
        self._stop = self._failure = None
        self._host_deadline = (
            float("inf") if timeout is None else time.monotonic() + timeout
        )
        # What fills ask for is in the access: CPL and AC of each moment.
        self._cpu.enter_privilege(0, alignment_check=False)
        self.time.new_slice()
        try:
            return self._run()
        finally:
            self.time.sync()
            self._hand_back()

    def _run(self) -> Stop:
        while self._stop is None:
            self.filler.pending = None
            error = self.engine.start(self.state.rip)
            failure = self._failure or self.filler.failure
            if failure is not None:
                self.filler.failure = None
                if isinstance(failure, TripleFault):
                    return Stop(Ending.FAULT, str(failure))
                raise failure
            if error == ERR_EXCEPTION or self._ports.refused:
                try:
                    self._refused()
                except TripleFault as shutdown:
                    return Stop(Ending.FAULT, str(shutdown))
            elif error != OK:
                raise NativeFailure(
                    f"the engine stopped with error {error} at {self.state.rip:#x}"
                )
        return self._stop

    def _hand_back(self) -> None:
        """Bring the Python core to where the machine code stands."""
        cpu, state = self._cpu, self.state
        cpu.mmu.flush(keep_global=False)
        cpu.cr2 = state.cr(2)
        cpu.enter_privilege(
            3 if state.cpl else 0, alignment_check=bool(state.system_flags & AC)
        )

    def save(self) -> dict[str, object]:
        """Return the processor's state, for JSON; the machine's own is not in it.

        The TLB is dropped, which software cannot see, so that this core and one that
        takes the state over go on alike.
        """
        self._forget_accesses()
        return {
            "state": self.state.save().hex(),
            "time": self.time.state(),
            "interrupts": self.interrupts,
            "exceptions": sorted(self.exceptions.items()),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Set what `save` returned, on a machine with the memory and CRs of then.

        Raises:
            EngineError, KeyError, TypeError, ValueError: not what `save` returns.
        """
        self.state.restore(bytes.fromhex(saved["state"]))
        self.time.restore(saved["time"])
        self.interrupts = int(saved["interrupts"])
        self.exceptions = Counter({int(v): int(n) for v, n in saved["exceptions"]})
        self._forget_accesses()
        self._interrupt_line()

    def _forget_accesses(self) -> None:
        self.filler.flush()
        self.filler.forget_streams()
        self._bulk.forget()

    def stop(self, reason: str = "") -> None:
        """End the run at the next block; may be called from any callback."""
        self._end(Stop(Ending.STOPPED, reason))

    def close(self) -> None:
        """Give the engine back; the machine goes on with its Python core."""
        self.machine.caches.release_views(self.filler.flush)
        for index in sorted(ENGINE_OWNED):
            self.exits.disown_msr(index)
        self._cpu.msrs.take_back(Tsc)
        interrupts = self.platform.interrupts
        if interrupts.on_change == self._interrupt_line:
            interrupts.on_change = lambda: None
        if self.platform.on_request == self._platform_request:
            self.platform.on_request = lambda: None
        self.engine.close()

    def _end(self, stop: Stop) -> None:
        if self._stop is None:
            self._stop = stop
        self.engine.stop()

    def _refused(self) -> None:
        """A fill or a port was refused: deliver the fault, or do a long instruction."""
        pending = self.filler.pending
        if self._ports.refused:
            self._delivery.fault(self._ports.take_back())
        elif pending is TlbFiller.BULK:
            self.filler.skip_bulk = not self._perform_bulk()
        elif isinstance(pending, CpuException):
            if isinstance(pending, PageFault):
                pending = pending.at(self.state.fault_address)
            if not self._is_implicit(pending):
                self._delivery.fault(pending)
        else:
            raise NativeFailure(f"a fill failed without a reason, {self.state.rip:#x}")

    def _perform_bulk(self) -> int:
        """Do a long string instruction; return how many bytes it stored."""
        operation = self._bulk.decode()
        if operation is None:
            return 0
        cpu = self._cpu
        cpu.mmu.flush(keep_global=False)
        cpu.enter_privilege(
            3 if self.state.cpl else 0,
            alignment_check=bool(self.state.system_flags & AC),
        )
        try:
            target, length = self._bulk.perform(operation)
            self.block_clock.charge(length >> 4)
            self._note_stored(target, length)
        finally:
            cpu.enter_privilege(0, alignment_check=False)
        return length

    def _is_implicit(self, fault: CpuException) -> bool:
        """Tell whether user code only made the processor read a descriptor or the TSS.

        The engine does not say whose access a fill is for. A refusal of a page with a
        descriptor table is looked at again: segment loads, LSL and the like read it
        with the processor's own rights, and are executed once more with those.
        """
        if (
            not isinstance(fault, PageFault)
            or not fault.code & PageFaultCode.USER
            or fault.code & (PageFaultCode.WRITE | PageFaultCode.FETCH)
            or self.filler.implicit_page is not None
            or not any(
                0 <= fault.address - segment.base <= segment.limit
                for segment in (self.state.segments[i] for i in (GDTR, LDTR, TR))
            )
            or not self.reader.reads_descriptors(fault.address)
        ):
            return False
        self.filler.implicit_page = fault.address >> PAGE_SHIFT
        return True

    def _note_stored(self, va: int, length: int) -> None:
        if not length:
            return
        for run in self._cpu.mmu.runs(va, length, 2):
            first = run.pa >> 12
            end = (run.pa + run.length - 1 >> 12) + 1
            self.filler.changed(run.slot, first, end)

    # Hooks

    def _install_hooks(self) -> None:
        engine = self.engine
        engine.hook(HOOK_INTR, INTERRUPT(self._guarded(self._event)))
        engine.hook(HOOK_INSN_INVALID, INVALID(self._guarded(self._invalid, True)))
        engine.hook(HOOK_INSN, PORT_IN(self._guarded(self._ports.read, 0)), INS_IN)
        engine.hook(HOOK_INSN, PORT_OUT(self._guarded(self._ports.write)), INS_OUT)
        engine.hook(HOOK_INSN, SYSCALL(self._guarded(self._syscall)), INS_SYSCALL)

    def _guarded(self, function: Callable[..., Any], default: Any = None) -> Any:
        """Keep an error of ours from being lost in the library: it ends the run."""

        def callback(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except BaseException as failure:
                self._failure = failure
                self.engine.stop()
                return default

        return callback

    def _event(self, _uc: Any, number: int, _user: Any) -> None:
        software, self.filler.implicit_page = 0, None
        if self.state.settle_exception():
            software = self.reader.software_interrupt_length(number)
        if self._ports.refused:
            return
        if number >= 0x100:
            try:
                self.exits.serve(number - 0x100)
            except CpuException as fault:
                self._delivery.fault(fault)
        else:
            code = self.state.error_code if number in WITH_ERROR_CODE else None
            self._delivery.deliver(number, code, software=software)

    def _invalid(self, _uc: Any, _user: Any) -> bool:
        self.state.settle_exception()
        if self._ports.refused:
            return True
        self._delivery.fault(InvalidOpcode(f"at {self.state.rip:#x}"))
        return True

    def _syscall(self, _uc: Any, _user: Any) -> None:
        """SYSCALL. Source: [APM3] SYSCALL; STAR, LSTAR, SFMASK: [APM2] 6.1.1."""
        state, msrs = self.state, self._cpu.msrs
        if self._ports.refused:
            return
        if not msrs.get(Efer).sce:
            self._delivery.fault(InvalidOpcode(f"SYSCALL at {state.rip:#x}: EFER.SCE"))
            state.rip -= SYSCALL_LENGTH
            return
        regs, flags = state.regs, state.rflags
        regs[RCX] = state.rip + SYSCALL_LENGTH
        regs[R11] = flags & ~RFLAGS_RF
        state.rflags = flags & ~(msrs.read(SFMASK) | RFLAGS_RF)
        selector = msrs.read(STAR) >> 32 & 0xFFFC
        self._delivery.enter_segment(selector, CODE_64, 0)
        state.segments[SS].load(selector + 8, 0, 0xFFFF_FFFF, 0x00CF_9300)
        state.rip = msrs.read(LSTAR) - SYSCALL_LENGTH  # the engine adds the length

    # Time

    def _slice_over(self) -> None:
        self.time.sync()
        self._look_at_host()
        self.time.new_slice()

    def _look_at_host(self) -> None:
        if time.monotonic() > self._host_deadline:
            self._end(Stop(Ending.TIMEOUT, "time is up"))
        self.every_slice()

    def _halt(self) -> None:
        """HLT: jump to the next timer until something interrupts."""
        self.time.sync()
        platform = self.platform
        clock = platform.clock
        if not self.state.system_flags & IF:
            self._end(Stop(Ending.HALTED, "HLT with interrupts disabled"))
            return
        while not platform.interrupts.pending and self._stop is None:
            self._look_at_host()
            wait = clock.next_deadline - clock.now
            self.before_idle(min(wait, _NEVER))
            if platform.interrupts.pending:
                break
            if clock.next_deadline >= _NEVER:
                self._end(Stop(Ending.HALTED, "HLT, and no timer is armed"))
                return
            self.time.skip_to_next_timer()
        self.time.new_slice()

    # Interrupts

    def _interrupt_line(self) -> None:
        if self.platform.interrupts.pending:
            self.state.raise_interrupt_line()

    def _take_interrupt(self) -> None:
        interrupts = self.platform.interrupts
        self.state.lower_interrupt_line()
        self.time.sync()
        if interrupts.pending:
            vector = interrupts.acknowledge()
            self.interrupts += 1
            self._delivery.deliver(vector)
        if interrupts.pending:
            self.state.raise_interrupt_line()

    def _task_priority(self, value: int | None) -> int:
        lapic = self.platform.lapic
        if value is not None:
            lapic.write_register(0x8, value << 4)
            self._interrupt_line()
        return lapic.read_register(0x8) >> 4

    def _noted(self, vector: int, error_code: int | None) -> None:
        if vector < 32:
            self.exceptions[vector] += 1
            code = "" if error_code is None else f"({error_code:#x})"
            self.exits.recent.append((f"vector {vector}{code}", self.state.rip))

    def _platform_request(self) -> None:
        request = self.platform.request
        if request == "shutdown":
            self._end(Stop(Ending.SHUTDOWN, "the guest switched the power off"))
        elif request == "reset":
            self._end(Stop(Ending.RESET, "the guest asked for a reset"))
        elif request is not None:
            self._end(Stop(Ending.SHUTDOWN, f"exit code {request[1]}"))
