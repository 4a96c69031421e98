"""BZ-5: the C-bit lies outside of MAXPHYADDR.

Milan, Vermeer and Raphael announce 48 address bits and a C-bit at 51. Code that cuts
entries to the announced width loses it without a word; code that takes the top address
bit for it sets a reserved one.

Seen in InstLatx64 dumps of Milan, Vermeer and Raphael. misc0110/PTEditor issue 49
remarks that the C-bit "looks like it's always the uppermost bit of the PFN range".
"""

from collections.abc import Callable

import pytest

from cbit.hw.cpu import Cpu

from .own_table import FINE, FLAGS, FRAME, OwnTable, store_secret

pytestmark = pytest.mark.req("BZ-5")

C_BIT_INSIDE = [
    "epyc-7551p",
    "epyc-7742",
    "epyc-9124",
    "epyc-9654",
    "epyc-9655",
    "ryzen-1800x",
    "ryzen-4800h",
]
C_BIT_ABOVE = ["epyc-7763", "ryzen-5950x", "ryzen-7950x"]

MakeEntry = Callable[[Cpu, int], int]


def width_of(cpu: Cpu) -> int:
    return cpu.cpuid(0x8000_0008).eax & 0xFF


def c_mask_of(cpu: Cpu) -> int:
    return 1 << (cpu.cpuid(0x8000_001F).ebx & 0x3F)


def cut_to_the_width(cpu: Cpu, pa: int) -> int:
    """Faulty: the C-bit is put in, and goes out with the "impossible" address bits."""
    return (pa | c_mask_of(cpu)) & (1 << width_of(cpu)) - 1 | FLAGS


def top_address_bit(cpu: Cpu, pa: int) -> int:
    """Faulty: the C-bit is taken to be the top bit of an address."""
    return pa | 1 << width_of(cpu) - 1 | FLAGS


def right(cpu: Cpu, pa: int) -> int:
    """Right: the width is for the address, the C-bit comes on top."""
    return pa & (1 << width_of(cpu)) - 1 | c_mask_of(cpu) | FLAGS


def check(make_entry: MakeEntry, model: str) -> str:
    table = OwnTable(model)
    return store_secret(table, make_entry(table.cpu, FRAME))


@pytest.mark.parametrize("model", C_BIT_INSIDE + C_BIT_ABOVE)
def test_the_c_bit_on_top_of_the_address_encrypts(model: str) -> None:
    assert check(right, model) == FINE


@pytest.mark.parametrize("model", C_BIT_ABOVE)
def test_an_entry_cut_to_the_width_encrypts_nothing(model: str) -> None:
    assert check(cut_to_the_width, model) == "plaintext in DRAM"


@pytest.mark.parametrize("model", C_BIT_ABOVE)
def test_the_top_address_bit_is_reserved_while_sme_is_on(model: str) -> None:
    seen = check(top_address_bit, model)
    assert "reserved bit set in PT[0] = 0x0000800000200063" in seen


@pytest.mark.parametrize("make_entry", [cut_to_the_width, top_address_bit])
@pytest.mark.parametrize("model", C_BIT_INSIDE)
def test_other_parts_never_show_the_bug(make_entry: MakeEntry, model: str) -> None:
    assert check(make_entry, model) == FINE
