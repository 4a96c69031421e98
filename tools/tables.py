"""Tables on stdout: framed and coloured on a terminal, aligned plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, cut_last: bool = False
) -> None:
    """Print `rows` under `columns`; every cell is one line of plain text.

    On a terminal the table is drawn by rich, which leaves colours out if NO_COLOR is
    set. In a pipe columns are separated by two spaces or more and nothing is cut.

    Args:
        columns: the headings.
        rows: the cells of each line, as many as there are columns.
        cut_last: on a terminal that is too narrow the last column is cut short;
            otherwise its text goes on in the next line.
    """
    if sys.stdout.isatty():
        _print_framed(columns, rows, cut_last)
        return
    lines = [columns, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _print_framed(
    columns: Sequence[str], rows: Sequence[Sequence[str]], cut_last: bool
) -> None:
    # Here and not above: most runs of a command never need rich, which loads slowly.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(columns[:-1]):
        width = max(len(line[i]) for line in (columns, *rows))
        table.add_column(name, no_wrap=True, min_width=width)
    table.add_column(columns[-1], no_wrap=cut_last)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)
