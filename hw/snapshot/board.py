"""The scalar state of a machine: to the facts of a header, and back to a machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..cipher import PROFILES, CipherState, profile_named
from ..cpu import Cpu
from ..cpu.state import CpuState
from ..cpuid import CpuidLeaf, CpuidTable, CpuModel
from ..errors import CallerError
from ..machine import Machine
from ..memory import HazardPolicy
from ..memory.state import CacheState, RandomFacts
from ..psp import RandomState
from .facts import Facts

MAX_RAM = 1 << 52
"""The architecture's end of physical addresses; most models end far below."""

MAX_CORES = 1 << 12
MAX_SLOTS = 1 << 10
MAX_CONSTANTS = 52
"""Keys have a constant for every address bit from 4 to 51; a few more would do."""

RANDOM_VERSION, RANDOM_WORDS = 3, 624
"""Of `random.Random.getstate`: Mersenne Twister words, then the position in them."""


def describe_board(machine: Machine, caches: CacheState) -> dict[str, object]:
    """Return everything but bytes and arrays, secrets included.

    Raises:
        CallerError: the machine has a profile of its own, which no file can name, or
            too many cores.
    """
    profile = machine.psp.profile
    if profile not in PROFILES:
        raise CallerError(f"engine profile {profile.name!r}: one of PROFILES expected")
    if len(machine.cpus) > MAX_CORES:
        raise CallerError(f"snapshot: up to {MAX_CORES} cores expected")
    source = machine.psp.random.state()
    return {
        "model": _describe_model(machine.model),
        "ram": machine.ram,
        "tsme": machine.tsme,
        "coherent": machine.caches.coherent,
        "profile": profile.name,
        "hazard_policy": caches.policy.value,
        "mmio_encrypted": machine.bus.mmio_encrypted,
        "psp": {"key": source.key.hex(), "drawn": source.drawn},
        "keys": [
            {
                "slot": slot,
                "key": key.key.hex(),
                "constants": b"".join(key.constants).hex(),
                "whitens_output": key.whitens_output,
            }
            for slot, key in sorted(machine.controller.state().items())
        ],
        "caches": {
            "slots": list(caches.slots),
            "tag_changes": caches.tag_changes,
            "random": _describe_random(caches.random),
        },
        "cores": [_describe_core(cpu) for cpu in machine.cpus],
    }


def build_board(facts: Facts) -> Machine:
    """Return a machine with the scalar state of `facts`, memory and caches empty.

    Raises:
        InputError: a fact is missing or out of range.
        CallerError: no machine can have these facts, or not on this host.
    """
    cores = list(facts.groups("cores", MAX_CORES))
    model, ram = _build_model(facts.group("model")), facts.integer("ram", MAX_RAM)
    with room_for(ram):
        machine = Machine(
            model,
            ram=ram,
            tsme=facts.flag("tsme"),
            coherent=facts.flag("coherent"),
            profile=profile_named(facts.text("profile")),
            hazards=HazardPolicy(facts.text("hazard_policy")),
            cores=len(cores),
            seed=0,
        )
    psp = facts.group("psp")
    machine.psp.random.restore(RandomState(psp.raw("key"), psp.integer("drawn")))
    machine.controller.restore(
        {
            key.integer("slot", MAX_SLOTS): _build_key(key)
            for key in facts.groups("keys", MAX_SLOTS)
        }
    )
    machine.bus.mmio_encrypted = facts.integer("mmio_encrypted")
    for cpu, core in zip(machine.cpus, cores, strict=True):
        _restore_core(cpu, core)
    return machine


@contextmanager
def room_for(ram: int) -> Iterator[None]:
    """Make what the host says about too large a machine a `CallerError`."""
    try:
        yield
    except (MemoryError, OverflowError, OSError) as error:
        raise CallerError(f"RAM of {ram:#x} bytes: this host says {error}") from None


def build_random(facts: Facts) -> RandomFacts:
    """Return what `random.Random.setstate` takes."""
    words = facts.integers("words", 1 << 32)
    position = facts.integer("position", RANDOM_WORDS + 1)
    if len(words) != RANDOM_WORDS:
        raise CallerError(f"random words: {RANDOM_WORDS} expected, got {len(words)}")
    return RANDOM_VERSION, (*words, position), None


def _describe_random(state: RandomFacts) -> dict[str, object]:
    version, (*words, position), gauss = state
    assert (version, len(words), gauss) == (RANDOM_VERSION, RANDOM_WORDS, None)
    return {"words": words, "position": position}


def _describe_model(model: CpuModel) -> dict[str, object]:
    return {
        "name": model.name,
        "source": model.source,
        "alias": model.alias,
        "leaves": [[*key, *leaf] for key, leaf in model.table.raw.items()],
    }


def _build_model(facts: Facts) -> CpuModel:
    rows = facts.rows("leaves", 6, 1 << 32)
    leaves = {(row[0], row[1]): CpuidLeaf(*row[2:]) for row in rows}
    name, source = facts.text("name"), facts.text("source")
    return CpuModel(name, source, CpuidTable(leaves), facts.text("alias"))


def _build_key(facts: Facts) -> CipherState:
    joined = facts.raw("constants")
    if not 0 < len(joined) <= 16 * MAX_CONSTANTS:
        raise CallerError(f"tweak constants: 1 to {MAX_CONSTANTS} expected")
    constants = tuple(joined[i : i + 16] for i in range(0, len(joined), 16))
    return CipherState(facts.raw("key"), constants, facts.flag("whitens_output"))


def _describe_core(cpu: Cpu) -> dict[str, Any]:
    return {
        **cpu.state()._asdict(),
        "smee": cpu.msrs.smee,
        "msrs": [list(pair) for pair in sorted(cpu.msrs.state().items())],
    }


def _restore_core(cpu: Cpu, facts: Facts) -> None:
    cpu.msrs.smee = facts.flag("smee")
    # ORDER: MSRs first; EFER and SYSCFG decide what the control registers mean.
    cpu.msrs.restore({row[0]: row[1] for row in facts.rows("msrs", 2)})
    cpu.restore(
        CpuState(
            cr0=facts.integer("cr0"),
            cr2=facts.integer("cr2"),
            cr3=facts.integer("cr3"),
            cr4=facts.integer("cr4"),
            cpl=facts.integer("cpl"),
            alignment_check=facts.flag("alignment_check"),
        )
    )
