"""What there is to say when machine code ends in a fault, the guest's or ours."""

from __future__ import annotations

from collections.abc import Iterable

from ..hw.native import NativeCore, Stop
from ..hw.native.instruction import REGISTERS
from ..hw.native.state import CS, GDTR, GS, IDTR, SS, TR
from ..hw.trace import Event
from .symbols import Symbols

STACK_WORDS = 16
INSTRUCTIONS = 5


def fault_report(
    core: NativeCore, stop: Stop, events: Iterable[Event], symbols: Symbols
) -> list[str]:
    """Return lines: why, registers, code at RIP, the stack, the last events."""
    state = core.state
    rip = state.rip
    name = symbols.name(rip)
    lines = [f"fault: {stop.reason}", f"RIP {rip:#018x} {name}".rstrip()]
    for row in range(0, 16, 4):
        lines.append(
            "  ".join(
                f"{REGISTERS[index]:<3} {state.regs[index]:016x}"
                for index in range(row, row + 4)
            )
        )
    lines.append(
        f"RFLAGS {state.rflags:#x}  CPL {state.cpl}  "
        f"CS {state.segments[CS].selector:#x}  "
        f"SS {state.segments[SS].selector:#x}  GS base {state.segments[GS].base:#x}"
    )
    cpu = core.machine.cpu
    lines.append(
        f"CR0 {cpu.read_cr0():#x}  CR2 {state.cr(2):#x}  CR3 {cpu.read_cr3():#x}  "
        f"CR4 {cpu.read_cr4():#x}"
    )
    for label, index in (("GDT", GDTR), ("IDT", IDTR), ("TR", TR)):
        segment = state.segments[index]
        lines.append(f"{label} base {segment.base:#x} limit {segment.limit:#x}")
    lines.append("code:")
    lines += [f"  {text}" for text in core.reader.text(rip, INSTRUCTIONS)]
    lines.append("stack:")
    lines += [f"  {text}" for text in _stack(core, symbols)]
    lines.append("last exits and exceptions, with the RIP of each (of its handler):")
    lines += [
        f"  {rip:#018x} {what} {symbols.name(rip)}".rstrip()
        for what, rip in core.exits.recent
    ]
    lines.append("last events:")
    shown = [f"  {event.as_json()}" for event in events]
    lines += shown or ["  (none kept: run with --trace)"]
    return lines


def _stack(core: NativeCore, symbols: Symbols) -> list[str]:
    rsp = core.state.regs[4] & -8
    lines = []
    for index in range(STACK_WORDS):
        data = core.reader.code_at(rsp + 8 * index, 8)
        if len(data) < 8:
            lines.append(f"{rsp + 8 * index:#x}: (not mapped)")
            break
        word = int.from_bytes(data, "little")
        lines.append(
            f"{rsp + 8 * index:#x}: {word:#018x} {symbols.name(word)}".rstrip()
        )
    return lines
