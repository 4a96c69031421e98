"""DRAM, line stores and cache words: to sections of a file, and back into a machine.

Only pages and lines that hold something are written: pages of DRAM that are not all
zeros, lines that are valid. Lists of pages are kept as differences, which are mostly 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..arrays import Bytes, Index, Words
from ..errors import CallerError
from ..machine import Machine
from ..memory import SLOT_NONE, Hazard
from ..memory.line_store import ALL, LineStore, masks_to_lines, runs
from ..memory.sparse import PAGES_PER_REGION, SparseMemory
from ..memory.state import CacheState, DramState, LineStoreState
from ..types import PhysAddr
from .board import MAX_SLOTS, build_random, room_for
from .container import PIECE_BYTES, Section, array_section
from .facts import Facts
from .reader import ContainerReader

WORD = np.dtype(np.uint64)
MARK = np.dtype(np.uint16)

HAZARD_KINDS = ("dirty-alias", "stale-line")
HAZARD = np.dtype(
    [
        ("kind", "u1"),
        ("write", "u1"),
        ("slot", "<u2"),
        ("other_slot", "<u2"),
        ("pa", "<u8"),
        ("length", "<u8"),
    ]
)
MAX_HAZARDS = 1 << 24


def sections_of(machine: Machine, caches: CacheState) -> Iterator[Section]:
    """Yield the sections in the order in which `restore_contents` asks for them."""
    dram = machine.dram.state()
    yield _index_section("dram.regions", dram.regions)
    yield array_section("dram.written_by", dram.written_by)
    yield _index_section("dram.pages", dram.pages)
    yield _rows_section("dram.cells", machine.dram.pages, dram.pages)
    for slot in caches.slots:
        store = machine.caches.line_store(slot)
        state = store.state()
        yield _index_section(f"slot{slot}.pages", state.pages)
        for name in ("valid", "dirty", "stale"):
            yield array_section(f"slot{slot}.{name}", getattr(state, name))
        whole, lines = _held(state)
        yield _rows_section(f"slot{slot}.whole", store.data.pages, whole)
        yield _rows_section(f"slot{slot}.lines", store.data.lines, lines)
    yield _index_section("owned", caches.owned)
    yield array_section("owners", caches.owners)
    yield array_section("writers", caches.writers)
    yield array_section("hazards", _hazard_rows(caches.hazards))


def restore_contents(machine: Machine, reader: ContainerReader) -> None:
    """Bring what `sections_of` wrote into a machine without contents.

    Raises:
        InputError: the file is damaged, or does not fit the machine.
        CbitError: no machine can have these contents, or not on this host.
    """
    facts = reader.facts.group("caches")
    _restore_dram(machine, reader)
    slots = facts.integers("slots", MAX_SLOTS)
    if len(set(slots)) != len(slots):
        raise CallerError("slots of the caches: each once expected")
    for slot in slots:
        with room_for(machine.ram):
            store = machine.caches.line_store(slot)
        _restore_lines(store, reader)
        if store.pages_with(store.valid).size and slot != SLOT_NONE:
            machine.controller.engine(slot)  # or its lines could never leave
    _restore_caches(machine, reader, facts, slots)


def _restore_dram(machine: Machine, reader: ContainerReader) -> None:
    dram = machine.dram
    pages = len(dram.pages)
    regions = _read_index(reader, "dram.regions", -(-pages // PAGES_PER_REGION))
    written_by = _read_array(
        reader, "dram.written_by", MARK, dram.count_region_pages(regions)
    )
    filled = _read_index(reader, "dram.pages", pages)
    if not np.isin(filled // PAGES_PER_REGION, regions).all():
        raise CallerError("dram.pages: pages of `dram.regions` expected")
    dram.restore(DramState(regions, written_by, filled))
    _expect(dram, filled)
    _read_rows(reader, "dram.cells", dram.pages, filled)


def _restore_lines(store: LineStore, reader: ContainerReader) -> None:
    name = f"slot{store.slot}"
    pages = _read_index(reader, f"{name}.pages", len(store.data.pages))
    valid, dirty, stale = (
        _read_array(reader, f"{name}.{words}", WORD, pages.size)
        for words in ("valid", "dirty", "stale")
    )
    state = LineStoreState(pages, valid, dirty, stale)
    store.restore(state)
    whole, lines = _held(state)
    _expect(store.data, whole)
    _read_rows(reader, f"{name}.whole", store.data.pages, whole)
    _read_rows(reader, f"{name}.lines", store.data.lines, lines)


def _restore_caches(
    machine: Machine, reader: ContainerReader, facts: Facts, slots: list[int]
) -> None:
    caches = machine.caches
    owned = _read_index(reader, "owned", len(machine.dram.pages))
    owners = _read_array(reader, "owners", MARK, owned.size)
    if owners.size and not set(np.unique(owners).tolist()) <= {s + 1 for s in slots}:
        raise CallerError("owners: slots of the caches expected")
    # Which lines are stale is known by now.
    fresh = caches.state()
    writers = _read_array(reader, "writers", MARK, fresh.writers.size)
    rows = reader.array("hazards", HAZARD, MAX_HAZARDS)
    caches.restore(
        CacheState(
            tuple(slots),
            fresh.policy,
            facts.integer("tag_changes"),
            tuple(_hazard(*row) for row in rows.tolist()),
            build_random(facts.group("random")),
            owned,
            owners,
            writers,
        )
    )


def _held(state: LineStoreState) -> tuple[Index, Index]:
    """Return pages whose lines are all valid, and the valid lines of the others."""
    whole = state.valid == ALL
    return state.pages[whole], masks_to_lines(state.pages[~whole], state.valid[~whole])


def _index_section(name: str, index: Index) -> Section:
    return array_section(name, np.diff(index, prepend=0).astype(np.uint64))


def _read_index(reader: ContainerReader, name: str, end: int) -> Index:
    """Return ascending numbers below `end`."""
    steps: Words = reader.array(name, WORD, end)
    index = np.cumsum(steps, dtype=np.uint64)
    # A sum that wraps around falls below the one before it.
    if index.size and (not (index[1:] > index[:-1]).all() or int(index[-1]) >= end):
        raise CallerError(f"{name}: ascending numbers below {end:#x} expected")
    return index.astype(np.intp)


def _read_array(
    reader: ContainerReader, name: str, dtype: np.dtype[Any], count: int
) -> Any:
    """Return an array of exactly `count` items."""
    array = reader.array(name, dtype, count)
    if array.size != count:
        raise CallerError(f"{name}: {count} items expected, got {array.size}")
    return array


def _rows_section(name: str, rows: Bytes, index: Index) -> Section:
    """Return a section with the chosen rows, gathered a piece at a time."""
    size = rows.shape[1]
    assert PIECE_BYTES % size == 0

    def part(start: int, end: int) -> Bytes:
        return rows[index[start // size : end // size]].reshape(-1)

    return Section(name, index.size * size, part)


def _read_rows(reader: ContainerReader, name: str, rows: Bytes, index: Index) -> None:
    """Fill the rows that `index` chooses, in order."""
    size = rows.shape[1]
    length = index.size * size
    if reader.next_length(name, length) != length:
        raise CallerError(f"{name}: {length:#x} bytes expected")
    done = 0
    for piece in reader.section(name, length):
        count = piece.size // size
        rows[index[done : done + count]] = piece.reshape(count, size)
        done += count


def _expect(memory: SparseMemory, pages: Index) -> None:
    """Ask for large host pages where whole regions will be filled."""
    for first, end in runs(pages):
        if end - first >= PAGES_PER_REGION:
            memory.expect_bulk(first, end)


def _hazard_rows(hazards: tuple[Hazard, ...]) -> Any:
    rows = [
        (HAZARD_KINDS.index(h.kind), h.write, h.slot, h.other_slot, h.pa, h.length)
        for h in hazards
    ]
    return np.array(rows, HAZARD)


def _hazard(
    kind: int, write: int, slot: int, other_slot: int, pa: int, length: int
) -> Hazard:
    if kind >= len(HAZARD_KINDS) or write > 1:
        raise CallerError(f"hazard of kind {kind}: below {len(HAZARD_KINDS)} expected")
    return Hazard(
        HAZARD_KINDS[kind], PhysAddr(pa), length, slot, other_slot, bool(write)
    )
