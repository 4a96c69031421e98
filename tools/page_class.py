"""Telling ciphertext from plaintext: one class for each 4 KiB page.

A cipher's output is uniform: each of the 4096 bytes of a page takes each of 256 values
with the same chance. The empirical entropy of such a page (from its byte histogram)
has the mean 7.95459 bits and the standard deviation 0.00402: not 8, because 4096 draws
do not fill 256 cells evenly. Text has about 4.5 bits, x86 code 5 to 7, tables less.

A page is called encrypted-looking if all of this holds; ciphertext misses any of it by
chance less than once in a million pages:

- at most 47 bytes are zero, and at most 47 equal the byte 1, 4 or 8 places on
  (16 are expected): words of prose, code and tables line up;
- no other byte value occurs 48 times or more, which finds one cache line of a single
  value among 63 of ciphertext;
- the entropy is at most 6 standard deviations below the mean;
- nor more than 6 above it: a page too even is a permutation table, not ciphertext.

What this cannot do: compressed data, keys and random numbers look the same. And a page
of zeros enciphered without an address tweak repeats one block 256 times, so it counts
as plain: its structure does show.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ..hw.types import PAGE_SIZE
from .dram_file import ByteArray

ENTROPY_MEAN = 7.954589
"""Expected entropy in bits of 4096 uniform bytes, exact from the binomial law."""

ENTROPY_DEVIATION = 0.004025
"""Standard deviation of the same, exact from the multinomial law."""

ENTROPY_MIN = ENTROPY_MEAN - 6 * ENTROPY_DEVIATION
ENTROPY_MAX = ENTROPY_MEAN + 6 * ENTROPY_DEVIATION

PEAK_COUNT = 48
"""So many equal bytes are structure: chance 8e-11 for one value, 2e-8 for any."""

_LAGS = (1, 4, 8)
"""Distances at which bytes are compared with each other."""

_COUNTS = np.arange(1, PAGE_SIZE + 1)
_COUNT_LOG_COUNT = np.concatenate(([0.0], _COUNTS * np.log2(_COUNTS)))


class PageClass(IntEnum):
    """What a page looks like; the values of the two others can be combined by OR."""

    ZERO = 0
    PLAIN = 1
    ENCRYPTED = 2


def page_entropy(histograms: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Return the empirical entropy in bits of each row: counts of 4096 bytes."""
    spread = _COUNT_LOG_COUNT[histograms].sum(axis=1)
    return np.asarray(np.log2(PAGE_SIZE) - spread / PAGE_SIZE)


def classify(pages: ByteArray) -> npt.NDArray[np.uint8]:
    """Return the `PageClass` of each page.

    Args:
        pages: bytes of shape (n, 4096), contiguous.
    """
    classes = np.full(len(pages), PageClass.ZERO, np.uint8)
    zeros = (pages == 0).sum(axis=1, dtype=np.uint16)
    classes[zeros < PAGE_SIZE] = PageClass.PLAIN
    # The cheap rules first: hardly a plain page passes them and needs a histogram.
    suspects = np.flatnonzero(zeros < PEAK_COUNT)
    for lag in _LAGS:
        pages_left = pages if suspects.size == len(pages) else pages[suspects]
        equal = pages_left[:, lag:] == pages_left[:, :-lag]
        suspects = suspects[equal.sum(axis=1, dtype=np.uint16) < PEAK_COUNT]
    if suspects.size:
        histograms = np.stack([np.bincount(pages[i], minlength=256) for i in suspects])
        entropy = page_entropy(histograms)
        uniform = (entropy >= ENTROPY_MIN) & (entropy <= ENTROPY_MAX)
        uniform &= histograms.max(axis=1) < PEAK_COUNT
        classes[suspects[uniform]] = PageClass.ENCRYPTED
    return classes
