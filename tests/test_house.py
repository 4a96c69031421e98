"""The rules of the house: who imports whom, what is shipped, what the papers say.

Each rule about source text is a function from a file's place and text to complaints,
so that the rule itself is tried on a text that breaks it.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest

import cbit
from cbit.tools.cli import VERBS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

FLOORS = ["hw", "kernel", "dma", "boot", "tools"]  # ground floor first
SOFTWARE = ["kernel", "dma", "boot"]  # what runs on the machine and never peeks

ROOMS_FOR_SOFTWARE = {
    "cpu",
    "cpuid",
    "errors",
    "faults",
    "layouts",
    "msr",
    "paging",
    "registers",
    "trace",
    "types",
}
"""What software may import from hw/: the core, and the words of the manual."""

PEEKS = {
    "cache",
    "caches",
    "cells",
    "controller",
    "dram",
    "line_store",
    "lines",
    "machine",
    "psp",
    "snoop",
}
"""Attributes that lead behind the instructions."""

NOT_SHIPPED = {"tools/fetch-kernel"}
FOLDERS_AT_THE_ROOT = {*FLOORS, "examples", "tests", "build", "dist", "__pycache__"}
LINE_LIMIT = 550
EMPTY_NAME = re.compile(r"(^|_)(utils?|helpers?|common|misc|manager)(_|$)")
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|NotImplemented" r"Error)\b")

Rule = Callable[[PurePosixPath, str], list[str]]


def place(file: Path) -> PurePosixPath:
    """Return the path below the root, as ids and messages print it."""
    return PurePosixPath(file.relative_to(ROOT).as_posix())


def read(name: PurePosixPath | str) -> str:
    """Return the text of a file of the project."""
    return (ROOT / name).read_text("utf-8")


SHIPPED = [
    *(place(file) for file in sorted(ROOT.glob("*.py"))),
    *(place(f) for floor in FLOORS for f in sorted((ROOT / floor).rglob("*.py"))),
]
PYTHON = [*SHIPPED, *(place(file) for file in sorted((ROOT / "tests").rglob("*.py")))]
TEXTS = [
    *PYTHON,
    *(PurePosixPath(name) for name in (".ci/run", "Makefile", *sorted(NOT_SHIPPED))),
]


def imported(file: PurePosixPath, text: str) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each import with the full dotted name of what it brings.

    A relative import that leaves the package brings a name that begins with a dot.
    """
    package = ["cbit", *file.parts[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            parts = [*base, *(node.module or "").split(".")]
            for alias in node.names:
                name = ".".join(part for part in [*parts, alias.name] if part)
                yield node, name if base or not node.level else f".{name}"


def imports_run_downward(file: PurePosixPath, text: str) -> list[str]:
    """Complain of an import from a higher floor, or by the installed name."""
    floor = file.parts[0]
    reach = FLOORS[: FLOORS.index(floor) + 1] if floor in FLOORS else FLOORS
    complaints = []
    for node, name in imported(file, text):
        parts = name.split(".")
        if not (isinstance(node, ast.ImportFrom) and node.level):
            if parts[0] in {"cbit", *FLOORS}:
                complaints.append(f"line {node.lineno}: {name} is not relative")
        elif parts[0] != "cbit":
            complaints.append(f"line {node.lineno}: {name[1:]} is outside the package")
        elif parts[1] not in {*reach, "__version__"}:
            complaints.append(f"line {node.lineno}: {name} is above {floor}/")
    return complaints


def imports_are_statements(file: PurePosixPath, text: str) -> list[str]:
    """Complain of an import at run time; only the top floor loads verbs by name."""
    if file.parts[0] == FLOORS[-1]:
        return []
    return [
        f"line {node.lineno}: {name}"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and (name := _last_name(node)) in {"__import__", "import_module", "exec"}
    ]


def software_never_peeks(file: PurePosixPath, text: str) -> list[str]:
    """Complain where kernel/, dma/ or boot/ reaches behind the instructions."""
    if file.parts[0] not in SOFTWARE:
        return []
    complaints = [
        f"line {node.lineno}: {name} is no room for software"
        for node, name in imported(file, text)
        if name.startswith("cbit.hw.") and name.split(".")[2] not in ROOMS_FOR_SOFTWARE
    ]
    tree = ast.parse(text)
    own = _names_of_own_classes(tree)
    for node in ast.walk(tree):
        name = _attribute(node)
        private = re.fullmatch(r"_\w*[^_]", name) and name not in own
        if name in PEEKS or private:
            complaints.append(f"line {getattr(node, 'lineno', 0)}: .{name}")
    return complaints


def _last_name(node: ast.Attribute | ast.Name | ast.alias) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else node.name


def _attribute(node: ast.AST) -> str:
    """Return the attribute that `x.name` or `getattr(x, "name")` reads, or ''."""
    match node:
        case ast.Attribute(attr=str(name)):
            return name
        case ast.Call(
            func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *_]
        ):
            return name
    return ""


def _names_of_own_classes(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
    return names


def _modules_outside(file: PurePosixPath, text: str) -> dict[str, bool]:
    """Return third-party modules; True: needed as soon as `file` is imported."""
    late = {
        statement.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) or _for_type_checkers(node)
        for statement in ast.walk(node)
        if isinstance(statement, ast.stmt)
    }
    found: dict[str, bool] = {}
    for node, name in imported(file, text):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top != "cbit":
            found[top] = found.get(top, False) or node.lineno not in late
    return found


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _distributions(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {_normal(name[0]) for name in names if name}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


RULES: list[Rule] = [imports_run_downward, imports_are_statements, software_never_peeks]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("file", SHIPPED, ids=str)
def test_a_file_keeps_the_rule(rule: Rule, file: PurePosixPath) -> None:
    assert rule(file, read(file)) == []


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        (imports_run_downward, "hw/x.py", "from ..kernel.cc import me_mask"),
        (imports_run_downward, "hw/x.py", "from .. import tools"),
        (imports_run_downward, "hw/msr/x.py", "from ...boot import sme"),
        (imports_run_downward, "kernel/x.py", "def f():\n  from ..dma import pool"),
        (imports_run_downward, "kernel/x.py", "import cbit.hw.types"),
        (imports_run_downward, "kernel/x.py", "from cbit.hw import types"),
        (imports_run_downward, "kernel/x.py", "import hw.types"),
        (imports_run_downward, "kernel/x.py", "from ...other import x"),
        (imports_are_statements, "hw/x.py", "importlib.import_module('cbit.boot')"),
        (imports_are_statements, "hw/x.py", "from importlib import import_module"),
        (imports_are_statements, "boot/x.py", "__import__('cbit.tools')"),
        (software_never_peeks, "kernel/x.py", "from ..hw.memory import Dram"),
        (software_never_peeks, "boot/x.py", "from ..hw import machine"),
        (software_never_peeks, "dma/x.py", "cpu.dram.read(0, 16)"),
        (software_never_peeks, "dma/x.py", "getattr(cpu, 'caches')"),
        (software_never_peeks, "kernel/x.py", "cpu._tlb.clear()"),
    ],
)
def test_a_rule_catches_who_breaks_it(rule: Rule, file: str, text: str) -> None:
    assert len(rule(PurePosixPath(file), text)) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tools/cli.py", "from .. import __version__\nfrom ..boot import sme"),
        ("hw/msr/x.py", "from ..types import PhysAddr\nfrom .file import MsrFile"),
        ("kernel/sev/x.py", "from ...hw.cpu import Cpu\nfrom ..cc import State"),
        ("dma/x.py", "class A:\n  _n: int\ndef f(a: A): return a._n, a.__class__"),
        ("__main__.py", "from .tools.cli import main"),
    ],
)
def test_the_rules_let_honest_code_pass(file: str, text: str) -> None:
    assert [rule(PurePosixPath(file), text) for rule in RULES] == [[], [], []]


@pytest.mark.parametrize("file", PYTHON, ids=str)
def test_a_file_is_one_duty_of_readable_length(file: PurePosixPath) -> None:
    text = read(file)
    assert len(text.splitlines()) <= LINE_LIMIT, "look for the seam"
    assert not [part for part in file.with_suffix("").parts if EMPTY_NAME.search(part)]
    if file in SHIPPED:
        assert ast.get_docstring(ast.parse(text)), "the docstring says which duty"


@pytest.mark.parametrize("file", TEXTS, ids=str)
def test_nothing_is_left_unfinished(file: PurePosixPath) -> None:
    lines = read(file).splitlines()
    assert [line for line in lines if UNFINISHED.search(line)] == []


def test_the_root_holds_the_package_and_no_other_module() -> None:
    assert {file.name for file in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}
    folders = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    visible = {n for n in folders if not n.startswith(".") and "egg-info" not in n}
    assert visible <= FOLDERS_AT_THE_ROOT


def test_tests_are_no_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_package_is_shipped_and_type_checked() -> None:
    # An editable install finds what the lists forget; a wheel does not.
    folders = {file.parent for file in SHIPPED}
    found = sorted(".".join(["cbit", *folder.parts]) for folder in folders)
    assert [f for f in folders if not (ROOT / f / "__init__.py").exists()] == []
    assert PROJECT["tool"]["setuptools"]["packages"] == found

    checked = PROJECT["tool"]["mypy"]
    assert checked["modules"] == ["cbit"]
    assert {name.split(".")[1] for name in found[1:]} | {"tests"} == {
        name.split(".")[1] for name in checked["packages"]
    }
    assert all(name.count(".") == 1 for name in checked["packages"]), "whole floors"


def test_every_data_file_is_shipped() -> None:
    shipped = PROJECT["tool"]["setuptools"]["package-data"]
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*")):
            file = place(path)
            if path.is_dir() or path.suffix in {".py", ".pyc"}:
                continue
            globs = shipped.get(".".join(["cbit", *file.parts[:-1]]), [])
            wanted = any(fnmatch(file.name, glob) for glob in globs)
            assert wanted != (str(file) in NOT_SHIPPED), file


def test_every_module_of_others_is_a_declared_dependency() -> None:
    declared = _distributions(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = _distributions(
        [
            line
            for extra in extras
            if extra not in {"test", "check"}
            for line in extras[extra]
        ]
    )
    owners = packages_distributions()
    used = set()
    for file in SHIPPED:
        for module, at_once in _modules_outside(file, read(file)).items():
            names = {_normal(name) for name in owners.get(module, [module])}
            allowed = declared if at_once else declared | optional
            assert names & allowed, f"{file} imports {module}: is it declared?"
            used |= names
    assert declared - used == set(), "declared, imported nowhere"


def test_every_order_in_the_source_has_a_test() -> None:
    tested = {file.stem for file in PYTHON if "def test_order_" in read(file)}
    untested = []
    for file in SHIPPED:
        room = file.parent.name  # kernel/sev/ghcb.py: test_sev or test_sev_ghcb will do
        names = {f"test_{file.stem}", f"test_{room}", f"test_{room}_{file.stem}"}
        if "# ORDER:" in read(file) and not names & tested:
            untested.append(str(file))
    assert untested == []


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "SOURCES.md", "CHANGELOG.md", "LICENSE"]
)
def test_the_papers_are_there(name: str) -> None:
    assert read(name).strip()


def test_the_changelog_speaks_of_this_version() -> None:
    headings = re.findall(r"(?m)^## .*$", read("CHANGELOG.md"))
    assert any(re.search(rf"\b{re.escape(cbit.__version__)}\b", h) for h in headings)


def test_the_readme_shows_every_verb_and_none_that_is_not() -> None:
    readme = read("README.md")
    shown = set(re.findall(r"(?:[`$(|] ?|^ *|bin/)cbit ([a-z][a-z-]*)", readme, re.M))
    assert set(VERBS) - shown == set()
    code = set(re.findall(r"(?:`|\$ )cbit ([a-z][a-z-]*)", readme))
    assert code - set(VERBS) == set()


def test_the_makefile_explains_its_targets_and_the_readme_names_no_others() -> None:
    makefile = read("Makefile")
    targets = set(re.findall(r"(?m)^\.PHONY: (\S+)$", makefile))
    assert set(re.findall(r"(?m)^(\w+):.* ## \S", makefile)) == targets
    named = re.findall(r"(?:`|\$ )make ([a-z]+)", read("README.md"))
    assert set(named) <= targets


def test_every_source_that_is_cited_is_listed() -> None:
    listed = read("SOURCES.md")
    cited = {
        (str(file), key)
        for file in SHIPPED
        for key in re.findall(r"(?<=[ (])\[[A-Z][A-Za-z0-9-]+\]", read(file))
    }
    assert sorted(pair for pair in cited if pair[1] not in listed) == []
