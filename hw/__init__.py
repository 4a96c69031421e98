"""The silicon: memory, cipher, caches, page walks, cores, the security processor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .machine import Machine

__all__ = ["Machine"]


def __getattr__(name: str) -> Any:
    """Import `Machine` on first use: `cbit models` needs no numpy."""
    if name == "Machine":
        from .machine import Machine

        return Machine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
