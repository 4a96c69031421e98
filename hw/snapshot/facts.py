"""Reading a header from outside: every fact is asked for by name, type and range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NoReturn

from ..errors import InputError


class Facts:
    """One JSON object of a header.

    Args:
        values: the object.
        where: what errors call it: the file, and the way to the object.
    """

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self._where = where

    def integer(self, name: str, end: int = 1 << 64) -> int:
        """Return a whole number in [0, end).

        Raises:
            InputError: missing or something else, as in every method here.
        """
        return _integer(self._get(name), end, f"{self._where}, {name}")

    def integers(self, name: str, end: int = 1 << 64) -> list[int]:
        """Return a list of whole numbers in [0, end)."""
        where = f"{self._where}, {name}"
        return [_integer(value, end, where) for value in self.entries(name)]

    def rows(self, name: str, length: int, end: int = 1 << 64) -> list[list[int]]:
        """Return a list of rows of `length` whole numbers in [0, end)."""
        where = f"{self._where}, {name}"
        rows = []
        for row in self.entries(name):
            if not isinstance(row, list) or len(row) != length:
                _refuse(where, f"rows of {length} whole numbers", row)
            rows.append([_integer(value, end, where) for value in row])
        return rows

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self._get(name)
        if not isinstance(value, bool):
            _refuse(f"{self._where}, {name}", "true or false", value)
        return value

    def text(self, name: str) -> str:
        """Return a string."""
        value = self._get(name)
        if not isinstance(value, str):
            _refuse(f"{self._where}, {name}", "a string", value)
        return value

    def raw(self, name: str) -> bytes:
        """Return bytes that were written as hex digits."""
        value = self.text(name)
        try:
            return bytes.fromhex(value)
        except ValueError:
            _refuse(f"{self._where}, {name}", "hex digits", value)

    def group(self, name: str) -> Facts:
        """Return an object inside this one."""
        return Facts(self.mapping(name), f"{self._where}, {name}")

    def mapping(self, name: str) -> dict[str, object]:
        """Return an object inside this one as it is."""
        value = self._get(name)
        if not isinstance(value, dict):
            _refuse(f"{self._where}, {name}", "an object", value)
        return value

    def groups(self, name: str, most: int) -> Iterator[Facts]:
        """Yield the objects of a list, which has up to `most`."""
        values = self.entries(name)
        if len(values) > most:
            _refuse(f"{self._where}, {name}", f"up to {most} entries", len(values))
        for number, value in enumerate(values):
            where = f"{self._where}, {name}[{number}]"
            if not isinstance(value, dict):
                _refuse(where, "an object", value)
            yield Facts(value, where)

    def entries(self, name: str) -> list[object]:
        """Return a list as it is."""
        value = self._get(name)
        if not isinstance(value, list):
            _refuse(f"{self._where}, {name}", "a list", value)
        return value

    def _get(self, name: str) -> object:
        if name not in self._values:
            raise InputError(f"{self._where}: {name!r} expected, it is missing")
        return self._values[name]


def _integer(value: object, end: int, where: str) -> int:
    if type(value) is not int or not 0 <= value < end:
        _refuse(where, f"a whole number below {end:#x}", value)
    return value


def _refuse(where: str, expected: str, value: object) -> NoReturn:
    if type(value) is int and value.bit_length() <= 128:
        shown = hex(value)
    else:
        shown = {dict: "an object", list: "a list", int: "a huge number"}.get(
            type(value), repr(value)[:40]
        )
    raise InputError(f"{where}: {expected} expected, got {shown}")
