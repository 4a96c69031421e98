"""BZ-4: a guest is told the host's reduction of physical addresses.

The host loses 4 to 6 address bits to its keys. Guest-physical addresses are translated
once more, by nested tables, and never reach the memory controller: a guest loses one
bit at most, the C-bit's own.

Seen in kata-containers issue 5006 (PR 5007), AMDESE/qemu issue 7, coconut-svsm PR 894
(taken back in PR 895): `reduced-phys-bits` of QEMU filled from the host's CPUID.

Half of it is shown here: how wide addresses are in the guest's own page tables. There
is no SEV guest in this file; a machine whose CPUID has the hypervisor bit, and whose
SYSCFG reads 0 as every guest's does, stands for it.
"""

from collections.abc import Callable

import pytest

from cbit.hw.cpu import Cpu
from cbit.hw.cpuid import CpuModel

from .own_table import FINE, OwnTable, measured_width

pytestmark = pytest.mark.req("BZ-4")

SEV_HOSTS = [
    ("epyc-7551p", 5),
    ("epyc-7742", 5),
    ("epyc-7763", 5),
    ("epyc-9124", 6),
    ("epyc-9654", 6),
    ("epyc-9655", 6),
    ("ryzen-4800h", 4),
]
"""And their EBX[11:6], from InstLatx64 dumps."""


def from_the_host(host: Cpu) -> int:
    """Faulty: what the host gives up is not what a guest gives up."""
    return host.cpuid(0x8000_001F).ebx >> 6 & 0x3F


def one_bit(host: Cpu) -> int:
    """Right: the C-bit."""
    return 1


def guest_of(host: Cpu, reduction: int) -> CpuModel:
    """Return the CPUID that a hypervisor presents: its bit, and the reduction."""
    table = host.model.table
    one, leaf = table.leaf(1), table.leaf(0x8000_001F)
    ebx = leaf.ebx & ~0xFC0 | reduction << 6
    changed = {
        (1, 0): one._replace(ecx=one.ecx | 1 << 31),
        (0x8000_001F, 0): leaf._replace(ebx=ebx),
    }
    return CpuModel("guest", "a hypervisor", table.replace(changed))


def check(reduction_for_guest: Callable[[Cpu], int], model: str) -> str:
    """Let a guest compute its width from its CPUID, and ask its MMU."""
    host = OwnTable(model).cpu
    guest = OwnTable(guest_of(host, reduction_for_guest(host)))
    leaf = guest.cpu.cpuid(0x8000_001F)
    width = (guest.cpu.cpuid(0x8000_0008).eax & 0xFF) - (leaf.ebx >> 6 & 0x3F)
    lost = measured_width(guest) - width
    return FINE if lost <= 1 else f"the guest gives away {lost} address bits"


@pytest.mark.parametrize(("model", "reduction"), SEV_HOSTS)
def test_a_guest_loses_one_bit_whatever_its_host_loses(
    model: str, reduction: int
) -> None:
    assert check(one_bit, model) == FINE
    assert (
        check(from_the_host, model) == f"the guest gives away {reduction} address bits"
    )


def test_the_host_itself_does_lose_them() -> None:
    host = OwnTable("milan")
    assert measured_width(host) == 48 - 5
