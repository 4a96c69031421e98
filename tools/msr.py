"""`cbit msr`: a model-specific register's value, field by field."""

from __future__ import annotations

import json
from typing import Any

import click

from ..hw.errors import CallerError
from ..hw.msr import MSRS, Msr
from .tables import print_table

BY_NAME = {kind.NAME.upper(): kind for kind in MSRS.values()}


def _number(ctx: click.Context, param: click.Parameter, text: str) -> int:
    """Return an integer of 64 bits, in any base of Python's."""
    try:
        number = int(text, 0)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no integer, expected 0x17, 23 or 0b1_0111"
        ) from None
    if not 0 <= number < 1 << 64:
        raise click.BadParameter(f"{text}, expected 0 to {(1 << 64) - 1:#x}")
    return number


def _address(ctx: click.Context, param: click.Parameter, text: str) -> int:
    """Return the address of an MSR that is given as a number or by name."""
    kind = BY_NAME.get(text.upper().replace("-", "_"))
    if kind is not None:
        return kind.ADDRESS
    if text[:1].isalpha():
        raise click.BadParameter(
            f"{text!r} is no integer, expected one or a name: {', '.join(BY_NAME)}"
        )
    return _number(ctx, param, text)


@click.command()
@click.argument("address", metavar="ADDR", callback=_address)
@click.argument("value", metavar="VALUE", callback=_number)
@click.option("--json", "as_json", is_flag=True, help="The same facts for programs.")
def msr(address: int, value: int, as_json: bool) -> None:
    """Decode VALUE as the register at ADDR.

    ADDR is a number or a name (SYSCFG); numbers are decimal, 0x..., 0o... or 0b...,
    with `_` wherever it helps.
    """
    kind = MSRS.get(address)
    if kind is None:
        known = ", ".join(f"{k.NAME} {a:#010x}" for a, k in sorted(MSRS.items()))
        raise CallerError(f"MSR {address:#010x} is unknown, expected one of: {known}")
    register = kind(value)
    if as_json:
        click.echo(json.dumps(_facts(register), indent=2))
        return
    click.echo(f"{kind.NAME} {kind.ADDRESS:#010x} = {value:#018x}")
    click.echo(f"{_summary(kind)}\n")
    print_table(
        ("BITS", "FIELD", "VALUE", "MEANING"),
        [
            (field.bits, field.name, _shown(number, field.width_bits), field.about)
            for field, number in register.fields()
        ],
    )
    if register.reserved:
        click.echo(f"\nreserved bits are set: {_reserved(register)}")


def _facts(register: Msr) -> dict[str, Any]:
    return {
        "name": register.NAME,
        "address": register.ADDRESS,
        "value": register.value,
        "fields": {field.name: number for field, number in register.fields()},
        "bits": {field.name: field.bits for field, _ in register.fields()},
        "reserved": register.reserved,
    }


def _summary(kind: type[Msr]) -> str:
    """Return the first sentence of what the register's class says of itself."""
    return (kind.__doc__ or "").splitlines()[0].split(". ")[0].removesuffix(".")


def _shown(number: int, width_bits: int) -> str:
    return str(number) if width_bits <= 4 else f"{number:#x}"


def _reserved(register: Msr) -> str:
    bits = [n for n in range(register.WIDTH_BITS) if register.reserved >> n & 1]
    listed = ", ".join(str(n) for n in bits)
    return f"{register.reserved:#x} (bit{'s' if len(bits) > 1 else ''} {listed})"
