"""Kinds of arguments that several verbs take: integers in any base, sizes."""

from __future__ import annotations

import re

import click

SIZE_PARTS = re.compile(
    r"(0x[0-9a-f]+(?:_[0-9a-f]+)*|0|[1-9][0-9]*(?:_[0-9]+)*)\s*([kmgt]?)(?:i?b)?", re.I
)
"""A number as Python writes it, and its unit."""

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Integer(click.ParamType[int]):
    """An integer as Python writes it: 23, 0x17, 0b1_0111."""

    name = "integer"

    def convert(
        self,
        value: str | int,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        """Return the number, or fail with what was expected."""
        if isinstance(value, int):
            return value
        try:
            return int(value, 0)
        except ValueError:
            self.fail(f"{value!r} is no integer, expected 23 or 0x17", param, ctx)


class Size(click.ParamType[int]):
    """A number of bytes: 256M, 64G, 0x4000_0000."""

    name = "size"

    def convert(
        self,
        value: str | int,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> int:
        """Return the bytes, or fail with what was expected."""
        if isinstance(value, int):
            return value
        parts = SIZE_PARTS.fullmatch(value)
        if parts is None:
            self.fail(f"{value!r} is no size, expected 256M or 4G", param, ctx)
        return int(parts[1], 0) * UNITS[parts[2].upper()]


INTEGER = Integer()
SIZE = Size()
