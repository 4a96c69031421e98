"""Leaf tables and the decoding of the memory-encryption leaf."""

import random
import re

import pytest

from cbit.hw.cpuid import (
    ABSENT,
    CpuidLeaf,
    CpuidTable,
    CpuModel,
    LeafRange,
    MemoryEncryption,
)
from cbit.hw.cpuid.words import AddressSizes, FeatureEcx, MemEncryptEax, MemEncryptEbx
from cbit.hw.errors import CallerError

VENDOR = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # EBX, ECX, EDX of leaf 0
BARE, VIRTUAL = 0x7EF8_320B, 0xFED8_3203  # leaf 1 ECX of Rome and of a guest


def table(
    leaf_1f: CpuidLeaf | None,
    sizes: int = 0x3030,
    highest: int = 0x8000_0023,
    features: int = BARE,
) -> CpuidTable:
    """Return a small processor around one memory-encryption leaf."""
    leaves = {
        (0, 0): CpuidLeaf(0x10, *VENDOR),
        (1, 0): CpuidLeaf(0x00A0_0F11, 0, features, 0x178B_FBFF),
        (0x8000_0000, 0): CpuidLeaf(highest, *VENDOR),
        (0x8000_0008, 0): CpuidLeaf(sizes, 0, 0, 0),
    }
    if leaf_1f is not None:
        leaves[0x8000_001F, 0] = leaf_1f
    return CpuidTable(leaves)


def decode(
    eax: int, ebx: int, ecx: int, edx: int, sizes: int = 0x3030
) -> MemoryEncryption:
    return MemoryEncryption.decode(table(CpuidLeaf(eax, ebx, ecx, edx), sizes))


# --- the table


@pytest.mark.req("CM-1")
def test_vector_leaf_0_spells_the_vendor() -> None:
    # InstLatx64 prints EAX-EBX-ECX-EDX: 00000010-68747541-444D4163-69746E65.
    assert table(None).vendor == "AuthenticAMD"


def test_a_missing_leaf_reads_as_zeros() -> None:
    assert table(None).leaf(5) == ABSENT == (0, 0, 0, 0)
    assert not table(None).has(5)


@pytest.mark.req("CM-5")
def test_a_leaf_above_the_maximum_is_hidden_though_the_dump_has_it() -> None:
    hidden = table(CpuidLeaf(0xF, 0x16F, 0xF, 1), highest=0x8000_001E)
    assert not hidden.has(0x8000_001F)
    assert hidden.leaf(0x8000_001F) == ABSENT
    assert hidden.raw[0x8000_001F, 0].ebx == 0x16F
    assert 0x8000_001F not in [leaf for leaf, _, _ in hidden]


def test_the_leaf_after_all_ranges_reads_as_zeros() -> None:
    # InstLatx64 dumps of AMD parts end with CPUID 8FFFFFFF: all zeros.
    probed = table(None).replace({(0x8FFF_FFFF, 0): CpuidLeaf(1, 2, 3, 4)})
    assert probed.leaf(0x8FFF_FFFF) == ABSENT


def test_every_range_has_its_own_maximum() -> None:
    plain = table(None)
    assert plain.max_leaf() == 0x10
    assert plain.max_leaf(LeafRange.EXTENDED) == 0x8000_0023
    assert plain.max_leaf(LeafRange.HYPERVISOR) == 0


@pytest.mark.req("CM-12")
def test_hypervisor_leaves_are_seen_only_under_a_hypervisor() -> None:
    # KVM: Linux 6.1.192 Documentation/virt/kvm/x86/cpuid.rst.
    kvm = {
        (0x4000_0000, 0): CpuidLeaf(0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D),
        (0x4000_0001, 0): CpuidLeaf(0x0100_7EFB, 0, 0, 0),
    }
    assert table(None, features=BARE).replace(kvm).leaf(0x4000_0000) == ABSENT
    guest = table(None, features=VIRTUAL).replace(kvm)
    assert guest.leaf(0x4000_0000).ebx == 0x4B4D_564B
    assert guest.max_leaf(LeafRange.HYPERVISOR) == 0x4000_0001
    old = guest.replace(
        {(0x4000_0000, 0): CpuidLeaf(0, 0x4B4D_564B, 0x564B_4D56, 0x4D)}
    )
    assert old.has(0x4000_0001)


def test_a_second_hypervisor_interface_has_a_maximum_of_its_own() -> None:
    guest = table(None, features=VIRTUAL).replace(
        {
            (0x4000_0000, 0): CpuidLeaf(0x4000_000A, 0, 0, 0),
            (0x4000_0100, 0): CpuidLeaf(0x4000_0101, 0, 0, 0),
            (0x4000_0101, 0): CpuidLeaf(7, 0, 0, 0),
            (0x4000_0102, 0): CpuidLeaf(9, 0, 0, 0),
        }
    )
    assert guest.leaf(0x4000_0101).eax == 7
    assert guest.leaf(0x4000_0102) == ABSENT


def test_ecx_is_ignored_where_a_leaf_has_no_sub_leaves() -> None:
    rome = table(CpuidLeaf(0x1_000F, 0x16F, 0x1FD, 1))
    assert rome.leaf(0x8000_001F, 0xDEAD_BEEF) == rome.leaf(0x8000_001F)


def test_a_sub_leaf_that_does_not_exist_reads_as_zeros() -> None:
    caches = table(None).replace(
        {
            (0x8000_001D, 0): CpuidLeaf(0x4121, 1, 0, 0),
            (0x8000_001D, 1): CpuidLeaf(0x4122, 1, 0, 0),
        }
    )
    assert caches.leaf(0x8000_001D, 1).eax == 0x4122
    assert caches.leaf(0x8000_001D, 2) == ABSENT


def test_sub_leaves_of_a_dump_make_any_leaf_an_indexed_one() -> None:
    odd = table(None).replace({(0xE, n): CpuidLeaf(n + 1, 0, 0, 0) for n in range(2)})
    assert [odd.leaf(0xE, n).eax for n in range(3)] == [1, 2, 0]


def test_replace_leaves_the_original_alone() -> None:
    bare = table(None)
    other = bare.replace({(1, 0): CpuidLeaf(1, 2, VIRTUAL, 4)})
    assert (bare.word(FeatureEcx).hypervisor, other.word(FeatureEcx).hypervisor) == (
        0,
        1,
    )
    assert bare == table(None)
    assert hash(bare) == hash(table(None))
    assert bare != other


def test_a_table_cannot_be_changed_in_place() -> None:
    with pytest.raises(TypeError):
        table(None).raw[1, 0] = ABSENT  # type: ignore[index]


def test_a_number_wider_than_a_register_is_the_callers_mistake() -> None:
    with pytest.raises(CallerError, match="leaf 0x1 sub-leaf 0x0"):
        CpuidTable({(1, 0): CpuidLeaf(1 << 32, 0, 0, 0)})


def test_iteration_yields_visible_rows_in_order() -> None:
    leaves = [leaf for leaf, _, _ in table(CpuidLeaf(1, 0xB3, 0, 0))]
    assert leaves == [0, 1, 0x8000_0000, 0x8000_0008, 0x8000_001F]
    assert len(table(None)) == 4


def test_a_brand_with_control_characters_is_made_harmless() -> None:
    # ESC [ 2 J: a dump must not be able to clear the reader's screen.
    evil = table(None).replace({(0x8000_0002, 0): CpuidLeaf(0x4A32_5B1B, 0, 0, 0)})
    assert evil.brand.startswith("?[2J")
    assert evil.brand.isprintable()


@pytest.mark.req("CM-6")
def test_vector_address_sizes_of_rome_and_genoa() -> None:
    # Leaf 8000_0008 EAX of InstLatx64 AuthenticAMD0830F10 and 0A10F11 dumps.
    rome, genoa = AddressSizes(0x3030), AddressSizes(0x3934)
    assert (rome.phys_bits, rome.linear_bits, rome.guest_phys_bits) == (48, 48, 0)
    assert (genoa.phys_bits, genoa.linear_bits) == (52, 57)


# --- the memory-encryption leaf

REAL_PARTS = """
0800F12_K17_Zen_CPUID            8000001F 3030 0000000F-0000016F-0000000F-00000001 47 5 43 0 15 y n
0800F11_K17_Zen_CPUID4           8000001F 3030 00000007-0000016F-0000000F-00000000 47 5 43 0 15 y n
0800F11_K17_Zen_CPUID15_TR       8000001F 3030 00000007-0000016F-0000000F-00000001 47 5 43 0 15 y n
0800F82_K17_ZenP_CPUID           8000001F 3030 0000000F-0000016F-0000000F-00000000 47 5 43 0 15 y n
0830F10_K17_Rome_CPUID           80000020 3030 0001000F-0000016F-000001FD-00000001 47 5 43 0 509 y n
0870F10_K17_Matisse_CPUID_7      -        3030 0001000F-0000016F-000001FD-00000001 47 5 43 0 509 y n
0860F01_K17_Renoir_CPUID2        -        3030 0001000F-0000012F-0000000E-00000001 47 4 44 0 14 y n
0A00F11_K19_Milan_CPUID2         80000023 3030 0001FC3F-00004173-000001FD-00000001 51 5 43 4 509 y y
0A20F10_K19_Vermeer_CPUID1       80000023 3030 0001780F-00000173-000001FD-00000001 51 5 43 0 509 y n
0A50F00_K19_Cezanne_CPUID6       -        3030 0001780F-00000000-00000000-00000001 -  0 48 0 0 y n
0A40F41_K19_Rembrandt_01         80000023 3030 0001780F-00000000-00000000-00000001 -  0 48 0 0 y n
0A10F11_K19_Genoa_01             80000028 3934 030FFFEB-000041B3-000003EE-00000001 51 6 46 4 1006 n y
0A10F11_K19_Genoa_02             80000028 3934 030FFFFB-000041B3-000003EE-00000001 51 6 46 4 1006 n y
0AA0F02_K19_Bergamo_04           80000028 3934 030FFFFB-000041B3-000003EE-00000001 51 6 46 4 1006 n y
0A60F12_K19_Raphael_10           80000028 3030 00000001-000000B3-00000000-00000000 51 2 46 0 0 n n
0B00F21_K20_Turin_01             80000028 3934 CFFFFFFB-000041B3-000003EE-00000001 51 6 46 4 1006 n y
0B10F10_K20_TurinD_03            80000028 3934 CFFFFFFB-000041B3-000003EE-00000001 51 6 46 4 1006 n y
0B00F81_K20_ShimadaPeak_03       80000028 3934 CFFFFFFB-000041B3-000003EE-43B6EB6C 51 6 46 4 1006 n y
0B40F40_K20_GraniteRidge_02      80000028 3030 00000001-000000B3-00000000-00000000 51 2 46 0 0 n n
""".strip().splitlines()  # noqa: E501
"""InstLatx64 dump (AuthenticAMD...), 8000_0000 EAX ("-": not noted), 8000_0008 EAX,
leaf 8000_001F as printed; then C-bit ("-": makes no sense), reduction, width with SME,
VMPLs, highest ASID, page-flush MSR, coherent."""


@pytest.mark.req("CM-7", "CM-T2", "CM-T3", "CM-23", "BZ-3")
@pytest.mark.parametrize("row", REAL_PARTS, ids=lambda row: str(row).split()[0])
def test_vector_leaf_8000_001f_of_real_parts(row: str) -> None:
    _dump, highest, sizes, printed, c_bit, *rest = row.split()
    reduction, width, vmpls, max_asid = map(int, rest[:4])
    leaf = CpuidLeaf(*(int(word, 16) for word in printed.split("-")))
    top = 0x8000_0020 if highest == "-" else int(highest, 16)
    found = MemoryEncryption.decode(table(leaf, int(sizes, 16), top))
    assert found.present
    assert found.usable == (c_bit != "-")
    assert found.c_bit == (0 if c_bit == "-" else int(c_bit))
    assert found.phys_reduction == reduction
    assert found.phys_bits_with_sme == width
    assert found.num_vmpl == vmpls
    assert found.max_sev_guests == max_asid
    assert found.min_sev_no_es_asid == leaf.edx
    assert [found.page_flush_msr, found.hw_coherent] == [x == "y" for x in rest[4:]]


FEATURE_BITS = {
    # [SIL] CcxReg.h, [OVM] cpuid.rs, Linux asm/cpufeatures.h word 19
    "sme": 0,
    "sev": 1,
    "page_flush_msr": 2,
    "sev_es": 3,
    "sev_snp": 4,
    "vmpl": 5,
    "rmpquery": 6,
    "vmpl_sss": 7,
    "secure_tsc": 8,
    "tsc_aux_virtualization": 9,
    "hw_enf_cache_coh": 10,
    "host_64bit": 11,
    "restricted_injection": 12,
    "alternate_injection": 13,
    "debug_swap": 14,
    "prevent_host_ibs": 15,
    "vte": 16,
    "vmgexit_parameter": 17,
    "virtual_tom_msr": 18,
    "ibs_virt_guest_ctl": 19,
    "rmpread": 21,
    "guest_intercept_control": 22,
    "segmented_rmp": 23,
    "vmsa_reg_prot": 24,
    "smt_protection": 25,
    "secure_avic": 26,
    "allowed_sev_features": 27,
    "svsm_comm_page_msr": 28,
    "nested_virt_snp_msr": 29,
    "hv_in_use_wr_allowed": 30,
    "ibpb_on_entry": 31,
}


@pytest.mark.req("CM-T1")
def test_vector_every_feature_bit_of_eax() -> None:
    assert {name: f.low for name, f in MemEncryptEax.FIELDS.items()} == FEATURE_BITS
    for name, bit in FEATURE_BITS.items():
        assert [n for n in FEATURE_BITS if getattr(MemEncryptEax(1 << bit), n)] == [
            name
        ]


@pytest.mark.req("CM-T1")
@pytest.mark.parametrize(
    ("field", "bit"),
    [
        ("sme", 0),
        ("sev", 1),
        ("page_flush_msr", 2),
        ("sev_es", 3),
        ("sev_snp", 4),
        ("vmpl", 5),
        ("hw_coherent", 10),
        ("host_64bit", 11),
        ("vte", 16),
    ],
)
def test_each_level_comes_from_its_own_bit(field: str, bit: int) -> None:
    assert getattr(decode(1 << bit, 0x16F, 0, 0), field)
    assert not getattr(decode(~(1 << bit) & 0xFFFF_FFFF, 0x16F, 0, 0), field)


@pytest.mark.req("BZ-3", "CM-T2")
def test_law_position_and_reduction_keep_all_six_bits() -> None:
    # EDK2 declares five bits for the reduction; sevctl once took a wrong mask.
    for seed in range(200):
        rng = random.Random(seed)
        c_bit, reduction, vmpls = (rng.randrange(n) for n in (64, 64, 16))
        noise = rng.getrandbits(16) << 16
        found = decode(1, c_bit | reduction << 6 | vmpls << 12 | noise, 0, 0)
        assert (found.c_bit, found.phys_reduction) == (c_bit, reduction)
        assert found.num_vmpl == vmpls


@pytest.mark.req("BZ-3")
def test_vector_naples_and_rome_print_0x16f() -> None:
    # InstLatx64 dumps AuthenticAMD0800F12 and AuthenticAMD0830F10, leaf 8000_001F.
    ebx = MemEncryptEbx(0x0000_016F)
    assert (ebx.c_bit_position, ebx.phys_addr_reduction) == (47, 5)


@pytest.mark.req("CM-22")
def test_edx_1_leaves_no_asid_to_sev_es() -> None:
    assert decode(0xF, 0x16F, 0xF, 1).min_sev_no_es_asid == 1


# --- when it cannot be used


@pytest.mark.req("CM-5", "CM-7")
def test_without_the_leaf_nothing_is_there_and_the_reason_says_so() -> None:
    found = MemoryEncryption.decode(table(None, highest=0x8000_001E))
    assert not any((found.present, found.usable, found.sme, found.sev, found.c_bit))
    assert (found.phys_bits, found.phys_bits_with_sme) == (48, 48)
    assert "0x8000001f" in found.reason
    assert "0x8000001e" in found.reason


@pytest.mark.req("CM-21", "BZ-6")
def test_a_c_bit_field_of_0_is_refused_though_the_sme_bit_is_set() -> None:
    # InstLatx64 AuthenticAMD0A40F41_K19_Rembrandt_01: a naive mask would be 1 << 0.
    found = decode(0x1_780F, 0, 0, 1)
    assert found.sme
    assert not found.usable
    assert found.reason == (
        "the SME bit is 1 but the C-bit position is 0, expected 32 to 51"
    )


@pytest.mark.parametrize(
    ("eax", "ebx", "sizes", "reason"),
    [
        (0x0000_000E, 0x16F, 0x3030, "the SME bit .* is 0, only SEV is there"),
        (0x0000_0000, 0x16F, 0x3030, "the SME bit .* is 0$"),
        (0x0000_0001, 31, 0x3030, "C-bit position is 31"),
        (0x0000_0001, 52 | 1 << 6, 0x3030, "C-bit position is 52, .* no address bits"),
        (0x0000_0001, 63, 0x3030, "C-bit position is 63"),
        (0x0000_0001, 51 | 17 << 6, 0x3030, "a reduction of 17 leaves 31 of 48"),
        (0x0000_0001, 51 | 63 << 6, 0x3030, "a reduction of 63 leaves 0 of 48"),
        (0x0000_0001, 51, 0x3000, "the physical width is 0 bits"),
        (0x0000_0001, 51, 0x30FF, "the physical width is 255 bits"),
        (0x0000_0001, 46 | 1 << 6, 0x3030, "position 46 lies inside the 47 physical"),
    ],
)
def test_nonsense_is_refused_with_its_reason(
    eax: int, ebx: int, sizes: int, reason: str
) -> None:
    found = decode(eax, ebx, 0, 0, sizes)
    assert not found.usable
    assert re.search(reason, found.reason)


@pytest.mark.parametrize("c_bit", [32, 47, 51])
def test_a_c_bit_right_above_what_remains_is_usable(c_bit: int) -> None:
    found = decode(1, c_bit | (52 - c_bit) << 6, 0, 0, sizes=0x3934)
    assert found.usable
    assert found.reason == ""
    assert found.phys_bits_with_sme == c_bit


def test_the_bounds_of_the_width_are_usable_themselves() -> None:
    assert decode(1, 51, 0, 0, sizes=32).usable
    assert decode(1, 51 | 1 << 6, 0, 0, sizes=52).usable


@pytest.mark.req("CM-3")
def test_the_hypervisor_bit_is_bit_31_of_leaf_1_ecx() -> None:
    # InstLatx64 AuthenticAMD0800F12_K17_Zen_CPUID4, read inside a guest.
    assert CpuModel("g", "", table(None, features=0xFED8_3203)).hypervisor
    assert not CpuModel("h", "", table(None, features=0x7EF8_320B)).hypervisor
