"""A snoop as text for a terminal or a pipe, and as JSON for programs."""

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from ..hw.types import PAGE_SIZE, PhysAddr
from .page_class import ENTROPY_MAX, ENTROPY_MIN
from .snoop import SnoopReport
from .snoop_map import CELL_NAMES, Gap, Part, memory_map, size_text
from .snoop_repeats import Duplicates, Repeats
from .snoop_strings import FoundStrings

COLUMNS = 64
MAX_ROWS = 20

MARKS = ".p#+ "
"""One character for each value of a map cell."""

STYLES = ("bright_black", "yellow", "blue", "magenta", "")

SHOWN_TEXT = 100
SHOWN_ADDRESSES = 16
SHOWN_RANGES = 10


def needle_text(needle: bytes) -> str:
    """Return bytes from the command line as text that every output can encode."""
    return needle.decode("utf-8", "backslashreplace")


def snoop_json(report: SnoopReport) -> dict[str, object]:
    """Return the facts of a report; addresses are hex strings."""
    strings, repeats = report.strings, report.repeats
    return {
        "size": report.size,
        "pages": {
            "zero": report.pages.zero,
            "plain": report.pages.plain,
            "encrypted": report.pages.encrypted,
        },
        "entropy_thresholds": {
            "min": round(ENTROPY_MIN, 6),
            "max": round(ENTROPY_MAX, 6),
        },
        "strings": {
            "count": strings.count,
            "by_chance": report.strings_by_chance,
            "shown": [
                {"address": hex(one.address), "length": one.length, "text": one.text}
                for one in strings.shown
            ],
        },
        "find": {
            needle_text(needle): [hex(address) for address in addresses]
            for needle, addresses in report.finds.items()
        },
        "duplicates": {
            "count": report.duplicates.count,
            "exact": report.duplicates.exact,
        },
        "repeats": None if repeats is None else _repeats_json(repeats),
    }


def _repeats_json(repeats: Repeats) -> dict[str, object]:
    return {
        "pages": repeats.pages,
        "unchanged_pages": repeats.unchanged_pages,
        "partly_equal_pages": repeats.partly_equal_pages,
        "blocks": repeats.blocks,
        "ranges": {
            "count": repeats.num_ranges,
            "shown": [[hex(start), hex(end)] for start, end in repeats.ranges],
        },
    }


def snoop_lines(report: SnoopReport, title: str) -> Iterator[Text]:
    """Yield the lines of a report: map, totals, strings, finds, repeats."""
    written = (report.pages.plain + report.pages.encrypted) * PAGE_SIZE
    yield Text(
        f"DRAM of {title}: {size_text(report.size)}, "
        f"{size_text(written)} in pages that are not zero",
        style="bold",
    )
    yield Text()
    yield from _map_lines(report)
    yield Text()
    yield from _total_lines(report)
    yield Text()
    yield from _string_lines(report.strings, report.strings_by_chance)
    for needle, addresses in report.finds.items():
        yield _find_line(needle, addresses)
    yield _duplicate_line(report.duplicates)
    if report.repeats is not None:
        yield Text()
        yield from _repeat_lines(report.repeats)


def _map_lines(report: SnoopReport) -> Iterator[Text]:
    layout = memory_map(report, COLUMNS, MAX_ROWS)
    legend = Text(f"one character is {size_text(layout.region_size)}:")
    for mark, style, name in zip(MARKS, STYLES, CELL_NAMES, strict=False):
        legend.append("  ").append(mark, style).append(f" {name}")
    yield legend
    width = len(f"{report.size:#x}")
    for part in layout.parts:
        yield _map_line(part, width)


def _map_line(part: Part, width: int) -> Text:
    if isinstance(part, Gap):
        gap = f"... {size_text(part.length)} never written or zero ..."
        return Text(f"{'':{width}}  {gap}", style="bright_black")
    line = Text(f"{part.address:#{width}x}  ")
    for cell, run in groupby(part.cells.tolist()):
        line.append(MARKS[cell] * len(list(run)), STYLES[cell])
    line.rstrip()
    return line


def _total_lines(report: SnoopReport) -> Iterator[Text]:
    counts = (report.pages.zero, report.pages.plain, report.pages.encrypted)
    for name, style, pages in zip(CELL_NAMES, STYLES, counts, strict=False):
        line = Text(f"{name:18}", style=style)
        line.append(f"{pages:10} pages  {size_text(pages * PAGE_SIZE):>10}", "default")
        yield line
    yield Text("(compressed data and random numbers are encrypted-looking too)")


def _string_lines(strings: FoundStrings, by_chance: int) -> Iterator[Text]:
    line = Text(f"strings: {strings.count}", style="bold")
    if by_chance:
        line.append(f", chance alone makes about {by_chance} of ciphertext")
    if strings.shown and len(strings.shown) < strings.count:
        line.append(f"; the {len(strings.shown)} most word-like:")
    yield line
    for one in strings.shown:
        text = one.text
        if one.length > SHOWN_TEXT:
            text = f"{text[:SHOWN_TEXT]} ... ({one.length} characters)"
        yield Text(f"  {one.address:#14x}  {text}")


def _find_line(needle: bytes, addresses: list[PhysAddr]) -> Text:
    line = Text(f'find "{_one_line(needle)}": ', style="bold")
    if not addresses:
        return line.append("not found", "not bold green")
    line.append(f"{len(addresses)} found", "not bold red")
    shown = ", ".join(hex(address) for address in addresses[:SHOWN_ADDRESSES])
    line.append(f" at {shown}", "not bold default")
    if len(addresses) > SHOWN_ADDRESSES:
        line.append(" ... (--json lists all)", "not bold default")
    return line


def _one_line(needle: bytes) -> str:
    text = needle_text(needle)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _duplicate_line(duplicates: Duplicates) -> Text:
    about = "" if duplicates.exact else "about "
    line = Text(f"equal blocks inside: {about}{duplicates.count}", style="bold")
    if duplicates.count:
        line.append(
            " (ciphertext with an address tweak does not repeat: compressed data "
            "stored twice, or no tweak)",
            "not bold default",
        )
    return line


def _repeat_lines(repeats: Repeats) -> Iterator[Text]:
    yield Text(
        f"ciphertext repeats: {repeats.blocks} blocks of 16 bytes are the same "
        "in both snapshots",
        style="bold",
    )
    changed = repeats.pages - repeats.unchanged_pages - repeats.partly_equal_pages
    yield Text(
        f"  {repeats.pages} encrypted-looking pages compared: "
        f"{repeats.unchanged_pages} unchanged, {repeats.partly_equal_pages} changed "
        f"in part, {changed} changed wholly"
    )
    for start, end in repeats.ranges[:SHOWN_RANGES]:
        yield Text(f"  {start:#x}..{end:#x}  {size_text(end - start)}")
    if repeats.num_ranges > SHOWN_RANGES:
        yield Text(f"  ... {repeats.num_ranges - SHOWN_RANGES} more ranges")
