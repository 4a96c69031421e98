"""hw/memory/controller: which key slot serves an access."""

import pytest

from cbit.hw.cipher import MemoryCipher, Tweaks
from cbit.hw.errors import CbitError
from cbit.hw.memory import SLOT_HOST, SLOT_NONE, MemoryController
from cbit.hw.memory.controller import NoKeyError

TWEAKS = Tweaks([bytes([n] * 16) for n in range(48)])


def engine(key: int) -> MemoryCipher:
    return MemoryCipher(key.to_bytes(16, "little"), TWEAKS, True)


@pytest.mark.req("WP-13")
def test_the_c_bit_of_the_access_chooses_between_no_key_and_the_hosts() -> None:
    controller = MemoryController()
    assert controller.slot_for(False) == SLOT_NONE
    assert controller.slot_for(True) == SLOT_HOST


@pytest.mark.req("WP-28", "MC-31")
def test_transparent_sme_ignores_the_c_bit() -> None:
    controller = MemoryController(transparent=True)
    assert controller.slot_for(False) == controller.slot_for(True) == SLOT_HOST


@pytest.mark.req("WP-44", "WP-45")
def test_every_slot_has_an_engine_of_its_own() -> None:
    controller = MemoryController()
    for slot in (SLOT_HOST, 2, 3):
        controller.load_key(slot, engine(slot))
    stored = {controller.engine(s).encrypt(0x1000, bytes(16)) for s in (1, 2, 3)}
    assert len(stored) == 3
    assert controller.engine(2).encrypt(0x1000, bytes(16)) == engine(2).encrypt(
        0x1000, bytes(16)
    )


def test_a_slot_without_a_key_is_named() -> None:
    with pytest.raises(NoKeyError) as refusal:
        MemoryController().engine(5)
    assert str(refusal.value) == "key slot 5: no key loaded by the AMD-SP"
    assert isinstance(refusal.value, CbitError)


def test_slot_0_is_no_place_for_a_key() -> None:
    with pytest.raises(AssertionError):
        MemoryController().load_key(SLOT_NONE, engine(1))


def test_forgotten_keys_are_gone_from_every_slot() -> None:
    controller = MemoryController()
    controller.load_key(SLOT_HOST, engine(1))
    controller.load_key(7, engine(7))
    controller.forget_keys()
    for slot in (SLOT_HOST, 7):
        with pytest.raises(NoKeyError):
            controller.engine(slot)
