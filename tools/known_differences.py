"""Where the reference and a real kernel differ, and why that is right.

`cbit diff` reports every byte and every event that differs. These are the ones that
are expected; each has a name, a reason, and a test that is as narrow as the facts
allow. Nothing else is forgiven.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..boot.image import KernelLayout
from ..boot.loader import BOOT_TABLES
from ..hw.types import LARGE_PAGE_SIZE, PAGE_SIZE
from ..kernel.cc import EncryptionState

ACCESSED_DIRTY = 0x60
VMM_COMMUNICATION = 29
"""#VC, whose gate Linux puts into its bring-up IDT."""
INTERRUPT_GATE = 0x8E
KERNEL_CS = 0x10
CC_VENDOR_AMD = 1


@dataclass(frozen=True)
class Word:
    """Eight bytes that differ.

    Attributes:
        pa: physical address, a multiple of 8.
        image: what the image brought there.
        reference, native: what the two machines hold, as plaintext.
    """

    pa: int
    image: int
    reference: int
    native: int


@dataclass(frozen=True)
class Context:
    """What the tests may look at.

    Attributes:
        layout: of the kernel.
        state: what the reference decided.
        stack: physical address of the real kernel's stack pointer at the end.
    """

    layout: KernelLayout
    state: EncryptionState
    stack: int


@dataclass(frozen=True)
class Known:
    """One expected difference.

    Attributes:
        name: in reports.
        row: of the requirements (tests/requirements.toml).
        reason: why it is right.
        holds: tells whether a word is this difference.
        most: words that may be; more are differences.
    """

    name: str
    row: str
    reason: str
    holds: Callable[[Word, Context], bool]
    most: int


def _loader_tables(word: Word, context: Context) -> bool:
    inside = BOOT_TABLES <= word.pa < BOOT_TABLES + 7 * PAGE_SIZE
    return inside and not (word.reference ^ word.native) & ~ACCESSED_DIRTY


def _copy_routine(word: Word, context: Context) -> bool:
    start = context.layout.workarea.start
    return start <= word.pa < start + 2 * PAGE_SIZE and word.reference == 0


def _copy_buffer(word: Word, context: Context) -> bool:
    start = context.layout.workarea.start + 2 * PAGE_SIZE
    return start <= word.pa < start + LARGE_PAGE_SIZE and not context.state.me_mask


def _stack(word: Word, context: Context) -> bool:
    return (
        word.reference == word.image
        and context.stack - PAGE_SIZE <= word.pa < context.stack + PAGE_SIZE
        and word.pa >> 14 == context.stack - 1 >> 14
    )


def _only_native_wrote(word: Word) -> bool:
    return word.reference == word.image


def _encryption_mask(word: Word, context: Context) -> bool:
    mask = context.state.me_mask
    return (
        _only_native_wrote(word)
        and mask != 0
        and (word.image, word.native) == (0, mask)
    )


def _physical_mask(word: Word, context: Context) -> bool:
    return _only_native_wrote(word) and word.native == (
        word.image & context.state.physical_mask
    )


def _vendor(word: Word, context: Context) -> bool:
    """A 32-bit variable that was 0 becomes 1."""
    return _only_native_wrote(word) and (
        (word.native == word.image + CC_VENDOR_AMD and not word.image & 0xFFFF_FFFF)
        or (word.native == word.image + (CC_VENDOR_AMD << 32) and not word.image >> 32)
    )


def _vc_gate(word: Word, context: Context) -> bool:
    gate = word.native
    return (
        _only_native_wrote(word)
        and word.image == 0
        and word.pa % PAGE_SIZE == VMM_COMMUNICATION * 16
        and gate >> 40 & 0xFF == INTERRUPT_GATE
        and gate >> 16 & 0xFFFF == KERNEL_CS
    )


def _descriptor(word: Word, context: Context) -> bool:
    """A table's limit in the lowest 16 bits, its address behind."""
    layout = context.layout
    base = word.native >> 16
    return (
        _only_native_wrote(word)
        and word.image >> 16 == 0
        and word.image == word.native & 0xFFFF
        and layout.text_start <= base < layout.end
    )


def _next_table(word: Word, context: Context) -> bool:
    """A 32-bit counter of early page tables: 2, or 3 with five levels."""
    return (
        _only_native_wrote(word)
        and word.image == 0
        and word.native
        in (
            2,
            3,
            2 << 32,
            3 << 32,
        )
    )


def _five_level_variable(word: Word, context: Context) -> bool:
    """Variables that hold 48 or 39 and 512 or 1 by the number of levels."""
    halves = [
        (word.image >> s & 0xFFFF_FFFF, word.native >> s & 0xFFFF_FFFF) for s in (0, 32)
    ]
    allowed = {(0, 1), (39, 48), (1, 512)}
    if word.native in FIVE_LEVEL_BASES:
        return _only_native_wrote(word)
    return _only_native_wrote(word) and all(
        old == new or (old, new) in allowed for old, new in halves
    )


FIVE_LEVEL_BASES = frozenset(
    {0xFF11_0000_0000_0000, 0xFFA0_0000_0000_0000, 0xFFD4_0000_0000_0000}
)
"""Direct map, vmalloc and vmemmap with five levels.

Source: Linux 6.1.192 asm/page_64_types.h, asm/pgtable_64_types.h.
"""

KNOWN: tuple[Known, ...] = (
    Known(
        "loader tables",
        "PT-30",
        "the reference executes no code, so it marks fewer of the boot loader's pages "
        "accessed or dirty",
        _loader_tables,
        64,
    ),
    Known(
        "copy routine and its stack",
        "LB-60",
        "the reference copies without code of its own: the first two pages of the "
        "work area stay empty",
        _copy_routine,
        128,
    ),
    Known(
        "initial stack",
        "LB-60",
        "return addresses and locals of the real kernel's functions",
        _stack,
        256,
    ),
    Known(
        "sme_me_mask, cc_mask",
        "LB-10",
        "the reference passes the decision on instead of storing it",
        _encryption_mask,
        2,
    ),
    Known("physical_mask", "LB-10", "as above", _physical_mask, 1),
    Known("cc_vendor", "LB-10", "as above", _vendor, 1),
    Known(
        "bringup_idt_table[29]",
        "LB-70",
        "the gate of #VC, for SEV-ES guests; the reference is a host",
        _vc_gate,
        1,
    ),
    Known(
        "startup_gdt_descr, bringup_idt_descr",
        "LB-70",
        "operands of LGDT and LIDT",
        _descriptor,
        2,
    ),
    Known(
        "next_early_pgt",
        "LB-21",
        "a counter that the reference keeps in Python",
        _next_table,
        1,
    ),
    Known(
        "five-level variables",
        "LB-20",
        "__pgtable_l5_enabled, pgdir_shift, ptrs_per_p4d and the bases of the maps, "
        "which the reference derives from CR4",
        _five_level_variable,
        8,
    ),
)

KNOWN_EVENTS: tuple[tuple[str, str, str], ...] = (
    (
        "flush wbinvd",
        "LB-64",
        "only the reference: it flushes before .bss..decrypted is shared, because on "
        "a part without coherent tags the copied lines may still be dirty",
    ),
)
"""Events of the reference that a real kernel does not have: event, row, reason."""
