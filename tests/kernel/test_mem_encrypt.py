"""kernel/mem_encrypt.py: defaults, boot data, early conversions, the last line."""

from __future__ import annotations

from random import Random

import pytest

from cbit.boot.startup import Booted
from cbit.hw.cpu import Cpu
from cbit.hw.errors import KernelError
from cbit.hw.faults import PageFault
from cbit.hw.msr import Pat
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState
from cbit.kernel.mem_encrypt import (
    mem_encrypt_init,
    sme_early_decrypt,
    sme_early_encrypt,
    sme_early_init,
    sme_map_bootdata,
    sme_unmap_bootdata,
)

from ..boot.conftest import (
    COHERENT,
    FIVE_LEVELS,
    INCOHERENT,
    MIB,
    Board,
    board,
    equal_blocks,
    random_bytes,
)

MODELS = [COHERENT, INCOHERENT, FIVE_LEVELS]
C47, C51 = 1 << 47, 1 << 51

PLACE = 0x300_0000
PAT_AT_RESET = 0x0007_0406_0007_0406
"""Entry 5 is WT: what a kernel finds before pat_init()."""


def booted(model: str = COHERENT, **options: object) -> tuple[Board, Booted]:
    made = board(model, la57=model == FIVE_LEVELS, **options)  # type: ignore[arg-type]
    return made, made.start()


# sme_early_init


@pytest.mark.req("LB-71", "PT-44", "PT-45")
@pytest.mark.parametrize("mask", [C47, C51])
def test_every_default_gets_the_c_bit(mask: int) -> None:
    defaults = sme_early_init(EncryptionState(mask))
    assert defaults.early_pmd_flags == 0x0E3 | mask
    assert defaults.supported_pte_mask & mask
    assert len(defaults.protection_map) == 16
    assert all(flags & mask for flags in defaults.protection_map)


@pytest.mark.req("LB-71", "PT-33")
def test_an_inactive_kernel_keeps_its_defaults() -> None:
    defaults = sme_early_init(EncryptionState())
    assert defaults.early_pmd_flags == 0x0E3
    assert not any(flags >> 12 & 0xFF_FFFF_FFFF for flags in defaults.protection_map)


@pytest.mark.req("LB-71", "PT-46")
def test_vector_protections_of_user_mappings() -> None:
    # Linux 6.1 arch/x86/mm/pgprot.c, worked out from _PAGE_* by hand: PROTNONE is A and
    # bit 8; else P US A, W only where shared, NX unless executable.
    none, nx = 0x120, 1 << 63
    read, write = 0x025, 0x027
    private = [none, read | nx, read | nx, read | nx, read, read, read, read]
    shared = [none, read | nx, write | nx, write | nx, read, read, write, write]
    expected = [flags | C51 for flags in private + shared]
    assert list(sme_early_init(EncryptionState(C51)).protection_map) == expected


# Boot data


def pmd(made: Board, end: Booted, pa: int) -> int | None:
    """Return the direct map's entry for `pa`, None where nothing leads to it."""
    va = end.tables.direct_map(pa)
    if not made.maps(made.cpu.read_cr3(), va):
        return None
    return made.walk(made.cpu.read_cr3(), va).entry


LINE = 0x33F_FE00
"""Crosses from one 2 MiB page to the next."""


def with_boot_data(
    model: str, line_at: int = LINE, core: type[Cpu] = Cpu
) -> tuple[Board, Booted]:
    """A booted board with a new plain zero page at PLACE, its line somewhere else."""
    made, end = booted(model, core=core)
    line = random_bytes(2048)
    made.machine.bus.store(line_at, line, 0)
    page = bytearray(random_bytes(4096, seed=8))
    page[0x228:0x22C] = (line_at & 0xFFFF_FFFF).to_bytes(4, "little")
    page[0x0C8:0x0CC] = (line_at >> 32).to_bytes(4, "little")
    made.machine.bus.store(PLACE, bytes(page), 0)
    made.machine.caches.write_back_invalidate()
    return made, end


@pytest.mark.req("LB-73", "LB-74")
@pytest.mark.parametrize("model", MODELS)
def test_zero_page_and_line_are_mapped_plain_by_2_mib_and_unmapped(model: str) -> None:
    made, end = with_boot_data(model)
    state, tables = end.state, end.tables
    made.events.clear()
    pointer = sme_map_bootdata(tables, made.cpu, state, PhysAddr(PLACE))
    assert pointer == LINE
    for pa in (PLACE, LINE, LINE + 2047):
        assert pmd(made, end, pa) == pa & -2 * MIB | 0x0E3
    assert made.cpu.load(tables.direct_map(LINE), 2048) == random_bytes(2048)
    assert len(made.facts("cr")) == 2

    sme_unmap_bootdata(tables, made.cpu, state, PhysAddr(PLACE))
    for pa in (PLACE, LINE, LINE + 2047):
        assert pmd(made, end, pa) is None
    assert len(made.facts("cr")) == 4
    assert set(made.facts("cr")) == {("cr", "cr3", made.cpu.read_cr3())}
    assert tables.faults == 0


@pytest.mark.req("LB-73")
def test_without_a_line_only_the_zero_page_is_mapped() -> None:
    made, end = with_boot_data(COHERENT, line_at=0)
    made.events.clear()
    assert not sme_map_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    assert pmd(made, end, PLACE) == PLACE | 0x0E3
    assert pmd(made, end, 0) is None
    sme_unmap_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    assert pmd(made, end, PLACE) is None
    assert len(made.facts("cr")) == 2


@pytest.mark.req("LB-73")
@pytest.mark.parametrize(
    "state", [EncryptionState(), EncryptionState(C51, 1)], ids=["inactive", "sev"]
)
def test_only_an_sme_host_maps_anything(state: EncryptionState) -> None:
    made = board(cmdline=b"")
    end = made.start()
    line = made.hand_over.command_line
    made.events.clear()
    tables, at = end.tables, made.hand_over.boot_params
    assert sme_map_bootdata(tables, made.cpu, state, at) == line
    mapped = pmd(made, end, at)
    sme_unmap_bootdata(tables, made.cpu, state, at)
    assert made.facts("cr") == []
    assert pmd(made, end, at) == mapped  # the fault handler's, and it stays


@pytest.mark.req("LB-73")
@pytest.mark.parametrize("line_at", [LINE, PLACE + 0x1000])
def test_order_the_pointer_is_read_before_its_page_goes(line_at: int) -> None:
    made, end = with_boot_data(COHERENT, line_at)
    sme_map_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    sme_unmap_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    # Read later, the page would come back by a fault, with C, and show garbage.
    assert end.tables.faults == 0
    for pa in (PLACE, line_at, line_at + 2047):
        assert pmd(made, end, pa) is None


class Speculates(Cpu):
    """Refills the TLB right behind a write of CR3, as a core may at any time."""

    guess: VirtAddr | None = None

    def write_cr3(self, value: int) -> None:
        super().write_cr3(value)
        if self.guess is not None:
            self.translate(self.guess)


@pytest.mark.req("LB-73", "LB-74", "PT-52")
@pytest.mark.parametrize("model", MODELS)
def test_order_the_tlb_is_flushed_when_the_entries_stand(model: str) -> None:
    made, end = with_boot_data(model, core=Speculates)
    assert isinstance(made.cpu, Speculates)
    line = end.tables.direct_map(LINE)
    # The fault handler maps it with C; from now on the TLB holds that.
    assert made.cpu.load(line, 256) != random_bytes(2048)[:256]
    made.machine.caches.write_back_invalidate()
    made.cpu.guess = line
    sme_map_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    made.cpu.guess = None
    assert made.cpu.load(line, 256) == random_bytes(2048)[:256]

    faults = end.tables.faults
    sme_unmap_bootdata(end.tables, made.cpu, end.state, PhysAddr(PLACE))
    made.machine.caches.write_back_invalidate()
    assert made.cpu.load(line, 256) != random_bytes(2048)[:256]
    assert end.tables.faults == faults + 1


# In-place conversion


def ready(model: str, *, core: type[Cpu] = Cpu) -> tuple[Board, Booted]:
    made, end = booted(model, core=core)
    made.events.clear()
    return made, end


def convert(made: Board, end: Booted, pa: int, size: int, *, encrypt: bool) -> None:
    function = sme_early_encrypt if encrypt else sme_early_decrypt
    window = end.data.window(made.layout)
    function(made.cpu, end.state, window, PhysAddr(pa), size)


RANGES = [
    (PLACE, 4096),
    (PLACE, 3 * 4096),
    (PLACE + 0x100, 0x40),
    (PLACE + 0xFC0, 0x80),
    (PLACE + 0x10, 2 * 4096),
]


@pytest.mark.req("LB-75", "PT-53")
@pytest.mark.parametrize(("pa", "size"), RANGES)
@pytest.mark.parametrize("model", MODELS)
def test_encrypt_converts_the_range_and_decrypt_brings_it_back(
    model: str, pa: int, size: int
) -> None:
    made, end = ready(model)
    data = random_bytes(size)
    made.machine.bus.store(PLACE - 4096, b"\xaa" * (6 * 4096), 0)
    made.machine.bus.store(pa, data, 0)
    convert(made, end, pa, size, encrypt=True)
    assert made.through(True, pa, size) == data
    made.machine.caches.write_back_invalidate()
    assert equal_blocks(made.cells(pa, pa + size), data) == []
    assert made.cells(PLACE - 4096, pa).tobytes() == b"\xaa" * (pa - PLACE + 4096)
    assert made.cells(pa + size, pa + size + 4096).tobytes() == b"\xaa" * 4096

    convert(made, end, pa, size, encrypt=False)
    assert made.through(False, pa, size) == data
    assert made.cells(pa, pa + size).tobytes() == data
    assert made.machine.caches.hazards_met == []


@pytest.mark.req("LB-75", "PT-53", "PT-42")
@pytest.mark.parametrize("encrypt", [True, False])
def test_source_in_the_old_state_write_protected_target_in_the_new(
    encrypt: bool,
) -> None:
    seen: list[tuple[int, ...]] = []

    class Core(Cpu):
        def copy(
            self, target: VirtAddr | int, source: VirtAddr | int, length: int
        ) -> None:
            entries = self.translate(target).entry, self.translate(source).entry
            seen.append((length, *(entry & ~0x60 for entry in entries)))
            super().copy(target, source, length)

    made, end = ready(COHERENT, core=Core)
    seen.clear()
    convert(made, end, PLACE + 0xF00, 0x1200, encrypt=encrypt)
    c = made.c_mask
    old, new = (0, c) if encrypt else (c, 0)
    buffer = end.data.conversion_buffer & -2 * MIB | 0x183 | c
    expected = []
    for page, length in enumerate([0x100, 0x1000, 0x100]):
        frame = PLACE + page * 0x1000
        expected += [
            (length, buffer, frame | 0x08B | old),
            (length, frame | 0x003 | new, buffer),
        ]
    assert seen == expected


@pytest.mark.req("LB-75")
def test_the_window_is_empty_afterwards() -> None:
    made, end = ready(COHERENT)
    convert(made, end, PLACE, 4096, encrypt=True)
    window = end.data.window(made.layout)
    assert made.cpu.load64(window.source_slot) == 0
    assert made.cpu.load64(window.target_slot) == 0
    for va in (window.source_va, window.target_va):
        with pytest.raises(PageFault):
            made.cpu.load(va, 1)


@pytest.mark.req("LB-75", "PT-T2")
@pytest.mark.parametrize("encrypt", [True, False])
def test_without_wp_in_the_pat_it_panics_and_nothing_has_changed(encrypt: bool) -> None:
    made, end = ready(COHERENT)
    made.machine.bus.store(PLACE, b"unchanged", 0)
    made.cpu.wrmsr(Pat.ADDRESS, PAT_AT_RESET)
    made.events.clear()
    with pytest.raises(KernelError, match="PAT index 5 is not WP"):
        convert(made, end, PLACE, 4096, encrypt=encrypt)
    assert made.through(False, PLACE, 9) == b"unchanged"
    assert made.facts("flush") == []


@pytest.mark.req("LB-75")
def test_an_inactive_kernel_converts_nothing() -> None:
    made, end = booted(COHERENT, cmdline=b"")
    made.events.clear()
    convert(made, end, PLACE, 4096, encrypt=True)
    assert made.events == []


@pytest.mark.req("LB-75", "PT-51", "PT-53", "BZ-13")
@pytest.mark.parametrize("seed", range(20))
def test_order_wbinvd_before_the_first_page(seed: int) -> None:
    made, end = booted(INCOHERENT, seed=seed)
    rng = Random(seed)
    size = rng.randrange(1, 5) * 4096
    data = rng.randbytes(size)
    made.machine.bus.store(PLACE, data, 0)  # dirty lines under C = 0
    made.events.clear()
    convert(made, end, PLACE, size, encrypt=True)
    assert made.facts("flush") == [("flush", "wbinvd")]
    assert made.machine.caches.hazards_met == []
    made.machine.caches.evict()
    assert made.through(True, PLACE, size) == data
    made.machine.caches.write_back_invalidate()
    assert equal_blocks(made.cells(PLACE, PLACE + size), data) == []


@pytest.mark.req("LB-75", "PT-53", "LB-67")
@pytest.mark.parametrize("encrypt", [True, False])
def test_order_the_bytes_go_over_the_buffer(encrypt: bool) -> None:
    made, end = ready(COHERENT)
    data = random_bytes(4096)
    slot = 0 if encrypt else 1
    made.machine.bus.store(PLACE, data, slot)
    convert(made, end, PLACE, 4096, encrypt=encrypt)
    assert made.through(encrypt, PLACE, 4096) == data
    assert made.through(True, end.data.conversion_buffer, 4096) == data


# mem_encrypt_init


@pytest.mark.req("LB-81", "LB-T4")
@pytest.mark.parametrize(
    ("state", "line"),
    [
        (EncryptionState(), None),
        (EncryptionState(C47), "AMD SME"),
        (EncryptionState(C51, 1), "AMD SEV"),
        (EncryptionState(C51, 3), "AMD SEV SEV-ES"),
        (EncryptionState(C51, 7), "AMD SEV SEV-ES SEV-SNP"),
    ],
)
def test_the_line_names_sme_or_the_kinds_of_sev_never_both(
    state: EncryptionState, line: str | None
) -> None:
    said = mem_encrypt_init(state)
    assert said == (line and f"Memory Encryption Features active: {line}")


@pytest.mark.req("LB-81")
@pytest.mark.parametrize(("line", "said"), [(b"mem_encrypt=on", True), (b"", False)])
def test_the_line_ends_the_boot_log(line: bytes, said: bool) -> None:
    made, _ = booted(cmdline=line)
    wanted = "Memory Encryption Features active: AMD SME"
    assert (made.log.messages[-1] == wanted) == said
