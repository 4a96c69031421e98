"""A snoop as one HTML file that needs nothing else: no script, nothing fetched."""

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from pathlib import Path

from ..hw.types import PAGE_SIZE
from .output_file import output_file
from .snoop import SnoopReport
from .snoop_map import (
    CELL_COLOURS,
    CELL_NAMES,
    OUTSIDE,
    Gap,
    MemoryMap,
    Row,
    memory_map,
    size_text,
)
from .snoop_repeats import Repeats
from .snoop_text import needle_text

COLUMNS = 128
MAX_ROWS = 96

_CELL, _LINE, _LEFT = 6, 9, 130
"""Pixels: width of a cell, height of a row, room for the addresses."""

_ADDRESSES_SHOWN = 1000
_RANGES_SHOWN = 200

_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em; color: #222; background: #fff }}
table {{ border-collapse: collapse }}
td, th {{ padding: .1em .8em; text-align: left; vertical-align: top }}
td.number {{ text-align: right }}
td, svg text {{ font-family: monospace }}
svg text {{ font-size: 9px; fill: #444 }}
.swatch {{ display: inline-block; width: 1em; height: 1em; vertical-align: -.15em }}
.text {{ white-space: pre-wrap; word-break: break-all }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


def write_html(path: Path | str, report: SnoopReport, title: str) -> None:
    """Write a report as one page; whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    page = "".join(_page(report, f"DRAM of {title}"))
    with output_file(path) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def _page(report: SnoopReport, title: str) -> Iterator[str]:
    yield _HEAD.format(title=escape(title))
    yield from _totals(report)
    layout = memory_map(report, COLUMNS, MAX_ROWS)
    yield "<h2>Map</h2>\n"
    yield f"<p>One cell is {size_text(layout.region_size)}. Point at it for its range."
    yield "</p>\n"
    yield from _svg(layout)
    yield f"<h2>Strings: {report.strings.count}</h2>\n"
    yield f"<p>Chance alone makes about {report.strings_by_chance} of ciphertext. "
    yield f"The {len(report.strings.shown)} most word-like:</p>\n"
    yield from _table(
        ("address", "length", "text"),
        ((hex(one.address), str(one.length), one.text) for one in report.strings.shown),
    )
    if report.finds:
        yield "<h2>Searched for</h2>\n"
        yield from _table(
            ("text", "found", "addresses"),
            (
                (
                    needle_text(needle),
                    str(len(addresses)),
                    " ".join(hex(address) for address in addresses[:_ADDRESSES_SHOWN]),
                )
                for needle, addresses in report.finds.items()
            ),
        )
    yield from _repeats(report)
    yield "</body>\n</html>\n"


def _totals(report: SnoopReport) -> Iterator[str]:
    counts = (report.pages.zero, report.pages.plain, report.pages.encrypted)
    yield f"<p>{size_text(report.size)} of RAM. "
    yield "Compressed data and random numbers are encrypted-looking too.</p>\n<table>\n"
    for name, colour, pages in zip(CELL_NAMES, CELL_COLOURS, counts, strict=False):
        yield f'<tr><th><span class="swatch" style="background: {colour}"></span> '
        yield f'{name}</th><td class="number">{pages} pages</td>'
        yield f'<td class="number">{size_text(pages * PAGE_SIZE)}</td></tr>\n'
    yield f'<tr><th><span class="swatch" style="background: {CELL_COLOURS[3]}"></span> '
    yield f"{CELL_NAMES[3]}, in one cell of the map</th></tr>\n</table>\n"


def _svg(layout: MemoryMap) -> Iterator[str]:
    width = _LEFT + COLUMNS * _CELL
    height = len(layout.parts) * _LINE
    yield f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
    yield 'role="img" aria-label="map of DRAM" shape-rendering="crispEdges">\n'
    for number, part in enumerate(layout.parts):
        base = (number + 1) * _LINE - 2
        if isinstance(part, Gap):
            yield f'<text x="{_LEFT}" y="{base}">&#8230; {size_text(part.length)} '
            yield "never written or zero &#8230;</text>\n"
        else:
            yield f'<text x="{_LEFT - 8}" y="{base}" text-anchor="end">'
            yield f"{part.address:#x}</text>\n"
            yield from _svg_row(part, number * _LINE, layout.region_size)
    yield "</svg>\n"


def _svg_row(row: Row, top: int, region_size: int) -> Iterator[str]:
    """Yield one rectangle for each run of equal cells."""
    first = 0
    for cell, run in groupby(row.cells.tolist()):
        count = len(list(run))
        if cell != OUTSIDE:
            start = row.address + first * region_size
            end = start + count * region_size
            yield f'<rect x="{_LEFT + first * _CELL}" y="{top}" '
            yield f'width="{count * _CELL}" height="{_LINE - 1}" '
            yield f'fill="{CELL_COLOURS[cell]}"><title>{start:#x}..{end:#x} '
            yield f"{CELL_NAMES[cell]}</title></rect>\n"
        first += count


def _repeats(report: SnoopReport) -> Iterator[str]:
    about = "" if report.duplicates.exact else "about "
    yield "<h2>Ciphertext that repeats</h2>\n"
    yield f"<p>Equal blocks at different addresses: {about}{report.duplicates.count}."
    yield "</p>\n"
    repeats = report.repeats
    if repeats is not None:
        yield _comparison(repeats)
        yield from _table(
            ("from", "to", "size"),
            (
                (hex(start), hex(end), size_text(end - start))
                for start, end in repeats.ranges[:_RANGES_SHOWN]
            ),
        )


def _comparison(repeats: Repeats) -> str:
    return (
        f"<p>{repeats.blocks} blocks of 16 bytes are the same in both snapshots, in "
        f"{repeats.num_ranges} ranges. Of {repeats.pages} encrypted-looking pages "
        f"{repeats.unchanged_pages} are unchanged, {repeats.partly_equal_pages} "
        f"changed in part.</p>\n"
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield a table; every cell is escaped."""
    yield "<table>\n<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>\n"
    for row in rows:
        cells = "".join(f'<td class="text">{escape(cell)}</td>' for cell in row)
        yield f"<tr>{cells}</tr>\n"
    yield "</table>\n"
