"""A snoop drawn as a PNG with matplotlib: pages by address, coloured by class."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..hw.errors import CbitError
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 128
MAX_ROWS = 128

_GAP_INCHES = 0.18
"""Height of a gap: room for its label."""

_LABELS = 30
"""Addresses along the side, at most."""


def require_matplotlib() -> None:
    """Fail early, before a long search.

    Raises:
        CbitError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as missing:
        raise CbitError(
            "drawing a PNG needs matplotlib: pip install 'cbit[plots]'"
        ) from missing


def write_png(path: Path | str, report: SnoopReport, title: str) -> None:
    """Draw the classes of all pages by address; whole or not at all.

    Raises:
        CbitError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    layout = memory_map(report, COLUMNS, MAX_ROWS)
    num_rows = sum(isinstance(part, Row) for part in layout.parts)
    row_inches = min(0.25, max(0.06, 7 / max(num_rows, 1)))
    gap_rows = math.ceil(_GAP_INCHES / row_inches)
    tall = num_rows + gap_rows * (len(layout.parts) - num_rows)
    height = min(16.0, 1.7 + tall * row_inches)
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _draw_parts(axes, layout, gap_rows)
    _draw_scales(axes, layout)
    heading = f"DRAM of {title}: {size_text(report.size)}"
    axes.set_title(heading, parse_math=False)
    _draw_legend(axes, report)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    with output_file(path) as file:
        file.write(encoded.getbuffer())


def _draw_parts(axes: Axes, layout: MemoryMap, gap_rows: int) -> None:
    """Draw rows and gaps from the top down, and the addresses beside them."""
    from matplotlib.colors import ListedColormap

    bands = []
    marks: list[tuple[int, str]] = []
    gaps: list[tuple[float, str]] = []
    top = 0
    for part in layout.parts:
        if isinstance(part, Gap):
            bands.append(np.full((gap_rows, COLUMNS), OUTSIDE, np.uint8))
            text = f"{size_text(part.length)} never written or zero"
            gaps.append((top + gap_rows / 2 - 0.5, text))
        else:
            bands.append(part.cells[None, :])
            marks.append((top, f"{part.address:#x}"))
        top += len(bands[-1])
    axes.imshow(
        np.concatenate(bands),
        cmap=ListedColormap(CELL_COLOURS),
        vmin=0,
        vmax=OUTSIDE,
        aspect="auto",
        interpolation="nearest",
    )
    for place, text in gaps if len(gaps) <= _LABELS else []:
        axes.text(
            COLUMNS / 2, place, text, ha="center", va="center", fontsize=8, color="0.4"
        )
    shown: list[tuple[int, str]] = []
    for place, text in marks:
        if not shown or place - shown[-1][0] >= top / _LABELS:
            shown.append((place, text))
    axes.set_yticks(
        [place for place, _ in shown],
        [text for _, text in shown],
        family="monospace",
        fontsize=8,
    )


def _draw_scales(axes: Axes, layout: MemoryMap) -> None:
    quarters = range(5)
    quarter_size = layout.region_size * COLUMNS // 4
    axes.set_xticks(
        [i * COLUMNS / 4 - 0.5 for i in quarters],
        [f"+{size_text(i * quarter_size)}" if i else "0" for i in quarters],
    )
    axes.set_xlabel(f"offset in the row; one cell is {size_text(layout.region_size)}")
    axes.set_ylabel("physical address")


def _draw_legend(axes: Axes, report: SnoopReport) -> None:
    from matplotlib.patches import Patch

    counts = (report.pages.zero, report.pages.plain, report.pages.encrypted)
    labels = [
        f"{name}: {size_text(count * PAGE_SIZE)}"
        for name, count in zip(CELL_NAMES, counts, strict=False)
    ]
    labels.append(CELL_NAMES[-1])
    patches = [
        Patch(facecolor=colour, edgecolor="0.5", label=label)
        for colour, label in zip(CELL_COLOURS, labels, strict=False)
    ]
    axes.figure.legend(
        handles=patches, loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
