"""kernel/pgtable.py: masks, flag sets and indices, held against Linux's numbers."""

from __future__ import annotations

from random import Random

import pytest

from cbit.hw import Machine
from cbit.hw.faults import PageFault
from cbit.kernel import pgtable
from cbit.kernel.cc import EncryptionState
from cbit.kernel.mem_encrypt import sme_early_init
from cbit.kernel.pgtable import Page

from ..hw.test_paging_witness import Tables, long_mode

C47, C51 = 1 << 47, 1 << 51
ALL_64 = (1 << 64) - 1
OFF = EncryptionState()
POSITIONS = pytest.mark.parametrize("c_mask", [C47, C51], ids=["C=47", "C=51"])


# --- the bits


@pytest.mark.req("PT-T1")
def test_vector_bits_of_an_entry() -> None:
    # Linux 6.1.192 pgtable_types.h, _PAGE_BIT_*.
    positions = {
        "PRESENT": 0,
        "RW": 1,
        "USER": 2,
        "PWT": 3,
        "PCD": 4,
        "ACCESSED": 5,
        "DIRTY": 6,
        "PSE": 7,
        "PAT": 7,
        "GLOBAL": 8,
        "PAT_LARGE": 12,
        "DEVMAP": 58,
        "NX": 63,
    }
    members = Page.__members__.items()
    assert {name: int(bit).bit_length() - 1 for name, bit in members} == positions


# --- masks


@pytest.mark.req("PT-31", "PT-32")
@POSITIONS
def test_vector_the_c_bit_counts_among_the_flags(c_mask: int) -> None:
    state = EncryptionState(me_mask=c_mask)
    assert OFF.physical_mask == 0x000F_FFFF_FFFF_FFFF
    assert state.physical_mask == 0x000F_FFFF_FFFF_FFFF - c_mask
    assert pgtable.pfn_mask(OFF) == 0x000F_FFFF_FFFF_F000
    assert pgtable.pfn_mask(state) == 0x000F_FFFF_FFFF_F000 - c_mask


@pytest.mark.req("PT-12", "PT-32")
@POSITIONS
def test_law_an_entry_is_frame_and_flags(c_mask: int) -> None:
    random = Random(1)
    state = EncryptionState(me_mask=c_mask)
    for _ in range(100):
        frame = random.getrandbits(43) & -0x1000
        flags = random.getrandbits(12) | random.getrandbits(12) << 52
        for c_bit in (0, c_mask):
            entry = frame | flags | c_bit
            assert pgtable.entry_phys(state, entry) == frame
            assert entry & ~pgtable.pfn_mask(state) == flags | c_bit


def test_while_inactive_the_c_bit_is_an_address_bit() -> None:
    assert pgtable.entry_phys(OFF, C47 | 0x5063) == C47 | 0x5000


# --- protections


@pytest.mark.req("PT-33", "PT-34", "PT-48")
@POSITIONS
@pytest.mark.parametrize("flags", [0, 0x063, 0x1E3, 0x8000_0000_0000_0163])
def test_pgprot_encrypted_sets_the_c_bit_and_decrypted_clears_it(
    c_mask: int, flags: int
) -> None:
    state = EncryptionState(me_mask=c_mask)
    assert pgtable.encrypted(state, flags) == flags | c_mask
    assert pgtable.encrypted(state, flags | c_mask) == flags | c_mask
    assert pgtable.decrypted(state, flags | c_mask) == flags
    assert pgtable.decrypted(state, flags) == flags


@pytest.mark.req("PT-33", "PT-48")
def test_while_inactive_a_protection_stays_as_it_is() -> None:
    for flags in (0x063, C47 | 0x063, ALL_64):
        assert pgtable.encrypted(OFF, flags) == pgtable.decrypted(OFF, flags) == flags


@pytest.mark.req("PT-34")
@POSITIONS
def test_a_change_of_protection_neither_encrypts_nor_decrypts(c_mask: int) -> None:
    state = EncryptionState(me_mask=c_mask)
    read_only = 0x025 | 1 << 63  # PAGE_READONLY
    for frame in (0x1000, 0x7FF_FFFF_F000):
        for c_bit, other in ((c_mask, 0), (0, c_mask)):
            changed = pgtable.pte_modify(
                state, frame | c_bit | 0x067, read_only | other
            )
            assert changed == frame | c_bit | 0x065 | 1 << 63


@pytest.mark.req("PT-34")
def test_vector_what_a_change_of_protection_keeps() -> None:
    # _PAGE_CHG_MASK: PFN, PCD, PWT, SPECIAL (9), A, D, SOFT_DIRTY (11), DEVMAP (58),
    # CC, UFFD_WP (10), PAT (7).
    state = EncryptionState(me_mask=C51)
    kept = 0x000F_FFFF_FFFF_F000 | 0x0EF8 & ~0x100 | 1 << 58
    assert pgtable.pte_modify(state, ALL_64, 0) == kept
    assert pgtable.pte_modify(state, 0, ALL_64) == ALL_64 - kept


# --- flag sets


@pytest.mark.req("PT-35", "PT-36", "PT-38")
def test_vector_tables() -> None:
    # _KERNPG_TABLE_NOENC, _PAGE_TABLE_NOENC; the same with _PAGE_ENC.
    state = EncryptionState(me_mask=C47)
    assert pgtable.KERNPG_TABLE_NOENC == 0x063
    assert pgtable.PAGE_TABLE_NOENC == 0x067
    assert pgtable.encrypted(state, pgtable.KERNPG_TABLE_NOENC) == 0x8000_0000_0063
    assert pgtable.encrypted(state, pgtable.PAGE_TABLE_NOENC) == 0x8000_0000_0067


@pytest.mark.req("PT-37", "PT-39", "PT-40", "PT-41", "PT-42", "PT-44")
def test_vector_leaves_of_early_boot() -> None:
    # __PAGE_KERNEL_LARGE_EXEC; PMD_FLAGS_* and PTE_FLAGS_* of mem_encrypt_identity.c.
    assert pgtable.PAGE_KERNEL_LARGE_EXEC == 0x1E3
    assert pgtable.PMD_FLAGS_LARGE == pgtable.PMD_FLAGS_DEC == 0x0E3
    assert pgtable.PMD_FLAGS_DEC_WP == 0x10EB
    assert pgtable.PTE_FLAGS == pgtable.PTE_FLAGS_DEC == 0x063
    assert pgtable.PTE_FLAGS_DEC_WP == 0x0EB
    state = EncryptionState(me_mask=C51)
    assert pgtable.encrypted(state, pgtable.PMD_FLAGS_DEC) == 0x8_0000_0000_00E3
    assert pgtable.encrypted(state, pgtable.PTE_FLAGS) == 0x8_0000_0000_0063


@pytest.mark.req("PT-41", "PT-42", "PT-T2")
@pytest.mark.parametrize(
    ("flags", "pat_bit"),
    [(pgtable.PMD_FLAGS_DEC_WP, 12), (pgtable.PTE_FLAGS_DEC_WP, 7)],
)
def test_write_protected_leaves_select_entry_5_of_the_pat(
    flags: int, pat_bit: int
) -> None:
    pat, pcd, pwt = flags >> pat_bit & 1, flags >> 4 & 1, flags >> 3 & 1
    assert pat << 2 | pcd << 1 | pwt == 5


@pytest.mark.req("PT-43")
def test_vector_tables_of_the_decompressor() -> None:
    # head_64.S: "0x1007", "0x00000183".
    assert pgtable.BOOT_TABLE_FLAGS == 0x007
    assert pgtable.BOOT_PMD_FLAGS == 0x183


@pytest.mark.parametrize("shift", [12, 21])
@pytest.mark.parametrize("active", [False, True])
def test_every_flag_set_is_taken_by_the_hardware(active: bool, shift: int) -> None:
    machine = Machine("milan", ram=16 << 20, seed=1)
    state = EncryptionState(me_mask=C51 if active else 0)
    pointers = pgtable.encrypted(state, pgtable.KERNPG_TABLE_NOENC)
    tables = Tables(machine, tags=dict.fromkeys((30, 21, 12), active))
    leaves = {
        12: [pgtable.PTE_FLAGS_DEC, pgtable.PTE_FLAGS_DEC_WP],
        21: [
            pgtable.PMD_FLAGS_DEC,
            pgtable.PMD_FLAGS_DEC_WP,
            pgtable.PAGE_KERNEL_LARGE_EXEC,
            pgtable.BOOT_PMD_FLAGS,
        ],
    }[shift]
    for number, flags in enumerate(leaves):
        entry = pgtable.encrypted(state, 0x20_0000 | flags)
        tables.map(number << 21, entry, shift, pointers=pointers)
    long_mode(machine.cpu, tables.cr3)
    for number in range(len(leaves)):
        found = machine.cpu.translate(number << 21, write=True)
        assert (found.pa, found.slot) == (0x20_0000, int(active))


@pytest.mark.req("PT-46", "PT-45")
@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("vm_flags", range(16))
def test_a_user_may_do_what_his_mapping_says(vm_flags: int, active: bool) -> None:
    # VM_READ 1, VM_WRITE 2, VM_EXEC 4, VM_SHARED 8. Anything readable is so through
    # any of the three; a private page is copied at the first store, so never writable.
    machine = Machine("milan", ram=16 << 20, seed=1)
    state = EncryptionState(me_mask=C51 if active else 0)
    flags = sme_early_init(state).protection_map[vm_flags]
    assert bool(flags & C51) == active
    tables = Tables(machine)
    tables.map(0x5000, 0x20_0000 | flags)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3)
    cpu.cpl = 3
    for allowed, act in (
        (vm_flags & 7 != 0, lambda: cpu.load(0x5000, 1)),
        (vm_flags & 10 == 10, lambda: cpu.store(0x5000, b"x")),
        (vm_flags & 4 != 0, lambda: cpu.fetch(0x5000, 1)),
    ):
        if allowed:
            act()
            assert cpu.translate(0x5000).slot == int(active)
        else:
            with pytest.raises(PageFault):
                act()


# --- indices and levels


@pytest.mark.req("PT-1", "PT-3")
def test_vector_shifts_and_sizes() -> None:
    # pgtable_64_types.h: PMD_SHIFT 21, PUD_SHIFT 30, P4D_SHIFT 39, PGDIR_SHIFT 48.
    assert pgtable.table_shifts(five_levels=False) == (39, 30, 21, 12)
    assert pgtable.table_shifts(five_levels=True) == (48, 39, 30, 21, 12)
    assert (pgtable.PMD_SIZE, pgtable.PUD_SIZE) == (2 << 20, 1 << 30)
    assert (pgtable.P4D_SIZE, pgtable.PTRS_PER_TABLE) == (512 << 30, 512)


@pytest.mark.req("PT-2")
def test_vector_the_pgd_is_the_top_table_whatever_its_level() -> None:
    assert pgtable.pgdir_shift(five_levels=False) == 39
    assert pgtable.pgdir_shift(five_levels=True) == 48


@pytest.mark.req("PT-1", "PT-2")
@pytest.mark.parametrize(
    ("va", "indices"),
    [
        # __START_KERNEL_map and the direct maps of Documentation/x86/x86_64/mm.rst.
        (0xFFFF_FFFF_8000_0000, [511, 511, 510, 0, 0]),
        (0xFFFF_8880_0000_0000, [511, 273, 0, 0, 0]),
        (0xFF11_0000_0000_0000, [273, 0, 0, 0, 0]),
        (0xFFFF_FFFF_FFFF_FFFF, [511] * 5),
        (0x0000_0080_4030_2000, [0, 1, 1, 1, 258]),
        (0, [0] * 5),
    ],
)
def test_vector_indices(va: int, indices: list[int]) -> None:
    shifts = pgtable.table_shifts(five_levels=True)
    assert [pgtable.table_index(va, shift) for shift in shifts] == indices


def test_vector_where_linux_puts_its_maps() -> None:
    # Documentation/x86/x86_64/mm.rst; sparsemem.h MAX_PHYSMEM_BITS.
    assert pgtable.START_KERNEL_MAP == 0xFFFF_FFFF_8000_0000
    assert pgtable.page_offset(five_levels=False) == 0xFFFF_8880_0000_0000
    assert pgtable.page_offset(five_levels=True) == 0xFF11_0000_0000_0000
    assert pgtable.MAX_PHYSMEM_BITS_4_LEVEL == 46
    assert pgtable.MAX_PHYSMEM_BITS_5_LEVEL == 52
