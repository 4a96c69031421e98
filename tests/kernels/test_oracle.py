"""`cbit diff`: the reference and the kernel's own code agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cbit.boot.image import KernelLayout, load_image
from cbit.hw.arrays import Words
from cbit.kernel.cc import EncryptionState
from cbit.tools import known_differences, native_diff
from cbit.tools.native_diff import DiffRequest, compare

from .conftest import COHERENT, FIVE_LEVELS, INCOHERENT, Cbit

CASES = [
    (INCOHERENT, [], False),
    (COHERENT, [], True),
    (FIVE_LEVELS, ["--la57"], False),
    (FIVE_LEVELS, ["--la57"], True),
    (INCOHERENT, ["--no-smee"], False),
]


@pytest.mark.parametrize(("model", "more", "initrd"), CASES)
@pytest.mark.parametrize("which", ["cloud", "generic"])
def test_the_reference_equals_the_kernel(
    cbit: Cbit,
    real_kernel_path: Path,
    generic_kernel_path: Path,
    archives: dict[str, Path],
    which: str,
    model: str,
    more: list[str],
    initrd: bool,
) -> None:
    kernel = real_kernel_path if which == "cloud" else generic_kernel_path
    if initrd:
        more = [*more, "--initrd", str(archives["batch"])]
    done = cbit("diff", kernel, "--cpu", model, "--json", *more)
    assert done.code == 0, done.out + done.err
    facts = done.facts
    assert facts["equal"] is True
    assert facts["differences"] == facts["events"] == []
    assert facts["compared"] == 512 << 20
    assert facts["masks"]["me_mask"]["reference"] == facts["masks"]["me_mask"]["native"]
    assert facts["cr3"]["reference"] == facts["cr3"]["native"]
    # A handful of words of data, a page of stack; the tables are not among them.
    assert sum(facts["known"].values()) < 150


@pytest.fixture
def no_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_diff, "KNOWN", ())


@pytest.mark.usefixtures("no_known")
def test_without_the_list_every_known_difference_shows(real_kernel_path: Path) -> None:
    result = compare(DiffRequest(str(real_kernel_path), cpu=COHERENT))
    assert not result.equal
    area = load_image(real_kernel_path).layout.workarea
    assert any(area.start <= word.pa < area.start + 0x2000 for word in result.words)
    assert any(word.native == 1 << 51 for word in result.words)  # sme_me_mask


def test_a_wrong_table_of_the_reference_is_found(
    real_kernel_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reference that forgets to take P from the entries outside the kernel (LB-22).
    from cbit.boot import early_tables

    true_pmds = early_tables.kernel_pmds

    def all_present(state: EncryptionState, layout: KernelLayout) -> Words:
        return true_pmds(state, layout) | np.uint64(1)

    monkeypatch.setattr(early_tables, "kernel_pmds", all_present)
    result = compare(DiffRequest(str(real_kernel_path), cpu=COHERENT))
    assert not result.equal
    assert len(result.words) > 400
    assert {word.reference ^ word.native for word in result.words} == {1}


def test_every_known_difference_has_a_reason_and_a_row() -> None:
    assert all(known.reason and known.row for known in known_differences.KNOWN)
    names = [known.name for known in known_differences.KNOWN]
    assert len(set(names)) == len(names)


def test_what_is_no_kernel_is_one_error_line(cbit: Cbit, tmp_path: Path) -> None:
    empty, junk = tmp_path / "empty", tmp_path / "junk"
    empty.touch()
    junk.write_bytes(b"\x7fELF" + bytes(60))
    for path in (empty, junk, tmp_path / "none"):
        done = cbit("diff", path)
        assert done.code == 1
        assert done.err.startswith("Error: ")
        assert done.err.count("\n") == 1
