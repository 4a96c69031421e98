"""hw/registers: one line per field, mistakes raise where they are written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.hw.errors import CallerError
from cbit.hw.registers import Field, Register


class Ebx(Register):
    """Like CPUID 8000_001F EBX, the bits above 15 left out."""

    WIDTH_BITS = 32

    reduction = Field(11, 6, about="address bits lost")
    c_bit = Field(5, 0)
    top = Field(31)


WORDS = st.integers(0, (1 << 32) - 1)


def test_vector_naples_and_rome() -> None:
    # InstLatx64 dumps of 0800F12 and 0830F10: EBX of leaf 8000_001F is 0x16F.
    assert (Ebx(0x16F).c_bit, Ebx(0x16F).reduction, Ebx(0x16F).top) == (47, 5, 0)


@given(WORDS)
def test_law_fields_and_reserved_bits_make_up_the_value(value: int) -> None:
    register = Ebx(value)
    total = sum(found << field.low for field, found in register.fields())
    assert total | register.reserved == value
    assert total & register.reserved == 0


@given(WORDS, st.integers(0, 63))
def test_law_replace_changes_one_field_and_nothing_else(value: int, new: int) -> None:
    before = Ebx(value)
    after = before.replace(c_bit=new)
    assert after.c_bit == new
    assert (after.reduction, after.top) == (before.reduction, before.top)
    assert after.value & ~0x3F == value & ~0x3F
    assert before.value == value


def test_a_field_knows_its_place() -> None:
    assert (Ebx.reduction.mask, Ebx.reduction.low, Ebx.reduction.high) == (0xFC0, 6, 11)
    assert (Ebx.reduction.width_bits, Ebx.reduction.name) == (6, "reduction")
    assert (Ebx.reduction.bits, Ebx.top.bits) == ("11:6", "31")
    assert Ebx.reduction.about == "address bits lost"


def test_fields_are_listed_from_the_lowest_bit_up() -> None:
    assert list(Ebx.FIELDS) == ["c_bit", "reduction", "top"]
    assert [field.name for field, _ in Ebx(0).fields()] == list(Ebx.FIELDS)
    assert Ebx.declared_mask() == 0x8000_0FFF


def test_a_value_is_built_from_fields() -> None:
    assert Ebx.of(c_bit=47, reduction=5) == Ebx(0x16F)
    assert Ebx.of() == Ebx(0)


def test_values_compare_by_class_and_number() -> None:
    class Other(Register):
        WIDTH_BITS = 32

    assert Ebx(5) == Ebx(5)
    assert Ebx(5) != Ebx(6)
    assert Ebx(5) != Other(5)
    assert Ebx(5) != 5
    assert len({Ebx(5), Ebx(5), Other(5)}) == 2
    assert repr(Ebx(0x16F)) == "Ebx(0x16f)"


def test_a_value_cannot_be_changed() -> None:
    register = Ebx(0x16F)
    for name in ("value", "c_bit", "anything"):
        with pytest.raises(AttributeError, match="Ebx is immutable"):
            setattr(register, name, 1)
    assert register.value == 0x16F


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"c_bit": 64}, "Ebx.c_bit holds 6 bits, got 0x40"),
        ({"top": 2}, "Ebx.top holds 1 bits, got 0x2"),
        ({"c_bit": -1}, "Ebx.c_bit holds 6 bits, got -0x1"),
        ({"cbit": 1}, "Ebx has no field 'cbit'"),
    ],
)
def test_replace_refuses_what_does_not_fit(
    fields: dict[str, int], complaint: str
) -> None:
    with pytest.raises(CallerError) as refusal:
        Ebx(0).replace(**fields)
    assert str(refusal.value) == complaint


@pytest.mark.parametrize("value", [1 << 32, -1])
def test_a_value_wider_than_the_register_is_refused(value: int) -> None:
    with pytest.raises(CallerError, match=f"Ebx holds 32 bits, got {value:#x}"):
        Ebx(value)


def test_a_register_has_64_bits_unless_it_says_otherwise() -> None:
    class Wide(Register):
        top = Field(63)

    assert Wide((1 << 64) - 1).top == 1
    with pytest.raises(CallerError):
        Wide(1 << 64)


def test_fields_that_overlap_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Bad\.second overlaps"):
        type("Bad", (Register,), {"first": Field(7, 4), "second": Field(4, 0)})


def test_a_field_beyond_the_register_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Bad\.far exceeds"):
        type("Bad", (Register,), {"WIDTH_BITS": 32, "far": Field(32)})


@pytest.mark.parametrize(("high", "low"), [(3, 4), (0, -1), (-1, None)])
def test_a_field_has_its_high_bit_first(high: int, low: int | None) -> None:
    with pytest.raises(CallerError, match="high bit first"):
        Field(high, low)
