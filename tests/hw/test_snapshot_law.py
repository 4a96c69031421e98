"""hw/snapshot: a machine and its copy go on alike, whatever came before and after."""

import random
from collections.abc import Iterator

import pytest

from cbit.hw import Machine
from cbit.hw.memory import SLOT_HOST, SLOT_NONE, HazardError
from cbit.hw.types import PAGE_SHIFT, PAGE_SIZE

from .snapshot_files import loaded, saved

RAM = 2 << 20
PAGES = range(0x100, 0x1C0)
SLOTS = (SLOT_NONE, SLOT_HOST, 2)

Step = tuple[str, int, int, int, int]


def steps(rng: random.Random, count: int) -> Iterator[Step]:
    """Yield what to do: kind, slot, address, length, a number for the rest."""
    hot = rng.sample(PAGES, 6)
    kinds = [
        *["store"] * 8,
        *["load"] * 8,
        *["cell", "clflush", "page flush", "evict", "drain", "view", "stream"],
        *rng.choice([["wbinvd"], ["wbinvd", "reset"], ["lose"], []]),
    ]
    for _ in range(count):
        page = rng.choice(hot) if rng.random() < 0.8 else rng.choice(PAGES)
        pa = page * PAGE_SIZE + rng.choice([0, 0, 64, rng.randrange(PAGE_SIZE)])
        length = rng.choice([1, 8, 64, 100, PAGE_SIZE, 3 * PAGE_SIZE])
        if rng.random() < 0.03:
            length = 70 * PAGE_SIZE
        length = min(length, RAM - pa)
        yield rng.choice(kinds), rng.choice(SLOTS), pa, length, rng.randrange(1 << 30)


def perform(machine: Machine, step: Step) -> object:
    """Do one step; return everything that can be seen of it."""
    kind, slot, pa, length, number = step
    caches, bus = machine.caches, machine.bus
    if slot < 2:
        slot = machine.controller.slot_for(slot == SLOT_HOST)
    elif slot not in machine.controller.state():  # a guest's key, gone after a reset
        machine.controller.load_key(slot, machine.controller.engine(SLOT_HOST))
    try:
        match kind:
            case "store":
                bus.store(pa, random.Random(number).randbytes(length), slot)
            case "load":
                return bus.load(pa, length, slot)
            case "stream":
                view = bus.stream_ram(pa, length, slot)
                return None if view is None else view.tobytes()
            case "cell":
                machine.dram.cells[pa] ^= number & 0xFF
                machine.dram.mark_written(pa >> PAGE_SHIFT, (pa >> PAGE_SHIFT) + 1, 0)
            case "clflush":
                bus.flush_line(pa, slot)
            case "page flush":
                bus.flush_page(pa, slot)
            case "evict":
                caches.evict((number & 7) / 7)
            case "drain":
                caches.drain()
            case "wbinvd":
                caches.write_back_invalidate()
            case "lose":
                machine.power_loss()
            case "reset":
                machine.reset()
            case "view":
                found = caches.page_view(slot, pa >> PAGE_SHIFT, write=bool(number & 1))
                return None if found is None else bytes(found)
    except HazardError as error:
        return error.hazard
    return None


def campaign(seed: int, count: int) -> set[str]:
    """Run one pair of machines; return what was met."""
    rng = random.Random(seed)
    coherent = bool(seed & 1)
    machine = Machine(
        ram=RAM,
        coherent=coherent,
        tsme=seed % 5 == 0,
        profile=rng.choice(["zen1-xe", "zen1-xex", "random"]),
        hazards="raise" if seed % 7 == 0 else "record",
        seed=seed,
    )
    for step in steps(rng, rng.randrange(count)):
        perform(machine, step)
    file = saved(machine)
    copy = loaded(file)
    assert saved(copy) == file
    met = {hazard.kind for hazard in machine.caches.hazards_met}

    for step in steps(rng, count):
        assert perform(machine, step) == perform(copy, step), (seed, step)
    assert copy.caches.hazards_met == machine.caches.hazards_met
    assert copy.caches.tag_changes == machine.caches.tag_changes
    assert (copy.dram.written_by == machine.dram.written_by).all()
    assert (copy.dram.cells == machine.dram.cells).all()
    assert saved(copy) == saved(machine)
    for board in (machine, copy):
        board.reset()
    assert copy.controller.state() == machine.controller.state()
    assert (copy.dram.cells == machine.dram.cells).all()
    return met


def test_law_a_copy_goes_on_as_the_machine_does() -> None:
    met = {kind for seed in range(40) for kind in campaign(seed, 60)}
    assert {"dirty-alias", "stale-line"} <= met


@pytest.mark.soak
def test_law_a_copy_goes_on_for_long() -> None:
    for seed in range(1000, 1400):
        campaign(seed, 400)
