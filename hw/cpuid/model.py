"""`CpuModel`: one processor by name, with the properties that the machine asks for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .memory_encryption import MemoryEncryption
from .table import CpuidTable
from .words import (
    AddressSizes,
    ExtendedEcx,
    ExtendedEdx,
    FeatureEcx,
    FeatureEdx,
    StructuredEbx,
    StructuredEcx,
)


@dataclass(frozen=True)
class CpuModel:
    """A processor: its CPUID table and where the table came from.

    Attributes:
        name: what error messages and `--json` call it.
        source: the dump or the tool that the values were read from.
        table: the leaves.
        alias: a second, shorter name; "" if there is none.
    """

    name: str
    source: str
    table: CpuidTable
    alias: str = ""

    @cached_property
    def memory_encryption(self) -> MemoryEncryption:
        """Leaf 8000_001F, decoded."""
        return MemoryEncryption.decode(self.table)

    @cached_property
    def vendor(self) -> str:
        """Vendor string of leaf 0."""
        return self.table.vendor

    @cached_property
    def brand(self) -> str:
        """The processor's name as CPUID gives it."""
        return self.table.brand

    @cached_property
    def phys_bits(self) -> int:
        """Width of physical addresses before SME takes some."""
        return self.table.word(AddressSizes).phys_bits

    @cached_property
    def linear_bits(self) -> int:
        """Width of linear addresses: 48, or 57 with 5-level paging."""
        return self.table.word(AddressSizes).linear_bits

    @cached_property
    def nx(self) -> bool:
        """No-execute pages."""
        return bool(self.table.word(ExtendedEdx).nx)

    @cached_property
    def page_1gb(self) -> bool:
        """1 GiB pages (Linux: pdpe1gb)."""
        return bool(self.table.word(ExtendedEdx).page_1gb)

    @cached_property
    def la57(self) -> bool:
        """5-level paging."""
        return bool(self.table.word(StructuredEcx).la57)

    @cached_property
    def smep(self) -> bool:
        """Supervisor-mode execution prevention."""
        return bool(self.table.word(StructuredEbx).smep)

    @cached_property
    def smap(self) -> bool:
        """Supervisor-mode access prevention."""
        return bool(self.table.word(StructuredEbx).smap)

    @cached_property
    def pge(self) -> bool:
        """Global pages."""
        return bool(self.table.word(FeatureEdx).pge)

    @cached_property
    def pcid(self) -> bool:
        """Process-context identifiers."""
        return bool(self.table.word(FeatureEcx).pcid)

    @cached_property
    def pku(self) -> bool:
        """Protection keys for user pages."""
        return bool(self.table.word(StructuredEcx).pku)

    @cached_property
    def fsgsbase(self) -> bool:
        """RDFSBASE, WRFSBASE and their GS twins."""
        return bool(self.table.word(StructuredEbx).fsgsbase)

    @cached_property
    def umip(self) -> bool:
        """User-mode instruction prevention."""
        return bool(self.table.word(StructuredEcx).umip)

    @cached_property
    def svm(self) -> bool:
        """Secure virtual machine."""
        return bool(self.table.word(ExtendedEcx).svm)

    @cached_property
    def hypervisor(self) -> bool:
        """The processor is a virtual one: leaf 1 ECX[31]."""
        return bool(self.table.word(FeatureEcx).hypervisor)

    @property
    def sev_supported(self) -> bool:
        """SEV is announced."""
        return self.memory_encryption.sev
