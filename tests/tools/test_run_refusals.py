"""What `cbit run` and `cbit diff` answer to arguments and files that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbit.tools.cli import run

MISUSE = [
    (["run"], "one of KERNEL, --elf PROGRAM and --from FILE expected"),
    (["run", "a", "--elf", "b"], "one of KERNEL"),
    (["run", "a", "--from", "b"], "one of KERNEL"),
    (["run", "a", "--entry", "main"], "--entry goes with --elf"),
    (["run", "a", "--pass-cbit"], "--pass-cbit goes with --elf"),
    (["run", "a", "--events", "cr"], "--events goes with --trace"),
    (["run", "a", "--trace", "t", "--events", "cr,foo"], "--events foo"),
    (["run", "a", "--until", "("], "--until '('"),
    (["run", "a", "--timeout", "-1"], "--timeout"),
    (["run", "a", "--interactive", "--json"], "exclude each other"),
    (["run", "a", "--caches", "warm"], "--caches"),
    (["run", "a", "--ram", "much"], "no size"),
    (["diff"], "KERNEL"),
    (["diff", "a", "--seed", "x"], "no integer"),
]


@pytest.mark.parametrize(("arguments", "message"), MISUSE)
def test_misuse_is_exit_code_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert message in said.err


@pytest.fixture
def files(tmp_path: Path, real_kernel_path: Path) -> dict[str, str]:
    contents = {
        "empty": b"",
        "junk": bytes(range(256)) * 40,
        "cut": real_kernel_path.read_bytes()[:3_000_000],
        "elf": b"\x7fELF" + bytes(100),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    paths = {name: str(tmp_path / name) for name in (*contents, "none")}
    return {**paths, "kernel": str(real_kernel_path), "nowhere": f"{tmp_path}/a/b"}


REFUSED = [
    (["run", "{empty}"], "expected a kernel image"),
    (["run", "{junk}"], "neither an ELF file nor a bzImage"),
    (["run", "{cut}"], "protected-mode code"),
    (["run", "{none}"], "No such file"),
    (["run", "{elf}"], "elf"),
    (["run", "--elf", "{junk}"], "no ELF program"),
    (["run", "--elf", "{empty}"], "empty"),
    (["run", "--elf", "{none}"], "No such file"),
    (["run", "--from", "{empty}"], "not a snapshot"),
    (["run", "--from", "{junk}"], "not a snapshot"),
    (["run", "--from", "{none}"], "No such file"),
    (["run", "{kernel}", "--initrd", "{empty}"], "expected an initrd"),
    (["run", "{kernel}", "--ram", "32M"], "RAM"),
    (["run", "{kernel}", "--cpu", "nonesuch"], "neither a file nor a CPU model"),
    (["run", "{kernel}", "--la57"], "5-level paging"),
    (["run", "{kernel}", "--trace", "{nowhere}", "--timeout", "0.1"], "No such file"),
    (["run", "{kernel}", "--symbols", "{junk}", "--timeout", "0.1"], "System.map"),
    (["run", "{kernel}", "--timeout", "0.1", "--json"], "timeout: time is up"),
    (["diff", "{junk}"], "neither an ELF file nor a bzImage"),
    (["diff", "{cut}"], "protected-mode code"),
    (["diff", "{kernel}", "--symbols", "{empty}"], "no symbols"),
    (["diff", "{kernel}", "--ram", "16M"], "RAM"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_is_refused_is_exit_code_1_and_one_line(
    arguments: list[str],
    message: str,
    files: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([argument.format(**files) for argument in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    assert message in said


def test_a_snapshot_that_cannot_be_written_leaves_nothing(
    files: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [files["kernel"], "--timeout", "0.1", "--snapshot", files["nowhere"]]
    assert run(["run", *arguments]) == 1
    assert "No such file" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
