"""`MsrRule`: what one register is to software, as data and small functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag
from typing import TYPE_CHECKING

from ..cpuid import CpuModel
from .registers import Msr

if TYPE_CHECKING:
    from .msr_file import MsrFile


class Access(Flag):
    """What the host's software can do with a register at all."""

    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = READ | WRITE


@dataclass(frozen=True)
class Write:
    """A WRMSR whose bits are all defined, before it takes effect.

    Attributes:
        old, new: the register before, and the operand.
        paging: CR0.PG is 1.
        model: the processor.
        msrs: the other registers of the core.
    """

    old: int
    new: int
    paging: bool
    model: CpuModel
    msrs: MsrFile


def _everywhere(model: CpuModel) -> bool:
    return True


def _zero(model: CpuModel, smee: bool) -> int:
    return 0


def _no_objection(write: Write) -> str:
    return ""


def _as_written(write: Write) -> int:
    return write.new


def _as_held(value: int, msrs: MsrFile) -> int:
    return value


@dataclass(frozen=True)
class MsrRule:
    """One row.

    Attributes:
        register: the register; its class has address, name and fields.
        present: whether a processor has it.
        needs: the same in words, for the error message.
        access: what software may do.
        reset: value after reset, when firmware has run; `smee` is its decision on SME.
        writable: bits that software may set; None: those that have a field.
        objection: why a value is refused and what was expected, or "".
        kept: what the register holds after an accepted write.
        shown: what software reads of what the register holds.
    """

    register: type[Msr]
    present: Callable[[CpuModel], bool] = _everywhere
    needs: str = ""
    access: Access = Access.BOTH
    reset: Callable[[CpuModel, bool], int] = _zero
    writable: Callable[[CpuModel], int] | None = None
    objection: Callable[[Write], str] = _no_objection
    kept: Callable[[Write], int] = _as_written
    shown: Callable[[int, MsrFile], int] = _as_held

    def writable_mask(self, model: CpuModel) -> int:
        """Return the bits that software may set on a processor."""
        if self.writable is None:
            return self.register.declared_mask()
        return self.writable(model)
