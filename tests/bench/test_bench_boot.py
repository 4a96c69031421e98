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
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
data = open(sys.argv[1], "rb").read()
hashlib.sha256(data).hexdigest()
out = bytearray(len(data) + 16)
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


def run(*arguments: str) -> tuple[float, int]:
    """Run a Python process; return its seconds and peak resident bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def boot(vmlinux: Path, *more: str) -> tuple[float, int]:
    return run("-m", "cbit", "boot", "--json", "--kernel", str(vmlinux), *more)


def test_whole_process_against_bare_libraries(
    benchmark: Any, ratios: Ratios, vmlinux: Path
) -> None:
    benchmark.pedantic(lambda: boot(vmlinux), rounds=2)
    rounds = [(boot(vmlinux)[0], run("-c", BARE, str(vmlinux))[0]) for _ in range(5)]
    ours, bare = (min(times) for times in zip(*rounds, strict=True))
    what = "cbit boot, real kernel: time / read, SHA-256 and AES-ECB, whole processes"
    assert ratios.note(what, ours / bare, "< 2.5") < 2.5


def test_resident_memory_follows_what_is_touched(
    ratios: Ratios, vmlinux: Path, benchmark: Any
) -> None:
    image = load_image(vmlinux)
    layout = image.layout
    touched = layout.workarea.end - layout.kernel_start
    resident = benchmark.pedantic(lambda: boot(vmlinux), rounds=1)[1]
    empty = run("-c", "import numpy, cryptography, click, construct, elftools")[1]
    what = "cbit boot, real kernel: peak resident bytes / bytes touched"
    assert ratios.note(what, resident / touched, "< 3, interpreter included") < 3
    ratios.note("  of which the interpreter and its libraries", empty / touched)


def test_cost_does_not_follow_ram(
    benchmark: Any, ratios: Ratios, vmlinux: Path
) -> None:
    benchmark.pedantic(lambda: boot(vmlinux, "--ram", "64G"), rounds=1)
    pairs = [
        (boot(vmlinux, "--ram", "64G"), boot(vmlinux, "--ram", "256M"))
        for _ in range(3)
    ]
    large = min(pair[0][0] for pair in pairs)
    small = min(pair[1][0] for pair in pairs)
    what = "cbit boot, 64 GiB of RAM: time / the same with 256 MiB"
    assert ratios.note(what, large / small, "<= 1.25") <= 1.25
    memory = pairs[0][0][1] / pairs[0][1][1]
    assert ratios.note("  and its resident memory", memory, "<= 1.1") <= 1.1
