"""Which tests carry which requirement, read from the text of the tests.

The text is scanned, not asked of a pytest run: what a run collects depends on where it
runs (a module that needs an optional library vanishes as a whole) and on what was
selected (`make check` runs two files), while CONFORMANCE.md is checked in and must be
the same everywhere. The scan sees only what is written out, with literal ids, in the
test's own module: at the function, its class, `pytestmark`, in its parametrize, or in a
variable of the module that one of these names. So that nothing else goes unnoticed, the
plugin compares what it collects with the scan and refuses a mark the scan did not see.
"""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from .requirements import TESTS


class MarkError(ValueError):
    """A mark of a requirement that the scan cannot read."""


def scan(tests: Path = TESTS) -> dict[str, set[str]]:
    """Return the requirement ids of every test, by `hw/test_paging.py::test_name`.

    Args:
        tests: the folder of tests; names in the result are relative to it.

    Raises:
        MarkError: an id is computed instead of written out.
    """
    found = {}
    for file in sorted(tests.rglob("test_*.py")):
        place = file.relative_to(tests).as_posix()
        for test, ids in marks_in(file.read_text(), place).items():
            found[f"{place}::{test}"] = ids
    return found


def tests_by_requirement(marks: dict[str, set[str]]) -> dict[str, list[str]]:
    """Turn the result of `scan` around: the tests of every id, sorted."""
    tests: dict[str, list[str]] = {}
    for test in sorted(marks):
        for row_id in marks[test]:
            tests.setdefault(row_id, []).append(test)
    return tests


def marks_in(text: str, place: str) -> dict[str, set[str]]:
    """Return the ids of each test of one module, by `test_name` or `Class::test_name`.

    Args:
        text: the module's source.
        place: its name for messages.

    Raises:
        MarkError: an id is computed instead of written out.
    """
    module = _Module(text, place)
    return dict(module.tests(module.tree.body, "", set()))


class _Module:
    """A module of tests and what its variables stand for."""

    def __init__(self, text: str, place: str) -> None:
        self.tree = ast.parse(text)
        self.place = place
        self.variables = dict(_assignments(self.tree.body))

    def tests(
        self, body: Sequence[ast.stmt], prefix: str, inherited: set[str]
    ) -> Iterator[tuple[str, set[str]]]:
        marks = dict(_assignments(body)).get("pytestmark")
        inherited = inherited | (set(self.ids(marks)) if marks else set())
        for node in body:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    if name.startswith("test"):
                        yield f"{prefix}{name}", inherited | self.decorations(node)
                case ast.ClassDef(name=name) if name.startswith("Test"):
                    ids = inherited | self.decorations(node)
                    yield from self.tests(node.body, f"{prefix}{name}::", ids)
                    if any(_is_state_machine(base) for base in node.bases):
                        yield f"{prefix}{name}::runTest", ids
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    if name.startswith("Test") and _is_state_machine(value):
                        yield f"{prefix}{name}::runTest", inherited

    def decorations(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ) -> set[str]:
        return {row_id for mark in node.decorator_list for row_id in self.ids(mark)}

    def ids(
        self, expression: ast.expr, seen: frozenset[str] = frozenset()
    ) -> Iterator[str]:
        """Yield the ids of every req mark inside, variables of the module looked up."""
        for node in ast.walk(expression):
            match node:
                case ast.Call(func=ast.Attribute(attr="req", value=holder)) if (
                    _last_name(holder) == "mark"
                ):
                    yield from (self.literal(argument) for argument in node.args)
                case ast.Name(id=name) if name in self.variables and name not in seen:
                    yield from self.ids(self.variables[name], seen | {name})

    def literal(self, argument: ast.expr) -> str:
        match argument:
            case ast.Constant(value=str(row_id)):
                return row_id
        raise MarkError(
            f"{self.place}, line {argument.lineno}: write the ids of req out, "
            f"`{ast.unparse(argument)}` cannot be read without running it"
        )


def _assignments(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value


def _is_state_machine(node: ast.expr) -> bool:
    """Is this `Laws.TestCase`, the test that hypothesis makes of a state machine?"""
    return isinstance(node, ast.Attribute) and node.attr == "TestCase"


def _last_name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""
