"""Code that changes: by the guest, through any mapping, and by Python."""

import pytest

from cbit.hw.native import Ending

from .guests import CODE, DATA, RW, Guest, P, code

PAGE, ALIAS = 0x40_1000_0000, 0x40_2000_5000
ONE = bytes.fromhex("b801000000c3")  # mov eax, 1; ret
TWO = bytes.fromhex("b802000000c3")
PATCH_AND_CALL = code("""
    ffd3     ; call rbx
    4989c0   ; mov r8, rax
    c6420102 ; mov byte ptr [rdx+1], 2
    ffd3     ; call rbx
    4989c1   ; mov r9, rax
    c6420103 ; mov byte ptr [rdx+1], 3
    ffd3     ; call rbx
    f4       ; hlt
    """)


@pytest.fixture
def guest() -> Guest:
    guest = Guest()
    guest.map(PAGE, DATA)
    guest.map(ALIAS, DATA)
    return guest


@pytest.mark.parametrize("store", [PAGE, ALIAS, DATA])
def test_a_patched_instruction_of_another_page_runs_anew(
    guest: Guest, store: int
) -> None:
    guest.place(DATA, ONE)
    guest.run(PATCH_AND_CALL, rbx=PAGE, rdx=store)
    assert (guest.r8, guest.r9, guest.rax) == (1, 2, 3)


@pytest.mark.parametrize("store", [0, 1, 2])
def test_a_patched_instruction_of_the_own_page_runs_anew(
    guest: Guest, store: int
) -> None:
    guest.place(DATA, PATCH_AND_CALL)
    guest.place(DATA + 0x800, ONE)
    guest.run(at=PAGE, rbx=PAGE + 0x800, rdx=(PAGE, ALIAS, DATA)[store] + 0x800)
    assert (guest.r8, guest.r9, guest.rax) == (1, 2, 3)


def test_an_instruction_that_is_patched_right_before_it_runs_is_the_new_one(
    guest: Guest,
) -> None:
    # Source: [APM2] 7.6.1: stores to the own instruction stream, same address.
    program = code("""
    b905000000   ; mov ecx, 5
    31db         ; xor ebx, ebx
                 ; again:
    fe0501000000 ; inc byte ptr [rip+1]
    b000         ; mov al, 0
    0fb6c0       ; movzx eax, al
    01c3         ; add ebx, eax
    ffc9         ; dec ecx
    75ef         ; jnz again
    f4           ; hlt
    """)
    guest.place(DATA, program)
    guest.run(at=PAGE)
    assert guest.rbx == 1 + 2 + 3 + 4 + 5


def test_an_instruction_across_two_pages_is_patched_in_both(guest: Guest) -> None:
    guest.map(PAGE + 4096, DATA + 4096)
    guest.map(ALIAS + 4096, DATA + 0x2000)
    start = 4096 - 3
    guest.place(DATA + start, ONE)
    program = code("""
    ffd3     ; call rbx
    4989c0   ; mov r8, rax
    c6430301 ; mov byte ptr [rbx+3], 1
    ffd3     ; call rbx
    4989c1   ; mov r9, rax
    c6430107 ; mov byte ptr [rbx+1], 7
    ffd3     ; call rbx
    f4       ; hlt
    """)
    guest.run(program, rbx=PAGE + start)
    assert (guest.r8, guest.r9, guest.rax) == (1, 0x10001, 0x10007)


def test_a_block_that_reaches_into_the_next_page_patches_itself_there(
    guest: Guest,
) -> None:
    guest.map(PAGE + 4096, DATA + 4096)
    program = code("""
    90             ; nop
    90             ; nop
    90             ; nop
    90             ; nop
    c6050100000009 ; mov byte ptr [rip+1], 9
    b000           ; mov al, 0
    f4             ; hlt
    """)
    start = 4096 - 4
    for _ in range(2):
        guest.place(DATA + start, program)
        guest.run(at=PAGE + start)
        assert guest.rax & 0xFF == 9


@pytest.mark.parametrize("width", ["b", "q"])
def test_code_written_by_a_string_instruction_runs_anew(
    guest: Guest, width: str
) -> None:
    for page in range(1, 4):
        guest.map(PAGE + page * 4096, DATA + page * 4096)
    source = 0x60_0000
    guest.place(DATA + 0x1000, ONE)
    guest.cpu.store(source + 0x1000, TWO)
    program = code("""
    ffd3   ; call rbx
    4989c0 ; mov r8, rax
    f3a4   ; rep movsb
    ffd3   ; call rbx
    f4     ; hlt
    """)
    if width == "q":
        program = program.replace(b"\xf3\xa4", b"\xf3\x48\xa5")
    count = 0x3000 // (8 if width == "q" else 1)
    guest.run(program, rbx=PAGE + 0x1000, rdi=PAGE, rsi=source, rcx=count)
    assert (guest.r8, guest.rax) == (1, 2)
    assert guest.core._bulk.performed == 1


def test_code_filled_by_a_string_instruction_runs_anew(guest: Guest) -> None:
    for page in range(1, 4):
        guest.map(PAGE + page * 4096, DATA + page * 4096)
    guest.place(DATA + 0x1000, ONE)
    program = code("""
    ffd3       ; call rbx
    4989c0     ; mov r8, rax
    b8909090c3 ; mov eax, 0xc3909090
    f3ab       ; rep stosd
    b805000000 ; mov eax, 5
    ffd3       ; call rbx
    f4         ; hlt
    """)
    guest.run(program, rbx=PAGE + 0x1000, rdi=PAGE, rcx=0x3000 // 4)
    assert (guest.r8, guest.rax) == (1, 5)
    assert guest.core._bulk.performed == 1


def test_code_that_python_stores_between_runs_is_executed(guest: Guest) -> None:
    call = code("""
    ffd3 ; call rbx
    f4   ; hlt
    """)
    guest.place(DATA, ONE)
    guest.run(call, rbx=PAGE)
    assert guest.rax == 1
    guest.cpu.store(DATA, TWO)
    guest.core.filler.changed(0, DATA >> 12, (DATA >> 12) + 1)
    guest.run(call, rbx=PAGE)
    assert guest.rax == 2


def test_a_loop_sees_what_it_stores_over_its_own_exit(guest: Guest) -> None:
    program = code("""
    b964000000         ; mov ecx, 100
                       ; again:
    ffc9               ; dec ecx
    83f932             ; cmp ecx, 50
    75f9               ; jne again
    66c705fcffffff9090 ; mov word ptr [rip-4], 0x9090
    ebee               ; jmp again
    """)
    # The store makes `jne` two NOPs; the next pass would store and jump for ever, so
    # the JMP is overwritten by HLT first.
    program = program[:-2]
    halt = code("""
    c60500000000f4 ; mov byte ptr [rip], 0xf4
    ebfe           ; jmp .
    """)
    guest.place(DATA, program + halt)
    stop = guest.run(at=PAGE)
    assert stop.ending is Ending.HALTED
    assert guest.rcx == 50


def test_data_in_the_page_of_the_code_is_stored_exactly(guest: Guest) -> None:
    program = code("""
    b92c010000     ; mov ecx, 300
    488d3d00040000 ; lea rdi, [rip+0x400]
                   ; again:
    48890ccf       ; mov [rdi+rcx*8], rcx
    480304cf       ; add rax, [rdi+rcx*8]
    ffc9           ; dec ecx
    75f4           ; jnz again
    f4             ; hlt
    """)
    guest.place(DATA, program)
    guest.run(at=PAGE, rax=0)
    assert guest.rax == 300 * 301 // 2


def test_a_page_that_was_code_becomes_data_and_code_again(guest: Guest) -> None:
    guest.place(DATA, ONE)
    program = code("""
    b914000000 ; mov ecx, 20
               ; again:
    ffd3       ; call rbx
    4901c0     ; add r8, rax
    fe4201     ; inc byte ptr [rdx+1]
    ffc9       ; dec ecx
    75f4       ; jnz again
    f4         ; hlt
    """)
    guest.run(program, rbx=PAGE, rdx=ALIAS, r8=0)
    assert guest.r8 == sum(range(1, 21))
    assert guest.cpu.load(DATA, 2) == bytes((0xB8, 21))


def test_two_mappings_run_the_same_frame(guest: Guest) -> None:
    guest.place(DATA, ONE)
    program = code("""
    ffd3     ; call rbx
    ffd2     ; call rdx
    c6430104 ; mov byte ptr [rbx+1], 4
    ffd2     ; call rdx
    4989c0   ; mov r8, rax
    c6420105 ; mov byte ptr [rdx+1], 5
    ffd3     ; call rbx
    f4       ; hlt
    """)
    guest.run(program, rbx=PAGE, rdx=ALIAS)
    assert (guest.r8, guest.rax) == (4, 5)


def test_a_frame_that_changed_under_another_address_space_is_run_anew(
    guest: Guest,
) -> None:
    # The mapping of the code goes away while the frame is written.
    at = guest.entry_address(PAGE)
    guest.place(DATA, ONE)
    program = code("""
    ffd3           ; call rbx
    4989c0         ; mov r8, rax
    4c8b0e         ; mov r9, [rsi]
    48c70600000000 ; mov qword ptr [rsi], 0
    0f013b         ; invlpg [rbx]
    c6420106       ; mov byte ptr [rdx+1], 6
    4c890e         ; mov [rsi], r9
    ffd3           ; call rbx
    f4             ; hlt
    """)
    guest.run(program, rbx=PAGE, rdx=ALIAS, rsi=at)
    assert (guest.r8, guest.rax) == (1, 6)


def test_code_of_two_privileges_in_one_frame_changes_for_both(guest: Guest) -> None:
    guest.place(DATA + 0x3000, ONE)
    guest.map(PAGE, DATA + 0x3000, P | RW)
    call = code("""
    ffd3     ; call rbx
    c6430108 ; mov byte ptr [rbx+1], 8
    f4       ; hlt
    """)
    guest.run(call, rbx=PAGE)
    assert guest.rax == 1
    guest.run(call, rbx=PAGE)
    assert guest.rax == 8
    assert guest.rip == CODE + len(call)
