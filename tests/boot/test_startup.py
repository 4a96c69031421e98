"""boot/startup.py: the whole order, register by register, and the state at the end."""

from __future__ import annotations

import pytest

from cbit.boot.early_tables import startup_64_tables
from cbit.boot.startup import (
    Booted,
    Stage,
    early_detect_mem_encrypt,
    set_up_efer,
    switch_to_kernel_tables,
)
from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import PageFault
from cbit.hw.types import PhysAddr
from cbit.kernel.cc import EncryptionState

from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    INCOHERENT,
    MIB,
    Board,
    Fact,
    altered,
    board,
    cached_model,
    equal_blocks,
    random_bytes,
)

LOADER_CR3 = 0x8_1000
TOP = 0x118_0000  # early_top_pgt of the built-in kernel
POOL = 0x180_2000
PAE, PGE = 1 << 5, 1 << 7
PG_WP_NE_ET_PE = 0x8001_0031
LINUX_PAT = 0x0407_0506_0007_0106
"""What pat_init() writes. Source: Linux 6.1.192 arch/x86/mm/pat/memtype.c."""

INITRD_DATA = random_bytes(5 * MIB + 100)


def first_touch(made: Board, pa: int) -> bytes:
    """Read through the early direct map, as a kernel would; the fault maps it."""
    base = 0xFF11_0000_0000_0000 if made.levels == 5 else 0xFFFF_8880_0000_0000
    return made.cpu.load(base + pa, 16)


# The order


@pytest.mark.req("LB-T1", "LB-50", "LB-58", "LB-59", "LB-61", "LB-62", "LB-63")
@pytest.mark.req("LB-64", "LB-66", "LB-70", "LB-73")
@pytest.mark.parametrize("initrd", [None, INITRD_DATA], ids=["", "initrd"])
def test_registers_and_flushes_of_the_whole_boot(initrd: bytes | None) -> None:
    made = board(INCOHERENT, initrd=initrd)
    c = 1 << 47
    made.start()
    copy: list[Fact] = [
        ("cr", "cr3", POOL),
        ("cr", "cr4", PAE),
        ("cr", "cr4", PAE | PGE),
        ("wrmsr", 0x277, 0x0007_0506_0007_0406),
        ("flush", "wbinvd"),
        ("wrmsr", 0x277, 0x0007_0406_0007_0406),
    ]
    assert made.facts("cr", "wrmsr", "flush") == [
        # The boot loader enters long mode.
        ("cr", "cr4", PAE),
        ("cr", "cr3", LOADER_CR3),
        ("wrmsr", 0xC000_0080, 0x100),
        ("cr", "cr0", 0x8000_0011),
        # sme_encrypt_kernel
        ("cr", "cr3", LOADER_CR3),
        *copy,
        *(copy if initrd else []),
        ("cr", "cr3", POOL),
        # Before .bss..decrypted is stored to through C = 0.
        ("flush", "wbinvd"),
        # startup_64
        ("cr", "cr4", PAE | PGE),
        ("cr", "cr3", TOP | c),
        ("cr", "cr4", PAE),
        ("cr", "cr4", PAE | PGE),
        # Setup EFER: SCE and NXE
        ("wrmsr", 0xC000_0080, 0xD01),
        ("cr", "cr0", PG_WP_NE_ET_PE),
        # reset_early_page_tables
        ("cr", "cr3", TOP | c),
        # Boot data: zero page and command line mapped, then unmapped.
        *[("cr", "cr3", TOP | c)] * 4,
        ("wrmsr", 0x277, LINUX_PAT),
    ]


@pytest.mark.req("LB-T1", "LB-10", "LB-70")
@pytest.mark.parametrize("la57", [False, True])
def test_an_inactive_boot_has_no_flush_and_no_c_in_cr3(la57: bool) -> None:
    made = board(FIVE_LEVELS, la57=la57, cmdline=b"quiet")
    booted = made.start()
    extra = 1 << 12 if la57 else 0
    assert made.facts("cr", "wrmsr", "flush")[4:] == [
        ("cr", "cr4", PAE | PGE | extra),
        ("cr", "cr3", TOP),
        ("cr", "cr4", PAE | extra),
        ("cr", "cr4", PAE | PGE | extra),
        ("wrmsr", 0xC000_0080, 0xD01),
        ("cr", "cr0", PG_WP_NE_ET_PE),
        ("cr", "cr3", TOP),
        ("wrmsr", 0x277, LINUX_PAT),
    ]
    assert booted.encrypted is None
    assert booted.command_line == b"quiet"


@pytest.mark.req("LB-T1")
def test_the_stages_come_in_order_and_know_the_decision() -> None:
    seen = []
    board().start(lambda stage, state: seen.append((stage, state.me_mask)))
    mask = 1 << 51
    assert seen == [
        (Stage.LOADED, 0),
        (Stage.TABLES_BUILT, mask),
        (Stage.ENCRYPTED, mask),
        (Stage.DONE, mask),
    ]


@pytest.mark.req("LB-T1", "LB-11")
def test_cpuid_and_msr_reads_of_the_whole_boot() -> None:
    made = board(INCOHERENT)
    made.start()
    reads = made.facts("cpuid", "rdmsr")
    assert reads[0] == ("rdmsr", 0xC000_0080)  # the loader sets EFER.LME
    assert reads[1:6] == [
        ("cpuid", 0x8000_0000),
        ("cpuid", 0x8000_001F),
        ("rdmsr", 0xC001_0131),
        ("cpuid", 1),
        ("rdmsr", 0xC001_0010),
    ]
    assert reads[6] == ("rdmsr", 0x277)
    assert ("rdmsr", 0xC000_0080) in reads[7:]  # once the kernel's tables are on


def test_a_machine_check_enable_of_the_loader_is_kept() -> None:
    made = board()
    made.cpu.write_cr4(made.cpu.read_cr4() | 1 << 6)
    made.start()
    assert made.cpu.read_cr4() == PAE | PGE | 1 << 6


# The end


@pytest.mark.req("LB-T3", "LB-56", "LB-57", "LB-59", "WP-20", "WP-21", "WP-26")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_a_probe_sees_ciphertext_of_the_kernel_and_plaintext_around_it(
    model: str,
) -> None:
    made = board(model, la57=model == FIVE_LEVELS, initrd=INITRD_DATA)
    loaded = made.cells(0x8_0000, 0xA_0000).tobytes()
    made.run_to(Stage.ENCRYPTED)
    area = made.layout.workarea
    text, end = made.layout.kernel_start, made.layout.kernel_end
    assert (text, end) == (0x100_0000, 0x160_0000)
    own = made.data  # the reference's tables, in .bss
    for start, stop in ((text, own.early_top_pgt), (own.end, end)):
        assert equal_blocks(made.cells(start, stop), made.plain(start, stop)) == []
        assert made.through(True, start, stop - start) == made.plain(start, stop)
    place, size = made.hand_over.initrd or (0, 0)
    padded = INITRD_DATA.ljust(-(-size // 4096) * 4096, b"\0")
    assert equal_blocks(made.cells(place, place + len(padded)), padded) == []
    assert made.through(True, place, size) == INITRD_DATA
    # Plain: the work area with its tables, and all the loader left in low memory but
    # the accessed bits of its page tables.
    assert made.cells(POOL, POOL + 4).tobytes() != bytes(4)
    plain = made.through(False, area.start, area.size)
    assert made.cells(area.start, area.end).tobytes() == plain
    assert made.cells(0x9_0000, 0xA_0000).tobytes() == loaded[0x1_0000:]
    assert b"mem_encrypt=on\0" in loaded


@pytest.mark.req("LB-T3", "LB-10")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
@pytest.mark.parametrize(
    ("line", "smee"),
    [(b"", True), (b"mem_encrypt=off", True), (b"mem_encrypt=on", False)],
)
def test_an_inactive_kernel_leaves_everything_plain(
    model: str, line: bytes, smee: bool
) -> None:
    made = board(model, cmdline=line, smee=smee, initrd=INITRD_DATA)
    booted = made.start()
    assert not booted.state.me_mask
    text = made.layout.text_start, made.layout.bss.start
    assert made.cells(*text).tobytes() == made.plain(*text)
    assert set(made.machine.dram.count_pages()) == {0}
    assert made.machine.caches.tag_changes == 0


@pytest.mark.req("WP-28", "WP-30")
@pytest.mark.parametrize("line", [b"", b"mem_encrypt=on"])
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_under_tsme_nothing_is_plain_active_or_not(model: str, line: bytes) -> None:
    made = board(model, cmdline=line, tsme=True, initrd=INITRD_DATA)
    booted = made.start()
    assert bool(booted.state.me_mask) == bool(line)
    text = made.layout.text_start, made.layout.bss.start
    assert equal_blocks(made.cells(*text), made.plain(*text)) == []
    assert made.cpu.load(made.layout.virt(text[0]), 4096) == made.plain(
        text[0], text[0] + 4096
    )
    assert set(made.machine.dram.count_pages()) == {1}
    assert made.machine.caches.hazards_met == []


@pytest.mark.req("LB-74", "LB-73")
@pytest.mark.parametrize("line", [b"mem_encrypt=on quiet", b"quiet"])
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_the_kernels_copies_of_the_boot_data_are_what_the_loader_wrote(
    model: str, line: bytes
) -> None:
    made = board(model, la57=model == FIVE_LEVELS, cmdline=line)
    page = made.through(False, made.hand_over.boot_params, 4096)
    booted = made.start()
    own = made.layout.virt
    assert made.cpu.load(own(booted.data.boot_params), 4096) == page
    copied = made.cpu.load(own(booted.data.boot_command_line), 2048)
    assert copied == line.ljust(2048, b"\0")
    assert booted.command_line == line
    c = bool(booted.state.me_mask)
    cells = made.cells(booted.data.boot_params, booted.data.boot_params + 4096)
    assert (cells.tobytes() == page) != c


@pytest.mark.req("LB-72", "LB-74")
def test_a_mapping_with_c_would_have_read_garbage() -> None:
    made = board()
    page = made.through(False, made.hand_over.boot_params, 16)
    made.start()
    assert first_touch(made, made.hand_over.boot_params) != page


@pytest.mark.req("LB-72", "PT-44", "WP-21")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_what_is_touched_after_the_boot_is_encrypted(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS)
    booted = made.start()
    fresh = 0x300_0000
    va = booted.tables.direct_map(fresh)
    made.cpu.store(va, b"something of the kernel's own")
    assert all(made.walk(made.cpu.read_cr3(), va).c_bits)
    assert b"something" not in made.cells(fresh, fresh + 4096).tobytes()
    assert booted.tables.faults == 1


@pytest.mark.req("LB-20", "LB-24", "LB-70", "PT-23", "PT-47", "WP-21")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_every_level_down_to_the_kernels_pages_has_c(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS)
    made.start()
    cr3 = made.cpu.read_cr3()
    assert cr3 == TOP | made.c_mask
    virt = made.layout.virt
    for pa in (0x100_0000, 0x117_FFFF, 0x141_0000 - 1):
        found = made.walk(cr3, virt(PhysAddr(pa)))
        assert found.pa == pa
        assert all(found.c_bits)
        assert len(found.c_bits) == made.levels
    assert not made.maps(cr3, 0x100_0000)  # the switch-over map is gone


@pytest.mark.req("LB-58", "LB-70", "BZ-12")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_no_plain_alias_of_the_kernel_is_left(model: str) -> None:
    made = board(model)
    booted = made.start()
    assert booted.encrypted is not None
    for at in (0x100_0000, 0x100_0000 + booted.encrypted.decrypted_base, 0x160_0000):
        with pytest.raises(PageFault):
            made.cpu.load(at, 1)


@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
@pytest.mark.parametrize("seed", range(3))
def test_no_boot_meets_a_hazard(model: str, seed: int) -> None:
    made = board(
        model, la57=model == FIVE_LEVELS, hazards="raise", seed=seed, initrd=INITRD_DATA
    )
    made.start()
    assert made.machine.caches.hazards_met == []


def outcome(made: Board, booted: Booted) -> tuple[object, ...]:
    return (
        booted.encrypted,
        booted.data,
        made.log.messages,
        made.cells(0, 64 * MIB).tobytes(),
    )


def test_two_boots_of_one_seed_are_one_and_another_seed_has_another_key() -> None:
    made = [board(INCOHERENT, seed=seed, initrd=INITRD_DATA) for seed in (3, 3, 4)]
    first, again, other = (outcome(m, m.start()) for m in made)
    assert first == again
    assert first[:3] == other[:3]
    assert first[3] != other[3]


# Width and log


@pytest.mark.req("LB-84", "PT-10", "WP-34")
@pytest.mark.parametrize(
    ("model", "smee", "bits"),
    [
        ("epyc-7742", True, 43),
        ("epyc-7742", False, 48),
        ("epyc-7763", True, 43),
        ("epyc-9654", True, 46),
        ("ryzen-7950x", True, 46),
        ("ryzen-6800hs", True, 48),  # EBX = 0: firmware cannot enable it
        ("epyc-7401p-guest", True, 48),
        (altered("epyc-7742", 0x8000_001F, eax=2), True, 48),
    ],
)
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b"mem_encrypt=off"])
def test_the_width_drops_with_syscfg_active_or_not(
    model: str | CpuModel, smee: bool, bits: int, line: bytes
) -> None:
    made = board(model, smee=smee, cmdline=line)
    assert made.start().physical_bits == bits
    assert early_detect_mem_encrypt(made.cpu) == bits


def test_the_log_of_an_active_boot() -> None:
    made = board(INCOHERENT, initrd=INITRD_DATA, cmdline=b"mem_encrypt=on \xff")
    shown: list[str] = []
    made.log.sink = shown.append
    made.start()
    assert made.log.messages == [
        "SME: active (mem_encrypt=on); C-bit is bit 47 of a page-table entry",
        "SME: kernel [mem 0x0000000001000000-0x00000000015fffff] encrypted in place",
        "SME: initrd [mem 0x0000000003aff000-0x0000000003ffffff] encrypted in place",
        "SME: work area [mem 0x0000000001600000-0x00000000019fffff], 7 of 41 page-"
        "table pages used, second mapping at 0x8000000000",
        r"Command line: mem_encrypt=on \xff",
        "SME: physical addresses have 43 bits, not 48",
        "SME: .bss..decrypted [mem 0x0000000001200000-0x00000000013fffff] stays plain",
        "RAMDISK: [mem 0x0000000003aff000-0x0000000003ffffff]",
        "Memory Encryption Features active: AMD SME",
    ]
    assert shown == [f"[    0.000000] {line}" for line in made.log.messages]


def test_the_log_of_an_inactive_boot() -> None:
    made = board(smee=False, cmdline=b"mem_encrypt=on")
    made.start()
    assert made.log.messages == [
        "SME: not active: SYSCFG[23] is 0: firmware did not enable SME",
        "Command line: mem_encrypt=on",
    ]


@pytest.mark.parametrize("nx", [True, False])
def test_no_execute_is_turned_on_where_the_processor_has_it(nx: bool) -> None:
    edx = cached_model(COHERENT).table.leaf(0x8000_0001).edx
    model = altered(COHERENT, 0x8000_0001, edx=edx if nx else edx & ~(1 << 20))
    made = board(model)
    set_up_efer(made.cpu)
    assert made.cpu.rdmsr(0xC000_0080) == (0xD01 if nx else 0x501)


# Steps that may not move


@pytest.mark.req("LB-23", "BZ-13")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_order_bss_decrypted_is_shared_after_the_encryption(model: str) -> None:
    made = board(model, hazards="raise")
    made.start()
    shared = made.layout.bss_decrypted
    va = made.layout.virt(shared.start)
    assert made.cpu.load(va, shared.size) == bytes(shared.size)
    assert not made.walk(made.cpu.read_cr3(), va).c_bits[-1]
    assert made.walk(made.cpu.read_cr3(), va).c_bits[:-1] == (True,) * 3
    # The copy changes the PAT and restores it; pat_init() comes much later.
    facts = made.facts("flush", "wrmsr")
    flushes = [i for i, fact in enumerate(facts) if fact[0] == "flush"]
    pat = [i for i, fact in enumerate(facts) if fact[:2] == ("wrmsr", 0x277)]
    assert (len(flushes), len(pat)) == (2, 3)
    assert pat[0] < flushes[0] < pat[1] < flushes[1] < pat[2]


@pytest.mark.req("LB-T1")
def test_order_the_toggle_after_cr3_drops_global_entries_of_the_old_tables() -> None:
    made = board(cmdline=b"")
    cpu, state = made.cpu, EncryptionState()
    cpu.write_cr4(cpu.read_cr4() | PGE)
    startup_64_tables(cpu, state, made.layout, made.data, five_levels=False)
    cpu.load(0x300_0000, 8)  # the loader's map is global
    made.events.clear()
    switch_to_kernel_tables(cpu, state, made.data, five_levels=False)
    with pytest.raises(PageFault):
        cpu.load(0x300_0000, 8)
    assert made.facts("cr", "wrmsr") == [
        ("cr", "cr4", PAE | PGE),
        ("cr", "cr3", TOP),
        ("cr", "cr4", PAE),
        ("cr", "cr4", PAE | PGE),
        # Setup EFER: SCE and NXE
        ("wrmsr", 0xC000_0080, 0xD01),
        ("cr", "cr0", PG_WP_NE_ET_PE),
    ]


@pytest.mark.req("LB-73", "LB-74")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT, FIVE_LEVELS])
def test_order_boot_data_is_mapped_plain_before_it_is_touched(model: str) -> None:
    made = board(model, la57=model == FIVE_LEVELS, hazards="raise")
    page = made.through(False, made.hand_over.boot_params, 4096)
    booted = made.start()
    own = made.layout.virt(booted.data.boot_params)
    assert made.cpu.load(own, 4096) == page
    assert booted.command_line == b"mem_encrypt=on"
    assert booted.tables.faults == 0
    assert "page-fault" not in {event.kind for event in made.events}
