"""The instruction at RIP: operands of memory and registers, and its text."""

from collections.abc import Iterator
from itertools import product

import pytest

from cbit.hw.native.state import GS

from .guests import CODE, Guest, code

_U64 = (1 << 64) - 1
NAMES = (
    *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
    *("R8", "R9", "R10", "R11", "R12", "R13", "R14", "R15"),
)


@pytest.fixture(scope="module")
def guest() -> Guest:
    return Guest()


PREFIXES = (b"", b"\x65", b"\x41", b"\x42", b"\x43", b"\x65\x43", b"\x67\x43")
SIBS = (0x24, 0x63, 0x8D, 0xD1, 0x25, 0xE5)
DISPLACEMENT = b"\x84\xff\xff\x80"


def invlpgs() -> Iterator[bytes]:
    """Yield INVLPG with every ModRM that names memory and with some SIB bytes."""
    for prefix, mod, rm in product(PREFIXES, range(3), range(8)):
        for sib in SIBS if rm == 4 else (None,):
            base = rm if sib is None else sib & 7
            size = (4 if base == 5 else 0, 1, 4)[mod]
            yield (
                prefix
                + bytes((0x0F, 0x01, mod << 6 | 7 << 3 | rm))
                + (b"" if sib is None else bytes((sib,)))
                + DISPLACEMENT[:size]
            )


def as_lea(instruction: bytes) -> bytes:
    """Return LEA RAX with the operand of an INVLPG, and just as long."""
    at = instruction.index(b"\x0f\x01")
    prefixes, rest = instruction[:at], instruction[at + 2 :]
    rex = prefixes[-1] if prefixes and prefixes[-1] & 0xF0 == 0x40 else 0x40
    legacy = prefixes.rstrip(b"\x41\x42\x43").replace(b"\x65", b"\x2e")
    ignored = b"\x2e" * (at - len(legacy))
    opcode = bytes((rex | 8, 0x8D, rest[0] & ~0x38))
    return legacy + ignored + opcode + rest[1:]


@pytest.mark.parametrize("instruction", list(invlpgs()), ids=bytes.hex)
def test_a_memory_operand_is_where_lea_puts_it(
    guest: Guest, instruction: bytes
) -> None:
    values = {
        name.lower(): 0x1234_5678_9ABC_DE00 * (number + 1) & _U64 | number
        for number, name in enumerate(NAMES)
    }
    guest.run(as_lea(instruction).ljust(16, b"\xf4"), **values)
    expected, length = guest.rax, guest.rip - 1 - CODE
    if instruction[0] == 0x65:
        expected += 0xFFFF_8880_0000_1000
    # The operand ends where the padding of HLT begins; what follows is not read.
    guest.place(CODE, instruction.ljust(16, b"\xf4"))
    guest.set(**values)
    guest.core.state.rip = CODE
    guest.core.state.segments[GS].load(0, 0xFFFF_8880_0000_1000, 0xFFFF_FFFF, 0)
    assert guest.core.reader.memory_operand() == (expected & _U64, length)


@pytest.mark.parametrize(
    ("instruction", "number", "length"),
    [
        (b"\x0f\x22\xd8", 0, 3),
        (b"\x0f\x22\xdf", 7, 3),
        (b"\x41\x0f\x22\xdf", 15, 4),
        (b"\x48\x0f\x22\xe3", 3, 4),
        (b"\x66\x0f\x22\xc1", 1, 4),
        (b"\x2e\x44\x0f\x22\xc6", 6, 5),
    ],
)
def test_the_register_of_a_move_to_cr_is_found(
    guest: Guest, instruction: bytes, number: int, length: int
) -> None:
    guest.place(CODE, instruction + b"\x90" * 12)
    guest.core.state.rip = CODE
    assert guest.core.reader.cr_register() == (number, length)


def test_invlpg_through_gs_drops_the_page_it_names(guest: Guest) -> None:
    page, data = 0x40_1000_0000, 0x60_0000
    at = guest.map(page, data)
    guest.cpu.store64(data + 8, 1)
    guest.cpu.store64(data + 0x1008, 2)
    program = code("""
    0f30               ; wrmsr
    654c8b042508000000 ; mov r8, gs:[8]
    48893e             ; mov [rsi], rdi
    654c8b0c2508000000 ; mov r9, gs:[8]
    650f013c2508000000 ; invlpg gs:[8]
    654c8b142508000000 ; mov r10, gs:[8]
    f4                 ; hlt
    """)
    guest.run(
        program,
        rcx=0xC000_0101,
        rax=page & 0xFFFF_FFFF,
        rdx=page >> 32,
        rsi=at,
        rdi=data + 0x1000 | 3,
    )
    assert (guest.r8, guest.r9, guest.r10) == (1, 1, 2)


def test_text_is_that_of_the_code(guest: Guest) -> None:
    guest.place(CODE, b"\x90\x0f\x0b")
    assert guest.core.reader.text(CODE, 2) == [
        f"{CODE:#x}: 90                   nop",
        f"{CODE + 1:#x}: 0f0b                 ud2",
    ]


def test_text_of_code_that_is_not_mapped_says_so(guest: Guest) -> None:
    assert guest.core.reader.text(0x70_0000_0000) == ["(no code is mapped here)"]
    assert guest.core.reader.text(1 << 63) == ["(no code is mapped here)"]


def test_text_ends_where_the_mapping_does(guest: Guest) -> None:
    page = 0x40_5000_0000
    guest.map(page, 0x60_0000)
    guest.place(0x60_0FFE, b"\x90\x90")
    assert len(guest.core.reader.text(page + 0xFFE, 4)) == 2
