"""CONFORMANCE.md: each requirement with its source, code, tests and state.

The text depends on the requirements, the marks and the outcomes alone: no date, no
duration, no machine. So it is checked in, and a reader of the file can find out whether
it is stale by rendering it again with the outcomes that it states itself.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import islice

from .requirements import GROUPS, Requirement

Rows = Mapping[str, Requirement]
TestsOf = Mapping[str, Sequence[str]]
"""The tests of an id, as `marks.tests_by_requirement` gives them."""

TESTS_SHOWN = 3
_KINDS = [
    "passed",
    "partly",
    "failed",
    "not run",
    "open",
    "not observable here",
    "UNCOVERED",
]


class Outcome(Enum):
    """What running the tests of a row came to."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


def overall(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a row from those of its tests: the worst that ran."""
    found = set(outcomes)
    for outcome in (Outcome.FAILED, Outcome.PASSED):
        if outcome in found:
            return outcome
    return Outcome.NOT_RUN


def state(row: Requirement, tests: Sequence[str], outcome: Outcome) -> tuple[str, str]:
    """Return one of the seven kinds of state, and the reason for it or ''.

    Args:
        row: the requirement.
        tests: those that carry its id.
        outcome: what they came to; without meaning if there are none.
    """
    if row.not_observable:
        return "not observable here", row.not_observable
    if tests:
        partly = row.open and outcome is Outcome.PASSED
        return "partly" if partly else outcome.value, row.open and f"open: {row.open}"
    return ("open", row.open) if row.open else ("UNCOVERED", "")


def render(rows: Rows, tests: TestsOf, outcomes: Mapping[str, Outcome]) -> str:
    """Return the whole text of CONFORMANCE.md.

    Args:
        rows: every requirement by id, in the order of the report.
        tests: the tests of each id that has some.
        outcomes: what they came to; an id that is missing was not run.
    """
    kinds: dict[str, Counter[str]] = {group: Counter() for group in GROUPS}
    table: dict[str, list[str]] = {group: [] for group in GROUPS}
    unwell: dict[str, list[str]] = {"failed": [], "UNCOVERED": []}
    for row in rows.values():
        found = tests.get(row.id, [])
        kind, why = state(row, found, outcomes.get(row.id, Outcome.NOT_RUN))
        kinds[row.group][kind] += 1
        if kind in unwell:
            unwell[kind].append(row.id)
        cells = [
            row.id,
            row.statement,
            _source(row),
            _list(row.code, len(row.code)),
            _list(found, TESTS_SHOWN),
            f"{kind} ({why})" if why else kind,
        ]
        table[row.group].append(_line(cells))
    return "\n".join([*_summary(kinds, unwell), *_tables(table)])


def outcomes_in(text: str) -> dict[str, Outcome]:
    """Return the outcomes that a report states, of the rows that have tests."""
    words = {outcome.value: outcome for outcome in Outcome}
    words["partly"] = Outcome.PASSED
    pattern = rf"^\| ((?:{'|'.join(GROUPS)})-\w+) \|.*(?<!\\)\| ({'|'.join(words)})\b"
    return {row_id: words[word] for row_id, word in re.findall(pattern, text, re.M)}


def staleness(text: str, rows: Rows, tests: TestsOf) -> str:
    """Return '' if `text` is the report of these rows and tests, else what differs."""
    now = render(rows, tests, outcomes_in(text))
    if text == now:
        return ""
    lines = difflib.unified_diff(
        text.splitlines(), now.splitlines(), "CONFORMANCE.md", "the tree", "", "", 0, ""
    )
    return "\n".join(
        ["CONFORMANCE.md is stale: run `make conformance`.", *islice(lines, 12)]
    )


def _summary(
    kinds: Mapping[str, Counter[str]], unwell: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    yield from [*_INTRODUCTION.splitlines(), ""]
    yield _line(["Group", "Rows", *_KINDS])
    yield _line(["---", *["---:" for _ in range(1 + len(_KINDS))]])
    total: Counter[str] = sum(kinds.values(), Counter())
    for name, count in [*kinds.items(), ("all", total)]:
        numbers = [str(count[kind]) for kind in _KINDS]
        yield _line([name, str(count.total()), *numbers])
    for kind, ids in unwell.items():
        yield ""
        yield f"{kind}: {', '.join(ids) or 'none'}"


def _tables(table: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for group, lines in table.items():
        yield from ["", f"## {group}: {GROUPS[group]}", ""]
        yield _line(["Id", "Requirement", "Source", "Code", "Tests", "State"])
        yield _line(["---"] * 6)
        yield from lines
    yield ""


def _source(row: Requirement) -> str:
    if row.verified:
        return f"{row.source} ({row.note})" if row.note else row.source
    return f"{row.source}; unverified: {row.note}"


def _list(names: Sequence[str], shown: int) -> str:
    cells = [f"`{name}`" for name in names[:shown]]
    if len(names) > shown:
        cells.append(f"+{len(names) - shown} more")
    return "<br>".join(cells)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


_INTRODUCTION = """\
# Conformance

Every requirement of tests/requirements.toml with the tests that observe it, and what
they came to. Written by `make conformance`; do not edit. A test names its requirements
with `@pytest.mark.req("LB-9")`. Keys in brackets are defined in SOURCES.md.

- passed, failed, not run: what the row's tests came to; not run: they were skipped, or
  not selected
- partly: the tests pass, and what the row names as open is not there yet
- open: a later capability brings it
- not observable here: no test can see it, for the reason given
- UNCOVERED: no test, and no reason why
"""
