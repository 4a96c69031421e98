"""The memory controller: key slots, and which of them serves an access.

Source: white paper, "SME Concepts" and "SEV Architecture"; [APM2] 15.34.2 (the ASID
is the index of the key).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..cipher import CipherState, MemoryCipher
from ..errors import CbitError

SLOT_NONE = 0
"""No encryption: DRAM holds the bytes as they are."""

SLOT_HOST = 1
"""The SME key: C = 1 in the host, and everything under transparent SME."""


def slot_of_asid(asid: int) -> int:
    """Return the key slot of a guest's ASID, 1 or more; ASID 0 is the host."""
    return SLOT_HOST + asid


class NoKeyError(CbitError):
    """An access needs a key that the AMD-SP has not loaded."""


class MemoryController:
    """Holds the engines by slot; slot n + 1 belongs to ASID n.

    Args:
        transparent: transparent SME (TSME), chosen by firmware: the C-bit is ignored
            and every access uses the host key. Source: white paper, TSME;
            [TSMET]. Which key serves C = 1 when SME is on too is unverified.
    """

    def __init__(self, *, transparent: bool = False) -> None:
        self.transparent = transparent
        self._engines: dict[int, MemoryCipher] = {}

    def load_key(self, slot: int, engine: MemoryCipher) -> None:
        """Install an engine; only the AMD-SP calls this."""
        assert slot != SLOT_NONE
        self._engines[slot] = engine

    def forget_keys(self) -> None:
        """Drop every key, as a reset does."""
        self._engines.clear()

    def state(self) -> dict[int, CipherState]:
        """Return keys and constants by slot, for a snapshot: secrets."""
        return {slot: engine.state() for slot, engine in self._engines.items()}

    def restore(self, state: Mapping[int, CipherState]) -> None:
        """Load the keys of a state and no others.

        Raises:
            CallerError: a key or constant of the wrong length.
        """
        self._engines = {
            slot: MemoryCipher.from_state(key) for slot, key in state.items()
        }

    def slot_for(self, c_bit: bool) -> int:
        """Return the key slot of a host access with this C-bit."""
        return SLOT_HOST if c_bit or self.transparent else SLOT_NONE

    def engine(self, slot: int) -> MemoryCipher:
        """Return the engine of a slot other than `SLOT_NONE`.

        Raises:
            NoKeyError: no key is loaded there.
        """
        try:
            return self._engines[slot]
        except KeyError:
            raise NoKeyError(f"key slot {slot}: no key loaded by the AMD-SP") from None
