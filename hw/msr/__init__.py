"""Model-specific registers: their fields, their rules, and the file of one core."""

from . import choices
from .msr_file import MsrFault, MsrFile
from .registers import (
    Efer,
    Ghcb,
    Hwcr,
    Msr,
    Pat,
    RmpBase,
    RmpEnd,
    SevStatus,
    SmmAddr,
    SmmBase,
    SmmMask,
    Syscfg,
    TopMem,
    TopMem2,
    VmHsavePa,
    VmPageFlush,
)
from .rule import Access, MsrRule
from .rules import MSRS, RULES

__all__ = [
    "MSRS",
    "RULES",
    "Access",
    "Efer",
    "Ghcb",
    "Hwcr",
    "Msr",
    "MsrFault",
    "MsrFile",
    "MsrRule",
    "Pat",
    "RmpBase",
    "RmpEnd",
    "SevStatus",
    "SmmAddr",
    "SmmBase",
    "SmmMask",
    "Syscfg",
    "TopMem",
    "TopMem2",
    "VmHsavePa",
    "VmPageFlush",
    "choices",
]
