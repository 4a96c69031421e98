"""Page faults: their facts, and handlers that cure them, refuse, or never end."""

from __future__ import annotations

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu
from cbit.hw.errors import CbitError
from cbit.hw.faults import CpuException, GeneralProtection, PageFault, PageFaultCode
from cbit.hw.trace import Event

from .test_paging_witness import (
    CR4_SMAP,
    LARGE_RW,
    PAGE,
    PAGE_RW,
    RW,
    US,
    A,
    D,
    P,
    Tables,
    long_mode,
)

RAM = 16 << 20
VA = 0x7F00_0000_0000
FRAME, OTHER = 0x20_0000, 0x30_0000


class Bench:
    """A machine in long mode; a handler that keeps the faults and does `cure`."""

    def __init__(self, *, cr4: int = 0) -> None:
        self.machine = Machine("rome", ram=RAM, coherent=True, seed=1)
        self.tables = Tables(self.machine)
        self.tables.map(VA, 0)
        self.cpu = self.machine.cpu
        self.faults: list[PageFault] = []
        long_mode(self.cpu, self.tables.cr3, cr4=cr4)

    def handle(self, *, entry: int | None = None) -> None:
        """Install a handler that maps `entry` and the frames behind it, or refuses."""

        def handler(cpu: Cpu, fault: CpuException) -> bool:
            assert isinstance(fault, PageFault)
            self.faults.append(fault)
            if entry is None:
                return False
            offset = (fault.address & -PAGE) - VA
            self.tables.map(VA + offset, entry + offset)
            return True

        self.cpu.set_handler(14, handler)


# --- the facts


@pytest.mark.parametrize(
    ("entry", "write", "code"),
    [
        (0, False, 0),
        (0, True, PageFaultCode.WRITE),
        (FRAME | P, True, PageFaultCode.PRESENT | PageFaultCode.WRITE),
        (FRAME | 1 << 50 | P, False, PageFaultCode.PRESENT | PageFaultCode.RESERVED),
    ],
)
def test_a_fault_carries_its_facts(
    entry: int, write: bool, code: PageFaultCode
) -> None:
    bench = Bench()
    bench.tables.map(VA, entry)
    with pytest.raises(PageFault) as caught:
        bench.cpu.translate(VA + 0xABC, write=write)
    fault = caught.value
    assert (fault.vector, fault.mnemonic) == (14, "PF")
    assert (fault.code, fault.error_code) == (code, int(code))
    assert (fault.level, fault.entry) == ("PT", entry)
    assert fault.address == bench.cpu.cr2 == VA + 0xABC
    assert isinstance(fault, CbitError)


def test_vector_the_bits_of_the_error_code() -> None:
    # [APM2] 8.2.15: P, R/W, U/S, RSV, I/D, PK.
    assert [int(bit) for bit in PageFaultCode] == [1, 2, 4, 8, 16, 32]


def test_an_address_that_is_not_canonical_leaves_cr2_alone() -> None:
    bench = Bench()
    with pytest.raises(PageFault):
        bench.cpu.load64(VA + 5)
    with pytest.raises(GeneralProtection) as caught:
        bench.cpu.load64(1 << 62)
    assert caught.value.error_code == 0
    assert bench.cpu.cr2 == VA + 5


def test_the_trace_tells_of_every_fault_cured_or_not() -> None:
    bench = Bench()
    events: list[Event] = []
    bench.machine.trace.listen(events.append, frozenset({"page-fault"}))
    with pytest.raises(PageFault):
        bench.cpu.fetch(VA + 1, 1)
    bench.handle(entry=FRAME | PAGE_RW)
    bench.cpu.store64(VA, 0)
    assert [dict(e.facts) for e in events] == [
        {"va": VA + 1, "code": 0x10},
        {"va": VA, "code": 0x2},
    ]


# --- handlers


def test_a_cured_fault_is_retried() -> None:
    bench = Bench()
    bench.handle(entry=FRAME | PAGE_RW)
    bench.cpu.store(VA + 3, b"stored at the second try")
    assert bench.machine.bus.load(FRAME + 3, 24, 0) == b"stored at the second try"
    assert len(bench.faults) == 1
    assert bench.tables.read(VA) & (A | D) == A | D


def test_a_handler_that_refuses_lets_the_fault_through() -> None:
    bench = Bench()
    bench.handle()
    with pytest.raises(PageFault) as caught:
        bench.cpu.load64(VA)
    assert bench.faults == [caught.value]


def test_a_handler_can_be_replaced_and_removed() -> None:
    bench = Bench()
    bench.handle()
    with pytest.raises(PageFault):
        bench.cpu.load64(VA)
    bench.handle(entry=FRAME | PAGE_RW)
    bench.cpu.load64(VA)
    bench.cpu.set_handler(14, None)
    bench.cpu.set_handler(14, None)
    with pytest.raises(PageFault):
        bench.cpu.load64(VA + PAGE)
    assert len(bench.faults) == 2


def test_reset_removes_handlers() -> None:
    bench = Bench()
    bench.handle(entry=FRAME | PAGE_RW)
    bench.machine.reset()
    long_mode(bench.cpu, bench.tables.cr3)
    with pytest.raises(PageFault):
        bench.cpu.load64(VA)
    assert bench.faults == []


def test_a_handler_that_never_cures_ends_with_an_error_that_names_the_address() -> None:
    bench = Bench()
    bench.handle(entry=FRAME)  # P = 0 for ever
    with pytest.raises(CbitError, match=f"#PF at {VA:#x}: still faulting") as caught:
        bench.cpu.load64(VA)
    assert not isinstance(caught.value, CpuException)
    assert 2 <= len(bench.faults) <= 100
    assert {fault.address for fault in bench.faults} == {VA}


def test_a_cure_in_several_steps_is_a_fault_for_each() -> None:
    bench = Bench()
    va = VA + (1 << 39)
    pages = iter(range(0x50_0000, 0x60_0000, PAGE))
    steps = []

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        assert isinstance(fault, PageFault)
        steps.append(fault.level)
        shift = {"PML4": 39, "PDPT": 30, "PD": 21, "PT": 12}[fault.level]
        entry = next(pages) | PAGE_RW
        if shift == 39:
            slot = bench.tables.slot(va, 39)
        else:
            slot = tables[-1] + 8 * (va >> shift & 511)
        bench.machine.bus.store(slot, entry.to_bytes(8, "little"), 0)
        tables.append(entry & -PAGE)
        return True

    tables: list[int] = []
    bench.cpu.set_handler(14, handler)
    bench.cpu.store64(va, 1)
    assert steps == ["PML4", "PDPT", "PD", "PT"]


def test_a_long_access_asks_the_handler_page_by_page() -> None:
    bench = Bench()
    bench.handle(entry=FRAME | PAGE_RW)
    bench.cpu.store(VA + 0x10, bytes(range(256)) * 48)
    assert [fault.address - VA for fault in bench.faults] == [
        0x10,
        *range(PAGE, 4 * PAGE, PAGE),
    ]
    assert bench.machine.bus.load(FRAME + 0x10, 0x3000, 0) == bytes(range(256)) * 48


def test_a_handler_may_copy_on_write() -> None:
    bench = Bench()
    window = VA + 64 * PAGE
    bench.machine.bus.store(FRAME, b"shared bytes", 0)
    bench.tables.map(VA, FRAME | P)
    bench.tables.map(window, OTHER | P | RW)

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        assert fault.error_code == 3
        cpu.copy(window, VA, PAGE)
        bench.tables.write(VA, 12, OTHER | P | RW)
        return True

    bench.cpu.set_handler(14, handler)
    assert bench.cpu.load(VA, 12) == b"shared bytes"
    bench.cpu.store(VA, b"SHARED")
    assert bench.cpu.load(VA, 12) == b"SHARED bytes"
    assert bench.machine.bus.load(FRAME, 12, 0) == b"shared bytes"


def test_a_handler_may_fault_itself() -> None:
    bench = Bench()
    log = VA + 32 * PAGE
    order = []

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        assert isinstance(fault, PageFault)
        order.append(fault.address)
        bench.tables.map(fault.address & -PAGE, FRAME + 2 * PAGE | PAGE_RW)
        if fault.address == VA:
            cpu.store64(log, fault.address)
            bench.tables.map(VA, FRAME | PAGE_RW)
        return True

    bench.cpu.set_handler(14, handler)
    bench.cpu.store64(VA, 7)
    assert order == [VA, log]
    assert (bench.cpu.load64(VA), bench.cpu.load64(log)) == (7, VA)


def test_a_handler_may_change_the_address_space() -> None:
    bench = Bench()
    others = Tables(bench.machine, 0x18_0000)
    others.map(VA, OTHER | PAGE_RW)

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        cpu.write_cr3(others.cr3)
        return True

    bench.cpu.set_handler(14, handler)
    bench.cpu.store64(VA, 9)
    assert bench.machine.bus.load(OTHER, 1, 0) == b"\x09"


def test_a_handler_may_change_the_mode() -> None:
    bench = Bench(cr4=CR4_SMAP)
    bench.tables.map(VA, FRAME | P | US)

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        cpu.alignment_check = True
        return True

    bench.cpu.set_handler(14, handler)
    assert bench.cpu.load64(VA) == 0


def test_a_fault_of_a_user_is_handled_by_the_kernel_and_retried_by_the_user() -> None:
    # [APM2] 8.9: the gate leads to CPL 0, IRET back.
    bench = Bench()
    kernel_page = VA + 32 * PAGE
    bench.tables.map(kernel_page, OTHER | P | RW)
    levels = []

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        levels.append(cpu.cpl)
        cpu.store64(kernel_page, int(fault.error_code or 0))
        bench.tables.map(VA, FRAME | P | US)
        return len(levels) == 1

    bench.cpu.set_handler(14, handler)
    bench.cpu.cpl = 3
    assert bench.cpu.load64(VA) == 0
    assert (bench.cpu.cpl, levels) == (3, [0])
    with pytest.raises(PageFault) as caught:
        bench.cpu.store64(VA, 1)
    assert caught.value.error_code == 0x7
    assert (bench.cpu.cpl, levels) == (3, [0, 0])


def test_an_error_of_the_handler_passes_through_and_leaves_the_user_a_user() -> None:
    bench = Bench()

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        raise ZeroDivisionError

    bench.cpu.set_handler(14, handler)
    bench.cpu.cpl = 3
    with pytest.raises(ZeroDivisionError):
        bench.cpu.load64(VA)
    assert bench.cpu.cpl == 3


def test_a_large_page_may_be_made_on_demand() -> None:
    bench = Bench()
    va = VA + (1 << 30)

    def handler(cpu: Cpu, fault: CpuException) -> bool:
        assert isinstance(fault, PageFault)
        bench.tables.map(fault.address & -1 << 21, 0x40_0000 | LARGE_RW, 21)
        return True

    bench.cpu.set_handler(14, handler)
    bench.cpu.store(va + 0x12_3456, b"two megabytes")
    assert bench.machine.bus.load(0x52_3456, 13, 0) == b"two megabytes"
