"""User mode: IRETQ, SYSCALL, SYSRET, SWAPGS, ports, and what the processor reads."""

import pytest

from cbit.hw.native import Ending

from .guests import (
    CODE,
    DATA,
    ENTER_USER,
    GDT,
    IF,
    KERNEL_CS,
    KERNEL_SS,
    RSP0,
    RW,
    STAR,
    TSS,
    US,
    USER_CODE,
    USER_CS,
    USER_SS,
    USER_STACK,
    Guest,
    P,
    code,
)

LSTAR = 0x21_0000
SYSTEM_CALL = code("""
    bf07000000 ; mov edi, 7
    0f05       ; syscall
    f4         ; hlt
    """)
STOP = code("""
    f4 ; hlt
    """)
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC000_0100, 0xC000_0101, 0xC000_0102


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    for index, value in (
        (0xC000_0081, STAR),
        (0xC000_0082, LSTAR),
        (0xC000_0084, IF | 1),
    ):
        write_msr(guest, index, value)
    return guest


def write_msr(guest: Guest, index: int, value: int) -> None:
    program = code("""
    0f30 ; wrmsr
    f4   ; hlt
    """)
    stop = guest.run(program, rcx=index, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    assert stop.ending is Ending.HALTED
    assert guest.vector is None


def test_syscall_enters_at_lstar_with_flags_masked(guest: Guest) -> None:
    # Source: [APM3] SYSCALL; the selectors: [APM2] 6.1.1.
    guest.place(LSTAR, STOP)
    guest.run_user(SYSTEM_CALL, rflags=IF | 3)
    assert guest.rip == LSTAR + 1
    assert guest.rcx == USER_CODE + 7
    assert guest.r11 == IF | 3
    assert guest.rsp == USER_STACK
    assert guest.core.state.rflags & (IF | 1) == 0
    assert guest.core.state.cpl == 0
    segments = guest.core.state.segments
    assert (segments[1].selector, segments[2].selector) == (KERNEL_CS, KERNEL_SS)


def test_sysret_goes_back_to_user_mode(guest: Guest) -> None:
    call = code("""
    488d4723 ; lea rax, [rdi+35]
    480f07   ; sysretq
    """)
    guest.place(LSTAR, call)
    program = code("""
    bf07000000 ; mov edi, 7
    0f05       ; syscall
    9c         ; pushfq
    5b         ; pop rbx
    0f0b       ; ud2
    """)
    guest.run_user(program, rflags=IF | 2)
    frame = guest.frame()
    assert guest.vector == 6
    assert guest.rax == 42
    assert guest.rbx & (IF | 0xFF) == IF | 2
    assert frame[:2] == (USER_CODE + 9, USER_CS)
    assert frame.ss == USER_SS


def test_syscall_is_undefined_while_efer_sce_is_0(guest: Guest) -> None:
    write_msr(guest, 0xC000_0080, guest.cpu.rdmsr(0xC000_0080) & ~1)
    guest.place(LSTAR, STOP)
    guest.run_user(SYSTEM_CALL)
    assert guest.vector == 6
    assert guest.frame().rip == USER_CODE + 5
    assert guest.rsp == RSP0 - 40


def test_swapgs_exchanges_the_bases_and_the_python_core_reads_them(
    guest: Guest,
) -> None:
    guest.cpu.wrmsr(GS_BASE, DATA)
    guest.cpu.wrmsr(KERNEL_GS_BASE, DATA + 0x100)
    guest.cpu.store64(DATA + 8, 1)
    guest.cpu.store64(DATA + 0x108, 2)
    program = code("""
    65488b042508000000 ; mov rax, gs:[8]
    0f01f8             ; swapgs
    65488b1c2508000000 ; mov rbx, gs:[8]
    f4                 ; hlt
    """)
    guest.run(program)
    assert (guest.rax, guest.rbx) == (1, 2)
    assert guest.cpu.rdmsr(GS_BASE) == DATA + 0x100
    assert guest.cpu.rdmsr(KERNEL_GS_BASE) == DATA


@pytest.mark.parametrize(
    "program",
    [
        code("""
    f4 ; hlt
    """),
        code("""
    fa ; cli
    """),
        code("""
    0f20d8 ; mov rax, cr3
    """),
        code("""
    0f22d8 ; mov cr3, rax
    """),
        code("""
    0f22e0 ; mov cr4, rax
    """),
        code("""
    0f32 ; rdmsr
    """),
        code("""
    0f30 ; wrmsr
    """),
        code("""
    0f0138 ; invlpg [rax]
    """),
        code("""
    0f09 ; wbinvd
    """),
        code("""
    0f01f8 ; swapgs
    """),
        code("""
    480f07 ; sysretq
    """),
        code("""
    0f0118 ; lidt [rax]
    """),
        code("""
    0f00d8 ; ltr ax
    """),
        code("""
    ec ; in al, dx
    """),
        code("""
    ee ; out dx, al
    """),
    ],
    ids=lambda program: program.hex(),
)
def test_privileged_instructions_are_refused_in_user_mode(
    guest: Guest, program: bytes
) -> None:
    guest.run_user(program, rcx=0x1B, rax=USER_CODE, rdx=0xE9)
    assert (guest.vector, guest.error_code) == (13, 0)
    assert guest.frame(error_code=True).rip == USER_CODE
    assert not guest.console


def test_ports_are_open_to_user_mode_by_iopl_or_by_the_map_of_the_task(
    guest: Guest,
) -> None:
    program = code("""
    b041 ; mov al, 0x41
    ee   ; out dx, al
    0f0b ; ud2
    """)
    guest.run_user(program, rdx=0xE9, rflags=2 | 3 << 12)
    assert guest.vector == 6
    assert guest.console == b"A"
    # Source: [APM2] 12.2.5: a 0 in the I/O map allows the port.
    guest.cpu.store(TSS + 0x68, bytes(0x20) + b"\xff")
    guest.core.state.segments[7].load(
        0x40, TSS, 0x68 + 0x20, guest.core.state.segments[7].flags
    )
    guest.run_user(program, rdx=0xE9)
    assert guest.vector == 6
    assert guest.console == b"AA"


def test_what_stands_behind_a_refused_port_access_has_no_effect(guest: Guest) -> None:
    endings = (
        code("""
    0f0b ; ud2
    """),
        code("""
    0f05 ; syscall
    """),
        code("""
    cc ; int3
    """),
        code("""
    488b042500000000 ; mov rax, [0]
    """),
        code("""
    ebfe ; jmp .
    """),
    )
    program = code("""
    ec         ; in al, dx
    b909000000 ; mov ecx, 9
    31d2       ; xor edx, edx
    """)
    for ending in endings:
        guest.run_user(program + ending, rax=0x55, rcx=5, rdx=0xE9)
        assert (guest.vector, guest.error_code) == (13, 0)
        assert (guest.rax, guest.rcx, guest.rdx) == (0x55, 5, 0xE9)
        assert guest.frame(error_code=True).rip == USER_CODE
        assert guest.frame(error_code=True).rflags & 0xFF == 2


def test_user_code_makes_the_processor_read_descriptors_it_cannot_read(
    guest: Guest,
) -> None:
    program = code("""
    b82b000000 ; mov eax, 0x2b
    0f03d8     ; lsl ebx, eax
    8ed8       ; mov ds, eax
    488b0a     ; mov rcx, [rdx]
    """)
    guest.run_user(program, rdx=GDT)
    assert guest.vector == 14
    assert guest.error_code == 5
    assert guest.core.state.cr(2) == GDT
    assert guest.rbx == 0xFFFF_FFFF
    assert guest.core.state.segments[3].selector == 0x2B


def test_a_selector_from_the_page_of_the_descriptors_is_refused(guest: Guest) -> None:
    program = code("""
    8e1a ; mov ds, [rdx]
    """)
    guest.run_user(program, rdx=GDT)
    assert (guest.vector, guest.error_code) == (14, 5)


def test_the_python_core_stands_at_the_privilege_of_the_guest(guest: Guest) -> None:
    program = code("""
    90   ; nop
    ebfe ; jmp .
    """)
    guest.map(USER_CODE, DATA, P | RW | US)
    guest.map(USER_STACK - 4096, DATA + 4096, P | RW | US)
    guest.place(DATA, program)
    guest.place(CODE, ENTER_USER)
    guest.set(r8=USER_STACK, r9=2 | 1 << 18, r10=USER_CODE)
    guest.core.state.rip = CODE
    assert guest.core.run(0.2).ending is Ending.TIMEOUT
    assert guest.cpu.cpl == 3
    assert guest.cpu.alignment_check
    assert guest.core.run(0.2).ending is Ending.TIMEOUT
    assert guest.rip == USER_CODE + 1
