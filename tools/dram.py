"""`cbit dram`: what can be read from the DIMMs."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import click
from rich.console import Console
from rich.progress import Progress, TaskID

from .arguments import INTEGER
from .dram_file import DramFile, DramImage, Extent
from .progress import working
from .snoop import snoop as snoop_image
from .snoop_html import write_html
from .snoop_picture import require_matplotlib, write_png
from .snoop_text import needle_text, snoop_json, snoop_lines

PROGRESS_DELAY = 1.0
"""Seconds before a progress bar shows."""


@click.group()
def dram() -> None:
    """Look at DRAM as a probe on the memory bus sees it."""


@dram.command()
@click.argument("file", required=False, type=click.Path())
@click.argument("file2", required=False, type=click.Path())
@click.option("--boot", is_flag=True, help="Boot the reference machine, snoop that.")
@click.option(
    "--find", "texts", metavar="TEXT", multiple=True, help="Look for these bytes."
)
@click.option("--png", metavar="FILE", type=click.Path(), help="Draw the map.")
@click.option("--html", metavar="FILE", type=click.Path(), help="Write one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="The same facts as JSON.")
@click.option(
    "--min-length",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Shortest run of printable ASCII that is a string.",
)
@click.option(
    "--strings",
    "num_strings",
    type=click.IntRange(0),
    default=20,
    show_default=True,
    help="How many strings to show.",
)
@click.option("--cpu", metavar="MODEL", help="With --boot: the processor.")
@click.option("--cmdline", metavar="TEXT", help="With --boot: the command line.")
@click.option(
    "--kernel", metavar="IMAGE", type=click.Path(), help="With --boot: the kernel."
)
@click.option("--seed", type=INTEGER, help="With --boot: repeat that run.")
@click.option("--smee/--no-smee", default=None, help="With --boot: SYSCFG bit 23.")
@click.option("--tsme", is_flag=True, default=None, help="With --boot: TSME is on.")
def snoop(
    file: str | None,
    file2: str | None,
    boot: bool,
    texts: tuple[str, ...],
    png: str | None,
    html: str | None,
    as_json: bool,
    min_length: int,
    num_strings: int,
    **boot_options: object,
) -> None:
    """Show what an attacker with the DIMMs sees.

    FILE is a raw dump, file offset = physical address. With FILE2, another snapshot
    of the same machine, ciphertext that repeats is reported.
    """
    given = {name: value for name, value in boot_options.items() if value is not None}
    _check_usage(file, file2, boot, texts, given)
    if png:
        require_matplotlib()
    with ExitStack() as opened:
        dumps = [opened.enter_context(DramFile(name)) for name in (file, file2) if name]
        for dump in dumps:
            _warn_of_tail(dump)
        image = dumps[0] if dumps else _booted_dram(given)
        bar = opened.enter_context(_DelayedBar(image))
        report = snoop_image(
            image,
            second=dumps[1] if len(dumps) == 2 else None,
            needles=tuple(dict.fromkeys(os.fsencode(text) for text in texts)),
            min_length=min_length,
            num_strings=num_strings,
            progress=bar.advance,
        )
    title = needle_text(os.fsencode(os.path.basename(file))) if file else "this boot"
    if as_json:
        click.echo(json.dumps(snoop_json(report), indent=2))
    else:
        console = Console(highlight=False)
        for line in snoop_lines(report, title):
            console.print(line, soft_wrap=True)
    if png:
        write_png(png, report, title)
    if html:
        write_html(html, report, title)


def _check_usage(
    file: str | None,
    file2: str | None,
    boot: bool,
    texts: tuple[str, ...],
    boot_options: dict[str, object],
) -> None:
    if boot and file:
        named = "FILE and FILE2" if file2 else "FILE"
        raise click.UsageError(f"--boot and {named} exclude each other")
    if not boot and not file:
        raise click.UsageError("expected FILE or --boot")
    if boot_options and not boot:
        option = next(iter(boot_options))
        raise click.UsageError(f"--{option} goes with --boot only")
    if "" in texts:
        raise click.UsageError("--find: expected some text, got none")


def _warn_of_tail(dump: DramFile) -> None:
    if dump.tail_bytes:
        click.echo(
            f"Warning: {dump.path}: cut short? The last {dump.tail_bytes} bytes, from "
            f"{dump.size:#x} on, are no whole page and are left out",
            err=True,
        )


@dataclass(frozen=True)
class _BootedDram:
    """The DRAM of the machine that was just booted; its extents are read once."""

    size: int
    cells: Iterable[Extent]

    def extents(self) -> Iterable[Extent]:
        return self.cells


def _booted_dram(options: dict[str, object]) -> DramImage:
    """Boot the reference machine with the given options and return its cells."""
    from .boot import booted_dram  # a machine and a kernel: only if asked for

    with working("booting"):
        size, cells = booted_dram(**options)
    return _BootedDram(size, cells)


class _DelayedBar:
    """A progress bar on stderr that shows on a terminal and only if it takes long."""

    def __init__(self, image: DramImage) -> None:
        self._total = image.present_bytes if isinstance(image, DramFile) else None
        self._start = time.monotonic()
        self._done = 0
        self._shown: tuple[Progress, TaskID] | None = None

    def advance(self, num_bytes: int) -> None:
        """Count the next bytes as done."""
        self._done += num_bytes
        if self._shown is None:
            late = time.monotonic() - self._start >= PROGRESS_DELAY
            if not late or not sys.stderr.isatty():
                return
            progress = Progress(console=Console(stderr=True), transient=True)
            progress.start()
            self._shown = progress, progress.add_task("snooping", total=self._total)
        progress, task = self._shown
        progress.update(task, completed=self._done)

    def __enter__(self) -> _DelayedBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown is not None:
            self._shown[0].stop()
