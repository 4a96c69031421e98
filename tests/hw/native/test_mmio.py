"""Devices, ROM and empty addresses as machine code reaches them."""

import pytest

from cbit.hw.devices import lapic

from .guests import DATA, RW, Guest, P, code

APIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
ROM, VGA, EMPTY = 0xF_0000, 0xA_0000, 0x9000_0000
BEYOND = 0x40_3000_0000
PAGE = 0x40_1000_0000
LOAD_4 = code("""
    8b03 ; mov eax, [rbx]
    f4   ; hlt
    """)
STORE_4 = code("""
    8903 ; mov [rbx], eax
    f4   ; hlt
    """)
LOAD_8 = code("""
    488b03 ; mov rax, [rbx]
    f4     ; hlt
    """)
STORE_LOAD = code("""
    488b0b   ; mov rcx, [rbx]
    488903   ; mov [rbx], rax
    488b13   ; mov rdx, [rbx]
    0fb67303 ; movzx esi, byte ptr [rbx+3]
    f4       ; hlt
    """)


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_load_from_the_apic_reads_its_register(guest: Guest) -> None:
    guest.run(LOAD_4, rbx=APIC + 0x30)
    assert guest.rax == guest.platform.lapic.read_register(lapic.VERSION_REGISTER)


def test_a_store_to_the_apic_writes_its_register(guest: Guest) -> None:
    guest.run(STORE_4, rbx=APIC + 0x80, rax=0x30)
    assert guest.platform.lapic.read_register(lapic.TPR) == 0x30
    guest.run(LOAD_4, rbx=APIC + 0x80)
    assert guest.rax == 0x30


def test_read_modify_write_of_a_register_is_one_load_and_one_store(
    guest: Guest,
) -> None:
    program = code("""
    810b00010000 ; or dword ptr [rbx], 0x100
    f4           ; hlt
    """)
    guest.run(program, rbx=APIC + 0xF0)
    assert guest.platform.lapic.read_register(lapic.SVR) == 0x1FF


def test_the_io_apic_answers_too(guest: Guest) -> None:
    program = code("""
    c70301000000 ; mov dword ptr [rbx], 1
    8b4310       ; mov eax, [rbx+0x10]
    f4           ; hlt
    """)
    guest.run(program, rbx=IOAPIC)
    assert guest.rax & 0xFF0000 == 23 << 16
    assert guest.events == []


def test_a_device_that_is_mapped_with_the_c_bit_answers_and_is_reported(
    guest: Guest,
) -> None:
    guest.map(PAGE, APIC, P | RW | guest.c)
    guest.run(LOAD_4, rbx=PAGE + 0x30)
    assert guest.rax == guest.platform.lapic.read_register(lapic.VERSION_REGISTER)
    guest.run(STORE_4, rbx=PAGE + 0x80, rax=0x20)
    assert guest.platform.lapic.read_register(lapic.TPR) == 0x20
    assert guest.event_kinds() == ["mmio-encrypted"] * 2
    assert guest.machine.bus.mmio_encrypted == 2


@pytest.mark.parametrize("pa", [EMPTY, VGA, ROM, ROM + 0xFFF8, BEYOND])
@pytest.mark.parametrize("c", [False, True])
def test_where_nothing_is_kept_ones_are_read_and_stores_vanish(
    guest: Guest, pa: int, c: bool
) -> None:
    guest.map(PAGE, pa & -4096, P | RW | (guest.c if c else 0))
    guest.run(STORE_LOAD, rbx=PAGE + pa % 4096, rax=0)
    assert guest.vector is None
    assert guest.rcx == guest.rdx == (1 << 64) - 1
    assert guest.rsi == 0xFF
    guest.run(LOAD_8, rbx=PAGE + pa % 4096)
    assert guest.rax == (1 << 64) - 1


def test_a_load_over_the_end_of_ram_reads_both_sides(guest: Guest) -> None:
    end = guest.machine.map.ram_end
    guest.cpu.store64(end - 8, 0x1122_3344_5566_7788)
    guest.map(PAGE, end - 4096)
    guest.map(PAGE + 4096, end)
    guest.run(LOAD_8, rbx=PAGE + 4096 - 4)
    assert guest.rax == 0xFFFF_FFFF_1122_3344


def test_code_where_no_memory_answers_is_a_protection_fault(guest: Guest) -> None:
    program = code("""
    ffe3 ; jmp rbx
    """)
    guest.run(program, rbx=EMPTY)
    assert guest.vector == 13
    assert guest.frame(error_code=True).rip == EMPTY


def test_empty_addresses_are_counted(guest: Guest) -> None:
    guest.map(PAGE, BEYOND)
    guest.run(STORE_4, rbx=PAGE)
    assert guest.core.memory.unpopulated == 1


def test_rom_keeps_its_bytes_and_ram_beside_it_is_ram(guest: Guest) -> None:
    guest.run(STORE_LOAD, rbx=DATA, rax=5)
    assert guest.rdx == 5
    guest.run(STORE_LOAD, rbx=0x10_0000 - 8, rax=5)
    assert guest.rdx == (1 << 64) - 1


def test_tags_of_a_device_page_leave_its_neighbours_alone(guest: Guest) -> None:
    # A large page over the APIC: each piece is what its frame is.
    guest.map(PAGE, APIC & -(1 << 21), P | RW, shift=21)
    guest.run(LOAD_4, rbx=PAGE + APIC % (1 << 21) + 0x30)
    assert guest.rax == guest.platform.lapic.read_register(lapic.VERSION_REGISTER)
    guest.run(LOAD_8, rbx=PAGE + APIC % (1 << 21) + 0x1000)
    assert guest.rax == (1 << 64) - 1
