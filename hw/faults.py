"""Architectural exceptions as Python exceptions: vector, error code, address.

A `Cpu` raises them when no handler is installed for the vector.
"""

from __future__ import annotations

from enum import IntFlag
from typing import ClassVar

from .errors import CbitError


class CpuException(CbitError):
    """An exception of the processor.

    Attributes:
        vector: the IDT vector.
        error_code: what the processor pushes, or None where it pushes nothing.
    """

    vector: ClassVar[int]
    mnemonic: ClassVar[str]

    def __init__(self, reason: str, error_code: int | None = None) -> None:
        self.error_code = error_code
        self.reason = reason
        code = "" if error_code is None else f"({error_code:#x})"
        super().__init__(f"#{self.mnemonic}{code}: {reason}")


class InvalidOpcode(CpuException):
    """#UD: the instruction does not exist on this processor, or not in this mode."""

    vector = 6
    mnemonic = "UD"


class GeneralProtection(CpuException):
    """#GP: a reserved bit, a bad MSR, a non-canonical address."""

    vector = 13
    mnemonic = "GP"

    def __init__(self, reason: str, error_code: int = 0) -> None:
        super().__init__(reason, error_code)


class PageFaultCode(IntFlag):
    """Error code of #PF. Source: [APM2] 8.2.15."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RESERVED = 1 << 3
    FETCH = 1 << 4
    PROTECTION_KEY = 1 << 5


class PageFault(CpuException):
    """#PF: a translation failed.

    Attributes:
        address: what CR2 receives.
        code: the error code by name.
        level: name of the table whose entry failed ("PML4" .. "PT"), or "".
        index: which entry of that table.
        entry: the entry as read, or None.
    """

    vector = 14
    mnemonic = "PF"

    def __init__(
        self,
        address: int,
        code: PageFaultCode,
        reason: str,
        level: str = "",
        index: int = 0,
        entry: int | None = None,
    ) -> None:
        self.address = address
        self.code = code
        self.level = level
        self.index = index
        self.entry = entry
        where = f" in {level}[{index}] = {entry:#018x}" if entry is not None else ""
        super().__init__(f"address {address:#x}: {reason}{where}", int(code))
        self.cause = reason

    def at(self, address: int) -> PageFault:
        """Return the same fault for another byte of the page."""
        return PageFault(
            address, self.code, self.cause, self.level, self.index, self.entry
        )


class VmmCommunication(CpuException):
    """#VC: an instruction that an SEV-ES guest must ask the hypervisor for.

    `error_code` is the SVM exit code.
    """

    vector = 29
    mnemonic = "VC"
