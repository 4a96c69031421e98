"""Software that sees all of RAM twice: through C=0 at PLAIN, through C=1 at SECRET."""

from cbit.hw.cpu import Cpu
from cbit.hw.machine import Machine
from cbit.hw.msr import Efer
from cbit.hw.types import HUGE_PAGE_SIZE

PLAIN, SECRET = 0, 1 << 39
PML4, PLAIN_PDPT, SECRET_PDPT = 0x1000, 0x2000, 0x3000

P_RW, PS = 0x3, 0x80
CR0_PE_WP_PG = 0x8001_0001
CR4_PAE = 0x20


def start_paging(machine: Machine) -> Cpu:
    """Enter long mode over two identity mappings of RAM, in leaves of 1 GiB.

    Without SYSCFG[23] there is no C-bit, and both mappings are plain.
    """
    cpu = machine.cpu
    c_mask = 1 << machine.model.memory_encryption.c_bit if machine.smee else 0
    cpu.store64(PML4, PLAIN_PDPT | P_RW)
    cpu.store64(PML4 + 8, SECRET_PDPT | P_RW)
    for index, start in enumerate(range(0, machine.map.ram_end, HUGE_PAGE_SIZE)):
        cpu.store64(PLAIN_PDPT + 8 * index, start | P_RW | PS)
        cpu.store64(SECRET_PDPT + 8 * index, start | P_RW | PS | c_mask)
    cpu.wrmsr(Efer.ADDRESS, Efer.of(lme=1).value)
    cpu.write_cr4(CR4_PAE)
    cpu.write_cr3(PML4)
    cpu.write_cr0(CR0_PE_WP_PG)
    return cpu
