"""Control registers, MSRs and CPUID of machine code are those of the Python core."""

import pytest

from cbit.hw.native import Ending, NativeCore
from cbit.hw.paging import Entry

from .guests import CODE, DATA, Guest, P, code

WRITE_CR3 = code("""
    0f22d8 ; mov cr3, rax
    f4     ; hlt
    """)
WRITE_CR4 = code("""
    0f22e0 ; mov cr4, rax
    f4     ; hlt
    """)
WRITE_CR0 = code("""
    0f22c0 ; mov cr0, rax
    f4     ; hlt
    """)
READ_MSR = code("""
    0f32 ; rdmsr
    f4   ; hlt
    """)
WRITE_MSR = code("""
    0f30 ; wrmsr
    f4   ; hlt
    """)
PAGE = 0x180_1000_0000


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_cpuid_is_the_machines(guest: Guest) -> None:
    program = code("""
    0fa2 ; cpuid
    f4   ; hlt
    """)
    guest.run(program, rax=0x8000_001F, rcx=0)
    leaf = guest.machine.model.table.leaf(0x8000_001F)
    assert (guest.rax, guest.rbx, guest.rcx, guest.rdx) == tuple(leaf)
    assert guest.event_kinds() == ["cpuid"]
    assert guest.events[0].facts["leaf"] == 0x8000_001F


def test_msrs_are_the_machines(guest: Guest) -> None:
    guest.run(READ_MSR, rcx=0xC001_0010)
    value = guest.machine.msrs[0].read(0xC001_0010)
    assert guest.rdx << 32 | guest.rax == value
    guest.run(WRITE_MSR, rcx=0xC000_0082, rax=0x8000_0000, rdx=0xFFFF_FFFF)
    assert guest.cpu.rdmsr(0xC000_0082) == 0xFFFF_FFFF_8000_0000
    assert guest.event_kinds() == ["rdmsr", "wrmsr", "rdmsr"]


def test_an_unknown_msr_is_a_protection_fault_with_code_0(guest: Guest) -> None:
    for program in (READ_MSR, WRITE_MSR):
        guest.run(program, rcx=0xC001_7777)
        assert (guest.vector, guest.error_code) == (13, 0)
        assert guest.frame(error_code=True).rip == CODE
    assert guest.events == []


@pytest.mark.parametrize(
    ("program", "value"),
    [
        (WRITE_CR3, 1 << 51 - 4),  # above the reduced width
        (WRITE_CR3, 1 << 63),  # without PCIDE
        (WRITE_CR4, 0x20 | 1 << 31),
        (WRITE_CR4, 0),  # PAE in long mode
        (WRITE_CR4, 0x20 | 1 << 12),  # LA57 in long mode
        (WRITE_CR0, 1 << 40 | 0x8001_0011),
        (WRITE_CR0, 0x11),  # paging off in 64-bit mode
        (WRITE_CR0, 0xA001_0011),  # NW without CD
    ],
)
def test_reserved_bits_of_control_registers_are_protection_faults(
    guest: Guest, program: bytes, value: int
) -> None:
    before = guest.cpu.state()
    guest.run(program, rax=value)
    assert (guest.vector, guest.error_code) == (13, 0)
    assert guest.frame(error_code=True).rip == CODE
    assert guest.cpu.state() == before
    assert guest.events == []


def test_writes_of_control_registers_are_events_and_read_back(guest: Guest) -> None:
    program = code("""
    410f20e1       ; mov r9, cr4
    4981e17fffffff ; and r9, 0xffffffffffffff7f
    410f22e1       ; mov cr4, r9
    0f20e3         ; mov rbx, cr4
    410f20c0       ; mov r8, cr0
    4983c808       ; or r8, 8
    410f22c0       ; mov cr0, r8
    0f20c1         ; mov rcx, cr0
    0f06           ; clts
    0f20c2         ; mov rdx, cr0
    0f20de         ; mov rsi, cr3
    0f22de         ; mov cr3, rsi
    f4             ; hlt
    """)
    guest.run(program)
    assert guest.rbx == guest.cpu.read_cr4()
    assert not guest.rbx & 0x80
    assert guest.rcx & 8
    assert not guest.rdx & 8
    assert guest.rdx == guest.cpu.read_cr0()
    assert guest.rsi == guest.root == guest.cpu.read_cr3()
    registers = [event.facts["register"] for event in guest.events]
    assert registers == ["cr4", "cr0", "cr0", "cr3"]


def test_the_python_core_translates_by_the_cr3_of_the_guest(guest: Guest) -> None:
    guest.map(PAGE, DATA)
    guest.cpu.store64(DATA, 11)
    guest.cpu.store64(DATA + 0x1000, 22)
    other = 0x15_0000
    guest.cpu.copy(other, guest.root, 4096)
    old, guest.root = guest.root, other
    guest.cpu.store64(other + 8 * (PAGE >> 39), 0)
    guest._next_table = 0x16_0000
    guest.map(PAGE, DATA + 0x1000)
    assert guest.cpu.load64(PAGE) == 11
    guest.run(WRITE_CR3, rax=other)
    assert guest.cpu.load64(PAGE) == 22
    guest.run(WRITE_CR3, rax=old)
    assert guest.cpu.load64(PAGE) == 11


def test_the_python_core_knows_the_guests_cr2(guest: Guest) -> None:
    program = code("""
    0f22d0 ; mov cr2, rax
    f4     ; hlt
    """)
    guest.run(program, rax=0x1234)
    assert guest.cpu.cr2 == 0x1234


def test_enabling_syscfg_in_the_guest_makes_the_c_bit_count() -> None:
    guest = Guest(smee=False)
    at = guest.map(PAGE, DATA)
    program = code("""
    488b1e     ; mov rbx, [rsi]
    b9100001c0 ; mov ecx, 0xc0010010
    0f32       ; rdmsr
    0d00008000 ; or eax, 0x800000
    0f30       ; wrmsr
    4c8907     ; mov [rdi], r8
    488b16     ; mov rdx, [rsi]
    f4         ; hlt
    """)
    guest.cpu.store64(DATA, 5)
    guest.cpu.wbinvd()
    guest.run(program, rsi=PAGE, rdi=at, r8=DATA | P | guest.c)
    assert guest.rbx == 5
    # Without INVLPG: the change of SYSCFG has dropped what it made untrue.
    assert guest.rdx != 5
    assert guest.cpu.translate(PAGE).slot == guest.machine.controller.slot_for(True)
    assert guest.cpu.translate(PAGE).entry & Entry.A


def test_the_machine_goes_on_with_the_python_core_after_close(guest: Guest) -> None:
    guest.run(WRITE_MSR, rcx=0xC000_0101, rax=0x1000, rdx=0)
    guest.core.close()
    assert guest.cpu.rdmsr(0xC000_0101) == 0x1000
    guest.cpu.wrmsr(0xC000_0101, 0x2000)
    guest.platform.pic.set_line(3, True)
    guest.platform.lapic.write_register(0xF, 0x1FF)
    guest.platform.lapic.request(0x40)
    guest.cpu.wbinvd()
    again = NativeCore(guest.machine, guest.platform)
    assert again.exits.read_engine_msr(0xC000_0101) == 0x2000


def test_a_second_core_takes_over_where_the_first_was_closed(guest: Guest) -> None:
    guest.run(WRITE_CR4, rax=guest.cpu.read_cr4() & ~0x80)
    guest.core.close()
    again = NativeCore(guest.machine, guest.platform)
    program = code("""
    0f20e0 ; mov rax, cr4
    0f20db ; mov rbx, cr3
    f4     ; hlt
    """)
    guest.cpu.store(CODE, program)
    again.enter(CODE)
    assert again.run(5).ending is Ending.HALTED
    assert again.state.regs[0] == guest.cpu.read_cr4()
    assert again.state.regs[3] == guest.root
