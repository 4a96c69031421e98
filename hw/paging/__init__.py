"""Page tables as hardware reads them: formats as data, one walk, the TLB."""

from .formats import LONG_4_LEVEL, LONG_5_LEVEL, AddressRules, Entry, Format, Level
from .tlb import Tlb, Translation
from .walk import Access, PageWalker, Protection

__all__ = [
    "LONG_4_LEVEL",
    "LONG_5_LEVEL",
    "Access",
    "AddressRules",
    "Entry",
    "Format",
    "Level",
    "PageWalker",
    "Protection",
    "Tlb",
    "Translation",
]
