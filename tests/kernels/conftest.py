"""Real kernels on the native core, through the command line as a user has it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from ..initramfs import INTERACTIVE, batch, initramfs

COHERENT, INCOHERENT, FIVE_LEVELS = "epyc-7763", "epyc-7742", "epyc-9654"
WITHOUT_SME = "ryzen-6800hs"
"""Claims SME in CPUID and has C-bit 0: firmware cannot switch it on."""
ACTIVE = "Memory Encryption Features active: AMD SME"
TIMEOUT = 240


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.out)
        return facts

    @property
    def console(self) -> str:
        return str(self.facts["console"])


Cbit = Callable[..., Done]


@pytest.fixture(scope="session")
def cbit() -> Cbit:
    """Run `cbit` with arguments; nothing is typed at it."""

    def run(*arguments: object) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "cbit", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
        )
        out, err = (
            text.decode(errors="replace") for text in (done.stdout, done.stderr)
        )
        return Done(done.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def archives(
    busybox_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Initial RAM disks: "batch" shows cpuinfo and ends, "shell" waits for input."""
    folder = tmp_path_factory.mktemp("initramfs")
    busybox = busybox_path.read_bytes()
    scripts = {
        "batch": batch(
            [
                "grep -m1 -o ' sme ' /proc/cpuinfo && echo flag sme",
                "echo done: $((6*7))",
            ]
        ),
        "shell": INTERACTIVE,
    }
    paths = {}
    for name, script in scripts.items():
        paths[name] = folder / name
        paths[name].write_bytes(initramfs(busybox, script))
    return paths
