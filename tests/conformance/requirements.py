"""The numbered requirements: reads tests/requirements.toml and finds what is wrong.

The file's head explains its keys. Reading is strict: every complaint is collected and
raised at once, so that a row can be added or flipped by hand without a second tool.
"""

import ast
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
REQUIREMENTS = TESTS / "requirements.toml"

GROUPS = {
    "WP": 'White paper "AMD Memory Encryption" (April 2016)',
    "CM": "CPUID and model-specific registers",
    "PT": "Page tables with the C-bit",
    "LB": "What Linux 6.1 does to turn SME on",
    "MC": "The memory cipher",
    "BZ": "Bug classes of real code",
}
"""Groups of rows by the letters their ids begin with, in the order of the report."""

_ID = re.compile(rf"({'|'.join(GROUPS)})-(T?)([1-9][0-9]*)")
_REQUIRED = {"statement", "source", "verified", "code"}


class RequirementsError(ValueError):
    """The file of requirements is not what its head says; one line per complaint."""


@dataclass(frozen=True)
class Requirement:
    """One row; the keys are those of the file, an absent text is empty."""

    id: str
    statement: str
    source: str
    verified: bool
    code: tuple[str, ...]
    note: str = ""
    open: str = ""
    not_observable: str = ""

    @property
    def group(self) -> str:
        """The letters of the id, a key of `GROUPS`."""
        return self.id.partition("-")[0]


_TEXTS = {field.name for field in fields(Requirement)} - {"id", "verified", "code"}


def read() -> dict[str, Requirement]:
    """Return the rows of tests/requirements.toml by id, in the order of the file.

    Raises:
        RequirementsError: the file breaks a rule; the message names every place.
    """
    return parse(REQUIREMENTS.read_text())


def parse(text: str) -> dict[str, Requirement]:
    """Return the rows that `text` holds, by id; raises as `read` does.

    TOML itself refuses an id that is given twice.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequirementsError(f"requirements.toml: {error}") from None
    complaints = [
        f"requirements.toml: {row_id}: {complaint}"
        for row_id, table in tables.items()
        for complaint in _row_complaints(row_id, table)
    ]
    if not complaints:
        complaints = list(_order_complaints(list(tables)))
    if complaints:
        raise RequirementsError("\n".join(complaints))
    return {row_id: _row(row_id, table) for row_id, table in tables.items()}


def code_complaints(row: Requirement, root: Path = ROOT) -> list[str]:
    """Return what is wrong with the places that `row` names as its code.

    Args:
        row: the requirement; each place is "path" or "path:name".
        root: the folder that the paths are relative to.

    Returns:
        One line for each path that is no file and each name not defined in it.
    """
    complaints = []
    for place in row.code:
        path, _, name = place.partition(":")
        file = root / path
        if not file.is_file():
            complaints.append(f"{row.id}: {path} is not there")
        elif name and file.suffix != ".py":
            complaints.append(f"{row.id}: {path} is no Python, it cannot hold {name}")
        elif name and name not in defined_names(ast.parse(file.read_text()).body):
            complaints.append(f"{row.id}: {path} does not define {name}")
    return complaints


def defined_names(body: Sequence[ast.stmt]) -> set[str]:
    """Return the functions, classes and variables of a module, members with a dot."""
    names = set()
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=members):
                names |= {name, *(f"{name}.{m}" for m in defined_names(members))}
            case ast.Assign(targets=targets):
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.If(body=then, orelse=other):
                names |= defined_names([*then, *other])
    return names


def _row_complaints(row_id: str, table: Any) -> Iterator[str]:
    if not _ID.fullmatch(row_id):
        yield f"no id of the form {'|'.join(GROUPS)}-7 or -T7"
    if not isinstance(table, dict):
        yield "a row is a table"
        return
    keys = set(table)
    for key in sorted(_REQUIRED - keys):
        yield f"{key} is missing"
    for key in sorted(keys - _REQUIRED - _TEXTS):
        yield f"nothing is called {key} here"
    for key in sorted(keys & _TEXTS):
        if not isinstance(table[key], str) or not table[key].strip():
            yield f"{key} must be a text and say something"
    if not isinstance(table.get("verified", True), bool):
        yield "verified must be true or false"
    if table.get("verified") is False and "note" not in table:
        yield "unverified, and no note says why"
    if {"open", "not_observable"} <= keys:
        yield "open and not_observable exclude each other"
    code = table.get("code", [])
    if not isinstance(code, list) or not all(isinstance(c, str) and c for c in code):
        yield 'code must be a list of "path" or "path:name"'


def _order_complaints(ids: list[str]) -> Iterator[str]:
    ordered = sorted(ids, key=_order)
    for found, expected in zip(ids, ordered, strict=True):
        if found != expected:
            yield f"requirements.toml: {found} stands where {expected} belongs"
            return


def _order(row_id: str) -> tuple[int, bool, int]:
    group, table, number = _ID.fullmatch(row_id).groups()  # type: ignore[union-attr]
    return list(GROUPS).index(group), bool(table), int(number)


def _row(row_id: str, table: dict[str, Any]) -> Requirement:
    texts = {key: " ".join(table[key].split()) for key in _TEXTS & set(table)}
    return Requirement(
        id=row_id, verified=table["verified"], code=tuple(table["code"]), **texts
    )
