"""What `cbit run` costs, against QEMU's TCG on the same machine without SME.

Whole processes, from their start to the same words of the same kernel's log. QEMU
comes from the system (`apt-get install qemu-system-x86`); without it these fail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ..initramfs import INTERACTIVE, initramfs
from .conftest import Ratios
from .test_bench_boot import ENVIRONMENT

LINE, PROMPT = b"pid_max: default", b"/ # "
COMMAND_LINE = "console=ttyS0 mem_encrypt=on"
RAM_MIB = 512
ROUNDS = 5
COHERENT, INCOHERENT = "epyc-7763", "epyc-7742"


@pytest.fixture(scope="module")
def qemu() -> str:
    path = shutil.which("qemu-system-x86_64")
    if path is None:
        pytest.fail("no qemu-system-x86_64 here: apt-get install qemu-system-x86")
    return path


@pytest.fixture(scope="module")
def shell(busybox_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "initramfs"
    path.write_bytes(initramfs(busybox_path.read_bytes(), INTERACTIVE))
    return path


def seconds_until(command: list[str], words: bytes) -> float:
    """Start a command and stop it at words of its output; return the seconds."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        said = b""
        while words not in said:
            data = os.read(process.stdout.fileno(), 1 << 16)
            assert data, f"{command[0]} ended early: {said[-500:]!r}"
            said = said[-200:] + data
        taken = time.perf_counter() - start
        process.kill()
    return taken


def cbit(kernel: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "cbit", "run", str(kernel)]
    return [*command, "--ram", f"{RAM_MIB}M", "--cmdline", COMMAND_LINE, *more]


def emulator(qemu: str, kernel: Path, *more: str) -> list[str]:
    return [
        *(qemu, "-accel", "tcg", "-cpu", "EPYC", "-m", str(RAM_MIB), "-nographic"),
        *("-no-reboot", "-kernel", str(kernel), "-append", COMMAND_LINE, *more),
    ]


@pytest.mark.parametrize(("model", "limit"), [(COHERENT, 1.5), (INCOHERENT, 2.5)])
def test_to_the_line(
    benchmark: Any,
    ratios: Ratios,
    qemu: str,
    real_kernel_path: Path,
    model: str,
    limit: float,
) -> None:
    ours = cbit(real_kernel_path, "--cpu", model)
    theirs = emulator(qemu, real_kernel_path)
    benchmark.pedantic(lambda: seconds_until(ours, LINE), rounds=1)
    rounds = [
        (seconds_until(ours, LINE), seconds_until(theirs, LINE)) for _ in range(ROUNDS)
    ]
    mine, other = (min(times) for times in zip(*rounds, strict=True))
    what = f"cbit run to the SME line, {model}: time / QEMU TCG without SME"
    assert ratios.note(what, mine / other, f"<= {limit}") <= limit


def test_to_a_shell(
    benchmark: Any, ratios: Ratios, qemu: str, real_kernel_path: Path, shell: Path
) -> None:
    ours = cbit(real_kernel_path, "--cpu", COHERENT, "--initrd", str(shell))
    theirs = emulator(qemu, real_kernel_path, "-initrd", str(shell))
    benchmark.pedantic(lambda: seconds_until(ours, PROMPT), rounds=1)
    rounds = [
        (seconds_until(ours, PROMPT), seconds_until(theirs, PROMPT)) for _ in range(3)
    ]
    mine, other = (min(times) for times in zip(*rounds, strict=True))
    what = "cbit run to a shell prompt: time / QEMU TCG"
    assert ratios.note(what, mine / other, "<= 2.5") <= 2.5


def test_encryption_in_place(
    benchmark: Any, ratios: Ratios, real_kernel_path: Path
) -> None:
    """From the copy routine's CR3 to the next one, against the reference's own."""
    from cbit.boot.image import load_image
    from cbit.tools.native_diff import DiffRequest, time_encryption

    image = load_image(real_kernel_path)
    request = DiffRequest(str(real_kernel_path), cpu=COHERENT)
    benchmark.pedantic(lambda: time_encryption(request, image), rounds=1)
    rounds = [time_encryption(request, image) for _ in range(3)]
    native, reference = (min(times) for times in zip(*rounds, strict=True))
    what = "in-place encryption of the kernel: machine code / the reference"
    assert ratios.note(what, native / reference, "<= 3") <= 3


def test_memory(benchmark: Any, ratios: Ratios, real_kernel_path: Path) -> None:
    code = (
        "import json\n"
        "from cbit.tools.native_run import RunRequest, execute, prepare\n"
        f"run = prepare(RunRequest({str(real_kernel_path)!r}, cpu={COHERENT!r}, seed=1,"
        " until='pid_max'))\n"
        "execute(run)\n"
        "touched = sum(run.machine.dram.count_pages().values()) << 12\n"
        # Not getrusage(): a child's peak begins with its parent's.
        "lines = open('/proc/self/status').read().splitlines()\n"
        "peak = next(l for l in lines if l.startswith('VmHWM:')).split()[1]\n"
        "print(json.dumps([int(peak) << 10, touched]))\n"
    )

    def measure() -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT,
        )
        peak, touched = json.loads(done.stdout)
        return peak, touched

    peak, touched = benchmark.pedantic(measure, rounds=1)
    what = "cbit run: resident bytes / (2.5 * RAM bytes touched + 300 MB)"
    assert ratios.note(what, peak / (2.5 * touched + 300e6), "<= 1") <= 1
