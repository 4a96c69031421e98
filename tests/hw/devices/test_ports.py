"""hw/devices/ports: one device at a port, all ones where there is none."""

import pytest

from cbit.hw.devices import PortSpace
from cbit.hw.devices.pci import PciHost
from cbit.hw.devices.power import Sink
from cbit.hw.errors import CallerError


def test_reads_and_writes_reach_the_device_with_port_and_size() -> None:
    ports = PortSpace()
    ports.attach(0xCF8, 0xCFF, PciHost())
    ports.write(0xCF8, 0x8000_0000, 4)
    assert ports.read(0xCFE, 2) == 0x1450
    assert not ports.unclaimed


def test_a_device_answers_from_its_first_port_to_its_last() -> None:
    ports = PortSpace()
    ports.attach(0, 1, Sink())
    ports.attach(2, 2, Sink())
    ports.attach(0xFFFE, 0xFFFF, Sink())
    answers = [ports.read(port, 1) for port in (0, 1, 2, 3, 0xFFFD, 0xFFFE)]
    assert answers == [0, 1, 2, 0xFF, 0xFF, 0xFE]
    assert ports.unclaimed == {3: 1, 0xFFFD: 1}


@pytest.mark.parametrize(("first", "last"), [(0x10, 0x10), (0xE, 0x10), (0x13, 0x20)])
def test_an_overlap_is_refused_with_the_port(first: int, last: int) -> None:
    ports = PortSpace()
    ports.attach(0x10, 0x13, Sink())
    with pytest.raises(CallerError, match=r"port 0x1[03] has a device already"):
        ports.attach(first, last, Sink())


def test_a_refused_device_gets_no_port_at_all() -> None:
    ports = PortSpace()
    ports.attach(0x10, 0x13, Sink())
    with pytest.raises(CallerError):
        ports.attach(0xE, 0x10, Sink())
    assert ports.read(0xE, 1) == 0xFF
    assert ports.unclaimed == {0xE: 1}


@pytest.mark.parametrize(("first", "last"), [(-1, 0), (0xFFFF, 0x1_0000), (0x11, 0x10)])
def test_ports_that_do_not_exist_are_refused(first: int, last: int) -> None:
    with pytest.raises(CallerError, match="0 to 0xffff expected"):
        PortSpace().attach(first, last, Sink())


@pytest.mark.parametrize(("size", "ones"), [(1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)])
def test_where_nothing_answers_all_ones_are_read(size: int, ones: int) -> None:
    assert PortSpace().read(0x300, size) == ones


def test_unclaimed_accesses_are_counted_by_port() -> None:
    ports = PortSpace()
    ports.read(0x300, 1)
    ports.write(0x300, 1, 1)
    ports.write(0x301, 1, 1)
    assert ports.unclaimed == {0x300: 2, 0x301: 1}
