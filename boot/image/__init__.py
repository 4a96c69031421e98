"""Kernel images: a bzImage or vmlinux from a file, or a small one made from a seed."""

from .builtin import builtin_image
from .kernel import KernelImage, Segment
from .layout import KernelLayout, Range
from .load import load_image

__all__ = [
    "KernelImage",
    "KernelLayout",
    "Range",
    "Segment",
    "builtin_image",
    "load_image",
]
