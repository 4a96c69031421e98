"""BZ-3: leaf 8000_001F EBX is taken apart with a wrong mask or precedence.

Position is EBX[5:0], reduction EBX[11:6], six bits each.

Seen in enarx-archive/sevctl issue 84 and PR 85: the position masked with five bits
(15 on Rome), and `ebx & 0b1111_1100_0000 >> 6`, where the shift binds first (a
"reduction" of 47). The second expression means the same in Python.
"""

from collections.abc import Callable

import pytest

from .own_table import FINE, FLAGS, FRAME, OwnTable, measured_width, store_secret

pytestmark = pytest.mark.req("BZ-3")

Decode = Callable[[int], tuple[int, int]]

WITH_SME = [
    "epyc-7551p",
    "epyc-7742",
    "epyc-7763",
    "epyc-9124",
    "epyc-9654",
    "epyc-9655",
    "ryzen-1800x",
    "ryzen-4800h",
    "ryzen-5950x",
    "ryzen-7950x",
]


def right(ebx: int) -> tuple[int, int]:
    return ebx & 0x3F, ebx >> 6 & 0x3F


def five_bits(ebx: int) -> tuple[int, int]:
    """Faulty: bit 5 of the position is lost, so 47 becomes 15 and 51 becomes 19."""
    return ebx & 0x1F, ebx >> 6 & 0x3F


def shift_first(ebx: int) -> tuple[int, int]:
    """Faulty: the mask is shifted, not the register."""
    return ebx & 0x3F, ebx & 0b1111_1100_0000 >> 6


def check(decode: Decode, model: str) -> str:
    """Try both numbers on the processor that gave the register."""
    table = OwnTable(model)
    position, reduction = decode(table.cpu.cpuid(0x8000_001F).ebx)

    width = (table.cpu.cpuid(0x8000_0008).eax & 0xFF) - reduction
    measured = measured_width(table)
    if width != measured:
        return f"{width} address bits, the MMU takes {measured}"
    return store_secret(table, FRAME | 1 << position | FLAGS)


@pytest.mark.parametrize("model", WITH_SME)
def test_six_bits_each_agree_with_the_processor(model: str) -> None:
    assert check(right, model) == FINE


@pytest.mark.parametrize("model", WITH_SME)
def test_a_position_of_five_bits_moves_the_frame_and_encrypts_nothing(
    model: str,
) -> None:
    assert check(five_bits, model) == "plaintext in DRAM"


@pytest.mark.parametrize("model", WITH_SME)
def test_the_shift_before_the_mask_gives_an_absurd_width(model: str) -> None:
    # What is left is 48 - 47, 48 - 51 or 52 - 51.
    width = int(check(shift_first, model).split()[0])
    assert width in {1, -3}
