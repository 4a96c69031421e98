"""hw/snapshot: what comes back, what does not, and what the file holds."""

import io
from pathlib import Path

import numpy as np
import pytest

from cbit.boot.loader import enter_long_mode
from cbit.hw import Machine
from cbit.hw.cipher import EngineProfile
from cbit.hw.cipher.tweak import zen1_constants
from cbit.hw.errors import CallerError
from cbit.hw.memory import SLOT_HOST, SLOT_NONE
from cbit.hw.memory.controller import NoKeyError
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import Efer
from cbit.hw.snapshot import load_snapshot, save_snapshot
from cbit.hw.types import LARGE_PAGE_SIZE, PAGE_SIZE

from .snapshot_files import copied, header_of, loaded, saved

RAM = 4 << 20
BASE = 0x10_0000


def test_the_board_comes_back_as_it_was_ordered() -> None:
    machine = Machine(
        "epyc-9654",
        ram=RAM + PAGE_SIZE,
        tsme=True,
        coherent=False,
        profile="zen1-xe",
        hazards="raise",
        cores=3,
        smee=False,
        seed=5,
    )
    copy = copied(machine)
    assert (copy.ram, copy.tsme, copy.caches.coherent) == (RAM + PAGE_SIZE, True, False)
    assert copy.model == machine.model
    assert copy.psp.profile is machine.psp.profile
    assert len(copy.cpus) == 3
    assert not copy.smee
    copy.reset()
    assert not copy.smee
    assert copy.controller.transparent
    assert copy.caches.state().policy is machine.caches.state().policy


@pytest.mark.parametrize("name", model_names())
def test_every_model_comes_back_by_its_leaves(name: str) -> None:
    machine = Machine(name, ram=RAM, seed=1)
    assert copied(machine).model == machine.model


def test_a_model_from_a_dump_needs_the_dump_no_more(tmp_path: Path) -> None:
    dump = tmp_path / "mine.txt"
    raw = load_model("epyc-7742").table.raw
    dump.write_text(
        "\n".join(
            f"CPUID {leaf:08X}: {a:08X}-{b:08X}-{c:08X}-{d:08X} [SL {sub:02X}]"
            for (leaf, sub), (a, b, c, d) in raw.items()
        )
    )
    data = saved(Machine(str(dump), ram=RAM))
    dump.unlink()
    model = loaded(data).model
    assert model.name == "mine"
    assert model.table.raw == raw


def test_cores_come_back_each_with_its_own_registers() -> None:
    machine = Machine(ram=16 << 20, cores=2, seed=1)
    enter_long_mode(machine.cpu, five_levels=False)
    machine.cpu.cr2 = 0xFFFF_8000_0000_0123
    machine.cpu.cpl = 3
    machine.cpu.alignment_check = True
    machine.cpus[1].wrmsr(Efer.ADDRESS, 1)
    copy = copied(machine)
    for old, new in zip(machine.cpus, copy.cpus, strict=True):
        assert new.state() == old.state()
        assert new.msrs.state() == old.msrs.state()
    assert copy.cpu.cpl == 3
    assert copy.cpus[1].read_cr0() != copy.cpu.read_cr0()


def test_order_msrs_come_before_the_registers_they_give_a_meaning() -> None:
    machine = Machine(ram=32 << 20, seed=1)
    cpu = machine.cpu
    enter_long_mode(cpu, five_levels=False)
    entry = 0x8_3000 + 8 * 8
    cpu.store64(entry, cpu.load64(entry) | 1 << machine.model.memory_encryption.c_bit)
    cpu.invlpg(16 << 20)
    cpu.store(16 << 20, b"attack at dawn")
    copy = copied(machine)
    assert copy.cpu.load(16 << 20, 14) == b"attack at dawn"
    assert copy.cpu.translate(16 << 20).slot == SLOT_HOST
    copy.cpu.wbinvd()
    machine.cpu.wbinvd()
    assert copy.snoop(16 << 20, 14) == machine.snoop(16 << 20, 14) != b"attack at dawn"


def test_the_tlb_starts_empty() -> None:
    machine = Machine(ram=32 << 20, seed=1)
    cpu = machine.cpu
    enter_long_mode(cpu, five_levels=False)
    assert cpu.load64(16 << 20) == 0
    entry = 0x8_3000 + 8 * 8
    cpu.store64(entry, cpu.load64(entry) + (2 << 20))
    cpu.store64(18 << 20, 0x1234)
    assert cpu.load64(16 << 20) == 0  # nobody flushed
    assert copied(machine).cpu.load64(16 << 20) == 0x1234


def test_dirty_lines_come_back_dirty_and_dram_as_it_was() -> None:
    machine = Machine(ram=RAM, seed=1)
    machine.bus.store(BASE, b"first", SLOT_HOST)
    machine.caches.write_back_invalidate()
    machine.bus.store(BASE, b"other", SLOT_HOST)
    copy = copied(machine)
    assert (copy.dram.cells == machine.dram.cells).all()
    assert copy.bus.load(BASE, 5, SLOT_HOST) == b"other"
    copy.power_loss()
    machine.caches.drain()
    assert not (copy.dram.cells == machine.dram.cells).all()


def test_marks_of_who_wrote_come_back_also_for_pages_of_zeros() -> None:
    machine = Machine(ram=RAM, seed=1)
    machine.bus.store(BASE, bytes(3 * PAGE_SIZE), SLOT_NONE)
    machine.bus.store(3 << 20, bytes(PAGE_SIZE), SLOT_HOST)
    machine.caches.drain()
    copy = copied(machine)
    assert (copy.dram.written_by == machine.dram.written_by).all()
    assert copy.dram.count_pages() == machine.dram.count_pages()
    assert [pa for pa, _ in copy.dram.extents()] == [0, LARGE_PAGE_SIZE]


def test_bytes_of_lines_that_are_not_valid_stay_out_of_the_file() -> None:
    machine = Machine(ram=RAM, coherent=False, seed=1)
    secret = np.random.default_rng(1).bytes(PAGE_SIZE)
    machine.bus.store(BASE, secret, SLOT_NONE)
    machine.caches.lose()
    machine.bus.store(BASE + 64, bytes(64), SLOT_NONE)
    store = machine.caches.line_store(SLOT_NONE)
    assert store.data.cells[BASE : BASE + 32].tobytes() == secret[:32]  # garbage
    assert len(saved(machine)) < len(saved(Machine(ram=RAM, seed=1))) + 1000
    copy = copied(machine).caches.line_store(SLOT_NONE)
    page = BASE // PAGE_SIZE
    assert int(copy.valid[page]) == int(copy.dirty[page]) == 2
    assert not copy.data.cells[BASE : BASE + 64].any()


def test_stale_lines_hazards_and_their_writers_come_back() -> None:
    machine = Machine(ram=RAM, coherent=False, seed=1)
    machine.bus.load(BASE, 64, SLOT_NONE)
    machine.bus.store(BASE, bytes(64), SLOT_HOST)
    machine.caches.flush_line(SLOT_HOST, BASE)
    copy = copied(machine)
    for board in (machine, copy):
        board.bus.load(BASE, 8, SLOT_NONE)
        board.bus.store(BASE, b"x" * 8, SLOT_NONE)
        board.bus.load(BASE, 8, SLOT_HOST)
    assert copy.caches.hazards_met == machine.caches.hazards_met
    kinds = [hazard.kind for hazard in copy.caches.hazards_met]
    # The load, the store of a part of the line, the load through the other tag.
    assert kinds == ["stale-line", "stale-line", "dirty-alias"]
    assert copy.caches.hazards_met[0].other_slot == SLOT_HOST
    assert copied(copy).caches.hazards_met == machine.caches.hazards_met


def test_keys_come_back_and_so_do_those_of_later_resets() -> None:
    machine = Machine(ram=RAM, seed=None)
    machine.reset()
    machine.psp.random.draw(7)  # a position inside a block of the generator
    machine.controller.load_key(9, machine.controller.engine(SLOT_HOST))
    copy = copied(machine)
    assert copy.controller.state() == machine.controller.state()
    for _ in range(3):
        for board in (machine, copy):
            board.reset()
        assert copy.controller.state() == machine.controller.state()
    with pytest.raises(NoKeyError):
        copy.controller.engine(9)


def test_accesses_to_devices_through_the_c_bit_stay_counted() -> None:
    machine = Machine(ram=RAM, seed=1)
    machine.bus.load(0xA_0000, 4, SLOT_HOST)
    assert copied(machine).bus.mmio_encrypted == 1


def test_saving_changes_nothing_and_is_repeatable() -> None:
    machine = Machine(ram=RAM, coherent=False, seed=1)
    machine.bus.store(BASE, bytes(range(256)) * 20, SLOT_HOST)
    machine.bus.load(BASE, 9, SLOT_NONE)
    first = saved(machine)
    assert saved(machine) == first
    assert saved(loaded(first)) == first
    twin = Machine(ram=RAM, coherent=False, seed=1)
    twin.bus.store(BASE, bytes(range(256)) * 20, SLOT_HOST)
    twin.bus.load(BASE, 9, SLOT_NONE)
    assert saved(twin) == first


def test_facts_of_the_caller_come_back() -> None:
    extra: dict[str, object] = {
        "native": {"regs": [1 << 63, 0], "blob": "00ff", "x": None, "f": 0.5},
        "sections": "the caller's own word",
        "\ud800": "é",
    }
    data = saved(Machine(ram=RAM), extra)
    assert load_snapshot(io.BytesIO(data), "file")[1] == extra
    assert load_snapshot(io.BytesIO(saved(Machine(ram=RAM))), "file")[1] == {}


def test_tuples_of_the_caller_come_back_as_lists() -> None:
    data = saved(Machine(ram=RAM), {"counts": [(14, 2), (32, 1)]})
    assert load_snapshot(io.BytesIO(data), "file")[1] == {"counts": [[14, 2], [32, 1]]}


@pytest.mark.parametrize(
    "value", [b"bytes", {1: 2}, float("nan"), object(), {"a": [({2: 3},)]}, {"é"}]
)
def test_facts_that_would_not_come_back_are_refused_before_a_byte(
    value: object,
) -> None:
    file = io.BytesIO()
    with pytest.raises(CallerError, match="JSON"):
        save_snapshot(file, Machine(ram=RAM), {"fact": value})
    assert file.getvalue() == b""


def test_a_profile_that_no_file_can_name_is_refused() -> None:
    mine = EngineProfile("random", True, lambda draw: zen1_constants(), "mine")
    with pytest.raises(CallerError, match="PROFILES"):
        save_snapshot(io.BytesIO(), Machine(ram=RAM, profile=mine))


def test_a_large_machine_costs_what_was_touched() -> None:
    machine = Machine(ram=64 << 30, seed=1)
    places = (0x1000, 2 << 30, 40 << 30, machine.map.ram_end - PAGE_SIZE)
    text = b"touched" * 500
    for pa in places:
        machine.bus.store(pa, text, SLOT_HOST)
    machine.caches.write_back_invalidate()
    machine.bus.store(places[2], b"dirty", SLOT_NONE)
    data = saved(machine)
    assert len(data) < 100_000
    copy = loaded(data)
    assert copy.map.ram_end == machine.map.ram_end
    assert copy.bus.load(places[2], 5, SLOT_NONE) == b"dirty"
    for pa in (places[0], places[1], places[3]):
        assert copy.bus.load(pa, len(text), SLOT_HOST) == text


def test_pieces_of_a_long_section_are_put_together() -> None:
    machine = Machine(ram=16 << 20, seed=1)
    data = np.random.default_rng(2).bytes((9 << 20) + 100)
    machine.bus.store(BASE + 0x1000, data, SLOT_HOST)
    file = saved(machine)
    table = dict(header_of(file)["sections"])
    assert table["slot1.whole"] > 2 * (4 << 20)
    copy = loaded(file)
    assert copy.bus.load(BASE + 0x1000, len(data), SLOT_HOST) == data
    copy.caches.drain()
    machine.caches.drain()
    assert (copy.dram.cells == machine.dram.cells).all()


class Trickle(io.BytesIO):
    """A pipe: bytes come when they come, and nobody goes back."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 1000))

    def seekable(self) -> bool:
        return False

    def seek(self, offset: int, whence: int = 0, /) -> int:
        raise io.UnsupportedOperation("seek")

    tell = None  # type: ignore[assignment]


def test_a_file_that_cannot_seek_is_read_and_written() -> None:
    machine = Machine(ram=RAM, seed=1)
    machine.bus.store(BASE, bytes(range(256)), SLOT_HOST)
    file = Trickle()
    save_snapshot(file, machine)
    copy, _ = load_snapshot(Trickle(file.getvalue()), "pipe")
    assert copy.bus.load(BASE, 256, SLOT_HOST) == bytes(range(256))
