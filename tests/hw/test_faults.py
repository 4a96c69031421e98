"""hw/faults: what an architectural exception carries and prints."""

import pytest

from cbit.hw.errors import CbitError
from cbit.hw.faults import (
    CpuException,
    GeneralProtection,
    InvalidOpcode,
    PageFault,
    PageFaultCode,
    VmmCommunication,
)


@pytest.mark.parametrize(
    ("kind", "vector", "mnemonic"),
    [
        (InvalidOpcode, 6, "UD"),
        (GeneralProtection, 13, "GP"),
        (PageFault, 14, "PF"),
        (VmmCommunication, 29, "VC"),
    ],
)
def test_vector_numbers_and_mnemonics(
    kind: type[CpuException], vector: int, mnemonic: str
) -> None:
    # APM volume 2, table 8-1.
    assert (kind.vector, kind.mnemonic) == (vector, mnemonic)
    assert issubclass(kind, CbitError)


def test_vector_page_fault_error_code() -> None:
    # APM volume 2, 8.2.15: P, R/W, U/S, RSV, I/D, PK from bit 0 up.
    codes = PageFaultCode
    assert [int(code) for code in codes] == [1, 2, 4, 8, 16, 32]
    assert int(codes.PRESENT | codes.RESERVED) == 9


def test_an_exception_without_an_error_code_prints_none() -> None:
    fault = InvalidOpcode("RDPRU is not offered")
    assert (fault.error_code, fault.reason) == (None, "RDPRU is not offered")
    assert str(fault) == "#UD: RDPRU is not offered"


def test_a_general_protection_fault_pushes_0_unless_told() -> None:
    assert str(GeneralProtection("reserved bits")) == "#GP(0x0): reserved bits"
    assert GeneralProtection("bad selector", 0x18).error_code == 0x18


def test_a_vmm_communication_carries_the_exit_code() -> None:
    fault = VmmCommunication("CPUID", 0x72)
    assert fault.error_code == 0x72
    assert str(fault) == "#VC(0x72): CPUID"


def test_a_page_fault_carries_address_code_level_and_entry() -> None:
    code = PageFaultCode.PRESENT | PageFaultCode.RESERVED
    fault = PageFault(0x4000_0000, code, "reserved bit set", "PT", 7, 1 << 46 | 0x1003)
    assert fault.address == 0x4000_0000
    assert fault.code == code
    assert fault.error_code == 9
    assert (fault.level, fault.index) == ("PT", 7)
    assert fault.entry == 0x4000_0000_1003
    assert str(fault) == (
        "#PF(0x9): address 0x40000000: reserved bit set in PT[7] = 0x0000400000001003"
    )


def test_a_page_fault_without_an_entry_names_the_address_alone() -> None:
    fault = PageFault(0x1000, PageFaultCode(0), "not present")
    assert str(fault) == "#PF(0x0): address 0x1000: not present"
    assert (fault.level, fault.entry) == ("", None)
