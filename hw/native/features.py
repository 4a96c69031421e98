"""The processor as the engine can execute it: CPUID without what the engine lacks.

The engine translates a fixed set of instructions. A kernel that is told of others uses
them and dies of #UD, so CPUID must not offer them. Also withheld: what this machine
does not model for machine code (performance counters, x2APIC, MWAIT, VMRUN, more than
one core), and RDRAND and RDSEED, whose host randomness no run can repeat. What remains
stands in offered.py. Leaf 8000_001F, memory encryption, passes whole.
"""

from __future__ import annotations

from dataclasses import replace

from ..cpuid import ABSENT, CpuidLeaf, CpuidTable, CpuModel
from ..cpuid.words import (
    Extended21Eax,
    FeatureEbx,
    FeatureEcx,
    SizesEcx,
    StructuredEbx,
)
from .offered import FLUSHES, OFFERED, WITHHELD_LEAVES, Offered

Rows = dict[tuple[int, int], CpuidLeaf]

CR4_OSXSAVE = 1 << 18

HYPERVISOR_LEAVES = 4
"""Leaves 4000_0000h and up: no hypervisor's interface is modelled, whatever a guest's
dump promises."""

XSAVE = 0x0000_000D
LAST_STANDARD_LEAF = XSAVE
XSAVE_COMPONENTS, XSAVE_SIZE = 0b11, 0x240
"""x87 and SSE: 512 bytes of legacy area and a header of 64."""

LEVELS = {0x0000_000B: (1, 2), 0x8000_0026: (1, 2, 3, 4)}
"""Topology leaves and the types of their levels: thread, core, complex, die."""

CACHES, CACHE_SHARING = 0x8000_001D, 0xFFF << 14
"""Leaf of the caches; EAX[25:14] is how many threads share one, less one."""

TOPOLOGY = 0x8000_001E


def engine_model(model: CpuModel, *, rdrand: bool = False) -> CpuModel:
    """Return a processor with the leaves that machine code may see here.

    Args:
        model: the real one; its leaf 8000_001F stays as it is.
        rdrand: offer RDRAND, which takes the host's randomness.
    """
    table = model.table.replace(_bounded(model.table))
    for offered in OFFERED:
        table = table.replace(_passed(table, offered, _mask(model, offered, rdrand)))
    return replace(model, table=table.replace(_one_core(table)))


def withheld(model: CpuModel, *, rdrand: bool = False) -> list[str]:
    """Return what `engine_model` takes away, for a report, in the order of leaves.

    One line a bit, `00000007 EBX[5] avx2`, without a name where hw/cpuid has none; one
    line a leaf that reads as zeros, `80000022`. Topology and sizes are left out.
    """
    lines = []
    for offered in OFFERED:
        word = model.table.word(offered.word)
        lost = word.value & ~_mask(model, offered, rdrand)
        if offered.word is FeatureEcx:
            lost &= ~FeatureEcx.osxsave.mask  # `with_osxsave` has it
        names = {field.mask: f" {field.name}" for field in word.FIELDS.values()}
        for bit in range(word.WIDTH_BITS):
            if lost >> bit & 1:
                name = names.get(1 << bit, "")
                place = f"{word.LEAF:08x} {word.REGISTER.upper()}[{bit}]"
                lines.append((word.LEAF, place + name))
    gone = {
        leaf
        for leaf, _, registers in model.table
        if _is_withheld(leaf) and registers != ABSENT
    }
    lines += [(leaf, f"{leaf:08x}") for leaf in gone]
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def with_osxsave(answer: CpuidLeaf, leaf: int, cr4: int) -> CpuidLeaf:
    """Return what CPUID gives while CR4 is as it is: OSXSAVE follows CR4[18].

    Args:
        answer: the leaf of the table.
        leaf: its number.
        cr4: the register now.
    """
    if leaf != FeatureEcx.LEAF or not answer.ecx & FeatureEcx.xsave.mask:
        return answer
    on = FeatureEcx.osxsave.mask if cr4 & CR4_OSXSAVE else 0
    return answer._replace(ecx=answer.ecx & ~FeatureEcx.osxsave.mask | on)


def _mask(model: CpuModel, offered: Offered, rdrand: bool) -> int:
    """Return the bits of a register that a processor may show."""
    mask = offered.mask
    if offered.word is FeatureEcx and not rdrand:
        mask &= ~FeatureEcx.rdrand.mask
    encryption = model.memory_encryption
    if encryption.usable and not encryption.hw_coherent:
        for field in FLUSHES:
            if field in offered.fields:
                mask &= ~field.mask
    return mask


def _passed(table: CpuidTable, offered: Offered, mask: int) -> Rows:
    word = offered.word
    if not table.has(word.LEAF):
        return {}
    kept = table.word(word).value & mask
    leaf = table.leaf(word.LEAF)._replace(**{word.REGISTER: kept})
    return {(word.LEAF, 0): leaf}


def _is_withheld(leaf: int) -> bool:
    return leaf in WITHHELD_LEAVES or leaf >> 28 == HYPERVISOR_LEAVES


def _bounded(table: CpuidTable) -> Rows:
    """Return the rows of zeros, and leaves that reach less far than the processor's."""
    several = (StructuredEbx.LEAF, XSAVE)
    rows: Rows = {
        (leaf, subleaf): ABSENT
        for leaf, subleaf in table.raw
        if _is_withheld(leaf) or (leaf in several and subleaf)
    }
    rows[0, 0] = table.leaf(0)._replace(eax=min(table.leaf(0).eax, LAST_STANDARD_LEAF))
    if table.has(StructuredEbx.LEAF):
        rows[StructuredEbx.LEAF, 0] = table.leaf(StructuredEbx.LEAF)._replace(eax=0)
    if table.has(XSAVE):
        rows[XSAVE, 0] = CpuidLeaf(XSAVE_COMPONENTS, XSAVE_SIZE, XSAVE_SIZE, 0)
    if table.has(Extended21Eax.LEAF):
        eax = table.word(Extended21Eax).value
        rows[Extended21Eax.LEAF, 0] = CpuidLeaf(eax, 0, 0, 0)
    return rows


def _one_core(table: CpuidTable) -> Rows:
    """Return the leaves that count cores and threads: one of each, APIC id 0."""
    first, sizes = table.leaf(FeatureEbx.LEAF), table.leaf(SizesEcx.LEAF)
    ebx = FeatureEbx(first.ebx).replace(logical_count=1, apic_id=0).value
    rows: Rows = {
        (FeatureEbx.LEAF, 0): first._replace(ebx=ebx),
        (SizesEcx.LEAF, 0): sizes._replace(ecx=0, edx=0),
    }
    for leaf, levels in LEVELS.items():
        listed = [subleaf for known, subleaf in table.raw if known == leaf]
        for subleaf in listed:
            rows[leaf, subleaf] = ABSENT
            if subleaf < len(levels) and table.leaf(leaf, subleaf).ecx >> 8:
                level = levels[subleaf] << 8 | subleaf
                rows[leaf, subleaf] = CpuidLeaf(0, 1, level, 0)
    for leaf, subleaf in table.raw:
        if leaf == CACHES:
            row = table.leaf(leaf, subleaf)
            rows[leaf, subleaf] = row._replace(eax=row.eax & ~CACHE_SHARING)
    if table.has(TOPOLOGY):
        rows[TOPOLOGY, 0] = ABSENT
    return rows
