"""kernel/cc.py: the decision, and what `cc_platform_has` makes of it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from cbit.kernel.cc import CcAttr, EncryptionState, cc_platform_has

C47, C51 = 1 << 47, 1 << 51
SEV, SEV_ES, SEV_SNP = 1, 2, 4

PLATFORMS = {
    "nothing": (EncryptionState(), set()),
    "SME": (
        EncryptionState(me_mask=C47),
        {CcAttr.MEM_ENCRYPT, CcAttr.HOST_MEM_ENCRYPT},
    ),
    "SEV": (
        EncryptionState(me_mask=C47, sev_status=SEV),
        {
            CcAttr.MEM_ENCRYPT,
            CcAttr.GUEST_MEM_ENCRYPT,
            CcAttr.GUEST_UNROLL_STRING_IO,
        },
    ),
    "SEV-ES": (
        EncryptionState(me_mask=C51, sev_status=SEV | SEV_ES),
        {CcAttr.MEM_ENCRYPT, CcAttr.GUEST_MEM_ENCRYPT, CcAttr.GUEST_STATE_ENCRYPT},
    ),
    "SEV-SNP": (
        EncryptionState(me_mask=C51, sev_status=SEV | SEV_ES | SEV_SNP),
        {
            CcAttr.MEM_ENCRYPT,
            CcAttr.GUEST_MEM_ENCRYPT,
            CcAttr.GUEST_STATE_ENCRYPT,
            CcAttr.GUEST_SEV_SNP,
        },
    ),
}


@pytest.mark.parametrize("name", PLATFORMS)
def test_vector_what_a_platform_has(name: str) -> None:
    # Linux 6.1.192 arch/x86/coco/core.c, amd_cc_platform_has(), case by case.
    state, expected = PLATFORMS[name]
    assert {attr for attr in CcAttr if cc_platform_has(state, attr)} == expected


def test_a_host_and_a_guest_exclude_each_other() -> None:
    for status in range(8):
        for mask in (0, C51):
            state = EncryptionState(mask, status)
            host = cc_platform_has(state, CcAttr.HOST_MEM_ENCRYPT)
            assert not (host and cc_platform_has(state, CcAttr.GUEST_MEM_ENCRYPT))
            assert host == (mask != 0 and not status & SEV)


def test_features_that_6_1_does_not_know_change_no_answer() -> None:
    for state, expected in PLATFORMS.values():
        newer = EncryptionState(state.me_mask, state.sev_status | 0xFFFF_FFF8)
        assert {attr for attr in CcAttr if cc_platform_has(newer, attr)} == expected


@pytest.mark.req("PT-30", "PT-31", "PT-34")
@pytest.mark.parametrize("position", [47, 51])
def test_vector_masks_of_the_decision(position: int) -> None:
    # mem_encrypt_identity.c: "sme_me_mask = me_mask; physical_mask &= ~sme_me_mask";
    # cc_set_mask(sme_me_mask).
    assert (EncryptionState().me_mask, EncryptionState().cc_mask) == (0, 0)
    assert EncryptionState().physical_mask == (1 << 52) - 1
    state = EncryptionState(me_mask=1 << position)
    assert state.cc_mask == 1 << position
    assert state.physical_mask == (1 << 52) - 1 - (1 << position)


@pytest.mark.req("PT-47", "CM-70")
def test_sme_pa_is_the_address_as_cr3_and_devices_name_it() -> None:
    assert EncryptionState().with_mask(0x1234_5000) == 0x1234_5000
    assert EncryptionState(C47).with_mask(0x1234_5000) == 0x8000_1234_5000
    assert EncryptionState(C47).with_mask(0x8000_1234_5000) == 0x8000_1234_5000


def test_the_decision_is_made_once() -> None:
    state = EncryptionState(me_mask=C47)
    with pytest.raises(FrozenInstanceError):
        state.me_mask = 0  # type: ignore[misc]
    assert state == EncryptionState(me_mask=C47)
    assert hash(state) == hash(EncryptionState(me_mask=C47))
