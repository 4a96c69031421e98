"""The processor as the engine can execute it: CPUID without what the engine lacks.

The engine translates a fixed set of instructions. A kernel that is told of others uses
them and dies of #UD, so CPUID must not offer them. Also masked: what this machine does
not model for machine code (performance counters, x2APIC, MWAIT, more than one core),
and RDRAND, whose host randomness no run can repeat.

Source: unicorn 2.1.4, target/i386/cpu.c (TCG_*_FEATURES) and translate.c, read for
facts; bit names: [APM3] appendix E, Linux 6.1.192 asm/cpufeatures.h.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..cpuid import CpuidLeaf, CpuModel

Output = Literal["eax", "ebx", "ecx", "edx"]


@dataclass(frozen=True)
class Offered:
    """The bits of one CPUID register that the engine and the machine have.

    Attributes:
        bits: name of each bit that is passed on, by number.
    """

    leaf: int
    output: Output
    bits: Mapping[int, str]

    @property
    def mask(self) -> int:
        """The bits as a mask."""
        return sum(1 << bit for bit in self.bits)


RDRAND_BIT = 30

OFFERED: tuple[Offered, ...] = (
    Offered(
        1,
        "ecx",
        {
            0: "sse3",
            1: "pclmulqdq",
            9: "ssse3",
            13: "cx16",
            19: "sse4_1",
            20: "sse4_2",
            22: "movbe",
            23: "popcnt",
            25: "aes",
            26: "xsave",
            RDRAND_BIT: "rdrand",
            31: "hypervisor",
        },
    ),
    Offered(
        1,
        "edx",
        {
            0: "fpu",
            1: "vme",
            2: "de",
            3: "pse",
            4: "tsc",
            5: "msr",
            6: "pae",
            7: "mce",
            8: "cx8",
            9: "apic",
            11: "sep",
            12: "mtrr",
            13: "pge",
            14: "mca",
            15: "cmov",
            16: "pat",
            17: "pse36",
            19: "clflush",
            23: "mmx",
            24: "fxsr",
            25: "sse",
            26: "sse2",
        },
    ),
    Offered(
        7,
        "ebx",
        {
            0: "fsgsbase",
            3: "bmi1",
            7: "smep",
            8: "bmi2",
            19: "adx",
            20: "smap",
            23: "clflushopt",
            24: "clwb",
        },
    ),
    Offered(7, "ecx", {16: "la57"}),
    Offered(7, "edx", {}),
    Offered(
        0x8000_0001,
        "ecx",
        {0: "lahf", 4: "cr8_legacy", 5: "abm", 6: "sse4a", 8: "prefetchw"},
    ),
    Offered(
        0x8000_0001,
        "edx",
        {
            **dict.fromkeys((*range(10), 12, 13, 14, 15, 16, 17, 23, 24), "as leaf 1"),
            11: "syscall",
            20: "nx",
            22: "mmxext",
            26: "pdpe1gb",
            27: "rdtscp",
            29: "lm",
        },
    ),
    Offered(0x8000_0007, "ebx", {}),
    Offered(0x8000_0007, "edx", {8: "invariant tsc"}),
    Offered(0x8000_0008, "ebx", {}),
)
"""What is passed on, where the processor has it; every other bit is withheld."""

EMPTY_LEAVES = (
    0x0000_0005,  # MONITOR and MWAIT
    0x0000_0006,  # thermal and power
    0x0000_000F,  # resource monitoring
    0x0000_0010,
    0x8000_001B,  # instruction-based sampling
    0x8000_001C,  # lightweight profiling
    0x8000_0020,  # bandwidth enforcement
    0x8000_0021,
    0x8000_0022,  # performance counters
    0x8000_0026,  # topology
)

INCOHERENT_WITHHELD = ((1, "edx", 19), (7, "ebx", 23), (7, "ebx", 24))
"""CLFLUSH, CLFLUSHOPT and CLWB reach the engine alone, which has no caches. Software
that is not offered them takes WBINVD, which reaches the machine's."""

HYPERVISOR_LEAVES = 4
"""Leaves 4000_0000h and up."""

XSAVE_COMPONENTS, XSAVE_SIZE = 0b11, 0x240
"""x87 and SSE: 512 bytes of legacy area and a header of 64."""


def engine_model(model: CpuModel, *, rdrand: bool = False) -> CpuModel:
    """Return a processor with the leaves that machine code may see here.

    Args:
        model: the real one; its leaf 8000_001F stays as it is.
        rdrand: offer RDRAND, which takes the host's randomness.
    """
    table = model.table
    leaves: dict[tuple[int, int], CpuidLeaf] = {}

    def change(leaf: int, output: Output, value: int) -> None:
        old = leaves.get((leaf, 0), table.leaf(leaf))
        leaves[leaf, 0] = old._replace(**{output: value})

    for offered in OFFERED:
        mask = offered.mask
        if (offered.leaf, offered.output) == (1, "ecx") and not rdrand:
            mask &= ~(1 << RDRAND_BIT)
        change(
            offered.leaf,
            offered.output,
            getattr(table.leaf(offered.leaf), offered.output) & mask,
        )
    if not model.memory_encryption.hw_coherent and model.memory_encryption.usable:
        for leaf, output, bit in INCOHERENT_WITHHELD:
            value = getattr(leaves[leaf, 0], output)
            change(leaf, output, value & ~(1 << bit))  # type: ignore[arg-type]
    for leaf in EMPTY_LEAVES:
        leaves[leaf, 0] = CpuidLeaf(0, 0, 0, 0)
    # No hypervisor's own interface is modelled, whatever a guest's dump promises.
    for leaf, subleaf, _ in table:
        if leaf >> 28 == HYPERVISOR_LEAVES:
            leaves[leaf, subleaf] = CpuidLeaf(0, 0, 0, 0)
    # One core with one thread.
    change(0, "eax", min(table.leaf(0).eax, 0xD))
    change(1, "ebx", table.leaf(1).ebx & 0xFFFF | 1 << 16)
    change(7, "eax", 0)
    change(0x8000_0008, "ecx", 0)
    change(0x8000_0008, "edx", 0)
    leaves[0xB, 0] = leaves[0xB, 1] = CpuidLeaf(0, 0, 0, 0)
    leaves[0x8000_001E, 0] = CpuidLeaf(0, 0, 0, 0)
    leaves[0xD, 0] = CpuidLeaf(XSAVE_COMPONENTS, XSAVE_SIZE, XSAVE_SIZE, 0)
    for subleaf in range(1, 64):
        if (0xD, subleaf) in {(leaf, sub) for leaf, sub, _ in table}:
            leaves[0xD, subleaf] = CpuidLeaf(0, 0, 0, 0)
    return replace(model, table=table.replace(leaves))


def withheld(model: CpuModel) -> list[str]:
    """Return what `engine_model` takes away, as `leaf register mask` lines."""
    shown = engine_model(model)
    lines = []
    for offered in OFFERED:
        before = getattr(model.table.leaf(offered.leaf), offered.output)
        after = getattr(shown.table.leaf(offered.leaf), offered.output)
        if lost := before & ~after:
            lines.append(f"{offered.leaf:#x} {offered.output} {lost:#010x}")
    return lines
