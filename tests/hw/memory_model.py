"""The rules of hw/memory once more, slow and obvious: units in a dictionary."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.ciphers import Cipher, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from cbit.hw.memory import Hazard
from cbit.hw.types import CACHE_LINE_SIZE, PAGE_SIZE, PhysAddr

from .test_cipher import Witness


def int_xor(left: bytes | bytearray, right: bytes) -> bytes:
    whole = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return whole.to_bytes(len(left), "little")


class SlowEngine:
    """XEX with the witness's tweaks, which are remembered."""

    def __init__(self, key: bytes, constants: list[bytes]) -> None:
        witness = Witness(key, dict(enumerate(constants, start=4)), True)
        self.aes = Cipher(AES(key), modes.ECB())
        self.tweaks = cache(
            lambda pa, size: b"".join(witness.tweak(pa + n) for n in range(0, size, 16))
        )

    def encrypt(self, pa: int, data: bytes | bytearray) -> bytes:
        tweaks = self.tweaks(pa, len(data))
        return int_xor(self.aes.encryptor().update(int_xor(data, tweaks)), tweaks)

    def decrypt(self, pa: int, data: bytes) -> bytes:
        tweaks = self.tweaks(pa, len(data))
        return int_xor(self.aes.decryptor().update(int_xor(data, tweaks)), tweaks)


@dataclass
class Unit:
    """What one tag caches of one unit: a page on coherent parts, else a line."""

    data: bytearray
    dirty: bool = False
    overwritten_by: int | None = None  # another tag stored here since


class Model:
    """The rules, one unit at a time.

    Args:
        engines: by key slot; slot 0 has none.
        dram_size: in bytes.
        coherent: an access makes every other tag give up the unit first.

    Attributes:
        dram: what a probe reads.
        cached: units by (number, slot).
        writers: by page, who may have written it back last.
        seen: how often things of interest were met.
    """

    def __init__(
        self, engines: dict[int, SlowEngine], dram_size: int, *, coherent: bool
    ) -> None:
        self.engines = engines
        self.slots = (0, *engines)
        self.coherent = coherent
        self.size = PAGE_SIZE if coherent else CACHE_LINE_SIZE
        self.dram = bytearray(dram_size)
        self.cached: dict[tuple[int, int], Unit] = {}
        self.writers: dict[int, set[int]] = {}
        self.seen: Counter[str] = Counter()

    def load(self, slot: int, pa: int, length: int, *, passes: bool = False) -> bytes:
        """Load bytes; if it `passes`, nothing of it stays cached."""
        self._touch(slot, pa, length)
        loaded = b"".join(
            self.cached[unit, slot].data[start:end]
            for unit, start, end in self.pieces(pa, length)
        )
        if passes:
            for unit, _, _ in self.pieces(pa, length):
                del self.cached[unit, slot]
        return loaded

    def store(self, slot: int, pa: int, data: bytes) -> None:
        self._touch(slot, pa, len(data))
        done = 0
        for unit, start, end in self.pieces(pa, len(data)):
            own = self.cached[unit, slot]
            own.data[start:end] = data[done : done + end - start]
            own.dirty, own.overwritten_by = True, None
            for other in self._others(unit, slot):
                self.cached[unit, other].overwritten_by = slot
            done += end - start

    def hazards(
        self, slot: int, pa: int, length: int, *, write: bool, merges: bool
    ) -> list[Hazard]:
        """Return what an access would meet; a store that `merges` reads first."""
        if self.coherent:
            return []
        met: dict[tuple[str, int], list[int]] = {}
        for unit, start, end in self.pieces(pa, length):
            for other in self._others(unit, slot):
                if self.cached[unit, other].dirty:
                    met.setdefault(("dirty-alias", other), []).append(unit)
            own = self.cached.get((unit, slot))
            reads = not write or merges or end - start < self.size
            if own and own.overwritten_by is not None and reads:
                met.setdefault(("stale-line", own.overwritten_by), []).append(unit)
        return [
            Hazard(kind, PhysAddr(first * 64), count * 64, slot, other, write)
            for (kind, other), units in met.items()
            for first, count in neighbours(units)
        ]

    def holds(self, slot: int, page: int) -> bool:
        """Is any part of the page cached under the slot?"""
        pieces = self.pieces(page * PAGE_SIZE, PAGE_SIZE)
        return any((unit, slot) in self.cached for unit, _, _ in pieces)

    def is_quiet(self, slot: int, page: int, *, write: bool) -> bool:
        """Would every access to the page be a hit that changes nothing but bytes?"""
        for unit, _, _ in self.pieces(page * PAGE_SIZE, PAGE_SIZE):
            own = self.cached.get((unit, slot))
            if own is None or own.overwritten_by is not None:
                return False
            if write and not own.dirty:
                return False
            for other in self._others(unit, slot):
                if write or self.coherent or self.cached[unit, other].dirty:
                    return False
        return True

    def peek(self, slot: int, page: int) -> bytes:
        """Return a page of which every byte is cached."""
        pieces = self.pieces(page * PAGE_SIZE, PAGE_SIZE)
        return b"".join(self.cached[unit, slot].data for unit, _, _ in pieces)

    def write_back(
        self, chosen: Callable[[int, int], bool], observed: bytes, *, drop: bool
    ) -> None:
        """Write back the chosen units; of several dirty tags any may come last.

        Args:
            chosen: tells by unit and slot.
            observed: DRAM afterwards, which decides between the tags.
            drop: the units leave the cache.
        """
        candidates: dict[int, list[bytes]] = {}
        wrote: dict[int, set[int]] = {}
        for unit, slot in sorted(self.cached):
            if not chosen(unit, slot):
                continue
            own = self.cached[unit, slot]
            if own.dirty:
                candidates.setdefault(unit, []).append(self._stored(unit, slot))
                wrote.setdefault(self.page_of(unit), set()).add(slot)
            own.dirty = False
            if drop:
                del self.cached[unit, slot]
        for unit, possible in candidates.items():
            place = slice(unit * self.size, (unit + 1) * self.size)
            assert observed[place] in possible
            self.seen["contested"] += len(set(possible)) > 1
            self.dram[place] = observed[place]
        self.writers |= wrote

    def pieces(self, pa: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield each unit with the range inside it."""
        for unit in range(pa // self.size, (pa + length - 1) // self.size + 1):
            base = unit * self.size
            yield unit, max(pa - base, 0), min(pa + length - base, self.size)

    def page_of(self, unit: int) -> int:
        return unit * self.size // PAGE_SIZE

    def _touch(self, slot: int, pa: int, length: int) -> None:
        for unit, _, _ in self.pieces(pa, length):
            base = unit * self.size
            if self.coherent:
                for other in self._others(unit, slot):
                    self._hand_over(unit, other)
            if (unit, slot) not in self.cached:
                cells = bytes(self.dram[base : base + self.size])
                if slot:
                    cells = self.engines[slot].decrypt(base, cells)
                self.cached[unit, slot] = Unit(bytearray(cells))

    def _hand_over(self, unit: int, slot: int) -> None:
        self.seen["handed over"] += 1
        if self.cached[unit, slot].dirty:
            place = slice(unit * self.size, (unit + 1) * self.size)
            self.dram[place] = self._stored(unit, slot)
            self.writers[self.page_of(unit)] = {slot}
        del self.cached[unit, slot]

    def _stored(self, unit: int, slot: int) -> bytes:
        """Return what DRAM holds once the unit has been written back."""
        data = self.cached[unit, slot].data
        if slot == 0:
            return bytes(data)
        return self.engines[slot].encrypt(unit * self.size, data)

    def _others(self, unit: int, slot: int) -> list[int]:
        return [s for s in self.slots if s != slot and (unit, s) in self.cached]


def neighbours(units: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of ascending numbers."""
    first = previous = units[0]
    for unit in units[1:]:
        if unit != previous + 1:
            yield first, previous + 1 - first
            first = unit
        previous = unit
    yield first, previous + 1 - first
