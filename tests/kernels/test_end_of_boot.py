"""What a probe finds after boot, snapshots of a running kernel, repeatability."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cbit.tools.native_run import NativeRun, RunRequest, execute, prepare

from .conftest import ACTIVE, COHERENT, Cbit

READABLE = re.compile(rb"[\x20-\x7e]{24,}")
"""A run of printable bytes that ciphertext does not have."""


@pytest.fixture(scope="module")
def booted(real_kernel_path: Path, archives: dict[str, Path]) -> NativeRun:
    run = prepare(
        RunRequest(
            kernel=str(real_kernel_path),
            initrd=str(archives["batch"]),
            cpu=COHERENT,
            cmdline="console=ttyS0 mem_encrypt=on nokaslr",
            until="done: 42",
            timeout=200,
            seed=3,
        )
    )
    execute(run)
    assert run.outcome == "matched", run.report
    return run


def test_no_kernel_string_is_readable_where_linux_encrypts(booted: NativeRun) -> None:
    assert booted.entry is not None
    layout = booted.entry.layout
    assert layout is not None
    dram = booted.machine.dram
    plain_pages = dram.written_by == 1
    # Linux leaves plain: .bss..decrypted (its tail is given back), and nothing else of
    # the image, apart from what it freed (init sections, gaps) and others reuse.
    shared = layout.bss_decrypted
    image = range(layout.text_start >> 12, layout.bss.end >> 12)
    plain = [page for page in image if plain_pages[page]]
    assert all(shared.start >> 12 <= page < shared.end >> 12 for page in plain)
    assert plain  # the shared part itself
    text = bytes(dram.cells[layout.text_start : shared.start])
    assert READABLE.findall(text) == []
    # The console's text is in memory, encrypted: printk's buffer holds it.
    everything = b"".join(bytes(part) for _, part in dram.extents())
    assert b"Memory Encryption Features active" not in everything
    assert b"Run /init as init process" not in everything


def test_linux_leaves_nothing_plain_but_what_is_named_here(booted: NativeRun) -> None:
    assert booted.entry is not None
    layout, entry = booted.entry.layout, booted.entry
    assert layout is not None
    named = {
        "low memory: boot data, the loader's tables, trampolines": (0, 1 << 20),
        "ACPI tables": (entry.acpi.start, entry.acpi.end),
        ".bss..decrypted": (layout.bss_decrypted.start, layout.bss_decrypted.end),
        "sme_workarea": (layout.workarea.start, layout.workarea.end),
    }
    plain = np.flatnonzero(booted.machine.dram.written_by == 1) << 12
    for start, end in named.values():
        inside = (plain >= start) & (plain < end)
        assert inside.any()
        plain = plain[~inside]
    assert [hex(pa) for pa in plain.tolist()] == []


def test_a_snapshot_goes_on_as_if_nothing_had_happened(
    cbit: Cbit, real_kernel_path: Path, archives: dict[str, Path], tmp_path: Path
) -> None:
    common = ("--cpu", COHERENT, "--timeout", 200, "--json")
    kernel = ("run", real_kernel_path, "--initrd", archives["batch"], "--seed", 9)
    whole = cbit(*kernel, *common)
    first = cbit(*kernel, *common, "--until", ACTIVE, "--snapshot", tmp_path / "snap")
    assert first.code == 0, first.err
    second = cbit("run", "--from", tmp_path / "snap", *common)
    assert second.code == 0, second.out + second.err
    # The TLB starts empty, so the clock may be off by what its fills change.
    number = re.compile(r"-?\d+|  +")
    joined = number.sub("", first.console + second.console)
    assert joined == number.sub("", whole.console)
    assert second.facts["cr3"] == whole.facts["cr3"]


def test_the_same_seed_gives_the_same_run_event_for_event(
    cbit: Cbit, real_kernel_path: Path, tmp_path: Path
) -> None:
    events = []
    for name in ("a", "b"):
        done = cbit(
            *("run", real_kernel_path, "--cpu", COHERENT, "--seed", 4, "--json"),
            *("--until", ACTIVE, "--timeout", 200, "--trace", tmp_path / name),
            *("--events", "cpuid,rdmsr,wrmsr,cr,page-fault,tag-change,flush"),
        )
        assert done.code == 0, done.err
        facts = done.facts
        facts.pop("seconds")
        events.append((facts, (tmp_path / name).read_bytes()))
    assert events[0][0] == events[1][0]
    assert events[0][1] == events[1][1]
    lines = events[0][1].splitlines()
    assert len(lines) > 10_000
    assert json.loads(lines[0])["kind"] in ("cpuid", "cr", "rdmsr", "wrmsr", "flush")
