"""`cbit boot` from the shell: its facts, its files, its exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbit.hw.models import model_names
from cbit.tools.cli import run

KEYS = {
    "cpu": str,
    "c_bit": int,
    "phys_bits": int,
    "reduction": int,
    "sme": {
        "supported": bool,
        "enabled": bool,
        "active": bool,
        "transparent": bool,
        "reason": str,
    },
    "cr3": "hex",
    "kernel": {
        "start": "hex",
        "end": "hex",
        "sha256": "digest",
        "sha256_through_c1": "digest",
        "sha256_dram": "digest",
        "dram_equals_plain": bool,
    },
    "initrd": {
        "start": "hex",
        "end": "hex",
        "sha256": "digest",
        "sha256_through_c1": "digest",
        "sha256_dram": "digest",
        "dram_equals_plain": bool,
    },
    "workarea": {"start": "hex", "end": "hex", "pgtable_pages": int},
    "pages": {"encrypted": int, "plain": int},
    "hazards": int,
    "seconds": float,
}
"""What --json prints, no more and no less; "hex" is a string 0x..., in any width."""

ABSENT_WHEN_INACTIVE = {"workarea", "sha256_through_c1"}
MIB = 1 << 20
SMALL = ("--ram", "64M")


@pytest.fixture
def initrd(tmp_path: Path) -> Path:
    path = tmp_path / "initrd"
    path.write_bytes(os.urandom(3 * MIB + 77))
    return path


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run(["boot", *arguments]) == code
    captured = capsys.readouterr()
    if not code:
        assert captured.err == ""
    return captured.out


def facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found = json.loads(output(capsys, *SMALL, "--json", *arguments))
    assert isinstance(found, dict)
    return found


def assert_shape(value: Any, shape: Any, name: str, *, active: bool) -> None:
    if name in ABSENT_WHEN_INACTIVE and not active:
        assert value is None, name
    elif isinstance(shape, dict):
        assert list(value) == list(shape), name
        for key, inner in shape.items():
            assert_shape(value[key], inner, key, active=active)
    elif shape == "hex":
        assert value == hex(int(value, 16)), name
    elif shape == "digest":
        assert len(bytes.fromhex(value)) == 32, name
    else:
        assert type(value) is shape, name


# --json


@pytest.mark.parametrize("line", ["mem_encrypt=on", "quiet"])
def test_the_object_has_exactly_these_keys_in_this_order(
    line: str, initrd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, "--cmdline", line, "--initrd", str(initrd))
    assert_shape(found, KEYS, "", active=line != "quiet")
    found = facts(capsys, "--cmdline", line)
    assert found["initrd"] is None


def test_the_facts_of_an_active_boot(
    initrd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, "--cpu", "rome", "--initrd", str(initrd))
    assert found["cpu"] == "epyc-7742"
    assert (found["c_bit"], found["phys_bits"], found["reduction"]) == (47, 48, 5)
    assert found["sme"] == {
        "supported": True,
        "enabled": True,
        "active": True,
        "transparent": False,
        "reason": "mem_encrypt=on",
    }
    assert int(found["cr3"], 16) >> 47 == 1
    kernel, disk = found["kernel"], found["initrd"]
    assert (kernel["start"], kernel["end"]) == ("0x1000000", "0x1600000")
    assert kernel["sha256"] == kernel["sha256_through_c1"] != kernel["sha256_dram"]
    assert not kernel["dram_equals_plain"]
    padded = initrd.read_bytes() + bytes(4096 - 77)
    assert disk["sha256"] == hashlib.sha256(padded).hexdigest()
    assert disk["sha256"] == disk["sha256_through_c1"] != disk["sha256_dram"]
    assert (disk["start"], disk["end"]) == (hex(64 * MIB - len(padded)), hex(64 * MIB))
    assert found["workarea"] == {
        "start": "0x1600000",
        "end": "0x1a00000",
        "pgtable_pages": 41,
    }
    # All of kernel and initrd but .bss..decrypted, which is written plain at the end.
    encrypted = (0x60_0000 - 2 * MIB + len(padded)) // 4096
    assert found["pages"]["encrypted"] == encrypted
    assert found["hazards"] == 0
    assert 0 < found["seconds"] < 60


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--cmdline", "quiet"], "command line has no mem_encrypt=on"),
        (
            ["--cmdline", "mem_encrypt=off"],
            'command line says mem_encrypt=off, only "on" counts',
        ),
        (["--no-smee"], "SYSCFG[23] is 0: firmware did not enable SME"),
        (
            ["--cpu", "no-leaf"],
            "CPUID 8000_0000 ends at 0x8000001e: no leaf 8000_001F, no SME",
        ),
    ],
)
def test_the_facts_of_an_inactive_boot(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, *arguments)
    assert found["sme"]["active"] is False
    assert found["sme"]["reason"] == reason
    assert found["workarea"] is None
    kernel = found["kernel"]
    assert kernel["sha256"] == kernel["sha256_dram"]
    assert kernel["sha256_through_c1"] is None
    assert kernel["dram_equals_plain"] is True
    assert found["pages"]["encrypted"] == 0
    assert found["cr3"] == "0x1180000"


SUPPORTED = {
    "epyc-7401p-guest": (False, None, 48, None),
    "epyc-7551p": (True, 47, 48, 5),
    "epyc-7742": (True, 47, 48, 5),
    "epyc-7763": (True, 51, 48, 5),
    "epyc-9124": (True, 51, 52, 6),
    "epyc-9654": (True, 51, 52, 6),
    "epyc-9655": (True, 51, 52, 6),
    "ryzen-1800x": (True, 47, 48, 5),
    "ryzen-4800h": (True, 47, 48, 4),
    "ryzen-5950x": (True, 51, 48, 5),
    "ryzen-6800hs": (True, 0, 48, 0),
    "ryzen-7950x": (True, 51, 48, 2),
}
"""SME bit, C-bit, width, reduction, from leaves 8000_0008 and 8000_001F of [ILX]."""


@pytest.mark.req("PT-11", "BZ-2", "BZ-6")
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_model_says_what_it_has(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuple(SUPPORTED) == model_names()
    found = facts(capsys, "--cpu", name.upper())
    assert (
        found["sme"]["supported"],
        found["c_bit"],
        found["phys_bits"],
        found["reduction"],
    ) == SUPPORTED[name]
    usable = bool(found["c_bit"])  # firmware cannot enable a C-bit of 0
    assert found["sme"]["active"] == found["sme"]["enabled"] == usable


@pytest.mark.req("WP-28")
def test_transparent_encryption_leaves_no_plain_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for line in ("quiet", "mem_encrypt=on"):
        found = facts(capsys, "--tsme", "--cmdline", line)
        assert found["sme"]["transparent"] is True
        assert found["pages"]["plain"] == 0
        assert found["kernel"]["dram_equals_plain"] is False


def test_five_levels(capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, "--cpu", "genoa", "--la57")
    assert found["sme"]["active"]
    assert found["workarea"]["pgtable_pages"] == 34


@pytest.mark.parametrize("caches", ["coherent", "incoherent", "model"])
def test_both_kinds_of_caches_come_to_the_same_dram(
    caches: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = facts(capsys, "--caches", caches, "--seed", "5")
    expected = facts(capsys, "--caches", "coherent", "--seed", "5")
    assert found["kernel"] == expected["kernel"]
    assert found["hazards"] == 0
    text = output(capsys, *SMALL, "--caches", caches)
    shown = "caches coherent" if caches == "coherent" else "caches not coherent"
    assert shown in text


def test_a_processor_from_a_dump_has_its_files_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "my-board.txt"
    dump.write_text(
        "CPUID 00000000: 00000010-68747541-444D4163-69746E65\n"
        "CPUID 00000001: 00830F10-00800800-7ED8320B-178BFBFF\n"
        "CPUID 80000000: 8000001F-68747541-444D4163-69746E65\n"
        "CPUID 80000001: 00830F10-40000000-75C237FF-2FD3FBFF\n"
        "CPUID 80000008: 00003030-010EB757-0000707F-00010007\n"
        "CPUID 8000001F: 00000001-00000173-00000000-00000000\n"
    )
    found = facts(capsys, "--cpu", str(dump))
    assert (found["cpu"], found["c_bit"], found["reduction"]) == ("my-board", 51, 5)
    assert found["sme"]["active"]


def test_ram_above_4_gib_and_sizes_in_any_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Memory: 65535 MiB" in output(capsys, "--ram", "64G")
    for size in ("256m", "0x1000_0000", "268435456", "256 MiB"):
        assert "Memory: 255 MiB" in output(capsys, "--ram", size)


# The text


def test_the_text_is_a_boot_log_and_a_summary(
    initrd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, *SMALL, "--initrd", str(initrd))
    log, _, summary = text.partition("\n\n")
    lines = log.splitlines()
    assert all(line.startswith("[    0.000000] ") for line in lines)
    said = [line.removeprefix("[    0.000000] ") for line in lines]
    assert said[0] == "Linux version 6.1.0-cbit"
    assert said[1] == "CPU0: AMD EPYC 7742 64-Core Processor [epyc-7742]"
    assert said[-1] == "Memory Encryption Features active: AMD SME"
    assert "kernel in DRAM: ciphertext" in summary
    assert "initrd in DRAM: ciphertext" in summary
    assert summary.splitlines()[-1].endswith("hazards: 0")
    assert "\x1b" not in text
    assert text.isascii()


def test_the_text_of_an_inactive_boot_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = output(capsys, *SMALL, "--no-smee")
    assert "SME: not active: SYSCFG[23] is 0: firmware did not enable SME" in text
    assert "enabled by firmware: SYSCFG[23] is 0" in text
    assert "kernel in DRAM: plaintext" in text
    assert "through C=1" not in text
    assert "Memory Encryption Features" not in text


# Exit codes


@pytest.mark.parametrize(
    ("arguments", "expect", "code"),
    [
        ([], "active", 0),
        ([], "inactive", 1),
        (["--no-smee"], "inactive", 0),
        (["--no-smee"], "active", 1),
        (["--cmdline", "mem_encrypt=only"], "active", 1),
    ],
)
def test_expect_decides_the_exit_code(
    arguments: list[str], expect: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["boot", *SMALL, "--json", *arguments, "--expect", expect]) == code
    captured = capsys.readouterr()
    found = json.loads(captured.out)  # the facts are printed either way
    if code:
        opposite = "inactive" if expect == "active" else "active"
        reason = " ".join(found["sme"]["reason"].split())
        assert (
            captured.err == f"Error: --expect {expect}: SME is {opposite}: {reason}\n"
        )
    else:
        assert captured.err == ""


def test_the_files_are_written_although_the_expectation_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dram, trace = tmp_path / "dram", tmp_path / "trace"
    files = ("--dram-out", str(dram), "--trace", str(trace))
    output(capsys, *SMALL, *files, "--expect", "inactive", code=1)
    assert dram.stat().st_size == 64 * MIB
    assert trace.read_bytes()


# --seed


def test_the_same_seed_gives_the_same_facts_and_another_seed_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, again, other = (
        facts(capsys, "--caches", "incoherent", "--seed", seed)
        for seed in ("7", "0x7", "8")
    )
    for found in (first, again, other):
        del found["seconds"]
    assert first == again
    assert first["kernel"]["sha256_dram"] != other["kernel"]["sha256_dram"]
    assert first["kernel"]["sha256"] != other["kernel"]["sha256"]  # another kernel


def test_without_a_seed_the_key_is_new_and_the_kernel_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, other = facts(capsys), facts(capsys)
    assert first["kernel"]["sha256"] == other["kernel"]["sha256"]
    assert first["kernel"]["sha256_dram"] != other["kernel"]["sha256_dram"]


# Files


@pytest.mark.req("WP-1", "LB-T3")
def test_the_dump_agrees_with_the_facts_and_is_sparse(
    tmp_path: Path, initrd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dram"
    found = json.loads(
        output(
            capsys,
            *("--ram", "8G", "--json", "--initrd", str(initrd)),
            *("--dram-out", str(path)),
        )
    )
    status = path.stat()
    assert status.st_size == 9 << 30  # the PCI hole below 4 GiB is part of the file
    assert status.st_blocks * 512 < 64 * MIB
    with path.open("rb") as dump:
        for part in (found["kernel"], found["initrd"]):
            start, end = int(part["start"], 16), int(part["end"], 16)
            dump.seek(start)
            cells = dump.read(end - start)
            assert hashlib.sha256(cells).hexdigest() == part["sha256_dram"]
        dump.seek(0x9_1000)
        assert dump.read(15) == b"mem_encrypt=on\0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dram", "initrd"]


def test_an_inactive_dump_shows_the_secrets_and_an_active_one_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, shown in (("quiet", True), ("mem_encrypt=on", False)):
        path = tmp_path / "dram"
        output(capsys, *SMALL, "--cmdline", line, "--dram-out", str(path))
        assert (b"nobody has set the C-bit" in path.read_bytes()) == shown


def test_the_trace_is_one_json_object_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for _ in range(2):
        path = tmp_path / "trace"
        found = facts(
            capsys, "--trace", str(path), "--seed", "3", "--caches", "incoherent"
        )
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    events = [json.loads(line) for line in texts[0].splitlines()]
    assert [event["event"] for event in events] == list(range(len(events)))
    kinds = {event["kind"] for event in events}
    assert {"cpuid", "rdmsr", "wrmsr", "cr", "flush", "tag-change"} <= kinds
    assert "hazard" not in kinds
    leaf = next(e for e in events if e["kind"] == "cpuid" and e["leaf"] == "0x8000001f")
    assert leaf["ebx"] == "0x16f"
    assert [e["value"] for e in events if e.get("register") == "cr3"][-1] == found[
        "cr3"
    ]


def test_files_that_are_there_are_replaced_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in ("--dram-out", "--trace"):
        path = tmp_path / "file"
        path.write_bytes(b"old" * MIB * 30)
        output(capsys, *SMALL, option, str(path))
        assert not path.read_bytes().startswith(b"old")
        assert b"oldold" not in path.read_bytes()


# A real kernel, and the installed command


@pytest.mark.req("LB-T3", "LB-56")
def test_a_real_kernel(
    real_kernel_path: Path,
    initrd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dram = tmp_path / "dram"
    arguments = ("--kernel", str(real_kernel_path), "--initrd", str(initrd))
    text = output(
        capsys, "--ram", "256M", *arguments, "--json", "--dram-out", str(dram)
    )
    found = json.loads(text)
    assert_shape(found, KEYS, "", active=True)
    cells = dram.read_bytes()
    for part in (found["kernel"], found["initrd"]):
        start, end = int(part["start"], 16), int(part["end"], 16)
        assert hashlib.sha256(cells[start:end]).hexdigest() == part["sha256_dram"]
        assert part["sha256"] == part["sha256_through_c1"]
    assert b"Linux version 6" not in cells
    assert "Linux version 6.1" in output(capsys, "--ram", "256M", *arguments)


def test_the_installed_command_prints_the_same_facts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cbit", "boot", *SMALL, "--json", "--seed", "7"],
        capture_output=True,
        check=True,
        text=True,
    )
    there, here = json.loads(done.stdout), facts(capsys, "--seed", "7")
    del there["seconds"], here["seconds"]
    assert there == here
    assert done.stderr == ""
