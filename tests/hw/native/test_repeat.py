"""The same guest twice is the same to the event; so it is in parts and from a file."""

from __future__ import annotations

import io
from typing import Any

import pytest

from cbit.hw.devices import lapic
from cbit.hw.native import Ending, Stop
from cbit.hw.snapshot import load_snapshot, save_snapshot
from cbit.hw.trace import Event

from .guests import CODE, DATA, IF, RW, Guest, P, code

SECRET, PLAIN = 0x40_1000_0000, 0x40_2000_5000
VECTOR, APIC = 0x40, 0xFEE0_0000
ROUNDS = 400

HANDLER = code("""
    49ffc7               ; inc r15
    41c786b000000000000000 ; mov dword ptr [r14+0xb0], 0
    48cf                 ; iretq
    """)
WORK = code("""
               ; again:
    0f31       ; rdtsc
    48c1e220   ; shl rdx, 32
    4809d0     ; or rax, rdx
    4c39d0     ; cmp rax, r10
    7238       ; jb back
    4989c2     ; mov r10, rax
    4d8d644401 ; lea r12, [r12+rax*2+1]
    e440       ; in al, 0x40
    4901c4     ; add r12, rax
    ba08060000 ; mov edx, 0x608
    ed         ; in eax, dx
    4901c5     ; add r13, rax
    660fd4ca   ; paddq xmm1, xmm2
    4c8923     ; mov [rbx], r12
    4d3329     ; xor r13, [r9]
    88c8       ; mov al, cl
    e6e9       ; out 0xe9, al
    bf2c010000 ; mov edi, 300
               ; spin:
    ffcf       ; dec edi
    75fc       ; jnz spin
    ffc9       ; dec ecx
    75c1       ; jnz again
    66480f7ece ; movq rsi, xmm1
    fa         ; cli
    f4         ; hlt
               ; back:
    0f0b       ; ud2
    """)
START = code("""
    48c7c003000000 ; mov rax, 3
    66480f6ed0     ; movq xmm2, rax
    660fefc9       ; pxor xmm1, xmm1
    """)

Outcome = dict[str, Any]


def prepared(seed: int = 7, *, coherent: bool = True, program: bytes = WORK) -> Guest:
    """Return a guest that stands before its first instruction."""
    guest = Guest(seed=seed, coherent=coherent)
    guest.map(SECRET, DATA, P | RW | guest.c)
    guest.map(PLAIN, DATA)
    guest.handler(VECTOR, HANDLER)
    guest.place(CODE, START + program)
    apic = guest.platform.lapic
    apic.write_register(lapic.SVR, 0x1FF)
    apic.write_register(lapic.DIVIDE, 0b1011)
    apic.write_register(lapic.LVT_TIMER, VECTOR | 1 << 17)
    apic.write_register(lapic.INITIAL_COUNT, 1_321)
    guest.set(rax=0, rcx=ROUNDS, rdx=0, rbx=SECRET, rsi=0, rdi=0, rbp=0, rsp=0x11_0000)
    guest.set(r8=0, r9=PLAIN, r10=0, r11=0, r12=0, r13=0, r14=APIC, r15=0)
    guest.core.state.rflags = IF | 2
    guest.core.state.rip = CODE
    return guest


def plain_events(events: list[Event]) -> list[tuple[str, dict[str, int | str]]]:
    return [(event.kind, dict(event.facts)) for event in events]


def outcome(guest: Guest) -> Outcome:
    return {
        "registers": list(guest.regs),
        "rflags": guest.core.state.rflags,
        "rip": guest.rip,
        "total": guest.core.block_clock.total,
        "now": guest.platform.clock.now,
        "interrupts": guest.core.interrupts,
        "devices": guest.platform.state(),
        "memory": guest.cpu.load(DATA, 4096),
        "cells": guest.machine.snoop(DATA, 4096),
    }


def finish(guest: Guest) -> Stop:
    stop = guest.core.run(30)
    assert stop == Stop(Ending.HALTED, "HLT with interrupts disabled")
    assert guest.vector is None
    return stop


def run_until(guest: Guest, number: int) -> None:
    """Stop at the end of the slice of this number."""
    slices = 0

    def count() -> None:
        nonlocal slices
        slices += 1
        if slices == number:
            guest.core.stop("enough")

    guest.core.every_slice = count
    assert guest.core.run(30) == Stop(Ending.STOPPED, "enough")
    guest.core.every_slice = lambda: None


@pytest.mark.parametrize("coherent", [True, False])
def test_two_runs_are_the_same_to_the_event(coherent: bool) -> None:
    first, second = (prepared(coherent=coherent) for _ in range(2))
    finish(first)
    finish(second)
    assert first.r15 > 20
    assert first.rsi == 3 * ROUNDS
    assert plain_events(first.events) == plain_events(second.events)
    assert first.events
    assert first.console == second.console
    assert outcome(first) == outcome(second)


def test_another_seed_changes_ciphertext_and_not_the_time() -> None:
    first, second = prepared(7), prepared(8)
    finish(first)
    finish(second)
    assert first.machine.snoop(DATA, 64) != second.machine.snoop(DATA, 64)
    assert first.core.block_clock.total == second.core.block_clock.total
    assert first.core.interrupts == second.core.interrupts


@pytest.mark.parametrize("number", [1, 3, 10])
def test_a_run_in_parts_is_the_run(number: int) -> None:
    whole, parts = prepared(), prepared()
    finish(whole)
    for _ in range(5):
        run_until(parts, number)
    finish(parts)
    assert plain_events(parts.events) == plain_events(whole.events)
    assert outcome(parts) == outcome(whole)


def revived(guest: Guest) -> Guest:
    """Return a guest from a snapshot of this one."""
    file = io.BytesIO()
    extra = {"core": guest.core.save(), "platform": guest.platform.state()}
    save_snapshot(file, guest.machine, extra)
    file.seek(0)
    machine, kept = load_snapshot(file, "memory")
    other = Guest(machine=machine)
    platform, core = kept["platform"], kept["core"]
    assert isinstance(platform, dict)
    assert isinstance(core, dict)
    other.platform.restore(platform)
    other.core.restore(core)
    return other


@pytest.mark.parametrize("number", [1, 5, 17])
def test_a_snapshot_goes_on_exactly(number: int) -> None:
    whole = prepared()
    finish(whole)
    first = prepared()
    run_until(first, number)
    second = revived(first)
    assert second.core.block_clock.total == first.core.block_clock.total
    del first.events[:]
    first.console.clear()
    finish(first)
    finish(second)
    assert second.rsi == 3 * ROUNDS  # SSE registers came along
    assert outcome(second) == outcome(first) == outcome(whole)
    assert plain_events(second.events) == plain_events(first.events)
    assert second.console == first.console


def test_a_snapshot_in_the_middle_of_a_string_instruction_goes_on_exactly() -> None:
    program = code("""
    b900000600 ; mov ecx, 0x60000
    bf00004000 ; mov edi, 0x400000
    be00006000 ; mov esi, 0x600000
    f3a4       ; rep movsb
    b900800000 ; mov ecx, 0x8000
    66f3ab     ; rep stosw
    0f31       ; rdtsc
    89c6       ; mov esi, eax
    fa         ; cli
    f4         ; hlt
    """)
    first = prepared(program=program)
    run_until(first, 1)
    second = revived(first)
    finish(first)
    finish(second)
    assert outcome(first) == outcome(second)


def test_msrs_that_the_engine_holds_come_along() -> None:
    first = prepared()
    for index in (0xC000_0100, 0xC000_0101, 0xC000_0102):
        first.cpu.wrmsr(index, index << 8)
    second = revived(first)
    for index in (0xC000_0100, 0xC000_0101, 0xC000_0102):
        assert second.cpu.rdmsr(index) == index << 8


def test_a_snapshot_of_user_mode_goes_on_there() -> None:
    first = Guest()
    program = code("""
                   ; again:
    48ffc3         ; inc rbx
    4881fbc0c62d00 ; cmp rbx, 3000000
    72f4           ; jb again
    0f0b           ; ud2
    """)
    first.core.every_slice = lambda: first.core.stop("enough")
    assert first.run_user(program, rbx=0).ending is Ending.STOPPED
    assert first.core.state.cpl == 3
    second = revived(first)
    first.core.every_slice = lambda: None
    for guest in (first, second):
        assert guest.core.run(20).ending is Ending.HALTED
        assert guest.vector == 6
        assert guest.rbx == 3_000_000
    assert first.core.block_clock.total == second.core.block_clock.total
