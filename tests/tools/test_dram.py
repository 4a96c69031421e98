"""`cbit dram snoop` from the shell: what it prints, and what it refuses."""

import json
import os
import pty
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cbit.hw.types import PAGE_SIZE
from cbit.tools import dram
from cbit.tools.cli import run
from cbit.tools.dram_file import ByteArray, Extent, write_dram_file

SECRET = "the password is swordfish"


def ciphertext(num_pages: int, seed: int = 1) -> ByteArray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, num_pages * PAGE_SIZE, dtype=np.uint8)


def secret_page() -> ByteArray:
    page = np.zeros(PAGE_SIZE, np.uint8)
    page[0x10 : 0x10 + len(SECRET)] = list(SECRET.encode())
    return page


@pytest.fixture
def dump(tmp_path: Path) -> str:
    path = tmp_path / "boot.dram"
    extents = [(0x3000, secret_page()), (1 << 30, ciphertext(100))]
    write_dram_file(path, 64 << 30, extents)
    return str(path)


@pytest.fixture
def later(tmp_path: Path) -> str:
    path = tmp_path / "later.dram"
    cells = ciphertext(100)
    cells[: 99 * PAGE_SIZE] = ciphertext(99, seed=2)
    write_dram_file(path, 64 << 30, [(1 << 30, cells)])
    return str(path)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["dram", "snoop", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> str:
    assert run(["dram", "snoop", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    return error


def test_the_map_totals_and_strings_are_printed(
    dump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output(capsys, dump).splitlines()
    assert (
        lines[0] == "DRAM of boot.dram: 64.0 GiB, 404.0 KiB in pages that are not zero"
    )
    assert "         0x0  ...p" + "." * 60 in lines
    assert "  0x40000000  " + "#" * 64 in lines
    assert "  0x40040000  " + "#" * 36 + "." * 28 in lines
    assert any("... 63.0 GiB never written or zero ..." in line for line in lines)
    assert "zero                16777115 pages    64.0 GiB" in lines
    assert "plain                      1 pages     4.0 KiB" in lines
    assert "encrypted-looking        100 pages   400.0 KiB" in lines
    assert f"          0x3010  {SECRET}" in lines


def test_output_in_a_pipe_has_no_colour_and_no_wrapped_line(
    dump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, dump, "--find", "swordfish", "--find", "x" * 300)
    assert "\x1b" not in text
    assert f'find "{"x" * 300}": not found\n' in text
    assert 'find "swordfish": 1 found at 0x3020\n' in text
    assert text.isascii()


def test_texts_that_are_no_text_are_searched_and_printed(
    dump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"\xff\x1b[31m")
    assert r'find "\xff\x1b[31m": not found' in output(capsys, dump, "--find", odd)
    assert "[red]" in output(capsys, dump, "--find", "[red]")


def test_json_tells_the_same_facts(
    dump: str, later: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(output(capsys, dump, "--json", "--find", "swordfish"))
    assert facts["size"] == 64 << 30
    assert facts["pages"] == {"zero": 16777115, "plain": 1, "encrypted": 100}
    assert 7.9 < facts["entropy_thresholds"]["min"] < 7.955
    assert 7.955 < facts["entropy_thresholds"]["max"] < 8
    assert facts["find"] == {"swordfish": ["0x3020"]}
    best = facts["strings"]["shown"][0]
    assert best == {"address": "0x3010", "length": len(SECRET), "text": SECRET}
    assert facts["repeats"] is None
    facts = json.loads(output(capsys, dump, later, "--json"))
    assert facts["repeats"] == {
        "pages": 100,
        "unchanged_pages": 1,
        "partly_equal_pages": 0,
        "blocks": 256,
        "ranges": {"count": 1, "shown": [["0x40063000", "0x40064000"]]},
    }


def test_two_snapshots_show_the_ciphertext_that_repeats(
    dump: str, later: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, dump, later)
    assert "256 blocks of 16 bytes are the same in both snapshots" in text
    assert "1 unchanged, 0 changed in part, 99 changed wholly" in text
    assert "  0x40063000..0x40064000  4.0 KiB" in text


def test_the_length_and_the_number_of_strings_can_be_chosen(
    dump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(capsys, dump, "--min-length", "25", "--strings", "1")
    assert "strings: 1\n" in text
    assert SECRET in text
    assert "strings: 0\n" in output(capsys, dump, "--min-length", "26")
    assert SECRET not in output(capsys, dump, "--strings", "0")


def test_pictures_are_written_beside_the_text(
    dump: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png, html = tmp_path / "map.png", tmp_path / "map.html"
    assert "DRAM of" in output(capsys, dump, "--png", str(png), "--html", str(html))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert SECRET in html.read_text("utf-8")


@pytest.mark.parametrize("option", ["--png", "--html"])
def test_a_picture_that_cannot_be_written_is_one_line(
    dump: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "nowhere" / "map")
    error = refusal(capsys, dump, option, path, code=1)
    assert error == f"Error: {path}: No such file or directory\n"
    error = refusal(capsys, dump, option, "/dev/full", code=1)
    assert error == "Error: /dev/full: No space left on device\n"


def test_misuse_is_refused_with_exit_code_2(
    dump: str, later: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, what in [
        ([], "expected FILE or --boot"),
        ([dump, "--boot"], "exclude each other"),
        ([dump, later, "--boot"], "FILE and FILE2 exclude each other"),
        ([dump, later, dump], "unexpected extra argument"),
        ([dump, "--tsme"], "--tsme goes with --boot only"),
        ([dump, "--no-smee"], "--smee goes with --boot only"),
        ([dump, "--find", ""], "--find"),
        ([dump, "--min-length", "0"], "--min-length"),
        (["--boot", "--seed", "many"], "is no integer"),
    ]:
        assert what in refusal(capsys, *arguments, code=2)


def test_what_is_no_dump_is_refused_in_one_line(
    tmp_path: Path, dump: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    for path, what in [
        (tmp_path / "missing", "No such file or directory"),
        (tmp_path / "empty", "0 bytes, expected at least one page"),
        (tmp_path, "a directory"),
    ]:
        for arguments in ([str(path)], [dump, str(path)]):
            error = refusal(capsys, *arguments, code=1)
            assert what in error
            assert str(path) in error


def test_a_dump_cut_short_is_analysed_and_the_loss_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut"
    path.write_bytes(secret_page().tobytes() + b"rest")
    assert run(["dram", "snoop", str(path)]) == 0
    captured = capsys.readouterr()
    assert "last 4 bytes, from 0x1000 on" in captured.err
    assert captured.err.count("\n") == 1
    assert SECRET in captured.out


def test_boot_options_reach_the_boot_and_its_dram_is_snooped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def booted_dram(**options: object) -> tuple[int, Iterable[Extent]]:
        asked.update(options)
        return 1 << 30, iter([(0x5000, secret_page())])

    boot = ModuleType("cbit.tools.boot")
    boot.booted_dram = booted_dram  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cbit.tools.boot", boot)
    text = output(capsys, "--boot", "--seed", "0x10", "--no-smee", "--cpu", "rome")
    assert asked == {"seed": 16, "smee": False, "cpu": "rome"}
    assert "DRAM of this boot: 1.0 GiB" in text
    assert f"0x5010  {SECRET}" in text


@pytest.mark.parametrize("late", [True, False])
def test_progress_shows_on_a_terminal_and_only_when_it_takes_long(
    late: bool, dump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dram, "PROGRESS_DELAY", 0.0 if late else 60.0)
    monkeypatch.setenv("TERM", "xterm")
    reader, writer = pty.openpty()
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(["dram", "snoop", dump]) == 0
        terminal.write("end")
        terminal.flush()
        shown = os.read(reader, 65536)
    os.close(reader)
    assert (b"snooping" in shown) == late


def test_colour_on_a_terminal_unless_no_color(
    dump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for no_color in (False, True):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        reader, writer = pty.openpty()
        with open(writer, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            assert run(["dram", "snoop", dump, "--strings", "0"]) == 0
            shown = os.read(reader, 65536)
        os.close(reader)
        assert (b"\x1b[34m#" in shown) == (not no_color)


def test_the_booted_kernel_shows_in_dram_only_without_encryption(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = {}
    found = {}
    for state in ("on", "off"):
        arguments = ["--boot", "--seed", "1", "--cmdline", f"mem_encrypt={state}"]
        arguments += ["--json", "--find", "on the memory bus"]  # of the built-in image
        facts = json.loads(output(capsys, *arguments))
        pages[state], found[state] = facts["pages"], facts["find"]["on the memory bus"]
    assert pages["on"]["encrypted"] > 10 * pages["on"]["plain"]
    assert pages["off"]["plain"] > pages["off"]["encrypted"]
    assert found["on"] == []
    assert found["off"] != []
