"""A snapshot of a running kernel holds memory, tags, keys and registers exactly."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from cbit.hw.errors import InputError
from cbit.hw.snapshot import save_snapshot
from cbit.hw.trace import KINDS
from cbit.tools.native_run import NativeRun, RunRequest, execute, prepare
from cbit.tools.native_snapshot import resume, save

from .conftest import INCOHERENT


@pytest.fixture(scope="module")
def stopped(real_kernel_path: Path) -> NativeRun:
    run = prepare(
        RunRequest(
            kernel=str(real_kernel_path), cpu=INCOHERENT, seed=2, until="pid_max"
        )
    )
    execute(run)
    assert run.outcome == "matched"
    return run


def test_everything_comes_back(stopped: NativeRun, tmp_path: Path) -> None:
    path = tmp_path / "snapshot"
    with path.open("wb") as file:
        save(stopped, file)
    again = resume(str(path), RunRequest(), None, KINDS, lambda data: None)
    old, new = stopped.machine, again.machine
    for (at, cells), (also_at, also) in zip(
        old.dram.extents(), new.dram.extents(), strict=True
    ):
        assert at == also_at
        assert np.array_equal(cells, also)
    assert np.array_equal(old.dram.written_by, new.dram.written_by)
    for slot in (0, 1):
        before, after = old.caches.line_store(slot), new.caches.line_store(slot)
        assert np.array_equal(before.valid, after.valid)
        assert np.array_equal(before.dirty, after.dirty)
    assert list(stopped.core.state.regs) == list(again.core.state.regs)
    assert stopped.core.state.save() == again.core.state.save()
    assert old.cpu.read_cr3() == new.cpu.read_cr3()
    assert stopped.platform.state() == again.platform.state()
    assert len(old.caches.hazards_met) == len(new.caches.hazards_met)


def test_a_snapshot_without_a_processor_is_refused(
    stopped: NativeRun, tmp_path: Path
) -> None:
    path = tmp_path / "machine"
    with path.open("wb") as file:
        save_snapshot(file, stopped.machine)
    with pytest.raises(InputError, match="no machine code's state"):
        resume(str(path), RunRequest(), None, KINDS, lambda data: None)


def test_a_damaged_snapshot_is_refused(stopped: NativeRun, tmp_path: Path) -> None:
    whole = io.BytesIO()
    save(stopped, whole)
    data = bytearray(whole.getvalue())
    path = tmp_path / "damaged"
    for at in (0, 9, 40, len(data) // 2, len(data) - 1):
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError):
            resume(str(path), RunRequest(), None, KINDS, lambda data: None)
        data[at] ^= 1
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError):
        resume(str(path), RunRequest(), None, KINDS, lambda data: None)
