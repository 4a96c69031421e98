"""Memory type range registers, as firmware leaves them: WB for RAM, UC for devices.

The machine has no memory types; software sets and reads them all the same, and Linux
uses its PAT only where it finds MTRRs.

Source: [APM2] 7.7 (Memory-Type Range Registers); types: table 7-5.
"""

from __future__ import annotations

from ..cpuid import CpuModel
from ..cpuid.words import FeatureEdx
from ..registers import Field
from . import choices
from .registers import Msr, Syscfg
from .rule import Access, MsrRule, Write

VARIABLE_RANGES = 8
UC, WB = 0, 6
VALID_TYPES = (0, 1, 4, 5, 6)
TYPE_BITS = 0x0707_0707_0707_0707
DRAM_BITS = 0x1818_1818_1818_1818
"""RdMem and WrMem of each range. Source: [APM2] 7.9.1."""

PCI_HOLE, PCI_HOLE_SIZE = 0xC000_0000, 0x4000_0000
ALL_WB, ALL_UC = 0x0606_0606_0606_0606, 0
KIB = 1 << 10


class MtrrCap(Msr):
    """What there is. Source: [APM2] 7.7.4."""

    ADDRESS, NAME = 0x0000_00FE, "MTRRcap"

    count = Field(7, 0, about="variable ranges")
    fixed = Field(8, about="there are fixed ranges")
    write_combining = Field(10, about="there is the type WC")


class MtrrDefType(Msr):
    """Default type and enables. Source: [APM2] 7.7.2."""

    ADDRESS, NAME = 0x0000_02FF, "MTRRdefType"

    default_type = Field(7, 0, about="0 UC, 1 WC, 4 WT, 5 WP, 6 WB")
    fixed_enable = Field(10, about="fixed ranges count")
    enable = Field(11, about="MTRRs count; 0: all memory is UC")


class MtrrPhysBase(Msr):
    """Type and base of a variable range. Source: [APM2] 7.7.2."""

    NAME = "MTRRphysBase"

    memory_type = Field(7, 0, about="0 UC, 1 WC, 4 WT, 5 WP, 6 WB")
    page = Field(51, 12, about="physical page number of the base")


class MtrrPhysMask(Msr):
    """Mask of a variable range. Source: [APM2] 7.7.2."""

    NAME = "MTRRphysMask"

    valid = Field(11, about="the range counts")
    page = Field(51, 12, about="bits of a page number that must equal the base")


def mtrr_width_bits(model: CpuModel, smee: bool) -> int:
    """Return how many address bits a variable range has."""
    if choices.MTRR_WIDTH_REDUCED and smee and model.memory_encryption.usable:
        return model.memory_encryption.phys_bits_with_sme
    return model.phys_bits


def _present(model: CpuModel) -> bool:
    return bool(model.table.word(FeatureEdx).mtrr)


NEEDS = "CPUID 1 EDX[12] (MTRR)"


def _type_objection(kind: int) -> str:
    if kind in VALID_TYPES:
        return ""
    return f"type {kind:#x} is reserved, expected 0, 1, 4, 5 or 6"


def _default_objection(write: Write) -> str:
    return _type_objection(MtrrDefType(write.new).default_type)


# --- fixed ranges


def _fixed_register(address: int, name: str, start: int, size: int) -> type[Msr]:
    fields = {
        f"at_{start + n * size:05x}": Field(
            8 * n + 4, 8 * n, f"type of {size // KIB} KiB; 8 WrMem, 10h RdMem"
        )
        for n in range(8)
    }
    about = f"Types of the eight ranges from {start:#x} on. Source: [APM2] table 7-9."
    facts = {"__doc__": about, "ADDRESS": address, "NAME": f"MTRRfix{name}"}
    return type(f"MtrrFix{name}", (Msr,), facts | fields)


def _fixed_objection(write: Write) -> str:
    for kind in (write.new & TYPE_BITS).to_bytes(8, "little"):
        if reason := _type_objection(kind):
            return reason
    return ""


def _fixed_kept(write: Write) -> int:
    if write.msrs.get(Syscfg).mtrr_fix_dram_mod_en:
        return write.new
    return write.new & TYPE_BITS | write.old & DRAM_BITS


def _fixed_rule(
    address: int, name: str, start: int, size: int, types: int = ALL_UC
) -> MsrRule:
    return MsrRule(
        _fixed_register(address, name, start, size),
        present=_present,
        needs=NEEDS,
        reset=lambda model, smee: types,
        objection=_fixed_objection,
        kept=_fixed_kept,
        shown=lambda value, msrs: (
            value if msrs.get(Syscfg).mtrr_fix_dram_mod_en else value & TYPE_BITS
        ),
    )


# --- variable ranges


def _numbered(kind: type[Msr], number: int, address: int) -> type[Msr]:
    """Return the register of one range, with the fields that all ranges have."""
    fields = {f.name: Field(f.high, f.low, f.about) for f in kind.FIELDS.values()}
    about = (kind.__doc__ or "").replace("a variable range", f"variable range {number}")
    facts = {"__doc__": about, "ADDRESS": address, "NAME": f"{kind.NAME}{number}"}
    return type(f"{kind.__name__}{number}", (kind,), facts | fields)


def _width_objection(write: Write) -> str:
    smee = bool(write.msrs.get(Syscfg).mem_encrypt)
    width = mtrr_width_bits(write.model, smee)
    if write.new >> width:
        return f"an address has {width} bits here, expected none above"
    return ""


def _base_objection(write: Write) -> str:
    kind = MtrrPhysBase(write.new).memory_type
    return _type_objection(kind) or _width_objection(write)


def _hole_base(model: CpuModel, smee: bool) -> int:
    return PCI_HOLE | UC


def _hole_mask(model: CpuModel, smee: bool) -> int:
    width = mtrr_width_bits(model, smee)
    return (1 << width) - PCI_HOLE_SIZE | MtrrPhysMask.valid.mask


def _off(model: CpuModel, smee: bool) -> int:
    return 0


def _variable_rules(number: int) -> tuple[MsrRule, MsrRule]:
    """Return base and mask of a range; the first one makes the PCI hole UC."""
    address = 0x200 + 2 * number
    return (
        MsrRule(
            _numbered(MtrrPhysBase, number, address),
            present=_present,
            needs=NEEDS,
            reset=_off if number else _hole_base,
            objection=_base_objection,
        ),
        MsrRule(
            _numbered(MtrrPhysMask, number, address + 1),
            present=_present,
            needs=NEEDS,
            reset=_off if number else _hole_mask,
            objection=_width_objection,
        ),
    )


MEMORY_TYPE_RULES: tuple[MsrRule, ...] = (
    MsrRule(
        MtrrCap,
        present=_present,
        needs=NEEDS,
        access=Access.READ,
        reset=lambda model, smee: (
            MtrrCap.of(count=VARIABLE_RANGES, fixed=1, write_combining=1).value
        ),
    ),
    *(rule for number in range(VARIABLE_RANGES) for rule in _variable_rules(number)),
    _fixed_rule(0x250, "64K_00000", 0, 64 * KIB, ALL_WB),
    _fixed_rule(0x258, "16K_80000", 0x8_0000, 16 * KIB, ALL_WB),
    _fixed_rule(0x259, "16K_A0000", 0xA_0000, 16 * KIB),
    *(
        _fixed_rule(0x268 + n, f"4K_{start:X}", start, 4 * KIB)
        for n, start in enumerate(range(0xC_0000, 0x10_0000, 0x8000))
    ),
    MsrRule(
        MtrrDefType,
        present=_present,
        needs=NEEDS,
        reset=lambda model, smee: (
            MtrrDefType.of(default_type=WB, fixed_enable=1, enable=1).value
        ),
        objection=_default_objection,
    ),
)
"""MTRRs, by address."""
