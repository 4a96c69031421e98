"""BZ-1: the C-bit is not taken out of an entry before it is used as an address.

An entry of an encrypted table names the table below it and carries the C-bit. Code
that takes bits 51:12, the address field as manuals draw it, goes on to an address of
128 TiB or 2 PiB.

Seen in project-oak/oak PR 3374 (mended for bit 51 alone), tianocore/edk2 PR 11546 (#PF
at boot), rust-osdev/x86_64 issue 511, misc0110/PTEditor issue 49 (bit 47).
"""

from collections.abc import Callable, Iterator

import pytest

from cbit.hw.cpu import Cpu
from cbit.hw.faults import CpuException, GeneralProtection, PageFault
from cbit.hw.types import PAGE_SIZE, VirtAddr
from cbit.kernel.cc import EncryptionState
from cbit.kernel.pgtable import PAGE_OFFSET_4_LEVEL, entry_phys

from .own_table import FINE, FLAGS, FRAME, PML4, OwnTable

pytestmark = pytest.mark.req("BZ-1")

PteToPhys = Callable[[int], int]

ADDRESS_51_12 = 0x000F_FFFF_FFFF_F000
MODELS = [("rome", 47), ("milan", 51)]

DIRECT_PDPT = 0x30_0000
ROOT, *LOWER = (0x31_0000 + i * PAGE_SIZE for i in range(4))
SHIFTS = {"PML4": 39, "PDPT": 30, "PD": 21, "PT": 12}
VA = VirtAddr(3 << 39 | 5 << 30 | 7 << 21 | 9 << 12)


def unmasked(entry: int) -> int:
    """Faulty: the C-bit stays in."""
    return entry & ADDRESS_51_12


def without_bit_51(entry: int) -> int:
    """Faulty on parts whose C-bit is elsewhere."""
    return entry & ADDRESS_51_12 & ~(1 << 51)


def masked(c_bit: int) -> PteToPhys:
    """Right: every use of an entry goes through __PHYSICAL_MASK without the C-bit."""
    state = EncryptionState(me_mask=1 << c_bit)
    return lambda entry: entry_phys(state, entry)


def walk(cpu: Cpu, pte_to_phys: PteToPhys) -> Iterator[tuple[str, int, int]]:
    """Walk to `VA` as a kernel does, over its direct map: table, index, what is there.

    The sum wraps at 64 bits, as it does in C.
    """
    table = ROOT
    for name, shift in SHIFTS.items():
        index = VA >> shift & 511
        address = PAGE_OFFSET_4_LEVEL + table + 8 * index
        entry = cpu.load64(address & 0xFFFF_FFFF_FFFF_FFFF)
        table = pte_to_phys(entry)
        yield name, index, table


def encrypted_tables(model: str, c_bit: int) -> Cpu:
    """Return a core whose tables are encrypted at every level, CR3 included."""
    cpu, c_mask = OwnTable(model).cpu, 1 << c_bit
    direct = 8 * (PAGE_OFFSET_4_LEVEL >> 39 & 511)
    cpu.store64(DIRECT_PDPT, c_mask | FLAGS | 1 << 7)  # 1 GiB, C = 1
    cpu.store64(PML4 + direct, DIRECT_PDPT | FLAGS)

    tables = [ROOT, *LOWER, FRAME]
    for table, below, shift in zip(tables, tables[1:], SHIFTS.values(), strict=False):
        index = VA >> shift & 511
        cpu.store64(PAGE_OFFSET_4_LEVEL + table + 8 * index, below | c_mask | FLAGS)
    cpu.store64(PAGE_OFFSET_4_LEVEL + ROOT + direct, DIRECT_PDPT | FLAGS)
    cpu.write_cr3(ROOT | c_mask)
    return cpu


def check(pte_to_phys: PteToPhys, model: str, c_bit: int) -> str:
    cpu = encrypted_tables(model, c_bit)
    for name, index, address in walk(cpu, pte_to_phys):
        if address >> 43:  # Rome and Milan have 43 address bits with SME
            return f"{name}[{index}] leads to {address:#x}"
    return FINE if address == cpu.translate(VA).pa else f"ends at {address:#x}"


@pytest.mark.parametrize(("model", "c_bit"), MODELS)
def test_the_masked_walk_arrives_where_the_mmu_does(model: str, c_bit: int) -> None:
    assert check(masked(c_bit), model, c_bit) == FINE


@pytest.mark.parametrize(("model", "c_bit"), MODELS)
def test_the_unmasked_walk_leaves_memory_at_the_first_entry(
    model: str, c_bit: int
) -> None:
    next_table = LOWER[0] | 1 << c_bit
    assert check(unmasked, model, c_bit) == f"PML4[3] leads to {next_table:#x}"


def test_a_mask_for_bit_51_helps_only_where_the_bit_is_51() -> None:
    assert check(without_bit_51, "milan", 51) == FINE
    assert check(without_bit_51, "rome", 47).startswith("PML4[3] leads to")


@pytest.mark.parametrize(
    ("model", "c_bit", "fault"),
    [("rome", 47, PageFault), ("milan", 51, GeneralProtection)],
)
def test_the_processor_refuses_the_load_that_follows(
    model: str, c_bit: int, fault: type[CpuException]
) -> None:
    # Bit 47 wraps to an address nobody mapped; bit 51 gives one that is not canonical.
    with pytest.raises(fault):
        list(walk(encrypted_tables(model, c_bit), unmasked))
