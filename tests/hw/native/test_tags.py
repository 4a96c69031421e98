"""C-bits in machine code: two tags of one frame, flushes, tables by the wrong tag."""

import pytest

from .guests import CODE, DATA, RW, Guest, P, code

PLAIN, SECRET = 0x40_1000_0000, 0x40_2000_5000
STORE_LOAD = code("""
    488903 ; mov [rbx], rax
    488b0a ; mov rcx, [rdx]
    f4     ; hlt
    """)
FLUSH = code("""
    0f09 ; wbinvd
    f4   ; hlt
    """)
LOAD = code("""
    488b03 ; mov rax, [rbx]
    f4     ; hlt
    """)


def guest_with_both(*, coherent: bool, hazards: str = "record") -> Guest:
    guest = Guest(coherent=coherent, hazards=hazards)
    guest.map(PLAIN, DATA)
    guest.map(SECRET, DATA, P | RW | guest.c)
    return guest


def test_a_coherent_part_shows_ciphertext_to_the_other_tag_at_once() -> None:
    guest = guest_with_both(coherent=True)
    guest.run(STORE_LOAD, rbx=SECRET, rdx=PLAIN, rax=0x1122_3344)
    assert guest.rcx != 0x1122_3344
    assert guest.rcx.to_bytes(8, "little") == guest.machine.snoop(DATA, 8)
    assert "tag-change" in guest.event_kinds()
    guest.run(LOAD, rbx=SECRET)
    assert guest.rax == 0x1122_3344
    assert not guest.machine.caches.hazards_met


def test_tags_change_hands_in_one_loop_as_often_as_they_are_used() -> None:
    guest = guest_with_both(coherent=True)
    program = code("""
    b932000000 ; mov ecx, 50
               ; again:
    48830301   ; add qword ptr [rbx], 1
    488b16     ; mov rdx, [rsi]
    ffc9       ; dec ecx
    75f5       ; jnz again
    488b03     ; mov rax, [rbx]
    f4         ; hlt
    """)
    guest.cpu.store64(SECRET, 0)
    guest.run(program, rbx=SECRET, rsi=PLAIN)
    assert guest.rax == 50
    assert guest.rdx.to_bytes(8, "little") == guest.machine.snoop(DATA, 8)
    assert guest.event_kinds().count("tag-change") == 100


def test_an_incoherent_part_returns_the_stale_line_and_records_it() -> None:
    guest = guest_with_both(coherent=False)
    guest.cpu.store64(PLAIN, 5)
    guest.cpu.wbinvd()
    assert guest.cpu.load64(PLAIN) == 5
    guest.run(STORE_LOAD, rbx=SECRET, rdx=PLAIN, rax=7)
    assert guest.rcx == 5
    met = guest.machine.caches.hazards_met
    assert {hazard.kind for hazard in met} == {"dirty-alias", "stale-line"}
    assert {hazard.pa & -4096 for hazard in met} == {DATA}


def test_a_hazard_that_raises_ends_the_run_at_the_access() -> None:
    guest = guest_with_both(coherent=False, hazards="raise")
    with pytest.raises(Exception, match="dirty-alias"):
        guest.run(STORE_LOAD, rbx=SECRET, rdx=PLAIN, rax=7, rcx=1)
    assert guest.rcx == 1
    assert guest.cpu.load64(SECRET) == 7


def test_wbinvd_of_machine_code_brings_everything_to_dram() -> None:
    guest = guest_with_both(coherent=False)
    program = code("""
    488903 ; mov [rbx], rax
    0f09   ; wbinvd
    f4     ; hlt
    """)
    guest.run(program, rbx=SECRET, rax=0x55)
    assert "flush" in guest.event_kinds()
    cells = guest.machine.snoop(DATA, 8)
    guest.run(LOAD, rbx=PLAIN)
    assert guest.rax.to_bytes(8, "little") == cells
    assert not guest.machine.caches.hazards_met


def test_a_change_of_the_c_bit_with_a_flush_reads_ciphertext() -> None:
    guest = guest_with_both(coherent=False)
    program = code("""
    488903 ; mov [rbx], rax
    0f09   ; wbinvd
    48893e ; mov [rsi], rdi
    0f013b ; invlpg [rbx]
    488b13 ; mov rdx, [rbx]
    f4     ; hlt
    """)
    at = guest.entry_address(SECRET)
    guest.run(program, rbx=SECRET, rax=0x66, rsi=at, rdi=DATA | P | RW)
    assert guest.rdx.to_bytes(8, "little") == guest.machine.snoop(DATA, 8)


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_tables_read_through_the_wrong_c_bit_are_garbage_and_fault(
    coherent: bool, seed: int
) -> None:
    # 512 plain entries look like random bits through the key: hardly any is valid.
    guest = Guest(coherent=coherent, seed=seed)
    va = 0x180_4000_0000
    guest.entry_address(va, c=True)
    guest.map(va, DATA)
    guest.cpu.wbinvd()
    guest.cpu.invlpg(va)
    guest.run(LOAD, rbx=va + 0x18)
    assert guest.vector == 14
    assert guest.error_code in (0, 1, 8, 9)
    assert guest.core.state.cr(2) == va + 0x18
    assert guest.frame(error_code=True).rip == CODE


def test_cr3_with_the_wrong_c_bit_is_a_triple_fault_and_no_crash() -> None:
    guest = Guest()
    program = code("""
    0f22d8 ; mov cr3, rax
    488b1b ; mov rbx, [rbx]
    """)
    guest.cpu.wbinvd()
    stop = guest.run(program, rax=guest.root | guest.c)
    assert stop.ending.value == "fault"
    assert guest.cpu.read_cr3() == guest.root | guest.c


def test_code_runs_encrypted() -> None:
    guest = Guest()
    guest.map(SECRET, DATA, P | RW | guest.c)
    guest.cpu.store(SECRET, LOAD)
    guest.cpu.store64(PLAIN_DATA, 3)
    guest.run(at=SECRET, rbx=PLAIN_DATA)
    assert guest.rax == 3
    guest.machine.caches.drain()
    assert guest.machine.snoop(DATA, len(LOAD)) != LOAD


PLAIN_DATA = 0x60_0000


def test_code_that_another_tag_overwrote_is_read_anew() -> None:
    guest = guest_with_both(coherent=True)
    guest.cpu.store(SECRET, bytes.fromhex("b802000000c3"))
    guest.cpu.wbinvd()
    secret = guest.machine.snoop(DATA, 64)
    # Through C = 0 the guest stores what is b8 02 00 00 00 c3 through C = 1, which is
    # run; before that the same tag ran something else.
    guest.cpu.store(SECRET, bytes.fromhex("b803000000c3"))
    guest.cpu.wbinvd()
    copy = code("""
    ffd3       ; call rbx
    4989c0     ; mov r8, rax
    b908000000 ; mov ecx, 8
    f348a5     ; rep movsq
    ffd3       ; call rbx
    f4         ; hlt
    """)
    guest.cpu.store(PLAIN_DATA, secret)
    guest.run(copy, rbx=SECRET, rdi=PLAIN, rsi=PLAIN_DATA)
    assert (guest.r8, guest.rax) == (3, 2)
