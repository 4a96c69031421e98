"""The acceptance passes for the reference and fails for every mutant of it, by what it
sees.

A mutant is the reference with one step dropped or done wrong: a core that leaves out
an instruction, or a function or constant replaced. What the mutants say of the
hardware is part of it: some pass on coherent parts, as they do on silicon.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from cbit.boot import encrypt, startup
from cbit.boot.early_tables import share_bss_decrypted, startup_64_tables
from cbit.boot.identity_map import IdentityMapper, TablePool
from cbit.boot.image import KernelLayout
from cbit.hw.cpu import Cpu
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState
from cbit.kernel.mem_encrypt import PageDefaults, sme_early_init, sme_map_bootdata

from .acceptance import findings, topics
from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    INCOHERENT,
    MIB,
    Board,
    board,
    cached_builtin,
    random_bytes,
)

LAYOUT = cached_builtin(1).layout
TOP, LEVEL4, LEVEL3, KERNEL_PMDS, FIXMAP = range(0x118_0000, 0x118_5000, 4096)
"""The built-in kernel's early_top_pgt and what follows it page by page."""

POOL = 0x180_2000
PGE = 1 << 7
INITRD = random_bytes(3 * MIB + 100)
EVERYWHERE = (COHERENT, INCOHERENT, FIVE_LEVELS)


def prepared(model: str, core: type[Cpu] = Cpu, initrd: bytes = b"") -> Board:
    """A board whose loader has global pages on and the kernel in its TLB.

    One line of every page is dirty under C = 0, not all of them: that is enough for a
    missing flush to show, and quicker to sort out.
    """
    made = board(model, la57=model == FIVE_LEVELS, core=core, initrd=initrd, seed=5)
    made.machine.caches.write_back_invalidate()
    made.cpu.write_cr4(made.cpu.read_cr4() | PGE)
    for va in range(made.layout.kernel_start, made.layout.kernel_end, 4096):
        made.cpu.store(va, made.cpu.load(va, 1))
    return made


@pytest.mark.req("LB-T1", "LB-T3", "WP-21", "BZ-12", "BZ-13")
@pytest.mark.parametrize("initrd", [b"", INITRD], ids=["", "initrd"])
@pytest.mark.parametrize("model", EVERYWHERE)
def test_the_reference_is_accepted(model: str, initrd: bytes) -> None:
    assert findings(prepared(model, initrd=initrd)) == []


# Cores that leave something out


class NoWbinvdBeforeTheCopy(Cpu):
    """Drops the first WBINVD, executes the others."""

    flushes = 0

    def wbinvd(self) -> None:
        self.flushes += 1
        if self.flushes > 1:
            super().wbinvd()


class NoWbinvdBeforeSharing(Cpu):
    """Drops the WBINVD behind the copy: Linux's own order."""

    flushes = 0

    def wbinvd(self) -> None:
        self.flushes += 1
        if self.flushes == 1:
            super().wbinvd()


class NoToggle(Cpu):
    """CR4.PGE stays what it is."""

    def write_cr4(self, value: int) -> None:
        super().write_cr4(value | self.read_cr4() & PGE)


class CTooEarly(Cpu):
    """Loads the work area's tables with C, although they are plain."""

    def write_cr3(self, value: int) -> None:
        c_mask = 1 << (self.model.table.leaf(0x8000_001F).ebx & 63)
        super().write_cr3(value | c_mask if value == POOL else value)


class NoCInCr3(Cpu):
    def write_cr3(self, value: int) -> None:
        super().write_cr3(value & (1 << 47) - 1)


class StraightFirstPages(Cpu):
    """Copies the first 8 KiB of the kernel without the buffer in between."""

    def copy(self, target: VirtAddr | int, source: VirtAddr | int, length: int) -> None:
        if target == LAYOUT.text_start:
            base = 1 << 48 if self.read_cr4() & 1 << 12 else 1 << 39
            super().copy(target, target + base, 0x2000)
            target, source, length = target + 0x2000, source + 0x2000, length - 0x2000
        super().copy(target, source, length)


def forgets_c_at(*slots: int) -> type[Cpu]:
    """Return a core that stores entries at these addresses without the C-bit."""

    class ForgetsC(Cpu):
        def store64(self, va: int, value: int) -> None:
            if va in slots:
                value &= (1 << 47) - 1
            super().store64(va, value)

    return ForgetsC


class ForgetsCInOnePmd(Cpu):
    """Stores level2_kernel_pgt with C in every entry but that of _text."""

    def store_array(self, va: VirtAddr | int, words: npt.NDArray[np.uint64]) -> None:
        if va == KERNEL_PMDS:
            words[LAYOUT.text_start >> 21] &= np.uint64((1 << 47) - 1)
        super().store_array(va, words)


class Mutant(NamedTuple):
    """A way to be wrong, where it is wrong, and what is seen of it.

    Attributes:
        seen: the topics of the findings; each must be among them.
        models: where it shows.
        core: the core that does it wrong.
        initrd: what the loader brings.
    """

    seen: set[str]
    models: tuple[str, ...] = EVERYWHERE
    core: type[Cpu] = Cpu
    initrd: bytes = b""


BY_CORE = {
    "no-wbinvd-before-the-copy": Mutant(
        {"hazard"}, (INCOHERENT,), NoWbinvdBeforeTheCopy
    ),
    "no-pge-toggle": Mutant({"died", "dram"}, EVERYWHERE, NoToggle),
    "c-in-cr3-too-early": Mutant({"died"}, EVERYWHERE, CTooEarly),
    "no-c-in-cr3": Mutant({"died"}, EVERYWHERE, NoCInCr3),
    "no-buffer": Mutant({"through"}, (COHERENT, FIVE_LEVELS), StraightFirstPages),
    "no-buffer-incoherent": Mutant({"hazard"}, (INCOHERENT,), StraightFirstPages),
    # One level after the other
    "pgd-without-c": Mutant(
        {"died", "tables"}, EVERYWHERE, forgets_c_at(TOP + 8 * 511)
    ),
    "p4d-without-c": Mutant(
        {"died", "tables"}, (FIVE_LEVELS,), forgets_c_at(LEVEL4 + 8 * 511)
    ),
    "pud-without-c": Mutant(
        {"died", "tables"}, EVERYWHERE, forgets_c_at(LEVEL3 + 8 * 510)
    ),
    "pmd-without-c": Mutant({"tables"}, EVERYWHERE, ForgetsCInOnePmd),
    "fixmap-pud-without-c": Mutant(
        {"tables"}, EVERYWHERE, forgets_c_at(LEVEL3 + 8 * 511)
    ),
    "fixmap-pmd-without-c": Mutant(
        {"tables"}, EVERYWHERE, forgets_c_at(FIXMAP + 8 * 506)
    ),
    "switch-over-without-c": Mutant({"tables"}, EVERYWHERE, forgets_c_at(TOP)),
}


@pytest.mark.req("LB-62", "LB-64", "LB-67", "PT-20", "PT-21", "PT-22", "PT-23")
@pytest.mark.req("PT-50", "PT-51", "BZ-12", "BZ-13")
@pytest.mark.parametrize(
    ("mutant", "model"),
    [
        pytest.param(mutant, model, id=f"{name}-{model}")
        for name, mutant in BY_CORE.items()
        for model in mutant.models
    ],
)
def test_a_core_that_leaves_something_out_is_caught(mutant: Mutant, model: str) -> None:
    found = findings(prepared(model, mutant.core, mutant.initrd))
    assert mutant.seen <= topics(found), found


@pytest.mark.req("PT-52", "WP-32")
@pytest.mark.parametrize("core", [NoWbinvdBeforeTheCopy, NoWbinvdBeforeSharing])
def test_coherent_parts_forgive_a_missing_flush(core: type[Cpu]) -> None:
    assert findings(prepared(COHERENT, core)) == []


@pytest.mark.req("PT-50", "PT-51", "BZ-13")
def test_linuxs_own_order_is_a_hazard_of_bss_decrypted_alone() -> None:
    made = prepared(INCOHERENT, NoWbinvdBeforeSharing)
    assert topics(findings(made)) >= {"hazard"}
    shared = LAYOUT.bss_decrypted
    for hazard in made.machine.caches.hazards_met:
        assert shared.start <= hazard.pa < hazard.pa + hazard.length <= shared.end
        assert (hazard.kind, hazard.slot, hazard.other_slot) == ("dirty-alias", 0, 1)


# Functions and constants replaced


def source_with_c(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(encrypt, "PMD_FLAGS_DEC_WP", 0x10EB | c_mask)


def target_without_c(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(encrypt, "encrypted", lambda state, flags: int(flags))


def aliases_left(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(IdentityMapper, "clear_pgd", lambda self, va, va_end: None)


def work_areas_alias_left(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    clear = IdentityMapper.clear_pgd

    def not_the_work_area(self: IdentityMapper, va: int, va_end: int) -> None:
        clear(self, va, va_end)
        if va & 0xFFF_FFFF == LAYOUT.workarea.start:
            self.map_range(LAYOUT.workarea.start, LAYOUT.workarea.end, va, 0xE3, 0x63)

    patch.setattr(IdentityMapper, "clear_pgd", not_the_work_area)


def pool_in_the_buffer(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(encrypt, "EXECUTE_SIZE", 2 * 4096)


def pool_too_small(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(
        encrypt,
        "TablePool",
        lambda start, end: TablePool(start, PhysAddr(start + 8192)),
    )


def pool_counted_wrong(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    calc = encrypt.sme_pgtable_calc
    patch.setattr(encrypt, "sme_pgtable_calc", lambda n, five: calc(n, five) - 4096)


def tail_left_plain(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(KernelLayout, "kernel_end", property(lambda self: self.end))


def sharing_forgotten(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(startup, "share_bss_decrypted", lambda *arguments: None)


def encryption_forgotten(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(startup, "sme_encrypt_kernel", lambda *arguments: None)


def initrd_forgotten(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(startup, "_initrd", lambda *arguments: None)


def sharing_before_the_encryption(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    def build_and_share(cpu: Cpu, state: EncryptionState, *rest: object) -> None:
        layout, data, _ = rest
        startup_64_tables(cpu, state, *rest)  # type: ignore[arg-type]
        share_bss_decrypted(cpu, state, layout, data)  # type: ignore[arg-type]

    patch.setattr(startup, "startup_64_tables", build_and_share)
    sharing_forgotten(patch, c_mask)


def boot_data_not_mapped(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    guest = 1  # an SEV guest maps nothing
    patch.setattr(
        startup,
        "sme_map_bootdata",
        lambda tables, cpu, state, at: sme_map_bootdata(
            tables, cpu, EncryptionState(state.me_mask, guest), at
        ),
    )


def faults_without_c(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    def forgets(state: EncryptionState) -> PageDefaults:
        return sme_early_init(EncryptionState())

    patch.setattr(startup, "sme_early_init", forgets)


def mask_not_in_cr3(patch: pytest.MonkeyPatch, c_mask: int) -> None:
    patch.setattr(EncryptionState, "with_mask", lambda self, value: value)


Change = Callable[[pytest.MonkeyPatch, int], None]

BY_CHANGE: dict[Change, Mutant] = {
    source_with_c: Mutant({"through", "dram"}),
    target_without_c: Mutant({"dram"}),
    aliases_left: Mutant({"alias"}),
    work_areas_alias_left: Mutant({"alias"}),
    pool_in_the_buffer: Mutant({"died"}),
    pool_too_small: Mutant({"died"}),
    pool_counted_wrong: Mutant({"pool"}),
    tail_left_plain: Mutant({"dram"}),
    sharing_forgotten: Mutant({"tables", "shared"}),
    encryption_forgotten: Mutant({"died"}),
    initrd_forgotten: Mutant({"dram", "through"}, initrd=INITRD),
    sharing_before_the_encryption: Mutant({"hazard"}, (INCOHERENT,)),
    boot_data_not_mapped: Mutant({"died"}),
    faults_without_c: Mutant({"later"}),
    mask_not_in_cr3: Mutant({"died"}),
}


@pytest.mark.req("LB-23", "LB-37", "LB-53", "LB-58", "LB-67", "LB-70", "LB-72", "LB-73")
@pytest.mark.req("PT-41", "BZ-12", "BZ-13")
@pytest.mark.parametrize(
    ("change", "model"),
    [
        pytest.param(change, model, id=f"{change.__name__}-{model}")
        for change, mutant in BY_CHANGE.items()
        for model in mutant.models
    ],
)
def test_a_step_that_is_dropped_or_wrong_is_caught(
    change: Change, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = BY_CHANGE[change]
    made = prepared(model, initrd=mutant.initrd)
    change(monkeypatch, made.c_mask)
    found = findings(made)
    assert mutant.seen <= topics(found), found
