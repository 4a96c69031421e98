"""examples/sme-hello: compiled here, run by `cbit run --elf`, and its planted bugs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "sme-hello"
CBIT = (sys.executable, "-m", "cbit")
COMPILER = os.environ.get("CC", "cc")
SECRET = b"attack at dawn, bring the ladder"
PLAIN = 0x60_0000
INCOHERENT, COHERENT = "epyc-7742", "epyc-7763"
TIMEOUT = 120


@dataclass(frozen=True)
class Result:
    """What one `cbit run --json` said.

    Attributes:
        facts: its object.
        status: its exit code.
        errors: its stderr.
    """

    facts: dict[str, Any]
    status: int
    errors: str

    @property
    def console(self) -> str:
        return str(self.facts["console"])

    def read_through(self, c_bit: int) -> bytes:
        """Return the bytes that the program printed for a mapping."""
        (line,) = (
            line
            for line in self.console.splitlines()
            if line.startswith(f"through C={c_bit}: ")
        )
        return bytes.fromhex(line.split()[2])


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", f"CC={COMPILER} -Werror", f"CBIT={' '.join(CBIT)}", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with its three programs built."""
    if shutil.which(COMPILER) is None:
        pytest.fail(
            f"no C compiler {COMPILER} here: apt-get install gcc, or set CC to one "
            "for x86-64"
        )
    copy = tmp_path_factory.mktemp("examples") / "sme-hello"
    shutil.copytree(EXAMPLE, copy, ignore=shutil.ignore_patterns("*.elf"))
    for target in ("hello.elf", "buggy-1.elf", "buggy-2.elf"):
        built = make(copy, target, f"PLANTED_BUG={target[6]}")
        assert built.returncode == 0, built.stderr
        assert built.stderr == ""
    return copy


def run(program: Path, *options: str) -> Result:
    done = subprocess.run(
        [*CBIT, "run", "--elf", str(program), "--pass-cbit", "--json", *options],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.stdout, done.stderr
    return Result(json.loads(done.stdout), done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("model", "c_bit"), [(INCOHERENT, 47), (COHERENT, 51), ("epyc-9654", 51)]
)
def test_the_secret_is_ciphertext_in_dram(
    folder: Path, tmp_path: Path, model: str, c_bit: int
) -> None:
    dram = tmp_path / "dram"
    found = run(folder / "hello.elf", "--cpu", model, "--dram-out", str(dram))
    assert f"SME: enabled, C-bit {c_bit:#x}, as passed\n" in found.console
    assert found.read_through(1) == SECRET
    with dram.open("rb") as cells:
        cells.seek(PLAIN)
        assert found.read_through(0) == cells.read(len(SECRET))
    assert len(set(found.read_through(0))) > 16  # no zeros, no text
    assert found.facts["pages"]["encrypted"] == 1
    assert found.facts["hazards"] == 0
    assert (found.facts["outcome"], found.status) == ("shutdown", 0)
    assert found.facts["reason"] == "exit code 16"


def test_the_same_seed_gives_the_same_run(folder: Path) -> None:
    first, second, other = (
        run(folder / "hello.elf", "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first.console == second.console != other.console


@pytest.mark.parametrize("options", [("--no-smee",), ("--cpu", "rembrandt")])
def test_it_says_where_sme_is_not_usable(
    folder: Path, options: tuple[str, ...]
) -> None:
    found = run(folder / "hello.elf", *options)
    assert found.console == "SME: not usable here\n"
    assert found.facts["reason"] == "exit code 17"


def test_without_pass_cbit_it_finds_the_c_bit_itself(folder: Path) -> None:
    program = folder / "hello.elf"
    for entry in ("_start", _address_of_start(program)):
        done = subprocess.run(
            [*CBIT, "run", "--elf", str(program), "--entry", entry],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0
        assert "SME: enabled, C-bit 0x2f\npage tables: ours\n" in done.stdout


@pytest.mark.parametrize("model", [INCOHERENT, COHERENT])
def test_tables_stored_plain_and_walked_through_the_key_end_in_a_triple_fault(
    folder: Path, model: str
) -> None:
    found = run(folder / "buggy-1.elf", "--cpu", model)
    assert (found.facts["outcome"], found.status) == ("fault", 1)
    assert found.facts["reason"].startswith("triple fault: vector 14 at rip 0x200")
    address = found.facts["reason"].split("rip ")[1].split()[0]
    assert "(#PF(0x" in found.facts["reason"]  # what the noise gave differs by key
    assert any(f"CR2 {address} " in line for line in found.facts["report"])
    assert "as passed\n" in found.console
    assert "page tables" not in found.console
    assert found.errors.startswith("Error: fault: triple fault")


def test_a_missing_flush_is_a_hazard_on_an_incoherent_part(folder: Path) -> None:
    program = folder / "buggy-2.elf"
    found = run(program, "--cpu", INCOHERENT)
    assert found.facts["hazards"] > 0
    assert found.read_through(0) == bytes(len(SECRET))  # what DRAM had before
    assert found.facts["outcome"] == "shutdown"
    stopped = run(program, "--cpu", INCOHERENT, "--hazards", "raise")
    assert (stopped.facts["outcome"], stopped.status) == ("fault", 1)
    reason = "hazard dirty-alias: load through C=0 at [0x600000, "
    assert stopped.facts["reason"].startswith(reason)


def test_a_coherent_part_forgives_the_missing_flush(folder: Path) -> None:
    found = run(folder / "buggy-2.elf", "--cpu", COHERENT, "--seed", "1")
    right = run(folder / "hello.elf", "--cpu", COHERENT, "--seed", "1")
    assert found.facts["hazards"] == 0
    assert found.console == right.console


def test_make_runs_the_program_and_the_bugs(folder: Path) -> None:
    good = make(folder, "run", "RUN_ARGS=--cpu epyc-9654")
    assert good.returncode == 0, good.stderr
    assert "C-bit 0x33, as passed" in good.stdout
    bad = make(folder, "run-buggy")
    assert bad.returncode != 0
    assert re.search(r"^RIP 0x0000000000200... \w+\+0x", bad.stdout, re.MULTILINE)
    second = make(folder, "run-buggy", "PLANTED_BUG=2")
    assert second.returncode == 0, second.stderr
    assert "hazards: 1" in second.stdout


def _address_of_start(program: Path) -> str:
    """Return e_entry as the file has it."""
    return hex(int.from_bytes(program.read_bytes()[24:32], "little"))
