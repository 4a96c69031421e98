"""Names of kernel addresses: from a System.map, or from the symbols of an ELF file."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from ..hw.errors import InputError

ELF_MAGIC = b"\x7fELF"
FARTHEST = 1 << 20
"""An address this far behind a symbol is not in it."""


class Symbols:
    """Sorted addresses with their names.

    Args:
        entries: pairs of address and name.
    """

    def __init__(self, entries: list[tuple[int, str]]) -> None:
        entries = sorted(entries)
        self._addresses = [address for address, _ in entries]
        self._names = [name for _, name in entries]
        self._by_name = {name: address for address, name in reversed(entries)}

    @classmethod
    def of(cls, path: str | None) -> Symbols:
        """Read a System.map or an ELF file; None gives no symbols.

        Raises:
            InputError: the file is neither.
            OSError: it cannot be read.
        """
        if path is None:
            return cls([])
        with open(path, "rb") as file:
            head = file.read(4)
        return _from_elf(path) if head == ELF_MAGIC else _from_system_map(path)

    def __len__(self) -> int:
        return len(self._names)

    def address(self, name: str) -> int | None:
        """Return where a symbol lies."""
        return self._by_name.get(name)

    def name(self, address: int, slide: int = 0) -> str:
        """Return `symbol+0x12` for an address, or "" if none is near.

        Args:
            address: as the guest has it.
            slide: what KASLR added to the addresses of the file.
        """
        address -= slide
        index = bisect_right(self._addresses, address) - 1
        if index < 0 or address - self._addresses[index] > FARTHEST:
            return ""
        return f"{self._names[index]}+{address - self._addresses[index]:#x}"


def _from_system_map(path: str) -> Symbols:
    entries = []
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            parts = line.split()
            try:
                address = int(parts[0], 16)
                kind, name = parts[1], parts[2]
            except (IndexError, ValueError):
                raise InputError(
                    f"{path}: line {number}: expected `address type name` as in a "
                    "System.map"
                ) from None
            if kind in "tTwWdDbBrR":
                entries.append((address, name))
    if not entries:
        raise InputError(f"{path}: no symbols; expected a System.map or a vmlinux")
    return Symbols(entries)


def _from_elf(path: str) -> Symbols:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with open(path, "rb") as file:
            table: Any = ELFFile(file).get_section_by_name(".symtab")
            symbols = list(table.iter_symbols()) if table else []
    except ELFError as wrong:
        raise InputError(f"{path}: {wrong}") from None
    return Symbols([(s["st_value"], s.name) for s in symbols if s.name])
