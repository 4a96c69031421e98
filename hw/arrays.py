"""Types of numpy arrays, by what lies in them; for annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Words: TypeAlias = "npt.NDArray[np.uint64]"
Index: TypeAlias = "npt.NDArray[np.intp]"
"""Numbers of pages or lines."""

Marks: TypeAlias = "npt.NDArray[np.uint16]"
"""Key slots plus 1, or key slots, by page or by line."""

Flags: TypeAlias = "npt.NDArray[np.bool_]"
