"""Long REP MOVS and STOS: every register and byte as one element after another."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from cbit.hw.native import Ending

from .guests import CODE, DATA, RW, US, USER_CODE, D, Guest, P, code

WINDOW, PAGES = 0x40_1000_0000, 12
PAGE = 4096
UP, DOWN = b"\xfc", b"\xfd"  # CLD, STD
MOVS = {1: b"\xf3\xa4", 2: b"\x66\xf3\xa5", 4: b"\xf3\xa5", 8: b"\xf3\x48\xa5"}
STOS = {1: b"\xf3\xaa", 2: b"\x66\xf3\xab", 4: b"\xf3\xab", 8: b"\xf3\x48\xab"}
HALT = b"\xfc\xf4"
DEVICE, NOTHING, ROM = 0xFEE0_0000, 0x8000_0000, 0xF_0000


@dataclass
class Witness:
    """Memory by frame, mappings by page, and the instruction, element by element."""

    frames: dict[int, bytearray] = field(default_factory=dict)
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    fault: tuple[int, int] | None = None

    def missing(self, va: int, size: int, needed: int) -> int | None:
        for byte in (va, va + size - 1):
            flags = self.mapped.get(byte // PAGE, (0, 0))[1]
            if flags & needed != needed:
                return byte if byte == va else byte & -PAGE
        return None

    def load(self, va: int, size: int) -> bytes:
        return bytes(
            self.frames[self.mapped[byte // PAGE][0]][byte % PAGE]
            for byte in range(va, va + size)
        )

    def store(self, va: int, data: bytes) -> None:
        for byte, value in enumerate(data, va):
            self.frames[self.mapped[byte // PAGE][0]][byte % PAGE] = value
            self.stored.add(byte // PAGE)

    def run(
        self, size: int, step: int, rdi: int, rcx: int, rsi: int | None, rax: int
    ) -> tuple[int, int, int | None]:
        """Return RDI, RCX, RSI; `fault` gets address and error code."""
        while rcx:
            if rsi is not None:
                if (at := self.missing(rsi, size, P)) is not None:
                    self.fault = at, 0
                    break
                data = self.load(rsi, size)
            else:
                data = rax.to_bytes(8, "little")[:size]
            if (at := self.missing(rdi, size, P | RW)) is not None:
                present = self.mapped.get(at // PAGE, (0, 0))[1] & P
                self.fault = at, 2 | present
                break
            self.store(rdi, data)
            rdi += step * size
            rsi = None if rsi is None else rsi + step * size
            rcx -= 1
        return rdi, rcx, rsi


def build(guest: Guest, mapping: dict[int, tuple[int, int]], seed: int = 0) -> Witness:
    """Map pages of the window to frames with flags, C-bit included, and fill them."""
    witness, draw = Witness(), random.Random(seed)
    for page, (frame, flags) in sorted(mapping.items()):
        number = WINDOW // PAGE + page
        guest.map(WINDOW + page * PAGE, frame, flags | P | RW)
        guest.cpu.invlpg(WINDOW + page * PAGE)
        if frame not in witness.frames:
            witness.frames[frame] = bytearray(draw.randbytes(PAGE))
            guest.cpu.store(WINDOW + page * PAGE, bytes(witness.frames[frame]))
        guest.map(WINDOW + page * PAGE, frame, flags)
        guest.cpu.invlpg(WINDOW + page * PAGE)
        witness.mapped[number] = frame, flags
    return witness


def compare(
    guest: Guest,
    witness: Witness,
    size: int,
    *,
    down: bool,
    rdi: int,
    rcx: int,
    rsi: int | None,
    rax: int = 0x8877_6655_4433_2211,
) -> None:
    """Run the instruction on both and compare registers, memory, faults, D bits."""
    program = (DOWN if down else UP) + (STOS if rsi is None else MOVS)[size] + HALT
    source = {} if rsi is None else {"rsi": rsi}
    stop = guest.run(program, rdi=rdi, rcx=rcx, rax=rax, **source)
    assert stop.ending is Ending.HALTED
    expected = witness.run(size, -1 if down else 1, rdi, rcx, rsi, rax)
    assert (guest.rdi, guest.rcx) == expected[:2]
    assert rsi is None or guest.rsi == expected[2]
    if witness.fault is None:
        assert guest.vector is None
    else:
        assert guest.vector == 14
        assert (guest.core.state.cr(2), guest.error_code) == witness.fault
        assert guest.frame(error_code=True).rip == CODE + 1
    assert [e.facts["va"] for e in guest.events if e.kind == "page-fault"] == (
        [] if witness.fault is None else [witness.fault[0]]
    )
    for number, (frame, flags) in witness.mapped.items():
        entry = guest.cpu.load64(guest.entry_address(number * PAGE))
        assert bool(entry & D) == (number in witness.stored)
        if flags & P:
            assert guest.cpu.load(number * PAGE, PAGE) == witness.frames[frame]


def plain(pages: int = PAGES, first: int = 0) -> dict[int, tuple[int, int]]:
    return {page: (DATA + page * PAGE, P | RW) for page in range(first, pages)}


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("copies", [False, True])
def test_all_widths_both_ways(
    guest: Guest, size: int, down: bool, copies: bool
) -> None:
    witness = build(guest, plain())
    count = 0x4010 // size
    back = count * size - size if down else 0
    compare(
        guest,
        witness,
        size,
        down=down,
        rdi=WINDOW + 0x6123 + back,
        rcx=count,
        rsi=WINDOW + 0x456 + back if copies else None,
    )
    if size != 2 and (copies or not down):
        assert guest.core._bulk.performed


@pytest.mark.parametrize("distance", [-0x2000, -0x801, -8, -3, 0, 1, 8, 0x7FF, 0x2000])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("size", [1, 8])
def test_overlapping_ranges_repeat_or_move_as_elements_do(
    guest: Guest, distance: int, down: bool, size: int
) -> None:
    witness = build(guest, plain())
    start = WINDOW + 0x3000 + (0x4000 - size if down else 0)
    compare(
        guest,
        witness,
        size,
        down=down,
        rdi=start + distance,
        rcx=0x4000 // size,
        rsi=start,
    )


@pytest.mark.parametrize("hole", [4, 7, 8])
@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_a_hole_in_the_target_faults_at_its_element(
    guest: Guest, hole: int, size: int, copies: bool, down: bool
) -> None:
    mapping = plain()
    del mapping[hole]
    witness = build(guest, mapping)
    count = 0x4FF0 // size
    back = (count - 1) * size if down else 0
    compare(
        guest,
        witness,
        size,
        down=down,
        rdi=WINDOW + 0x4005 + back,
        rcx=count,
        rsi=WINDOW + 0x7 + back if copies else None,
    )
    assert witness.fault is not None


@pytest.mark.parametrize("hole", [0, 1, 3])
@pytest.mark.parametrize("down", [False, True])
def test_a_hole_in_the_source_faults_at_its_element_and_marks_nothing_behind(
    guest: Guest, hole: int, down: bool
) -> None:
    mapping = plain()
    del mapping[hole]
    witness = build(guest, mapping)
    back = 0x3FF8 if down else 0
    compare(
        guest,
        witness,
        8,
        down=down,
        rdi=WINDOW + 0x5003 + back,
        rcx=0x800,
        rsi=WINDOW + 0x1 + back,
    )
    assert witness.fault is not None


def test_a_page_that_may_not_be_stored_to_faults_there(guest: Guest) -> None:
    mapping = plain()
    mapping[7] = mapping[7][0], P
    witness = build(guest, mapping)
    compare(guest, witness, 8, down=False, rdi=WINDOW + 0x4008, rcx=0x900, rsi=WINDOW)
    assert witness.fault == (WINDOW + 0x7000, 3)


def test_a_copy_between_tags_enciphers_on_the_way(guest: Guest) -> None:
    mapping = plain()
    for page in (6, 7, 9, 10):
        mapping[page] = mapping[page][0], P | RW | guest.c
    mapping[2] = mapping[2][0], P | RW | guest.c
    witness = build(guest, mapping)
    compare(guest, witness, 1, down=False, rdi=WINDOW + 0x6001, rcx=0x5000, rsi=WINDOW)
    guest.machine.caches.drain()
    for page in (7, 8, 9):
        frame = mapping[page][0]
        cells = guest.machine.snoop(frame, PAGE)
        assert (cells == witness.frames[frame]) == (page == 8)


def test_a_frame_that_is_source_and_target_under_two_addresses(guest: Guest) -> None:
    for down in (False, True):
        mapping = plain(5)
        for page in range(5):  # the target window shows the source, a page later
            mapping[6 + page] = DATA + (page + (-1 if down else 1)) % 5 * PAGE, P | RW
        witness = build(guest, mapping)
        back = 0x4FFF if down else 0
        compare(
            guest,
            witness,
            1,
            down=down,
            rdi=WINDOW + 0x6000 + back,
            rcx=0x5000,
            rsi=WINDOW + back,
        )


def test_user_mode_is_held_to_user_pages(guest: Guest) -> None:
    mapping = {page: (frame, f | US) for page, (frame, f) in plain().items()}
    mapping[8] = mapping[8][0], P | RW
    build(guest, mapping)
    guest.run_user(
        MOVS[8] + b"\x0f\x0b",
        frame=0x60_0000,
        rdi=WINDOW + 0x5000,
        rsi=WINDOW,
        rcx=0xA00,
    )
    assert (guest.vector, guest.error_code) == (14, 7)
    assert guest.rdi == WINDOW + 0x8000
    assert guest.rcx == 0x400
    assert guest.frame(error_code=True).rip == USER_CODE
    assert guest.core._bulk.performed


@pytest.mark.parametrize(
    ("device", "expected"),
    [(NOTHING, b"\xff" * 8), (ROM, b"\xff" * 8), (DEVICE + 0x30, b"\x14\x00\x05\x00")],
)
def test_devices_and_empty_addresses_get_each_element_by_itself(
    guest: Guest, device: int, expected: bytes
) -> None:
    guest.run(MOVS[4] + HALT, rdi=DATA, rsi=device, rcx=0x1000)
    assert guest.vector is None
    assert guest.rcx == 0
    assert guest.cpu.load(DATA, len(expected))[1:] == expected[1:]
    guest.run(STOS[8] + HALT, rdi=device & -PAGE, rcx=0x500, rax=0)
    assert guest.vector is None
    assert guest.rcx == 0
    assert guest.core._bulk.performed == 0


def test_a_fill_up_to_the_top_of_the_address_space_stops_at_the_hole(
    guest: Guest,
) -> None:
    top = 1 << 64
    for page in range(1, 5):
        guest.map(top - page * PAGE, DATA + page * PAGE)
    guest.run(STOS[8] + HALT, rdi=top - 4 * PAGE, rcx=0x1000, rax=3)
    # RDI wraps to 0, where the identity map begins.
    assert guest.vector is None
    assert guest.rdi == 0x8000 - 4 * PAGE
    assert guest.cpu.load64(top - 8) == 3
    assert guest.cpu.load64(0x3FF8) == 3


def test_a_branch_behind_a_long_copy_is_no_string_operation(guest: Guest) -> None:
    program = code("""
    f3a4       ; rep movsb
    b900000100 ; mov ecx, 0x10000
    488b07     ; mov rax, [rdi]
    48894708   ; mov [rdi+8], rax
    f4         ; hlt
    """)
    guest.run(program, rdi=DATA, rsi=DATA + 0x10_0000, rcx=0x3000)
    assert guest.vector is None
    assert guest.rdi == DATA + 0x3000


@pytest.mark.parametrize("seed", range(25))
def test_law_any_operation_on_any_mapping(seed: int) -> None:
    draw = random.Random(seed)
    guest = Guest(coherent=bool(seed % 3), seed=seed)
    for _ in range(6):
        frames = [DATA + page * PAGE for page in range(PAGES)]
        draw.shuffle(frames)
        tags = {frame: draw.choice((0, 0, guest.c)) for frame in frames}
        mapping = {}
        for page in range(PAGES):
            frame = draw.choice(frames) if draw.random() < 0.2 else frames[page]
            flags = draw.choice([P | RW] * 12 + [P, 0])
            mapping[page] = frame, flags | tags[frame]
        guest.cpu.wbinvd()  # the next tags of the frames meet no stale lines
        witness = build(guest, mapping, seed)
        guest.cpu.wbinvd()
        guest.core.filler.flush()
        guest.events.clear()
        size, down = draw.choice((1, 2, 4, 8)), draw.random() < 0.3
        count = draw.randrange(0x1000, 0x6000) // size
        length = count * size
        spots = [draw.randrange(PAGES * PAGE - length) for _ in range(2)]
        rdi, rsi = (WINDOW + spot + (length - size) * down for spot in spots)
        compare(
            guest,
            witness,
            size,
            down=down,
            rdi=rdi,
            rcx=count,
            rsi=rsi if draw.random() < 0.7 else None,
            rax=draw.choice((0, 0x8877_6655_4433_2211)),
        )
