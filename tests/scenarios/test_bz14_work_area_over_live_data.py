"""BZ-14: encryption in place works in memory that is not free.

The copy needs a buffer outside of what it encrypts. "2 MiB behind _end" is free after
a decompressor that chose the place; kexec puts real-mode data, command line or initrd
exactly there.

Seen in lkml 1906.0/02891 ("The current SME implementation fails kexec/kdump kernel
booting"). Linux then linked the work area into the image, so that loaders know of it.
"""

from collections.abc import Callable, Mapping

import pytest

from cbit.boot.encrypt import sme_encrypt_kernel
from cbit.boot.image import builtin_image
from cbit.boot.image.layout import Range
from cbit.boot.loader import load_kernel
from cbit.boot.params import E820Entry, E820Type
from cbit.hw import Machine
from cbit.hw.errors import KernelError
from cbit.hw.types import LARGE_PAGE_SIZE, PAGE_SIZE, PhysAddr, VirtAddr, align_up
from cbit.kernel.cc import EncryptionState

from .own_table import FINE, FLAGS, OwnTable

pytestmark = pytest.mark.req("BZ-14")

C_BIT, STATE = 47, EncryptionState(1 << 47)
REAL_MODE_DATA = b"boot_params and command line; " * 400

KERNEL = Range(PhysAddr(0x40_0000), PhysAddr(0x44_0000))
CLAIMS = {
    "kernel": KERNEL,
    "real-mode data": Range(PhysAddr(0x60_0000), PhysAddr(0x60_3000)),
}
"""What lies where, as kexec-tools leaves it: the next thing right behind the kernel."""

Claims = Mapping[str, Range]
WorkArea = Callable[[Claims], PhysAddr]


def behind_the_kernel(claims: Claims) -> PhysAddr:
    """Faulty: the next 2 MiB boundary, without a look at who lives there."""
    return PhysAddr(align_up(claims["kernel"].end, LARGE_PAGE_SIZE))


def behind_everything(claims: Claims) -> PhysAddr:
    """Right: every claim counts."""
    end = max(claim.end for claim in claims.values())
    return PhysAddr(align_up(end, LARGE_PAGE_SIZE))


def encrypt_in_place(table: OwnTable, target: Range, buffer: PhysAddr) -> None:
    """Read through the identity map (C = 0), write through the own table (C = 1)."""
    cpu = table.cpu
    cpu.wbinvd()
    pages = target.size // PAGE_SIZE
    for i in range(pages):
        table.map(i, target.start + i * PAGE_SIZE | 1 << C_BIT | FLAGS)
    cpu.copy(VirtAddr(buffer), VirtAddr(target.start), target.size)
    cpu.copy(table.va(0), VirtAddr(buffer), target.size)


def check(work_area: WorkArea) -> str:
    """Encrypt a kernel in place; it and its neighbour must still be themselves."""
    table = OwnTable("rome")
    cpu, text = table.cpu, bytes(range(256)) * (KERNEL.size // 256)
    neighbour = CLAIMS["real-mode data"].start
    cpu.store(KERNEL.start, text)
    cpu.store(neighbour, REAL_MODE_DATA)

    encrypt_in_place(table, KERNEL, work_area(CLAIMS))
    assert cpu.load(table.va(0), KERNEL.size) == text
    cpu.wbinvd()
    assert table.machine.snoop(KERNEL.start, KERNEL.size) != text
    same = cpu.load(neighbour, len(REAL_MODE_DATA)) == REAL_MODE_DATA
    return FINE if same else f"live data at {neighbour:#x} destroyed"


def test_a_work_area_that_nobody_claims_harms_nobody() -> None:
    assert check(behind_everything) == FINE


def test_the_next_boundary_belongs_to_somebody_after_kexec() -> None:
    assert check(behind_the_kernel) == "live data at 0x600000 destroyed"


def test_the_reference_refuses_before_it_touches_anything() -> None:
    machine = Machine("rome", ram=64 << 20, seed=1)
    cpu, image = machine.cpu, builtin_image(seed=1)
    ram = E820Entry(PhysAddr(0x10_0000), (64 << 20) - 0x10_0000, E820Type.RAM)
    load_kernel(cpu, image, e820=[ram], command_line=b"mem_encrypt=on")
    initrd = image.layout.workarea.start
    cpu.store(initrd, REAL_MODE_DATA)
    cr3 = cpu.read_cr3()

    with pytest.raises(KernelError, match=f"initrd .{initrd:#x}, .* overlaps the work"):
        sme_encrypt_kernel(cpu, STATE, image.layout, (initrd, len(REAL_MODE_DATA)))

    assert cpu.read_cr3() == cr3
    assert cpu.load(initrd, len(REAL_MODE_DATA)) == REAL_MODE_DATA
    start = image.layout.kernel_start
    assert cpu.load(start, PAGE_SIZE) == image.plain_bytes(
        start, PhysAddr(start + PAGE_SIZE)
    )
