"""BZ-9: device registers are mapped like memory, with the C-bit.

No engine stands between a core and a device: C = 1 encrypts nothing there, and in an
SEV-ES guest such an access must not be emulated at all.

Seen in tianocore/edk2 issue 8823 (TPM), PRs 5422 to 5590 (local APIC, in the large
pages of the first tables), issue 8696 (the check in the #VC handler).

Half of it is shown here: the bus reports the access. The check in #VC needs a guest.
"""

from collections.abc import Callable

import pytest

from cbit.hw.trace import Event
from cbit.hw.types import align_down
from cbit.kernel.cc import EncryptionState
from cbit.kernel.pgtable import PMD_FLAGS_LARGE, PMD_SIZE, decrypted, encrypted

from .own_table import BASE, FINE, FLAGS, PD, PT, OwnTable

pytestmark = pytest.mark.req("BZ-9")

PARTS = [("rome", 47), ("milan", 51)]
DEVICES = {"HPET": 0xFED0_0000, "TPM": 0xFED4_0000, "local APIC": 0xFEE0_0000}

MapDevice = Callable[[OwnTable, EncryptionState, int], int]


def as_memory(table: OwnTable, state: EncryptionState, pa: int) -> int:
    """Faulty: PAGE_KERNEL carries the C-bit, and a device is no exception."""
    return table.map(0, pa | encrypted(state, FLAGS))


def in_a_large_page(table: OwnTable, state: EncryptionState, pa: int) -> int:
    """Faulty: one flag set for all 2 MiB pages, the one with the device among them."""
    frame = align_down(pa, PMD_SIZE)
    table.cpu.store64(PD, frame | encrypted(state, PMD_FLAGS_LARGE))
    table.cpu.invlpg(BASE)
    return BASE + pa - frame


def ioremap(table: OwnTable, state: EncryptionState, pa: int) -> int:
    """Right: a page of its own, without the C-bit."""
    table.cpu.store64(PD, PT | FLAGS)
    return table.map(0, pa | decrypted(state, FLAGS))


def check(map_device: MapDevice, model: str, c_bit: int, pa: int) -> str:
    table = OwnTable(model)
    seen: list[Event] = []
    table.machine.trace.listen(seen.append, frozenset({"mmio-encrypted"}))
    va = map_device(table, EncryptionState(1 << c_bit), pa)
    table.cpu.store(va, b"\1\0\0\0")
    table.cpu.load(va, 4)
    assert table.machine.bus.mmio_encrypted == len(seen)
    facts = [f"{event.facts['access']} at {event.facts['pa']:#x}" for event in seen]
    return ", ".join(facts) or FINE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_a_device_is_mapped_without_the_c_bit(
    model: str, c_bit: int, device: str
) -> None:
    assert check(ioremap, model, c_bit, DEVICES[device]) == FINE


@pytest.mark.parametrize("map_device", [as_memory, in_a_large_page])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_the_bus_reports_every_access_with_c_1(
    map_device: MapDevice, model: str, c_bit: int, device: str
) -> None:
    pa = DEVICES[device]
    expected = f"store at {pa:#x}, load at {pa:#x}"
    assert check(map_device, model, c_bit, pa) == expected
