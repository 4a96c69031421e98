"""Interrupts of the platform: when they come, and what HLT does with time."""

import pytest

from cbit.hw.devices import lapic
from cbit.hw.native import Ending

from .guests import CODE, IF, STACK, USER_CODE, USER_STACK, Guest, code

VECTOR = 0x40
APIC = 0xFEE0_0000
ARMED = 1_000_000
"""Nanoseconds after which the timer of `armed` expires."""

COUNT = code("""
    49ffc7               ; inc r15
    41c786b000000000000000 ; mov dword ptr [r14+0xb0], 0
    48cf                 ; iretq
    """)
HALT = code("""
    fb ; sti
    f4 ; hlt
    fa ; cli
    f4 ; hlt
    """)


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    guest.set(r14=APIC, r15=0)
    guest.handler(VECTOR, COUNT)
    guest.platform.lapic.write_register(lapic.SVR, 0x1FF)
    return guest


def arm(guest: Guest, *, periodic: bool = False, after: int = ARMED) -> None:
    apic = guest.platform.lapic
    apic.write_register(lapic.DIVIDE, 0b1011)  # by 1
    apic.write_register(lapic.LVT_TIMER, VECTOR | periodic << 17)
    apic.write_register(lapic.INITIAL_COUNT, after * lapic.BUS_HZ // 10**9)


def test_hlt_jumps_to_the_timer_and_goes_on_behind_itself(guest: Guest) -> None:
    arm(guest, after=5_000_000_000)
    stop = guest.run(HALT)
    assert stop.ending is Ending.HALTED
    assert guest.rip == CODE + 4
    assert guest.r15 == 1
    assert guest.core.interrupts == 1
    assert 5_000_000_000 <= guest.platform.clock.now < 5_001_000_000


def test_hlt_with_interrupts_off_or_without_a_timer_ends_the_run(guest: Guest) -> None:
    arm(guest)
    stop = guest.run(b"\xf4")
    assert (stop.ending, stop.reason) == (
        Ending.HALTED,
        "HLT with interrupts disabled",
    )
    guest.platform.lapic.write_register(lapic.INITIAL_COUNT, 0)
    stop = guest.run(b"\xf4", rflags=IF | 2)
    assert (stop.ending, stop.reason) == (Ending.HALTED, "HLT, and no timer is armed")
    assert guest.r15 == 0


def test_a_loop_with_interrupts_off_is_not_interrupted(guest: Guest) -> None:
    arm(guest)
    program = code("""
    b9404b4c00 ; mov ecx, 5000000
               ; loop:
    ffc9       ; dec ecx
    75fc       ; jnz loop
    4c89fb     ; mov rbx, r15
    fb         ; sti
    90         ; nop
    90         ; nop
    fa         ; cli
    f4         ; hlt
    """)
    guest.run(program)
    assert guest.platform.clock.now > ARMED
    assert guest.rbx == 0
    assert guest.r15 == 1


def test_a_loop_with_interrupts_on_is_interrupted_at_the_time(guest: Guest) -> None:
    arm(guest)
    program = code("""
    4983ff00 ; cmp r15, 0
    74fa     ; je .-4
    fa       ; cli
    f4       ; hlt
    """)
    guest.run(program, rflags=IF | 2)
    assert guest.r15 == 1
    assert 0 <= guest.platform.clock.now - ARMED < 1000


def test_the_frame_of_an_interrupt_has_if_and_no_rf(guest: Guest) -> None:
    arm(guest)
    handler = code("""
    f4 ; hlt
    """)
    guest.handler(VECTOR, handler)
    guest.run(b"\xeb\xfe", rflags=IF | 2)
    assert guest.frame().rip == CODE
    assert guest.frame().rflags == IF | 2


NOTE = code("""
    4889da               ; mov rdx, rbx
    49ffc7               ; inc r15
    41c786b000000000000000 ; mov dword ptr [r14+0xb0], 0
    48cf                 ; iretq
    """)


def test_the_shadow_of_sti_holds_an_interrupt_back(guest: Guest) -> None:
    guest.handler(VECTOR, NOTE)
    guest.platform.lapic.request(VECTOR)
    program = code("""
    fb     ; sti
    48ffc3 ; inc rbx
    48ffc3 ; inc rbx
    fa     ; cli
    f4     ; hlt
    """)
    guest.run(program, rbx=0, rdx=9)
    assert (guest.r15, guest.rdx) == (1, 1)


def test_the_shadow_of_mov_ss_holds_an_interrupt_back(guest: Guest) -> None:
    guest.handler(VECTOR, NOTE)
    program = code("""
    41c7860003000040400400 ; mov dword ptr [r14+0x300], 0x44040
    8ed0                 ; mov ss, eax
    48ffc3               ; inc rbx
    48ffc3               ; inc rbx
    fa                   ; cli
    f4                   ; hlt
    """)
    guest.run(program, rbx=0, rdx=9, rax=0x18, rflags=IF | 2)
    assert (guest.r15, guest.rdx) == (1, 1)


def test_sti_cli_with_nothing_between_lets_none_in(guest: Guest) -> None:
    guest.platform.lapic.request(VECTOR)
    program = code("""
    fb ; sti
    fa ; cli
    f4 ; hlt
    """)
    guest.run(program)
    assert guest.r15 == 0


def test_popf_and_iretq_that_set_if_let_a_pending_one_in(guest: Guest) -> None:
    guest.platform.lapic.request(VECTOR)
    program = code("""
    6802020000 ; push 0x202
    9d         ; popfq
    90         ; nop
    fa         ; cli
    f4         ; hlt
    """)
    guest.run(program)
    assert guest.r15 == 1


def test_user_mode_is_interrupted_and_goes_on(guest: Guest) -> None:
    arm(guest)
    program = code("""
    4983ff00 ; cmp r15, 0
    74fa     ; je .-4
    0f0b     ; ud2
    """)
    guest.run_user(program, rflags=IF | 2)
    assert guest.vector == 6
    assert guest.frame().rip == USER_CODE + 6
    assert guest.frame().rsp == USER_STACK


def test_the_task_priority_of_cr8_holds_interrupts_back(guest: Guest) -> None:
    guest.platform.lapic.request(VECTOR)
    program = code("""
    b804000000 ; mov eax, 4
    440f22c0   ; mov cr8, rax
    fb         ; sti
    90         ; nop
    90         ; nop
    4c89fb     ; mov rbx, r15
    31c0       ; xor eax, eax
    440f22c0   ; mov cr8, rax
    90         ; nop
    440f20c0   ; mov rax, cr8
    fa         ; cli
    f4         ; hlt
    """)
    guest.run(program)
    assert (guest.rbx, guest.r15, guest.rax) == (0, 1, 0)
    guest.run(program[:5] + b"\x44\x0f\x22\xc0\xf4", rax=0)
    assert guest.platform.lapic.read_register(lapic.TPR) == 0x40


def test_a_value_over_4_bits_for_cr8_is_a_protection_fault(guest: Guest) -> None:
    program = code("""
    440f22c0 ; mov cr8, rax
    """)
    guest.run(program, rax=0x10)
    assert (guest.vector, guest.error_code) == (13, 0)


def test_the_pit_interrupts_through_the_pic(guest: Guest) -> None:
    guest.platform.lapic.write_register(lapic.LVT_LINT0, 0x700)  # ExtINT
    handler = code("""
    49ffc7 ; inc r15
    b020   ; mov al, 0x20
    e620   ; out 0x20, al
    48cf   ; iretq
    """)
    guest.handler(0x20, handler)
    program = code("""
    b011     ; mov al, 0x11
    e620     ; out 0x20, al
    b020     ; mov al, 0x20
    e621     ; out 0x21, al
    b004     ; mov al, 4
    e621     ; out 0x21, al
    b001     ; mov al, 1
    e621     ; out 0x21, al
    b0fe     ; mov al, 0xfe
    e621     ; out 0x21, al
    b034     ; mov al, 0x34
    e643     ; out 0x43, al
    b0a9     ; mov al, 0xa9
    e640     ; out 0x40, al
    b004     ; mov al, 4
    e640     ; out 0x40, al
    fb       ; sti
             ; wait:
    f4       ; hlt
    4983ff0a ; cmp r15, 10
    72f9     ; jb wait
    fa       ; cli
    f4       ; hlt
    """)
    guest.run(program)
    assert guest.r15 == 10
    # 1193 counts of 1.193182 MHz are a millisecond.
    assert 9_990_000 < guest.platform.clock.now < 10_050_000


def test_a_periodic_timer_interrupts_code_at_its_rate(guest: Guest) -> None:
    arm(guest, periodic=True)
    program = code("""
    4983ff14 ; cmp r15, 20
    72fa     ; jb .-4
    fa       ; cli
    f4       ; hlt
    """)
    guest.run(program, rflags=IF | 2)
    assert guest.r15 == 20
    assert 0 <= guest.platform.clock.now - 20 * ARMED < 2000


def test_the_time_stamp_counter_never_goes_back_and_delays_end_soon(
    guest: Guest,
) -> None:
    arm(guest, periodic=True)
    program = code("""
    0f31     ; rdtsc
    48c1e220 ; shl rdx, 32
    4809d0   ; or rax, rdx
    4889c3   ; mov rbx, rax
    4889c6   ; mov rsi, rax
             ; again:
    0f31     ; rdtsc
    48c1e220 ; shl rdx, 32
    4809d0   ; or rax, rdx
    4839f0   ; cmp rax, rsi
    720d     ; jb back
    4889c6   ; mov rsi, rax
    4829d8   ; sub rax, rbx
    4839f8   ; cmp rax, rdi
    72e7     ; jb again
    fa       ; cli
    f4       ; hlt
             ; back:
    0f0b     ; ud2
    """)
    guest.run(program, rflags=IF | 2, rdi=100_000_000)
    assert guest.vector is None
    assert guest.r15 == 100
    reads = guest.core.exits.counts[0x6E]
    assert 100_000_000 // 2_100 < reads < 70_000


def test_stack_pointer_is_restored_by_every_interrupt(guest: Guest) -> None:
    arm(guest, periodic=True, after=20_000)
    program = code("""
                   ; again:
    4981ffc8000000 ; cmp r15, 200
    72f7           ; jb again
    fa             ; cli
    f4             ; hlt
    """)
    guest.run(program, rflags=IF | 2)
    assert guest.rsp == STACK
