"""Registers that the hardware holds in place of the file: TSC, segment bases."""

import pytest

from cbit.hw.errors import CallerError
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model
from cbit.hw.msr import GsBase, Msr, MsrFault, MsrFile, Tsc


class Counter:
    """A clock that goes on by itself."""

    def __init__(self) -> None:
        self.now = 100

    def read(self) -> int:
        self.now += 1
        return self.now

    def write(self, value: int) -> None:
        self.now = value


@pytest.fixture
def msrs() -> MsrFile:
    return MsrFile(load_model("rome"))


def test_a_served_register_is_read_anew_each_time(msrs: MsrFile) -> None:
    msrs.serve(Tsc, Counter().read)
    assert [msrs.read(0x10) for _ in range(3)] == [101, 102, 103]


def test_a_write_goes_to_who_serves(msrs: MsrFile) -> None:
    counter = Counter()
    told: list[tuple[int, int]] = []
    msrs.on_write(lambda index, value: told.append((index, value)))
    msrs.serve(Tsc, counter.read, counter.write)
    msrs.write(0x10, 5000)
    assert (counter.now, told) == (5000, [(0x10, 5000)])
    assert msrs.read(0x10) == 5001


def test_the_rules_come_before_who_serves(msrs: MsrFile) -> None:
    counter = Counter()
    msrs.serve(GsBase, counter.read, counter.write)
    with pytest.raises(GeneralProtection, match="not canonical"):
        msrs.write(GsBase.ADDRESS, 1 << 47)
    assert counter.now in (100, 101)


def test_without_a_writer_a_write_faults_and_reaches_nobody(msrs: MsrFile) -> None:
    told: list[int] = []
    msrs.on_write(lambda index, value: told.append(index))
    msrs.serve(Tsc, Counter().read)
    with pytest.raises(MsrFault, match="expected no write") as fault:
        msrs.write(0x10, 1)
    assert (fault.value.index, fault.value.value, told) == (0x10, 1, [])
    assert msrs.read(0x10) == 101


def test_an_address_does_as_well_as_a_class(msrs: MsrFile) -> None:
    msrs.serve(GsBase.ADDRESS, lambda: 0x1234_5000)
    assert msrs.read(GsBase.ADDRESS) == 0x1234_5000


def test_a_register_taken_back_keeps_its_value(msrs: MsrFile) -> None:
    counter = Counter()
    msrs.serve(Tsc, counter.read, counter.write)
    msrs.take_back(Tsc)
    assert [msrs.read(0x10) for _ in range(2)] == [101, 101]
    msrs.write(0x10, 7)
    assert (msrs.read(0x10), counter.now) == (7, 101)
    with pytest.raises(CallerError, match="nobody serves"):
        msrs.take_back(Tsc)


def test_a_register_that_the_part_lacks_stays_absent() -> None:
    table = load_model("rome").table
    first = table.leaf(1)
    without = table.replace({(1, 0): first._replace(edx=first.edx & ~(1 << 4))})
    model = type(load_model("rome"))("no-tsc", "test", without)
    msrs = MsrFile(model)
    msrs.serve(Tsc, lambda: 1)
    with pytest.raises(GeneralProtection, match="not present"):
        msrs.read(0x10)


def test_only_declared_registers_can_be_served(msrs: MsrFile) -> None:
    class Unknown(Msr):
        ADDRESS, NAME = 0x1, "UNKNOWN"

    with pytest.raises(CallerError, match="Unknown"):
        msrs.serve(Unknown, lambda: 0)
    with pytest.raises(CallerError, match="0x1 is no MSR"):
        msrs.serve(0x1, lambda: 0)
