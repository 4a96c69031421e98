"""Ciphertext that repeats: across one snapshot, and between two of them.

Blocks of 16 bytes are enciphered one by one and without a version, so a block that was
not changed, or was changed back, is the same in the next snapshot: the hole through
which ciphertext side channels look. Across addresses the tweak keeps equal plaintext
apart: equal blocks there are compressed or random bytes stored twice, or an engine
without a tweak for some address bits.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..hw.types import PAGE_SIZE, PhysAddr
from .dram_file import ByteArray

BLOCK_SIZE = 16
BLOCKS_PER_PAGE = PAGE_SIZE // BLOCK_SIZE

SAMPLE_LIMIT = 1 << 23
"""Fingerprints kept of one snapshot, 8 bytes each; exact up to 128 MiB."""

RANGE_LIMIT = 4096
"""Ranges of equal blocks kept for showing; all are counted."""

_ODD_FACTORS = (0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F)


@dataclass(frozen=True)
class Duplicates:
    """Blocks of one snapshot that equal an earlier block at another address."""

    count: int
    exact: bool  # False: estimated from a sample, chosen by content


@dataclass(frozen=True)
class Repeats:
    """Blocks that are equal at equal addresses of two snapshots."""

    pages: int  # encrypted-looking pages that both snapshots contain
    unchanged_pages: int  # all 256 blocks are equal
    partly_equal_pages: int  # some are
    blocks: int  # equal blocks in all
    num_ranges: int
    ranges: tuple[tuple[PhysAddr, PhysAddr], ...]  # half open, the first RANGE_LIMIT


class ReadableDram(Protocol):
    """A second snapshot, read at the addresses of the first."""

    @property
    def size(self) -> int:
        """End of RAM in bytes, a multiple of 4096."""

    def read(self, pa: PhysAddr, length: int) -> ByteArray:
        """Return `length` bytes from `pa` on."""


class DuplicateSearch:
    """Counts equal blocks at different addresses in bounded memory."""

    def __init__(self) -> None:
        self._prints = np.empty(0, np.uint64)
        self._used = 0
        self._sample_bits = 0

    def feed(self, pages: ByteArray) -> None:
        """Take the next encrypted-looking pages, shape (n, 4096)."""
        prints = self._sampled(_fingerprints(pages))
        if self._used + prints.size > SAMPLE_LIMIT:
            # A sample by content keeps or drops all copies of a block together.
            self._sample_bits = min(self._sample_bits + 1, 63)
            kept = self._sampled(self._prints[: self._used])
            self._prints[: kept.size] = kept
            self._used = kept.size
            prints = self._sampled(prints)
        if self._used + prints.size > self._prints.size:
            room = max(self._prints.size, prints.size)
            self._prints = np.concatenate((self._prints, np.empty(room, np.uint64)))
        self._prints[self._used : self._used + prints.size] = prints
        self._used += prints.size

    def finish(self) -> Duplicates:
        """Return the count over all pages."""
        prints = self._prints[: self._used]
        prints.sort()
        count = int((prints[1:] == prints[:-1]).sum())
        return Duplicates(count << self._sample_bits, self._sample_bits == 0)

    def _sampled(self, prints: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        if not self._sample_bits:
            return prints
        mask = np.uint64((1 << self._sample_bits) - 1)
        return prints[np.flatnonzero((prints & mask) == 0)]


def _fingerprints(pages: ByteArray) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each block that is not all zero."""
    words = pages.reshape(-1).view(np.uint64).reshape(-1, 2)
    mixed = words[:, 0] * np.uint64(_ODD_FACTORS[0])
    mixed += words[:, 1] * np.uint64(_ODD_FACTORS[1])
    zero = mixed == 0  # sixteen zeros are no ciphertext
    if zero.any():
        mixed = mixed[~zero]
    mixed ^= mixed >> np.uint64(32)
    return mixed


class RepeatSearch:
    """Compares the encrypted-looking pages of a snapshot with a second one."""

    def __init__(self, second: ReadableDram) -> None:
        self._second = second
        self._pages = self._unchanged = self._partly = self._blocks = 0
        self._num_ranges = 0
        self._last_end = -1
        self._ranges: list[tuple[PhysAddr, PhysAddr]] = []

    def feed(
        self, address: int, chunk: ByteArray, encrypted: npt.NDArray[np.bool_]
    ) -> None:
        """Compare the next chunk.

        Args:
            address: where the chunk stands, ascending from call to call.
            chunk: whole pages.
            encrypted: one flag a page: compare this one.
        """
        length = min(chunk.size, self._second.size - address)
        if length <= 0 or not encrypted[: length // PAGE_SIZE].any():
            return
        encrypted = encrypted[: length // PAGE_SIZE]
        first = chunk[:length].view(np.uint64)
        same = first == self._second.read(PhysAddr(address), length).view(np.uint64)
        same &= first != 0  # a word of zeros is no ciphertext
        blocks = (same[0::2] & same[1::2]).reshape(-1, BLOCKS_PER_PAGE)
        blocks &= encrypted[:, None]
        equal = blocks.sum(axis=1)
        self._pages += int(encrypted.sum())
        self._unchanged += int((equal == BLOCKS_PER_PAGE).sum())
        self._partly += int(((equal > 0) & (equal < BLOCKS_PER_PAGE)).sum())
        self._blocks += int(equal.sum())
        self._add_ranges(address, blocks.reshape(-1))

    def finish(self) -> Repeats:
        """Return the counts and ranges over all chunks."""
        return Repeats(
            self._pages,
            self._unchanged,
            self._partly,
            self._blocks,
            self._num_ranges,
            tuple(self._ranges),
        )

    def _add_ranges(self, address: int, equal: npt.NDArray[np.bool_]) -> None:
        edges = np.flatnonzero(np.diff(equal, prepend=False, append=False))
        if not edges.size:
            return
        places = edges * BLOCK_SIZE + address
        starts, ends = places[0::2], places[1::2]
        if starts[0] == self._last_end:  # goes on across the seam
            self._num_ranges -= 1
            if self._num_ranges < RANGE_LIMIT:
                starts[0] = self._ranges.pop()[0]
        self._last_end = int(ends[-1])
        self._num_ranges += starts.size
        room = RANGE_LIMIT - len(self._ranges)
        shown = zip(starts[:room].tolist(), ends[:room].tolist(), strict=True)
        self._ranges += [(PhysAddr(start), PhysAddr(end)) for start, end in shown]
