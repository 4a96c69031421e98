"""Who gets memory encryption: one table of CPUID, firmware, hypervisor, command line.

Every row says the decision, its reason, and how far `sme_enable` had to look. The
values of CPUID are those of the manual and of InstLatx64 dumps, not of the code.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from cbit.boot.sme import sme_enable
from cbit.hw.cpuid import CpuModel, parse_dump
from cbit.hw.faults import PageFault
from cbit.hw.models import model_names
from cbit.hw.msr import SevStatus, Syscfg
from cbit.hw.types import VirtAddr

from .conftest import GIB, TABLE_ADDRESS, Board, Fact, board, cached_model, equal_blocks

LOOKS: list[Fact] = [
    ("cpuid", 0x8000_0000),
    ("cpuid", 0x8000_001F),
    ("rdmsr", 0xC001_0131),  # SEV_STATUS
    ("cpuid", 0x0000_0001),  # the hypervisor bit
    ("rdmsr", 0xC001_0010),  # SYSCFG
]
"""Linux's order; every search is a beginning of it. Then comes the command line."""

HYPERVISOR = 1 << 31
ON = b"mem_encrypt=on"

NO_LEAF = "no leaf 8000_001F"
NEITHER = "neither SME nor SEV"
NONSENSE = "nonsense"
GUEST = "SEV guest"
VIRTUAL = "under a hypervisor, and not an SEV guest"
FIRMWARE = "SYSCFG[23] is 0"
NO_LINE = "passed no command line"
NO_OPTION = "no mem_encrypt=on"
ASKED = "mem_encrypt=on"

C47, C51 = 1 << 47, 1 << 51


class Row(NamedTuple):
    """One machine and what must come of it.

    Attributes:
        mask: the expected me_mask.
        reason: a phrase of the expected reason.
        looks: how many of `LOOKS` were taken.
        eax, ebx: leaf 8000_001F; ecx1: bits set in leaf 1 ECX.
        highest: leaf 8000_0000 EAX.
        sev_status: what the hypervisor let the guest see.
        line: the command line.
    """

    mask: int
    reason: str
    looks: int
    eax: int = 0x3
    ebx: int = 0x16F
    ecx1: int = 0
    highest: int = 0x8000_0020
    sev_status: int = 0
    smee: bool = True
    line: bytes = ON


def says(value: str) -> str:
    return f'command line says mem_encrypt={value}, only "on" counts'


ROWS = {
    # CPUID
    "leaf-absent": Row(0, NO_LEAF, 1, highest=0x8000_001E),
    "oldest-amd64": Row(0, NO_LEAF, 1, highest=0x8000_0008),
    "leaf-is-the-last": Row(C47, ASKED, 5, highest=0x8000_001F),
    "neither": Row(0, NEITHER, 2, eax=0),
    "neither-but-other-bits": Row(0, NEITHER, 2, eax=0xFFFF_FFFC),
    "sme-only": Row(C47, ASKED, 5, eax=0x1),
    "sev-only": Row(0, FIRMWARE, 5, eax=0x2),
    "both": Row(C47, ASKED, 5, eax=0x3),
    "all-bits": Row(C47, ASKED, 5, eax=0xFFFF_FFFF),
    # Position: parts with the SME bit and EBX = 0 exist (Cezanne, Rembrandt).
    "c-bit-0": Row(0, NONSENSE, 2, ebx=0),
    "c-bit-11": Row(0, NONSENSE, 2, ebx=0x14B),
    "c-bit-31": Row(0, NONSENSE, 2, ebx=0x15F),
    "c-bit-inside-the-width": Row(0, FIRMWARE, 5, ebx=0x160),
    "c-bit-on-the-reduced-width": Row(1 << 43, ASKED, 5, ebx=0x16B),
    "c-bit-above-the-width": Row(C51, ASKED, 5, ebx=0x173),
    "c-bit-52": Row(0, FIRMWARE, 5, ebx=0x174),
    "c-bit-63": Row(0, FIRMWARE, 5, ebx=0x17F),
    "other-ebx-bits": Row(C47, ASKED, 5, ebx=0xFFFF_F16F),
    "no-reduction": Row(0, FIRMWARE, 5, ebx=0x02F),
    # Hypervisor and SEV_STATUS
    "guest-without-sev": Row(0, VIRTUAL, 4, ecx1=HYPERVISOR),
    "guest-sme-only": Row(0, VIRTUAL, 4, eax=1, ecx1=HYPERVISOR),
    "guest-sev-bit-only": Row(0, VIRTUAL, 4, eax=2, ecx1=HYPERVISOR),
    "guest-without-leaf": Row(0, NO_LEAF, 1, highest=0x8000_001E, ecx1=HYPERVISOR),
    "guest-nonsense": Row(0, NONSENSE, 2, ebx=0, ecx1=HYPERVISOR),
    "sev": Row(C47, GUEST, 3, ecx1=HYPERVISOR, sev_status=1),
    "sev-es": Row(C47, GUEST, 3, ecx1=HYPERVISOR, sev_status=3),
    "sev-snp": Row(C51, GUEST, 3, ebx=0x173, ecx1=HYPERVISOR, sev_status=7),
    "sev-hidden-hypervisor": Row(C47, GUEST, 3, sev_status=1),
    "sev-sme-bit-hidden": Row(C47, GUEST, 3, eax=2, ecx1=HYPERVISOR, sev_status=1),
    "sev-es-bit-alone": Row(0, VIRTUAL, 4, ecx1=HYPERVISOR, sev_status=2),
    "sev-needs-no-option": Row(
        C47, GUEST, 3, ecx1=HYPERVISOR, sev_status=1, line=b"mem_encrypt=off"
    ),
    "sev-status-without-cpuid": Row(
        0, NEITHER, 2, eax=0, ecx1=HYPERVISOR, sev_status=1
    ),
    # Firmware
    "no-smee": Row(0, FIRMWARE, 5, smee=False),
    "no-smee-and-off": Row(0, FIRMWARE, 5, smee=False, line=b"mem_encrypt=off"),
    "no-smee-sme-only": Row(0, FIRMWARE, 5, eax=1, smee=False),
    # Command line
    "off": Row(0, says("off"), 5, line=b"mem_encrypt=off"),
    "only": Row(0, says("only"), 5, line=b"mem_encrypt=only"),
    "on1": Row(0, says("on1"), 5, line=b"mem_encrypt=on1"),
    "capitals": Row(0, says("ON"), 5, line=b"mem_encrypt=ON"),
    "other": Row(0, says("auto"), 5, line=b"mem_encrypt=auto"),
    "number": Row(0, says("1"), 5, line=b"mem_encrypt=1"),
    "no-value": Row(0, says(""), 5, line=b"mem_encrypt="),
    "cut-by-the-buffer": Row(0, says("on" * 7 + "o"), 5, line=ON + b"on" * 20),
    "not-text": Row(0, says(r"o\xff"), 5, line=b"mem_encrypt=o\xff"),
    "quoted-value": Row(0, says('"on"'), 5, line=b'mem_encrypt="on"'),
    "flag-without-value": Row(0, NO_OPTION, 5, line=b"mem_encrypt"),
    "empty": Row(0, NO_OPTION, 5, line=b""),
    "others-only": Row(0, NO_OPTION, 5, line=b"quiet nomodeset ro"),
    "option-in-capitals": Row(0, NO_OPTION, 5, line=b"MEM_ENCRYPT=on"),
    "longer-name": Row(0, NO_OPTION, 5, line=b"xmem_encrypt=on mem_encrypt_x=on"),
    "quoted": Row(0, NO_OPTION, 5, line=b'"mem_encrypt=on"'),
    "among-others": Row(C47, ASKED, 5, line=b"quiet " + ON + b" ro"),
    "after-a-tab": Row(C47, ASKED, 5, line=b"quiet\t" + ON + b"\n"),
    "last-one-counts": Row(C47, ASKED, 5, line=b"mem_encrypt=off " + ON),
    "last-one-counts-off": Row(0, says("off"), 5, line=ON + b" mem_encrypt=off"),
    "quotes-mean-nothing": Row(C47, ASKED, 5, line=b'x="y ' + ON + b' z"'),
    "at-the-very-end": Row(C47, ASKED, 5, line=ON.rjust(2047)),
}


def processor(row: Row) -> CpuModel:
    """Make the processor of a row out of a Rome."""
    rome = cached_model("epyc-7742")
    highest, leaf, first = (
        rome.table.leaf(number) for number in (0x8000_0000, 0x8000_001F, 1)
    )
    changed = {
        (0x8000_0000, 0): highest._replace(eax=row.highest),
        (0x8000_001F, 0): leaf._replace(eax=row.eax, ebx=row.ebx),
        (1, 0): first._replace(ecx=first.ecx | row.ecx1),
    }
    return CpuModel("made-up", "a test", rome.table.replace(changed))


@pytest.mark.req("LB-2", "LB-3", "LB-4", "LB-5", "LB-7", "LB-8", "LB-9", "LB-10")
@pytest.mark.req("LB-11", "BZ-6", "BZ-7", "PT-30", "PT-31", "WP-15")
@pytest.mark.parametrize("row", [pytest.param(r, id=n) for n, r in ROWS.items()])
def test_decision_reason_and_order(row: Row) -> None:
    made = board(processor(row), smee=row.smee, cmdline=row.line)
    made.machine.msrs[0].set(SevStatus(row.sev_status))  # what a VMRUN would have set
    made.events.clear()

    found = sme_enable(made.cpu, VirtAddr(made.hand_over.boot_params))

    assert found.state.me_mask == row.mask
    assert found.state.physical_mask == (1 << 52) - 1 & ~row.mask
    assert found.state.sev_status == (row.sev_status if row.mask else 0)
    assert row.reason in found.reason
    assert made.facts("cpuid", "rdmsr") == LOOKS[: row.looks]


# Leaf 8000_001F of each shipped part as its InstLatx64 dump prints it: the C-bit, and
# the phrase where none is to be had.
SHIPPED: dict[str, int | str] = {
    "epyc-7401p-guest": NO_LEAF,
    "epyc-7551p": 47,
    "epyc-7742": 47,
    "epyc-7763": 51,
    "epyc-9124": 51,
    "epyc-9654": 51,
    "epyc-9655": 51,
    "ryzen-1800x": 47,
    "ryzen-4800h": 47,
    "ryzen-5950x": 51,
    "ryzen-6800hs": NONSENSE,
    "ryzen-7950x": 51,
}


def test_the_table_has_every_shipped_model() -> None:
    assert tuple(SHIPPED) == model_names()


@pytest.mark.req("LB-8", "LB-10", "BZ-2", "BZ-5", "BZ-6", "BZ-7", "PT-30", "WP-12")
@pytest.mark.parametrize("smee", [True, False], ids=["smee", "no-smee"])
@pytest.mark.parametrize("line", [ON, b"mem_encrypt=off"], ids=["on", "off"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_boots_and_dram_shows_the_decision(
    name: str, line: bytes, smee: bool
) -> None:
    known = SHIPPED[name]
    made = board(name, cmdline=line, smee=smee)
    booted = made.start()
    if isinstance(known, str):
        mask, reason = 0, known
    elif not smee:
        mask, reason = 0, FIRMWARE
    elif line == ON:
        mask, reason = 1 << known, ASKED
    else:
        mask, reason = 0, says("off")
    assert booted.state.me_mask == mask
    assert reason in booted.detection.reason
    assert made.cpu.read_cr3() == made.data.early_top_pgt | mask
    text = made.layout.text_start, made.layout.bss.start
    same = equal_blocks(made.cells(*text), made.plain(*text))
    assert len(same) == (0 if mask else (text[1] - text[0]) // 16)


DUMP = """
CPUID 00000000: 00000010-68747541-444D4163-69746E65
CPUID 00000001: 00830F10-00800800-{ecx1}-178BFBFF
CPUID 80000000: 8000001F-68747541-444D4163-69746E65
CPUID 80000001: 00830F10-40000000-75C237FF-2FD3FBFF
CPUID 80000008: 00003030-010EB757-0000707F-00010007
CPUID 8000001F: {leaf}
"""


@pytest.mark.req("LB-3", "LB-4", "LB-7", "BZ-7")
@pytest.mark.parametrize(
    ("leaf", "ecx1", "reason"),
    [
        ("00000001-0000016F-00000000-00000000", "7ED8320B", ASKED),
        ("0000000F-0000016F-000001FD-00000001", "7ED8320B", ASKED),
        ("0000000F-0000016F-000001FD-00000001", "FED8320B", VIRTUAL),
        ("0001780F-00000000-00000000-00000001", "7ED8320B", NONSENSE),
        ("00000000-00000000-00000000-00000000", "7ED8320B", NEITHER),
    ],
)
def test_a_processor_read_from_a_dump(leaf: str, ecx1: str, reason: str) -> None:
    table = parse_dump(DUMP.format(leaf=leaf, ecx1=ecx1), "a test")
    made = board(CpuModel("dumped", "a test", table))
    found = sme_enable(made.cpu, VirtAddr(made.hand_over.boot_params))
    assert reason in found.reason
    assert found.state.me_mask == (C47 if reason == ASKED else 0)


HIGH_LINE = 0x1_0000_0000 + 0x12_3000
"""In the first RAM above 4 GiB: only with ext_cmd_line_ptr can a zero page name it."""


def with_line_above_4_gib(line: bytes) -> Board:
    """Put a command line above 4 GiB, and extend the boot loader's map up to it."""
    made = board("epyc-7742", ram=5 * GIB, cmdline=b"mem_encrypt=off")
    pdpt = made.cpu.load64(made.cpu.read_cr3()) & TABLE_ADDRESS
    made.cpu.store64(pdpt + 8 * 4, 0x1_0000_0000 | 0x183)  # one more GiB, P RW PS G
    made.cpu.store(HIGH_LINE, line + b"\0")
    made.change_params(
        cmd_line_ptr=HIGH_LINE & 0xFFFF_FFFF, ext_cmd_line_ptr=HIGH_LINE >> 32
    )
    return made


@pytest.mark.req("LB-9", "LB-73", "LB-74")
def test_the_upper_half_of_the_command_line_pointer_counts() -> None:
    booted = with_line_above_4_gib(ON + b" high").start()
    assert booted.state.me_mask == C47
    assert booted.command_line == ON + b" high"


@pytest.mark.req("LB-9")
def test_a_pointer_whose_lower_half_is_zero_is_a_pointer() -> None:
    made = with_line_above_4_gib(b"")
    made.cpu.store(0x1_0000_0000, ON + b"\0")
    made.change_params(cmd_line_ptr=0, ext_cmd_line_ptr=1)
    assert sme_enable(made.cpu, VirtAddr(made.hand_over.boot_params)).reason == ASKED


@pytest.mark.req("LB-9", "LB-73")
def test_without_a_command_line_pointer_nothing_is_asked_for() -> None:
    made = board()
    made.change_params(cmd_line_ptr=0)
    booted = made.start()
    assert NO_LINE in booted.detection.reason
    assert booted.command_line == b""
    assert booted.state.me_mask == 0


@pytest.mark.req("LB-11")
def test_the_command_line_is_looked_at_last() -> None:
    made = board(smee=False)
    made.change_params(ext_cmd_line_ptr=0x10)  # nothing is mapped there
    at = VirtAddr(made.hand_over.boot_params)
    assert FIRMWARE in sme_enable(made.cpu, at).reason
    made.machine.msrs[0].set(Syscfg.of(mem_encrypt=1))
    with pytest.raises(PageFault):
        sme_enable(made.cpu, at)
