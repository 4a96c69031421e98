"""The page attribute table as Linux lays it out.

Source: Linux 6.1.192 arch/x86/mm/pat/memtype.c, pat_init().
"""

from __future__ import annotations

from enum import IntEnum

from ..hw.cpu import Cpu
from ..hw.msr import Pat


class MemoryType(IntEnum):
    """Memory types as the PAT encodes them. Source: [APM2] 7.8.1."""

    UC = 0
    WC = 1
    WT = 4
    WP = 5
    WB = 6
    UC_MINUS = 7


LINUX_PAT = Pat.of(
    pa0=MemoryType.WB,
    pa1=MemoryType.WC,
    pa2=MemoryType.UC_MINUS,
    pa3=MemoryType.UC,
    pa4=MemoryType.WB,
    pa5=MemoryType.WP,
    pa6=MemoryType.UC_MINUS,
    pa7=MemoryType.WT,
)
"""0x0407_0506_0007_0106: index 5 is WP, which in-place conversions need."""


def pat_init(cpu: Cpu) -> None:
    """Load Linux's layout into the PAT of a core.

    Source: Linux 6.1.192 arch/x86/mm/pat/memtype.c, pat_bp_init().
    """
    cpu.wrmsr(Pat.ADDRESS, LINUX_PAT.value)
