"""What a boot loader hands to the kernel: the zero page, its e820 map, setup_data.

The 4096-byte `boot_params` page holds the setup header at the offset it has in a
bzImage, so one declaration serves for both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Self

from construct import Array, Bytes, Int8ul, Int16ul, Int32ul, Int64ul

from ..hw.errors import CallerError, InputError
from ..hw.layouts import layout
from ..hw.types import PAGE_SIZE, PhysAddr, align_up
from ..kernel.setup import BOOT_PARAMS_SIZE

E820_MAX_ENTRIES_ZEROPAGE = 128
SETUP_HEADER_START = 0x1F1
SETUP_HEADER_LIMIT = 0x290
"""A setup header may grow up to here, where the EDD signatures start."""

BOOT_FLAG = 0xAA55
HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
SENTINEL = 0xFF
"""Value of `sentinel` in a bzImage: a loader copied more than the setup header."""

E820_ENTRY = layout(
    20,
    (0x00, "addr", Int64ul),
    (0x08, "size", Int64ul),
    (0x10, "type", Int32ul),
)
"""One range of the memory map. Source: Linux 6.1.192 asm/bootparam.h."""

BOOT_PARAMS = layout(
    BOOT_PARAMS_SIZE,
    (0x000, "screen_info", Bytes(0x40)),
    (0x040, "apm_bios_info", Bytes(0x14)),
    (0x058, "tboot_addr", Int64ul),
    (0x060, "ist_info", Bytes(0x10)),
    (0x070, "acpi_rsdp_addr", Int64ul),
    (0x080, "hd0_info", Bytes(0x10)),
    (0x090, "hd1_info", Bytes(0x10)),
    (0x0A0, "sys_desc_table", Bytes(0x10)),
    (0x0B0, "olpc_ofw_header", Bytes(0x10)),
    (0x0C0, "ext_ramdisk_image", Int32ul),
    (0x0C4, "ext_ramdisk_size", Int32ul),
    (0x0C8, "ext_cmd_line_ptr", Int32ul),
    (0x13C, "cc_blob_address", Int32ul),
    (0x140, "edid_info", Bytes(0x80)),
    (0x1C0, "efi_info", Bytes(0x20)),
    (0x1E0, "alt_mem_k", Int32ul),
    (0x1E4, "scratch", Int32ul),
    (0x1E8, "e820_entries", Int8ul),
    (0x1E9, "eddbuf_entries", Int8ul),
    (0x1EA, "edd_mbr_sig_buf_entries", Int8ul),
    (0x1EB, "kbd_status", Int8ul),
    (0x1EC, "secure_boot", Int8ul),
    (0x1EF, "sentinel", Int8ul),
    # The setup header: these offsets hold in a bzImage as well.
    (0x1F1, "setup_sects", Int8ul),
    (0x1F2, "root_flags", Int16ul),
    (0x1F4, "syssize", Int32ul),  # protected-mode code, in units of 16 bytes
    (0x1F8, "ram_size", Int16ul),
    (0x1FA, "vid_mode", Int16ul),
    (0x1FC, "root_dev", Int16ul),
    (0x1FE, "boot_flag", Int16ul),
    (0x200, "jump", Int16ul),  # EB nn: the header ends at 0x202 + nn
    (0x202, "header", Int32ul),
    (0x206, "version", Int16ul),
    (0x208, "realmode_swtch", Int32ul),
    (0x20C, "start_sys_seg", Int16ul),
    (0x20E, "kernel_version", Int16ul),  # offset of a string, less 0x200
    (0x210, "type_of_loader", Int8ul),
    (0x211, "loadflags", Int8ul),
    (0x212, "setup_move_size", Int16ul),
    (0x214, "code32_start", Int32ul),
    (0x218, "ramdisk_image", Int32ul),
    (0x21C, "ramdisk_size", Int32ul),
    (0x220, "bootsect_kludge", Int32ul),
    (0x224, "heap_end_ptr", Int16ul),
    (0x226, "ext_loader_ver", Int8ul),
    (0x227, "ext_loader_type", Int8ul),
    (0x228, "cmd_line_ptr", Int32ul),
    (0x22C, "initrd_addr_max", Int32ul),
    (0x230, "kernel_alignment", Int32ul),
    (0x234, "relocatable_kernel", Int8ul),
    (0x235, "min_alignment", Int8ul),
    (0x236, "xloadflags", Int16ul),
    (0x238, "cmdline_size", Int32ul),  # without the NUL
    (0x23C, "hardware_subarch", Int32ul),
    (0x240, "hardware_subarch_data", Int64ul),
    (0x248, "payload_offset", Int32ul),  # from the start of protected-mode code
    (0x24C, "payload_length", Int32ul),
    (0x250, "setup_data", Int64ul),
    (0x258, "pref_address", Int64ul),
    (0x260, "init_size", Int32ul),
    (0x264, "handover_offset", Int32ul),
    (0x268, "kernel_info_offset", Int32ul),
    # Behind the setup header.
    (0x290, "edd_mbr_sig_buffer", Array(16, Int32ul)),
    (0x2D0, "e820_table", Bytes(E820_MAX_ENTRIES_ZEROPAGE * E820_ENTRY.size)),
    (0xD00, "eddbuf", Bytes(0x1EC)),
)
"""The zero page.

Source: Linux 6.1.192 Documentation/x86/zero-page.rst, boot.rst; asm/bootparam.h.
"""


class E820Type(IntEnum):
    """What a range of the memory map is. Source: Linux 6.1.192 asm/e820/types.h."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4
    UNUSABLE = 5
    PMEM = 7
    PRAM = 12
    RESERVED_KERN = 128
    SOFT_RESERVED = 0xEFFF_FFFF


@dataclass(frozen=True)
class E820Entry:
    """One range [addr, addr + size) of the memory map; unknown types stay numbers."""

    addr: PhysAddr
    size: int
    type: E820Type | int

    def build(self) -> bytes:
        """Return the 20 bytes of the entry."""
        return E820_ENTRY.build(vars(self))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read the 20 bytes of an entry."""
        values = E820_ENTRY.parse(data)
        kind = values["type"]
        known = E820Type(kind) if kind in list(E820Type) else kind
        return cls(PhysAddr(values["addr"]), values["size"], known)


@dataclass(frozen=True)
class BootParams:
    """The zero page with the fields that early boot reads, under Linux's names.

    `rest` keeps every other byte of the page, so `parse(page).build() == page`.
    """

    acpi_rsdp_addr: int = 0
    ext_ramdisk_image: int = 0
    ext_ramdisk_size: int = 0
    ext_cmd_line_ptr: int = 0
    cc_blob_address: int = 0
    sentinel: int = 0
    setup_sects: int = 0
    boot_flag: int = BOOT_FLAG
    header: int = HEADER_MAGIC
    version: int = 0x20F
    type_of_loader: int = 0
    loadflags: int = 0
    code32_start: int = 0
    ramdisk_image: int = 0
    ramdisk_size: int = 0
    heap_end_ptr: int = 0
    cmd_line_ptr: int = 0
    initrd_addr_max: int = 0
    kernel_alignment: int = 0
    cmdline_size: int = 0
    setup_data: int = 0
    pref_address: int = 0
    init_size: int = 0
    e820_table: tuple[E820Entry, ...] = ()
    rest: bytes = field(default=bytes(BOOT_PARAMS_SIZE), repr=False)

    @classmethod
    def from_setup_header(cls, setup_header: bytes | None) -> Self:
        """Start a zero page as a boot loader does: clean, then the kernel's header.

        Args:
            setup_header: the kernel's bytes from 0x1F1 on; None for a kernel without,
                whose page then carries the two magic numbers and protocol 2.15.

        Raises:
            CallerError: the header is longer than its place in the page.

        Source: Linux 6.1.192 Documentation/x86/boot.rst, 64-bit boot protocol.
        """
        if setup_header is None:
            return cls()
        end = SETUP_HEADER_START + len(setup_header)
        if end > SETUP_HEADER_LIMIT:
            raise CallerError(
                f"a setup header up to {SETUP_HEADER_LIMIT:#x}, got one up to {end:#x}"
            )
        page = bytearray(BOOT_PARAMS_SIZE)
        page[SETUP_HEADER_START:end] = setup_header
        return cls.parse(bytes(page))

    @classmethod
    def parse(cls, page: bytes) -> Self:
        """Read a zero page.

        Args:
            page: 4096 bytes.

        Raises:
            CallerError: the length is wrong.
            InputError: e820_entries is larger than the table.
        """
        if len(page) != BOOT_PARAMS_SIZE:
            raise CallerError(f"boot_params has 4096 bytes, got {len(page)}")
        count = BOOT_PARAMS.get(page, "e820_entries")
        if count > E820_MAX_ENTRIES_ZEROPAGE:
            raise InputError(
                f"boot_params: e820_entries at 0x1e8 is {count}; the table holds "
                f"{E820_MAX_ENTRIES_ZEROPAGE}"
            )
        start = BOOT_PARAMS.offsets["e820_table"]
        size = E820_ENTRY.size
        stops = [start + i * size for i in range(count + 1)]
        table = tuple(E820Entry.parse(page[at : at + size]) for at in stops[:-1])
        rest = bytearray(page)
        rest[start : stops[-1]] = bytes(stops[-1] - start)
        for name in (*_NUMBERS, "e820_entries"):
            BOOT_PARAMS.put(rest, name, 0)
        numbers = {name: BOOT_PARAMS.get(page, name) for name in _NUMBERS}
        return cls(**numbers, e820_table=table, rest=bytes(rest))

    def build(self) -> bytes:
        """Return the 4096 bytes of the page.

        Raises:
            CallerError: a value does not fit its field, or the map has more than 128
                entries.
        """
        if len(self.e820_table) > E820_MAX_ENTRIES_ZEROPAGE:
            raise CallerError(
                f"the e820 table holds {E820_MAX_ENTRIES_ZEROPAGE} entries, "
                f"got {len(self.e820_table)}"
            )
        page = bytearray(self.rest)
        for name in _NUMBERS:
            BOOT_PARAMS.put(page, name, getattr(self, name))
        BOOT_PARAMS.put(page, "e820_entries", len(self.e820_table))
        table = b"".join(entry.build() for entry in self.e820_table)
        start = BOOT_PARAMS.offsets["e820_table"]
        page[start : start + len(table)] = table
        return bytes(page)

    @property
    def cmd_line(self) -> PhysAddr:
        """Address of the command line, both halves of the pointer joined."""
        return PhysAddr(self.cmd_line_ptr | self.ext_cmd_line_ptr << 32)

    def with_cmd_line(self, pa: PhysAddr) -> Self:
        """Return a copy whose command line is at `pa`."""
        low, high = _halves(pa)
        return replace(self, cmd_line_ptr=low, ext_cmd_line_ptr=high)

    @property
    def initrd_start(self) -> PhysAddr:
        """Address of the initrd; Linux does not align it."""
        return PhysAddr(self.ramdisk_image | self.ext_ramdisk_image << 32)

    @property
    def initrd_len(self) -> int:
        """Length of the initrd in bytes, 0 for none."""
        return int(self.ramdisk_size | self.ext_ramdisk_size << 32)

    @property
    def initrd_end(self) -> PhysAddr:
        """End of the initrd, rounded up to a page."""
        return PhysAddr(align_up(self.initrd_start + self.initrd_len, PAGE_SIZE))

    def with_initrd(self, start: PhysAddr, length: int) -> Self:
        """Return a copy whose initrd is [start, start + length)."""
        image, ext_image = _halves(start)
        size, ext_size = _halves(length)
        return replace(
            self,
            ramdisk_image=image,
            ramdisk_size=size,
            ext_ramdisk_image=ext_image,
            ext_ramdisk_size=ext_size,
        )


_NUMBERS = [f.name for f in fields(BootParams) if f.name in BOOT_PARAMS.offsets]
_NUMBERS.remove("e820_table")


def _halves(value: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of a 64-bit value."""
    if not 0 <= value < 1 << 64:
        raise CallerError(f"an address or length of 64 bits, got {value:#x}")
    return value & 0xFFFF_FFFF, value >> 32


class SetupDataType(IntEnum):
    """What a node of the setup_data list carries. Source: Linux asm/bootparam.h."""

    NONE = 0
    E820_EXT = 1
    DTB = 2
    PCI = 3
    EFI = 4
    APPLE_PROPERTIES = 5
    JAILHOUSE = 6
    CC_BLOB = 7
    IMA = 8
    RNG_SEED = 9
    INDIRECT = 1 << 31


NO_NODE = PhysAddr(0)

SETUP_DATA_HEADER = layout(
    16,
    (0x00, "next", Int64ul),
    (0x08, "type", Int32ul),
    (0x0C, "len", Int32ul),
)
"""Head of a setup_data node; `len` bytes follow. Source: Linux asm/bootparam.h."""

SETUP_INDIRECT = layout(
    24,
    (0x00, "type", Int32ul),
    (0x08, "len", Int64ul),
    (0x10, "addr", Int64ul),
)
"""Data of an INDIRECT node: it lies elsewhere. Source: Linux asm/bootparam.h."""


@dataclass(frozen=True)
class SetupData:
    """One node of the list that starts at `BootParams.setup_data`.

    Attributes:
        type: a `SetupDataType`, or a number this version does not know.
        data: the bytes behind the head.
        next: address of the next node, 0 at the end.
    """

    type: int
    data: bytes
    next: PhysAddr = NO_NODE

    def build(self) -> bytes:
        """Return head and data."""
        head = {"next": self.next, "type": self.type, "len": len(self.data)}
        return SETUP_DATA_HEADER.build(head) + self.data

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Read a node; bytes behind its data are ignored.

        Raises:
            InputError: `raw` is shorter than the head, or than `len` promises.
        """
        size = SETUP_DATA_HEADER.size
        if len(raw) < size:
            raise InputError(f"setup_data: a head of {size} bytes, got {len(raw)}")
        head = SETUP_DATA_HEADER.parse(raw[:size])
        data = raw[size : size + head["len"]]
        if len(data) < head["len"]:
            raise InputError(
                f"setup_data: {head['len']:#x} bytes of data, got {len(data):#x}"
            )
        return cls(head["type"], data, PhysAddr(head["next"]))

    @property
    def indirect(self) -> SetupIndirect | None:
        """Where the data of an INDIRECT node lies; None for any other node.

        Raises:
            InputError: the node says INDIRECT but is too short for it.
        """
        if self.type != SetupDataType.INDIRECT:
            return None
        if len(self.data) < SETUP_INDIRECT.size:
            raise InputError(
                f"setup_data: INDIRECT has {SETUP_INDIRECT.size} bytes of data, "
                f"got {len(self.data)}"
            )
        values = SETUP_INDIRECT.parse(self.data[: SETUP_INDIRECT.size])
        return SetupIndirect(values["type"], PhysAddr(values["addr"]), values["len"])


@dataclass(frozen=True)
class SetupIndirect:
    """Setup data that lies outside of its node, at [addr, addr + len)."""

    type: int
    addr: PhysAddr
    len: int

    def build(self) -> bytes:
        """Return the 24 bytes that an INDIRECT node holds."""
        return SETUP_INDIRECT.build(vars(self))
