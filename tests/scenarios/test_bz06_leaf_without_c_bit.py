"""BZ-6: the leaf is there, but it is not what one expects.

Rembrandt and Cezanne set the SME bit of leaf 8000_001F and report EBX = 0: a mask of
1 << 0 is the Present bit, and a page that is "shared" by clearing it is gone. Raphael
has SME and no SEV: code that asks for both leaves its memory plain.

Seen in InstLatx64 dumps of these parts (EAX = 0001780F with EBX = 0; EAX = 1).
"""

from collections.abc import Callable

import pytest

from cbit.boot.sme import sme_enable
from cbit.hw.cpu import Cpu
from cbit.hw.faults import PageFault
from cbit.hw.models import model_names
from cbit.hw.types import VirtAddr

from .own_table import FINE, FLAGS, FRAME, SECRET, OwnTable, store_secret

pytestmark = pytest.mark.req("BZ-6")

FIELD_0, SME_ALONE = "ryzen-6800hs", "ryzen-7950x"

SME, SEV = 1, 2
ZERO_PAGE = VirtAddr(0x40_0000)

CMask = Callable[[Cpu], int]


def naive(cpu: Cpu) -> int:
    """Faulty: the field is used as it is."""
    leaf = cpu.cpuid(0x8000_001F)
    return 1 << (leaf.ebx & 0x3F) if leaf.eax & SME else 0


def sme_and_sev(cpu: Cpu) -> int:
    """Faulty: SME does not need SEV."""
    leaf = cpu.cpuid(0x8000_001F)
    position = leaf.ebx & 0x3F
    return 1 << position if leaf.eax & SME and leaf.eax & SEV and position >= 32 else 0


def right(cpu: Cpu) -> int:
    leaf = cpu.cpuid(0x8000_001F)
    position = leaf.ebx & 0x3F
    return 1 << position if leaf.eax & SME and position >= 32 else 0


def check(c_mask: CMask, model: str) -> str:
    """Keep a page private, then share it: a device must read what is stored then."""
    table = OwnTable(model)
    mask = c_mask(table.cpu)
    seen = store_secret(table, FRAME | mask | FLAGS)
    if seen != FINE:
        return seen
    table.cpu.wbinvd()
    va = table.map(0, table.entry(0) & ~mask)
    try:
        table.cpu.store(va, SECRET)
    except PageFault as fault:
        return str(fault)
    table.cpu.wbinvd()
    shared = table.machine.snoop(FRAME, len(SECRET)) == SECRET
    return FINE if shared else "the device reads ciphertext"


@pytest.mark.parametrize("model", model_names())
def test_a_position_below_32_is_no_c_bit(model: str) -> None:
    assert check(right, model) == FINE


@pytest.mark.parametrize("model", model_names())
def test_bit_0_is_the_present_bit(model: str) -> None:
    seen = check(naive, model)
    if model == FIELD_0:
        assert "not present in PT[0] = 0x0000000000200062" in seen
    else:
        assert seen == FINE


@pytest.mark.parametrize("model", model_names())
def test_sme_without_sev_is_still_sme(model: str) -> None:
    expected = "plaintext in DRAM" if model == SME_ALONE else FINE
    assert check(sme_and_sev, model) == expected


def test_the_reference_refuses_a_c_bit_at_0() -> None:
    detection = sme_enable(OwnTable(FIELD_0).cpu, ZERO_PAGE)
    assert detection.state.me_mask == 0
    assert "puts the C-bit at 0" in detection.reason
