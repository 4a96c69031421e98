"""hw/devices/pci: configuration mechanism 1 and the host bridge.

Expected behaviour: PCI Local Bus specification 3.0, 3.2.2.3.2 (CONFIG_ADDRESS: bits
30 to 24, 1 and 0 read as 0; only double words reach it) and 6.1 (header).
"""

import pytest

from cbit.hw.devices.pci import PciHost

ENABLE = 0x8000_0000


def configuration(pci: PciHost, address: int, offset: int, size: int) -> int:
    pci.write_port(0xCF8, ENABLE | address, 4)
    return pci.read_port(0xCFC + offset, size)


def test_the_latch_reads_back_as_a_kernel_probes_it() -> None:
    pci = PciHost()
    assert pci.read_port(0xCF8, 4) == 0
    pci.write_port(0xCF8, 0xFFFF_FFFF, 4)
    assert pci.read_port(0xCF8, 4) == 0x80FF_FFFC


@pytest.mark.parametrize("size", [1, 2])
def test_only_double_words_reach_the_latch(size: int) -> None:
    pci = PciHost()
    pci.write_port(0xCF8, ENABLE, 4)
    pci.write_port(0xCF8, 0x55, size)
    assert pci.read_port(0xCF8, 4) == ENABLE
    assert pci.read_port(0xCF8, size) == (1 << 8 * size) - 1


def test_the_header_names_a_host_bridge_of_amd() -> None:
    pci = PciHost()
    assert configuration(pci, 0x00, 0, 4) == 0x1450_1022
    assert configuration(pci, 0x00, 0, 2) == 0x1022
    assert configuration(pci, 0x00, 2, 2) == 0x1450
    assert configuration(pci, 0x08, 0, 4) == 0x0600_0000  # class code, revision 0
    assert configuration(pci, 0x08, 2, 2) == 0x0600
    assert configuration(pci, 0x08, 3, 1) == 0x06
    assert configuration(pci, 0x0C, 2, 1) == 0  # header type 0, one function


@pytest.mark.parametrize("address", [0x0800, 0x0100, 0x1_0000, 0xFF_F800])
def test_other_devices_functions_and_buses_are_absent(address: int) -> None:
    pci = PciHost()
    assert configuration(pci, address, 0, 4) == 0xFFFF_FFFF
    assert configuration(pci, address, 0, 2) == 0xFFFF


def test_without_the_enable_bit_nothing_answers() -> None:
    pci = PciHost()
    pci.write_port(0xCF8, 0, 4)
    assert pci.read_port(0xCFC, 4) == 0xFFFF_FFFF


def test_the_bridge_has_nothing_to_write() -> None:
    pci = PciHost()
    configuration(pci, 0x00, 0, 4)
    pci.write_port(0xCFC, 0, 4)
    assert pci.read_port(0xCFC, 4) == 0x1450_1022
