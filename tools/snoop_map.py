"""The map of a snoop: rows of equal regions over what is present, holes collapsed."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..hw.types import PAGE_SIZE, PhysAddr
from .snoop import SnoopReport

ZERO, PLAIN, ENCRYPTED, BOTH = range(4)
"""What a region contains: values of `PageClass` combined by OR."""

OUTSIDE = 4
"""A region beyond the end of RAM."""

CELL_NAMES = ("zero", "plain", "encrypted-looking", "plain and encrypted-looking")

CELL_COLOURS = ("#dddddd", "#e69f00", "#0072b2", "#cc79a7", "#ffffff")
"""For pictures, one for each value of a cell; apart for the colour-blind too."""


@dataclass(frozen=True)
class Row:
    """Neighbouring regions, one cell each: `ZERO` .. `BOTH`, or `OUTSIDE`."""

    address: PhysAddr
    cells: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Gap:
    """A range without a non-zero byte, left out of the map."""

    address: PhysAddr
    length: int


Part: TypeAlias = Row | Gap


@dataclass(frozen=True)
class MemoryMap:
    """Rows and gaps, ascending; together they cover all of RAM."""

    region_size: int  # bytes of one cell, a power of two
    parts: tuple[Part, ...]


def memory_map(report: SnoopReport, columns: int, max_rows: int) -> MemoryMap:
    """Lay out a report with the smallest regions that fit.

    Args:
        report: what `snoop` found.
        columns: cells in a row, a power of two.
        max_rows: rows the map may have, 1 or more; gaps come on top.
    """
    cells, contents = _page_cells(report)
    region_size = PAGE_SIZE
    while np.unique(cells // columns).size > max_rows:
        cells, contents = _merged(cells >> 1, contents)
        region_size *= 2
    row_size = region_size * columns
    parts: list[Part] = []
    end = 0
    for number in np.unique(cells // columns).tolist():
        address = number * row_size
        if address > end:
            parts.append(Gap(PhysAddr(end), address - end))
        row = np.zeros(columns, np.uint8)
        first, last = np.searchsorted(cells, [number * columns, (number + 1) * columns])
        row[cells[first:last] - number * columns] = contents[first:last]
        outside = -(-(report.size - address) // region_size)
        row[max(outside, 0) :] = OUTSIDE
        parts.append(Row(PhysAddr(address), row))
        end = address + row_size
    if end < report.size:
        parts.append(Gap(PhysAddr(end), report.size - end))
    return MemoryMap(region_size, tuple(parts))


def _page_cells(
    report: SnoopReport,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return the numbers of all non-zero pages, ascending, and their classes."""
    cells = [np.empty(0, np.int64)]
    contents = [np.empty(0, np.uint8)]
    for span in report.spans:
        present = np.flatnonzero(span.classes)
        cells.append(present + span.first_page)
        contents.append(span.classes[present])
    return np.concatenate(cells), np.concatenate(contents)


def _merged(
    cells: npt.NDArray[np.int64], contents: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Return each cell number once, with the contents of its parts combined."""
    firsts = np.flatnonzero(np.diff(cells, prepend=-1))
    return cells[firsts], np.bitwise_or.reduceat(contents, firsts)


def size_text(length: int) -> str:
    """Return a byte count for people: `512 bytes`, `4.0 KiB`, `60.0 GiB`."""
    if length < 1024:
        return f"{length} bytes"
    amount, unit = length / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB", "PiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}"
