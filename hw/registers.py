"""Declarative bit fields: one class per register, one line per field.

    class Syscfg(Register):
        ADDRESS = 0xC001_0010
        mem_encrypt = Field(23)

Bit numbers stand as the manuals print them, high before low. Values are immutable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self, overload

from .errors import CallerError


class Field:
    """Bits `high` down to `low` of a register; one bit if `low` is left out."""

    def __init__(self, high: int, low: int | None = None, about: str = "") -> None:
        self.high = high
        self.low = high if low is None else low
        self.about = about
        if not 0 <= self.low <= self.high:
            raise CallerError(f"field [{high}:{low}]: high bit first, low bit second")
        self.width_bits = self.high - self.low + 1
        self.mask = ((1 << self.width_bits) - 1) << self.low
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, register: None, owner: type) -> Self: ...
    @overload
    def __get__(self, register: Register, owner: type) -> int: ...
    def __get__(self, register: Register | None, owner: type) -> Self | int:
        if register is None:
            return self
        return (register.value & self.mask) >> self.low

    @property
    def bits(self) -> str:
        """The position as manuals print it: `23`, or `11:6`."""
        return str(self.low) if self.low == self.high else f"{self.high}:{self.low}"


class Register:
    """An immutable register value; subclasses declare `Field`s.

    Attributes:
        WIDTH_BITS: 32 or 64; a subclass overrides it.
        FIELDS: the declared fields by name, lowest bit first.
    """

    WIDTH_BITS: ClassVar[int] = 64
    FIELDS: ClassVar[dict[str, Field]] = {}

    __slots__ = ("value",)
    value: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [item for item in vars(cls).values() if isinstance(item, Field)]
        seen = 0
        for field in own:
            if field.mask & seen:
                raise TypeError(f"{cls.__name__}.{field.name} overlaps another field")
            if field.high >= cls.WIDTH_BITS:
                raise TypeError(f"{cls.__name__}.{field.name} exceeds the register")
            seen |= field.mask
        cls.FIELDS = {field.name: field for field in sorted(own, key=lambda f: f.low)}

    def __init__(self, value: int = 0) -> None:
        if not 0 <= value < 1 << self.WIDTH_BITS:
            raise CallerError(
                f"{type(self).__name__} holds {self.WIDTH_BITS} bits, got {value:#x}"
            )
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable; use replace()")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __hash__(self) -> int:
        return hash((type(self), self.value))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value:#x})"

    @classmethod
    def declared_mask(cls) -> int:
        """Bits that some field covers; the others are reserved."""
        mask = 0
        for field in cls.FIELDS.values():
            mask |= field.mask
        return mask

    @classmethod
    def of(cls, **fields: int) -> Self:
        """Build a value from fields; the others are 0."""
        return cls(0).replace(**fields)

    def replace(self, **fields: int) -> Self:
        """Return a copy with some fields changed.

        Raises:
            CallerError: an unknown field, or a value wider than its field.
        """
        value = self.value
        for name, new in fields.items():
            field = self.FIELDS.get(name)
            if field is None:
                raise CallerError(f"{type(self).__name__} has no field {name!r}")
            if not 0 <= new < 1 << field.width_bits:
                raise CallerError(
                    f"{type(self).__name__}.{name} holds {field.width_bits} bits, "
                    f"got {new:#x}"
                )
            value = value & ~field.mask | new << field.low
        return type(self)(value)

    def fields(self) -> Iterator[tuple[Field, int]]:
        """Yield every declared field with its value, lowest bit first."""
        for field in self.FIELDS.values():
            yield field, (self.value & field.mask) >> field.low

    @property
    def reserved(self) -> int:
        """The bits set that no field covers."""
        return self.value & ~self.declared_mask()
