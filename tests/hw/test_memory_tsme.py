"""Transparent SME, and what SME costs in address bits."""

import pytest

from cbit.hw.faults import PageFault, PageFaultCode
from cbit.hw.machine import Machine
from cbit.hw.types import PAGE_SIZE

from .memory_windows import P_RW, PLAIN, PLAIN_PDPT, PS, SECRET, start_paging

PAGE = 0x60_0000
TEXT = b"the quick brown fox jumps over the lazy dog, 64 bytes in a line."
WITH_AND_WITHOUT_SME = pytest.mark.parametrize(
    "smee", [False, True], ids=["TSME alone", "TSME and SME"]
)
SYSCFG = 0xC001_0010


@pytest.mark.req("WP-28", "WP-30", "MC-31")
@WITH_AND_WITHOUT_SME
def test_no_access_leaves_plaintext_in_dram(smee: bool) -> None:
    machine = Machine(ram=16 << 20, smee=smee, tsme=True, seed=1)
    machine.cpu.store(PAGE, TEXT)  # paging is off: the software knows of nothing
    cpu = start_paging(machine)
    for number, window in enumerate((PLAIN, SECRET), start=1):
        cpu.store(window + PAGE + number * PAGE_SIZE, TEXT * 64)
    cpu.wbinvd()
    image = machine.snoop(0, 16 << 20)
    for at in range(0, 64, 16):
        assert TEXT[at : at + 16] not in image
    assert cpu.load(PLAIN + PAGE, 64) == TEXT


@pytest.mark.req("WP-28", "WP-30")
@WITH_AND_WITHOUT_SME
def test_the_page_tables_are_enciphered_too(smee: bool) -> None:
    machine = Machine(ram=16 << 20, smee=smee, tsme=True, seed=1)
    cpu = start_paging(machine)
    cpu.wbinvd()
    entry = cpu.load64(PLAIN_PDPT)
    assert entry & ~0x60 == P_RW | PS
    assert entry.to_bytes(8, "little") not in machine.snoop(PLAIN_PDPT, PAGE_SIZE)


@pytest.mark.req("WP-29", "PT-58")
@pytest.mark.parametrize("tsme", [False, True])
def test_vector_tsme_test_flips_the_c_bit_and_compares(tsme: bool) -> None:
    # AMDESE/mem-encryption-tests, tsme-test.c: flush TLB and caches, change the
    # entry, flush the TLB, compare. Equal: TSME is on. Different: it is not.
    machine = Machine(ram=16 << 20, tsme=tsme, hazards="raise", seed=1)
    cpu = start_paging(machine)
    cpu.store(PLAIN + PAGE, TEXT)
    cpu.write_cr3(cpu.read_cr3())
    cpu.wbinvd()
    entry = cpu.load64(PLAIN_PDPT)
    c_mask = 1 << machine.model.memory_encryption.c_bit
    cpu.store64(SECRET + PLAIN_PDPT if tsme else PLAIN_PDPT, entry | c_mask)
    cpu.write_cr3(cpu.read_cr3())
    assert (cpu.load(PLAIN + PAGE, 64) == TEXT) == tsme


@pytest.mark.req("WP-28", "MC-31")
def test_under_tsme_the_windows_are_one_memory() -> None:
    machine = Machine(ram=16 << 20, tsme=True, hazards="raise", seed=1)
    cpu = start_paging(machine)
    for turn in range(10):
        cpu.store(PLAIN + PAGE + 8 * turn, b"through ")
        cpu.store(SECRET + PAGE + 8 * turn + 4, b"both")
        assert cpu.load(SECRET + PAGE + 8 * turn, 8) == b"throboth"
        assert cpu.load(PLAIN + PAGE + 8 * turn, 8) == b"throboth"
    assert machine.caches.tag_changes == 0


@pytest.mark.req("WP-4", "WP-28", "MC-33")
def test_a_reset_makes_all_of_memory_noise() -> None:
    machine = Machine(ram=16 << 20, smee=False, tsme=True, seed=1)
    machine.cpu.store(PAGE, TEXT)
    cells = machine.snoop(PAGE, 64)
    machine.reset()
    assert machine.snoop(PAGE, 64) != cells  # the line was written back first
    assert TEXT[:16] not in machine.cpu.load(PAGE, 64)


# --- the lost address bits: on Rome 48 - 5, so that bits 43 to 46 are reserved

HIGH = 1 << 46


def translate_high(machine: Machine) -> int:
    """Return the frame of a leaf that points above the reduced width."""
    cpu = start_paging(machine)
    cpu.store64(PLAIN_PDPT + 8 * 511, HIGH | P_RW | PS)
    return cpu.translate(511 << 30).pa


@pytest.mark.req("WP-33")
@pytest.mark.parametrize("tsme", [False, True])
def test_without_sme_no_address_bit_is_lost(tsme: bool) -> None:
    machine = Machine("epyc-7742", ram=16 << 20, smee=False, tsme=tsme, seed=1)
    assert translate_high(machine) == HIGH


@pytest.mark.req("WP-17", "WP-34")
def test_the_bits_are_lost_with_syscfg_23_though_no_entry_uses_c() -> None:
    machine = Machine("epyc-7742", ram=16 << 20, smee=False, seed=1)
    assert translate_high(machine) == HIGH
    cpu = machine.cpu
    cpu.wrmsr(SYSCFG, cpu.rdmsr(SYSCFG) | 1 << 23)
    with pytest.raises(PageFault) as fault:
        cpu.load(511 << 30, 1)
    assert fault.value.code == PageFaultCode.PRESENT | PageFaultCode.RESERVED
    assert (fault.value.level, fault.value.address) == ("PDPT", 511 << 30)


@pytest.mark.req("WP-12", "WP-17", "BZ-2")
@pytest.mark.parametrize(("model", "c_bit"), [("epyc-7551p", 47), ("epyc-9654", 51)])
def test_the_c_bit_alone_is_exempt_and_its_place_comes_from_cpuid(
    model: str, c_bit: int
) -> None:
    # BZ-2 in a nutshell: the other generation's C-bit is a reserved bit here.
    machine = Machine(model, ram=16 << 20, seed=1)
    cpu = start_paging(machine)
    assert cpu.cpuid(0x8000_001F).ebx & 0x3F == c_bit
    assert cpu.load(SECRET + PAGE, 16) != bytes(16)
    for bit in {47, 48, 51} - {c_bit}:
        cpu.store64(PLAIN_PDPT + 8 * 511, 1 << bit | P_RW | PS)
        cpu.invlpg(511 << 30)
        reserved = bit >= machine.model.memory_encryption.phys_bits_with_sme
        if reserved:
            with pytest.raises(PageFault):
                cpu.load(511 << 30, 1)
        else:
            assert cpu.translate(511 << 30).pa == 1 << bit
