"""BZ-10: memory that others read is mapped private.

A ring of descriptors, a frame buffer between two machines, a page of `ivshmem`: what
the driver stores through C = 1 is ciphertext to everybody else, and what the others
store is garbage to the driver.

Seen in gnif/LookingGlass issue 1077 (ivshmem "hotplugged" as normal, hence encrypted,
memory); AMDESE/AMDSEV issues 109, 177 and 255.

Half of it is shown here: the other side looks at DRAM as a peer on the bus does. DMA
devices with their masks, and exit 0x404 of a guest, need more than this machine.
"""

from collections.abc import Callable

import numpy as np
import pytest

from cbit.hw.types import VirtAddr

from .own_table import FINE, FLAGS, FRAME, OwnTable

pytestmark = pytest.mark.req("BZ-10")

PARTS = [("rome", 47), ("milan", 51)]
REQUEST, REPLY = b"read sector 7 into 0x5000", b"done, 512 bytes transferred"


class Peer:
    """Whoever shares the page and has no key: it reads and writes cells."""

    def __init__(self, table: OwnTable) -> None:
        self.machine = table.machine

    def read(self, length: int) -> bytes:
        return self.machine.snoop(FRAME, length)

    def write(self, data: bytes) -> None:
        cells = self.machine.dram.cells
        cells[FRAME : FRAME + len(data)] = np.frombuffer(data, np.uint8)


MapShared = Callable[[OwnTable, int], VirtAddr]


def devm_memremap(table: OwnTable, c_mask: int) -> VirtAddr:
    """Faulty: as normal memory, which is private."""
    return table.map(0, FRAME | c_mask | FLAGS)


def memremap_decrypted(table: OwnTable, c_mask: int) -> VirtAddr:
    """Right: shared memory has C = 0."""
    return table.map(0, FRAME | FLAGS)


def check(map_shared: MapShared, model: str, c_bit: int) -> list[str]:
    """Send a request, take the reply; return what went wrong on the way."""
    table = OwnTable(model)
    peer, cpu = Peer(table), table.cpu
    va = map_shared(table, 1 << c_bit)
    seen = []

    cpu.store(va, REQUEST)
    cpu.wbinvd()
    if peer.read(len(REQUEST)) != REQUEST:
        seen.append("the peer reads ciphertext")

    peer.write(REPLY)
    if cpu.load(va, len(REPLY)) != REPLY:
        seen.append("the driver reads garbage")
    return seen or [FINE]


@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_shared_memory_is_plain_in_both_directions(model: str, c_bit: int) -> None:
    assert check(memremap_decrypted, model, c_bit) == [FINE]


@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_private_memory_cannot_be_shared(model: str, c_bit: int) -> None:
    assert check(devm_memremap, model, c_bit) == [
        "the peer reads ciphertext",
        "the driver reads garbage",
    ]
