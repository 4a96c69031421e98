"""Accesses whose result silicon leaves open: a sanitizer for missing flushes."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, NoReturn

from ..errors import CallerError, CbitError
from ..types import PhysAddr


class HazardPolicy(Enum):
    """What to do with an access that silicon leaves undefined."""

    RECORD = "record"
    RAISE = "raise"

    @classmethod
    def _missing_(cls, value: object) -> NoReturn:
        names = ", ".join(policy.value for policy in cls)
        raise CallerError(f"hazard policy {value!r}: one of {names} expected")


class Hazard(NamedTuple):
    """One access that meets lines of another tag on an incoherent part.

    Attributes:
        kind: "dirty-alias" (another tag holds newer bytes that have not reached
            DRAM) or "stale-line" (the line was cached before another tag wrote).
        pa: first byte of the first line concerned.
        length: bytes from there to the end of the last line concerned.
        slot: key slot of the access.
        other_slot: key slot that holds the newer bytes, or wrote them.
        write: True for a store.
    """

    kind: str
    pa: PhysAddr
    length: int
    slot: int
    other_slot: int
    write: bool

    def describe(self) -> str:
        """Return the hazard as one line for a reader."""
        access = "store" if self.write else "load"
        met = {
            "dirty-alias": "dirty lines of",
            "stale-line": "lines cached before a store through",
        }[self.kind]
        return (
            f"{access} through {slot_name(self.slot)} at "
            f"[{self.pa:#x}, {self.pa + self.length:#x}) meets {met} "
            f"{slot_name(self.other_slot)}: flush before the C-bit changes"
        )


class HazardError(CbitError):
    """`Machine(hazards="raise")` met a hazard.

    Attributes:
        hazard: its facts.
    """

    def __init__(self, hazard: Hazard) -> None:
        self.hazard = hazard
        super().__init__(f"hazard {hazard.kind}: {hazard.describe()}")


def slot_name(slot: int) -> str:
    """Return a key slot's name: "C=0", "C=1", or "ASID n"."""
    return ("C=0", "C=1")[slot] if slot < 2 else f"ASID {slot - 1}"
