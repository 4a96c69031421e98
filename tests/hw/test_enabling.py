"""Turning memory encryption on by hand: SYSCFG[23], the width it costs, each core."""

import pytest

from cbit.boot.loader import enter_long_mode
from cbit.hw.cpu import Cpu
from cbit.hw.faults import PageFault, PageFaultCode
from cbit.hw.machine import Machine
from cbit.hw.memory.bus import NothingThere
from cbit.hw.msr import Syscfg

PML4, PDPT, PD = 0x8_1000, 0x8_2000, 0x8_3000
"""Tables that `enter_long_mode` leaves behind."""

VA = 16 << 20
ENTRY = PD + 8 * (VA >> 21)
LARGE = 0x183
SMEE = 1 << 23


def enable(cpu: Cpu) -> None:
    cpu.wrmsr(Syscfg.ADDRESS, cpu.rdmsr(Syscfg.ADDRESS) | SMEE)


def remap(cpu: Cpu, entry: int) -> None:
    cpu.store64(ENTRY, entry)
    cpu.invlpg(VA)


@pytest.mark.req("WP-18", "WP-34")
def test_an_address_above_the_reduced_width_dies_when_the_bit_is_set() -> None:
    cpu = Machine("epyc-7742", smee=False).cpu
    enter_long_mode(cpu, five_levels=False)
    remap(cpu, 1 << 45 | LARGE)
    assert cpu.translate(VA).pa == 1 << 45
    enable(cpu)
    with pytest.raises(PageFault) as fault:
        cpu.translate(VA)
    assert fault.value.code == PageFaultCode.PRESENT | PageFaultCode.RESERVED
    assert (fault.value.level, fault.value.index) == ("PD", 8)


@pytest.mark.req("WP-12", "WP-22", "PT-20", "PT-21", "PT-22")
def test_dram_seen_from_bit_47_up_is_all_encrypted() -> None:
    # Every frame named with bit 47 added: tables, CR3 and data alike.
    machine = Machine("epyc-7742")
    cpu, c = machine.cpu, 1 << 47
    enter_long_mode(cpu, five_levels=False)
    new = 0x10_0000
    for source, target in ((PML4, 0), (PDPT, 0x1000), (PD, 0x2000)):
        cpu.copy(new + target, source, 0x1000)
    cpu.store64(new, (new + 0x1000) | c | 7)
    cpu.store64(new + 0x1000, (new + 0x2000) | c | 7)
    for index in range(512):
        cpu.store64(new + 0x2000 + 8 * index, index << 21 | c | LARGE)
    # The tables were written plain: they become what CR3 will read, in place.
    tables = cpu.load(new, 0x3000)
    cpu.wbinvd()
    for page in range(0, 0x3000, 0x1000):
        machine.bus.store(new + page, tables[page : page + 0x1000], slot=1)
    cpu.write_cr3(new | c)
    cpu.invlpg(VA)
    cpu.store(VA, b"attack at dawn..")
    cpu.wbinvd()
    assert cpu.translate(VA).pa == VA
    assert cpu.load(VA, 16) == b"attack at dawn.."
    assert machine.snoop(VA, 16) != b"attack at dawn.."
    assert machine.snoop(new, 0x3000) != tables
    assert not machine.caches.hazards_met


@pytest.mark.req("CM-53")
@pytest.mark.parametrize("model", ["epyc-7742", "epyc-7763"])
def test_each_core_has_its_own_bit_and_all_must_agree(model: str) -> None:
    machine = Machine(model, smee=False, cores=2)
    first, second = machine.cpus
    enter_long_mode(first, five_levels=False)
    c = 1 << machine.model.memory_encryption.c_bit
    enable(first)
    assert not second.rdmsr(Syscfg.ADDRESS) & SMEE
    remap(first, VA | c | LARGE)
    first.store(VA, b"for the first core")

    second.write_cr4(first.read_cr4())
    second.write_cr3(first.read_cr3())
    second.wrmsr(0xC000_0080, 0x100)
    second.write_cr0(first.read_cr0())
    # To the odd core C is an address bit where the width reaches it, else reserved.
    odd = NothingThere if model == "epyc-7742" else PageFault
    with pytest.raises(odd):
        second.load(VA, 18)
    enable(second)
    assert second.load(VA, 18) == b"for the first core"
    fixed = 1 << 19
    second.wrmsr(Syscfg.ADDRESS, second.rdmsr(Syscfg.ADDRESS) | fixed)
    assert not first.rdmsr(Syscfg.ADDRESS) & fixed
