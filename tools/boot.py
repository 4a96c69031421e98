"""`cbit boot`: boot the reference kernel and say what became of memory encryption."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import click

from ..hw.arrays import Bytes
from .arguments import INTEGER, SIZE
from .boot_run import (
    DEFAULT_COMMAND_LINE,
    DEFAULT_RAM,
    BootRequest,
    BootRun,
    prepare,
    write_dram,
)
from .boot_run import boot as run_boot
from .event_file import event_writer
from .output_file import output_file
from .progress import working


@click.command()
@click.option("--cpu", metavar="NAME|FILE", default=None, help="Model or CPUID dump.")
@click.option("--ram", type=SIZE, default=DEFAULT_RAM, help="256M .. 64G; sparse.")
@click.option("--cmdline", metavar="TEXT", default=DEFAULT_COMMAND_LINE)
@click.option("--kernel", metavar="FILE", help="bzImage or vmlinux; else built-in.")
@click.option("--initrd", metavar="FILE", help="Initial RAM disk.")
@click.option("--smee/--no-smee", default=True, help="Firmware sets SYSCFG[23].")
@click.option("--tsme", is_flag=True, help="Firmware turns transparent SME on.")
@click.option("--la57", is_flag=True, help="5-level paging.")
@click.option(
    "--caches",
    type=click.Choice(["coherent", "incoherent", "model"]),
    default="model",
    help="Across C-bit settings; model: what CPUID says.",
)
@click.option("--seed", type=INTEGER, help="Make keys and evictions repeatable.")
@click.option("--dram-out", metavar="FILE", help="Write DRAM: raw, sparse.")
@click.option("--trace", metavar="FILE", help="Write every event, JSON lines.")
@click.option("--expect", type=click.Choice(["active", "inactive"]))
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def boot(
    cpu: str | None,
    dram_out: str | None,
    trace: str | None,
    expect: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Boot the reference kernel: detect SME, encrypt the kernel in place.

    Without --kernel a built-in image boots. Exit code 1 if the kernel refuses, or if
    --expect does not hold.
    """
    if cpu is not None:
        options["cpu"] = cpu
    with ExitStack() as opened:
        on_event = None
        if trace is not None:
            on_event = event_writer(opened.enter_context(output_file(trace)))

        with working("reading the kernel"):
            run = prepare(
                BootRequest(**options),
                on_event=on_event,
                say=(lambda line: None) if as_json else click.echo,
            )
        run_boot(run)
        if dram_out is not None:
            with working("writing DRAM"):
                write_dram(run, dram_out)
    if as_json:
        click.echo(json.dumps(run.facts(), indent=2))
    else:
        _summarise(run)
    if expect is not None and run.active != (expect == "active"):
        assert run.booted is not None
        found = "active" if run.active else "inactive"
        raise click.ClickException(
            f"--expect {expect}: SME is {found}: {run.booted.detection.reason}"
        )


def booted_dram(
    **options: Any,
) -> tuple[int, Iterable[tuple[int, Bytes]]]:
    """Boot with the options of `cbit boot`; return the size of DRAM and its extents."""
    run = prepare(BootRequest(**options))
    run_boot(run)
    return run.machine.dram.size, run.machine.dram.extents()


def _summarise(run: BootRun) -> None:
    """Print what a reader wants to know behind the log."""
    facts = run.facts()
    pages = facts["pages"]
    click.echo()
    for name in ("kernel", "initrd"):
        part = facts[name]
        if part is None:
            continue
        shown = "plaintext" if part["dram_equals_plain"] else "ciphertext"
        click.echo(f"{name} in DRAM: {shown}")
        click.echo(f"  [{part['start']}, {part['end']})")
        for label, key in (
            ("plaintext", "sha256"),
            ("through C=1", "sha256_through_c1"),
            ("DRAM", "sha256_dram"),
        ):
            if part[key]:
                click.echo(f"  sha256 {label:<12}{part[key]}")
    click.echo(
        f"pages in DRAM: {pages['encrypted']} encrypted, {pages['plain']} plain; "
        f"CR3 {facts['cr3']}; hazards: {facts['hazards']}"
    )
