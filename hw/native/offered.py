"""What of a processor the engine and the machine have: the table for features.py.

Everything that is not named here is withheld, a bit of a later processor as well.

Source: unicorn 2.1.4, target/i386/cpu.c (TCG_*_FEATURES, model EPYC) and translate.c,
read for facts; leaves: [APM3] appendix E.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cpuid import CpuidWord
from ..cpuid.words import (
    Extended21Eax,
    ExtendedEcx,
    ExtendedEdx,
    FeatureEcx,
    FeatureEdx,
    PowerEdx,
    RasEbx,
    SizesEbx,
    StructuredEbx,
    StructuredEcx,
    StructuredEdx,
)
from ..registers import Field


@dataclass(frozen=True)
class Offered:
    """The bits of one CPUID register that the engine and the machine have."""

    word: type[CpuidWord]
    fields: tuple[Field, ...]

    @property
    def mask(self) -> int:
        """The bits as a mask."""
        return sum(field.mask for field in self.fields)


OFFERED: tuple[Offered, ...] = (
    Offered(
        FeatureEcx,
        (
            FeatureEcx.sse3,
            FeatureEcx.pclmulqdq,
            FeatureEcx.ssse3,
            FeatureEcx.cmpxchg16b,
            FeatureEcx.sse4_1,
            FeatureEcx.sse4_2,
            FeatureEcx.movbe,
            FeatureEcx.popcnt,
            FeatureEcx.aes,
            FeatureEcx.xsave,
            FeatureEcx.rdrand,
            FeatureEcx.hypervisor,
        ),
    ),
    Offered(
        FeatureEdx,
        tuple(
            field
            for field in FeatureEdx.FIELDS.values()
            if field not in (FeatureEdx.vme, FeatureEdx.htt)
        ),
    ),
    Offered(
        StructuredEbx,
        (
            StructuredEbx.fsgsbase,
            StructuredEbx.bmi1,
            StructuredEbx.smep,
            StructuredEbx.bmi2,
            StructuredEbx.adx,
            StructuredEbx.smap,
            StructuredEbx.clflushopt,
        ),
    ),
    Offered(StructuredEcx, (StructuredEcx.la57,)),
    Offered(StructuredEdx, ()),
    Offered(
        ExtendedEcx,
        (
            ExtendedEcx.lahf,
            ExtendedEcx.cr8_legacy,
            ExtendedEcx.abm,
            ExtendedEcx.sse4a,
            ExtendedEcx.prefetchw,
        ),
    ),
    Offered(
        ExtendedEdx,
        tuple(
            field
            for field in ExtendedEdx.FIELDS.values()
            if field not in (ExtendedEdx.vme, ExtendedEdx.ffxsr)
        ),
    ),
    Offered(RasEbx, ()),  # the machine has no machine-check banks
    Offered(PowerEdx, (PowerEdx.invariant_tsc,)),
    Offered(
        SizesEbx,
        (
            # Registers of hw/msr; what they bound, the engine does not do anyway.
            SizesEbx.ibpb,
            SizesEbx.ibrs,
            SizesEbx.stibp,
            SizesEbx.ssbd,
            SizesEbx.psfd,
            # No instruction and no register, but facts about the part.
            SizesEbx.ibrs_always_on,
            SizesEbx.stibp_always_on,
            SizesEbx.ibrs_preferred,
            SizesEbx.ibrs_same_mode,
            SizesEbx.efer_lmsle_unsupported,
            SizesEbx.ssb_no,
            SizesEbx.btc_no,
            SizesEbx.ibpb_ret,
        ),
    ),
    Offered(
        Extended21Eax,
        (
            Extended21Eax.lfence_serializing,
            Extended21Eax.null_selector_clears_base,
            Extended21Eax.automatic_ibrs,
        ),
    ),
)
"""What is passed on, where the processor has it; every other bit is withheld.

Reasons that the engine's list does not give. CLWB is #UD, because the engine's model is
a first-generation EPYC. RDSEED draws from the host. ERMS and FSRM make Linux move short
strings byte by byte, which is slow here: a boot to user space took 1.7 times as long.
"""

FLUSHES = (FeatureEdx.clflush, StructuredEbx.clflushopt)
"""Line flushes reach the engine alone, which has no caches. On a part whose caches are
not coherent across C-bit settings software that is not offered them takes WBINVD, which
reaches the machine's."""

WITHHELD_LEAVES = (
    0x0000_0005,  # MONITOR and MWAIT
    0x0000_0006,  # thermal and power
    0x0000_000F,  # resource monitoring
    0x0000_0010,  # resource enforcement
    0x8000_000A,  # virtualization: VMRUN is not modelled here
    0x8000_001B,  # instruction-based sampling
    0x8000_001C,  # lightweight profiling
    0x8000_0020,  # bandwidth enforcement
    0x8000_0022,  # performance counters
)
"""Leaves of zeros."""
