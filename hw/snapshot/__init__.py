"""Snapshots: a whole machine in a file, and the same machine out of it.

A snapshot holds secrets: the memory encryption key and tweak constants of every key
slot, the generator that draws the next key, and the plaintext of every cached line.
Guard the file as the machine's memory itself.

What comes back exactly: model, RAM, firmware's choices; DRAM with the marks of who
wrote it; cached lines with their valid, dirty and stale bits, owners and hazards; keys;
the sources of random numbers; MSRs, control registers, CPL and RFLAGS.AC of each core.

What does not: handlers, listeners and devices, which are the program's own; the TLB,
which starts empty, as after a context switch; the numbers of trace events; DRAM cells
that a test changed in a 2 MiB region where the machine never wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import BinaryIO

from ..errors import CbitError, InputError
from ..machine import Machine
from .board import build_board, describe_board
from .container import encode_header, write_container
from .contents import restore_contents, sections_of
from .reader import ContainerReader

__all__ = ["load_snapshot", "save_snapshot"]

NO_FACTS: Mapping[str, object] = {}


def save_snapshot(
    file: BinaryIO, machine: Machine, extra: Mapping[str, object] = NO_FACTS
) -> None:
    """Write a machine as it stands; it can go on and is not changed.

    The same machine in the same state gives the same bytes. Everything that can be
    refused is refused before the first byte is written.

    Args:
        file: buffered, written from its position on; need not be seekable.
        machine: no other thread uses it now.
        extra: facts of the caller, such as the registers of a native core or the
            state of devices: JSON with string keys. Tuples come back as lists.

    Raises:
        CallerError: `extra` is not such JSON, or the machine has an engine profile of
            its own.
        OSError: `file` cannot be written.
    """
    caches = machine.caches.state()
    facts = {**describe_board(machine, caches), "extra": dict(extra)}
    sections = list(sections_of(machine, caches))
    write_container(file, encode_header(facts, sections), sections)


def load_snapshot(file: BinaryIO, name: str) -> tuple[Machine, dict[str, object]]:
    """Return the machine of a snapshot, and the `extra` that was saved with it.

    Args:
        file: at the first byte of the snapshot, which is all that follows; need not
            be seekable.
        name: what error messages call it.

    Raises:
        InputError: not a snapshot, one from a newer version, damaged, cut short, or
            of a machine that cannot be; with the offset where one is known.
        OSError: `file` cannot be read.
    """
    reader = ContainerReader(file, name)
    try:
        machine = build_board(reader.facts)
        restore_contents(machine, reader)
        extra = reader.facts.mapping("extra")
    except InputError:
        raise
    except CbitError as error:
        where = f"{name}: offset {reader.offset:#x}"
        raise InputError(f"{where}: no possible machine: {error}") from None
    reader.finish()
    return machine, extra
