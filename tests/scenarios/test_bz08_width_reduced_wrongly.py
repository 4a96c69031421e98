"""BZ-8: the address width is reduced though SYSCFG[23] is 0, or is not though it is 1.

The bits belong to the keys from the moment firmware sets SYSCFG[23], whether or not
anybody uses the C-bit. The MMU says who is right: an address bit that is gone gives
#PF with RSVD.

Seen in cloud-hypervisor PR 504 (not reduced: guests died of reserved-bit faults; then
reduced wherever CPUID offers SME, as in its issue 8191).
"""

from collections.abc import Callable

import pytest

from cbit.boot.startup import early_detect_mem_encrypt
from cbit.hw.cpu import Cpu
from cbit.hw.faults import PageFault, PageFaultCode
from cbit.hw.models import model_names

from .own_table import FINE, FLAGS, OwnTable, measured_width

pytestmark = pytest.mark.req("BZ-8")

Width = Callable[[Cpu], int]

REDUCED = sorted(set(model_names()) - {"epyc-7401p-guest", "ryzen-6800hs"})
"""Parts with a reduction at all."""


def never_reduced(cpu: Cpu) -> int:
    """Faulty: leaf 8000_0008 does not know of SYSCFG."""
    return cpu.cpuid(0x8000_0008).eax & 0xFF


def always_reduced(cpu: Cpu) -> int:
    """Faulty: leaf 8000_001F does not either."""
    leaf = cpu.cpuid(0x8000_001F)
    return never_reduced(cpu) - (leaf.ebx >> 6 & 0x3F if leaf.eax & 1 else 0)


def right(cpu: Cpu) -> int:
    on = cpu.rdmsr(0xC001_0010) & 1 << 23
    return always_reduced(cpu) if on else never_reduced(cpu)


def check(width: Width, model: str, *, smee: bool) -> str:
    table = OwnTable(model, smee=smee)
    told, measured = width(table.cpu), measured_width(table)
    return FINE if told == measured else f"{told - measured:+} address bits"


@pytest.mark.parametrize("smee", [False, True])
@pytest.mark.parametrize("model", model_names())
@pytest.mark.parametrize("width", [right, early_detect_mem_encrypt])
def test_the_width_follows_syscfg(width: Width, model: str, smee: bool) -> None:
    assert check(width, model, smee=smee) == FINE


@pytest.mark.parametrize("model", REDUCED)
def test_without_syscfg_each_answer_is_wrong_once(model: str) -> None:
    assert check(never_reduced, model, smee=False) == FINE
    assert check(never_reduced, model, smee=True).startswith("+")

    assert check(always_reduced, model, smee=True) == FINE
    assert check(always_reduced, model, smee=False).startswith("-")


def test_a_frame_above_the_reduced_width_is_a_reserved_bit_fault() -> None:
    table = OwnTable("rome")
    top = 1 << never_reduced(table.cpu) - 2  # bit 47 would be the C-bit
    with pytest.raises(PageFault) as caught:
        table.cpu.load64(table.map(0, top | FLAGS))
    assert caught.value.code == PageFaultCode.PRESENT | PageFaultCode.RESERVED
    assert (caught.value.level, caught.value.entry) == ("PT", top | FLAGS)
