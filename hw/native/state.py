"""The engine's processor state, read and written where it lies.

The library has public functions for registers, but none for privilege level, hidden
segment parts, intercepts, or the entries of its TLB. All of them lie in one structure
whose layout belongs to one build of the library. It is found from the handle and
checked before it is used: marker values in the registers, values after reset, and
pointers that must agree. Another build is refused.

Source: unicorn 2.1.4, target/i386/cpu.h, include/exec/cpu-defs.h,
include/hw/core/cpu.h, include/uc_priv.h: read for offsets only.
"""

from __future__ import annotations

import ctypes
import os
import struct

from .engine import REG_EFLAGS, Engine, EngineError

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R11 = 11
ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR = range(10)

# Bits of hflags, and of what decides about interrupts.
CPL_MASK = 3
INHIBIT_IRQ = 1 << 3
SS32, CS32, ADDSEG, CS64, GUEST = 1 << 5, 1 << 4, 1 << 6, 1 << 15, 1 << 21
INTERRUPT_HARD = 1 << 1
RFLAGS_RF = 1 << 16

# Offsets from the start of the processor state (`env`).
_REGS, _RIP, _EFLAGS = 0, 128, 136
_CC_OP, _DF, _HFLAGS, _HFLAGS2 = 168, 172, 176, 180
_SEGMENTS, _SEGMENT_SIZE = 184, 24
_CR = 424
_TLB_FAST, _TLB_DESC, _TLB_DESC_SIZE = -64, -2160, 696
_ICOUNT = -16
_STATE_SIZE = 5568
# Offsets from the end of the part that a context saves.
_ERROR_CODE, _IS_INT, _NEXT_EIP, _DR = -184, -180, -176, -168
_OLD_EXCEPTION, _VMCB, _INTERCEPT = -72, -64, -48
_CR_READ, _CR_WRITE = -40, -38

# Offsets in the library's own structure (`uc_struct`) from `cpu_context_size`.
_INVALID_ADDR, _STOP_REQUEST, _NO_EXIT_REQUEST = 1416, 1394, 2034
_CONTEXT_SIZE, _UC_SIZE = 2016, 2600

# Offset of the engine's CPU object's address in `uc_struct`; offsets in that object:
# the state, and the addresses of state and instruction counter.
_CPU_POINTER, _ENV, _ENV_POINTER = 440, 35408, 296
_CPU_EXIT_REQUEST, _CPU_INTERRUPT_REQUEST = 21, 28

MMU_MODES = 3
TLB_ENTRY_SIZE = 64
_TAGS = 24
"""Bytes of an entry that say for which loads, stores and fetches it counts."""
VICTIMS = 8
_NEVER = (1 << 62).to_bytes(8, "little")


class Segment:
    """One segment register: selector, base, limit, flags of its descriptor."""

    def __init__(self, address: int) -> None:
        self._view = _view(address, _SEGMENT_SIZE)
        self._words = self._view.cast("I")
        self._quads = self._view.cast("Q")

    @property
    def selector(self) -> int:
        """The visible part."""
        return self._words[0]

    @property
    def base(self) -> int:
        """Linear address of the segment, or of a descriptor table."""
        return self._quads[1]

    @property
    def limit(self) -> int:
        """Highest offset."""
        return self._words[4]

    @property
    def flags(self) -> int:
        """Bits 55:40 of the descriptor, at 23:8."""
        return self._words[5]

    def load(self, selector: int, base: int, limit: int, flags: int) -> None:
        """Set all parts without a check."""
        self._words[0] = selector
        self._quads[1] = base
        self._words[4] = limit
        self._words[5] = flags


class EngineState:
    """Views of the live state.

    Attributes:
        regs: the 16 general registers, in the order of their encoding.
        quads, words: the whole state as 64-bit and 32-bit items.
        segments: by `ES` .. `IDTR`.
        leaving_address: of the 16-bit word that `leave_chain` sets.

    Raises:
        EngineError: the state does not lie where this build of the library has it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        handle = engine.handle
        self._uc = _view(handle, _UC_SIZE)
        cpu, env = _find(engine)
        self.env = env
        self.regs = _view(env + _REGS, 128).cast("Q")
        self.quads = _view(env, _STATE_SIZE).cast("Q")
        self.words = _view(env, _STATE_SIZE).cast("I")
        self.segments = [
            Segment(env + _SEGMENTS + _SEGMENT_SIZE * index) for index in range(10)
        ]
        self._below = _view(env - 4096, 4096)
        self._cpu = _view(cpu, 64)
        self._end16 = _view(env + _STATE_SIZE - 64, 64).cast("H")
        self._fast = _view(env + _TLB_FAST, 16 * MMU_MODES).cast("Q")
        self._victims = [
            _view(
                env + _TLB_DESC + _TLB_DESC_SIZE * mode + 48, VICTIMS * TLB_ENTRY_SIZE
            )
            for mode in range(MMU_MODES)
        ]
        self._verify()
        self._uc[_NO_EXIT_REQUEST] = 1
        self.leaving_address = env + _ICOUNT + 2

    # Registers

    @property
    def rip(self) -> int:
        """Instruction pointer."""
        return self.quads[_RIP // 8]

    @rip.setter
    def rip(self, value: int) -> None:
        self.quads[_RIP // 8] = value & (1 << 64) - 1

    @property
    def rflags(self) -> int:
        """RFLAGS, the engine's lazy arithmetic flags folded in."""
        return self._engine.read_register(REG_EFLAGS)

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._engine.write_register(REG_EFLAGS, value)

    @property
    def system_flags(self) -> int:
        """RFLAGS without the arithmetic flags and DF: IF, AC, TF and the like."""
        return self.quads[_EFLAGS // 8]

    @property
    def direction_down(self) -> bool:
        """RFLAGS.DF."""
        return self.words[_DF // 4] != 1

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        return self.words[_HFLAGS // 4] & CPL_MASK

    @property
    def hflags(self) -> int:
        """The engine's summary of the mode."""
        return self.words[_HFLAGS // 4]

    @hflags.setter
    def hflags(self, value: int) -> None:
        self.words[_HFLAGS // 4] = value

    def set_cr(self, number: int, value: int) -> None:
        """Store a control register without its effects."""
        self.quads[_CR // 8 + number] = value

    def cr(self, number: int) -> int:
        """Return a control register as the engine has it."""
        return self.quads[_CR // 8 + number]

    @property
    def debug_registers(self) -> list[int]:
        """DR0 to DR7."""
        start = (_STATE_SIZE + _DR) // 8
        return list(self.quads[start : start + 8])

    @debug_registers.setter
    def debug_registers(self, values: list[int]) -> None:
        start = (_STATE_SIZE + _DR) // 8
        for index, value in enumerate(values):
            self.quads[start + index] = value

    # Exceptions, intercepts, interrupts

    @property
    def error_code(self) -> int:
        """Error code of the exception that is reported now."""
        return self.words[(_STATE_SIZE + _ERROR_CODE) // 4]

    def settle_exception(self) -> bool:
        """Clear the marks of the reported exception; tell if it was INT n."""
        index = (_STATE_SIZE + _IS_INT) // 4
        software = bool(self.words[index])
        self.words[index] = 0
        self.words[(_STATE_SIZE + _OLD_EXCEPTION) // 4] = 0xFFFF_FFFF
        return software

    def intercept(self, vmcb: int, codes: set[int]) -> None:
        """Turn SVM intercepts on: the instructions end in the interrupt hook.

        Args:
            vmcb: physical page with a VMCB that names an MSR permission map.
            codes: SVM exit codes: 00h-1Fh control registers, 60h and up the others.
        """
        end = _STATE_SIZE
        self.quads[(end + _VMCB) // 8] = vmcb
        self.quads[(end + _INTERCEPT) // 8] = sum(
            1 << code - 0x60 for code in codes if code >= 0x60
        )
        reads = sum(1 << code for code in codes if code < 0x10)
        writes = sum(1 << code - 0x10 for code in codes if 0x10 <= code < 0x20)
        self._end16[(64 + _CR_READ) // 2] = reads
        self._end16[(64 + _CR_WRITE) // 2] = writes
        self.hflags |= GUEST

    def raise_interrupt_line(self) -> None:
        """Let the engine report exit 60h as soon as RFLAGS.IF allows."""
        request = self._cpu.cast("I")
        request[_CPU_INTERRUPT_REQUEST // 4] |= INTERRUPT_HARD
        self.leave_chain()

    def lower_interrupt_line(self) -> None:
        """Withdraw what `raise_interrupt_line` asked for."""
        request = self._cpu.cast("I")
        request[_CPU_INTERRUPT_REQUEST // 4] &= ~INTERRUPT_HARD

    def leave_chain(self) -> None:
        """Make the engine look at its requests before the next block."""
        self._below[4096 + _ICOUNT + 2 : 4096 + _ICOUNT + 4] = b"\xff\xff"

    @property
    def fault_address(self) -> int:
        """Full virtual address of the last refused TLB fill."""
        return int.from_bytes(self._uc[_INVALID_ADDR : _INVALID_ADDR + 8], "little")

    # The software TLB

    def drop_translation(self, page: int) -> None:
        """Drop the entries of one virtual page in every mode."""
        fast, memset = self._fast, ctypes.memset
        slot = page << 6
        memset(fast[1] + (slot & fast[0]), 0xFF, _TAGS)
        memset(fast[3] + (slot & fast[2]), 0xFF, _TAGS)
        memset(fast[5] + (slot & fast[4]), 0xFF, _TAGS)
        # The flags of a tag lie in its lowest 12 bits: look for the bytes above.
        wanted = (page >> 4).to_bytes(6, "little")
        for victims in self._victims:
            at = bytes(victims).find(wanted)
            while at >= 0:
                start = at & -TLB_ENTRY_SIZE
                victims[start : start + _TAGS] = b"\xff" * _TAGS
                at = bytes(victims).find(wanted, start + TLB_ENTRY_SIZE)

    def freeze_tlb_size_clock(self) -> None:
        """Keep the engine from sizing its TLB by the host's clock.

        A flush sizes a table by what was used in a window of host time; a window that
        never ends leaves only growth by use, which repeats.
        """
        for mode in range(MMU_MODES):
            start = 4096 + _TLB_DESC + _TLB_DESC_SIZE * mode + 16
            self._below[start : start + 8] = _NEVER

    # Saving

    def save(self) -> bytes:
        """Return the part of the state that a reset clears: registers, FPU, MSRs."""
        return bytes(_view(self.env, _STATE_SIZE + _VMCB))

    def restore(self, saved: bytes) -> None:
        """Set what `save` returned.

        Raises:
            EngineError: the length is another.
        """
        if len(saved) != _STATE_SIZE + _VMCB:
            raise EngineError(
                f"processor state of {len(saved)} bytes: {_STATE_SIZE + _VMCB} expected"
            )
        _view(self.env, len(saved))[:] = saved

    def _verify(self) -> None:
        drs = self.debug_registers
        found = {
            "DR6": (drs[6], 0xFFFF_0FF0),
            "DR7": (drs[7], 0x400),
            "flags before no_exit_request": (
                bytes(self._uc[_NO_EXIT_REQUEST - 2 : _NO_EXIT_REQUEST + 2]),
                b"\0\0\0\1",
            ),
            "instruction counter": (
                bytes(self._below[4096 + _ICOUNT : 4096 + _ICOUNT + 4]),
                bytes(4),
            ),
        }
        for name, (value, expected) in found.items():
            if value != expected:
                raise EngineError(
                    f"unicorn: {name} is {value!r}, {expected!r} expected: not the "
                    "build of the library that the native core knows"
                )


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _find(engine: Engine) -> tuple[int, int]:
    """Return the addresses of the engine's CPU object and of its register state."""
    lib_structure = _read(engine.handle, _UC_SIZE)
    if int.from_bytes(lib_structure[_CONTEXT_SIZE : _CONTEXT_SIZE + 4], "little") != (
        _STATE_SIZE
    ):
        raise EngineError("unicorn: the processor state has another size")
    start = lib_structure[_CPU_POINTER : _CPU_POINTER + 8]
    cpu = int.from_bytes(start, "little")
    env = cpu + _ENV
    pointers = struct.pack("<QQ", env, env + _ICOUNT)
    if _read(cpu + _ENV_POINTER, 16) != pointers:
        raise EngineError("unicorn: the processor state was not found")
    return cpu, env


def _read(address: int, length: int) -> bytes:
    """Read this process's memory; empty where nothing is mapped."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), length, address)
        except (OSError, OverflowError):
            return b""
