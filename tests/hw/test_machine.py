"""hw/machine: the board put together; reset, power loss, the probe, the seed."""

from dataclasses import replace
from pathlib import Path

import pytest

from cbit.hw import Machine as LazyMachine
from cbit.hw.errors import CallerError
from cbit.hw.machine import DEFAULT_RAM, Machine
from cbit.hw.memory import SLOT_HOST, SLOT_NONE, HazardPolicy
from cbit.hw.models import load_model
from cbit.hw.trace import Event
from cbit.hw.types import PAGE_SIZE

from .memory_windows import PLAIN, SECRET, start_paging

PAGE = 0x20_0000
TEXT = b"the quick brown fox jumps over the lazy dog, 64 bytes in a line."
GIB = 1 << 30


def resident_bytes() -> int:
    """Return how much memory of the host this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE


# --- made of what was asked for


def test_a_machine_needs_no_argument() -> None:
    machine = Machine()
    assert machine.model.name == "epyc-7742"
    assert machine.map.ram_end == DEFAULT_RAM
    assert machine.smee
    assert not machine.tsme
    assert machine.cpus == [machine.cpu]
    assert LazyMachine is Machine


def test_a_model_may_be_given_itself_or_by_name_or_alias() -> None:
    model = load_model("epyc-7763")
    assert Machine(model, ram=4 << 20).model is model
    assert Machine("epyc-7763", ram=4 << 20).model == model
    assert Machine("milan", ram=4 << 20).model == model


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"model": "epyc-0"}, "'epyc-0' is neither a file nor a CPU model"),
        ({"profile": "zen9"}, "no engine profile 'zen9'"),
        ({"hazards": "ignore"}, "policy 'ignore': one of record, raise expected"),
        ({"ram": 1 << 20}, "RAM of 0x100000 bytes: 2 MiB or more"),
        ({"ram": (4 << 20) + 1}, "RAM of 0x400001 bytes: 2 MiB or more"),
        ({"cores": 0}, "0 cores: 1 or more expected"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: dict[str, int | str], complaint: str
) -> None:
    with pytest.raises(CallerError) as refusal:
        Machine(**arguments)  # type: ignore[arg-type]
    assert complaint in str(refusal.value)


@pytest.mark.req("WP-34")
def test_ram_must_end_below_the_width_that_sme_leaves() -> None:
    # Rome has 48 bits and loses 5; this one 40, so that 35 are left.
    rome = load_model("rome")
    sizes = rome.table.leaf(0x8000_0008)
    small = sizes._replace(eax=sizes.eax & ~0xFF | 40)
    model = replace(rome, table=rome.table.replace({(0x8000_0008, 0): small}))
    # 1 GiB of addresses is the PCI hole's.
    assert Machine(model, ram=31 * GIB).map.ram_end == 1 << 35
    with pytest.raises(CallerError, match="addresses 35 bits once SME has taken"):
        Machine(model, ram=31 * GIB + PAGE_SIZE)


@pytest.mark.req("BZ-6")
def test_where_sme_is_unusable_the_width_is_whole() -> None:
    # Rembrandt reports SME with a C-bit of 0; its reduction means nothing.
    machine = Machine("ryzen-6800hs", ram=4 << 20)
    assert not machine.smee
    with pytest.raises(CallerError, match="addresses 48 bits"):
        Machine("ryzen-6800hs", ram=1 << 48)


@pytest.mark.parametrize(
    ("model", "coherent"), [("epyc-7742", False), ("epyc-7763", True)]
)
def test_the_model_says_whether_caches_are_coherent_unless_told(
    model: str, coherent: bool
) -> None:
    assert Machine(model, ram=4 << 20).caches.coherent == coherent
    assert (
        Machine(model, ram=4 << 20, coherent=not coherent).caches.coherent != coherent
    )


def test_the_policy_may_be_a_word_or_the_enum() -> None:
    for hazards in ("raise", HazardPolicy.RAISE):
        machine = Machine("epyc-7742", ram=4 << 20, hazards=hazards)
        machine.bus.store(PAGE, TEXT, SLOT_HOST)
        with pytest.raises(Exception, match="hazard dirty-alias"):
            machine.bus.load(PAGE, 1, SLOT_NONE)


@pytest.mark.req("CM-50")
def test_firmware_decides_on_syscfg_23() -> None:
    assert Machine(ram=4 << 20).smee
    assert not Machine(ram=4 << 20, smee=False).smee


@pytest.mark.parametrize(
    ("ram", "below_4_gib", "above_4_gib"),
    [(64 << 20, 64 << 20, 0), (3 * GIB, 3 * GIB, 0), (8 * GIB, 3 * GIB, 9 * GIB)],
)
def test_firmware_announces_where_ram_ends_on_every_core(
    ram: int, below_4_gib: int, above_4_gib: int
) -> None:
    machine = Machine(ram=ram, cores=2)
    for _ in range(2):
        for cpu in machine.cpus:
            assert cpu.rdmsr(0xC001_001A) == below_4_gib  # TOP_MEM
            assert cpu.rdmsr(0xC001_001D) == above_4_gib  # TOP_MEM2
        machine.reset()


def test_cores_share_memory_and_have_msrs_of_their_own() -> None:
    machine = Machine(ram=4 << 20, cores=3)
    first, second, third = machine.cpus
    assert [cpu.index for cpu in machine.cpus] == [0, 1, 2]
    assert machine.cpu is first
    first.store(PAGE, b"for all to see")
    assert third.load(PAGE, 14) == b"for all to see"
    second.wrmsr(0xC000_0080, 1 << 8)
    assert (first.rdmsr(0xC000_0080), second.rdmsr(0xC000_0080)) == (0, 1 << 8)


def test_a_core_sees_what_another_stored_through_a_page_it_has_at_hand() -> None:
    machine = Machine(ram=4 << 20, cores=2)
    first, second = machine.cpus
    for value in range(5):
        first.store64(PAGE, value)
        assert second.load64(PAGE) == value
        second.store64(PAGE + 8, value)
        assert first.load64(PAGE + 8) == value


# --- the probe


def test_the_probe_sees_cells_and_disturbs_nothing() -> None:
    machine = Machine("epyc-7742", ram=4 << 20, hazards="raise")
    machine.bus.store(PAGE, TEXT, SLOT_NONE)
    assert machine.snoop(PAGE, 64) == bytes(64)
    assert machine.bus.load(PAGE, 64, SLOT_NONE) == TEXT
    machine.caches.drain()
    assert machine.snoop(PAGE, 64) == TEXT
    assert machine.snoop(0, 0) == b""
    assert machine.snoop((4 << 20) - 1, 1) == b"\0"


@pytest.mark.parametrize(
    ("pa", "length"), [(4 << 20, 1), ((4 << 20) - 1, 2), (-1, 1), (0, -1), (1 << 50, 8)]
)
def test_the_probe_does_not_reach_beyond_dram(pa: int, length: int) -> None:
    with pytest.raises(CallerError) as refusal:
        Machine(ram=4 << 20).snoop(pa, length)
    asked = f"[{pa:#x}, {pa + length:#x}) is outside DRAM"
    assert str(refusal.value).startswith(asked)
    assert "0x400000" in str(refusal.value)


# --- reset and power loss


@pytest.mark.req("WP-4", "WP-20", "MC-33")
@pytest.mark.parametrize("coherent", [False, True])
def test_reset_writes_back_keeps_dram_and_makes_a_new_key(coherent: bool) -> None:
    machine = Machine(ram=4 << 20, coherent=coherent, seed=1)
    old_key = machine.controller.engine(SLOT_HOST)
    machine.bus.store(PAGE, TEXT, SLOT_HOST)
    machine.bus.store(2 * PAGE - PAGE_SIZE, TEXT, SLOT_NONE)
    machine.reset()
    assert machine.snoop(PAGE, 64) == old_key.encrypt(PAGE, TEXT)
    assert machine.snoop(2 * PAGE - PAGE_SIZE, 64) == TEXT
    new_key = machine.controller.engine(SLOT_HOST)
    noise = machine.bus.load(PAGE, 64, SLOT_HOST)
    assert noise == new_key.decrypt(PAGE, old_key.encrypt(PAGE, TEXT))
    assert TEXT[:16] not in noise


@pytest.mark.req("WP-20")
@pytest.mark.parametrize("coherent", [False, True])
def test_power_loss_takes_the_caches_and_leaves_the_cells(coherent: bool) -> None:
    machine = Machine(ram=4 << 20, coherent=coherent, seed=1)
    machine.bus.store(PAGE, TEXT, SLOT_HOST)
    machine.bus.store(PAGE + PAGE_SIZE, TEXT, SLOT_NONE)
    machine.caches.drain()
    cells = machine.snoop(0, 4 << 20)
    machine.bus.store(PAGE, TEXT[::-1], SLOT_HOST)
    machine.bus.store(PAGE + PAGE_SIZE, TEXT[::-1], SLOT_NONE)
    machine.power_loss()
    machine.caches.drain()
    assert machine.snoop(0, 4 << 20) == cells
    assert machine.bus.load(PAGE + PAGE_SIZE, 64, SLOT_NONE) == TEXT
    assert TEXT[:16] not in machine.bus.load(PAGE, 64, SLOT_HOST)


@pytest.mark.parametrize("restart", ["reset", "power_loss"])
def test_a_restart_puts_every_core_where_reset_leaves_it(restart: str) -> None:
    machine = Machine(ram=4 << 20, cores=2, seed=1)
    events: list[Event] = []
    cpu = start_paging(machine)
    cpu.cpl = 3
    machine.trace.listen(events.append, frozenset({"reset"}))
    getattr(machine, restart)()
    assert [event.kind for event in events] == ["reset"]
    for core in machine.cpus:
        # APM volume 2, table 14-1.
        assert (core.read_cr0(), core.read_cr3(), core.read_cr4()) == (
            0x6000_0010,
            0,
            0,
        )
        assert (core.cpl, core.cr2, core.rdmsr(0xC000_0080)) == (0, 0, 0)
    assert machine.smee


def test_a_machine_boots_again_and_again() -> None:
    machine = Machine(ram=16 << 20, hazards="raise", seed=1)
    seen = set()
    for _ in range(5):
        cpu = start_paging(machine)
        cpu.store(SECRET + PAGE, TEXT)
        cpu.wbinvd()
        seen.add(machine.snoop(PAGE, 64))
        machine.reset()
    assert len(seen) == 5


# --- the seed


def a_run(seed: int | None) -> bytes:
    """Do a little of everything that draws; return all of DRAM."""
    machine = Machine("epyc-7742", ram=16 << 20, seed=seed)
    cpu = start_paging(machine)
    for page in range(64):
        cpu.store(SECRET + PAGE + page * PAGE_SIZE, TEXT)
        cpu.store(PLAIN + PAGE + page * PAGE_SIZE + 8 * page, b"contested")
    machine.caches.evict(0.5)
    cpu.store(SECRET + PAGE, TEXT * 1024)
    cpu.wbinvd()
    machine.reset()
    cpu = start_paging(machine)
    cpu.store(SECRET + 4 * PAGE, TEXT)
    cpu.wbinvd()
    return machine.snoop(0, 16 << 20)


@pytest.mark.req("WP-7")
def test_a_seed_repeats_a_run_to_the_last_bit_of_dram() -> None:
    assert a_run(1) == a_run(1)
    assert a_run(1) != a_run(2)
    assert a_run(None) != a_run(None)


# --- size


@pytest.mark.parametrize("coherent", [False, True])
def test_64_gib_cost_what_is_touched(coherent: bool) -> None:
    before = resident_bytes()
    machine = Machine(ram=64 * GIB, coherent=coherent, seed=1)
    cpu = start_paging(machine)
    places = [PAGE, 2 * GIB, 4 * GIB, 33 * GIB + 5 * PAGE_SIZE, 65 * GIB - 64]
    for pa in places:
        cpu.store(SECRET + pa, TEXT)
    cpu.wbinvd()
    engine = machine.controller.engine(SLOT_HOST)
    for pa in places:
        assert machine.snoop(pa, 64) == engine.encrypt(pa, TEXT)
        assert cpu.load(SECRET + pa, 64) == TEXT
    # Bits by page are kept in arrays as long as RAM; where the host backs them with
    # pages of 2 MiB, every place that is touched costs a few of those.
    assert resident_bytes() - before < 192 << 20
    assert machine.dram.count_pages() == {SLOT_NONE: 3, SLOT_HOST: len(places)}


def test_memory_that_was_flushed_goes_back_to_the_host() -> None:
    machine = Machine(ram=256 << 20, seed=1)
    before = resident_bytes()
    machine.bus.store(PAGE, bytes(64 << 20), SLOT_HOST)
    machine.caches.write_back_invalidate()
    held = resident_bytes() - before
    assert held < 80 << 20  # the cells; the cached copy is gone
