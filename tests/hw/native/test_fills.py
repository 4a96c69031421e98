"""TLB fills: what the guest's tables get, what stays cached, what is refused."""

import pytest

from cbit.hw.native import Ending

from .guests import (
    CODE,
    DATA,
    NX,
    RW,
    US,
    A,
    D,
    G,
    Guest,
    P,
    code,
)

PAGE, OTHER = 0x40_1000_0000, 0x40_2000_5000
SMEP, SMAP = 1 << 20, 1 << 21
LOAD = code("""
    488b03 ; mov rax, [rbx]
    f4     ; hlt
    """)
STORE = code("""
    488903 ; mov [rbx], rax
    f4     ; hlt
    """)
CALL = code("""
    ffd3 ; call rbx
    f4   ; hlt
    """)
RETURN = code("""
    c3 ; ret
    """)
LOAD_STORE = code("""
    488b03 ; mov rax, [rbx]
    48890b ; mov [rbx], rcx
    f4     ; hlt
    """)


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_load_sets_a_and_a_store_d(guest: Guest) -> None:
    at = guest.map(PAGE, DATA)
    guest.run(LOAD, rbx=PAGE)
    assert guest.cpu.load64(at) & (A | D) == A
    guest.run(STORE, rbx=PAGE)
    assert guest.cpu.load64(at) & (A | D) == A | D


def test_a_store_to_a_page_that_was_loaded_before_sets_d(guest: Guest) -> None:
    at = guest.map(PAGE, DATA)
    guest.run(LOAD_STORE, rbx=PAGE, rcx=5)
    assert guest.cpu.load64(at) & (A | D) == A | D
    assert guest.cpu.load64(DATA) == 5


def test_a_refused_access_sets_no_bit_in_the_leaf(guest: Guest) -> None:
    at = guest.map(PAGE, DATA, P)
    guest.run(STORE, rbx=PAGE)
    assert guest.vector == 14
    assert guest.cpu.load64(at) == DATA | P


def test_a_store_through_a_page_filled_by_a_load_reaches_dram(guest: Guest) -> None:
    guest.map(PAGE, DATA, P | RW | guest.c)
    guest.machine.caches.write_back_invalidate()
    before = guest.machine.snoop(DATA, 4096)
    guest.run(LOAD_STORE, rbx=PAGE, rcx=0x1234)
    assert guest.machine.snoop(DATA, 4096) == before
    guest.machine.caches.drain()
    after = guest.machine.snoop(DATA, 4096)
    assert after != before
    assert after[:2] != b"\x34\x12"
    assert guest.cpu.load64(PAGE) == 0x1234
    # The lines are clean now: the next store is noticed again.
    guest.run(STORE, rbx=PAGE, rax=0x5678)
    guest.machine.caches.drain()
    assert guest.machine.snoop(DATA, 16) != after[:16]


def test_a_stale_translation_lives_until_invlpg(guest: Guest) -> None:
    at = guest.map(PAGE, DATA)
    guest.cpu.store64(DATA, 1)
    guest.cpu.store64(DATA + 4096, 2)
    program = code("""
    488b03 ; mov rax, [rbx]
    48893e ; mov [rsi], rdi
    488b0b ; mov rcx, [rbx]
    0f013b ; invlpg [rbx]
    488b13 ; mov rdx, [rbx]
    f4     ; hlt
    """)
    guest.run(program, rbx=PAGE, rsi=at, rdi=DATA + 4096 | P | RW)
    assert (guest.rax, guest.rcx, guest.rdx) == (1, 1, 2)


@pytest.mark.parametrize("piece", [0, 0x1000, 0x1F_F000])
def test_invlpg_of_a_large_page_drops_all_pieces(guest: Guest, piece: int) -> None:
    at = guest.map(PAGE, 0x40_0000, shift=21)
    for base in (0x40_0000, 0x60_0000):
        for offset in (0, 0x1000, 0x1F_F000):
            guest.cpu.store64(base + offset, base + offset)
    program = code("""
    488b03         ; mov rax, [rbx]
    488b8300100000 ; mov rax, [rbx+0x1000]
    488b8300f01f00 ; mov rax, [rbx+0x1ff000]
    48893e         ; mov [rsi], rdi
    410f0138       ; invlpg [r8]
    488b03         ; mov rax, [rbx]
    488b8b00100000 ; mov rcx, [rbx+0x1000]
    488b9300f01f00 ; mov rdx, [rbx+0x1ff000]
    f4             ; hlt
    """)
    new = 0x60_0000 | P | RW | 0x80
    guest.run(program, rbx=PAGE, rsi=at, rdi=new, r8=PAGE + piece)
    assert (guest.rax, guest.rcx, guest.rdx) == (0x60_0000, 0x60_1000, 0x7F_F000)


def run_two_pages(guest: Guest, program: bytes, **registers: int) -> tuple[int, int]:
    """Fill a global and a local page, change both entries, run, load both again.

    The program's page is global as well, or its own drop would take everything.
    """
    for va, flags in ((PAGE, P | RW | G), (OTHER, P | RW)):
        guest.map(va, DATA, flags)
    guest.cpu.store64(DATA, 1)
    guest.cpu.store64(DATA + 4096, 2)
    identity = 0x8_3000 + 8 * (CODE >> 21)
    guest.cpu.store64(identity, guest.cpu.load64(identity) | G)
    before = code("""
    488b03 ; mov rax, [rbx]
    498b00 ; mov rax, [r8]
    4c890e ; mov [rsi], r9
    4c8917 ; mov [rdi], r10
    """)
    after = code("""
    488b03 ; mov rax, [rbx]
    498b10 ; mov rdx, [r8]
    f4     ; hlt
    """)
    stop = guest.run(
        before + program + after,
        rbx=PAGE,
        r8=OTHER,
        rsi=guest.entry_address(PAGE),
        rdi=guest.entry_address(OTHER),
        r9=DATA + 4096 | P | RW | G,
        r10=DATA + 4096 | P | RW,
        **registers,
    )
    assert stop.ending is Ending.HALTED
    assert guest.vector is None
    return guest.rax, guest.rdx


def test_global_pages_survive_a_write_of_cr3_and_others_do_not(guest: Guest) -> None:
    program = code("""
    0f20d9 ; mov rcx, cr3
    0f22d9 ; mov cr3, rcx
    """)
    assert run_two_pages(guest, program) == (1, 2)


def test_a_toggle_of_pge_drops_global_pages_too(guest: Guest) -> None:
    program = code("""
    0f20e1         ; mov rcx, cr4
    4881f180000000 ; xor rcx, 0x80
    0f22e1         ; mov cr4, rcx
    4881f180000000 ; xor rcx, 0x80
    0f22e1         ; mov cr4, rcx
    """)
    assert run_two_pages(guest, program) == (2, 2)


def test_invlpg_drops_global_pages_and_only_the_one(guest: Guest) -> None:
    program = code("""
    0f013b ; invlpg [rbx]
    """)
    assert run_two_pages(guest, program) == (2, 1)


def test_a_write_of_cr3_drops_code_that_is_not_global(guest: Guest) -> None:
    at = guest.map(PAGE, DATA)
    for frame, number in ((DATA, 1), (DATA + 4096, 2)):
        guest.place(frame, b"\xb8" + number.to_bytes(4, "little") + RETURN)
    program = code("""
    ffd3   ; call rbx
    48893e ; mov [rsi], rdi
    0f20d9 ; mov rcx, cr3
    0f22d9 ; mov cr3, rcx
    ffd3   ; call rbx
    f4     ; hlt
    """)
    guest.run(program, rbx=PAGE, rsi=at, rdi=DATA + 4096 | P | RW)
    assert guest.rax == 2


def test_user_code_of_one_address_space_is_not_run_in_the_next(guest: Guest) -> None:
    for frame, number in ((DATA, 1), (DATA + 0x2000, 2)):
        guest.run_user(
            b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x0b", frame=frame
        )
        assert guest.rax == number
        reload = code("""
    0f20d9 ; mov rcx, cr3
    0f22d9 ; mov cr3, rcx
    f4     ; hlt
    """)
        guest.run(reload)


def test_invlpg_drops_code(guest: Guest) -> None:
    at = guest.map(PAGE, DATA)
    for frame, number in ((DATA, 1), (DATA + 4096, 2)):
        guest.place(frame, b"\xb8" + number.to_bytes(4, "little") + RETURN)
    program = code("""
    ffd3   ; call rbx
    48893e ; mov [rsi], rdi
    0f013b ; invlpg [rbx]
    ffd3   ; call rbx
    f4     ; hlt
    """)
    guest.run(program, rbx=PAGE, rsi=at, rdi=DATA + 4096 | P | RW)
    assert guest.rax == 2


@pytest.mark.parametrize(
    ("cr4", "flags", "program", "error_code"),
    [
        (SMEP, P | RW | US, CALL, 0x11),
        (SMAP, P | RW | US, LOAD, 0x01),
        (SMAP, P | RW | US, STORE, 0x03),
        (0, P | RW | NX, CALL, 0x11),
        (0, P | US, STORE, 0x03),
    ],
)
def test_protections_of_the_mode_refuse(
    cr4: int, flags: int, program: bytes, error_code: int
) -> None:
    guest = Guest(cr4=cr4)
    guest.map(PAGE, DATA, flags)
    guest.cpu.store(DATA, RETURN)
    guest.run(program, rbx=PAGE)
    assert (guest.vector, guest.error_code) == (14, error_code)


def test_without_them_the_same_accesses_pass(guest: Guest) -> None:
    guest.map(PAGE, DATA, P | RW | US)
    guest.cpu.store(DATA, RETURN)
    for program in (CALL, LOAD, STORE):
        guest.run(program, rbx=PAGE)
        assert guest.vector is None
    guest.map(OTHER, DATA, P)
    clear = code("""
    0f20c1         ; mov rcx, cr0
    4881e1fffffeff ; and rcx, 0xfffffffffffeffff
    0f22c1         ; mov cr0, rcx
    """)
    guest.run(clear + STORE, rbx=OTHER, rax=3)
    assert guest.vector is None
    assert guest.cpu.load64(DATA) == 3


def test_stac_lifts_smap_and_clac_brings_it_back() -> None:
    guest = Guest(cr4=SMAP)
    guest.map(PAGE, DATA, P | RW | US)
    guest.cpu.store64(DATA, 9)
    program = code("""
    0f01cb   ; stac
    488b03   ; mov rax, [rbx]
    48894308 ; mov [rbx+8], rax
    0f01ca   ; clac
    488b0b   ; mov rcx, [rbx]
    """)
    guest.run(program, rbx=PAGE)
    assert guest.rax == 9
    assert (guest.vector, guest.error_code) == (14, 1)
    assert guest.frame(error_code=True).rip == CODE + 13


def test_a_long_copy_under_stac_does_not_lift_smap_for_later_accesses() -> None:
    guest = Guest(cr4=SMAP)
    for page in range(4):
        guest.map(PAGE + page * 4096, DATA + page * 4096, P | RW | US)
    guest.map(OTHER, DATA + 0x8000, P | RW | US)
    program = code("""
    0f01cb     ; stac
    4889df     ; mov rdi, rbx
    b900080000 ; mov ecx, 0x800
    f348ab     ; rep stosq
    0f01ca     ; clac
    488b0a     ; mov rcx, [rdx]
    """)
    guest.run(program, rbx=PAGE, rdx=OTHER)
    assert guest.core._bulk.performed == 1
    assert (guest.vector, guest.error_code) == (14, 1)


def test_five_levels_reach_57_bits() -> None:
    guest = Guest(model="epyc-9654", five_levels=True)
    va = 0x00FE_1234_5678_9000
    at = guest.map(va, DATA)
    guest.run(STORE, rbx=va + 8, rax=77)
    assert guest.vector is None
    assert guest.cpu.load64(DATA + 8) == 77
    assert guest.cpu.load64(at) & (A | D) == A | D
    guest.run(LOAD, rbx=1 << 56)
    assert guest.vector == 13


def test_a_second_mapping_of_code_that_forbids_execution_is_refused(
    guest: Guest,
) -> None:
    guest.map(PAGE, DATA, P | RW)
    guest.map(OTHER, DATA, P | RW | NX)
    guest.place(DATA, RETURN)
    program = code("""
    ffd3   ; call rbx
    418a00 ; mov al, [r8]
    418800 ; mov [r8], al
    ffd3   ; call rbx
    418a00 ; mov al, [r8]
    41ffd0 ; call r8
    """)
    guest.run(program, rbx=PAGE, r8=OTHER)
    assert (guest.vector, guest.error_code) == (14, 0x11)
    assert guest.frame(error_code=True).rip == OTHER


def test_a_store_from_the_page_before_does_not_make_a_page_executable(
    guest: Guest,
) -> None:
    # The code's neighbour is an alias of code, not executable here.
    guest.map(PAGE, DATA, P | RW)
    guest.map(PAGE + 4096, DATA + 4096, P | RW | NX)
    guest.map(OTHER, DATA + 4096, P | RW)
    guest.place(DATA + 4096, RETURN)
    program = code("""
    41ffd0 ; call r8
    8a03   ; mov al, [rbx]
    8803   ; mov [rbx], al
    ffe3   ; jmp rbx
    """)
    guest.place(DATA, program)
    guest.run(at=PAGE, rbx=PAGE + 4096, r8=OTHER)
    assert (guest.vector, guest.error_code) == (14, 0x11)
    assert guest.frame(error_code=True).rip == PAGE + 4096


def test_readable_pages_of_many_kinds_keep_their_rights(guest: Guest) -> None:
    # An execute-only view does not exist: code can be read, never stored to.
    guest.map(PAGE, DATA, P)
    guest.place(DATA, RETURN)
    program = code("""
    ffd3 ; call rbx
    8a03 ; mov al, [rbx]
    8803 ; mov [rbx], al
    """)
    guest.run(program, rbx=PAGE)
    assert guest.rax & 0xFF == 0xC3
    assert (guest.vector, guest.error_code) == (14, 3)
