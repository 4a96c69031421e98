"""Snapshot files for tests: small machines, and files changed with fitting digests."""

import hashlib
import io
import json
import struct
from collections.abc import Callable
from typing import Any

import zstandard

from cbit.hw import Machine
from cbit.hw.snapshot import load_snapshot, save_snapshot

START = struct.Struct("<8sII")


def saved(machine: Machine, extra: dict[str, object] | None = None) -> bytes:
    file = io.BytesIO()
    save_snapshot(file, machine, extra or {})
    return file.getvalue()


def loaded(data: bytes) -> Machine:
    return load_snapshot(io.BytesIO(data), "file")[0]


def copied(machine: Machine) -> Machine:
    return loaded(saved(machine))


def header_of(data: bytes) -> dict[str, Any]:
    _, _, length = START.unpack_from(data)
    header: dict[str, Any] = json.loads(data[START.size : START.size + length])
    return header


def pieces_of(data: bytes) -> list[bytes]:
    """Return the compressed pieces, in order."""
    _, _, length = START.unpack_from(data)
    at, pieces = START.size + length + 32, []
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        pieces.append(data[at + 4 : at + 4 + size])
        at += 4 + size + 32
    assert at == len(data)
    return pieces


def built(header: object, pieces: list[bytes], version: int = 1) -> bytes:
    """Return a file of these parts whose digests fit."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = START.pack(b"CBITSNAP", version, len(text)) + text
    digest = hashlib.sha256(data).digest()
    data += digest
    for piece in pieces:
        piece = struct.pack("<I", len(piece)) + piece
        digest = hashlib.sha256(digest + piece).digest()
        data += piece + digest
    return data


def forged(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return a file with one section of less than 4 MiB changed, digests fitting."""
    header, pieces = header_of(data), pieces_of(data)
    number = 0
    for entry in header["sections"]:
        if entry[0] == name:
            held = entry[1] > 0
            old = zstandard.decompress(pieces[number]) if held else b""
            new = change(old)
            entry[1] = len(new)
            pieces[number : number + held] = [zstandard.compress(new)] if new else []
            return built(header, pieces)
        number += -(-entry[1] // (4 << 20))
    raise LookupError(name)
