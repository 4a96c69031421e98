"""The processors that come with the package: one file of raw CPUID leaves each.

The files look like the output of `cpuid -r`, after comment lines that name the part and
the public dump that the values were copied from.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from ..cpuid import CpuModel, dump_header, parse_dump, read_dump_text
from ..errors import CallerError

DEFAULT_MODEL = "epyc-7742"


def model_names() -> tuple[str, ...]:
    """Return the names of all shipped models, sorted."""
    return tuple(sorted(_shipped()))


def model_aliases() -> dict[str, str]:
    """Return the short names, usually code names, and the model each stands for."""
    return {
        dump_header(file.read_text("ascii"))["alias"]: name
        for name, file in sorted(_shipped().items())
    }


def load_model(name_or_path: str | Path) -> CpuModel:
    """Return a processor by name, by alias, or from a raw dump.

    Args:
        name_or_path: a name or alias, upper or lower case, or else the path of a dump
            in one of the formats of `parse_dump`.

    Raises:
        CallerError: neither a model nor a file; the message lists the models.
        InputError: the file is not a complete dump.
        OSError: the file cannot be read.
    """
    shipped = _shipped()
    key = str(name_or_path).lower()
    name = key if key in shipped else model_aliases().get(key)
    if name is not None:
        return _read_shipped(shipped[name])
    path = Path(name_or_path)
    if path.is_dir():
        raise CallerError(f"{path}: a directory, expected a file with a CPUID dump")
    if not path.exists():
        known = ", ".join(f"{n} ({alias})" for alias, n in model_aliases().items())
        raise CallerError(
            f"{str(name_or_path)!r} is neither a file nor a CPU model; models: {known}"
        )
    table = parse_dump(read_dump_text(path), str(path))
    return CpuModel(path.stem, str(path), table)


def _shipped() -> dict[str, Traversable]:
    """Return the data files by model name."""
    return {
        file.name.removesuffix(".txt"): file
        for file in files(__name__).iterdir()
        if file.name.endswith(".txt")
    }


def _read_shipped(file: Traversable) -> CpuModel:
    text = file.read_text("ascii")
    header = dump_header(text)
    table = parse_dump(text, file.name)
    return CpuModel(header["name"], header["source"], table, header["alias"])
