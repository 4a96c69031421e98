"""CPUID of the machine that the tests run on, by each means."""

import os
import platform
import re
import sys
from pathlib import Path

import pytest

from cbit.hw.cpuid import ABSENT, LeafRange, host
from cbit.hw.cpuid.host import HostUnavailable
from cbit.hw.models import load_model

CPUINFO = Path("/proc/cpuinfo")

on_x86_linux = pytest.mark.skipif(
    platform.machine() != "x86_64" or not CPUINFO.exists(),
    reason="needs an x86-64 machine with Linux",
)


def cpuinfo(key: str) -> str:
    """Return what the running kernel says: the second witness."""
    found = re.search(rf"(?m)^{key}\s*: (.*)$", CPUINFO.read_text())
    return found[1] if found else ""


@on_x86_linux
def test_the_instruction_says_what_the_kernel_says() -> None:
    table = host.read_with_instruction()
    assert table.vendor == cpuinfo("vendor_id")
    assert table.brand == cpuinfo("model name")
    flags = cpuinfo("flags").split()
    family = table.leaf(1).eax
    assert ((family >> 8 & 0xF) + (family >> 20 & 0xFF)) == int(cpuinfo("cpu family"))
    assert bool(table.leaf(1).ecx >> 31) == ("hypervisor" in flags)


@on_x86_linux
def test_the_instruction_can_be_executed_many_times() -> None:
    # The stub must give back rbx and free its page, or the interpreter dies soon.
    first = host.read_with_instruction()
    for _ in range(50):
        assert host.read_with_instruction().leaf(0) == first.leaf(0)


@on_x86_linux
def test_every_leaf_is_read_and_only_sub_leaves_that_say_something() -> None:
    table = host.read_with_instruction()
    for base in (LeafRange.STANDARD, LeafRange.EXTENDED):
        assert all(table.has(leaf) for leaf in range(base, table.max_leaf(base) + 1))
    assert not [n for n, sub, row in table if sub and row == ABSENT]


@on_x86_linux
@pytest.mark.skipif(not os.access(host.DEVICE, os.R_OK), reason="needs root")
def test_the_device_says_what_the_instruction_says() -> None:
    device, instruction = host.read_with_device(), host.read_with_instruction()
    for leaf in (0, 0x8000_0000, 0x8000_0002, 0x8000_0008, 0x8000_001F):
        assert device.leaf(leaf) == instruction.leaf(leaf)


def tool(folder: Path, output: str, code: int = 0) -> None:
    """Put a `cpuid` tool into `folder` that prints `output`."""
    data = folder / "output.txt"
    data.write_text(output)
    script = folder / "cpuid"
    script.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"assert sys.argv[1:] == ['-1', '-r']\n"
        f"print(open({str(data)!r}).read())\nsys.exit({code})\n"
    )
    script.chmod(0o755)


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without tool, device, or x86; returns the only folder of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(host, "DEVICE", str(tmp_path / "no-device"))
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    return tmp_path


def test_the_tool_comes_first(nothing: Path) -> None:
    table = load_model("rome").table
    tool(
        nothing,
        "CPU:\n"
        + "".join(
            f"   0x{leaf:08x} 0x{sub:02x}: eax=0x{r.eax:08x} ebx=0x{r.ebx:08x} "
            f"ecx=0x{r.ecx:08x} edx=0x{r.edx:08x}\n"
            for leaf, sub, r in table
        ),
    )
    model = host.read_host()
    assert (model.name, model.source) == ("host", "the cpuid tool")
    assert model.memory_encryption == load_model("rome").memory_encryption


@on_x86_linux
@pytest.mark.parametrize(("output", "code"), [("some other tool", 0), ("", 1)])
def test_a_tool_that_is_another_or_fails_is_passed_over(
    nothing: Path, monkeypatch: pytest.MonkeyPatch, output: str, code: int
) -> None:
    tool(nothing, output, code)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert host.read_host().source == "the CPUID instruction"


def test_with_no_means_at_all_each_failure_is_told(nothing: Path) -> None:
    with pytest.raises(HostUnavailable) as failed:
        host.read_host()
    text = str(failed.value)
    assert "the cpuid tool: not installed" in text
    assert "no-device: No such file" in text
    assert "this machine is riscv64, expected x86_64" in text
