"""`cbit run`: execute a real kernel, or a program of yours, on the machine."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from typing import Any

import click

from ..hw.errors import CbitError
from ..hw.trace import KINDS
from .arguments import INTEGER, SIZE
from .dram_file import write_dram_file
from .event_file import event_writer
from .native_run import (
    DEFAULT_COMMAND_LINE,
    DEFAULT_RAM,
    NativeRun,
    RunRequest,
    execute,
    prepare,
)
from .native_snapshot import resume, save
from .output_file import output_file
from .progress import working
from .terminal import Terminal


@click.command()
@click.argument("kernel", required=False, metavar="[KERNEL]")
@click.option("--elf", "program", metavar="PROGRAM", help="Run a freestanding ELF.")
@click.option("--entry", metavar="SYMBOL|ADDR", help="Where PROGRAM starts.")
@click.option("--pass-cbit", is_flag=True, help="PROGRAM gets the C-bit in RDI.")
@click.option("--from", "source", metavar="FILE", help="Go on from a snapshot.")
@click.option("--cpu", metavar="NAME|FILE", default=None, help="Model or CPUID dump.")
@click.option("--ram", type=SIZE, default=DEFAULT_RAM, help="256M .. 64G; sparse.")
@click.option("--cmdline", metavar="TEXT", default=DEFAULT_COMMAND_LINE)
@click.option("--initrd", metavar="FILE", help="Initial RAM disk.")
@click.option("--until", metavar="REGEX", help="End when the console shows this.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS")
@click.option("--smee/--no-smee", default=True, help="Firmware sets SYSCFG[23].")
@click.option("--tsme", is_flag=True, help="Firmware turns transparent SME on.")
@click.option("--la57", is_flag=True, help="Enter with 5-level paging.")
@click.option(
    "--caches",
    type=click.Choice(["coherent", "incoherent", "model"]),
    default="model",
    help="Across C-bit settings; model: what CPUID says.",
)
@click.option(
    "--hazards",
    type=click.Choice(["record", "raise"]),
    default="record",
    help="Of accesses that silicon leaves undefined.",
)
@click.option("--seed", type=INTEGER, help="Make keys and evictions repeatable.")
@click.option("--wall-clock", is_flag=True, help="Time is the host's; no run repeats.")
@click.option("--trace", metavar="FILE", help="Write events, JSON lines.")
@click.option("--events", metavar="KINDS", help="Only these, by comma.")
@click.option("--symbols", metavar="FILE", help="System.map or vmlinux, for reports.")
@click.option("--snapshot", metavar="FILE", help="Write the machine at the end.")
@click.option("--dram-out", metavar="FILE", help="Write DRAM: raw, sparse.")
@click.option("--interactive", is_flag=True, help="Join the terminal to COM1.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def run(
    cpu: str | None,
    source: str | None,
    trace: str | None,
    events: str | None,
    snapshot: str | None,
    dram_out: str | None,
    interactive: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Execute a bzImage or vmlinux as it is, or a program of your own.

    The console goes to stdout. Exit code 0 if --until matched, or, without it, if the
    guest switched itself off; 1 otherwise.
    """
    if cpu is not None:
        options["cpu"] = cpu
    request = RunRequest(**options)
    _check_misuse(request, source, events, trace, interactive, as_json)
    kinds = _kinds(events)
    with ExitStack() as opened:
        on_event = None
        if trace is not None:
            on_event = event_writer(opened.enter_context(output_file(trace)))
        show = (lambda data: None) if as_json else _print_console
        with working("loading"):
            if source is not None:
                machine_run = resume(source, request, on_event, kinds, show)
            else:
                machine_run = prepare(
                    request, on_event=on_event, kinds=kinds, show=show
                )
        if interactive:
            opened.enter_context(Terminal(machine_run))
        execute(machine_run)
        if snapshot is not None:
            with output_file(snapshot) as file:
                save(machine_run, file)
        if dram_out is not None:
            dram = machine_run.machine.dram
            with working("writing DRAM"):
                write_dram_file(dram_out, dram.size, dram.extents())
    facts = machine_run.facts()
    if as_json:
        click.echo(json.dumps({**facts, "report": machine_run.report}, indent=2))
    else:
        _summarise(machine_run, facts)
    if machine_run.succeeded:
        return 0
    raise CbitError(_why(machine_run))


def _check_misuse(
    request: RunRequest,
    source: str | None,
    events: str | None,
    trace: str | None,
    interactive: bool,
    as_json: bool,
) -> None:
    given = [name for name in (request.kernel, request.program, source) if name]
    if len(given) != 1:
        raise click.UsageError("one of KERNEL, --elf PROGRAM and --from FILE expected")
    if request.entry is not None and request.program is None:
        raise click.UsageError("--entry goes with --elf")
    if request.pass_cbit and request.program is None:
        raise click.UsageError("--pass-cbit goes with --elf")
    if events is not None and trace is None:
        raise click.UsageError("--events goes with --trace")
    try:
        re.compile(request.until or "")
    except re.error as wrong:
        raise click.UsageError(f"--until {request.until!r}: {wrong}") from None
    if interactive and as_json:
        raise click.UsageError("--interactive and --json exclude each other")


def _kinds(events: str | None) -> frozenset[str]:
    if events is None:
        return KINDS
    kinds = frozenset(name.strip() for name in events.split(","))
    if unknown := sorted(kinds - KINDS):
        known = ", ".join(sorted(KINDS))
        raise click.UsageError(f"--events {', '.join(unknown)}: of {known} expected")
    return kinds


def _print_console(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    if b"\n" in data or len(data) > 1:
        sys.stdout.buffer.flush()


def _why(run: NativeRun) -> str:
    reason = run.stop.reason if run.stop else ""
    if run.request.until is not None:
        return f"--until {run.request.until}: not seen; {run.outcome}: {reason}"
    return f"{run.outcome}: {reason}"


def _summarise(run: NativeRun, facts: dict[str, Any]) -> None:
    """Print what a reader wants to know behind the console."""
    sys.stdout.flush()
    click.echo()
    for line in run.report:
        click.echo(line)
    pages = facts["pages"]
    faults = facts["exceptions"].get("14", 0)
    click.echo(
        f"outcome: {run.outcome} ({facts['reason']}) after {run.seconds:.2f} s; "
        f"{facts['code_bytes'] >> 20} MiB of code executed"
    )
    active = "active" if facts["sme_active"] else "not active"
    click.echo(
        f"SME {active}; CR3 {facts['cr3']}; pages in DRAM: {pages['encrypted']} "
        f"encrypted, {pages['plain']} plain; hazards: {facts['hazards']}"
    )
    click.echo(
        f"{facts['tlb_fills']} TLB fills, {facts['tag_changes']} tag changes, "
        f"{faults} page faults, {facts['interrupts']} interrupts, "
        f"{facts['cpuid']} CPUID, {sum(facts['msr_reads'].values())} RDMSR, "
        f"{sum(facts['msr_writes'].values())} WRMSR"
    )
