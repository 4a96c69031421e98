"""Tell by its first bytes what a kernel file is, and read it."""

from __future__ import annotations

import os

from .kernel import KernelImage
from .source import ImageSource

ELF_MAGIC = b"\x7fELF"


def load_image(path: str | os.PathLike[str]) -> KernelImage:
    """Read a kernel from a file.

    A bzImage is decompressed once into private memory; an ELF file stays mapped. The
    segments are views of either, so the file must not be changed while the image is
    in use.

    Args:
        path: a bzImage of boot protocol 2.08 or later, or an x86-64 vmlinux.

    Raises:
        InputError: the file is neither, is cut short, or contradicts itself.
        OSError: the file cannot be opened.

    Source: Linux 6.1.192 Documentation/x86/boot.rst.
    """
    return read_image(ImageSource.of_file(path))


def read_image(source: ImageSource) -> KernelImage:
    """Read a kernel from its bytes; otherwise as `load_image`."""
    # Imported here: a run of the built-in kernel needs no ELF library, which would
    # take longer to import than that kernel to make.
    if is_elf(source):
        from .elf import read_vmlinux

        return read_vmlinux(source)
    from .bzimage import read_bzimage

    return read_bzimage(source)


def is_elf(source: ImageSource) -> bool:
    """Say whether a file begins as an ELF file does."""
    return source.data[:4] == ELF_MAGIC
