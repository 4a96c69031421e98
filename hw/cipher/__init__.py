"""The AES engine of a memory controller: tweaks by address, modes, bulk work."""

from .engine import CipherState, MemoryCipher
from .tweak import PROFILES, EngineProfile, Tweaks, profile_named

__all__ = [
    "PROFILES",
    "CipherState",
    "EngineProfile",
    "MemoryCipher",
    "Tweaks",
    "profile_named",
]
