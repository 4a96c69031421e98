"""Signs of life on stderr: only on a terminal, only where something takes long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

DELAY = 1.0
"""Seconds before anything shows."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner with `what` if the block takes longer than a second.

    Nothing shows in a pipe. NO_COLOR is respected by rich.
    """
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    spinner = threading.Thread(target=_spin, args=(what, done), daemon=True)
    spinner.start()
    try:
        yield
    finally:
        done.set()
        spinner.join()


def _spin(what: str, done: threading.Event) -> None:
    if done.wait(DELAY):
        return
    # Here and not above: most runs are over by now and never need rich.
    from rich.console import Console

    with Console(stderr=True).status(what):
        done.wait()
