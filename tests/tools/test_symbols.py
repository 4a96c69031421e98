"""Names of addresses, from a System.map or an ELF file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cbit.hw.errors import InputError
from cbit.tools.symbols import Symbols

MAP = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T startup_64
ffffffff81000100 t local_function
ffffffff82a03000 D init_stack
"""


@pytest.fixture
def symbols(tmp_path: Path) -> Symbols:
    path = tmp_path / "System.map"
    path.write_text(MAP)
    return Symbols.of(str(path))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFF_FFFF_8100_0000, "startup_64+0x0"),
        (0xFFFF_FFFF_8100_00FF, "startup_64+0xff"),
        (0xFFFF_FFFF_8100_0101, "local_function+0x1"),
        (0xFFFF_FFFF_80FF_FFFF, ""),  # before the first
        (0xFFFF_FFFF_9000_0000, ""),  # too far behind the last
        (0x10, ""),  # absolute symbols name no code
    ],
)
def test_an_address_belongs_to_the_symbol_before_it(
    symbols: Symbols, address: int, name: str
) -> None:
    assert symbols.name(address) == name


def test_a_slide_is_taken_out(symbols: Symbols) -> None:
    assert symbols.name(0xFFFF_FFFF_9100_0004, slide=0x1000_0000) == "startup_64+0x4"


def test_a_name_has_an_address(symbols: Symbols) -> None:
    assert symbols.address("init_stack") == 0xFFFF_FFFF_82A0_3000
    assert symbols.address("nothing") is None
    assert len(symbols) == 3


def test_no_file_gives_no_names() -> None:
    assert Symbols.of(None).name(0x1000) == ""


def test_an_elf_file_has_its_own_symbols(tmp_path: Path) -> None:
    # The interpreter's C library is an ELF file; stripped ones have no .symtab.
    source = tmp_path / "a.s"
    source.write_text(".globl here\n.text\nnop\nhere: ret\n")
    target = tmp_path / "a.o"
    subprocess.run(["as", "-o", str(target), str(source)], check=True)
    assert Symbols.of(str(target)).address("here") == 1


@pytest.mark.parametrize(
    "text",
    ["", "hello\n", "zz T name\n", "ffffffff81000000 T\n", "1 A only_absolute\n"],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(InputError, match=r"System\.map"):
        Symbols.of(str(path))


def test_a_cut_elf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(Path(sys.executable).read_bytes()[:40])
    with pytest.raises(InputError):
        Symbols.of(str(path))
