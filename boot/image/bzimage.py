"""The bzImage: a setup header, and a compressed vmlinux behind it.

    0x000                       real-mode sectors, the setup header from 0x1F1 on
    (setup_sects + 1) * 512     protected-mode code: `syssize` * 16 bytes
      + payload_offset          vmlinux and its relocations, compressed

Source: Linux 6.1.192 Documentation/x86/boot.rst.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...kernel.setup import BOOT_PARAMS_SIZE
from ..params import (
    BOOT_FLAG,
    BOOT_PARAMS,
    HEADER_MAGIC,
    SETUP_HEADER_LIMIT,
    SETUP_HEADER_START,
)
from .decompress import decompress
from .kernel import KernelImage
from .layout import KERNEL_MAPPING_SIZE
from .source import ImageSource

SECTOR = 512
OLD_SETUP_SECTS = 4
"""What a setup_sects of 0 stands for."""
JUMP_OPCODE = 0xEB
PAYLOAD_PROTOCOL = 0x208
"""First protocol with payload_offset and payload_length."""
INIT_SIZE_PROTOCOL = 0x20A
"""First protocol with init_size."""
VERSION_STRING_LIMIT = 512


@dataclass(frozen=True)
class BzImage:
    """A bzImage as a boot loader takes it apart, its payload left compressed.

    Attributes:
        source: the whole file.
        setup_header: its bytes from 0x1F1 to the end of the setup header.
        fields: what the setup header says, under the names of `BOOT_PARAMS`.
        setup_size: bytes of real-mode sectors.
        code: the protected-mode code, decompressor and payload.
        version: the version string, None if there is none.
    """

    source: ImageSource
    setup_header: bytes = field(repr=False)
    fields: dict[str, Any] = field(repr=False)
    setup_size: int
    code: memoryview = field(repr=False)
    version: str | None


def open_bzimage(source: ImageSource) -> BzImage:
    """Take a bzImage apart.

    Args:
        source: the whole file.

    Raises:
        InputError: no setup header, an old protocol, a file that is cut, a version
            string outside of the real-mode sectors.
    """
    header = read_setup_header(source)
    page = bytearray(BOOT_PARAMS_SIZE)
    page[SETUP_HEADER_START : SETUP_HEADER_START + len(header)] = header
    fields = BOOT_PARAMS.parse(page)
    if fields["version"] < PAYLOAD_PROTOCOL:
        major, minor = divmod(fields["version"], 0x100)
        raise source.error(
            0x206, f"boot protocol {major}.{minor:02}; expected 2.08 or later"
        )
    setup_size = ((fields["setup_sects"] or OLD_SETUP_SECTS) + 1) * SECTOR
    code = source.take(setup_size, fields["syssize"] * 16, "protected-mode code")
    version = _version(source, fields["kernel_version"], setup_size)
    return BzImage(source, header, fields, setup_size, code, version)


def read_bzimage(source: ImageSource) -> KernelImage:
    """Read a bzImage and decompress the kernel in it.

    Args:
        source: the whole file.

    Raises:
        InputError: as `open_bzimage`; a payload that does not decompress to its size
            or is no kernel.
    """
    image = open_bzimage(source)
    fields = image.fields
    start, length = fields["payload_offset"], fields["payload_length"]
    if start + length > len(image.code):
        raise source.error(
            0x248,
            f"payload [{start:#x}, {start + length:#x}); expected within "
            f"{len(image.code):#x} bytes of code",
        )
    limit = KERNEL_MAPPING_SIZE
    if fields["version"] >= INIT_SIZE_PROTOCOL:
        # The kernel decompresses in place, so init_size covers all of the output.
        limit = min(limit, fields["init_size"])

    kernel, compression = decompress(source, image.setup_size + start, length, limit)
    # Imported here: whoever runs the image as it is needs no ELF library.
    from .elf import read_vmlinux

    return read_vmlinux(
        kernel,
        name=source.name,
        kind="bzImage",
        setup_header=image.setup_header,
        version=image.version,
        compression=compression,
        command_line_size=fields["cmdline_size"],
    )


def read_setup_header(source: ImageSource) -> bytes:
    """Return the setup header: from 0x1F1 to where its own jump leads.

    Raises:
        InputError: the file has no setup header, or one that is cut or too long.
    """
    boot_flag = source.number(0x1FE, 2, "the boot flag of a bzImage")
    magic = source.number(0x202, 4, "the header magic of a bzImage")
    if (boot_flag, magic) != (BOOT_FLAG, HEADER_MAGIC):
        at = 0x1FE if boot_flag != BOOT_FLAG else 0x202
        raise source.error(
            at,
            "neither an ELF file nor a bzImage; expected 0xaa55 at 0x1fe and "
            "'HdrS' at 0x202",
        )
    opcode, distance = source.take(0x200, 2, "the jump over the setup header")
    end = 0x202 + distance
    if opcode != JUMP_OPCODE or end > SETUP_HEADER_LIMIT:
        raise source.error(
            0x200,
            f"jump {opcode:#04x} {distance:#04x}; expected 0xeb and a setup header "
            f"up to {SETUP_HEADER_LIMIT:#x}",
        )
    size = end - SETUP_HEADER_START
    return bytes(source.take(SETUP_HEADER_START, size, "the setup header"))


def _version(source: ImageSource, pointer: int, setup_size: int) -> str | None:
    """Return the version string at `pointer` + 0x200, None if there is none."""
    if not pointer:
        return None
    start = pointer + 0x200
    if start >= setup_size:
        raise source.error(
            0x20E,
            f"version string at {start:#x}; expected within {setup_size:#x} bytes of "
            "real-mode sectors",
        )
    size = min(VERSION_STRING_LIMIT, setup_size - start)
    text = bytes(source.take(start, size, "the version string"))
    return text.partition(b"\0")[0].decode("latin-1")
