"""A machine in long mode with a stretch of plain and one of encrypted pages."""

import numpy as np

from cbit.boot.loader import enter_long_mode
from cbit.hw.machine import Machine

PLAIN_BASE = 2 << 39
C_BASE = 3 << 39

_TABLES = 16 << 20
_FRAMES = {PLAIN_BASE: 64 << 20, C_BASE: 256 << 20}


def machine_with_pages(size: int, model: str = "epyc-7742") -> Machine:
    """Map `size` bytes at each base, in 4 KiB pages, after the boot loader's tables.

    Args:
        size: a multiple of 2 MiB, up to 128 MiB.
        model: name of the processor.
    """
    machine = Machine(model, ram=1 << 30, seed=1)
    cpu = machine.cpu
    enter_long_mode(cpu, five_levels=False)
    c_mask = 1 << machine.model.memory_encryption.c_bit
    cpu.fill(_TABLES, 0, 4 << 20)
    root = _TABLES
    cpu.copy(root, cpu.read_cr3(), 4096)
    taken = root + 4096
    for base, bit in ((PLAIN_BASE, 0), (C_BASE, c_mask)):
        pdpt, directory, taken = taken, taken + 4096, taken + 8192
        cpu.store64(root + 8 * (base >> 39), pdpt | 3)
        cpu.store64(pdpt, directory | 3)
        for i in range(size >> 21):
            frames = np.arange(512, dtype=np.uint64) * 4096
            frames += np.uint64(_FRAMES[base] + (i << 21) | bit | 3)
            cpu.store_array(taken, frames)
            cpu.store64(directory + 8 * i, taken | 3)
            taken += 4096
    cpu.write_cr3(root)
    return machine
