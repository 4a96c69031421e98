"""A kernel ready to be loaded: segments of bytes, and what a boot loader must know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ...hw.errors import CallerError
from ...hw.types import PhysAddr, VirtAddr
from .layout import KernelLayout


@dataclass(frozen=True)
class Segment:
    """One stretch of memory that the boot loader fills.

    Attributes:
        paddr: physical address of the first byte.
        vaddr: link address; 0 for the per-cpu segment.
        data: read-only bytes of the file.
        memory_size: bytes the segment takes in memory; those behind `data` are zero.
    """

    paddr: PhysAddr
    vaddr: VirtAddr
    data: memoryview = field(repr=False)
    memory_size: int

    @property
    def end(self) -> PhysAddr:
        """Physical address behind the last byte in memory."""
        return PhysAddr(self.paddr + self.memory_size)


@dataclass(frozen=True)
class KernelImage:
    """A decompressed kernel and where it goes. The bytes exist once.

    Attributes:
        name: file name, or "built-in".
        kind: what was loaded.
        segments: lowest physical address first, without overlaps.
        entry: physical address of the 64-bit entry, `startup_64`.
        layout: where the linker script put what.
        setup_header: a bzImage's bytes from 0x1F1 to the end of its setup header, as
            they go into boot_params; None for the other kinds.
        version: the version string of the setup header.
        compression: name of the format, "none" if the kernel was not compressed.
        command_line_size: most bytes a command line may have, its NUL not counted.
    """

    name: str
    kind: Literal["bzImage", "ELF", "built-in"]
    segments: tuple[Segment, ...]
    entry: PhysAddr
    layout: KernelLayout
    setup_header: bytes | None = field(repr=False)
    version: str | None
    compression: str
    command_line_size: int

    def plain_bytes(self, start: PhysAddr, end: PhysAddr) -> bytes:
        """Return what memory [start, end) holds after loading.

        Args:
            start: physical address of the first byte.
            end: physical address behind the last byte.

        Returns:
            `end - start` bytes; zero where the file brings none.

        Raises:
            CallerError: `end` lies below `start`.
        """
        if end < start:
            raise CallerError(f"a range [{start:#x}, {end:#x}) ends before it starts")
        memory = bytearray(end - start)
        for segment in self.segments:
            first = max(start, segment.paddr)
            last = min(end, segment.paddr + len(segment.data))
            if first < last:
                part = segment.data[first - segment.paddr : last - segment.paddr]
                memory[first - start : last - start] = part
        return bytes(memory)
