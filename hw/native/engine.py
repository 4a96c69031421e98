"""The Unicorn library through plain ctypes: the few calls the native core makes.

The library's own Python class costs 2 to 12 us a callback; ctypes prototypes on the
same library cost a third. The library is loaded so that a call keeps the interpreter
lock: nearly every call is short, and the long one calls back all the time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import (
    CFUNCTYPE,
    POINTER,
    c_bool,
    c_int,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import CbitError

UNICORN_VERSION = "2.1.4"
"""The private state of hw/native/state.py belongs to this build of the library."""

ARCH_X86, MODE_64 = 4, 8
HOOK_INTR, HOOK_INSN, HOOK_BLOCK = 1 << 0, 1 << 1, 1 << 3
HOOK_INSN_INVALID, HOOK_TLB_FILL = 1 << 14, 1 << 17
INS_IN, INS_OUT, INS_SYSCALL = 218, 500, 699
CPU_EPYC = 35
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
PROT_ALL = 7
MEM_READ, MEM_WRITE, MEM_FETCH = 16, 17, 18
OK, ERR_EXCEPTION = 0, 21

REG_EFLAGS, REG_CR0, REG_CR4, REG_MSR = 25, 50, 54, 248

_CTL_WRITE = 1 << 30
_CTL_ONE_ARGUMENT = 1 << 26
_CTL_USE_EXITS, _CTL_CPU_MODEL = 4, 7
_CTL_TB_REMOVE, _CTL_TB_FLUSH, _CTL_TLB_FLUSH, _CTL_TLB_TYPE = 9, 10, 11, 12
_TLB_VIRTUAL = 1

FILL = CFUNCTYPE(c_bool, c_void_p, c_uint64, c_int, c_void_p, c_void_p)
"""TLB fill: engine, page address, access, result, user data; False refuses."""
INTERRUPT = CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
INVALID = CFUNCTYPE(c_bool, c_void_p, c_void_p)
PORT_IN = CFUNCTYPE(c_uint32, c_void_p, c_uint32, c_int, c_void_p)
PORT_OUT = CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_uint32, c_void_p)
SYSCALL = CFUNCTYPE(None, c_void_p, c_void_p)
BLOCK = CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_void_p)
MMIO_READ = CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint32, c_void_p)
MMIO_WRITE = CFUNCTYPE(None, c_void_p, c_uint64, c_uint32, c_uint64, c_void_p)


class _MsrOperand(ctypes.Structure):
    _fields_ = (("index", c_uint32), ("value", c_uint64))


class EngineError(CbitError):
    """The library is missing, is another build, or refuses a call."""


def _load_library() -> ctypes.PyDLL:
    # Only the shared library is wanted: importing the package takes three times longer.
    package = find_spec("unicorn")
    places = package.submodule_search_locations if package else None
    if not places:
        raise EngineError(
            "the native core needs the package unicorn: pip install 'cbit[native]'"
        )
    path = Path(places[0]) / "lib" / "libunicorn.so.2"
    try:
        library = ctypes.PyDLL(str(path))
    except OSError as wrong:
        raise EngineError(f"{path}: {wrong}; a Linux x86-64 build expected") from None
    library.uc_version.restype = c_uint32
    word: int = library.uc_version(None, None)
    version = f"{word >> 24}.{word >> 16 & 0xFF}.{word >> 8 & 0xFF}"
    if version != UNICORN_VERSION:
        raise EngineError(
            f"unicorn {version}: {UNICORN_VERSION} expected, because some "
            "of its private state is used"
        )
    return library


class Engine:
    """One Unicorn instance in 64-bit mode with a TLB that we fill.

    Attributes:
        handle: address of the library's own structure.

    Raises:
        EngineError: the library is missing or another version.
    """

    def __init__(self) -> None:
        lib = _load_library()
        self._lib = lib
        self._kept: list[object] = []
        for name, types in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.argtypes, function.restype = types, c_int
        handle = c_void_p()
        self._check(lib.uc_open(ARCH_X86, MODE_64, ctypes.byref(handle)), "uc_open")
        assert handle.value is not None
        self.handle: int = handle.value
        self._handle = handle
        self._control(_CTL_CPU_MODEL, c_int(CPU_EPYC))
        self._control(_CTL_TLB_TYPE, c_int(_TLB_VIRTUAL))
        # No address ends a run: with an empty set of exits none is compared.
        self._control(_CTL_USE_EXITS, c_int(1))
        self._operand = _MsrOperand()
        self._word = c_uint64()

    def close(self) -> None:
        """Give the instance back; nothing of it may be used afterwards."""
        if self._handle:
            self._lib.uc_close(self._handle)
            self._handle = c_void_p()

    def map_memory(self, address: int, size: int, host_address: int) -> None:
        """Let the engine's physical range show host memory; flushes its TLB."""
        self._check(
            self._lib.uc_mem_map_ptr(
                self._handle, address, size, PROT_ALL, host_address
            ),
            f"mapping [{address:#x}, {address + size:#x})",
        )

    def map_device(
        self,
        address: int,
        size: int,
        read: Callable[[Any, int, int, Any], int],
        write: Callable[[Any, int, int, int, Any], None],
    ) -> None:
        """Let callbacks answer for a physical range, by offset and size."""
        read_callback, write_callback = MMIO_READ(read), MMIO_WRITE(write)
        self._kept += (read_callback, write_callback)
        self._check(
            self._lib.uc_mmio_map(
                self._handle,
                address,
                size,
                ctypes.cast(read_callback, c_void_p),
                None,
                ctypes.cast(write_callback, c_void_p),
                None,
            ),
            f"mapping devices at {address:#x}",
        )

    def hook(self, kind: int, callback: Any, instruction: int | None = None) -> None:
        """Install a callback made with one of this file's prototypes."""
        self._kept.append(callback)
        self.hook_address(
            kind, ctypes.cast(callback, c_void_p).value or 0, 0, instruction
        )

    def hook_address(
        self, kind: int, function: int, user_data: int, instruction: int | None = None
    ) -> None:
        """Install a native function by its address."""
        hook = c_size_t()
        arguments: list[object] = [
            self._handle,
            ctypes.byref(hook),
            c_int(kind),
            c_void_p(function),
            c_void_p(user_data),
            c_uint64(1),  # begin > end: everywhere
            c_uint64(0),
        ]
        if instruction is not None:
            arguments.append(c_int(instruction))
        self._check(self._lib.uc_hook_add(*arguments), f"hook {kind:#x}")

    def start(self, rip: int) -> int:
        """Run from `rip` until stopped; return the library's error number."""
        code: int = self._lib.uc_emu_start(self._handle, rip, 0, 0, 0)
        return code

    def stop(self) -> None:
        """Ask the running call of `start` to return at the next block."""
        self._lib.uc_emu_stop(self._handle)

    def flush_tlb(self) -> None:
        """Drop every translation of the engine's TLB; allowed in a callback."""
        self._control(_CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        """Drop every translated block; only between runs."""
        self._control(_CTL_TB_FLUSH)

    def forget_code(self, start: int, end: int) -> None:
        """Drop translated blocks of one page, by virtual address."""
        self._control(_CTL_TB_REMOVE, c_uint64(start), c_uint64(end))

    def read_register(self, register: int) -> int:
        """Read a register of 64 bits by its public number."""
        self._lib.uc_reg_read(self._handle, register, ctypes.byref(self._word))
        return self._word.value

    def write_register(self, register: int, value: int) -> None:
        """Write a register of 64 bits by its public number."""
        self._word.value = value
        self._lib.uc_reg_write(self._handle, register, ctypes.byref(self._word))

    def write_msr(self, index: int, value: int) -> None:
        """Give the engine's translator its own copy of an MSR."""
        self._operand.index, self._operand.value = index, value
        self._lib.uc_reg_write(self._handle, REG_MSR, ctypes.byref(self._operand))

    def read_msr(self, index: int) -> int:
        """Read the engine's own copy of an MSR."""
        self._operand.index, self._operand.value = index, 0
        self._lib.uc_reg_read(self._handle, REG_MSR, ctypes.byref(self._operand))
        return int(self._operand.value)

    def _control(self, what: int, *arguments: object) -> None:
        control = c_int(what | _CTL_WRITE | len(arguments) * _CTL_ONE_ARGUMENT)
        self._check(
            self._lib.uc_ctl(self._handle, control, *arguments), f"uc_ctl {what}"
        )

    def _check(self, code: int, what: str) -> None:
        if code != OK:
            raise EngineError(f"unicorn: {what}: error {code}")


_PROTOTYPES: dict[str, list[Any] | None] = {
    "uc_open": [c_int, c_int, POINTER(c_void_p)],
    "uc_close": [c_void_p],
    "uc_mem_map_ptr": [c_void_p, c_uint64, c_size_t, c_uint32, c_void_p],
    "uc_mmio_map": [c_void_p, c_uint64, c_size_t, *[c_void_p] * 4],
    "uc_emu_start": [c_void_p, c_uint64, c_uint64, c_uint64, c_size_t],
    "uc_emu_stop": [c_void_p],
    "uc_reg_read": [c_void_p, c_int, c_void_p],
    "uc_reg_write": [c_void_p, c_int, c_void_p],
    "uc_hook_add": None,
    "uc_ctl": None,
}
"""Argument types; None where the C function takes a varying number."""
