"""What memory and caches hold beside bytes, for snapshots: plain facts and arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .hazard import Hazard, HazardPolicy

if TYPE_CHECKING:
    from ..arrays import Index, Marks, Words

RandomFacts: TypeAlias = tuple[Any, ...]
"""As `random.Random.getstate` returns it."""


class DramState(NamedTuple):
    """Where DRAM was written.

    Attributes:
        regions: 2 MiB regions that were ever written, ascending.
        written_by: the marks of all pages in them, one after another.
        pages: pages in them that are not all zeros, ascending.
    """

    regions: Index
    written_by: Marks
    pages: Index


class LineStoreState(NamedTuple):
    """The lines of one tag: pages that hold any, ascending, and their words."""

    pages: Index
    valid: Words
    dirty: Words
    stale: Words


class CacheState(NamedTuple):
    """What the caches know about all tags.

    Attributes:
        slots: tags that were ever used, in the order of their first use, which
            decides the order of write-backs.
        policy: what happens at a hazard.
        tag_changes, hazards: as the attributes of `CacheHierarchy`.
        random: state of the source that draws evictions.
        owned, owners: pages that have an owner word, ascending, and the words.
        writers: the last writer of every stale line, ascending by line. Of other
            lines it is never asked for.
    """

    slots: tuple[int, ...]
    policy: HazardPolicy
    tag_changes: int
    hazards: tuple[Hazard, ...]
    random: RandomFacts
    owned: Index
    owners: Marks
    writers: Marks
