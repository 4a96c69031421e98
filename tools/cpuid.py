"""`cbit cpuid` and `cbit models`: what a processor says about memory encryption."""

from __future__ import annotations

import json
from typing import Any

import click

from ..hw.cpuid import CpuidWord, CpuModel, LeafRange
from ..hw.cpuid.host import read_host
from ..hw.cpuid.words import (
    AddressSizes,
    ExtendedMaxEax,
    FeatureEcx,
    MemEncryptEax,
    MemEncryptEbx,
    MemEncryptEcx,
    MemEncryptEdx,
)
from ..hw.models import load_model, model_names
from .tables import print_table

WORDS: tuple[type[CpuidWord], ...] = (
    ExtendedMaxEax,
    AddressSizes,
    MemEncryptEax,
    MemEncryptEbx,
    MemEncryptEcx,
    MemEncryptEdx,
)
"""The registers that are shown whole; of leaf 1 only the hypervisor bit is."""


@click.command()
@click.argument("name", metavar="[NAME|FILE]", required=False)
@click.option("--host", is_flag=True, help="This machine's processor.")
@click.option("--json", "as_json", is_flag=True, help="The same facts for programs.")
def cpuid(name: str | None, host: bool, as_json: bool) -> None:
    """Decode the memory-encryption leaves of a processor.

    NAME is one of `cbit models`; FILE is a raw dump as `cpuid -1 -r` prints it, or one
    of InstLatx64.
    """
    if host == (name is not None):
        raise click.UsageError(
            "expected one of: a model's NAME, the FILE of a raw dump, or --host"
        )
    model = load_model(name) if name is not None else read_host()
    if as_json:
        click.echo(json.dumps(_facts(model), indent=2))
        return
    click.echo(f"{model.brand or model.vendor} ({model.name})")
    click.echo(f"source: {model.source}")
    click.echo(f"memory encryption: {_verdict(model)}\n")
    print_table(("LEAF", "REG", "BITS", "FIELD", "VALUE", "MEANING"), _rows(model))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same facts for programs.")
def models(as_json: bool) -> None:
    """List the processors that come with cbit.

    LOST is how many physical address bits SME costs, WIDTH what they are without and
    with it, SEV the highest level of it, COHERENT whether caches are kept coherent
    across encryption domains.
    """
    shipped = [load_model(name) for name in model_names()]
    if as_json:
        click.echo(json.dumps([_facts(model) for model in shipped], indent=2))
        return
    print_table(
        ("NAME", "ALIAS", "C-BIT", "LOST", "WIDTH", "SEV", "COHERENT", "BRAND"),
        [_summary(model) for model in shipped],
        cut_last=True,
    )


def _facts(model: CpuModel) -> dict[str, Any]:
    """Return what a program may want to know, flat."""
    encryption = model.memory_encryption
    return {
        "name": model.name,
        "alias": model.alias or None,
        "vendor": model.vendor,
        "brand": model.brand,
        "source": model.source,
        "hypervisor": model.hypervisor,
        **vars(encryption),
        "reason": encryption.reason or None,
        "linear_bits": model.linear_bits,
        "max_extended_leaf": model.table.max_leaf(LeafRange.EXTENDED),
    }


def _verdict(model: CpuModel) -> str:
    encryption = model.memory_encryption
    if not encryption.usable:
        return f"not usable: {encryption.reason}"
    under = ", under a hypervisor" if model.hypervisor else ""
    return (
        f"C-bit {encryption.c_bit}, physical addresses {encryption.phys_bits} -> "
        f"{encryption.phys_bits_with_sme} bits{under}"
    )


def _rows(model: CpuModel) -> list[tuple[str, ...]]:
    """Return one row for each field of the leaves in question."""
    features = model.table.word(FeatureEcx)
    rows = [_row(features, "hypervisor")]
    for kind in WORDS:
        if model.table.has(kind.LEAF):
            word = model.table.word(kind)
            rows += [_row(word, name) for name in kind.FIELDS]
            if word.reserved:
                cells = (f"{word.reserved:#x}", "bits without a name here")
                rows.append((*_place(word), "", "(reserved)", *cells))
    return rows


def _row(word: CpuidWord, name: str) -> tuple[str, ...]:
    field = word.FIELDS[name]
    value = getattr(word, name)
    # Leaf numbers read best in hex; widths, positions and counts in decimal.
    shown = f"{value:#010x}" if isinstance(word, ExtendedMaxEax) else str(value)
    return (*_place(word), field.bits, name, shown, field.about)


def _place(word: CpuidWord) -> tuple[str, str]:
    return f"{word.LEAF:#010x}", word.REGISTER.upper()


def _summary(model: CpuModel) -> tuple[str, ...]:
    encryption = model.memory_encryption
    usable = encryption.usable
    width = f"{encryption.phys_bits}"
    if usable:
        width += f" -> {encryption.phys_bits_with_sme}"
    levels = (
        (encryption.sev_snp, "SEV-SNP"),
        (encryption.sev_es, "SEV-ES"),
        (encryption.sev, "SEV"),
        (True, "-"),
    )
    return (
        model.name,
        model.alias,
        str(encryption.c_bit) if usable else "-",
        str(encryption.phys_reduction) if usable else "-",
        width,
        next(name for offered, name in levels if offered),
        "yes" if encryption.hw_coherent else "no",
        model.brand,
    )
