"""What a whole `cbit boot` costs, against reading, hashing and enciphering alone."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cbit.boot.image import load_image

from .conftest import Ratios

BARE = """
import hashlib, sys
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
data = np.fromfile(sys.argv[1], np.uint8)
hashlib.sha256(data).hexdigest()
out = np.empty(data.size + 16, np.uint8)
Cipher(AES(bytes(16)), ECB()).encryptor().update_into(data, out)
"""


@pytest.fixture(scope="module")
def vmlinux(real_kernel_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real kernel's segments as one ELF: nothing left to decompress."""
    image = load_image(real_kernel_path)
    path = tmp_path_factory.mktemp("bench") / "vmlinux"
    # Segments are views of the decompressed ELF; their common buffer is that file.
    path.write_bytes(bytes(image.segments[0].data.obj))
    assert load_image(path).layout == image.layout
    return path


# As installed: with compiled modules, wherever the tree may be written.
ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
    "PYTHONPYCACHEPREFIX": str(Path(__file__).parents[2] / "build" / "bench-pycache"),
}


def run(*arguments: str) -> float:
    """Run a Python process; return its seconds."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        check=True,
        env=ENVIRONMENT,
    )
    return time.perf_counter() - start


def boot(vmlinux: Path, *more: str) -> float:
    """Boot in a process of its own; return its seconds."""
    return run("-m", "cbit", "boot", "--json", "--kernel", str(vmlinux), *more)


def peak_resident(code: str) -> int:
    """Run code in a process of its own; return its peak resident bytes."""
    lines = (code, "print(open('/proc/self/status').read())")
    status = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=True,
        env=ENVIRONMENT,
    ).stdout
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) << 10


def boot_resident(vmlinux: Path, *more: str) -> int:
    """Boot in a process of its own; return its peak resident bytes."""
    command = ["boot", "--json", "--kernel", str(vmlinux), *more]
    return peak_resident(f"import cbit.tools.cli as c; assert c.run({command}) == 0")


def test_whole_process_against_bare_libraries(
    benchmark: Any, ratios: Ratios, vmlinux: Path
) -> None:
    benchmark.pedantic(lambda: boot(vmlinux), rounds=2)
    rounds = [(boot(vmlinux), run("-c", BARE, str(vmlinux))) for _ in range(5)]
    ours, bare = (min(times) for times in zip(*rounds, strict=True))
    what = "cbit boot, real kernel: time / numpy reads, SHA-256, AES-ECB (processes)"
    assert ratios.note(what, ours / bare, "< 2.5") < 2.5


def test_resident_memory_follows_what_is_touched(
    ratios: Ratios, vmlinux: Path, benchmark: Any
) -> None:
    image = load_image(vmlinux)
    layout = image.layout
    touched = layout.workarea.end - layout.kernel_start
    resident = benchmark.pedantic(lambda: boot_resident(vmlinux), rounds=1)
    empty = peak_resident("import cbit.tools.boot")
    what = "cbit boot, real kernel: resident bytes / RAM bytes touched"
    assert ratios.note(what, (resident - empty) / touched, "< 3") < 3
    ratios.note("  and with the interpreter and its libraries", resident / touched)


def test_cost_does_not_follow_ram(
    benchmark: Any, ratios: Ratios, vmlinux: Path
) -> None:
    benchmark.pedantic(lambda: boot(vmlinux, "--ram", "64G"), rounds=1)
    rounds = [
        (boot(vmlinux, "--ram", "64G"), boot(vmlinux, "--ram", "256M"))
        for _ in range(4)
    ]
    large, small = (min(times) for times in zip(*rounds, strict=True))
    what = "cbit boot, 64 GiB of RAM: time / the same with 256 MiB"
    assert ratios.note(what, large / small, "<= 1.25") <= 1.25
    memory = boot_resident(vmlinux, "--ram", "64G")
    memory_small = boot_resident(vmlinux, "--ram", "256M")
    what = "  and its resident memory"
    assert ratios.note(what, memory / memory_small, "<= 1.1") <= 1.1
