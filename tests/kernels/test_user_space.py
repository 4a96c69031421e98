"""Unmodified kernels enable SME, come to user space and switch themselves off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ACTIVE, COHERENT, FIVE_LEVELS, INCOHERENT, WITHOUT_SME, Cbit


@pytest.mark.parametrize(
    ("model", "more"),
    [
        (INCOHERENT, []),
        (COHERENT, []),
        (FIVE_LEVELS, ["--la57"]),
        (FIVE_LEVELS, []),  # the decompressor itself goes from 4 levels to 5
    ],
    ids=["C-bit 47", "C-bit 51, width 48", "width 52, 5 levels", "4 to 5 levels"],
)
def test_the_cloud_kernel_comes_to_user_space_with_sme(
    cbit: Cbit,
    real_kernel_path: Path,
    archives: dict[str, Path],
    model: str,
    more: list[str],
) -> None:
    # The bzImage as it is: decompressor, KASLR, ACPI, APIC, kernel, busybox.
    done = cbit(
        *("run", real_kernel_path, "--initrd", archives["batch"], "--cpu", model),
        *("--timeout", 200, "--seed", 5, "--json", *more),
    )
    assert done.code == 0, done.out + done.err
    facts = done.facts
    assert ACTIVE in done.console
    assert "flag sme" in done.console
    assert "done: 42" in done.console
    assert "reboot: Power down" in done.console
    assert (facts["outcome"], facts["sme_active"]) == ("shutdown", True)
    assert int(facts["cr3"], 16) >> facts["c_bit"] & 1
    assert facts["pages"]["encrypted"] > 20_000
    assert facts["interrupts"] > 50
    # Linux asks for nothing that does not exist here, apart from what it probes.
    assert "unchecked MSR access" not in done.console
    assert "WARNING" not in done.console.replace("WARNING: See https", "")


def test_the_generic_kernel_comes_to_user_space_with_sme(
    cbit: Cbit, generic_kernel_path: Path, archives: dict[str, Path]
) -> None:
    done = cbit(
        *("run", generic_kernel_path, "--initrd", archives["batch"], "--cpu", COHERENT),
        *("--timeout", 200, "--seed", 5, "--json"),
    )
    assert done.code == 0, done.out + done.err
    assert ACTIVE in done.console
    assert "done: 42" in done.console
    assert done.facts["outcome"] == "shutdown"


@pytest.mark.parametrize(
    "more",
    [
        ["--cmdline", "console=ttyS0"],
        ["--no-smee"],
        ["--cpu", WITHOUT_SME],
        ["--cpu", "epyc-7401p-guest"],
        ["--tsme", "--no-smee"],
    ],
    ids=["not asked for", "off in firmware", "C-bit 0", "no leaf", "TSME alone"],
)
def test_a_kernel_without_sme_says_nothing_of_it(
    cbit: Cbit, real_kernel_path: Path, more: list[str]
) -> None:
    done = cbit(
        *("run", real_kernel_path, "--until", "pid_max: default", "--timeout", 120),
        *("--seed", 5, "--json", *more),
    )
    assert done.code == 0, done.out + done.err
    assert "Memory Encryption Features" not in done.console
    assert done.facts["sme_active"] is False
    if "--tsme" in more:
        # Nobody asked, and everything is encrypted all the same.
        assert done.facts["pages"]["plain"] == 0
    else:
        assert done.facts["pages"]["encrypted"] == 0


def test_sme_under_tsme_is_active_and_every_page_is_encrypted(
    cbit: Cbit, real_kernel_path: Path
) -> None:
    done = cbit(
        *("run", real_kernel_path, "--until", ACTIVE, "--timeout", 120, "--tsme"),
        *("--seed", 5, "--json"),
    )
    assert done.code == 0, done.out + done.err
    assert done.facts["sme_active"] is True
    assert done.facts["pages"]["plain"] == 0


def test_a_shell_answers_what_is_typed(
    real_kernel_path: Path, archives: dict[str, Path]
) -> None:
    # Pipes in place of a terminal: bytes go to COM1 as they come.
    command = [sys.executable, "-m", "cbit", "run", str(real_kernel_path)]
    command += ["--initrd", str(archives["shell"]), "--interactive", "--timeout", "200"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        said = b""
        while not said.endswith(b"/ # "):
            said += shell.stdout.read(1)
        shell.stdin.write(
            b"cat /proc/cpuinfo | grep -o -m1 'sme '; expr 40 + 2; exit\n"
        )
        shell.stdin.flush()
        rest, err = shell.communicate()
    said += rest
    assert shell.returncode == 0, said.decode(errors="replace") + err.decode()
    assert b"sme \r\n42\r\n" in said
    assert b"reboot: Power down" in said
