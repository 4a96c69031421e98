"""Binary records by absolute offset: what crosses a boundary as bytes, declared once.

    PAGE = layout(
        4096,
        (0x0C0, "ext_ramdisk_image", Int32ul),
        (0x1E8, "e820_entries", Int8ul),
    )

A reviewer can hold the offsets beside the manual. Bytes no field covers are kept as
`reserved_<offset>`, so that `build(parse(page)) == page` for every page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from construct import Bytes, Construct, ConstructError, Default, Struct

from .errors import CallerError

Buffer = bytes | bytearray | memoryview
"""What a record may be read from."""


class Layout:
    """A record of fixed size.

    Attributes:
        size: length in bytes.
        record: the construct, for use inside other constructs.
        offsets: byte offset of every field by name, reserved runs included.
    """

    def __init__(self, size: int, fields: dict[str, tuple[int, Construct]]) -> None:
        self.size = size
        self.offsets = {name: offset for name, (offset, _) in fields.items()}
        self._fields = fields
        self.record = Struct(*(name / subcon for name, (_, subcon) in fields.items()))

    def parse(self, data: Buffer) -> dict[str, Any]:
        """Read every field.

        Args:
            data: exactly `size` bytes.

        Returns:
            The values by name, in the order of their offsets.

        Raises:
            CallerError: the length is wrong.
        """
        if len(data) != self.size:
            raise CallerError(f"a record of {self.size} bytes, got {len(data)}")
        values = self.record.parse(bytes(data))
        return {name: values[name] for name in self._fields}

    def build(self, values: Mapping[str, Any]) -> bytes:
        """Write every field; a reserved run that is left out is zero.

        Raises:
            CallerError: a field is missing, or a value does not fit.
        """
        try:
            built: bytes = self.record.build(dict(values))
        except (ConstructError, KeyError, TypeError) as wrong:
            reason = str(wrong).splitlines()[0]
            raise CallerError(f"cannot build the record: {reason}") from wrong
        return built

    def get(self, page: Buffer, name: str) -> Any:
        """Read one field of a record that starts at byte 0 of `page`."""
        offset, subcon = self._field(name)
        return subcon.parse(bytes(page[offset : offset + subcon.sizeof()]))

    def put(self, page: bytearray, name: str, value: Any) -> None:
        """Write one field of a record that starts at byte 0 of `page`.

        Raises:
            CallerError: no such field, or the value does not fit.
        """
        offset, subcon = self._field(name)
        try:
            page[offset : offset + subcon.sizeof()] = subcon.build(value)
        except (ConstructError, TypeError) as wrong:
            raise CallerError(f"{name} cannot hold {value!r}") from wrong

    def _field(self, name: str) -> tuple[int, Construct]:
        if name not in self._fields:
            raise CallerError(f"the record has no field {name!r}")
        return self._fields[name]


def layout(size: int, *fields: tuple[int, str, Construct]) -> Layout:
    """Declare a record of `size` bytes by the absolute offsets of its fields.

    Args:
        size: length of the record in bytes.
        fields: offset, name and construct of each field, lowest offset first; every
            construct has a fixed size.

    Raises:
        TypeError: two fields overlap or are out of order, a name occurs twice, or a
            field ends beyond the record. Raised when the module is imported.
    """
    placed: dict[str, tuple[int, Construct]] = {}
    end = 0
    for offset, name, subcon in fields:
        if offset < end:
            raise TypeError(f"{name} at {offset:#x} overlaps what ends at {end:#x}")
        if name in placed:
            raise TypeError(f"{name} is declared twice")
        if offset > end:
            placed[f"reserved_{end:03x}"] = (end, _reserved(offset - end))
        placed[name] = (offset, subcon)
        end = offset + subcon.sizeof()
    if end > size:
        raise TypeError(f"fields end at {end:#x}, beyond the {size:#x} of the record")
    if end < size:
        placed[f"reserved_{end:03x}"] = (end, _reserved(size - end))
    return Layout(size, placed)


def _reserved(length: int) -> Construct:
    return Default(Bytes(length), bytes(length))
