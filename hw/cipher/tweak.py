"""Tweaks: 16 bytes per block that depend on the physical address.

T(p) is the XOR of one 16-byte constant per address bit that is 1, for bits 4 and
up. T is linear, T(p) ^ T(q) = T(p ^ q), so a page's tweaks are one constant for the
page and one fixed table for the offset within it.

Source: [SVR] sections III-A and III-B; the constants of bits 4 to 31 from the code
published with that paper. Measured on Zen 1 parts; nothing is published for higher
bits, nor for later parts: what stands there is this project's choice, see
`EngineProfile`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..arrays import Words
from ..errors import CallerError
from ..types import PAGE_SIZE

BLOCK_SIZE = 16
FIRST_BIT = 4
"""Bits 0 to 3 lie inside a block and take no part. Source: [SVR] III-A."""

DIGIT_BITS = 12
DIGIT_MASK = (1 << DIGIT_BITS) - 1

LAST_BIT = 51
"""Architectural end of a physical address; the C-bit is stripped before."""

ZEN1_PATTERNS = bytes.fromhex(
    "82253838 ec09079c 40000018 8102a23a 77d91077 b010b2c0 536d544d "  # 4-10
    "1568ee53 b09230c2 9670ff8e 361b90d5 0400c236 e8182985 bd31f92a "  # 11-17
    "a50d3744 f431d84c 02043181 b37132a1 508ac06c 168a8020 7f9bc007 "  # 18-24
    "00db0407 7f000404 70fa01be bb3d2890 bd2dd526 1c5d6ce2 4f5ce727"  # 25-31
)
"""Four bytes each, in memory order, repeated four times, for address bits 4 to 31."""


def zen1_constants() -> list[bytes]:
    """Return the constants of bits 4 to 51 for the two Zen 1 profiles.

    Bits 32 and up are a choice, made with the same 4-byte period: the first four
    bytes of SHA-256("cbit zen1 tweak bit N").
    """
    patterns = ZEN1_PATTERNS
    constants = [patterns[i : i + 4] * 4 for i in range(0, len(patterns), 4)]
    for bit in range(FIRST_BIT + len(constants), LAST_BIT + 1):
        digest = hashlib.sha256(f"cbit zen1 tweak bit {bit}".encode()).digest()
        constants.append(digest[:4] * 4)
    return constants


class Tweaks:
    """The constants of one engine, and T(p) for many addresses at once.

    Args:
        constants: 16 bytes each, for address bits 4, 5, ... in order.
    """

    def __init__(self, constants: list[bytes]) -> None:
        assert all(len(constant) == BLOCK_SIZE for constant in constants)
        self.end_bit = FIRST_BIT + len(constants)
        self._constants = [np.frombuffer(c, np.uint64) for c in constants]
        offsets = np.arange(PAGE_SIZE // BLOCK_SIZE, dtype=np.uint64) * BLOCK_SIZE
        self.of_offsets: Words = self._by_bits(offsets, 0)
        """T of the 256 block offsets in a page, shape (256, 2)."""
        # T of many addresses by look-up: one table for every 12 bits of the address.
        self._by_digit = [
            self._digit_table(low) for low in range(0, self.end_bit, DIGIT_BITS)
        ]

    @property
    def constants(self) -> tuple[bytes, ...]:
        """The constants as they were given."""
        return tuple(constant.tobytes() for constant in self._constants)

    def of(self, address: int) -> bytes:
        """Return T(address), 16 bytes.

        Raises:
            CallerError: the address has a bit for which there is no constant.
        """
        return self.of_many(np.array([address], np.uint64)).tobytes()

    def of_many(self, addresses: Words) -> Words:
        """Return T of every address, shape (n, 2).

        Raises:
            CallerError: an address has a bit for which there is no constant.
        """
        if addresses.size and int(addresses.max()) >> self.end_bit:
            raise CallerError(
                f"address {int(addresses.max()):#x}: no tweak constant for bits "
                f"{self.end_bit} and up"
            )
        tweaks = np.zeros((addresses.size, 2), np.uint64)
        used = int(np.bitwise_or.reduce(addresses))
        for index, table in enumerate(self._by_digit):
            low_bit = index * DIGIT_BITS
            if used >> low_bit & DIGIT_MASK:
                digit = addresses >> np.uint64(low_bit) & np.uint64(DIGIT_MASK)
                tweaks ^= np.take(table, digit.astype(np.intp), axis=0)
        return tweaks

    def _digit_table(self, low_bit: int) -> Words:
        values = np.arange(1 << DIGIT_BITS, dtype=np.uint64) << np.uint64(low_bit)
        return self._by_bits(values, low_bit)

    def _by_bits(self, addresses: Words, low_bit: int) -> Words:
        tweaks = np.zeros((addresses.size, 2), np.uint64)
        last = min(low_bit + DIGIT_BITS, self.end_bit)
        for bit in range(max(low_bit, FIRST_BIT), last):
            chosen = (addresses >> np.uint64(bit) & np.uint64(1)).astype(np.bool_)
            tweaks[chosen] ^= self._constants[bit - FIRST_BIT]
        return tweaks


@dataclass(frozen=True)
class EngineProfile:
    """How an engine forms its tweaks.

    Attributes:
        name: as `profile_named` takes it.
        whitens_output: True for XEX (the tweak before and after AES), False for XE.
        constants: makes the constants of bits 4 to 51 from the random source of the
            AMD-SP, given as a function from a length to bytes.
        about: what was measured on silicon and what is this project's choice.
    """

    name: str
    whitens_output: bool
    constants: Callable[[Callable[[int], bytes]], list[bytes]]
    about: str


def _fixed(random_bytes: Callable[[int], bytes]) -> list[bytes]:
    return zen1_constants()


def _drawn(random_bytes: Callable[[int], bytes]) -> list[bytes]:
    return [random_bytes(BLOCK_SIZE) for _ in range(FIRST_BIT, LAST_BIT + 1)]


PROFILES = (
    EngineProfile(
        "zen1-xe",
        False,
        _fixed,
        "XE and constants of bits 4-31 measured on EPYC 7251, Ryzen 1700X; "
        "bits 32 and up chosen",
    ),
    EngineProfile(
        "zen1-xex",
        True,
        _fixed,
        "XEX measured on EPYC 7401P and 3151, constants of bits 4-31 as zen1-xe; "
        "bits 32 and up chosen",
    ),
    EngineProfile(
        "random",
        True,
        _drawn,
        "XEX with 16-byte constants drawn at each reset; chosen, after AMD's word "
        "that Zen 2 draws fresh values at each boot",
    ),
)


def profile_named(name: str) -> EngineProfile:
    """Return one of `PROFILES`.

    Raises:
        CallerError: there is none of that name.
    """
    for profile in PROFILES:
        if profile.name == name:
            return profile
    names = ", ".join(profile.name for profile in PROFILES)
    raise CallerError(f"no engine profile {name!r}: one of {names} expected")
