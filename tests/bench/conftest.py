"""Ratios measured in one run: two functions in turn, the best time of each."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

Function = Callable[[], object]


@dataclass(frozen=True)
class Measured:
    """One line of the table: what was compared, the ratio, and what is asked."""

    what: str
    ratio: float
    limit: str


LINES = pytest.StashKey[list[Measured]]()


class Ratios:
    """Compares times and keeps the table."""

    def __init__(self, lines: list[Measured]) -> None:
        self._lines = lines

    def times(self, *functions: Function, rounds: int = 9) -> list[float]:
        """Return the best time of each, in seconds; the functions take turns."""
        best = [float("inf")] * len(functions)
        for _ in range(rounds):
            for index, function in enumerate(functions):
                start = time.perf_counter()
                function()
                best[index] = min(best[index], time.perf_counter() - start)
        return best

    def note(self, what: str, ratio: float, limit: str = "") -> float:
        """Add a line to the table and return the ratio."""
        self._lines.append(Measured(what, ratio, limit))
        return ratio


@pytest.fixture
def ratios(request: pytest.FixtureRequest) -> Ratios:
    return Ratios(request.config.stash.setdefault(LINES, []))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(LINES, [])
    if not lines:
        return
    terminalreporter.section("ratios of this run")
    width = max(len(line.what) for line in lines)
    for line in lines:
        terminalreporter.write_line(
            f"{line.what:<{width}}  {line.ratio:8.2f}   {line.limit}"
        )
