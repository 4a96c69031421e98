"""Address spaces as distinct types, and the sizes of pages and cache lines."""

from typing import NewType

PhysAddr = NewType("PhysAddr", int)
"""System physical byte address; never contains the C-bit."""

VirtAddr = NewType("VirtAddr", int)
"""Linear address as an instruction names it, 64 bits, canonical in long mode."""

GuestPhysAddr = NewType("GuestPhysAddr", int)
"""Physical byte address as a guest sees it, before the nested walk."""

DmaAddr = NewType("DmaAddr", int)
"""Bus address of a device; with SME it may carry the C-bit."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PAGE_OFFSET_MASK = PAGE_SIZE - 1

LARGE_PAGE_SIZE = 1 << 21
HUGE_PAGE_SIZE = 1 << 30

CACHE_LINE_SIZE = 64
LINES_PER_PAGE = PAGE_SIZE // CACHE_LINE_SIZE


def align_down(value: int, alignment: int) -> int:
    """Return the largest multiple of `alignment`, a power of two, up to `value`."""
    return value & -alignment


def align_up(value: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment`, a power of two, from `value` up."""
    return (value + alignment - 1) & -alignment
