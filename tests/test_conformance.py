"""Requirements, marks and CONFORMANCE.md agree; and the machinery that says so works.

The tests of a row are taken from the text of the tests (tests/conformance/marks.py says
why), so a stale report fails in `make check` too, which runs but two files of tests.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conformance import marks, report, requirements
from .conformance.report import Outcome
from .conformance.requirements import ROOT, Requirement, RequirementsError

ROWS = requirements.read()
TESTS_OF = marks.tests_by_requirement(marks.scan())

FOUNDED = {
    "WP": "1-35 40-56 60-64 70-80 90-95",
    "CM": "1-14 20-23 30-41 50-62 70-79",
    "PT": "1-3 10-17 20-27 30-48 50-58",
    "LB": "1-11 20-25 30-39 50-67 70-84 90-94 100-103",
    "MC": "1-39",
    "BZ": "1-14",
}
"""Rows that were there from the start: a row may be added, none may vanish."""

RUN = [
    sys.executable,
    *("-m", "pytest", "--import-mode=importlib", "-p", "no:cacheprovider"),
    *("--conformance=report.md", "tests"),
]


def numbers(ranges: str) -> set[int]:
    pairs = (part.split("-") for part in ranges.split())
    return {n for first, *last in pairs for n in range(int(first), int(last[0]) + 1)}


def row(row_id: str = "WP-1", **keys: str) -> Requirement:
    texts = {"statement": "a claim", "source": "[X]", **keys}
    return Requirement(id=row_id, verified=True, code=(), **texts)


# What the tree says


@pytest.mark.parametrize("group", FOUNDED)
def test_no_requirement_was_dropped(group: str) -> None:
    ids = {f"{group}-{number}" for number in numbers(FOUNDED[group])}
    assert ids - set(ROWS) == set()


def test_every_mark_names_a_requirement() -> None:
    assert sorted(set(TESTS_OF) - set(ROWS)) == []


def test_what_cannot_be_observed_has_no_tests() -> None:
    hidden = {row.id for row in ROWS.values() if row.not_observable}
    assert sorted(hidden & set(TESTS_OF)) == []


def test_every_place_of_code_is_there() -> None:
    found = [requirements.code_complaints(row) for row in ROWS.values()]
    assert [complaint for complaints in found for complaint in complaints] == []


def test_every_source_key_is_defined() -> None:
    defined = (ROOT / "SOURCES.md").read_text()
    for entry in ROWS.values():
        keys = re.findall(r"\[[A-Z][A-Za-z0-9-]+\]", entry.source)
        assert [key for key in keys if f"| {key} |" not in defined] == [], entry.id


def test_the_report_is_not_stale(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--conformance"):
        pytest.skip("this run writes the report")
    file = ROOT / "CONFORMANCE.md"
    text = file.read_text() if file.exists() else ""
    stale = report.staleness(text, ROWS, TESTS_OF)
    assert not stale, stale


# Requirements


HEAD = '[WP-1]\nstatement = "s"\nsource = "x"\nverified = true\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (HEAD, "WP-1: code is missing"),
        (f"{HEAD}code = [3]", "WP-1: code must be a list"),
        (f"{HEAD}code = 'hw/x.py'", "WP-1: code must be a list"),
        (f"{HEAD}code = []\nopen = ' '", "WP-1: open must be a text"),
        (f"{HEAD}code = []\nstatus = 'open'", "WP-1: nothing is called status"),
        (f"{HEAD}code = []\nopen = 'a'\nnot_observable = 'b'", "exclude each other"),
        (f"{HEAD}code = []\n{HEAD}code = []", "Cannot declare ('WP-1',) twice"),
        (HEAD.replace("true", "false") + "code = []", "no note says why"),
        (HEAD.replace("true", "1") + "code = []", "must be true or false"),
        (HEAD.replace("WP-1", "WP-01") + "code = []", "WP-01: no id of the form"),
        ("WP-1 = 3", "WP-1: a row is a table"),
    ],
)
def test_a_row_that_breaks_a_rule_is_named(text: str, complaint: str) -> None:
    with pytest.raises(RequirementsError, match=re.escape(complaint)):
        requirements.parse(text)


def test_rows_stand_in_order_and_tables_last() -> None:
    ids = ["WP-9", "WP-10", "WP-T1", "CM-1"]
    tables = [HEAD.replace("WP-1", row_id) + "code = []\n" for row_id in ids]
    assert list(requirements.parse("".join(tables))) == ids
    with pytest.raises(RequirementsError, match="WP-10 stands where WP-9 belongs"):
        requirements.parse("".join([tables[1], tables[0], *tables[2:]]))


def test_lines_of_a_statement_are_joined() -> None:
    text = HEAD.replace('"s"', '"""\none\ntwo"""') + "code = []"
    assert requirements.parse(text)["WP-1"].statement == "one two"


@pytest.mark.parametrize(
    ("place", "complaints"),
    [
        ("x.py", []),
        ("x.py:f", []),
        ("x.py:A", []),
        ("x.py:A.m", []),
        ("x.py:A.field", []),
        ("x.py:LIMIT", []),
        ("x.S", []),
        ("y.py", ["WP-1: y.py is not there"]),
        ("x.py:g", ["WP-1: x.py does not define g"]),
        ("x.py:m", ["WP-1: x.py does not define m"]),
        ("x.S:f", ["WP-1: x.S is no Python, it cannot hold f"]),
    ],
)
def test_code_must_be_where_the_row_says(
    tmp_path: Path, place: str, complaints: list[str]
) -> None:
    (tmp_path / "x.py").write_text(
        "LIMIT: int = 3\ndef f(): g = 1\nclass A:\n  field = 2\n  def m(self): pass\n"
    )
    (tmp_path / "x.S").write_text("f:\n")
    entry = Requirement("WP-1", "s", "x", True, (place,))
    assert requirements.code_complaints(entry, tmp_path) == complaints


# Marks


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("@pytest.mark.req('A', 'B')\ndef test_x(): pass", {"test_x": {"A", "B"}}),
        ("@mark.req('A')\nasync def test_x(): pass", {"test_x": {"A"}}),
        ("pytestmark = pytest.mark.req('A')\ndef test_x(): pass", {"test_x": {"A"}}),
        ("pytestmark = [pytest.mark.req('A')]\ndef test_x(): pass", {"test_x": {"A"}}),
        (
            "@pytest.mark.parametrize('p', [pytest.param(1, marks=mark.req('A')), 2])\n"
            "def test_x(p): pass",
            {"test_x": {"A"}},
        ),
        (
            "ONE = pytest.param(1, marks=[pytest.mark.req('A')])\nALL = [ONE, 2]\n"
            "@pytest.mark.parametrize('p', ALL)\ndef test_x(p): pass",
            {"test_x": {"A"}},
        ),
        (
            "@pytest.mark.req('A')\nclass TestX:\n  pytestmark = mark.req('B')\n"
            "  @pytest.mark.req('C')\n  def test_y(self): pass\n  def other(self): ...",
            {"TestX::test_y": {"A", "B", "C"}},
        ),
        (
            "pytestmark = mark.req('A')\nTestLaws = Laws.TestCase\n"
            "@mark.req('B')\nclass TestMore(More.TestCase): pass",
            {"TestLaws::runTest": {"A"}, "TestMore::runTest": {"A", "B"}},
        ),
        ("@other.req('A')\ndef test_x(): pass", {"test_x": set()}),
        ("@pytest.mark.req('A')\ndef fixture(): pass", {}),
    ],
)
def test_a_mark_is_found_in_every_form(text: str, found: dict[str, set[str]]) -> None:
    assert marks.marks_in(text, "test_a.py") == found


def test_an_id_that_is_not_written_out_is_refused() -> None:
    text = "IDS = ['A']\n@pytest.mark.req(*IDS)\ndef test_x(): pass"
    with pytest.raises(marks.MarkError, match=r"^test_a.py, line 2: .*`\*IDS`"):
        marks.marks_in(text, "test_a.py")


# The report


@pytest.mark.parametrize(
    ("keys", "tests", "outcome", "expected"),
    [
        ({}, ["t"], Outcome.PASSED, ("passed", "")),
        ({}, ["t"], Outcome.FAILED, ("failed", "")),
        ({}, ["t"], Outcome.NOT_RUN, ("not run", "")),
        ({}, [], Outcome.NOT_RUN, ("UNCOVERED", "")),
        ({"open": "SEV"}, [], Outcome.NOT_RUN, ("open", "SEV")),
        ({"open": "SEV"}, ["t"], Outcome.PASSED, ("partly", "open: SEV")),
        ({"open": "SEV"}, ["t"], Outcome.FAILED, ("failed", "open: SEV")),
        (
            {"not_observable": "why"},
            [],
            Outcome.NOT_RUN,
            ("not observable here", "why"),
        ),
    ],
)
def test_a_state_says_what_is_and_what_is_missing(
    keys: dict[str, str], tests: list[str], outcome: Outcome, expected: tuple[str, str]
) -> None:
    assert report.state(row(**keys), tests, outcome) == expected


@pytest.mark.parametrize(
    ("outcomes", "whole"),
    [
        ([Outcome.PASSED, Outcome.FAILED], Outcome.FAILED),
        ([Outcome.NOT_RUN, Outcome.PASSED], Outcome.PASSED),
        ([], Outcome.NOT_RUN),
    ],
)
def test_one_failed_test_fails_the_row(outcomes: list[Outcome], whole: Outcome) -> None:
    assert report.overall(outcomes) is whole


SMALL = {
    "WP-1": row("WP-1", statement="set `pa | C`", open="SEV"),
    "WP-2": row("WP-2", note="one | two"),
    "WP-3": row("WP-3"),
    "CM-1": row("CM-1"),
    "PT-1": row("PT-1", not_observable="no | timing"),
}
SMALL_TESTS = {"WP-1": ["t_1"], "WP-2": list("abcde"), "WP-3": ["c"]}
SMALL_OUTCOMES = {
    "WP-1": Outcome.PASSED,
    "WP-2": Outcome.FAILED,
    "WP-3": Outcome.NOT_RUN,
}


def test_a_report_tells_its_outcomes_again() -> None:
    text = report.render(SMALL, SMALL_TESTS, SMALL_OUTCOMES)
    assert report.outcomes_in(text) == SMALL_OUTCOMES
    assert report.staleness(text, SMALL, SMALL_TESTS) == ""


def test_a_report_shows_what_a_reader_asks_for() -> None:
    lines = report.render(SMALL, SMALL_TESTS, SMALL_OUTCOMES).splitlines()
    assert (
        r"| WP-1 | set `pa \| C` | [X] |  | `t_1` | partly (open: SEV) |" in lines
    )  # a bar inside a cell is escaped
    assert (
        r"| WP-2 | a claim | [X] (one \| two) |  | `a`<br>`b`<br>`c`<br>+2 more "
        "| failed |" in lines
    )
    assert "| all | 5 | 0 | 1 | 1 | 1 | 0 | 1 | 1 |" in lines
    assert "failed: WP-2" in lines
    assert "UNCOVERED: CM-1" in lines


@pytest.mark.parametrize(
    ("rows", "tests"),
    [
        (SMALL | {"WP-3": row("WP-3", statement="other")}, SMALL_TESTS),
        (SMALL | {"WP-1": row("WP-1", statement="set `pa | C`")}, SMALL_TESTS),
        (SMALL | {"BZ-1": row("BZ-1")}, SMALL_TESTS),
        (SMALL, SMALL_TESTS | {"CM-1": ["new"]}),
        (SMALL, SMALL_TESTS | {"WP-3": []}),
        (SMALL, SMALL_TESTS | {"WP-2": list("abcd")}),
    ],
    ids=["statement", "no longer open", "row", "covered", "uncovered", "one less"],
)
def test_a_change_makes_the_report_stale(
    rows: dict[str, Requirement], tests: dict[str, list[str]]
) -> None:
    text = report.render(SMALL, SMALL_TESTS, SMALL_OUTCOMES)
    assert "run `make conformance`" in report.staleness(text, rows, tests)


# The plugin, in a small project of its own


@pytest.fixture
def project(tmp_path: Path) -> Path:
    tests = tmp_path / "tests"
    ours = Path(__file__).with_name("conformance")
    shutil.copytree(ours, tests / "conformance", ignore=shutil.ignore_patterns("__*"))
    (tests / "conftest.py").write_text("from .conformance.plugin import *")
    rows = [HEAD.replace("WP-1", f"WP-{n}") + "code = []\n" for n in range(1, 5)]
    (tests / "requirements.toml").write_text("".join(rows))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = req(*ids): ids\n")
    return tmp_path


def run(project: Path, tests: str) -> subprocess.CompletedProcess[str]:
    text = f"import pytest\nreq = pytest.mark.req\n{tests}"
    (project / "tests" / "test_a.py").write_text(text)
    paths = os.pathsep.join(sys.path)  # a relative PYTHONPATH ends at the next line
    return subprocess.run(
        RUN,
        cwd=project,
        env=os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_run_reports_failures_and_skipped_tests(project: Path) -> None:
    done = run(
        project,
        "@pytest.mark.req('WP-1', 'WP-2')\ndef test_a(): pass\n"
        "@pytest.mark.req('WP-2')\ndef test_b(): assert 0\n"
        "@pytest.mark.req('WP-3')\ndef test_c(): pytest.skip('why')\n"
        "@pytest.mark.parametrize('n', [0, pytest.param(1, "
        "marks=pytest.mark.req('WP-4'))])\ndef test_d(n): assert n\n",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "report.md written" in done.stdout
    outcomes = report.outcomes_in((project / "report.md").read_text())
    assert outcomes == {
        "WP-1": Outcome.PASSED,
        "WP-2": Outcome.FAILED,
        "WP-3": Outcome.NOT_RUN,
        "WP-4": Outcome.PASSED,  # test_d[0] fails, and does not carry the id
    }


@pytest.mark.parametrize(
    ("tests", "complaint"),
    [
        (
            "@pytest.mark.req('WP-1', 'WP-99')\ndef test_a(): pass",
            "tests/test_a.py::test_a: WP-99 is not in tests/requirements.toml",
        ),
        (
            "@getattr(pytest.mark, 'req')('WP-1')\ndef test_a(): pass",
            "tests/test_a.py::test_a: WP-1 is not written at the test",
        ),
        (
            "@pytest.mark.req()\ndef test_a(): pass",
            "tests/test_a.py::test_a: req names no requirement",
        ),
        (
            "IDS = ['WP-1']\n@pytest.mark.req(*IDS)\ndef test_a(): pass",
            "write the ids of req out",
        ),
    ],
    ids=["unknown", "hidden", "empty", "computed"],
)
def test_a_wrong_mark_stops_the_collection(
    project: Path, tests: str, complaint: str
) -> None:
    (project / "report.md").write_text("as it was")
    done = run(project, tests)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert complaint in done.stderr
    assert (project / "report.md").read_text() == "as it was"
