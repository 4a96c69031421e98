"""BZ-7: what CPUID offers is taken for what is switched on.

CPUID 8000_001F says what the part can do. SYSCFG[23] says whether the C-bit counts,
SEV_STATUS what the guest that reads it runs under, and CPUID 1 ECX[31] whose SYSCFG it
is. On a host with SEV-ES every capability is there and no guest is.

Seen in tianocore/edk2 PR 2936 (CPUID's SEV-ES bit in place of SEV_STATUS bit 1);
project-oak/oak PR 3223 read SEV_STATUS on parts that have none.

Half of it is shown here: a host, with and without SYSCFG[23], and a guest without SEV.
Where SEV_STATUS is not 0 there must be an SEV guest.
"""

from collections.abc import Callable

import pytest

from cbit.hw.cpu import Cpu
from cbit.hw.cpuid import CpuModel
from cbit.hw.faults import GeneralProtection
from cbit.hw.models import load_model, model_names

from .own_table import FINE, FLAGS, FRAME, OwnTable, store_secret

pytestmark = pytest.mark.req("BZ-7")

SYSCFG, GHCB, SEV_STATUS = 0xC001_0010, 0xC001_0130, 0xC001_0131
SME, SEV, SEV_ES = 1 << 0, 1 << 1, 1 << 3

WITH_SME = sorted(set(model_names()) - {"epyc-7401p-guest", "ryzen-6800hs"})


def under_a_hypervisor(model: str) -> CpuModel:
    """Return the same part as a plain guest sees it: all bits, and the hypervisor's."""
    part = load_model(model)
    one = part.table.leaf(1)
    table = part.table.replace({(1, 0): one._replace(ecx=one.ecx | 1 << 31)})
    return CpuModel(f"{model} as a guest", part.source, table)


def offered(cpu: Cpu) -> int:
    """Faulty: the part can, so it does."""
    leaf = cpu.cpuid(0x8000_001F)
    position = leaf.ebx & 0x3F
    return 1 << position if leaf.eax & SME and position >= 32 else 0


def active(cpu: Cpu) -> int:
    """Right: offered, on bare metal, and switched on."""
    mask = offered(cpu)
    if not mask or cpu.cpuid(1).ecx & 1 << 31 or not cpu.rdmsr(SYSCFG) & 1 << 23:
        return 0
    return mask


def check(c_mask: Callable[[Cpu], int], model: CpuModel | str, *, smee: bool) -> str:
    table = OwnTable(model, smee=smee)
    return store_secret(table, FRAME | c_mask(table.cpu) | FLAGS)


@pytest.mark.parametrize("smee", [False, True])
@pytest.mark.parametrize("model", model_names())
def test_the_active_state_is_right_in_every_case(model: str, smee: bool) -> None:
    assert check(active, model, smee=smee) == FINE
    assert check(active, under_a_hypervisor(model), smee=smee) == FINE


@pytest.mark.parametrize("model", WITH_SME)
def test_the_capability_is_enough_only_while_firmware_agrees(model: str) -> None:
    assert check(offered, model, smee=True) == FINE

    # The bit is now one of an address that no memory has, or a reserved one.
    for part in (model, under_a_hypervisor(model)):
        seen = check(offered, part, smee=False)
        assert "no memory or device" in seen or "reserved bit set in PT" in seen


def es_by_cpuid(cpu: Cpu) -> bool:
    """Faulty: this bit is for a host that wants to run such guests."""
    return bool(cpu.cpuid(0x8000_001F).eax & SEV_ES)


def es_by_msr_alone(cpu: Cpu) -> bool:
    """Faulty: the MSR is there only where CPUID says so."""
    return bool(cpu.rdmsr(SEV_STATUS) & 1 << 1)


def es_by_both(cpu: Cpu) -> bool:
    """Right: CPUID whether one may ask, SEV_STATUS for the answer."""
    if not cpu.cpuid(0x8000_001F).eax & (SME | SEV):
        return False
    return bool(cpu.rdmsr(SEV_STATUS) & 1 << 1)


def check_es(in_sev_es_guest: Callable[[Cpu], bool], model: str) -> str:
    """Boot: who believes to be an SEV-ES guest registers a GHCB first of all."""
    cpu = OwnTable(model).cpu
    try:
        if in_sev_es_guest(cpu):
            cpu.wrmsr(GHCB, FRAME)
    except GeneralProtection as fault:
        return str(fault)
    return FINE


@pytest.mark.parametrize("model", model_names())
def test_no_host_is_an_sev_es_guest(model: str) -> None:
    assert check_es(es_by_both, model) == FINE


def test_a_host_that_offers_sev_es_takes_itself_for_a_guest() -> None:
    assert "0xc0010130 (GHCB)" in check_es(es_by_cpuid, "milan")


def test_sev_status_is_not_on_every_part() -> None:
    assert "0xc0010131 (SEV_STATUS)" in check_es(es_by_msr_alone, "epyc-7401p-guest")
