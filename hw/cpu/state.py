"""What a core holds beside its MSRs, for snapshots."""

from __future__ import annotations

from typing import NamedTuple


class CpuState(NamedTuple):
    """Control registers, privilege level and RFLAGS.AC of one core."""

    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cpl: int
    alignment_check: bool
