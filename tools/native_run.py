"""One run of machine code on a new machine, and what there is to say of it.

A kernel image or a program is loaded into plain memory, the native core executes it,
and the console is watched until a pattern appears, the guest switches itself off, or
time is up.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..boot.native_loader import NativeEntry, load_native
from ..hw.devices import Platform
from ..hw.errors import CallerError, CbitError
from ..hw.machine import Machine
from ..hw.memory import SLOT_NONE
from ..hw.models import DEFAULT_MODEL, load_model
from ..hw.native import Ending, NativeCore, Stop, engine_model
from ..hw.native.exits import CPUID
from ..hw.psp import RandomSource
from ..hw.trace import KINDS, Event
from .boot_run import COHERENT, firmware_memory_map, read_initrd
from .native_report import fault_report
from .symbols import Symbols

DEFAULT_COMMAND_LINE = "console=ttyS0 mem_encrypt=on"
DEFAULT_RAM = 512 << 20
LAST_EVENTS = 12
"""Events that a fault report shows."""

TAIL = 4096
"""Bytes of the console's end in which `--until` is looked for."""

MOST_CONSOLE = 16 << 20
"""Bytes of the console that are kept."""


@dataclass(frozen=True)
class RunRequest:
    """What `cbit run` was asked for; the defaults are the command's.

    Attributes:
        kernel: a bzImage or vmlinux; None with `program`.
        program: a freestanding ELF program, entered at `entry`.
        until: pattern that ends the run when the console shows it.
        timeout: host seconds; None for no limit.
        wall_clock: the guest's clock follows the host's: such a run never repeats.
    """

    kernel: str | None = None
    program: str | None = None
    entry: str | None = None
    pass_cbit: bool = False
    cpu: str = DEFAULT_MODEL
    ram: int = DEFAULT_RAM
    cmdline: str = DEFAULT_COMMAND_LINE
    initrd: str | None = None
    until: str | None = None
    timeout: float | None = None
    smee: bool = True
    tsme: bool = False
    la57: bool = False
    caches: str = "model"
    hazards: str = "record"
    seed: int | None = None
    wall_clock: bool = False
    symbols: str | None = None


@dataclass
class NativeRun:
    """A machine with code to execute; `execute` fills in the rest.

    Attributes:
        console: everything the guest wrote to COM1.
        stop: why the run ended.
        matched: what `--until` found.
        report: lines on a fault, of the guest's or of ours.
    """

    request: RunRequest
    machine: Machine
    platform: Platform
    core: NativeCore
    entry: NativeEntry | None
    events: deque[Event]
    console: bytearray = field(default_factory=bytearray)
    show: Callable[[bytes], None] = lambda data: None
    stop: Stop | None = None
    matched: str | None = None
    report: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _pattern: re.Pattern[bytes] | None = None

    @property
    def outcome(self) -> str:
        """One of matched, halted, shutdown, timeout, fault."""
        assert self.stop is not None
        if self.matched is not None:
            return "matched"
        if self.stop.ending in (Ending.SHUTDOWN, Ending.RESET):
            return "shutdown"
        if self.stop.ending is Ending.STOPPED:
            return "timeout"
        return str(self.stop.ending.value)

    @property
    def succeeded(self) -> bool:
        """The pattern appeared, or the guest switched itself off unasked."""
        if self.request.until is not None:
            return self.matched is not None
        return self.outcome == "shutdown"

    def facts(self) -> dict[str, Any]:
        """Return the JSON object of `cbit run`."""
        machine, core = self.machine, self.core
        encryption = machine.model.memory_encryption
        present = encryption.usable
        cr3 = machine.cpu.read_cr3()
        slots = machine.dram.count_pages()
        plain = slots.get(SLOT_NONE, 0)
        return {
            "outcome": self.outcome,
            "matched": self.matched,
            "reason": self.stop.reason if self.stop else "",
            "cr3": hex(cr3),
            "c_bit": encryption.c_bit if present else None,
            "sme_active": bool(present and cr3 >> encryption.c_bit & 1),
            "pages": {"encrypted": sum(slots.values()) - plain, "plain": plain},
            "exceptions": {str(v): n for v, n in sorted(core.exceptions.items())},
            "interrupts": core.interrupts,
            "cpuid": core.exits.counts[CPUID],
            "msr_reads": _by_msr(core.exits.msr_reads),
            "msr_writes": _by_msr(core.exits.msr_writes),
            "tlb_fills": core.filler.fills,
            "tag_changes": machine.caches.tag_changes,
            "hazards": len(machine.caches.hazards_met),
            "instructions": None,
            "code_bytes": core.block_clock.total,
            "seconds": round(self.seconds, 6),
            "console": self.console.decode("utf-8", "replace"),
        }

    def take_console(self, data: bytes) -> None:
        """Show, keep and search what the guest printed."""
        self.console += data
        self.show(data)
        if len(self.console) > MOST_CONSOLE:
            del self.console[: MOST_CONSOLE // 2]
        if self._pattern is not None and self.matched is None:
            found = self._pattern.search(bytes(self.console[-TAIL:]))
            if found is not None:
                self.matched = found[0].decode("utf-8", "replace")
                self.core.stop("the console shows what --until names")


def prepare(
    request: RunRequest,
    *,
    on_event: Callable[[Event], None] | None = None,
    kinds: frozenset[str] = KINDS,
    show: Callable[[bytes], None] = lambda data: None,
) -> NativeRun:
    """Build the machine and load the code.

    Args:
        request: what was asked for.
        on_event: receives the events of `kinds`; None leaves the trace off.
        show: receives the console as it appears.

    Raises:
        CallerError: an unknown model, an impossible RAM size.
        InputError: a file is not what it should be.
        KernelError: the loader refuses.
        OSError: a file cannot be read.
    """
    model = engine_model(load_model(request.cpu), rdrand=request.wall_clock)
    machine = Machine(
        model,
        ram=request.ram,
        smee=request.smee,
        tsme=request.tsme,
        coherent=COHERENT[request.caches],
        hazards=request.hazards,
        seed=request.seed,
    )
    if on_event is not None:
        machine.trace.listen(on_event, kinds)
    if request.program is not None:
        from ..boot.program import load_program

        entry = load_program(
            machine.cpu,
            request.program,
            entry=request.entry,
            five_levels=request.la57,
            pass_cbit=request.pass_cbit,
        )
    elif request.kernel is not None:
        entry = load_native(
            machine.cpu,
            request.kernel,
            e820=firmware_memory_map(machine),
            command_line=os.fsencode(request.cmdline),
            initrd=read_initrd(request.initrd),
            five_levels=request.la57,
            rng_seed=RandomSource(request.seed).draw(32),
        )
    else:
        raise CallerError("nothing to run: a kernel or a program expected")
    run = assemble(request, machine, show)
    run.entry = entry
    run.core.enter(
        entry.rip,
        rsp=entry.rsp,
        rsi=entry.rsi,
        rdi=entry.rdi,
        gdt_base=entry.gdt_base,
        gdt_limit=entry.gdt_limit,
    )
    return run


def assemble(
    request: RunRequest, machine: Machine, show: Callable[[bytes], None]
) -> NativeRun:
    """Put platform and native core onto a machine; no code is loaded yet."""
    pattern = None
    if request.until is not None:
        pattern = re.compile(request.until.encode(), re.MULTILINE)
    runs: list[NativeRun] = []
    platform = Platform(machine.map, console=lambda data: runs[0].take_console(data))
    core = NativeCore(machine, platform, wall_clock=request.wall_clock)
    run = NativeRun(
        request, machine, platform, core, None, deque(maxlen=LAST_EVENTS), show=show
    )
    run._pattern = pattern
    runs.append(run)
    return run


def execute(run: NativeRun) -> None:
    """Let the machine run until it ends; fills in the rest of `run`."""
    started = time.perf_counter()
    if run.machine.trace.active:
        run.machine.trace.listen(run.events.append)
    symbols = Symbols.of(run.request.symbols)
    try:
        run.stop = run.core.run(run.request.timeout)
    except CbitError as failure:
        run.stop = Stop(Ending.FAULT, str(failure))
    run.seconds = time.perf_counter() - started
    if run.stop.ending is Ending.FAULT:
        run.report = fault_report(run.core, run.stop, run.events, symbols)
    run.machine.caches.drain()


def _by_msr(counts: dict[int, int]) -> dict[str, int]:
    return {f"{index:#010x}": count for index, count in sorted(counts.items())}
