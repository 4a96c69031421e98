"""The pytest side: refuses a mark that names no requirement, writes CONFORMANCE.md.

tests/conftest.py takes the three hooks below. `--conformance=PATH` runs the tests as
usual and then writes the report, of failed tests too; a run that does not come to its
end (a module that cannot be imported, an interrupt) leaves the old file as it is.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from cbit.tools.output_file import output_file

from . import marks, report, requirements
from .report import Outcome


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--conformance=PATH`."""
    parser.addoption(
        "--conformance",
        metavar="PATH",
        help="write there what each requirement's tests came to",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Watch the run if its report is wanted."""
    path = config.getoption("--conformance")
    if path and not config.getoption("collectonly"):
        watch = Recorder(config.invocation_params.dir / path)
        config.pluginmanager.register(watch, "conformance-recorder")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse to run tests whose marks name no requirement, or hide from the scan.

    Raises:
        pytest.UsageError: with one line for each test and id.
    """
    try:
        rows = requirements.read()
        complaints = [line for item in items for line in _complaints(item, set(rows))]
    except (requirements.RequirementsError, marks.MarkError) as error:
        raise pytest.UsageError(str(error)) from None
    if complaints:
        raise pytest.UsageError("\n".join(complaints))


class Recorder:
    """Gathers the outcome of every test and writes the report at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ids: dict[str, list[str]] = {}
        self.outcomes: dict[str, list[Outcome]] = {}
        self.written = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the requirements of each test that will run."""
        self.ids = {item.nodeid: _ids(item) for item in session.items}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what a phase of a test came to; an expected failure is a failure."""
        if report.failed or (report.skipped and hasattr(report, "wasxfail")):
            outcome = Outcome.FAILED
        elif report.when == "call" and report.passed:
            outcome = Outcome.PASSED
        else:
            return
        for row_id in self.ids.get(report.nodeid, []):
            self.outcomes.setdefault(row_id, []).append(outcome)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the report of a run that came to its end."""
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            tests = marks.tests_by_requirement(marks.scan())
            outcomes = {i: report.overall(found) for i, found in self.outcomes.items()}
            text = report.render(requirements.read(), tests, outcomes)
            with output_file(self.path) as file:
                file.write(text.encode())
            self.written = True

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Say whether the report was written."""
        said = "written" if self.written else "not written, the run came to no end"
        terminalreporter.write_line(f"conformance: {self.path} {said}")


def _ids(item: pytest.Item) -> list[str]:
    return [row_id for mark in item.iter_markers("req") for row_id in mark.args]


def _complaints(item: pytest.Item, known: set[str]) -> list[str]:
    complaints = [
        f"{item.nodeid}: {mark.name} names no requirement"
        for mark in item.iter_markers("req")
        if not mark.args
    ]
    test = item.nodeid.partition("::")[2].partition("[")[0]
    for row_id in _ids(item):
        if row_id not in known:
            complaints.append(
                f"{item.nodeid}: {row_id} is not in tests/requirements.toml"
            )
        elif row_id not in _scanned(item.path).get(test, ()):
            complaints.append(
                f"{item.nodeid}: {row_id} is not written at the test; "
                "tests/conformance/marks.py says where the scan looks for it"
            )
    return complaints


@cache
def _scanned(file: Path) -> dict[str, set[str]]:
    return marks.marks_in(file.read_text(), file.name)
