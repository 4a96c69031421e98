"""boot/early_tables.py: what __startup_64 writes, read back entry by entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cbit.boot.early_tables import (
    KernelData,
    check_load_address,
    kernel_pmds,
    share_bss_decrypted,
    startup_64_tables,
)
from cbit.boot.image import KernelImage, KernelLayout, Range, Segment
from cbit.boot.startup import Stage
from cbit.hw.errors import KernelError
from cbit.hw.faults import PageFault
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState

from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    INCOHERENT,
    MIB,
    TABLE_ADDRESS,
    Board,
    board,
    cached_builtin,
)

KERNEL_MAP = 0xFFFF_FFFF_8000_0000
TEXT = 0x100_0000
END = 0x141_0000  # of the built-in kernel
SHARED = 0x120_0000, 0x140_0000  # its .bss..decrypted

LAYOUT = cached_builtin(1).layout


def built(model: str = COHERENT, **options: bytes) -> Board:
    """A board whose tables are written and where nothing is encrypted yet."""
    made = board(model, la57=model == FIVE_LEVELS, **options)  # type: ignore[arg-type]
    made.run_to(Stage.TABLES_BUILT)
    return made


def filled(table: list[int]) -> dict[int, int]:
    return {i: entry for i, entry in enumerate(table) if entry}


def kernel_at(start: int, size: int = 6 * MIB) -> KernelImage:
    """The built-in kernel, grown to a size, moved to another place."""
    image = cached_builtin(1, size)
    moved = start - image.layout.text_start

    def shift(place: Range) -> Range:
        return Range(PhysAddr(place.start + moved), PhysAddr(place.end + moved))

    layout = replace(
        image.layout,
        text_start=PhysAddr(start),
        end=PhysAddr(image.layout.end + moved),
        bss=shift(image.layout.bss),
        bss_decrypted=shift(image.layout.bss_decrypted),
        workarea=shift(image.layout.workarea),
    )
    segments = tuple(
        Segment(PhysAddr(s.paddr + moved), s.vaddr, s.data, s.memory_size)
        for s in image.segments
    )
    return replace(image, layout=layout, segments=segments, entry=PhysAddr(start))


# early_top_pgt and what hangs from it


@pytest.mark.req("LB-20", "PT-36", "PT-37")
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b""], ids=["active", "inactive"])
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_every_entry_of_the_kernels_tables_carries_the_mask(
    model: str, line: bytes
) -> None:
    made = built(model, cmdline=line)
    data, c = made.data, made.c_mask if line else 0
    top = made.table(data.early_top_pgt, c_bit=False)
    level3 = data.level3_kernel_pgt | 0x067 | c
    if model == FIVE_LEVELS:
        assert top[511] == data.level4_kernel_pgt | 0x067 | c
        level4 = made.table(data.level4_kernel_pgt, c_bit=False)
        assert filled(level4) == {511: level3}
    else:
        assert top[511] == level3
    assert filled(made.table(data.level3_kernel_pgt, c_bit=False)) == {
        510: data.level2_kernel_pgt | 0x063 | c,
        511: data.level2_fixmap_pgt | 0x067 | c,
    }
    assert filled(made.table(data.level2_fixmap_pgt, c_bit=False)) == {
        506: data.level1_fixmap_pgt | 0x067 | c,
        507: data.level1_fixmap_pgt + 0x1000 | 0x067 | c,
    }
    assert filled(made.table(data.level1_fixmap_pgt, c_bit=False)) == {}


@pytest.mark.req("LB-20", "LB-22", "PT-37")
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b""], ids=["active", "inactive"])
def test_only_the_kernel_is_present_in_level2_kernel_pgt(line: bytes) -> None:
    made = built(cmdline=line)
    c = made.c_mask if line else 0
    pmds = made.table(made.data.level2_kernel_pgt, c_bit=False)
    for i, entry in enumerate(pmds):
        if TEXT >> 21 <= i <= END >> 21:
            assert entry == i << 21 | 0x1E3 | c
        else:
            assert entry == i << 21 | 0x1E2  # as linked, without Present


@pytest.mark.req("LB-22")
@pytest.mark.parametrize(
    ("end", "last"),
    [(0x140_0001, 10), (0x15F_FFFF, 10), (0x160_0000, 11), (0x140_0000, 10)],
)
def test_the_entry_that_holds_end_is_the_last_one(end: int, last: int) -> None:
    # Linux fixes up to pmd_index(_end), also where _end is that entry's first byte.
    layout = replace(LAYOUT, end=PhysAddr(end), bss_decrypted=LAYOUT.bss)
    present = kernel_pmds(EncryptionState(), layout) & np.uint64(1)
    assert np.flatnonzero(present).tolist() == list(range(8, last + 1))


@pytest.mark.req("LB-20")
@pytest.mark.parametrize("start", [0x200_0000, 0x1000_0000, 0x3_7FE0_0000])
def test_phys_base_moves_the_frames_and_has_no_c(start: int) -> None:
    layout = kernel_at(start).layout
    pmds = kernel_pmds(EncryptionState(1 << 47), layout)
    first = 0x100_0000 >> 21  # the link address stays
    for i in range(4):
        assert int(pmds[first + i]) == start + i * 2 * MIB | 1 << 47 | 0x1E3


@pytest.mark.req("LB-21", "PT-35")
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b""], ids=["active", "inactive"])
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_the_switch_over_map_is_an_identity_of_text_to_end(
    model: str, line: bytes
) -> None:
    made = built(model, cmdline=line)
    data, c = made.data, made.c_mask if line else 0
    # head64.c takes its spare tables in the order PUD, PMD, P4D.
    order = (2, 0, 1) if made.levels == 5 else (0, 1)
    pages = [data.early_dynamic_pgts + i * 0x1000 for i in order]
    table: int = data.early_top_pgt
    for page in pages[: made.levels - 2]:
        entries = filled(made.table(table, c_bit=False))
        entries.pop(511, None)
        assert entries == {0: page | 0x063 | c, 1: page | 0x063 | c}
        table = page
    assert filled(made.table(table, c_bit=False)) == {
        i: i << 21 | 0x0E3 | c  # __PAGE_KERNEL_LARGE_EXEC without G
        for i in range(TEXT >> 21, (END >> 21) + 1)
    }


@pytest.mark.req("LB-21")
@pytest.mark.parametrize("model", [COHERENT, FIVE_LEVELS])
@pytest.mark.parametrize("start", [0x3F80_0000, 0x3FE0_0000, 0x7FC0_0000])
def test_a_kernel_across_a_1_gib_boundary_is_mapped_whole(
    start: int, model: str
) -> None:
    made = board(model, image=kernel_at(start), ram=3 << 30, la57=model == FIVE_LEVELS)
    made.run_to(Stage.TABLES_BUILT)
    top = made.data.early_top_pgt
    # Nothing is encrypted yet: read the tables plain to see where they lead.
    for pa in range(start, made.layout.end, 2 * MIB):
        entry: int = top
        for shift in (48, 39, 30, 21)[5 - made.levels :]:
            table = entry & TABLE_ADDRESS & ~made.c_mask
            entry = made.table(table, c_bit=False)[pa >> shift & 511]
            assert entry & made.c_mask
        assert entry == pa | 0x0E3 | made.c_mask


@pytest.mark.req("LB-21", "LB-20")
@pytest.mark.parametrize("start", [0x200_0000, 0x1000_0000, 0x3F80_0000])
def test_a_moved_kernel_boots_and_reads_itself_at_both_addresses(start: int) -> None:
    made = board(INCOHERENT, image=kernel_at(start), ram=2 << 30, hazards="raise")
    made.start()
    text = made.layout.bss.start - start
    assert made.cpu.load(made.layout.virt(PhysAddr(start)), text) == made.plain(
        start, start + text
    )


@pytest.mark.req("LB-24", "LB-59")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_the_tables_lie_in_the_image_and_are_ciphertext_after_it(model: str) -> None:
    made = built(model)
    data = made.data
    assert made.layout.bss.start <= data.early_top_pgt < data.end <= SHARED[0]
    plain = made.through(False, data.early_top_pgt, 4096)
    made = board(model)
    made.run_to(Stage.ENCRYPTED)
    cells = made.cells(data.early_top_pgt, data.early_top_pgt + 4096).tobytes()
    assert cells != plain
    assert made.through(True, data.early_top_pgt, 4096) == plain


@pytest.mark.req("LB-24", "PT-20", "WP-13")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_without_c_in_cr3_the_encrypted_tables_are_useless(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS)
    made.run_to(Stage.ENCRYPTED)
    made.machine.caches.write_back_invalidate()
    made.cpu.write_cr3(made.data.early_top_pgt)
    with pytest.raises(PageFault):
        made.cpu.load(made.layout.virt(PhysAddr(TEXT)), 8)
    made.cpu.write_cr3(made.data.early_top_pgt | made.c_mask)
    assert made.cpu.load(made.layout.virt(PhysAddr(TEXT)), 8) == made.plain(
        TEXT, TEXT + 8
    )


@pytest.mark.req("LB-25")
@pytest.mark.parametrize(
    ("start", "five_levels", "good"),
    [
        (0x100_0000, False, True),
        (0x110_0000, False, False),
        (0x100_1000, True, False),
        ((1 << 46) - 2 * MIB, False, True),
        (1 << 46, False, False),
        (1 << 46, True, True),
        ((1 << 52) - 2 * MIB, True, True),
        (1 << 52, True, False),
    ],
)
def test_a_load_address_that_linux_answers_with_a_loop(
    start: int, five_levels: bool, good: bool
) -> None:
    layout = replace(LAYOUT, text_start=PhysAddr(start))
    if good:
        check_load_address(layout, five_levels)
        return
    with pytest.raises(KernelError, match=f"kernel at {start:#x}: a multiple of 2 MiB"):
        check_load_address(layout, five_levels)
    made = board()
    before = made.through(False, made.data.early_top_pgt, 0x1000)
    with pytest.raises(KernelError):
        startup_64_tables(made.cpu, made.state, layout, made.data, five_levels)
    assert made.through(False, made.data.early_top_pgt, 0x1000) == before


# .bss..decrypted


@pytest.mark.req("LB-23")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_bss_decrypted_loses_c_and_is_garbage_until_cleared(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS)
    made.run_to(Stage.ENCRYPTED)
    share_bss_decrypted(made.cpu, made.state, made.layout, made.data)
    pmds = made.table(made.data.level2_kernel_pgt, c_bit=True)
    c = made.c_mask
    assert [entry & c for entry in pmds[8:11]] == [c, 0, c]
    assert pmds[9] == SHARED[0] | 0x1E3
    assert made.through(False, SHARED[0], 4096) != bytes(4096)
    assert made.through(False, SHARED[1] - 4096, 4096) != bytes(4096)


@pytest.mark.req("LB-23")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_clear_bss_zeroes_it_through_the_plain_mapping(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS, hazards="raise")
    booted = made.start()
    va = made.layout.virt(PhysAddr(SHARED[0]))
    assert made.cpu.load(va, 2 * MIB) == bytes(2 * MIB)
    assert not made.walk(made.cpu.read_cr3(), va).c_bits[-1]
    assert not made.cells(*SHARED).any()
    assert booted.state.me_mask


@pytest.mark.req("LB-23")
def test_an_inactive_kernel_changes_nothing_there() -> None:
    made = board(cmdline=b"")
    made.run_to(Stage.ENCRYPTED)
    before = made.table(made.data.level2_kernel_pgt, c_bit=False)
    made.events.clear()
    share_bss_decrypted(made.cpu, EncryptionState(), made.layout, made.data)
    assert made.table(made.data.level2_kernel_pgt, c_bit=False) == before
    assert made.facts("flush") == []


@pytest.mark.req("LB-23")
def test_it_works_on_an_sev_guest_too() -> None:
    made = built()
    state = EncryptionState(made.c_mask, sev_status=1)
    share_bss_decrypted(made.cpu, state, made.layout, made.data)
    pmds = made.table(made.data.level2_kernel_pgt, c_bit=False)
    assert [bool(entry & made.c_mask) for entry in pmds[8:11]] == [True, False, True]


@pytest.mark.req("PT-50", "PT-51", "BZ-13")
@pytest.mark.parametrize("seed", range(20))
def test_order_the_copied_lines_leave_before_bss_is_stored_plain(seed: int) -> None:
    made = board(INCOHERENT, seed=seed)
    made.start()
    assert made.machine.caches.hazards_met == []
    made.machine.caches.evict()
    # A line left dirty under C = 1 would put ciphertext over the zeros, or not.
    assert not made.cells(*SHARED).any()


# The reference's own variables


def test_variables_lie_in_bss_page_by_page_without_overlap() -> None:
    data = KernelData.place(LAYOUT)
    assert data.early_top_pgt == LAYOUT.bss.start == 0x118_0000
    assert data.early_dynamic_pgts + 64 * 4096 == data.end
    assert (data.end - data.early_top_pgt) // 4096 == 74
    assert data.end <= LAYOUT.bss_decrypted.start


def layout_with(**places: object) -> KernelLayout:
    return replace(LAYOUT, **places)  # type: ignore[arg-type]


def span(start: int, end: int) -> Range:
    return Range(PhysAddr(start), PhysAddr(end))


def test_variables_go_behind_end_where_bss_has_no_room() -> None:
    nothing = span(0x140_0000, 0x140_0000)
    layout = layout_with(bss=span(0x13F_0000, 0x140_0000), bss_decrypted=nothing)
    data = KernelData.place(layout)
    assert data.early_top_pgt >= END
    assert data.end <= layout.kernel_end


def test_variables_without_room_anywhere_are_refused() -> None:
    nothing = span(0x15F_0000, 0x15F_0000)
    layout = layout_with(bss=nothing, bss_decrypted=nothing, end=PhysAddr(0x15F_0000))
    with pytest.raises(KernelError, match="no 0x4a000 bytes for early tables"):
        KernelData.place(layout)


def test_a_kernel_with_ragged_bss_and_without_a_shared_part_boots() -> None:
    image = cached_builtin(1)
    bss = span(image.layout.bss.start - 0x100, image.layout.bss.end)
    layout = replace(image.layout, bss=bss, bss_decrypted=span(bss.end, bss.end))
    made = board(INCOHERENT, image=replace(image, layout=layout), hazards="raise")
    made.start()
    assert made.data.early_top_pgt == image.layout.bss.start
    assert not np.frombuffer(made.through(True, *SHARED[:1], 4096), np.uint8).any()
    assert made.cells(*SHARED).any()  # ciphertext of zeros


def test_the_fixmap_window_lies_below_the_tables_that_map_it() -> None:
    made = board()
    booted = made.start()
    window = booted.data.window(made.layout)
    c = made.c_mask
    for va, slot in (
        (window.source_va, window.source_slot),
        (window.target_va, window.target_slot),
    ):
        made.cpu.store64(slot, 0x3FF_0000 | 0x063 | c)
        assert made.walk(made.cpu.read_cr3(), va).pa == 0x3FF_0000
    assert made.layout.virt(booted.data.conversion_buffer) == window.buffer
    assert VirtAddr(KERNEL_MAP) < window.source_va < window.target_va
