"""What Linux does to MSRs while it boots, without being ready for a #GP."""

import pytest

from cbit.hw.models import load_model, model_names
from cbit.hw.msr import DeCfg, MsrFile

READS = (
    *(0x1B, 0x8B, 0xFE, *range(0x200, 0x210), 0x250, 0x258, 0x259),
    *(*range(0x268, 0x270), 0x277, 0x2FF, 0xC000_0080),
    *(0xC001_0010, 0xC001_0015, 0xC001_001F, 0xC001_1029),
)
"""Read in every boot. Source: 6.1.0-50-cloud-amd64 on the native core, `--json`."""


@pytest.mark.parametrize("name", model_names())
def test_vector_the_reads_of_a_boot_never_fault(name: str) -> None:
    msrs = MsrFile(load_model(name))
    for index in READS:
        msrs.read(index)


@pytest.mark.parametrize("name", model_names())
def test_vector_the_writes_of_a_boot_never_fault(name: str) -> None:
    # Addresses are those of a kernel without KASLR; the order is that of the boot.
    msrs = MsrFile(load_model(name))
    for index, value in (
        (0xC000_0080, 0x100),  # LME, in the decompressor
        (0x277, 0x0007_0506_0007_0406),  # PA5 is WP for the in-place encryption
        (0x277, 0x0007_0406_0007_0406),
        (0xC000_0080, 0x901),  # SCE, LME, NXE; LMA is the processor's
        (0xC000_0101, 0xFFFF_FFFF_8300_0000),
        (0xC000_0081, 0x0023_0010_0000_0000),
        (0xC000_0082, 0xFFFF_FFFF_81A0_0080),
        (0xC000_0083, 0xFFFF_FFFF_81A0_1800),
        (0x174, 0x10),
        (0x175, 0xFFFF_FE00_0000_3000),
        (0x176, 0xFFFF_FFFF_81A0_1750),
        (0xC000_0084, 0x0025_7FD5),
        (0x2FF, 0x000),  # MTRRs off while the PAT changes
        (0x277, 0x0407_0506_0007_0106),
        (0x2FF, 0xC06),
        (0xC001_1029, DeCfg.of(lfence_serialize=1).value),
        (0xC001_001F, 1 << 46),
        (0xC000_0103, 0),
    ):
        msrs.write(index, value)
    assert msrs.read(0x277) == 0x0407_0506_0007_0106
    assert msrs.read(0x2FF) == 0xC06
