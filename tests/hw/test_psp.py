"""hw/psp: keys are born in the AMD-SP and go to the memory controller, nowhere else."""

from collections import Counter

import pytest

from cbit.hw.cipher import profile_named
from cbit.hw.faults import GeneralProtection
from cbit.hw.machine import Machine
from cbit.hw.memory import SLOT_HOST, MemoryController
from cbit.hw.memory.controller import NoKeyError
from cbit.hw.psp import RandomSource, SecureProcessor

PLAIN = bytes(range(64))


def processor(
    profile: str = "random", seed: int | None = 1
) -> tuple[SecureProcessor, MemoryController]:
    controller = MemoryController()
    psp = SecureProcessor(controller, profile_named(profile), seed)
    psp.reset()
    return psp, controller


def ciphertext(controller: MemoryController) -> bytes:
    return controller.engine(SLOT_HOST).encrypt(0x1000, PLAIN)


# --- the random source


@pytest.mark.req("WP-7")
def test_a_seed_makes_the_draws_repeatable_and_no_seed_does_not() -> None:
    assert RandomSource(7).draw(64) == RandomSource(7).draw(64)
    assert RandomSource(7).draw(64) != RandomSource(8).draw(64)
    assert RandomSource(None).draw(64) != RandomSource(None).draw(64)


@pytest.mark.req("WP-7")
def test_draws_are_one_stream_however_they_are_cut() -> None:
    whole = RandomSource(1).draw(100)
    pieces = RandomSource(1)
    assert b"".join(pieces.draw(n) for n in (1, 15, 16, 33, 35)) == whole
    assert pieces.draw(0) == b""


@pytest.mark.req("WP-7")
def test_a_long_draw_looks_random() -> None:
    stream = RandomSource(1).draw(1 << 20)
    ones = int.from_bytes(stream, "little").bit_count()
    assert abs(ones - (4 << 20)) < 10_000  # 7 standard deviations
    counts = Counter(stream)
    assert len(counts) == 256
    assert max(counts.values()) - min(counts.values()) < 640  # ten of them
    assert len({stream[at : at + 16] for at in range(0, 1 << 20, 16)}) == 1 << 16


# --- reset


@pytest.mark.req("WP-4", "WP-6")
@pytest.mark.parametrize("profile", ["zen1-xe", "zen1-xex", "random"])
def test_every_reset_makes_a_new_key(profile: str) -> None:
    psp, controller = processor(profile)
    seen = set()
    for _ in range(20):
        seen.add(ciphertext(controller))
        psp.reset()
    assert len(seen) == 20


@pytest.mark.req("MC-17", "MC-25")
@pytest.mark.parametrize(
    ("profile", "kept"), [("zen1-xe", True), ("zen1-xex", True), ("random", False)]
)
def test_constants_are_drawn_anew_only_where_the_profile_draws_them(
    profile: str, kept: bool
) -> None:
    psp, controller = processor(profile)
    tables = []
    for _ in range(2):
        engine = controller.engine(SLOT_HOST)
        # A block whose input to AES is 0 shows equal tweaks under equal keys only;
        # so read the tweaks off the engine, as no software can.
        tables.append([engine._tweaks.of(1 << bit) for bit in range(4, 52)])
        psp.reset()
    assert (tables[0] == tables[1]) == kept


def test_a_reset_takes_the_keys_of_guests_along() -> None:
    psp, controller = processor()
    controller.load_key(2, controller.engine(SLOT_HOST))
    psp.reset()
    with pytest.raises(NoKeyError):
        controller.engine(2)


def test_a_seed_repeats_the_keys_of_every_boot() -> None:
    (first, a), (second, b) = processor(seed=3), processor(seed=3)
    for _ in range(5):
        assert ciphertext(a) == ciphertext(b)
        first.reset()
        second.reset()
    assert ciphertext(processor(seed=4)[1]) != ciphertext(processor(seed=3)[1])


# --- nobody else sees a key


@pytest.mark.req("WP-6")
def test_a_core_that_resets_alone_leaves_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(ram=4 << 20, seed=1)
    before = ciphertext(machine.controller)
    machine.cpu.reset()
    assert ciphertext(machine.controller) == before
    machine.psp.reset()
    assert ciphertext(machine.controller) != before


@pytest.mark.req("WP-5", "WP-8", "MC-33")
def test_neither_dram_nor_msr_nor_cpuid_holds_key_or_constants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[bytes] = []
    draw = RandomSource.draw

    def overheard(self: RandomSource, length: int) -> bytes:
        drawn.append(draw(self, length))
        return drawn[-1]

    monkeypatch.setattr(RandomSource, "draw", overheard)
    machine = Machine(ram=4 << 20, seed=1)
    assert [len(secret) for secret in drawn] == [16] * 49  # 48 constants, the key

    machine.bus.store(0x10_0000, bytes(1 << 20), SLOT_HOST)
    machine.caches.write_back_invalidate()
    seen = [machine.snoop(0, 4 << 20)]
    for leaf in (*range(0x20), *range(0x8000_0000, 0x8000_0030)):
        words = machine.cpu.cpuid(leaf)
        seen.append(b"".join(word.to_bytes(4, "little") for word in words))
    for index in (*range(0x1000), *range(0xC000_0000, 0xC001_2000)):
        try:
            seen.append(machine.cpu.rdmsr(index).to_bytes(8, "little"))
        except GeneralProtection:
            continue
    everything = b"".join(seen)
    for secret in drawn:
        assert secret not in everything
        assert secret[:8] not in everything
        assert secret[8:] not in everything
