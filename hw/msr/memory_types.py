"""Memory type range registers, as firmware leaves them: WB for RAM, UC for devices.

The machine has no memory types; software sets and reads them all the same, and Linux
uses its PAT only where it finds MTRRs.

Source: [APM2] 7.7 (Memory-Type Range Registers); types: table 7-5.
"""

from __future__ import annotations

from ..cpuid import CpuModel
from ..registers import Field
from .registers import Msr
from .rule import Access, MsrRule, Write

VARIABLE_RANGES = 8
UC, WB = 0, 6
VALID_TYPES = frozenset({0, 1, 4, 5, 6})
PCI_HOLE, PCI_HOLE_SIZE = 0xC000_0000, 0x4000_0000
ALL_WB, ALL_UC = 0x0606_0606_0606_0606, 0


class MtrrCap(Msr):
    """What there is. Source: [APM2] 7.7.4."""

    ADDRESS, NAME = 0x0000_00FE, "MTRRcap"

    count = Field(7, 0, about="variable ranges")
    fixed = Field(8)
    write_combining = Field(10)


class MtrrDefType(Msr):
    """Default type and enables. Source: [APM2] 7.7.2."""

    ADDRESS, NAME = 0x0000_02FF, "MTRRdefType"

    default_type = Field(7, 0)
    fixed_enable = Field(10)
    enable = Field(11)


class FixedMtrr(Msr):
    """Eight types of eight ranges below 1 MiB."""

    types = Field(63, 0, about="a type in each byte")


class MtrrPhysBase(Msr):
    """Type and base of a variable range."""

    memory_type = Field(7, 0)
    page = Field(51, 12)


class MtrrPhysMask(Msr):
    """Mask of a variable range."""

    valid = Field(11)
    page = Field(51, 12)


def _mtrr(model: CpuModel) -> bool:
    return bool(model.table.leaf(1).edx >> 12 & 1)


def _types_objection(write: Write) -> str:
    for byte in write.new.to_bytes(8, "little"):
        # Bits 3 and 4 are RdMem and WrMem where SYSCFG lets them be set.
        if byte & ~0x18 not in VALID_TYPES:
            return f"type {byte:#x} is reserved, expected 0, 1, 4, 5 or 6"
    return ""


def _default_objection(write: Write) -> str:
    kind = MtrrDefType(write.new).default_type
    if kind not in VALID_TYPES:
        return f"type {kind:#x} is reserved, expected 0, 1, 4, 5 or 6"
    return ""


def _base_objection(write: Write) -> str:
    kind = MtrrPhysBase(write.new).memory_type
    if kind not in VALID_TYPES:
        return f"type {kind:#x} is reserved, expected 0, 1, 4, 5 or 6"
    return ""


def _below_width(kind: type[Msr]) -> MsrRule:
    return MsrRule(
        kind,
        present=_mtrr,
        needs="CPUID 1 EDX[12] (MTRR)",
        writable=lambda model: kind.declared_mask() & (1 << model.phys_bits) - 1,
        objection=_base_objection if issubclass(kind, MtrrPhysBase) else _accepted,
        reset=_pci_hole_base
        if kind.ADDRESS == 0x200
        else _pci_hole_mask
        if kind.ADDRESS == 0x201
        else _zero,
    )


def _accepted(write: Write) -> str:
    return ""


def _zero(model: CpuModel, smee: bool) -> int:
    return 0


def _pci_hole_base(model: CpuModel, smee: bool) -> int:
    return PCI_HOLE | UC


def _pci_hole_mask(model: CpuModel, smee: bool) -> int:
    width = model.phys_bits
    return (1 << width) - PCI_HOLE_SIZE | MtrrPhysMask.valid.mask


def _fixed(address: int, name: str, types: int) -> MsrRule:
    register = type(
        f"MtrrFix{name}",
        (FixedMtrr,),
        {
            "__doc__": f"Fixed range {name}. Source: [APM2] table 7-9.",
            "ADDRESS": address,
            "NAME": f"MTRRfix{name}",
            "types": Field(63, 0, about="a type in each byte"),
        },
    )
    return MsrRule(
        register,
        present=_mtrr,
        needs="CPUID 1 EDX[12] (MTRR)",
        reset=lambda model, smee: types,
        objection=_types_objection,
    )


def _variable(number: int) -> tuple[MsrRule, MsrRule]:
    base = type(
        f"MtrrPhysBase{number}",
        (MtrrPhysBase,),
        {
            "__doc__": f"Variable range {number}. Source: [APM2] 7.7.2.",
            "ADDRESS": 0x200 + 2 * number,
            "NAME": f"MTRRphysBase{number}",
            "memory_type": Field(7, 0),
            "page": Field(51, 12),
        },
    )
    mask = type(
        f"MtrrPhysMask{number}",
        (MtrrPhysMask,),
        {
            "__doc__": f"Variable range {number}. Source: [APM2] 7.7.2.",
            "ADDRESS": 0x201 + 2 * number,
            "NAME": f"MTRRphysMask{number}",
            "valid": Field(11),
            "page": Field(51, 12),
        },
    )
    return _below_width(base), _below_width(mask)


FIXED = (
    (0x250, "64K_00000", ALL_WB),
    (0x258, "16K_80000", ALL_WB),
    (0x259, "16K_A0000", ALL_UC),
    *((0x268 + n, f"4K_{0xC0 + 8 * n:02X}000", ALL_UC) for n in range(8)),
)

MEMORY_TYPE_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        MtrrCap,
        present=_mtrr,
        needs="CPUID 1 EDX[12] (MTRR)",
        access=Access.READ,
        reset=lambda model, smee: (
            MtrrCap.of(count=VARIABLE_RANGES, fixed=1, write_combining=1).value
        ),
    ),
    *(rule for number in range(VARIABLE_RANGES) for rule in _variable(number)),
    *(_fixed(*row) for row in FIXED),
    MsrRule(
        MtrrDefType,
        present=_mtrr,
        needs="CPUID 1 EDX[12] (MTRR)",
        reset=lambda model, smee: (
            MtrrDefType.of(default_type=WB, fixed_enable=1, enable=1).value
        ),
        objection=_default_objection,
    ),
)
"""MTRRs, by address."""
