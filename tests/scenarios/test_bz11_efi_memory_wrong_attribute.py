"""BZ-11: memory that EFI reserves is mapped with the wrong C-bit.

Whoever wrote the page decides: firmware of an SME host writes plain, firmware inside
an SEV guest writes private, and the kernel must map what it finds accordingly. Memory
that `efi_mem_reserve()` keeps has the type of boot services data and the attribute
RUNTIME, and both count.

Seen in Linux, "x86/ioremap: Map EFI-reserved memory as encrypted for SEV" (stable
5.10.46 and 5.12.13): until then only the type of runtime services data was asked for.

The rule is what is shown here. The guest is played by a page that "firmware" stored
through C = 1; a guest of its own comes with SEV, the reference's rule table with
kernel/ioremap.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from .own_table import FINE, FLAGS, FRAME, OwnTable

pytestmark = pytest.mark.req("BZ-11")

BOOT_SERVICES_DATA, RUNTIME_SERVICES_DATA = 4, 6
RUNTIME = 1 << 63
"""EFI memory types and the attribute. Source: UEFI 2.9, 7.2 (GetMemoryMap)."""

TABLE = b"RSD PTR and what hangs from it"
PARTS = [("rome", 47), ("milan", 51)]


class Range(NamedTuple):
    """What a kernel knows of a range of the EFI memory map."""

    efi_type: int
    attributes: int
    sev_guest: bool


RESERVED_BY_KERNEL = Range(BOOT_SERVICES_DATA, RUNTIME, sev_guest=True)
RANGES = [
    RESERVED_BY_KERNEL,
    Range(RUNTIME_SERVICES_DATA, RUNTIME, sev_guest=True),
    Range(BOOT_SERVICES_DATA, RUNTIME, sev_guest=False),
    Range(RUNTIME_SERVICES_DATA, RUNTIME, sev_guest=False),
]

Rule = Callable[[Range], bool]
"""Whether `ioremap` sets the C-bit."""


def by_type_alone(efi: Range) -> bool:
    """Faulty: what the kernel itself reserved is still called boot services data."""
    return efi.sev_guest and efi.efi_type == RUNTIME_SERVICES_DATA


def ram_is_private(efi: Range) -> bool:
    """Faulty: it lies in RAM, but firmware of a host does not know of the C-bit."""
    return True


def right(efi: Range) -> bool:
    kept = efi.efi_type == BOOT_SERVICES_DATA and efi.attributes & RUNTIME
    return efi.sev_guest and (efi.efi_type == RUNTIME_SERVICES_DATA or bool(kept))


def check(rule: Rule, efi: Range, model: str, c_bit: int) -> str:
    table = OwnTable(model)
    cpu, c_mask = table.cpu, 1 << c_bit
    firmware = table.map(0, FRAME | FLAGS | (c_mask if efi.sev_guest else 0))
    cpu.store(firmware, TABLE)
    cpu.wbinvd()

    kernel = table.map(1, FRAME | FLAGS | (c_mask if rule(efi) else 0))
    return FINE if cpu.load(kernel, len(TABLE)) == TABLE else "ciphertext"


@pytest.mark.parametrize("efi", RANGES)
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_type_attribute_and_platform_decide(efi: Range, model: str, c_bit: int) -> None:
    assert check(right, efi, model, c_bit) == FINE


@pytest.mark.parametrize("efi", RANGES)
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_the_type_alone_forgets_what_was_reserved(
    efi: Range, model: str, c_bit: int
) -> None:
    expected = "ciphertext" if efi == RESERVED_BY_KERNEL else FINE
    assert check(by_type_alone, efi, model, c_bit) == expected


@pytest.mark.parametrize("efi", RANGES)
@pytest.mark.parametrize(("model", "c_bit"), PARTS)
def test_on_a_host_firmware_memory_is_plain(efi: Range, model: str, c_bit: int) -> None:
    expected = FINE if efi.sev_guest else "ciphertext"
    assert check(ram_is_private, efi, model, c_bit) == expected
