"""`cbit diff`: the reference against the kernel's own machine code."""

from __future__ import annotations

import json
from typing import Any

import click

from .arguments import INTEGER, SIZE
from .known_differences import KNOWN, KNOWN_EVENTS
from .native_diff import (
    DEFAULT_COMMAND_LINE,
    DEFAULT_RAM,
    Comparison,
    DiffRequest,
    compare,
    facts,
    where,
)
from .progress import working
from .symbols import Symbols

SHOWN = 20


@click.command()
@click.argument("kernel")
@click.option("--cpu", metavar="NAME|FILE", default=None, help="Model or CPUID dump.")
@click.option("--ram", type=SIZE, default=DEFAULT_RAM, help="256M .. 64G; sparse.")
@click.option("--cmdline", metavar="TEXT", default=DEFAULT_COMMAND_LINE)
@click.option("--initrd", metavar="FILE", help="Initial RAM disk.")
@click.option("--smee/--no-smee", default=True, help="Firmware sets SYSCFG[23].")
@click.option("--tsme", is_flag=True, help="Firmware turns transparent SME on.")
@click.option("--la57", is_flag=True, help="5-level paging.")
@click.option("--seed", type=INTEGER, default=0, help="Of the key, for both sides.")
@click.option("--symbols", metavar="FILE", help="System.map or vmlinux, for names.")
@click.option("--json", "as_json", is_flag=True, help="One object on stdout.")
def diff(cpu: str | None, symbols: str | None, as_json: bool, **options: Any) -> int:
    """Compare boot/ with the kernel's own code at the end of in-place encryption.

    Masks, register history, page tables, work area and every byte of DRAM. Exit code
    0 if nothing differs but what is known and justified, 1 otherwise.
    """
    if cpu is not None:
        options["cpu"] = cpu
    names = Symbols.of(symbols)
    with working("running both"):
        result = compare(DiffRequest(**options))
    if as_json:
        click.echo(json.dumps(facts(result), indent=2))
    else:
        _print(result, names)
    return 0 if result.equal else 1


def _print(result: Comparison, names: Symbols) -> None:
    for name, (left, right) in result.masks.items():
        click.echo(f"{name:<10} reference {left:#x}  kernel {right:#x}")
    click.echo(
        f"CR3        reference {result.reference.cr3:#x}  kernel {result.native.cr3:#x}"
    )
    click.echo(
        f"history    {len(result.reference.history)} and "
        f"{len(result.native.history)} register writes and flushes"
    )
    click.echo(f"memory     {result.compared >> 20} MiB of DRAM compared")
    reasons = {known.name: (known.row, known.reason) for known in KNOWN}
    reasons |= {
        f"{event} (event)": (row, reason) for event, row, reason in KNOWN_EVENTS
    }
    for name, count in sorted(result.known.items()):
        row, reason = reasons[name]
        click.echo(f"known      {name} ({row}): {count}; {reason}")
    for side, line in result.events[:SHOWN]:
        click.echo(f"DIFFERS    only the {side}: {line}")
    for word in result.words[:SHOWN]:
        place, row = where(word.pa, result.layout)
        layout = result.layout
        symbol = names.name(word.pa - layout.text_start + layout.virtual_base)
        click.echo(
            f"DIFFERS    {word.pa:#x} {symbol or place} ({row}): reference "
            f"{word.reference:#x}, kernel {word.native:#x}, image {word.image:#x}"
        )
    left = len(result.words) + len(result.events)
    if left > 2 * SHOWN:
        click.echo(f"           {left} differences in all")
    click.echo("equal" if result.equal else "different")
