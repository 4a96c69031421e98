"""Virtual time from the code that runs: a counter that each block of code feeds.

The engine calls a hook at the start of every translated block. Ours is a few bytes of
machine code that subtract the block's length from a budget and call Python only when
nothing is left. So time depends on what the guest executed and on nothing else, a run
can be repeated to the event, and a loop that touches no device still ends its slice.

    mov r8, [rcx + 16]    ; rcx: user data
    cmp word ptr [r8], 0  ; the engine was asked to leave: it will not execute the
    jne done              ; block now, but come here again
    mov eax, edx          ; length of the block, in bytes of code
    sub [rcx], rax        ; the budget
    js  expired
    done: ret
    expired: jmp [rcx + 8]
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

from .engine import BLOCK, HOOK_BLOCK, Engine

_STUB = bytes.fromhex("4c8b4110 6641833800 7507 89d0 482901 7801 c3 ff6108")

BYTES_PER_NS_SHIFT = 2
"""Four bytes of code, about one instruction, take a nanosecond."""


class _Budget(ctypes.Structure):
    _fields_ = (
        ("left", ctypes.c_int64),
        ("expired", ctypes.c_void_p),
        ("leaving", ctypes.c_void_p),
    )


class BlockClock:
    """Counts executed code and calls back when a slice of it is used up.

    Args:
        engine: gets the hook.
        leaving_address: of the engine's 16-bit word that asks it to leave at the start
            of the next block.
        expired: called between two blocks; must call `start_slice`.

    Attributes:
        executed: bytes of code in finished slices.
    """

    def __init__(
        self, engine: Engine, leaving_address: int, expired: Callable[[], None]
    ) -> None:
        self.executed = 0
        self._slice = 0
        self._budget = _Budget()

        leaving = ctypes.c_uint16.from_address(leaving_address)
        self._budget.leaving = leaving_address

        def callback(_uc: Any, _address: int, size: int, _user: Any) -> None:
            expired()
            if leaving.value:  # it will come again
                self._left[0] += size

        self._callback = BLOCK(callback)
        self._budget.expired = ctypes.cast(self._callback, ctypes.c_void_p).value
        self._code = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
        self._code.write(_STUB)
        entry = ctypes.addressof(ctypes.c_char.from_buffer(self._code))
        self._left = memoryview(self._budget).cast("B")[:8].cast("q")
        engine.hook_address(HOOK_BLOCK, entry, ctypes.addressof(self._budget))

    @property
    def total(self) -> int:
        """Bytes of code executed since the start, and what was charged as such."""
        return self.executed + self._slice - self._left[0]

    @property
    def now(self) -> int:
        """The same in nanoseconds."""
        return self.executed + self._slice - self._left[0] >> BYTES_PER_NS_SHIFT

    def charge(self, nanoseconds: int) -> None:
        """Let something that is not code take time."""
        self._left[0] -= nanoseconds << BYTES_PER_NS_SHIFT

    def start_slice(self, nanoseconds: int) -> None:
        """Begin a slice of at most this length; the last one ends here.

        It ends at a whole nanosecond, wherever inside one it begins: so a run in parts
        sees timers expire at the same block as a run in one go.
        """
        self.executed = self.total
        begun = self.executed & (1 << BYTES_PER_NS_SHIFT) - 1
        length = (max(nanoseconds, 1) << BYTES_PER_NS_SHIFT) - begun
        self._slice = self._left[0] = length
