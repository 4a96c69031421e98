"""What memory encryption promises, and what it does not, as a bus probe sees it.

Software stores and loads through page tables, C=0 and C=1 mappings of the same RAM;
the probe is `Machine.snoop`; an attacker owns C=0 mappings or the DIMMs themselves.
"""

import random

import pytest

from cbit.hw.cipher import EngineProfile, MemoryCipher, Tweaks, profile_named
from cbit.hw.cpu import Cpu
from cbit.hw.machine import Machine
from cbit.hw.memory import SLOT_HOST
from cbit.hw.types import PAGE_SIZE

from .memory_windows import PLAIN, SECRET, SECRET_PDPT, start_paging
from .test_cipher import ZEN1_CONSTANTS, Witness, xor

PAGE = 0x60_0000
TEXT = b"the quick brown fox jumps over the lazy dog, 64 bytes in a line."


@pytest.fixture(params=[False, True], ids=["incoherent", "coherent"])
def machine(request: pytest.FixtureRequest) -> Machine:
    # hazards="raise": what the tests do is what correct software does.
    return Machine(ram=16 << 20, coherent=request.param, hazards="raise", seed=1)


@pytest.fixture
def cpu(machine: Machine) -> Cpu:
    return start_paging(machine)


def put(cpu: Cpu, va: int, data: bytes) -> None:
    """Store and let it reach DRAM."""
    cpu.store(va, data)
    cpu.wbinvd()


def get(cpu: Cpu, va: int, length: int) -> bytes:
    """Load what DRAM holds now, and leave no line behind."""
    cpu.wbinvd()
    data = cpu.load(va, length)
    cpu.wbinvd()
    return data


def flip(machine: Machine, pa: int, bit: int) -> None:
    """Change one bit of a cell, as a fault or an attacker on the bus does."""
    machine.dram.cells[pa + bit // 8] ^= 1 << bit % 8


# --- the engine stands between cache and DRAM


@pytest.mark.req("WP-1", "WP-13", "MC-28", "MC-30")
def test_the_same_cells_are_text_through_c_1_and_ciphertext_through_c_0(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    cells = machine.snoop(PAGE, 64)
    assert cells != TEXT
    assert get(cpu, PLAIN + PAGE, 64) == cells
    assert get(cpu, SECRET + PAGE, 64) == TEXT
    assert machine.snoop(PAGE, 64) == cells


@pytest.mark.req("MC-28", "WP-13")
def test_stores_through_c_0_are_stored_as_they_are(machine: Machine, cpu: Cpu) -> None:
    put(cpu, PLAIN + PAGE, TEXT)
    assert machine.snoop(PAGE, 64) == TEXT


@pytest.mark.req("WP-16")
def test_before_paging_every_access_is_plain(machine: Machine) -> None:
    assert machine.smee
    machine.cpu.store(PAGE, TEXT)
    machine.cpu.wbinvd()
    assert machine.snoop(PAGE, 64) == TEXT


@pytest.mark.req("MC-32")
def test_dram_holds_the_old_bytes_until_the_line_leaves(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    before = machine.snoop(PAGE, 64)
    cpu.store(SECRET + PAGE, TEXT[::-1])
    assert machine.snoop(PAGE, 64) == before
    assert cpu.load(SECRET + PAGE, 64) == TEXT[::-1]
    cpu.clflush(SECRET + PAGE)
    assert machine.snoop(PAGE, 64) != before


@pytest.mark.req("MC-30")
def test_zeros_read_through_c_1_are_repeatable_noise(
    machine: Machine, cpu: Cpu
) -> None:
    noise = get(cpu, SECRET + PAGE, PAGE_SIZE)
    assert machine.snoop(PAGE, PAGE_SIZE) == bytes(PAGE_SIZE)
    blocks = {noise[at : at + 16] for at in range(0, PAGE_SIZE, 16)}
    assert len(blocks) == 256
    assert bytes(16) not in blocks
    assert get(cpu, SECRET + PAGE, PAGE_SIZE) == noise


@pytest.mark.req("MC-6", "MC-5")
def test_ciphertext_lies_where_the_text_was_and_nowhere_else(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    before = machine.snoop(0, 16 << 20)
    put(cpu, SECRET + PAGE + 21, b"abc")
    after = machine.snoop(0, 16 << 20)
    assert after[: PAGE + 16] == before[: PAGE + 16]
    assert after[PAGE + 16 : PAGE + 32] != before[PAGE + 16 : PAGE + 32]
    assert after[PAGE + 32 :] == before[PAGE + 32 :]


@pytest.mark.req("MC-29", "PT-54", "WP-11")
def test_a_changed_c_bit_changes_no_cell_but_the_reading(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    cells = machine.snoop(PAGE, 64)
    entry = cpu.load64(SECRET_PDPT)
    cpu.store64(SECRET_PDPT, entry & ~(1 << 47))
    cpu.write_cr3(cpu.read_cr3())
    assert machine.snoop(PAGE, 64) == cells
    assert get(cpu, SECRET + PAGE, 64) == cells
    cpu.store64(SECRET_PDPT, entry)
    cpu.write_cr3(cpu.read_cr3())
    assert get(cpu, SECRET + PAGE, 64) == TEXT


@pytest.mark.req("MC-29", "PT-53")
@pytest.mark.parametrize(("old", "new"), [(PLAIN, SECRET), (SECRET, PLAIN)])
def test_converting_in_place_goes_through_both_mappings(
    machine: Machine, cpu: Cpu, old: int, new: int
) -> None:
    put(cpu, old + PAGE, TEXT * 64)
    cells = machine.snoop(PAGE, PAGE_SIZE)
    buffer = get(cpu, old + PAGE, PAGE_SIZE)
    put(cpu, new + PAGE, buffer)
    assert get(cpu, new + PAGE, PAGE_SIZE) == TEXT * 64
    assert machine.snoop(PAGE, PAGE_SIZE) != cells
    assert (machine.snoop(PAGE, 64) == TEXT) == (new == PLAIN)


@pytest.mark.req("WP-11", "WP-26")
def test_pages_of_both_kinds_mix_in_one_address_space(
    machine: Machine, cpu: Cpu
) -> None:
    for page in range(8):
        window = SECRET if page % 2 else PLAIN
        cpu.store(window + PAGE + page * PAGE_SIZE, TEXT * 64)
    cpu.wbinvd()
    for page in range(8):
        seen = machine.snoop(PAGE + page * PAGE_SIZE, PAGE_SIZE)
        assert (TEXT in seen) == (page % 2 == 0)


@pytest.mark.req("MC-37", "WP-12")
@pytest.mark.parametrize(("model", "c_bit"), [("epyc-7742", 47), ("epyc-7763", 51)])
def test_the_c_bit_is_no_part_of_the_tweaked_address(model: str, c_bit: int) -> None:
    machine = Machine(model, ram=16 << 20, seed=1)
    assert machine.model.memory_encryption.c_bit == c_bit
    put(start_paging(machine), SECRET + PAGE, TEXT)
    engine = machine.controller.engine(SLOT_HOST)
    assert machine.snoop(PAGE, 64) == engine.encrypt(PAGE, TEXT)


# --- what an attacker can do with ciphertext


@pytest.mark.req("MC-20", "MC-21")
def test_repetition_in_time_shows_at_one_address(machine: Machine, cpu: Cpu) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    snapshot = machine.snoop(PAGE, 64)
    put(cpu, SECRET + PAGE, TEXT[::-1])
    assert machine.snoop(PAGE, 64) != snapshot
    put(cpu, SECRET + PAGE, TEXT)
    assert machine.snoop(PAGE, 64) == snapshot


@pytest.mark.req("MC-21", "WP-3")
def test_repetition_across_addresses_does_not_show(machine: Machine, cpu: Cpu) -> None:
    put(cpu, SECRET + PAGE, bytes(64 * PAGE_SIZE))
    cells = machine.snoop(PAGE, 64 * PAGE_SIZE)
    blocks = {cells[at : at + 16] for at in range(0, len(cells), 16)}
    assert len(blocks) == 64 * 256


@pytest.mark.req("MC-13", "MC-21")
def test_where_firmware_left_constants_at_0_repetition_shows() -> None:
    def constants(random_bytes: object) -> list[bytes]:
        table = profile_named("zen1-xex").constants(bytes)
        table[8 - 4] = table[9 - 4] = bytes(16)
        return table

    profile = EngineProfile("1950X", True, constants, "as first measured")
    machine = Machine(ram=16 << 20, profile=profile, seed=1)
    put(start_paging(machine), SECRET + PAGE, bytes(PAGE_SIZE))
    assert machine.snoop(PAGE, 16) == machine.snoop(PAGE ^ 0x100, 16)
    assert machine.snoop(PAGE, 16) != machine.snoop(PAGE ^ 0x400, 16)


@pytest.mark.req("MC-22", "MC-23", "WP-90")
def test_law_a_flipped_bit_garbles_its_block_and_nothing_else(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT * 64)
    rng = random.Random(1)
    for _ in range(20):
        block = rng.randrange(256) * 16
        flip(machine, PAGE + block, bit := rng.randrange(128))
        text = get(cpu, SECRET + PAGE, PAGE_SIZE)
        assert text[:block] == (TEXT * 64)[:block]
        assert text[block + 16 :] == (TEXT * 64)[block + 16 :]
        garbled = xor(text[block : block + 16], (TEXT * 64)[block : block + 16])
        assert 30 < int.from_bytes(garbled, "little").bit_count() < 98
        flip(machine, PAGE + block, bit)
    assert get(cpu, SECRET + PAGE, PAGE_SIZE) == TEXT * 64


@pytest.mark.req("MC-24", "MC-28", "WP-91")
def test_old_ciphertext_put_back_is_old_text(machine: Machine, cpu: Cpu) -> None:
    put(cpu, SECRET + PAGE, b"balance: 1000 EUR, not yet spent")
    recorded = get(cpu, PLAIN + PAGE, 32)
    put(cpu, SECRET + PAGE, b"balance:    0 EUR, all is spent.")
    put(cpu, PLAIN + PAGE, recorded)
    assert get(cpu, SECRET + PAGE, 32) == b"balance: 1000 EUR, not yet spent"


@pytest.mark.req("MC-3", "WP-3")
@pytest.mark.parametrize("profile", ["zen1-xe", "zen1-xex", "random"])
def test_ciphertext_carried_elsewhere_is_other_text(profile: str) -> None:
    machine = Machine(ram=16 << 20, profile=profile, seed=1)
    cpu = start_paging(machine)
    put(cpu, SECRET + PAGE, TEXT)
    put(cpu, PLAIN + 2 * PAGE, get(cpu, PLAIN + PAGE, 64))
    moved = get(cpu, SECRET + 2 * PAGE, 64)
    assert all(moved[at : at + 16] != TEXT[at : at + 16] for at in range(0, 64, 16))


@pytest.mark.req("MC-25", "MC-7", "MC-11", "MC-T1")
def test_xe_gives_its_constants_to_whoever_moves_known_blocks() -> None:
    # SEVurity III-A. All of 3 GiB is there, and only what is touched costs.
    machine = Machine("epyc-7551p", ram=3 << 30, profile="zen1-xe", seed=1)
    cpu = start_paging(machine)
    known, base = TEXT[:16], 0x10_0000
    found = {}
    for bit in ZEN1_CONSTANTS:
        put(cpu, SECRET + (base ^ 1 << bit), known)
        put(cpu, PLAIN + base, get(cpu, PLAIN + (base ^ 1 << bit), 16))
        found[bit] = xor(get(cpu, SECRET + base, 16), known)
    assert found == ZEN1_CONSTANTS


@pytest.mark.req("MC-26", "MC-8")
def test_xex_block_moves_need_compensation() -> None:
    # SEVurity IV: c ^ T(p) ^ T(q) at q reads as m ^ T(p) ^ T(q).
    machine = Machine("epyc-7551p", ram=16 << 20, profile="zen1-xex", seed=1)
    cpu = start_paging(machine)
    p, q = PAGE + 0x40, 2 * PAGE + 0x9F0
    difference = Witness(bytes(16), ZEN1_CONSTANTS, True).tweak(p ^ q)
    put(cpu, SECRET + p, TEXT[:16])
    stolen = get(cpu, PLAIN + p, 16)
    put(cpu, PLAIN + q, stolen)
    assert get(cpu, SECRET + q, 16) not in (TEXT[:16], xor(TEXT[:16], difference))
    put(cpu, PLAIN + q, xor(stolen, difference))
    assert get(cpu, SECRET + q, 16) == xor(TEXT[:16], difference)

    # To place wanted text at q, find or make its counterpart at p.
    wanted = b"jmp to shellcode"
    put(cpu, SECRET + p, xor(wanted, difference))
    put(cpu, PLAIN + q, xor(get(cpu, PLAIN + p, 16), difference))
    assert get(cpu, SECRET + q, 16) == wanted


@pytest.mark.req("MC-10")
@pytest.mark.parametrize("profile", ["zen1-xe", "zen1-xex"])
@pytest.mark.parametrize("model", ["epyc-7551p", "ryzen-1800x"])
def test_the_mode_is_not_tied_to_the_model(model: str, profile: str) -> None:
    machine = Machine(model, ram=16 << 20, profile=profile, seed=1)
    cpu = start_paging(machine)
    put(cpu, SECRET + PAGE, TEXT)
    put(cpu, PLAIN + PAGE + 0x1000, get(cpu, PLAIN + PAGE, 16))
    moved = xor(get(cpu, SECRET + PAGE + 0x1000, 16), TEXT[:16])
    assert (moved == ZEN1_CONSTANTS[12]) == (profile == "zen1-xe")


# --- other keys


@pytest.mark.req("MC-27", "MC-38", "WP-45", "WP-46")
def test_a_wrong_key_reads_noise_and_no_fault(machine: Machine, cpu: Cpu) -> None:
    # Slots 2 and 3 are those of ASIDs 1 and 2; keys there are the AMD-SP's to load.
    tweaks = Tweaks([bytes([n] * 16) for n in range(48)])
    for slot in (2, 3):
        machine.controller.load_key(
            slot, MemoryCipher(bytes([slot] * 16), tweaks, True)
        )
    machine.bus.store(PAGE, TEXT, 2)
    cpu.wbinvd()
    readings = {get(cpu, PLAIN + PAGE, 64), get(cpu, SECRET + PAGE, 64)}
    for slot in (2, 3):
        readings.add(machine.bus.load(PAGE, 64, slot))
        cpu.wbinvd()
    assert len(readings) == 4
    assert TEXT in readings


@pytest.mark.req("WP-4", "MC-33", "MC-27")
def test_after_a_reset_old_ciphertext_is_noise(machine: Machine, cpu: Cpu) -> None:
    put(cpu, SECRET + PAGE, TEXT)
    put(cpu, PLAIN + 2 * PAGE, TEXT)
    cells = machine.snoop(PAGE, 64)
    machine.reset()
    assert machine.snoop(PAGE, 64) == cells
    cpu = start_paging(machine)
    noise = get(cpu, SECRET + PAGE, 64)
    assert all(noise[at : at + 16] != TEXT[at : at + 16] for at in range(0, 64, 16))
    assert get(cpu, PLAIN + 2 * PAGE, 64) == TEXT  # what was plain is there for all


@pytest.mark.req("WP-20", "MC-33")
def test_a_stolen_module_shows_nothing_here_or_in_another_machine(
    machine: Machine, cpu: Cpu
) -> None:
    put(cpu, SECRET + PAGE, TEXT * 1024)
    machine.power_loss()
    image = machine.snoop(0, 16 << 20)
    assert TEXT[:8] not in image
    assert TEXT * 64 not in image

    other = Machine(ram=16 << 20, seed=2)
    other.dram.cells.data[:] = image
    assert TEXT[:16] not in get(start_paging(other), SECRET + PAGE, 64 * 1024)


@pytest.mark.req("WP-9")
def test_software_turns_sme_on_with_one_msr_and_asks_the_amd_sp_for_nothing() -> None:
    machine = Machine(ram=16 << 20, smee=False, seed=1)
    key = machine.controller.engine(SLOT_HOST)
    assert not machine.smee
    machine.cpu.wrmsr(0xC001_0010, machine.cpu.rdmsr(0xC001_0010) | 1 << 23)
    assert machine.smee
    put(start_paging(machine), SECRET + PAGE, TEXT)
    assert machine.controller.engine(SLOT_HOST) is key
    assert machine.snoop(PAGE, 64) == key.encrypt(PAGE, TEXT)
