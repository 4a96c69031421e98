"""The engine's private state: found and checked, or refused."""

import struct

import pytest

from cbit.hw.native import EngineError, engine, state
from cbit.hw.native.engine import Engine
from cbit.hw.native.state import EngineState

from .guests import CODE, Guest, code


@pytest.mark.parametrize(
    "name",
    ["_STATE_SIZE", "_DR", "_NO_EXIT_REQUEST", "_ICOUNT", "_ENV", "_CPU_POINTER"],
)
def test_another_layout_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, name, getattr(state, name) - 8)
    with pytest.raises(EngineError, match=r"unicorn: "):
        EngineState(Engine())


def test_every_instance_has_its_state_at_the_same_distance() -> None:
    # A search by pattern once took a neighbour on the heap for the processor.
    engines = []
    for number in range(60):
        engines.append((Engine(), bytearray(1000 * (number % 37))))
        view = EngineState(engines[-1][0])
        head = view._cpu.cast("I")
        assert list(head[7:8]) == [0]  # no interrupt is requested
        if number % 5 == 0:
            engines.pop(0)[0].close()


def test_another_version_of_the_library_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.setattr(engine, "UNICORN_VERSION", "2.2.0")
    with pytest.raises(EngineError, match=r"unicorn 2\.1\.4: 2\.2\.0 expected"):
        Engine()


def test_registers_are_where_machine_code_leaves_them() -> None:
    guest = Guest()
    program = code("""
    48b81716151413121110 ; mov rax, 0x1011121314151617
    4989c7               ; mov r15, rax
    fd                   ; std
    f9                   ; stc
    f4                   ; hlt
    """)
    guest.run(program)
    view = guest.core.state
    assert view.regs[0] == view.regs[15] == 0x1011_1213_1415_1617
    assert view.rflags & 0x401 == 0x401
    assert view.direction_down
    assert view.rip == CODE + len(program)
    assert view.cpl == 0
    assert view.cr(3) == guest.root


def test_debug_registers_are_those_of_the_guest() -> None:
    guest = Guest()
    program = code("""
    0f23c0 ; mov dr0, rax
    0f23db ; mov dr3, rbx
    f4     ; hlt
    """)
    guest.run(program, rax=0x1234, rbx=0x5678)
    registers = guest.core.state.debug_registers
    assert (registers[0], registers[3]) == (0x1234, 0x5678)
    guest.core.state.debug_registers = [9, *registers[1:]]
    read = code("""
    0f21c1 ; mov rcx, dr0
    f4     ; hlt
    """)
    guest.run(read)
    assert guest.rcx == 9


def test_saved_registers_come_back_with_flags_and_sse() -> None:
    guest = Guest()
    load = code("""
    66480f6ef8 ; movq xmm7, rax
    d9eb       ; fldpi
    4839c0     ; cmp rax, rax
    fd         ; std
    f4         ; hlt
    """)
    store = code("""
    66480f7efb ; movq rbx, xmm7
    9c         ; pushfq
    59         ; pop rcx
    4883ec08   ; sub rsp, 8
    dd1c24     ; fstp qword ptr [rsp]
    5a         ; pop rdx
    f4         ; hlt
    """)
    guest.run(load, rax=0xABCD)
    saved = guest.core.state.save()
    spoil = code("""
    660fefff ; pxor xmm7, xmm7
    dbe3     ; fninit
    83c801   ; or eax, 1
    fc       ; cld
    f4       ; hlt
    """)
    guest.run(spoil)
    guest.core.state.restore(saved)
    guest.place(CODE, store)
    guest.core.state.rip = CODE
    guest.core.run(5)
    assert guest.rbx == 0xABCD
    assert guest.rcx & 0x440 == 0x440  # DF and ZF
    assert struct.pack("<Q", guest.rdx) == struct.pack("<d", 3.141592653589793)


def test_a_state_of_another_length_is_refused() -> None:
    guest = Guest()
    with pytest.raises(EngineError, match="expected"):
        guest.core.state.restore(bytes(100))
