"""`CpuidTable`: what CPUID returns on one processor, with AMD's rules for absence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from ..errors import CallerError
from .words import CpuidWord, FeatureEcx

Word = TypeVar("Word", bound=CpuidWord)


class CpuidLeaf(NamedTuple):
    """The four registers after CPUID, in the order in which dumps print them."""

    eax: int
    ebx: int
    ecx: int
    edx: int


ABSENT = CpuidLeaf(0, 0, 0, 0)
"""What AMD parts return for a leaf they do not have."""


class LeafRange(IntEnum):
    """First leaf of each range that has a maximum of its own."""

    STANDARD = 0x0000_0000
    HYPERVISOR = 0x4000_0000
    EXTENDED = 0x8000_0000


RANGE_MASK = 0xFFFF_0000
HYPERVISOR_BLOCK_MASK = 0xFFFF_FF00
"""A hypervisor may present several interfaces, 0x100 leaves apart, each with a maximum.

Source: Linux 6.1.192 arch/x86/include/asm/processor.h, hypervisor_cpuid_base().
"""

SUBLEAF_COUNTS = {
    0x0000_0004: 8,
    0x0000_0007: 4,
    0x0000_000B: 4,
    0x0000_000D: 64,
    0x0000_000F: 2,
    0x0000_0010: 4,
    0x8000_001D: 8,
    0x8000_0020: 8,
    0x8000_0026: 8,
}
"""Leaves for which ECX counts, and how many sub-leaves are worth asking for.

Source: [APM3] appendix E; leaf 4 is for the hosts of `read_host`.
"""


class CpuidTable:
    """The leaves of one logical processor; immutable.

    A leaf above the maximum of its range is hidden even if the dump lists it, and a
    hidden or missing leaf reads as zeros. Where a leaf has no sub-leaves, ECX is
    ignored.

    Source: [APM3] appendix E; InstLatx64 dumps, which end with leaf 8FFF_FFFF.
    """

    __slots__ = ("_indexed", "_leaves", "raw")

    raw: Mapping[tuple[int, int], CpuidLeaf]
    """Every row of the dump by (leaf, sub-leaf), hidden ones included."""

    def __init__(self, leaves: Mapping[tuple[int, int], CpuidLeaf]) -> None:
        for key, registers in leaves.items():
            if not all(0 <= word < 1 << 32 for word in (*key, *registers)):
                raise CallerError(
                    f"CPUID leaf {key[0]:#x} sub-leaf {key[1]:#x}: "
                    "every number must fit in 32 bits"
                )
        self.raw = MappingProxyType(dict(sorted(leaves.items())))
        self._leaves = frozenset(leaf for leaf, _ in leaves)
        self._indexed = frozenset(SUBLEAF_COUNTS) | {
            leaf for leaf, subleaf in leaves if subleaf
        }

    def leaf(self, leaf: int, subleaf: int = 0) -> CpuidLeaf:
        """Return the registers after CPUID with EAX = `leaf` and ECX = `subleaf`."""
        if not self.has(leaf):
            return ABSENT
        return self.raw.get((leaf, subleaf if leaf in self._indexed else 0), ABSENT)

    def has(self, leaf: int) -> bool:
        """Return whether software can see `leaf`."""
        return leaf in self._leaves and leaf <= self._limit(leaf)

    def max_leaf(self, leaf_range: LeafRange = LeafRange.STANDARD) -> int:
        """Return the highest leaf of a range; 0 if the range is absent."""
        return self._limit(leaf_range)

    def word(self, kind: type[Word]) -> Word:
        """Return one register, decoded; all zeros if its leaf is absent."""
        return kind(getattr(self.leaf(kind.LEAF, kind.SUBLEAF), kind.REGISTER))

    def replace(self, leaves: Mapping[tuple[int, int], CpuidLeaf]) -> CpuidTable:
        """Return a table with some leaves changed or added, as a hypervisor does."""
        return CpuidTable({**self.raw, **leaves})

    @property
    def vendor(self) -> str:
        """The twelve characters of leaf 0: "AuthenticAMD"."""
        first = self.leaf(0)
        return _text(first.ebx, first.edx, first.ecx)

    @property
    def brand(self) -> str:
        """The processor's name from leaves 8000_0002 to 8000_0004, trimmed."""
        return _text(*(word for n in (2, 3, 4) for word in self.leaf(0x8000_0000 + n)))

    def _limit(self, leaf: int) -> int:
        """Return the highest leaf of the range or interface that `leaf` is in."""
        base = leaf & RANGE_MASK
        if base == LeafRange.HYPERVISOR:
            if not FeatureEcx(self._first(1).ecx).hypervisor:
                return 0
            base = leaf & HYPERVISOR_BLOCK_MASK
            # Old KVM hosts report 0 for a maximum of base + 1.
            return self._first(base).eax or base + 1
        if base in (LeafRange.STANDARD, LeafRange.EXTENDED):
            return self._first(base).eax
        return 0

    def _first(self, leaf: int) -> CpuidLeaf:
        return self.raw.get((leaf, 0), ABSENT)

    def __iter__(self) -> Iterator[tuple[int, int, CpuidLeaf]]:
        """Yield (leaf, sub-leaf, registers) of every visible row, in order."""
        for (leaf, subleaf), registers in self.raw.items():
            if self.has(leaf):
                yield leaf, subleaf, registers

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuidTable) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(frozenset(self.raw.items()))

    def __repr__(self) -> str:
        return f"<CpuidTable {self.brand or self.vendor!r}, {len(self.raw)} rows>"


def _text(*words: int) -> str:
    """Return the words as text; what a terminal should not see becomes `?`."""
    text = b"".join(word.to_bytes(4, "little") for word in words).decode("latin-1")
    visible = (c if c.isascii() and c.isprintable() else "?" for c in text.rstrip("\0"))
    return "".join(visible).strip()
