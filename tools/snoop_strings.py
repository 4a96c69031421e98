"""What a probe can read: printable strings, and given bytes, with their addresses.

Both searches are fed chunk by chunk in ascending order and see across the seams.
"""

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..hw.errors import CallerError
from ..hw.types import PhysAddr
from .dram_file import ByteArray

TEXT_LIMIT = 200
"""Characters of a string that are kept; the length is exact all the same."""

_FIRST, _COUNT = 0x20, 0x5F
"""Printable ASCII: 0x20 to 0x7e."""

_SCORED = 40
"""Characters of a string that are looked at to tell words from noise; whole qwords."""

_CROWD = 500
"""Candidates of one chunk from which on those that begin alike are taken for one."""


def _word_pairs() -> npt.NDArray[np.bool_]:
    """Return for each pair, first + 256 * second, whether prose is made of such."""
    kinds = np.zeros(256, np.uint8)  # 0 anything else
    kinds[ord("a") : ord("z") + 1] = 1
    kinds[ord("A") : ord("Z") + 1] = 2
    kinds[ord(" ")] = 3
    wordy = np.zeros((4, 4), np.bool_)
    for first, second in ((1, 1), (2, 1), (1, 3), (3, 1), (3, 2)):
        wordy[first, second] = True
    pairs = wordy[kinds[None, :], kinds[:, None]]
    np.fill_diagonal(pairs, False)  # a run of one letter is no word
    return pairs.reshape(-1)


_WORD_PAIRS = _word_pairs()


@dataclass(frozen=True)
class FoundString:
    """One run of printable characters."""

    address: PhysAddr
    length: int
    text: str  # the first TEXT_LIMIT characters


@dataclass(frozen=True)
class FoundStrings:
    """How many runs there are, and the most word-like of them, best first."""

    count: int
    shown: tuple[FoundString, ...]


def strings_by_chance(num_bytes: int, min_length: int) -> int:
    """Return how many strings uniformly random bytes are expected to hold."""
    printable = _COUNT / 256
    return round(num_bytes * printable**min_length * (1 - printable))


class StringSearch:
    """Finds runs of printable ASCII; equal texts are shown once.

    Args:
        min_length: shortest run that counts, 1 or more.
        limit: how many to keep for showing.
    """

    def __init__(self, min_length: int, limit: int) -> None:
        if min_length < 1:
            raise CallerError(f"min_length {min_length}: expected 1 or more")
        self._min_length = min_length
        self._limit = limit
        self._count = 0
        self._best: dict[str, tuple[int, FoundString]] = {}
        self._least_score = -1  # what scores no more has no chance any longer
        self._end = 0  # where the chunk before ended
        self._open_address = 0
        self._open_length = 0  # of the run that touches the end, 0: none does
        self._open_text = b""

    def feed(self, address: int, chunk: ByteArray) -> None:
        """Search the next chunk; `address` is not below the end of the last one."""
        if address != self._end:
            self._close()
        self._end = address + chunk.size
        printable = (chunk - np.uint8(_FIRST)) < np.uint8(_COUNT)
        if printable.all():
            self._extend(address, chunk)
            return
        head = int(printable.argmin())
        tail = chunk.size - int(printable[::-1].argmin())
        self._extend(address, chunk[:head])
        self._close()
        starts, lengths = _runs(printable[head:tail], self._min_length)
        self._count += starts.size
        self._keep_best(address, chunk, starts + head, lengths)
        self._extend(address + tail, chunk[tail:])

    def finish(self) -> FoundStrings:
        """Return what was found in all chunks."""
        self._close()
        return FoundStrings(self._count, tuple(found for _, found in self._ranking()))

    def _extend(self, address: int, cells: ByteArray) -> None:
        if not self._open_length:
            self._open_address, self._open_text = address, b""
        self._open_length += cells.size
        self._open_text += cells[: TEXT_LIMIT - len(self._open_text)].tobytes()

    def _close(self) -> None:
        """End the run that touched the seam."""
        length, self._open_length = self._open_length, 0
        if length < self._min_length:
            return
        self._count += 1
        cells = np.frombuffer(self._open_text, np.uint8)
        whole = np.array([cells.size])
        score = int(_scores(_first_characters(cells, whole - whole, whole))[0])
        self._offer(score, PhysAddr(self._open_address), length, self._open_text)

    def _keep_best(
        self,
        address: int,
        chunk: ByteArray,
        starts: npt.NDArray[np.intp],
        lengths: npt.NDArray[np.intp],
    ) -> None:
        if not self._limit:
            return
        # A score stays below the length, so short runs need no look at their letters.
        hopeful = np.flatnonzero(lengths > self._least_score)
        characters = _first_characters(chunk, starts[hopeful], lengths[hopeful])
        scores = _scores(characters)
        better = np.flatnonzero(scores > self._least_score)
        if better.size > _CROWD:  # memory full of one text: look at it once
            keys = _keys(characters[better], lengths[hopeful[better]])
            better = better[np.unique(keys, return_index=True)[1]]
        for i in better[np.argsort(-scores[better], kind="stable")].tolist():
            score = int(scores[i])
            if score <= self._least_score:
                return
            start, length = int(starts[hopeful[i]]), int(lengths[hopeful[i]])
            text = chunk[start : start + min(length, TEXT_LIMIT)].tobytes()
            self._offer(score, PhysAddr(address + start), length, text)

    def _offer(self, score: int, pa: PhysAddr, length: int, text: bytes) -> None:
        found = FoundString(pa, length, text.decode("ascii"))
        if not self._limit or found.text in self._best:
            return
        self._best[found.text] = (score, found)
        if len(self._best) >= 2 * self._limit + 64:
            ranking = self._ranking()
            self._best = {one.text: (score, one) for score, one in ranking}
            self._least_score = ranking[-1][0]

    def _ranking(self) -> list[tuple[int, FoundString]]:
        def rank(scored: tuple[int, FoundString]) -> tuple[int, int, int]:
            score, found = scored
            return -score, -found.length, found.address

        return sorted(self._best.values(), key=rank)[: self._limit]


def _runs(
    printable: npt.NDArray[np.bool_], min_length: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return starts and lengths of the runs of True that are long enough.

    Args:
        printable: begins and ends with False.
        min_length: shortest run that counts.
    """
    if printable.size < min_length + 2:
        none = np.empty(0, np.intp)
        return none, none
    # window[i]: the run goes on from i for `width` characters. Doubling needs few
    # passes, and few positions are left of random bytes before anything is listed.
    window, width = printable, 1
    while width < min_length:
        step = min(width, min_length - width)
        window = window[:-step] & window[step:]
        width += step
    edges = np.flatnonzero(window[1:] != window[:-1]) + 1
    starts = edges[0::2]
    return starts, edges[1::2] - starts + min_length - 1


def _first_characters(
    cells: ByteArray, starts: npt.NDArray[np.intp], lengths: npt.NDArray[np.intp]
) -> ByteArray:
    """Return the first `_SCORED` characters of each run, shorter ones with zeros."""
    padded = np.concatenate((cells, np.zeros(_SCORED, np.uint8)))
    characters = np.lib.stride_tricks.sliding_window_view(padded, _SCORED)[starts]
    widths = np.minimum(lengths, _SCORED).astype(np.uint8)
    characters *= np.arange(_SCORED, dtype=np.uint8) < widths[:, None]
    return characters


def _scores(characters: ByteArray) -> npt.NDArray[np.intp]:
    """Return for each row how many neighbours read well."""
    pairs = characters.reshape(-1).astype(np.uint16)
    pairs[:-1] |= pairs[1:] << 8
    wordy = _WORD_PAIRS.take(pairs).reshape(characters.shape)
    # The last pair of a row reaches into the next row.
    scores = wordy[:, :-1].sum(axis=1, dtype=np.uint8)
    return np.asarray(scores, np.intp)


def _keys(
    characters: ByteArray, lengths: npt.NDArray[np.intp]
) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each row that are equal for equal strings."""
    words = characters.view(np.uint64)
    keys = lengths.astype(np.uint64)
    for column in range(words.shape[1]):
        keys = (keys ^ words[:, column]) * np.uint64(0x9E37_79B9_7F4A_7C15)
        keys ^= keys >> np.uint64(29)
    return keys


class ByteSearch:
    """Finds every occurrence of given bytes, overlapping ones too.

    Args:
        needles: what to look for; not empty and without a zero byte, because holes
            are zeros that nobody reads.
    """

    def __init__(self, needles: tuple[bytes, ...]) -> None:
        for needle in needles:
            if not needle or 0 in needle:
                raise CallerError(f"bytes to find {needle!r}: empty or with a zero")
        self._found = {needle: array("Q") for needle in needles}
        self._overlap = max((len(needle) for needle in needles), default=1) - 1
        self._end = 0
        self._tail = b""

    def feed(self, address: int, chunk: ByteArray) -> None:
        """Search the next chunk; `address` is not below the end of the last one."""
        if not self._found:
            return
        before = self._tail if address == self._end else b""
        cells = before + chunk.tobytes()
        base = address - len(before)
        for needle, addresses in self._found.items():
            # What lies wholly before the seam was found with the chunk before.
            place = cells.find(needle, max(0, len(before) - len(needle) + 1))
            while place >= 0:
                addresses.append(base + place)
                place = cells.find(needle, place + 1)
        self._end = address + chunk.size
        self._tail = cells[-self._overlap :] if self._overlap else b""

    def finish(self) -> dict[bytes, list[PhysAddr]]:
        """Return the addresses for each needle, ascending."""
        return {
            needle: [PhysAddr(address) for address in addresses]
            for needle, addresses in self._found.items()
        }
