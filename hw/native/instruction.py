"""The instruction at RIP, as far as an exit needs it: bytes, operands, text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any

from ..cpu import Cpu
from ..faults import CpuException
from ..memory import MemoryBus
from ..paging import Access
from ..types import PAGE_SHIFT, PAGE_SIZE
from .state import FS, GS, RSP, EngineState

MOST_BYTES = 15
REGISTERS = (
    *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
    *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"),
)
"""Names of the general registers, in the order of their encoding."""
_PREFIXES = frozenset(bytes.fromhex("262e36363e64656667f0f2f3"))
_U64, _U32 = (1 << 64) - 1, (1 << 32) - 1
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

    def software_interrupt_length(self, vector: int) -> int:
        """Return the length of the INT n, INT1 or INT3 that ends at RIP."""
        last = self.code_at(self._state.rip - 1 & _U64, 1)
        return 1 if (vector, last) in ((1, b"\xf1"), (3, b"\xcc")) else 2

    def reads_descriptors(self, va: int) -> bool:
        """Tell whether the instruction at RIP reads a descriptor or the TSS at `va`.

        An operand in memory or on the stack in the same page is an access of its own
        and answers no.
        """
        import iced_x86 as iced

        code = self.code_at(self._state.rip, MOST_BYTES)
        if not code:
            return False
        instruction = iced.Decoder(64, code).decode()
        names, kinds = iced.Mnemonic, iced.OpKind
        operands = [self._state.regs[RSP]]
        if kinds.MEMORY in (instruction.op0_kind, instruction.op1_kind):
            operands.append(self.memory_operand()[0])
        if any(va - operand >> PAGE_SHIFT in (0, -1) for operand in operands):
            return False
        return (
            instruction.mnemonic
            in (
                *(names.LAR, names.LSL, names.VERR, names.VERW, names.LSS, names.LFS),
                *(names.LGS, names.RETF, names.IRET, names.IRETD, names.IRETQ),
                *(names.IN, names.OUT),
            )
            or instruction.is_jmp_far_indirect
            or instruction.is_call_far_indirect
            or (instruction.op_count > 0 and instruction.op0_register in _segments())
        )

    def cr_register(self) -> tuple[int, int]:
        """Return the general register of MOV to or from CR, and the length."""
        code = self.code_at(self._state.rip, MOST_BYTES)
        if code[0] == 0x0F:
            return code[2] & 7, 3
        at = rex = 0
        while code[at] in _PREFIXES:
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
        base, index, scale, displacement, segment, length, mask = known
        va = displacement
        if base == "rip":
            va += state.rip + length
        elif base is not None:
            va += state.regs[base]
        if index is not None:
            va += state.regs[index] * scale
        va &= mask
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


def _segments() -> tuple[int, ...]:
    from iced_x86 import Register

    return Register.DS, Register.ES, Register.FS, Register.GS, Register.SS


def _decode_operand(code: bytes) -> tuple[Any, ...]:
    import iced_x86 as iced

    register = iced.Register
    numbers: dict[int, int | str | None] = {
        getattr(register, name): number for number, name in enumerate(REGISTERS)
    }
    for number, name in enumerate(REGISTERS):  # with an address-size prefix
        numbers[getattr(register, f"E{name[1:]}" if number < 8 else f"{name}D")] = (
            number
        )
    numbers[register.NONE] = None
    numbers[register.RIP] = numbers[register.EIP] = "rip"
    instruction = iced.Decoder(64, code).decode()
    displacement = instruction.memory_displacement
    if instruction.memory_base in (register.RIP, register.EIP):
        displacement -= instruction.len  # iced gives the target for code at 0
    segment = {register.FS: FS, register.GS: GS}.get(instruction.memory_segment)
    return (
        numbers[instruction.memory_base],
        numbers[instruction.memory_index],
        instruction.memory_index_scale,
        displacement,
        segment,
        instruction.len,
        _U32 if 0x67 in takewhile(_PREFIXES.__contains__, code) else _U64,
    )
