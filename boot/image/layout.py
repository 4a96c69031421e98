"""Where the parts of a loaded kernel lie, as Linux's linker script defines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...hw.types import LARGE_PAGE_SIZE, PhysAddr, VirtAddr, align_up

WORKAREA_SIZE = 4 << 20
"""Length of sme_workarea. Source: Linux 6.1.192 arch/x86/mm/mem_encrypt_identity.c."""

KERNEL_MAPPING_SIZE = 1 << 30
"""Most that a kernel may span: KERNEL_IMAGE_SIZE of Linux 6.1.192 asm/page_64_types.h,
with address randomization."""

FoundBy = Literal["symbols", "sections", "segments"]


@dataclass(frozen=True)
class Range:
    """Physical addresses [start, end)."""

    start: PhysAddr
    end: PhysAddr

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    def __contains__(self, pa: object) -> bool:
        return isinstance(pa, int) and self.start <= pa < self.end


@dataclass(frozen=True)
class KernelLayout:
    """Physical addresses of a kernel that lies where it was linked.

    Attributes:
        text_start: `_text`, the lowest byte of the image, 2 MiB aligned.
        end: `_end`, behind .bss and .brk; page aligned in a Linux image.
        bss: what `clear_bss` zeroes, .bss..decrypted included.
        bss_decrypted: .bss..decrypted, aligned to 2 MiB at both ends; empty where
            the image has none or does not say.
        workarea: sme_workarea, 4 MiB behind `end`, 2 MiB aligned.
        virtual_base: the link address of `text_start`.
        found_by: what the addresses were read from. "symbols" are exact. "sections"
            take .bss..decrypted to be the last 2 MiB of a .bss that ends on a 2 MiB
            boundary. "segments" know neither .bss..decrypted nor the work area, and
            `end` is the end of the last segment.

    Source: Linux 6.1.192 arch/x86/kernel/vmlinux.lds.S.
    """

    text_start: PhysAddr
    end: PhysAddr
    bss: Range
    bss_decrypted: Range
    workarea: Range
    virtual_base: VirtAddr
    found_by: FoundBy

    @property
    def kernel_start(self) -> PhysAddr:
        """First byte that is encrypted in place."""
        return self.text_start

    @property
    def kernel_end(self) -> PhysAddr:
        """End of what is encrypted in place: `end`, rounded up to 2 MiB."""
        return PhysAddr(align_up(self.end, LARGE_PAGE_SIZE))

    def phys(self, va: VirtAddr) -> PhysAddr:
        """Return where the byte that was linked at `va` is loaded."""
        return PhysAddr(va - self.virtual_base + self.text_start)

    def virt(self, pa: PhysAddr) -> VirtAddr:
        """Return the link address of a byte of the loaded kernel."""
        return VirtAddr(pa - self.text_start + self.virtual_base)


def workarea_behind(end: int) -> Range:
    """Return the work area of an image that brings none: the next 2 MiB boundary."""
    start = align_up(end, LARGE_PAGE_SIZE)
    return Range(PhysAddr(start), PhysAddr(start + WORKAREA_SIZE))


def flaw_of(layout: KernelLayout) -> str:
    """Say what no linker script of Linux would do with these addresses, or ''."""
    bss, shared, area = layout.bss, layout.bss_decrypted, layout.workarea
    if layout.text_start % LARGE_PAGE_SIZE:
        return f"_text at {layout.text_start:#x}; expected a multiple of 2 MiB"
    if not layout.text_start <= bss.start <= bss.end <= layout.end:
        return (
            f".bss [{bss.start:#x}, {bss.end:#x}) is not within the kernel "
            f"[{layout.text_start:#x}, {layout.end:#x})"
        )
    if not 0 < layout.end - layout.text_start <= KERNEL_MAPPING_SIZE:
        return (
            f"_end at {layout.end:#x}; expected up to 1 GiB behind _text at "
            f"{layout.text_start:#x}"
        )
    if shared.size and not bss.start <= shared.start < shared.end <= bss.end:
        return (
            f".bss..decrypted [{shared.start:#x}, {shared.end:#x}) is not within "
            f".bss [{bss.start:#x}, {bss.end:#x})"
        )
    if (shared.start | shared.end) % LARGE_PAGE_SIZE and shared.size:
        return (
            f".bss..decrypted [{shared.start:#x}, {shared.end:#x}); "
            "expected multiples of 2 MiB"
        )
    if area.start < layout.end or area.start % LARGE_PAGE_SIZE:
        return (
            f"sme_workarea at {area.start:#x}; expected a multiple of 2 MiB "
            f"behind _end at {layout.end:#x}"
        )
    return ""
