"""Fixtures that any test may ask for."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_kernel_path() -> Path:
    """A real bzImage: $CBIT_KERNEL, else the newest that `make kernel` brought."""
    if named := os.environ.get("CBIT_KERNEL"):
        return Path(named)
    found = list((ROOT / "build" / "kernel").glob("**/vmlinuz-*"))
    if not found:
        pytest.fail("no real kernel here: run `make kernel`, or set CBIT_KERNEL")
    return max(found, key=lambda path: path.stat().st_mtime)
