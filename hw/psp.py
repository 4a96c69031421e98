"""The AMD Secure Processor: makes keys and puts them into the memory controller.

Keys are born here and go to the controller's engines; nothing hands them to software.
Source: white paper, "SME Concepts"; [APM2] 15.34.2.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .cipher import EngineProfile, MemoryCipher, Tweaks
from .errors import CallerError
from .memory import SLOT_HOST, MemoryController


class RandomState(NamedTuple):
    """The generator's 32-byte key, and how many bytes were drawn."""

    key: bytes
    drawn: int


class RandomSource:
    """The hardware RNG: an AES-256-CTR generator, seeded.

    Args:
        seed: makes every draw repeatable; None takes entropy from the host.
    """

    def __init__(self, seed: int | None) -> None:
        if seed is None:
            key = secrets.token_bytes(32)
        else:
            key = hashlib.sha256(f"cbit AMD-SP seed {seed}".encode()).digest()
        self._enter(RandomState(key, 0))

    def draw(self, length: int) -> bytes:
        """Return the next `length` random bytes."""
        self._drawn += length
        return self._stream.update(bytes(length))

    def state(self) -> RandomState:
        """Return the generator's key and position, for a snapshot: secrets."""
        return RandomState(self._key, self._drawn)

    def restore(self, state: RandomState) -> None:
        """Go on from a position.

        Raises:
            CallerError: a key of another length, or a position below 0 or from
                2^64 up.
        """
        if len(state.key) != 32 or not 0 <= state.drawn < 1 << 64:
            raise CallerError(
                "random source: key of 32 bytes, 64-bit position expected"
            )
        self._enter(state)

    def _enter(self, state: RandomState) -> None:
        self._key, self._drawn = state
        block, offset = divmod(state.drawn, 16)
        counter = block.to_bytes(16, "big")
        self._stream = Cipher(AES(state.key), CTR(counter)).encryptor()
        self._stream.update(bytes(offset))


class SecureProcessor:
    """Owns the random source; makes the SME key at every reset.

    Args:
        controller: where keys go.
        profile: how the engines form their tweaks.
        seed: of the random source.

    Attributes:
        profile: as given.
        random: the source of every key.
    """

    def __init__(
        self, controller: MemoryController, profile: EngineProfile, seed: int | None
    ) -> None:
        self._controller = controller
        self.profile = profile
        self.random = RandomSource(seed)

    def reset(self) -> None:
        """Make a new SME key and, where the profile draws them, new tweak constants.

        Source: white paper, "SME Concepts": the key is new at each reset.
        """
        tweaks = Tweaks(self.profile.constants(self.random.draw))
        self._controller.forget_keys()
        engine = MemoryCipher(self.random.draw(16), tweaks, self.profile.whitens_output)
        self._controller.load_key(SLOT_HOST, engine)
