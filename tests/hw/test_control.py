"""MOV CR and WRMSR: what is refused, what is kept, which mode the core is in."""

from __future__ import annotations

import pytest

from cbit.hw import Machine
from cbit.hw.cpu import Cpu, Cr0, Cr3, Cr4, UnmodelledMode
from cbit.hw.errors import CallerError
from cbit.hw.faults import GeneralProtection, PageFault
from cbit.hw.registers import Register
from cbit.hw.trace import Event

from .test_paging_witness import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PCIDE,
    CR4_PGE,
    CR4_SMAP,
    CR4_SMEP,
    EFER,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    LARGE_RW,
    NX,
    PAGE_RW,
    SYSCFG,
    SYSCFG_SMEE,
    Tables,
    long_mode,
)

RAM = 8 << 20
VA = 0x7F00_0000_0000
FRAME = 0x20_0000
CR0_ET, CR0_NW, CR0_CD = 1 << 4, 1 << 29, 1 << 30
RESET = CR0_CD | CR0_NW | CR0_ET


def core(model: str = "milan", *, smee: bool = True) -> Cpu:
    return Machine(model, ram=RAM, smee=smee, seed=1).cpu


def in_long_mode(model: str = "milan", *, cr4: int = 0) -> tuple[Cpu, Tables]:
    machine = Machine(model, ram=RAM, seed=1)
    tables = Tables(machine, five_levels=bool(cr4 & CR4_LA57))
    tables.map(VA, FRAME | PAGE_RW)
    long_mode(machine.cpu, tables.cr3, cr4=cr4)
    return machine.cpu, tables


def state(cpu: Cpu) -> tuple[int, ...]:
    return cpu.read_cr0(), cpu.read_cr3(), cpu.read_cr4(), cpu.rdmsr(EFER)


# --- positions


def positions(register: type[Register]) -> str:
    return " ".join(f"{f.name} {f.bits}" for f in register.FIELDS.values())


def test_vector_positions_of_the_fields() -> None:
    # Linux 6.1.192 arch/x86/include/uapi/asm/processor-flags.h, X86_CR0_*, X86_CR4_*.
    assert positions(Cr0) == (
        "protection 0 monitor_coprocessor 1 emulation 2 task_switched 3 "
        "extension_type 4 numeric_error 5 write_protect 16 alignment_mask 18 "
        "not_write_through 29 cache_disable 30 paging 31"
    )
    assert positions(Cr4) == (
        "vme 0 pvi 1 tsd 2 de 3 pse 4 pae 5 mce 6 pge 7 pce 8 osfxsr 9 osxmmexcpt 10 "
        "umip 11 la57 12 fsgsbase 16 pcide 17 osxsave 18 smep 20 smap 21 pke 22"
    )


@pytest.mark.req("CM-71")
def test_vector_cr3_is_pcid_address_and_hint() -> None:
    # X86_CR3_PCID_MASK 0xFFF, CR3_ADDR_MASK 0x7FFF_FFFF_FFFF_F000, bit 63.
    masks = [field.mask for field in Cr3.FIELDS.values()]
    assert masks == [0xFFF, 0x7FFF_FFFF_FFFF_F000, 1 << 63]


# --- reset


def test_vector_the_state_after_reset() -> None:
    # [APM2] table 14-1: CR0 6000_0010; CR2, CR3, CR4, EFER 0.
    cpu, _ = in_long_mode(cr4=CR4_PGE | CR4_SMAP)
    cpu.cpl = 3
    cpu.alignment_check = True
    with pytest.raises(PageFault):
        cpu.load(VA + 0x1000, 1)
    cpu.reset()
    assert state(cpu) == (0x6000_0010, 0, 0, 0)
    assert (cpu.cr2, cpu.cpl, cpu.alignment_check) == (0, 0, False)
    assert cpu.load(VA & 0xFFFF_FFFF, 1) == cpu.load(0, 1), "no translation is left"


# --- CR0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (CR0_PE | 1 << 32, "63:32"),
        (1 << 63, "63:32"),
        (CR0_PG, "PG needs PE"),
        (CR0_PE | CR0_NW, "NW needs CD"),
        (CR0_PE | CR0_PG, "needs CR4.PAE"),
    ],
)
def test_cr0_refuses(value: int, reason: str) -> None:
    cpu = core()
    cpu.wrmsr(EFER, EFER_LME)
    before = state(cpu)
    with pytest.raises(GeneralProtection, match=reason) as caught:
        cpu.write_cr0(value)
    assert caught.value.error_code == 0
    assert state(cpu) == before


@pytest.mark.parametrize("value", [0, CR0_PE, CR0_PE | CR0_CD, CR0_CD | CR0_NW])
def test_cr0_takes_what_needs_no_paging(value: int) -> None:
    cpu = core()
    cpu.write_cr0(value)
    assert cpu.read_cr0() == value | CR0_ET


def test_vector_cr0_keeps_et_and_no_reserved_bit() -> None:
    # [APM2] 3.1.1: ET is read-only 1. KVM, kvm_set_cr0(): "|= X86_CR0_ET", and the
    # reserved bits below 32 are dropped without #GP.
    cpu = core()
    cpu.write_cr0(0x1FFA_FFC0 | CR0_PE)
    assert cpu.read_cr0() == CR0_PE | CR0_ET


@pytest.mark.req("CM-73", "WP-16")
def test_paging_outside_long_mode_is_refused_by_name() -> None:
    cpu = core()
    for cr4 in (0, CR4_PAE):
        cpu.write_cr4(cr4)
        before = state(cpu)
        with pytest.raises(UnmodelledMode, match=r"EFER\.LME = 0"):
            cpu.write_cr0(CR0_PE | CR0_PG)
        assert state(cpu) == before
    cpu.store(0x5000, b"still plain")
    cpu.wbinvd()


@pytest.mark.req("CM-73")
def test_the_c_bit_needs_pae_for_without_it_there_is_no_long_mode() -> None:
    cpu = core()
    cpu.wrmsr(EFER, EFER_LME)
    with pytest.raises(GeneralProtection, match="PAE"):
        cpu.write_cr0(CR0_PE | CR0_PG)
    cpu, _ = in_long_mode()
    with pytest.raises(GeneralProtection, match="PAE"):
        cpu.write_cr4(0)
    assert cpu.read_cr4() == CR4_PAE


def test_long_mode_is_active_while_paging_is_on() -> None:
    cpu = core()
    cpu.write_cr4(CR4_PAE)
    cpu.wrmsr(EFER, EFER_LME)
    assert cpu.rdmsr(EFER) == EFER_LME
    cpu.write_cr0(CR0_PE | CR0_PG)
    assert cpu.rdmsr(EFER) == EFER_LME | EFER_LMA
    cpu.write_cr0(CR0_PE)
    assert cpu.rdmsr(EFER) == EFER_LME
    cpu.wrmsr(EFER, 0)


# --- CR3


@pytest.mark.req("CM-72", "CM-20", "PT-10")
@pytest.mark.parametrize(
    ("model", "smee", "width", "c_bit"),
    [
        ("rome", True, 43, 47),
        ("milan", True, 43, 51),
        ("genoa", True, 46, 51),
        ("raphael", True, 46, 51),
        ("rome", False, 48, None),
        ("genoa", False, 52, None),
    ],
)
def test_vector_cr3_reserves_the_bits_above_the_width_but_c(
    model: str, smee: bool, width: int, c_bit: int | None
) -> None:
    cpu = core(model, smee=smee)
    for bit in range(64):
        cpu.write_cr3(0x5000)
        if bit < width or bit == c_bit:
            cpu.write_cr3(0x5000 | 1 << bit)
            assert cpu.read_cr3() == 0x5000 | 1 << bit
            continue
        with pytest.raises(GeneralProtection, match=f"{1 << bit:#x} must be 0") as gp:
            cpu.write_cr3(0x5000 | 1 << bit)
        assert gp.value.error_code == 0
        assert cpu.read_cr3() == 0x5000


@pytest.mark.req("CM-72", "WP-15")
def test_cr3_may_carry_the_c_bit_from_the_moment_syscfg_23_is_set() -> None:
    cpu = core("milan", smee=False)
    with pytest.raises(GeneralProtection):
        cpu.write_cr3(0x5000 | 1 << 51)
    cpu.write_cr3(0x5000 | 1 << 45)
    cpu.wrmsr(SYSCFG, SYSCFG_SMEE)
    cpu.write_cr3(0x5000 | 1 << 51)
    with pytest.raises(GeneralProtection):
        cpu.write_cr3(0x5000 | 1 << 45)


def test_a_refused_cr3_leaves_the_tables_in_use() -> None:
    cpu, tables = in_long_mode(cr4=CR4_PGE)
    cpu.load(VA, 1)
    tables.write(VA, 12, 0)
    with pytest.raises(GeneralProtection):
        cpu.write_cr3(1 << 45)
    cpu.load(VA, 1)  # the TLB was not flushed either


@pytest.mark.req("CM-71")
def test_the_hint_of_cr3_needs_pcide_and_is_not_kept() -> None:
    cpu, tables = in_long_mode()
    with pytest.raises(GeneralProtection):
        cpu.write_cr3(tables.cr3 | 1 << 63)
    cpu.write_cr4(CR4_PAE | CR4_PCIDE)
    cpu.write_cr3(tables.cr3 | 1 << 63 | 0x123)
    assert cpu.read_cr3() == tables.cr3 | 0x123
    cpu.load(VA, 1)


# --- CR4


@pytest.mark.parametrize("bit", [13, 14, 15, 19, 23, 24, 31, 32, 63])
def test_cr4_refuses_bits_that_do_not_exist(bit: int) -> None:
    cpu = core("genoa")
    with pytest.raises(GeneralProtection, match=f"reserved bits {1 << bit:#x}") as gp:
        cpu.write_cr4(CR4_PAE | 1 << bit)
    assert (gp.value.error_code, cpu.read_cr4()) == (0, 0)


@pytest.mark.parametrize(
    ("model", "bit", "offered"),
    [
        # Leaf 7 and leaf 1 of InstLatx64's dumps.
        ("naples", 11, False),  # UMIP
        ("rome", 11, True),
        ("milan", 12, False),  # LA57
        ("genoa", 12, True),
        ("rome", 22, False),  # PKE
        ("milan", 22, True),
        ("naples", 7, True),  # PGE
        ("naples", 16, True),  # FSGSBASE
        ("naples", 20, True),  # SMEP
        ("naples", 21, True),  # SMAP
    ],
)
def test_vector_cr4_takes_what_cpuid_offers(
    model: str, bit: int, offered: bool
) -> None:
    cpu = core(model)
    if offered:
        cpu.write_cr4(1 << bit)
        assert cpu.read_cr4() == 1 << bit
        return
    with pytest.raises(GeneralProtection, match=f"bit {bit}"):
        cpu.write_cr4(1 << bit)
    assert cpu.read_cr4() == 0


def test_long_mode_fixes_pae_and_la57() -> None:
    for model, cr4, change in (
        ("genoa", 0, CR4_LA57),
        ("genoa", CR4_LA57, CR4_LA57),
        ("genoa", 0, CR4_PAE),
    ):
        cpu, _ = in_long_mode(model, cr4=cr4)
        before = state(cpu)
        with pytest.raises(GeneralProtection, match="long mode"):
            cpu.write_cr4(before[2] ^ change)
        assert state(cpu) == before
        cpu.load(VA, 1)


def test_vector_pcide_needs_long_mode_and_an_empty_pcid() -> None:
    # KVM, kvm_set_cr4(): "PCID can not be enabled when cr3[11:0]!=000H or EFER.LMA=0";
    # kvm_set_cr0() refuses PG = 0 while PCIDE is 1.
    cpu = core()
    with pytest.raises(GeneralProtection, match="PCIDE"):
        cpu.write_cr4(CR4_PAE | CR4_PCIDE)

    cpu, tables = in_long_mode()
    cpu.write_cr3(tables.cr3 | 0x18)
    with pytest.raises(GeneralProtection, match="PCIDE"):
        cpu.write_cr4(CR4_PAE | CR4_PCIDE)
    cpu.write_cr3(tables.cr3)
    cpu.write_cr4(CR4_PAE | CR4_PCIDE)
    cpu.write_cr3(tables.cr3 | 0x18)
    cpu.write_cr4(CR4_PAE | CR4_PCIDE | CR4_PGE)  # it is on already
    with pytest.raises(GeneralProtection, match="PCIDE"):
        cpu.write_cr0(CR0_PE)
    cpu.load(VA, 1)


# --- MSRs that change the mode


def test_lme_is_fixed_while_paging_is_on_and_lma_is_not_writable() -> None:
    cpu, _ = in_long_mode()
    for value in (EFER_LMA | EFER_NXE, EFER_LME | EFER_NXE, 0):
        before = state(cpu)
        with pytest.raises(GeneralProtection):
            cpu.wrmsr(EFER, value)
        assert state(cpu) == before
    cpu.load(VA, 1)


@pytest.mark.req("PT-T1")
def test_nxe_counts_from_the_next_access() -> None:
    cpu, tables = in_long_mode()
    tables.map(VA, FRAME | NX | PAGE_RW)
    cpu.load(VA, 1)
    with pytest.raises(PageFault) as caught:
        cpu.fetch(VA, 1)
    assert caught.value.error_code == 0x11
    cpu.wrmsr(EFER, EFER_LME | EFER_LMA)
    cpu.invlpg(VA)
    with pytest.raises(PageFault) as caught:
        cpu.load(VA, 1)
    assert caught.value.error_code == 0x9
    cpu.wrmsr(EFER, EFER_LME | EFER_LMA | EFER_NXE)
    cpu.load(VA, 1)


@pytest.mark.req("PT-2")
def test_la57_decides_how_cr3_is_read() -> None:
    machine = Machine("genoa", ram=RAM, seed=1)
    tables = Tables(machine, five_levels=True)
    tables.map(0, FRAME | PAGE_RW)
    tables.map(1 << 50, FRAME | PAGE_RW)
    cpu = machine.cpu
    long_mode(cpu, tables.cr3, cr4=CR4_LA57)
    assert cpu.translate(1 << 50).pa == FRAME
    cpu.write_cr0(CR0_PE)
    cpu.write_cr4(CR4_PAE)
    cpu.write_cr0(CR0_PE | CR0_PG)
    with pytest.raises(GeneralProtection):
        cpu.translate(1 << 50)
    # The PML5 is a PML4 now: its tables are one level too high.
    assert cpu.translate(0).pa == tables.page_of(0, 12)


@pytest.mark.req("WP-15")
def test_order_of_enabling_cpuid_then_syscfg_then_entries() -> None:
    machine = Machine("milan", ram=RAM, smee=False, seed=1)
    cpu = machine.cpu
    tables = Tables(machine)
    leaf = cpu.cpuid(0x8000_001F)
    assert leaf.eax & 1
    c_mask = 1 << (leaf.ebx & 63)
    tables.map(VA, FRAME | c_mask | PAGE_RW)
    tables.map(0, LARGE_RW, 21)
    long_mode(cpu, tables.cr3)
    with pytest.raises(PageFault):  # too early: a reserved bit
        cpu.load(VA, 1)
    cpu.wrmsr(SYSCFG, cpu.rdmsr(SYSCFG) | SYSCFG_SMEE)
    cpu.store(VA, b"enciphered bytes")
    cpu.wbinvd()
    assert cpu.load(VA, 16) == b"enciphered bytes"
    assert machine.snoop(FRAME, 16) != b"enciphered bytes"


# --- VM_PAGE_FLUSH


PAGE_FLUSH = 0xC001_011E
ASID = 5


@pytest.mark.req("CM-34")
def test_a_page_flush_writes_back_what_an_asid_holds_of_the_page() -> None:
    cpu, tables = in_long_mode()
    machine = tables.machine
    machine.controller.load_key(ASID + 1, machine.controller.engine(1))
    machine.bus.store(FRAME, b"of the guest" * 4, ASID + 1)
    machine.bus.store(FRAME + 0x1000, b"of the guest" * 4, ASID + 1)
    cpu.wrmsr(PAGE_FLUSH, VA | ASID)
    assert machine.snoop(FRAME, 16) != bytes(16)
    assert machine.snoop(FRAME + 0x1000, 16) == bytes(16), "another page"


@pytest.mark.req("CM-34")
@pytest.mark.parametrize("va", [VA + 0x1000, 1 << 47, 1 << 63 | VA])
def test_a_page_flush_of_what_is_not_mapped_is_refused_and_nothing_else(
    va: int,
) -> None:
    cpu, _ = in_long_mode()
    cpu.set_handler(14, lambda cpu, fault: pytest.fail("a handler saw it"))
    with pytest.raises(GeneralProtection) as caught:
        cpu.wrmsr(PAGE_FLUSH, va | ASID)
    assert (caught.value.error_code, cpu.cr2) == (0, 0)


# --- the rest


def test_the_trace_tells_of_writes_that_were_taken() -> None:
    machine = Machine("milan", ram=RAM, seed=1)
    events: list[Event] = []
    machine.trace.listen(events.append, frozenset({"cr"}))
    long_mode(machine.cpu, 0x5000)
    for refused in (machine.cpu.write_cr0, machine.cpu.write_cr4):
        with pytest.raises(GeneralProtection):
            refused(1 << 40)
    assert [(e.facts["register"], e.facts["value"]) for e in events] == [
        ("cr4", CR4_PAE),
        ("cr3", 0x5000),
        ("cr0", CR0_PE | CR0_WP | CR0_PG),
    ]


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_value_that_is_no_64_bit_word_is_the_callers_mistake(value: int) -> None:
    cpu = core()
    for write in (cpu.write_cr0, cpu.write_cr3, cpu.write_cr4):
        with pytest.raises(CallerError):
            write(value)


@pytest.mark.parametrize("bit", [CR4_SMEP, CR4_SMAP])
def test_protection_of_users_pages_can_be_switched_on_under_way(bit: int) -> None:
    cpu, _ = in_long_mode()
    cpu.load(VA, 1)
    cpu.fetch(VA, 1)
    cpu.write_cr4(CR4_PAE | bit)
    with pytest.raises(PageFault) as caught:
        (cpu.fetch if bit == CR4_SMEP else cpu.load)(VA, 1)
    assert caught.value.error_code == (0x11 if bit == CR4_SMEP else 0x1)
    cpu.write_cr4(CR4_PAE)
    cpu.load(VA, 1)
    cpu.fetch(VA, 1)
