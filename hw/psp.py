"""The AMD Secure Processor: makes keys and puts them into the memory controller.

Keys are born here and go to the controller's engines; nothing hands them to software.
Source: white paper, "SME Concepts"; [APM2] 15.34.2.
"""

from __future__ import annotations

import hashlib
import secrets

from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

from .cipher import EngineProfile, MemoryCipher, Tweaks
from .memory import SLOT_HOST, MemoryController


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
        self._stream = Cipher(AES(key), CTR(bytes(16))).encryptor()

    def draw(self, length: int) -> bytes:
        """Return the next `length` random bytes."""
        return self._stream.update(bytes(length))


class SecureProcessor:
    """Owns the random source; makes the SME key at every reset.

    Args:
        controller: where keys go.
        profile: how the engines form their tweaks.
        seed: of the random source.
    """

    def __init__(
        self, controller: MemoryController, profile: EngineProfile, seed: int | None
    ) -> None:
        self._controller = controller
        self._profile = profile
        self._random = RandomSource(seed)

    def reset(self) -> None:
        """Make a new SME key and, where the profile draws them, new tweak constants.

        Source: white paper, "SME Concepts": the key is new at each reset.
        """
        tweaks = Tweaks(self._profile.constants(self._random.draw))
        self._controller.forget_keys()
        engine = MemoryCipher(
            self._random.draw(16), tweaks, self._profile.whitens_output
        )
        self._controller.load_key(SLOT_HOST, engine)
