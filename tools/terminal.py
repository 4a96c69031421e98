"""Joins the user's terminal to the guest's COM1; Ctrl-] leaves.

Keys go to the guest as they are typed. While the guest idles, real time passes, so
that a shell's prompt does not race the clock.
"""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType

from .native_run import NativeRun

ESCAPE = b"\x1d"
LONGEST_WAIT = 0.05
"""Seconds between two looks at the keyboard while the guest idles."""


class Terminal:
    """A context in which the terminal is the guest's.

    Args:
        run: the run that gets the keys.
    """

    def __init__(self, run: NativeRun) -> None:
        self._run = run
        self._input = sys.stdin.fileno()
        self._saved: list[object] | None = None
        self._open = True

    def __enter__(self) -> Terminal:
        if os.isatty(self._input):
            self._saved = termios.tcgetattr(self._input)
            tty.setraw(self._input)
            sys.stderr.write("cbit: Ctrl-] ends the session\r\n")
        self._run.core.every_slice = self._poll
        self._run.core.before_idle = self._idle
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._saved is not None:
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]

    def _poll(self) -> None:
        self._take(0.0)

    def _idle(self, nanoseconds: int) -> None:
        sys.stdout.flush()
        wait = min(nanoseconds / 1e9, LONGEST_WAIT)
        if self._open:
            self._take(wait)
        else:
            time.sleep(wait)

    def _take(self, wait: float) -> None:
        if not self._open:
            return
        ready, _, _ = select.select([self._input], [], [], wait)
        if not ready:
            return
        data = os.read(self._input, 256)
        if not data:
            self._open = False
        elif ESCAPE in data and self._saved is not None:
            self._run.core.stop("Ctrl-] was typed")
        else:
            self._run.platform.uart.feed(data)
