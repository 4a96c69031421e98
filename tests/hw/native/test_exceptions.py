"""Exceptions of machine code: error codes, frames, gates, stacks, double faults."""

import pytest

from cbit.hw.native import Ending

from .guests import (
    CODE,
    DATA,
    HANDLERS,
    IF,
    IST1,
    KERNEL_CS,
    KERNEL_SS,
    NX,
    RSP0,
    RW,
    STACK,
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

PAGE = 0x40_1000_0000
LOAD = code("""
    90     ; nop
    488b03 ; mov rax, [rbx]
    f4     ; hlt
    """)
STORE = code("""
    90     ; nop
    488903 ; mov [rbx], rax
    f4     ; hlt
    """)
JUMP = code("""
    ffe3 ; jmp rbx
    """)
BREAKPOINT = code("""
    cc ; int3
    f4 ; hlt
    """)
SOFTWARE_80 = code("""
    cd80 ; int 0x80
    f4   ; hlt
    """)
DIVIDE = code("""
    31c9   ; xor ecx, ecx
    48f7f1 ; div rcx
    """)
UNDEFINED = code("""
    0f0b ; ud2
    """)
RETURN = code("""
    48cf ; iretq
    """)


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.mark.parametrize(
    ("program", "flags", "user", "error_code"),
    [
        (LOAD, 0, False, 0x00),
        (STORE, 0, False, 0x02),
        (STORE, P, False, 0x03),
        (JUMP, 0, False, 0x10),
        (JUMP, P | RW | NX, False, 0x11),
        (LOAD, P | 1 << 51 - 4, False, 0x09),
        (LOAD, 0, True, 0x04),
        (LOAD, P | RW, True, 0x05),
        (STORE, US, True, 0x06),
        (STORE, P | US, True, 0x07),
        (JUMP, P | RW | US | NX, True, 0x15),
    ],
)
def test_a_page_fault_tells_its_cause_and_the_byte(
    guest: Guest, program: bytes, flags: int, user: bool, error_code: int
) -> None:
    # Source: [APM2] 8.2.15: P, W, U, RSVD, I are bits 0 to 4.
    guest.map(PAGE, 0x60_0000, flags)
    run = guest.run_user if user else guest.run
    run(program, rbx=PAGE + 0x123)
    assert guest.vector == 14
    assert guest.error_code == error_code
    assert guest.core.state.cr(2) == PAGE + 0x123
    start = USER_CODE if user else CODE
    fetched = error_code & 0x10
    assert guest.frame(error_code=True).rip == (PAGE + 0x123 if fetched else start + 1)
    assert guest.core.exceptions == {14: 1}


def test_an_access_across_pages_faults_at_the_second_ones_first_byte(
    guest: Guest,
) -> None:
    guest.map(PAGE, 0x60_0000)
    guest.run(STORE, rbx=PAGE + 0xFFD, rax=0x1122_3344_5566_7788)
    assert guest.vector == 14
    assert guest.core.state.cr(2) == PAGE + 0x1000
    assert guest.cpu.load(PAGE + 0xFF8, 8) == bytes(8)


@pytest.mark.parametrize("va", [1 << 47, (1 << 64) - (1 << 47) - 8, 1 << 63])
@pytest.mark.parametrize("program", [LOAD, STORE, JUMP])
def test_an_address_that_is_not_canonical_is_a_general_protection_fault(
    guest: Guest, va: int, program: bytes
) -> None:
    guest.run(program, rbx=va)
    assert (guest.vector, guest.error_code) == (13, 0)


def test_ud2_and_division_by_zero_name_the_instruction(guest: Guest) -> None:
    guest.run(UNDEFINED)
    assert (guest.vector, guest.frame().rip) == (6, CODE)
    guest.run(DIVIDE)
    assert (guest.vector, guest.frame().rip) == (0, CODE + 2)


def test_int3_and_int_n_name_the_next_instruction(guest: Guest) -> None:
    guest.run(BREAKPOINT)
    assert guest.vector == 3
    assert guest.frame() == (CODE + 1, KERNEL_CS, 2, STACK, KERNEL_SS)
    guest.run(SOFTWARE_80)
    assert guest.vector == 0x80
    assert guest.frame() == (CODE + 2, KERNEL_CS, 2, STACK, KERNEL_SS)


@pytest.mark.parametrize(("program", "vector"), [(BREAKPOINT, 3), (SOFTWARE_80, 0x80)])
def test_int_n_of_user_mode_needs_a_gate_for_it(
    guest: Guest, program: bytes, vector: int
) -> None:
    guest.run_user(program)
    assert (guest.vector, guest.error_code) == (13, vector * 8 + 2)
    assert guest.frame(error_code=True).rip == USER_CODE
    guest.gate(vector, HANDLERS + 16 * vector, dpl=3)
    guest.run_user(program)
    assert guest.vector == vector
    assert guest.frame().rip == USER_CODE + len(program) - 1


def test_int_n_through_an_absent_gate_can_be_repeated(guest: Guest) -> None:
    guest.gate(0x80, HANDLERS + 0x800, present=False)
    guest.run(SOFTWARE_80)
    assert (guest.vector, guest.error_code) == (11, 0x80 * 8 + 2)
    assert guest.frame(error_code=True).rip == CODE


def test_a_fault_through_an_absent_gate_is_marked_external(guest: Guest) -> None:
    guest.gate(6, HANDLERS + 0x60, present=False)
    guest.run(UNDEFINED)
    assert (guest.vector, guest.error_code) == (11, 6 * 8 + 3)


def test_faults_push_rf_and_software_interrupts_do_not(guest: Guest) -> None:
    # Source: [APM2] 3.1.6, RF: set in the pushed image of every fault.
    guest.run(UNDEFINED)
    assert guest.frame().rflags >> 16 & 1
    guest.run(LOAD, rbx=PAGE)
    assert guest.frame(error_code=True).rflags >> 16 & 1
    guest.run(SOFTWARE_80)
    assert not guest.frame().rflags >> 16 & 1


def test_an_interrupt_gate_clears_if_and_a_trap_gate_does_not(guest: Guest) -> None:
    guest.run(UNDEFINED, rflags=IF | 2)
    assert not guest.core.state.rflags & IF
    assert guest.frame().rflags & IF
    guest.handler(6, RETURN_FLAGS, trap=True)
    guest.run(UNDEFINED, rflags=IF | 2)
    assert guest.rax & IF


RETURN_FLAGS = code("""
    9c ; pushfq
    58 ; pop rax
    fa ; cli
    f4 ; hlt
    """)


def test_user_mode_enters_on_the_stack_of_the_task(guest: Guest) -> None:
    guest.run_user(UNDEFINED, rflags=IF | 2)
    frame = guest.frame()
    assert frame == (USER_CODE, USER_CS, IF | 2 | 1 << 16, USER_STACK, USER_SS)
    assert guest.rsp == RSP0 - 40
    assert guest.core.state.cpl == 0


def test_an_interrupt_stack_is_used_from_kernel_mode_too(guest: Guest) -> None:
    guest.gate(6, HANDLERS + 0x60, ist=1)
    guest.run(UNDEFINED)
    assert guest.rsp == IST1 - 40
    assert guest.frame().rsp == STACK


def test_the_frame_is_aligned_to_16_bytes(guest: Guest) -> None:
    guest.run(UNDEFINED, rsp=STACK - 3)
    assert guest.rsp == STACK - 16 - 40
    assert guest.frame().rsp == STACK - 3


@pytest.mark.parametrize("user", [False, True])
def test_iretq_goes_on_where_the_event_came(guest: Guest, user: bool) -> None:
    guest.handler(0x80, RETURN, dpl=3)
    program = code("""
    b905000000 ; mov ecx, 5
    01c9       ; add ecx, ecx
    f9         ; stc
    cd80       ; int 0x80
    83d101     ; adc ecx, 1
    0f0b       ; ud2
    """)
    (guest.run_user if user else guest.run)(program)
    assert guest.vector == 6
    assert guest.rcx == 12
    assert guest.frame().rsp == (USER_STACK if user else STACK)


def test_a_handler_that_cures_a_page_fault_lets_the_access_succeed(
    guest: Guest,
) -> None:
    entry = guest.map(PAGE, 0x60_0000, 0)
    guest.cpu.store64(0x60_0008, 77)
    cure = code("""
    488932   ; mov qword ptr [rdx], rsi
    4883c408 ; add rsp, 8
    48cf     ; iretq
    """)
    guest.handler(14, cure)
    guest.run(LOAD, rbx=PAGE + 8, rdx=entry, rsi=0x60_0000 | P | RW)
    assert guest.rip == CODE + len(LOAD)
    assert guest.rax == 77


def test_a_fault_while_a_fault_is_delivered_is_a_double_fault(guest: Guest) -> None:
    guest.gate(13, 0, present=False)
    guest.run(LOAD, rbx=1 << 63)
    assert (guest.vector, guest.error_code) == (8, 0)
    assert guest.frame(error_code=True).rip == CODE + 1
    assert guest.core.exceptions == {8: 1}


def test_a_page_fault_on_the_stack_is_a_double_fault_on_its_own(guest: Guest) -> None:
    guest.gate(8, HANDLERS + 0x80, ist=1)
    guest.run(LOAD, rbx=PAGE, rsp=PAGE + 0x2008)
    assert guest.vector == 8
    assert guest.rsp == IST1 - 48
    # Source: [APM2] 8.2.15: CR2 has the address of the last fault.
    assert guest.core.state.cr(2) == PAGE + 0x2000 - 48


def test_a_page_fault_while_a_protection_fault_is_delivered_comes_first(
    guest: Guest,
) -> None:
    # Source: [APM2] 8.2.9, table 8-6: #GP then #PF is no double fault.
    guest.gate(14, HANDLERS + 0xE0, ist=1)
    guest.run(LOAD, rbx=1 << 63, rsp=PAGE + 0x2008)
    assert guest.vector == 14
    assert guest.core.state.cr(2) == PAGE + 0x2000 - 48


def test_a_triple_fault_ends_the_run_and_names_the_first_and_the_last(
    guest: Guest,
) -> None:
    guest.gate(8, 0, present=False)
    stop = guest.run(LOAD, rbx=PAGE, rsp=PAGE + 0x2008)
    assert stop.ending is Ending.FAULT
    assert "#PF" in stop.reason
    assert "at rip 0x200001" in stop.reason
    assert "#NP" in stop.reason
    assert "gate 8" in stop.reason


def test_the_longest_chain_of_faults_ends_in_the_same_way(guest: Guest) -> None:
    # #UD, then #GP (the gate's type), #PF (the stack of #GP), #PF again, #DF.
    guest.cpu.store64(DATA, 0)
    guest.cpu.store64(0x10_1060, guest.cpu.load64(0x10_1060) & ~(0xF << 40))
    guest.cpu.store64(TSS + 0x24, PAGE)
    for vector in (13, 14, 8):
        guest.gate(vector, HANDLERS + 16 * vector, ist=1)
    stop = guest.run(UNDEFINED)
    assert stop.ending is Ending.FAULT
    assert "#UD: at 0x200000" in stop.reason
    assert f"{PAGE - 48:#x}" in stop.reason


def test_a_run_after_a_triple_fault_leaves_the_python_core_in_step(
    guest: Guest,
) -> None:
    at = guest.map(PAGE, 0x60_0000)
    guest.cpu.store64(0x60_0000, 1)
    guest.cpu.store64(0x70_0000, 2)
    assert guest.cpu.load64(PAGE) == 1
    guest.gate(8, 0, present=False)
    guest.gate(14, 0, present=False)
    program = code("""
    488911 ; mov [rcx], rdx
    488b03 ; mov rax, [rbx]
    """)
    stop = guest.run(program, rbx=PAGE + 0x4000_0000, rcx=at, rdx=0x70_0000 | P | RW)
    assert stop.ending is Ending.FAULT
    assert guest.cpu.load64(PAGE) == 2
