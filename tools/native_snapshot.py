"""Snapshots of a native run: the machine's own file plus processor and devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from ..hw.errors import InputError
from ..hw.snapshot import load_snapshot, save_snapshot
from ..hw.trace import Event
from .native_run import NativeRun, RunRequest, assemble


def save(run: NativeRun, file: BinaryIO) -> None:
    """Write a run as it stands; it can go on from the file."""
    extra = {"native": run.core.save(), "platform": run.platform.state()}
    save_snapshot(file, run.machine, extra)


def resume(
    path: str,
    request: RunRequest,
    on_event: Callable[[Event], None] | None,
    kinds: frozenset[str],
    show: Callable[[bytes], None],
) -> NativeRun:
    """Build the run that a snapshot holds.

    Raises:
        InputError: the file is no snapshot, is damaged, or holds no native run.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        machine, extra = load_snapshot(file, path)
    native, platform = extra.get("native"), extra.get("platform")
    if not isinstance(native, dict) or not isinstance(platform, dict):
        raise InputError(
            f"{path}: holds no machine code's state; expected a snapshot of `cbit run`"
        )
    if on_event is not None:
        machine.trace.listen(on_event, kinds)
    run = assemble(request, machine, show)
    try:
        run.platform.restore(platform)
        run.core.restore(native)
    except (KeyError, TypeError, ValueError) as wrong:
        raise InputError(f"{path}: processor or device state: {wrong!r}") from wrong
    return run
