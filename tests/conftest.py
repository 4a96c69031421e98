"""Fixtures that any test may ask for, and the hooks of the conformance report."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Hooks of pytest, in force because they are names of this file.
from .conformance.plugin import pytest_addoption as pytest_addoption
from .conformance.plugin import (
    pytest_collection_modifyitems as pytest_collection_modifyitems,
)
from .conformance.plugin import pytest_configure as pytest_configure

ROOT = Path(__file__).parents[1]

# Machines are noisy: a slow example is no failure. `make soak` tries many more.
settings.register_profile("cbit", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=5000)
settings.load_profile("cbit")


@pytest.fixture(scope="session")
def real_kernel_path() -> Path:
    """A real bzImage: $CBIT_KERNEL, else the newest that `make kernel` brought."""
    if named := os.environ.get("CBIT_KERNEL"):
        return Path(named)
    return _newest("kernel/**/vmlinuz-*", "CBIT_KERNEL")


@pytest.fixture(scope="session")
def generic_kernel_path() -> Path:
    """A second real bzImage: $CBIT_KERNEL, else Debian's generic one."""
    if named := os.environ.get("CBIT_KERNEL"):
        return Path(named)
    return _newest("kernel-generic/boot/vmlinuz-*", "CBIT_KERNEL")


@pytest.fixture(scope="session")
def busybox_path() -> Path:
    """A static x86-64 busybox: $CBIT_BUSYBOX, else what `make kernel` brought."""
    if named := os.environ.get("CBIT_BUSYBOX"):
        return Path(named)
    return _newest("busybox/bin/busybox", "CBIT_BUSYBOX")


def _newest(pattern: str, variable: str) -> Path:
    found = list((ROOT / "build").glob(pattern))
    if not found:
        pytest.fail(f"no build/{pattern} here: run `make kernel`, or set {variable}")
    return max(found, key=lambda path: path.stat().st_mtime)
