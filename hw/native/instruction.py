"""The instruction at RIP, as far as an exit needs it: bytes, operands, text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cpu import Cpu
from ..faults import CpuException
from ..memory import MemoryBus
from ..paging import Access
from ..types import PAGE_SHIFT, PAGE_SIZE
from .state import FS, GS, EngineState

MOST_BYTES = 15
REGISTERS = (
    *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
    *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"),
)
"""Names of the general registers, in the order of their encoding."""
_U64 = (1 << 64) - 1
_SYSTEM = int(Access.LIFTED)


class InstructionReader:
    """Reads the guest's code and decodes what the exits ask for.

    Args:
        fetched: bytes of pages that the engine may execute, by virtual page.
    """

    def __init__(
        self,
        state: EngineState,
        cpu: Cpu,
        bus: MemoryBus,
        fetched: Callable[[], dict[int, memoryview]],
    ) -> None:
        self._state = state
        self._cpu = cpu
        self._bus = bus
        self._fetched = fetched
        self._operands: dict[bytes, tuple[Any, ...]] = {}

    def code_at(self, rip: int, length: int) -> bytes:
        """Return up to `length` bytes of code; fewer where none is mapped."""
        view = self._fetched().get(rip >> PAGE_SHIFT)
        start = rip & PAGE_SIZE - 1
        if view is not None and start + length <= PAGE_SIZE:
            return bytes(view[start : start + length])
        code = b""
        while len(code) < length:
            va = rip + len(code) & _U64
            part = min(length - len(code), PAGE_SIZE - va % PAGE_SIZE)
            try:
                found = self._cpu.mmu.walk(va & -PAGE_SIZE, _SYSTEM)
                code += self._bus.load(found.pa + va % PAGE_SIZE, part, found.slot)
            except CpuException:
                break
        return code

    def software_interrupt_length(self) -> int:
        """Return the length of the INT n or INT3 that ends at RIP."""
        last = self.code_at(self._state.rip - 1 & _U64, 1)
        return 1 if last in (b"\xcc", b"\xf1") else 2

    def cr_register(self) -> tuple[int, int]:
        """Return the general register of MOV to or from CR, and the length."""
        code = self.code_at(self._state.rip, MOST_BYTES)
        if code[0] == 0x0F:
            return code[2] & 7, 3
        at = rex = 0
        while code[at] in (0x66, 0xF0, 0xF2, 0xF3):
            at += 1
        if code[at] & 0xF0 == 0x40:
            rex = code[at]
            at += 1
        assert code[at] == 0x0F, code.hex()
        return code[at + 2] & 7 | (rex & 1) << 3, at + 3

    def cr_operand(self, old: int) -> tuple[int, int]:
        """Return the value that a write of a control register brings, and the length.

        CLTS and LMSW write CR0 too; `old` is its value before.
        """
        state = self._state
        code = self.code_at(state.rip, 2)
        if code == b"\x0f\x06":
            return old & ~8, 2
        if code == b"\x0f\x01":
            register = self.code_at(state.rip, 3)[2]
            assert register >> 6 == 3, "LMSW from memory"
            low = state.regs[register & 7] & 0xF
            return old & ~0xE | low | old & 1, 3
        return self.cr3_operand()

    def cr3_operand(self) -> tuple[int, int]:
        """Return the value that MOV to a control register brings, and the length."""
        register, length = self.cr_register()
        return self._state.regs[register], length

    def memory_operand(self) -> tuple[int, int]:
        """Return the linear address of the memory operand, and the length."""
        state = self._state
        code = self.code_at(state.rip, MOST_BYTES)
        known = self._operands.get(code)
        if known is None:
            known = self._operands[code] = _decode_operand(code)
        base, index, scale, displacement, segment, length = known
        va = displacement
        if base == "rip":
            va += state.rip + length
        elif base is not None:
            va += state.regs[base]
        if index is not None:
            va += state.regs[index] * scale
        if segment is not None:
            va += state.segments[segment].base
        return va & _U64, length

    def text(self, rip: int, count: int = 1) -> list[str]:
        """Disassemble instructions from `rip`, in Intel syntax."""
        import iced_x86 as iced

        code = self.code_at(rip, MOST_BYTES * count)
        if not code:
            return ["(no code is mapped here)"]
        formatter = iced.Formatter(iced.FormatterSyntax.INTEL)
        lines = []
        for instruction in iced.Decoder(64, code, ip=rip):
            start = instruction.ip - rip & _U64
            raw = code[start : start + instruction.len].hex()
            lines.append(
                f"{instruction.ip:#x}: {raw:<20} {formatter.format(instruction)}"
            )
            if len(lines) == count:
                break
        return lines


def _decode_operand(code: bytes) -> tuple[Any, ...]:
    import iced_x86 as iced

    register = iced.Register
    numbers: dict[int, int | str | None] = {
        getattr(register, name): number for number, name in enumerate(REGISTERS)
    }
    numbers[register.NONE] = None
    numbers[register.RIP] = "rip"
    instruction = iced.Decoder(64, code).decode()
    displacement = instruction.memory_displacement
    if instruction.memory_base == register.RIP:
        displacement -= instruction.len  # iced gives the target for code at 0
    segment = {register.FS: FS, register.GS: GS}.get(instruction.memory_segment)
    return (
        numbers[instruction.memory_base],
        numbers[instruction.memory_index],
        instruction.memory_index_scale,
        displacement,
        segment,
        instruction.len,
    )
