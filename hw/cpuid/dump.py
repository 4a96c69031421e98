"""Reading raw CPUID dumps: InstLatx64 text files and the output of `cpuid -r`.

    CPUID 8000001D: 00004121-01C0003F-0000003F-00000000 [SL 00]     InstLatx64
       0x8000001d 0x00: eax=0x00004121 ebx=0x01c0003f ecx=...       cpuid -r

Both list one logical CPU after another; the first one counts. CPUs may differ, even
where they should not: one Threadripper dump has another 8000_001F EDX on every CPU.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from .table import CpuidLeaf, CpuidTable

MAX_DUMP_BYTES = 16 << 20
"""The longest InstLatx64 dumps have hundreds of CPUs and are below 8 MiB."""

REQUIRED_LEAVES = (0x0000_0000, 0x0000_0001, 0x8000_0000, 0x8000_0008)
"""Without these nothing can be said about memory encryption."""

_HEX8 = "([0-9a-f]{8})"
_INSTLATX64 = re.compile(
    rf"cpuid {_HEX8}: {_HEX8}-{_HEX8}-{_HEX8}-{_HEX8}"
    r"(?: +\[sl ([0-9a-f]{2})\])?(?: +\[.*\])?",
    re.IGNORECASE,
)
_CPUID_R = re.compile(
    rf"0x{_HEX8} 0x([0-9a-f]{{2,8}}): "
    rf"eax=0x{_HEX8} ebx=0x{_HEX8} ecx=0x{_HEX8} edx=0x{_HEX8}",
    re.IGNORECASE,
)
_LEAF_START = re.compile(r"cpuid [0-9a-f]+ *(?::|$)|0x", re.IGNORECASE)
_CPU_HEADER = re.compile(r"\bCPU ?#? ?\d+\b|^CPU:$")
_COMMENT = re.compile(r"# *(\w+): *(.*)")

_EXPECTED = (
    "expected `CPUID 8000001F: EAX-EBX-ECX-EDX` (InstLatx64) or "
    "`0x8000001f 0x00: eax=0x... ebx=0x... ecx=0x... edx=0x...` (cpuid -r)"
)

Row = tuple[int, int | None, CpuidLeaf]
"""Leaf, sub-leaf if the line names one, registers."""


def parse_dump(text: str, source: str) -> CpuidTable:
    """Return the table of the first logical CPU in a raw dump.

    Old InstLatx64 dumps repeat a leaf without naming the sub-leaf; repeats then count
    up from 0. Of two lines for one sub-leaf the first counts.

    Args:
        text: the whole dump, in either format. Lines of other kinds are skipped.
        source: what error messages call the dump.

    Raises:
        InputError: no leaf at all, a line cut short, or a leaf that is needed is
            missing; one line that says which.

    Source: the dumps in InstLatx64's repository; `cpuid -r` of Todd Allen's tool.
    """
    if not text.strip():
        raise InputError(f"{source}: empty, {_EXPECTED}")
    if "\0" in text:
        raise InputError(f"{source}: a binary file, {_EXPECTED}")
    leaves: dict[tuple[int, int], CpuidLeaf] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        row = _parse_line(line, f"{source}: line {number}")
        if row is None:
            if leaves and _CPU_HEADER.search(line):
                break
            continue
        leaf, subleaf, registers = row
        if leaf == 0 and (0, 0) in leaves:
            break  # the second CPU of a dump without headings
        if subleaf is None:
            subleaf = sum(1 for known, _ in leaves if known == leaf)
        leaves.setdefault((leaf, subleaf), registers)
    if not leaves:
        raise InputError(f"{source}: no CPUID leaf found, {_EXPECTED}")
    table = CpuidTable(leaves)
    _check_complete(table, source)
    return table


def read_dump_text(path: Path | str) -> str:
    """Return the text of a dump file.

    Raises:
        InputError: the file is binary, or far too long for a dump.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_DUMP_BYTES + 1)
    if len(data) > MAX_DUMP_BYTES:
        raise InputError(
            f"{path}: longer than {MAX_DUMP_BYTES:#x} bytes, expected a CPUID dump"
        )
    if b"\0" in data:
        raise InputError(f"{path}: a binary file, {_EXPECTED}")
    return data.decode("utf-8-sig", errors="replace")


def dump_header(text: str) -> dict[str, str]:
    """Return the `# key: value` comment lines at the top of a model file."""
    header: dict[str, str] = {}
    for line in text.splitlines():
        comment = _COMMENT.fullmatch(line.strip())
        if comment is None:
            break
        header[comment[1]] = comment[2]
    return header


def _parse_line(line: str, where: str) -> Row | None:
    """Return the row on a line, None if the line is no leaf, or raise InputError."""
    if found := _INSTLATX64.fullmatch(line):
        leaf, *registers, subleaf = found.groups()
    elif found := _CPUID_R.fullmatch(line):
        leaf, subleaf, *registers = found.groups()
    elif _LEAF_START.match(line) or (line and line in ("0", "C", "CP", "CPU", "CPUI")):
        shown = line if len(line) <= 60 else line[:57] + "..."
        raise InputError(f"{where}: cut or damaged, {_EXPECTED}, got {shown!r}")
    else:
        return None
    words = (int(word, 16) for word in registers)
    return int(leaf, 16), int(subleaf, 16) if subleaf else None, CpuidLeaf(*words)


def _check_complete(table: CpuidTable, source: str) -> None:
    for leaf in REQUIRED_LEAVES:
        if not table.has(leaf):
            raise InputError(
                f"{source}: CPUID leaf {leaf:#010x} is missing; "
                "expected a full dump of one CPU, as `cpuid -1 -r` prints it"
            )
    maximum = table.leaf(0x8000_0000).eax
    if maximum >= 0x8000_001F and not table.has(0x8000_001F):
        raise InputError(
            f"{source}: CPUID leaf 0x8000001f is missing, although the highest "
            f"extended leaf is {maximum:#010x}; is the file cut short?"
        )
