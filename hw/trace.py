"""The event trace of a machine: what happened, in order, for whoever listens.

Emitting costs one truth test while nobody listens: callers write
`if trace.active: trace.emit("wrmsr", index=index, value=value)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

KINDS = frozenset(
    {
        "cpuid",
        "rdmsr",
        "wrmsr",
        "cr",
        "flush",
        "page-fault",
        "tag-change",
        "dma",
        "mmio-encrypted",
        "vmgexit",
        "hazard",
        "reset",
    }
)
"""Every kind of event a machine emits."""


class Event(NamedTuple):
    """One event: running number, kind, and its facts (integers and short strings)."""

    number: int
    kind: str
    facts: Mapping[str, int | str]

    def as_json(self) -> dict[str, int | str]:
        """Return the event as one flat object; addresses and values as hex strings."""
        facts = {
            name: hex(value)
            if type(value) is int and name not in PLAIN_NUMBERS
            else value
            for name, value in self.facts.items()
        }
        return {"event": self.number, "kind": self.kind, **facts}


PLAIN_NUMBERS = frozenset(
    {"length", "pages", "cpu", "slot", "other_slot", "from_slot", "to_slot"}
)
"""Facts that are counts or small ordinals, printed in decimal."""

Listener = Callable[[Event], None]


class Trace:
    """Numbers events and hands them to the listeners.

    Attributes:
        active: True while somebody listens.
    """

    def __init__(self) -> None:
        self.active = False
        self._listeners: list[tuple[Listener, frozenset[str]]] = []
        self._next = 0

    def listen(self, listener: Listener, kinds: frozenset[str] = KINDS) -> None:
        """Call `listener` for every later event whose kind is in `kinds`."""
        self._listeners.append((listener, kinds))
        self.active = True

    def emit(self, kind: str, **facts: int | str) -> None:
        """Send one event to the listeners; `kind` is one of `KINDS`."""
        assert kind in KINDS, kind
        event = Event(self._next, kind, facts)
        self._next += 1
        for listener, kinds in self._listeners:
            if kind in kinds:
                listener(event)
