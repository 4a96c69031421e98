"""BZ-2: the C-bit's position is a constant.

It is 47 on Zen 1 and Zen 2 and 51 since Zen 3; some parts have none. Only CPUID knows.

Seen in project-oak/oak PR 3210 (`ENCRYPTED = 1 << 51`), mended for Rome in PR 3861.
"""

from collections.abc import Callable

import pytest

from cbit.hw.cpu import Cpu
from cbit.hw.models import model_names

from .own_table import FINE, FLAGS, FRAME, OwnTable, store_secret

pytestmark = pytest.mark.req("BZ-2")

C_BIT_51 = {
    "epyc-7763",
    "epyc-9124",
    "epyc-9654",
    "epyc-9655",
    "ryzen-5950x",
    "ryzen-7950x",
}
"""InstLatx64 dumps: EBX[5:0] of leaf 8000_001F is 51."""


def hard_coded(cpu: Cpu) -> int:
    """Faulty: what the author's own machine has."""
    return 1 << 51


def from_cpuid(cpu: Cpu) -> int:
    """Right: CPUID says where, SYSCFG[23] whether; no C-bit is an answer too."""
    if cpu.cpuid(0x8000_0000).eax < 0x8000_001F:
        return 0
    leaf = cpu.cpuid(0x8000_001F)
    if not leaf.eax & 1 or not cpu.rdmsr(0xC001_0010) & 1 << 23:
        return 0
    return 1 << (leaf.ebx & 0x3F)


def check(c_mask: Callable[[Cpu], int], model: str) -> str:
    table = OwnTable(model)
    return store_secret(table, FRAME | c_mask(table.cpu) | FLAGS)


@pytest.mark.parametrize("model", model_names())
def test_the_position_from_cpuid_works_everywhere(model: str) -> None:
    assert check(from_cpuid, model) == FINE


@pytest.mark.parametrize("model", sorted(C_BIT_51))
def test_bit_51_works_where_it_was_written(model: str) -> None:
    assert check(hard_coded, model) == FINE


@pytest.mark.parametrize("model", sorted(set(model_names()) - C_BIT_51))
def test_bit_51_is_a_reserved_bit_elsewhere(model: str) -> None:
    seen = check(hard_coded, model)
    assert "reserved bit set in PT[0] = 0x0008000000200063" in seen
