"""Long REP MOVS and REP STOS, done in one go.

The engine repeats string instructions one element at a time, through a TLB whose
entries last a page. A fill for a store is where a long one shows: the core refuses the
fill, the engine ends at the exact element, and the rest is moved here through the
Python core's own copy and fill, with whole pages overwritten and no cipher for what
they held.

Source: [APM3] chapter 1, "Repeat Prefixes"; MOVS, STOS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..cpu import Cpu
from ..cpu.mmu import USER, WRITE
from ..faults import CpuException
from ..types import PAGE_SHIFT, PAGE_SIZE
from .state import RAX, RCX, RDI, RSI, EngineState

_U64 = (1 << 64) - 1

WORTH_IT = 2 * PAGE_SIZE
"""Bytes left from which a bulk operation beats the engine."""

_MOVS, _STOS = (0xA4, 0xA5), (0xAA, 0xAB)


class StringOperation(NamedTuple):
    """A REP MOVS or STOS as the registers stand: elements of `size` bytes."""

    copies: bool
    size: int
    elements: int
    length: int


@dataclass
class Reach:
    """Bytes from an address on that can be accessed, and the frames they lie in."""

    length: int = 0
    frames: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.length


class Bulk:
    """Recognises and performs long string operations of one core.

    Args:
        state: the engine's registers.
        cpu: moves the bytes.
        ram: page ranges [first, end) of RAM; devices get each element by itself.

    Attributes:
        performed: how many there were.
        code_at: returns code bytes at an address, up to a length.
    """

    def __init__(
        self, state: EngineState, cpu: Cpu, ram: Sequence[tuple[int, int]]
    ) -> None:
        self.performed = 0
        self._other_code = -1  # where there was no string operation, last
        self._state = state
        self._cpu = cpu
        self._ram = ram
        self.code_at: Callable[[int, int], bytes] = lambda rip, length: b""

    def forget(self) -> None:
        """Forget where there was no string operation."""
        self._other_code = -1

    def is_worth_it(self, va: int) -> bool:
        """Tell whether the access that misses at page `va` belongs to a long one."""
        regs = self._state.regs
        if regs[RCX] < WORTH_IT // 8 or va not in (
            regs[RDI] & -PAGE_SIZE,
            regs[RSI] & -PAGE_SIZE,
        ):
            return False
        rip = self._state.rip
        if rip == self._other_code:
            return False
        operation = self.decode()
        if operation is None:
            self._other_code = rip
            return False
        return operation.size * operation.elements >= WORTH_IT

    def decode(self) -> StringOperation | None:
        """Return the operation at RIP, or None if it is none that is done here."""
        code = self.code_at(self._state.rip, 4)
        if len(code) < 2 or code[0] != 0xF3:
            return None
        at, wide = 1, False
        if code[1] & 0xF0 == 0x40:
            at, wide = 2, bool(code[1] & 8)
        if len(code) <= at or code[at] not in _MOVS + _STOS:
            return None
        size = (8 if wide else 4) if code[at] & 1 else 1
        return StringOperation(code[at] in _MOVS, size, self._state.regs[RCX], at + 1)

    def perform(self, operation: StringOperation) -> tuple[int, int]:
        """Do as much as the mappings allow; return where bytes went and how many.

        The registers are left as the instruction leaves them at that element. A fault
        ends it early and is for the engine to find again.
        """
        regs, cpu = self._state.regs, self._cpu
        target, source = regs[RDI], regs[RSI]
        wanted = operation.size * operation.elements
        if self._state.direction_down:
            return self._perform_down(operation)
        length = wanted
        if operation.copies:
            length = len(self._reachable(source, length, write=False))
        length = len(self._reachable(target, length, write=True))
        if operation.copies and target - source & _U64 < length:
            length = 0  # each element repeats an earlier one: not a copy
        length -= length % operation.size
        if not length:
            return target, 0
        if operation.copies:
            cpu.copy(target, source, length)
            regs[RSI] = source + length & _U64
        else:
            self._fill(target, operation.size, length)
        regs[RDI] = target + length & _U64
        regs[RCX] -= length // operation.size
        self.performed += 1
        return target, length

    def _perform_down(self, operation: StringOperation) -> tuple[int, int]:
        """Do a MOVS that goes to lower addresses, whole or not at all."""
        regs, cpu, size = self._state.regs, self._cpu, operation.size
        length = size * operation.elements
        target = regs[RDI] + size - length & _U64
        source = regs[RSI] + size - length & _U64
        repeats = source - target & _U64 < length
        if not operation.copies or repeats:
            return target, 0
        places = [
            self._reachable(va, length, write=write)
            for va, write in ((source, False), (target, True))
        ]
        if min(map(len, places)) < length or places[0].frames & places[1].frames:
            return target, 0
        cpu.store(target, cpu.load(source, length))
        regs[RDI] = target - size & _U64
        regs[RSI] = source - size & _U64
        regs[RCX] = 0
        self.performed += 1
        return target, length

    def _reachable(self, va: int, length: int, *, write: bool) -> Reach:
        """Return how far the bytes from `va` on are RAM that may be accessed.

        Nothing is marked but A bits: D and CR2 are for accesses that come about.
        """
        mmu, reach = self._cpu.mmu, Reach()
        walker, user = mmu.walker, USER if mmu.user else 0
        access = user | WRITE if write else user
        length = min(length, (1 << 64) - va)
        while reach.length < length:
            here = va + reach.length
            try:
                found = mmu.walk(here, user)
            except CpuException:
                break
            if walker is not None and found.rights | access << 3 in walker.refused:
                break
            page = found.pa >> PAGE_SHIFT
            end = next((end for first, end in self._ram if first <= page < end), page)
            leaf = 1 << found.shift
            pages = min(
                leaf - (here & leaf - 1) + PAGE_SIZE - 1 >> PAGE_SHIFT, end - page
            )
            if not pages:
                break
            reach.frames.update(range(page, page + pages))
            reach.length += (pages << PAGE_SHIFT) - here % PAGE_SIZE
        reach.length = min(reach.length, length)
        return reach

    def _fill(self, va: int, size: int, length: int) -> None:
        element = (self._state.regs[RAX] & (1 << 8 * size) - 1).to_bytes(size, "little")
        if element == element[:1] * size:
            self._cpu.fill(va, element[0], length)
            return
        words = np.frombuffer(element * (PAGE_SIZE // size), np.uint8)
        done = 0
        while done < length:
            part = words[: min(PAGE_SIZE, length - done)]
            self._cpu.store(va + done, part.tobytes())
            done += len(part)
