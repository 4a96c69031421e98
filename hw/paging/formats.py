"""Page-table formats as data: levels, entry bits, which bits are reserved.

Every reader of page tables (the scalar walk, later the native core's fill and the
array enumeration) takes levels and reserved bits from here.

Source: [APM2] 5.3 and 5.4; the C-bit and the reduced width: [APM2] 7.10.1, 15.34.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from ..types import PAGE_SHIFT

ENTRY_SIZE = 8
ENTRIES_PER_TABLE = 512
INDEX_MASK = ENTRIES_PER_TABLE - 1


class Entry(IntFlag):
    """Bits of an entry that mean the same at every level, by hardware's names."""

    P = 1 << 0
    RW = 1 << 1
    US = 1 << 2
    PWT = 1 << 3
    PCD = 1 << 4
    A = 1 << 5
    D = 1 << 6
    PS = 1 << 7
    G = 1 << 8
    NX = 1 << 63


@dataclass(frozen=True)
class Level:
    """One level of tables.

    Attributes:
        name: of the table that is indexed ("PML4" .. "PT").
        shift: lowest bit of the virtual address that indexes it.
        maps_page: every entry is a leaf (the lowest level).
        may_be_leaf: an entry with PS set is a leaf.
    """

    name: str
    shift: int
    maps_page: bool = False
    may_be_leaf: bool = False

    @property
    def page_size(self) -> int:
        """Bytes that one entry of this level covers."""
        return 1 << self.shift


@dataclass(frozen=True)
class Format:
    """A kind of page table: its levels, top first, and the virtual width."""

    name: str
    levels: tuple[Level, ...]
    virtual_bits: int

    def is_canonical(self, va: int) -> bool:
        """Tell whether the bits above the virtual width all equal its top bit."""
        top = va >> (self.virtual_bits - 1)
        return top in (0, (1 << (65 - self.virtual_bits)) - 1)


_LOWER = (
    Level("PML4", 39),
    Level("PDPT", 30, may_be_leaf=True),
    Level("PD", 21, may_be_leaf=True),
    Level("PT", 12, maps_page=True),
)

LONG_4_LEVEL = Format("4-level", _LOWER, 48)
LONG_5_LEVEL = Format("5-level", (Level("PML5", 48), *_LOWER), 57)


def bits(high: int, low: int) -> int:
    """Return a mask of bits `high` down to `low`; 0 when high < low."""
    return ((1 << max(high - low + 1, 0)) - 1) << low


@dataclass(frozen=True)
class AddressRules:
    """Which bits of an entry are address, which must be 0, which is the C-bit.

    Attributes:
        physical_bits: width of a physical address, already reduced while SYSCFG[23]
            is 1.
        c_mask: the C-bit, or 0 when SYSCFG[23] is 0 and the position is an ordinary
            address or reserved bit (unverified for the latter).
        no_execute: EFER.NXE; without it bit 63 is reserved.
        huge_pages: 1 GiB leaves exist (CPUID 8000_0001 EDX[26]).
    """

    physical_bits: int
    c_mask: int = 0
    no_execute: bool = True
    huge_pages: bool = True

    @property
    def address_mask(self) -> int:
        """Address bits of a 4 KiB entry; the C-bit is never among them."""
        return bits(min(self.physical_bits, 52) - 1, PAGE_SHIFT) & ~self.c_mask

    @property
    def root_reserved_mask(self) -> int:
        """Bits that must be 0 in CR3 besides PCID and the no-flush hint."""
        return bits(62, self.physical_bits) & ~self.c_mask

    def leaf_allowed(self, level: Level) -> bool:
        """Tell whether PS makes a leaf at this level on this processor."""
        return level.may_be_leaf and (level.shift < 30 or self.huge_pages)

    def reserved_mask(self, level: Level, *, leaf: bool) -> int:
        """Return the bits that must be 0 in a present entry of this level.

        The C-bit is exempt, also where it lies above the physical width.
        """
        mask = bits(51, self.physical_bits) & ~self.c_mask
        if not self.no_execute:
            mask |= Entry.NX
        if leaf and not level.maps_page:
            # Below the frame of a large page only bit 12 (PAT) is used.
            mask |= bits(level.shift - 1, PAGE_SHIFT + 1)
        if not level.maps_page and not self.leaf_allowed(level):
            mask |= Entry.PS
        # A plain integer: enum arithmetic would make the walk five times slower.
        return int(mask)

    def leaf_address_mask(self, level: Level) -> int:
        """Return the address bits of a leaf of this level."""
        return self.address_mask & -level.page_size
