"""boot/sme.py: the steps of detection one by one, and what each leaves behind.

The table of all combinations is in test_detection_matrix.py.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from cbit.boot.params import SetupData, SetupDataType
from cbit.boot.sme import Detection, sme_enable
from cbit.hw.cpuid import CpuModel
from cbit.hw.errors import KernelError
from cbit.hw.msr import SevStatus
from cbit.hw.types import PhysAddr, VirtAddr
from cbit.kernel.cc import EncryptionState

from .conftest import Board, altered, board, cached_model

SEV_STATUS, SYSCFG = ("rdmsr", 0xC001_0131), ("rdmsr", 0xC001_0010)
BLOB = 0x8000_1000
NODES = 0x9_3000  # behind what the loader stores below 640 KiB

HYPERVISOR = 1 << 31


def enable(made: Board) -> Detection:
    made.events.clear()
    return sme_enable(made.cpu, VirtAddr(made.hand_over.boot_params))


def guest(sev_status: int = 0) -> Board:
    first = cached_model("epyc-7742").table.leaf(1)
    made = board(altered("epyc-7742", 1, ecx=first.ecx | HYPERVISOR))
    made.machine.msrs[0].set(SevStatus(sev_status))
    return made


def put_node(made: Board, at: int, kind: int, data: bytes, then: int = 0) -> int:
    made.cpu.store(at, SetupData(kind, data, PhysAddr(then)).build())
    return at


def put_blob_behind_others(made: Board) -> None:
    """A setup_data list whose third node names a confidential-computing blob."""
    blob = put_node(
        made, NODES, SetupDataType.CC_BLOB, BLOB.to_bytes(4, "little") + bytes(4)
    )
    seed = put_node(made, NODES + 0x100, SetupDataType.RNG_SEED, bytes(32), blob)
    made.change_params(setup_data=put_node(made, NODES + 0x200, 0xDEAD, b"", seed))


@pytest.mark.req("LB-1", "LB-6")
@pytest.mark.parametrize("sev_status", [0, 1, 3])
@pytest.mark.parametrize("passed", ["boot_params", "setup_data"])
def test_a_blob_without_snp_terminates(passed: str, sev_status: int) -> None:
    made = guest(sev_status)
    if passed == "boot_params":
        made.change_params(cc_blob_address=BLOB)
    else:
        put_blob_behind_others(made)
    with pytest.raises(KernelError, match=f"blob at {BLOB:#x}.*SNP is off"):
        enable(made)
    assert made.facts("rdmsr") == [SEV_STATUS]


@pytest.mark.req("LB-1", "LB-6")
def test_a_blob_on_bare_metal_terminates_even_where_sme_would_be_on() -> None:
    made = board()
    put_blob_behind_others(made)
    with pytest.raises(KernelError, match="terminating"):
        made.start()
    assert made.facts("flush") == []


@pytest.mark.req("LB-1", "LB-6")
def test_a_blob_with_snp_is_an_snp_guest() -> None:
    made = guest(sev_status=7)
    put_blob_behind_others(made)
    found = enable(made)
    assert found == Detection(EncryptionState(1 << 47, 7), "SEV guest")


@pytest.mark.req("LB-1", "LB-2", "LB-3")
@pytest.mark.parametrize(
    "model",
    [
        altered("epyc-7742", 0x8000_0000, eax=0x8000_001E),
        altered("epyc-7742", 0x8000_001F, eax=0),
    ],
    ids=["no-leaf", "neither"],
)
def test_a_blob_is_not_looked_at_where_the_processor_has_nothing(
    model: CpuModel,
) -> None:
    made = board(model)
    made.change_params(cc_blob_address=BLOB)
    assert enable(made).state == EncryptionState()


@pytest.mark.req("LB-1")
def test_a_setup_data_list_without_end_is_refused() -> None:
    made = board()
    put_node(made, NODES, SetupDataType.DTB, b"", NODES + 0x100)
    put_node(made, NODES + 0x100, SetupDataType.DTB, b"", NODES)
    made.change_params(setup_data=NODES)
    with pytest.raises(KernelError, match=f"setup_data list at {NODES:#x}: no end"):
        enable(made)
    assert made.facts("cpuid", "rdmsr") == []  # it is the first thing that is looked at


def test_a_long_setup_data_list_is_followed_to_its_end() -> None:
    made = board()
    then = put_node(made, NODES, SetupDataType.CC_BLOB, BLOB.to_bytes(4, "little"))
    for number in range(1, 64):
        then = put_node(made, NODES + number * 32, SetupDataType.PCI, b"", then)
    made.change_params(setup_data=then)
    with pytest.raises(KernelError, match=f"blob at {BLOB:#x}"):
        enable(made)


@pytest.mark.req("LB-5")
@pytest.mark.parametrize("smee", [True, False])
@pytest.mark.parametrize("line", [b"mem_encrypt=on", b""])
def test_sev_status_is_read_in_every_case(line: bytes, smee: bool) -> None:
    made = board(cmdline=line, smee=smee)
    enable(made)
    assert made.facts("rdmsr")[0] == SEV_STATUS


@pytest.mark.req("LB-5")
@pytest.mark.parametrize("sev_status", [0, 1, 2, 3, 7])
def test_in_a_guest_syscfg_stays_unread(sev_status: int) -> None:
    made = guest(sev_status)
    enable(made)
    assert made.facts("rdmsr") == [SEV_STATUS]


@pytest.mark.req("LB-4", "LB-10")
@pytest.mark.parametrize("ebx", [0x20, 0x2F, 0x33, 0x3F, 0xFFFF_FFEF])
def test_the_mask_is_the_low_six_bits_of_ebx(ebx: int) -> None:
    leaf = altered("epyc-7742", 0x8000_001F, ebx=ebx)
    made = board(leaf, coherent=True)
    made.machine.msrs[0].set(SevStatus(1))
    assert enable(made).state.me_mask == 1 << (ebx & 0x3F)


@pytest.mark.req("LB-10")
def test_the_decision_cannot_be_changed_afterwards() -> None:
    state = enable(board()).state
    with pytest.raises(FrozenInstanceError):
        state.me_mask = 0  # type: ignore[misc]
    assert state.cc_mask == state.me_mask == 1 << 51
    assert state.physical_mask == (1 << 52) - 1 - (1 << 51)


@pytest.mark.req("LB-10")
def test_the_decision_outlives_clear_bss() -> None:
    made = board()
    booted = made.start()
    assert booted.state == EncryptionState(1 << 51)
    assert made.cpu.read_cr3() == made.data.early_top_pgt | 1 << 51


def test_detection_stores_nothing_and_changes_no_register() -> None:
    made = board()
    low = made.through(False, 0x9_0000, 0x1_0000)
    before = made.cpu.read_cr0(), made.cpu.read_cr3(), made.cpu.read_cr4()
    enable(made)
    assert made.through(False, 0x9_0000, 0x1_0000) == low
    assert (made.cpu.read_cr0(), made.cpu.read_cr3(), made.cpu.read_cr4()) == before
    assert made.facts("cr", "wrmsr", "flush") == []


@pytest.mark.req("LB-5", "LB-11")
def test_order_sev_status_comes_before_the_hypervisor_bit_and_syscfg() -> None:
    made = board()
    enable(made)
    looks = made.facts("cpuid", "rdmsr")
    at = looks.index(SEV_STATUS)
    assert looks[:at] == [("cpuid", 0x8000_0000), ("cpuid", 0x8000_001F)]
    assert looks[at + 1 :] == [("cpuid", 1), SYSCFG]

    # An SEV guest needs neither: it does not ask the host for them.
    made = guest(sev_status=1)
    assert enable(made).state.me_mask
    assert ("cpuid", 1) not in made.facts("cpuid")
    assert SYSCFG not in made.facts("rdmsr")


@pytest.mark.req("LB-7", "LB-11")
def test_order_a_guest_without_sev_never_reads_syscfg() -> None:
    made = guest()
    found = enable(made)
    assert made.facts("cpuid")[-1] == ("cpuid", 1)
    assert SYSCFG not in made.facts("rdmsr")
    assert "hypervisor" in found.reason
