"""A machine in long mode with a page table of one's own: where a scenario begins.

Each scenario of this folder shows one class of bug that happened in real code. A
faulty and a right variant of a small prototype go through the same `check`, which
returns "fine" or what the machine saw: a fault, a hazard, plaintext in DRAM.

The loader's identity map covers the first 4 GiB without the C-bit. The scenario's own
page table maps 512 pages from `BASE` on, and entry n translates `va(n)`.
"""

from cbit.boot.loader import BOOT_TABLES, enter_long_mode
from cbit.hw import Machine
from cbit.hw.cpuid import CpuModel
from cbit.hw.errors import CbitError
from cbit.hw.faults import PageFault, PageFaultCode
from cbit.hw.types import PAGE_SIZE, PhysAddr, VirtAddr

FLAGS = 0x63
"""Present, writable, accessed, dirty: Linux's _KERNPG_TABLE_NOENC."""

BASE = VirtAddr(1 << 39)
PML4 = BOOT_TABLES + PAGE_SIZE
PDPT, PD, PT = (PhysAddr(0x10_0000 + i * PAGE_SIZE) for i in range(3))

FRAME = PhysAddr(0x20_0000)
"""A page of RAM for the scenario's data."""

SECRET = b"what a probe on the memory bus must never read"

FINE = "fine"


class OwnTable:
    """A small machine after `enter_long_mode`, and 512 entries to write.

    Args:
        model: a CPU model, or its name or alias.
        smee: firmware sets SYSCFG[23].
        hazards: "record" or "raise", see `Machine`.
    """

    def __init__(
        self, model: CpuModel | str, *, smee: bool = True, hazards: str = "record"
    ) -> None:
        self.machine = Machine(model, ram=16 << 20, smee=smee, hazards=hazards, seed=1)
        self.cpu = self.machine.cpu
        enter_long_mode(self.cpu, five_levels=False)
        for table, below in ((PML4 + 8, PDPT), (PDPT, PD), (PD, PT)):
            self.cpu.store64(table, below | FLAGS)

    def va(self, index: int) -> VirtAddr:
        """Return the address that entry `index` translates."""
        return VirtAddr(BASE + index * PAGE_SIZE)

    def entry(self, index: int) -> int:
        """Read an entry."""
        return self.cpu.load64(PT + 8 * index)

    def set_entry(self, index: int, entry: int) -> None:
        """Write an entry; the TLB is the caller's business."""
        self.cpu.store64(PT + 8 * index, entry)

    def map(self, index: int, entry: int) -> VirtAddr:
        """Write an entry, drop its old translation, return its address."""
        self.set_entry(index, entry)
        self.cpu.invlpg(self.va(index))
        return self.va(index)


def store_secret(table: OwnTable, entry: int) -> str:
    """Store a secret through an entry and look with a probe at where it went.

    Returns:
        `FINE`, or what happened instead: the machine can encrypt and DRAM holds
        plaintext, or the processor refused.
    """
    machine, cpu = table.machine, table.cpu
    try:
        cpu.store(table.map(0, entry), SECRET)
    except CbitError as refusal:
        return str(refusal)
    machine.caches.drain()
    if machine.smee and SECRET in machine.snoop(0, machine.dram.size):
        return "plaintext in DRAM"
    return FINE


def measured_width(table: OwnTable) -> int:
    """Find out by trial how many address bits the MMU takes: 32 to 52.

    The lowest bit that gives #PF with RSVD is the first that is no address.
    """
    for bit in range(32, 52):
        try:
            table.cpu.translate(table.map(1, 1 << bit | FLAGS))
        except PageFault as fault:
            if fault.code & PageFaultCode.RESERVED:
                return bit
            raise
    return 52
