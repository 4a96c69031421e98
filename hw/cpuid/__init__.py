"""CPUID: leaf tables, their decoding, and the reading of raw dumps."""

from .dump import dump_header, parse_dump, read_dump_text
from .memory_encryption import MemoryEncryption
from .model import CpuModel
from .table import ABSENT, CpuidLeaf, CpuidTable, LeafRange
from .words import CpuidWord

__all__ = [
    "ABSENT",
    "CpuModel",
    "CpuidLeaf",
    "CpuidTable",
    "CpuidWord",
    "LeafRange",
    "MemoryEncryption",
    "dump_header",
    "parse_dump",
    "read_dump_text",
]
