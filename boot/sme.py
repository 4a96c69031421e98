"""Detection: may this kernel use memory encryption, and was it asked to?

Runs on the boot loader's identity map, before any table of the kernel's own. The
steps and their order are Linux's; a step that fails ends the search without a trace
in the kernel's state.

Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_identity.c, sme_enable().
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hw.cpu import Cpu
from ..hw.errors import KernelError
from ..hw.msr import SevStatus, Syscfg
from ..hw.types import VirtAddr
from ..kernel.cc import EncryptionState
from ..kernel.setup import BOOT_PARAMS_SIZE, COMMAND_LINE_SIZE
from .cmdline import cmdline_find_option
from .params import (
    SETUP_DATA_HEADER,
    BootParams,
    SetupDataType,
)

HIGHEST_EXTENDED_LEAF = 0x8000_0000
MEMORY_ENCRYPTION_LEAF = 0x8000_001F
SME_BIT = 1 << 0
SEV_BIT = 1 << 1
HYPERVISOR_BIT = 1 << 31

OPTION = b"mem_encrypt"
OPTION_BUFFER_SIZE = 16

MAX_SETUP_DATA_NODES = 64
"""A longer list is a loop; Linux would follow it forever."""

LOWEST_C_BIT = 32
"""Below it a position makes no sense: parts with the SME bit and EBX = 0 exist."""


@dataclass(frozen=True)
class Detection:
    """What `sme_enable` found.

    Attributes:
        state: the decision; me_mask is 0 unless every step passed.
        reason: which step decided, in a reader's words.
    """

    state: EncryptionState
    reason: str


def sme_enable(cpu: Cpu, boot_params: VirtAddr) -> Detection:
    """Decide once whether memory encryption is active.

    Args:
        cpu: the boot core, on the boot loader's tables.
        boot_params: address of the 4096-byte zero page; plain memory.

    Raises:
        KernelError: a confidential-computing blob without SNP: terminate.

    Context: identity map, nothing of the kernel encrypted yet.

    Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_identity.c, sme_enable(); the
        refusal of a C-bit below 32 is ours (InstLatx64 dumps of Cezanne, Rembrandt).
    """
    params = BootParams.parse(cpu.load(boot_params, BOOT_PARAMS_SIZE))
    blob = params.cc_blob_address or _cc_blob_of(cpu, params)

    highest = cpu.cpuid(HIGHEST_EXTENDED_LEAF).eax
    if highest < MEMORY_ENCRYPTION_LEAF:
        return _inactive(
            f"CPUID 8000_0000 ends at {highest:#x}: no leaf 8000_001F, no SME"
        )
    leaf = cpu.cpuid(MEMORY_ENCRYPTION_LEAF)
    if not leaf.eax & (SME_BIT | SEV_BIT):
        return _inactive("CPUID 8000_001F EAX offers neither SME nor SEV")
    position = leaf.ebx & 63
    if position < LOWEST_C_BIT:
        return _inactive(f"CPUID 8000_001F EBX puts the C-bit at {position}: nonsense")
    me_mask = 1 << position

    # ORDER: read here, before the hypervisor bit and SYSCFG, which are a host's
    # business only; an SEV guest must not depend on either.
    sev_status = cpu.rdmsr(SevStatus.ADDRESS)
    if blob and not SevStatus(sev_status).sev_snp:
        raise KernelError(
            f"confidential-computing blob at {blob:#x}, but SEV_STATUS "
            f"{sev_status:#x} says SNP is off: terminating"
        )
    if SevStatus(sev_status).sev:
        return Detection(EncryptionState(me_mask, sev_status), "SEV guest")

    # ORDER: a guest without SEV never reads SYSCFG, which hypervisors hide.
    if cpu.cpuid(1).ecx & HYPERVISOR_BIT:
        return _inactive("CPUID 1 ECX[31]: under a hypervisor, and not an SEV guest")
    if not Syscfg(cpu.rdmsr(Syscfg.ADDRESS)).mem_encrypt:
        return _inactive("SYSCFG[23] is 0: firmware did not enable SME")
    return _ask_command_line(cpu, params, me_mask, sev_status)


def _ask_command_line(
    cpu: Cpu, params: BootParams, me_mask: int, sev_status: int
) -> Detection:
    if not params.cmd_line:
        return _inactive("the boot loader passed no command line: no mem_encrypt=on")
    line = cpu.load(params.cmd_line, COMMAND_LINE_SIZE)
    length, value = cmdline_find_option(line, OPTION, OPTION_BUFFER_SIZE)
    if length < 0:
        return _inactive("command line has no mem_encrypt=on")
    if value != b"on":
        shown = value.decode("ascii", "backslashreplace")
        return _inactive(f'command line says mem_encrypt={shown}, only "on" counts')
    return Detection(EncryptionState(me_mask, sev_status), "mem_encrypt=on")


def _cc_blob_of(cpu: Cpu, params: BootParams) -> int:
    """Return the address of a blob passed in the setup_data list, or 0."""
    address = params.setup_data
    for _ in range(MAX_SETUP_DATA_NODES):
        if not address:
            return 0
        head = cpu.load(address, SETUP_DATA_HEADER.size)
        values = SETUP_DATA_HEADER.parse(head)
        if values["type"] == SetupDataType.CC_BLOB:
            where = cpu.load(address + SETUP_DATA_HEADER.size, 4)
            return int.from_bytes(where, "little")
        address = values["next"]
    raise KernelError(
        f"setup_data list at {params.setup_data:#x}: no end after "
        f"{MAX_SETUP_DATA_NODES} nodes"
    )


def _inactive(reason: str) -> Detection:
    return Detection(EncryptionState(), reason)
