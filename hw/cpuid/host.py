"""CPUID of the machine that we run on, by the best means that work without root.

Tried in this order: the `cpuid` tool, Linux's /dev/cpu/0/cpuid, and the instruction
itself, executed from a page of machine code. Under a hypervisor all three tell what the
hypervisor shows.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable

from ..errors import CbitError, InputError
from .dump import parse_dump
from .model import CpuModel
from .table import ABSENT, SUBLEAF_COUNTS, CpuidLeaf, CpuidTable, LeafRange

ReadLeaf = Callable[[int, int], CpuidLeaf]
"""Execute CPUID for a leaf and a sub-leaf."""

DEVICE = "/dev/cpu/0/cpuid"
TOOL_TIMEOUT_SECONDS = 10

MAX_LEAVES_PER_RANGE = 0x100
"""Bound for a maximum that makes no sense; real parts stay below 0x30."""

STUB = bytes.fromhex(
    "53"  # push rbx           the ABI wants it back
    "4989d0"  # mov r8, rdx    CPUID overwrites rdx
    "89f8"  # mov eax, edi
    "89f1"  # mov ecx, esi
    "0fa2"  # cpuid
    "418900"  # mov [r8], eax
    "41895804"  # mov [r8 + 4], ebx
    "41894808"  # mov [r8 + 8], ecx
    "4189500c"  # mov [r8 + 12], edx
    "5b"  # pop rbx
    "c3"  # ret
)
"""void stub(uint32 leaf, uint32 subleaf, uint32 out[4]), System V convention."""


class HostUnavailable(CbitError):
    """This machine has no CPUID, or refuses it to us."""


def read_host() -> CpuModel:
    """Return the processor of this machine.

    Raises:
        HostUnavailable: no means works; the message says why each one failed.
    """
    failures = []
    for name, read in (
        ("the cpuid tool", read_with_tool),
        (DEVICE, read_with_device),
        ("the CPUID instruction", read_with_instruction),
    ):
        try:
            return CpuModel("host", name, read())
        except (HostUnavailable, InputError) as error:
            failures.append(f"{name}: {error}")
    raise HostUnavailable(f"cannot read this machine's CPUID: {'; '.join(failures)}")


def read_with_tool() -> CpuidTable:
    """Run `cpuid -1 -r` and parse what it prints."""
    tool = shutil.which("cpuid")
    if tool is None:
        raise HostUnavailable("not installed")
    try:
        run = subprocess.run(
            [tool, "-1", "-r"],
            capture_output=True,
            check=True,
            timeout=TOOL_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HostUnavailable(f"does not run: {error}") from error
    return parse_dump(run.stdout.decode("ascii", "replace"), tool)


def read_with_device() -> CpuidTable:
    """Read Linux's cpuid device; usually root only.

    The file position holds the leaf in its low half, the sub-leaf in its high half.

    Source: Linux 6.1.192 arch/x86/kernel/cpuid.c.
    """
    try:
        device = os.open(DEVICE, os.O_RDONLY)
    except OSError as error:
        raise HostUnavailable(str(error.strerror)) from error

    def read_leaf(leaf: int, subleaf: int) -> CpuidLeaf:
        data = os.pread(device, 16, leaf | subleaf << 32)
        return CpuidLeaf(*struct.unpack("<4I", data))

    try:
        return _walk(read_leaf)
    except (OSError, OverflowError, struct.error) as error:
        raise HostUnavailable(f"cannot be read: {error}") from error
    finally:
        os.close(device)


def read_with_instruction() -> CpuidTable:
    """Execute CPUID from a page that is first written, then made executable."""
    if platform.machine() not in ("x86_64", "amd64") or sys.maxsize < 1 << 32:
        raise HostUnavailable(
            f"this machine is {platform.machine() or 'unknown'}, expected x86_64"
        )
    if os.name != "posix":
        raise HostUnavailable(f"no calling convention for {os.name}, expected posix")
    try:
        return _walk_with_stub()
    except (OSError, ImportError) as error:
        raise HostUnavailable(f"no executable memory: {error}") from error


def _walk_with_stub() -> CpuidTable:
    import ctypes  # only here: it costs start-up time

    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    page.write(STUB)
    first = ctypes.c_char.from_buffer(page)
    address = ctypes.addressof(first)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    try:
        # Written first, executable after: hardened systems refuse a page that is both.
        if libc.mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        out = (ctypes.c_uint32 * 4)()
        stub = ctypes.CFUNCTYPE(
            None, ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32)
        )(address)

        def read_leaf(leaf: int, subleaf: int) -> CpuidLeaf:
            stub(leaf, subleaf, out)
            return CpuidLeaf(*out)

        return _walk(read_leaf)
    finally:
        del first  # the page cannot be closed while an object points into it
        page.close()


def _walk(read_leaf: ReadLeaf) -> CpuidTable:
    """Read every leaf of every range, with the sub-leaves that say something."""
    leaves: dict[tuple[int, int], CpuidLeaf] = {}
    for base in LeafRange:
        last = min(read_leaf(base, 0).eax, base + MAX_LEAVES_PER_RANGE - 1)
        for leaf in range(base, max(base, last) + 1):
            for subleaf in range(SUBLEAF_COUNTS.get(leaf, 1)):
                registers = read_leaf(leaf, subleaf)
                if subleaf == 0 or registers != ABSENT:
                    leaves[leaf, subleaf] = registers
    return CpuidTable(leaves)
