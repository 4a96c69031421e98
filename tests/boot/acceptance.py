"""The acceptance: what must hold when a kernel has encrypted itself, by what is seen.

`findings` boots a board and looks from outside: at DRAM as a probe, through C = 1 and
C = 0 as software, at the tables entry by entry, at the hazards that the machine met. It
knows nothing of how the code under test works, so a mutant of that code is judged by
the same eyes as the code itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from cbit.boot.startup import Booted, Stage
from cbit.hw.errors import CbitError
from cbit.hw.types import PhysAddr
from cbit.kernel.cc import EncryptionState

from .conftest import LARGE, MIB, PRESENT, TABLE_ADDRESS, Board, equal_blocks

FRESH = 12 * MIB
"""A page that nobody has used when the boot is over; counted from the end of RAM."""

BOOT_DATA = 0x9_0000, 0x3000
"""Where the loader puts zero page, command line and setup data; address and length."""

SECRET = b"a secret of the kernel's own"

POOL_PAGES = {
    (4, False): 25,
    (4, True): 41,
    (5, False): 34,
    (5, True): 56,
}
"""By levels of tables and presence of an initrd. Source: linux_sme_boot, LB-37."""


def findings(made: Board) -> list[str]:
    """Boot and return what is wrong, each complaint with its topic in front.

    Topics: died, tables, cr3, alias, pool, through, dram, shared, plain, later, hazard.
    """
    complaints: list[str] = []
    loaded = made.through(False, *BOOT_DATA)

    def observe(stage: Stage, state: EncryptionState) -> None:
        if stage is Stage.TABLES_BUILT:
            complaints.extend(_tables_without_c(made))
        elif stage is Stage.ENCRYPTED:
            complaints.extend(_left_over_after_the_copy(made))

    try:
        booted = made.start(observe)
        complaints.extend(_end_state(made, booted, loaded))
    except CbitError as error:
        complaints.append(f"died: {error}")
    complaints.extend(_contents_at_the_end(made))
    complaints.extend(
        f"hazard: {h.describe()}" for h in made.machine.caches.hazards_met
    )
    return complaints


def topics(complaints: list[str]) -> set[str]:
    return {complaint.partition(":")[0] for complaint in complaints}


def _tables_without_c(made: Board) -> Iterator[str]:
    """Every present entry below early_top_pgt carries C; read before encryption."""
    todo: list[tuple[int, int]] = [(made.data.early_top_pgt, made.levels)]
    seen = set()
    while todo:
        table, level = todo.pop()
        if table in seen:
            continue
        seen.add(table)
        for index, entry in enumerate(made.table(table, c_bit=False)):
            if not entry & PRESENT:
                continue
            if not entry & made.c_mask:
                yield f"tables: entry {index} of {table:#x} lacks C: {entry:#x}"
            if level > 1 and not entry & LARGE:
                todo.append((entry & TABLE_ADDRESS & ~made.c_mask, level - 1))


def _left_over_after_the_copy(made: Board) -> Iterator[str]:
    cr3 = made.cpu.read_cr3()
    if cr3 & made.c_mask:
        yield f"cr3: {cr3:#x} has C while the tables are plain"
        return
    for index, entry in enumerate(made.table(cr3, c_bit=False)):
        if index and entry:
            yield f"alias: PGD entry {index} of the work area is {entry:#x}"
    starts = [made.layout.text_start]
    starts += [made.hand_over.initrd[0]] if made.hand_over.initrd else []
    for start in starts:
        if not made.maps(cr3, start) or not made.walk(cr3, start).c_bits[-1]:
            yield f"alias: {start:#x} is not mapped with C"


def _end_state(made: Board, booted: Booted, loaded: bytes) -> Iterator[str]:
    yield from _mappings(made)
    yield from _pool(made, booted)
    fresh = made.machine.map.ram_end - FRESH
    made.cpu.store(booted.tables.direct_map(fresh), SECRET)
    if SECRET in made.cells(fresh, fresh + 4096).tobytes():
        yield f"later: what was stored at {fresh:#x} is plain"
    shared = made.layout.bss_decrypted
    if made.cells(shared.start, shared.end).any():
        yield "shared: .bss..decrypted is not zero in DRAM"
    area = made.layout.workarea
    plain_area = made.through(False, area.start, area.size)
    if made.cells(area.start, area.end).tobytes() != plain_area or not any(plain_area):
        yield "plain: the work area is not plain"
    if made.machine.snoop(*BOOT_DATA) != loaded:
        yield "plain: boot data in DRAM is not what the loader stored"
    copied = made.cpu.load(made.layout.virt(booted.data.boot_params), 4096)
    if copied != loaded[:4096]:
        yield "plain: the kernel's copy of boot_params is not the loader's"


def _contents_at_the_end(made: Board) -> Iterator[str]:
    """Compare the encrypted ranges, also of a boot that died."""
    for start, plain in _contents(made):
        end = start + len(plain)
        if made.through(True, start, len(plain)) != plain:
            yield f"through: C = 1 does not read [{start:#x}, {end:#x}) as it was"
        equal = equal_blocks(made.cells(start, end), plain)
        if equal:
            yield f"dram: {len(equal)} blocks are plaintext from {start + equal[0]:#x}"


def _mappings(made: Board) -> Iterator[str]:
    cr3, virt = made.cpu.read_cr3(), made.layout.virt
    if not cr3 & made.c_mask:
        yield f"cr3: {cr3:#x} has no C at the end"
    shared = made.layout.bss_decrypted
    for pa in range(made.layout.text_start, made.layout.end, 2 * MIB):
        leaf = made.walk(cr3, virt(PhysAddr(pa)))
        if leaf.c_bits[-1] == (pa in shared):
            yield f"tables: {pa:#x} has C = {leaf.c_bits[-1]:d} in the kernel's map"
    for pa in (made.layout.text_start, 0x9_0000):
        if made.maps(cr3, pa) or _reads(made, pa):
            yield f"alias: {pa:#x} is still mapped by identity"


def _pool(made: Board, booted: Booted) -> Iterator[str]:
    done = booted.encrypted
    if done is None:
        yield "pool: nothing was encrypted"
        return
    wanted = POOL_PAGES[made.levels, made.hand_over.initrd is not None]
    if done.workarea.pgtable_pages != wanted:
        yield f"pool: {done.workarea.pgtable_pages} pages, not {wanted}"
    if done.workarea.execute_end != done.workarea.start + 0x20_2000:
        yield f"pool: starts at {done.workarea.execute_end:#x}"


def _reads(made: Board, va: int) -> bool:
    try:
        made.cpu.load(va, 1)
    except CbitError:
        return False
    return True


def _contents(made: Board) -> Iterator[tuple[int, bytes]]:
    """Yield what the loader put into the encrypted ranges and the kernel keeps."""
    layout = made.layout
    bss = layout.bss.start & -16
    yield layout.text_start, made.plain(layout.text_start, bss)
    yield layout.end, made.plain(layout.end, -(-layout.end // (2 * MIB)) * 2 * MIB)
    if made.hand_over.initrd:
        start, size = made.hand_over.initrd
        yield start, made.initrd.ljust(-(-size // 4096) * 4096, b"\0")
