"""CPUID as machine code sees it: nothing that the engine or the machine lacks."""

from __future__ import annotations

import pytest

from cbit.hw.cpuid import ABSENT, CpuidLeaf, CpuidWord, CpuModel, MemoryEncryption
from cbit.hw.cpuid.words import (
    Extended21Eax,
    ExtendedEcx,
    ExtendedEdx,
    FeatureEbx,
    FeatureEcx,
    FeatureEdx,
    PowerEdx,
    RasEbx,
    SizesEbx,
    SizesEcx,
    StructuredEax,
    StructuredEbx,
    StructuredEcx,
    StructuredEdx,
)
from cbit.hw.models import load_model, model_names
from cbit.hw.msr import MsrFile, PredCmd, SpecCtrl
from cbit.hw.native.features import engine_model, with_osxsave, withheld
from cbit.hw.native.offered import OFFERED, WITHHELD_LEAVES

# What the engine does not translate, or the machine has no device or register for.
LACKING: dict[type[CpuidWord], str] = {
    FeatureEcx: "monitor fma pcid x2apic osxsave avx f16c rdrand",
    FeatureEdx: "vme htt",
    StructuredEbx: "avx2 invpcid pqm pqe rdseed sha clwb avx512f avx512dq avx512_ifma "
    "avx512cd avx512bw avx512vl",
    StructuredEcx: "umip pku ospke shstk gfni vaes vpclmulqdq rdpid avx512_vbmi",
    StructuredEdx: "avx512_vp2intersect flush_l1d",
    ExtendedEcx: "cmp_legacy svm ext_apic osvw ibs skinit wdt topology_extensions "
    "perfctr_core perfctr_nb perfctr_llc data_breakpoint mwaitx",
    ExtendedEdx: "vme ffxsr",
    RasEbx: "overflow_recov succor smca",
    PowerEdx: "hardware_pstate boost effective_frequency_read_only rapl",
    SizesEbx: "clzero irperf xsave_error_pointers invlpgb rdpru mcommit wbnoinvd "
    "int_wbinvd ppin virt_ssbd cppc",
    Extended21Eax: "upper_address_ignore prefetch_ctl_msr",
}

PASSED_ON = (
    *("name", "alias", "source", "vendor", "brand", "hypervisor"),
    *("phys_bits", "linear_bits", "nx", "page_1gb", "la57", "pge"),
    *("smep", "smap", "fsgsbase"),
)
"""Properties of a model that machine code sees as they are."""

ENCRYPTION = 0x8000_001F
XSAVE = 0xD


@pytest.fixture(params=model_names())
def real(request: pytest.FixtureRequest) -> CpuModel:
    """Each processor of hw/models, as its dump has it."""
    return load_model(request.param)


# --- what is masked


def test_nothing_that_engine_or_machine_lack_is_offered(real: CpuModel) -> None:
    shown = engine_model(real).table
    for word, names in LACKING.items():
        flags = shown.word(word)
        for name in names.split():
            assert not flags.value & word.FIELDS[name].mask, f"{word.__name__}.{name}"


def test_no_bit_appears_that_the_processor_lacks(real: CpuModel) -> None:
    shown = engine_model(real, rdrand=True).table
    for offered in OFFERED:
        before, after = (t.word(offered.word).value for t in (real.table, shown))
        assert after & ~before == 0
        assert after & ~offered.mask == 0


def test_the_rest_of_what_the_processor_has_is_passed_on(real: CpuModel) -> None:
    shown = engine_model(real)
    for name in PASSED_ON:
        assert getattr(shown, name) == getattr(real, name), name
    for field in ("syscall", "long_mode", "rdtscp", "mtrr", "apic", "msr"):
        flag = ExtendedEdx.FIELDS[field].mask
        assert shown.table.word(ExtendedEdx).value & flag
    for field in ("sse2", "fxsr", "tsc", "pat", "cmov", "mce", "mca"):
        assert shown.table.word(FeatureEdx).value & FeatureEdx.FIELDS[field].mask
    for field in ("aes", "movbe", "popcnt", "sse4_2", "cmpxchg16b", "xsave"):
        assert shown.table.word(FeatureEcx).value & FeatureEcx.FIELDS[field].mask


def test_memory_encryption_passes_whole(real: CpuModel) -> None:
    shown = engine_model(real)
    assert shown.table.leaf(ENCRYPTION) == real.table.leaf(ENCRYPTION)
    assert shown.memory_encryption == real.memory_encryption
    assert MemoryEncryption.decode(shown.table) == real.memory_encryption


def test_rdrand_is_offered_only_on_request(real: CpuModel) -> None:
    for asked in (False, True):
        shown = engine_model(real, rdrand=asked).table.word(FeatureEcx)
        assert shown.rdrand == (asked and real.table.word(FeatureEcx).rdrand)
        assert not engine_model(real, rdrand=asked).table.word(StructuredEbx).rdseed


def test_withheld_leaves_read_as_zeros_in_every_sub_leaf(real: CpuModel) -> None:
    shown = engine_model(real).table
    for leaf in WITHHELD_LEAVES:
        assert all(shown.leaf(leaf, subleaf) == ABSENT for subleaf in range(8))


def test_no_hypervisor_interface_is_promised() -> None:
    shown = engine_model(load_model("no-leaf"))
    assert shown.hypervisor
    assert all(shown.table.leaf(0x4000_0000 + n) == ABSENT for n in range(0x102))


def test_line_flushes_are_withheld_where_caches_are_not_coherent(
    real: CpuModel,
) -> None:
    encryption = real.memory_encryption
    shown = engine_model(real).table
    offered = encryption.hw_coherent or not encryption.usable
    assert shown.word(FeatureEdx).clflush == offered
    assert shown.word(StructuredEbx).clflushopt == (
        offered and real.table.word(StructuredEbx).clflushopt
    )


def test_leaf_7_has_one_sub_leaf(real: CpuModel) -> None:
    shown = engine_model(real).table
    assert shown.word(StructuredEax).max_subleaf == 0
    assert all(shown.leaf(7, subleaf) == ABSENT for subleaf in range(1, 4))


def test_masking_twice_is_masking_once(real: CpuModel) -> None:
    once = engine_model(real)
    assert engine_model(once) == once
    assert withheld(once) == []


# --- what registers stand behind


def test_speculation_bits_come_with_their_registers(real: CpuModel) -> None:
    model = engine_model(real)
    word, msrs = model.table.word(SizesEbx), MsrFile(model)
    assert msrs.declares(PredCmd.ADDRESS) == bool(word.ibpb)
    announced = word.ibrs or word.stibp or word.ssbd or word.psfd
    assert msrs.declares(SpecCtrl.ADDRESS) == bool(announced)
    for offered, bit in ((word.ibrs, 1), (word.stibp, 2), (word.ssbd, 4)):
        if offered:
            msrs.write(SpecCtrl.ADDRESS, bit)


@pytest.mark.parametrize("index", [0xC001_0000, 0xC001_0200, 0xC001_1030, 0xC000_00E7])
def test_no_leaf_promises_registers_that_are_absent(real: CpuModel, index: int) -> None:
    # performance counters, old and new, IBS, MPERF
    model = engine_model(real)
    assert not MsrFile(model).declares(index)


# --- one core with one thread


def test_every_leaf_counts_one_thread(real: CpuModel) -> None:
    shown = engine_model(real).table
    first = shown.word(FeatureEbx)
    assert (first.logical_count, first.apic_id) == (1, 0)
    assert first.clflush_size == 8
    assert not shown.word(FeatureEdx).htt
    assert (shown.word(SizesEcx).nc, shown.word(SizesEcx).apic_id_size) == (0, 0)
    assert shown.leaf(0x8000_001E) == ABSENT  # id 0, core 0, one thread, node 0
    for subleaf in range(4):
        assert shown.leaf(0x8000_001D, subleaf).eax >> 14 & 0xFFF == 0


@pytest.mark.parametrize("leaf", [0xB, 0x8000_0026])
def test_topology_levels_have_one_thread_each_and_keep_their_types(
    real: CpuModel, leaf: int
) -> None:
    shown = engine_model(real).table
    for subleaf in range(8):
        before, after = (t.leaf(leaf, subleaf) for t in (real.table, shown))
        if before.ecx >> 8:
            assert after == CpuidLeaf(0, 1, before.ecx, 0)
        else:
            assert after == ABSENT


def test_caches_keep_their_sizes(real: CpuModel) -> None:
    shown = engine_model(real).table
    for subleaf in range(4):
        before, after = (t.leaf(0x8000_001D, subleaf) for t in (real.table, shown))
        assert after.eax & 0x3FFF == before.eax & 0x3FFF
        assert after[1:] == before[1:]


# --- extended state


def test_vector_extended_state_is_x87_and_sse(real: CpuModel) -> None:
    # 512 bytes of FXSAVE and a header of 64
    shown = engine_model(real).table
    assert shown.leaf(XSAVE) == CpuidLeaf(3, 0x240, 0x240, 0)
    assert all(shown.leaf(XSAVE, subleaf) == ABSENT for subleaf in range(1, 64))
    assert shown.leaf(0).eax == XSAVE


def test_osxsave_follows_cr4(real: CpuModel) -> None:
    answer = engine_model(real).table.leaf(1)
    on = with_osxsave(answer, 1, 1 << 18)
    assert on.ecx == answer.ecx | 1 << 27
    assert with_osxsave(on, 1, 0xFFFF_FFFF & ~(1 << 18)) == answer


def test_osxsave_is_a_bit_of_leaf_1_and_needs_xsave() -> None:
    answer = CpuidLeaf(1, 2, 3, 4)
    assert with_osxsave(answer, 1, 1 << 18) == answer
    other = CpuidLeaf(1, 2, 1 << 26, 4)
    assert with_osxsave(other, 7, 1 << 18) == other
    assert with_osxsave(other, 1, 1 << 18).ecx == 1 << 26 | 1 << 27


# --- the report


def test_the_report_names_each_bit_that_differs(real: CpuModel) -> None:
    shown = engine_model(real)
    lines = withheld(real)
    bits = {line.split("]")[0] + "]" for line in lines if "[" in line}
    expected = set()
    for offered in OFFERED:
        word = offered.word
        lost = real.table.word(word).value & ~shown.table.word(word).value
        expected |= {
            f"{word.LEAF:08x} {word.REGISTER.upper()}[{bit}]"
            for bit in range(32)
            if lost >> bit & 1 and (word, bit) != (FeatureEcx, 27)
        }
    assert bits == expected
    assert lines == sorted(lines, key=lambda line: int(line.split()[0], 16))


def test_vector_rome_loses_avx2_and_its_counters() -> None:
    lines = withheld(load_model("rome"))
    for line in (
        "00000001 ECX[28] avx",
        "00000001 ECX[30] rdrand",
        "00000007 EBX[5] avx2",
        "80000001 ECX[23] perfctr_core",
        "80000008 EBX[0] clzero",
        "8000001b",
    ):
        assert line in lines
    assert not any(line.startswith("8000001f") for line in lines)
    assert "00000001 ECX[30] rdrand" not in withheld(load_model("rome"), rdrand=True)
