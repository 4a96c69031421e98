"""What `cbit boot` refuses: one line that names the fact, no traceback, no file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cbit.tools.cli import run

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, real_kernel_path: Path) -> Path:
    """A folder of files that are not what they should be; nobody writes there."""
    made = tmp_path_factory.mktemp("refused")
    with real_kernel_path.open("rb") as file:
        kernel = file.read(2 * MIB)
    for name, content in {
        "empty": b"",
        "short": b"MZ",
        "noise": bytes(range(256)) * 256,
        "no-newline": b"x" * 4096,
        "cut-in-the-header": kernel[:0x1F8],
        "cut-in-the-setup": kernel[:0x1000],
        "cut-in-the-payload": kernel,
        "elf-head-only": b"\x7fELF\x02\x01\x01" + bytes(57),
        "initrd-1": b"x",
        "dump-empty": b"",
        "dump-binary": bytes(100),
        "dump-text": b"nothing of a dump\n",
        "dump-cut": b"CPUID 00000000: 00000010-6874\n",
        "dump-no-leaf": (
            b"CPUID 00000000: 00000010-68747541-444D4163-69746E65\n"
            b"CPUID 80000000: 80000020-68747541-444D4163-69746E65\n"
        ),
        "dump-no-1f": (
            b"CPUID 00000000: 00000010-68747541-444D4163-69746E65\n"
            b"CPUID 00000001: 00830F10-00800800-7ED8320B-178BFBFF\n"
            b"CPUID 80000000: 80000020-68747541-444D4163-69746E65\n"
            b"CPUID 80000008: 00003030-010EB757-0000707F-00010007\n"
        ),
        "dump-32-bit": (
            b"CPUID 00000000: 00000010-68747541-444D4163-69746E65\n"
            b"CPUID 00000001: 00830F10-00800800-7ED8320B-178BFBFF\n"
            b"CPUID 80000000: 80000008-68747541-444D4163-69746E65\n"
            b"CPUID 80000001: 00830F10-40000000-75C237FF-0FD3FBFF\n"
            b"CPUID 80000008: 00003030-010EB757-0000707F-00010007\n"
        ),
    }.items():
        (made / name).write_bytes(content)
    with (made / "initrd-40M").open("wb") as file:
        file.truncate(40 * MIB)
    (made / "folder").mkdir()
    (made / "dangling").symlink_to(made / "nowhere")
    return made


# Arguments; {d} is the folder, {k} the real kernel. What the line must say.
REFUSED = [
    # Kernel images
    ("--kernel {d}/missing", "{d}/missing: No such file or directory"),
    ("--kernel {d}/dangling", "{d}/dangling: No such file or directory"),
    ("--kernel {d}/folder", "{d}/folder: Is a directory"),
    ("--kernel /dev/null", "null: not a regular file; expected a kernel image"),
    ("--kernel {d}/empty", "empty: empty; expected a kernel image"),
    ("--kernel {d}/short", "short: offset 0x1fe: the boot flag of a bzImage takes"),
    ("--kernel {d}/noise", "neither an ELF file nor a bzImage; expected 0xaa55"),
    ("--kernel {d}/cut-in-the-header", "the boot flag of a bzImage takes 0x2 bytes"),
    ("--kernel {d}/cut-in-the-setup", "protected-mode code takes"),
    ("--kernel {d}/cut-in-the-payload", "cut-in-the-payload: offset"),
    ("--kernel {d}/elf-head-only", "elf-head-only: "),
    ("--kernel {d}/noise/below", "{d}/noise/below: Not a directory"),
    # Initial RAM disks
    ("--initrd {d}/missing", "{d}/missing: No such file or directory"),
    ("--initrd {d}/folder", "{d}/folder: Is a directory"),
    ("--initrd {d}/empty", "{d}/empty: empty; expected an initrd"),
    ("--initrd /dev/zero", "/dev/zero: not a regular file; expected an initrd"),
    ("--initrd {d}/noise/below", "{d}/noise/below: Not a directory"),
    (
        "--ram 64M --initrd {d}/initrd-40M",
        "initrd of 0x2800000 bytes at [0x1800000, 0x4000000) overlaps the kernel and "
        "its work area [0x1000000, 0x1a00000): more RAM is needed",
    ),
    (
        "--ram 64M --kernel {k} --initrd {d}/initrd-40M",
        "initrd of 0x2800000 bytes at [0x1800000, 0x4000000) overlaps the kernel and "
        "its work area [0x1000000, 0x",
    ),
    ("--ram 32M --initrd {d}/initrd-40M", "initrd of 0x2800000 bytes: no RAM for it"),
    # RAM
    ("--ram 0", "RAM of 0x0 bytes: 2 MiB or more"),
    ("--ram 100", "RAM of 0x64 bytes"),
    ("--ram 1M", "RAM of 0x100000 bytes"),
    ("--ram 2M", "needs RAM at [0x1000000, 0x1a00000), work area included; RAM ends"),
    ("--ram 25M", "RAM ends at 0x1900000"),
    ("--ram 16M --kernel {k}", "work area included; RAM ends at 0x1000000"),
    ("--ram 9T", "epyc-7742 addresses 43 bits"),
    ("--ram 99999999T", "addresses 43 bits"),
    # Processors
    ("--cpu nothing-like-it", "'nothing-like-it' is neither a file nor a CPU model"),
    ("--cpu {d}/folder", "{d}/folder: a directory, expected a file with a CPUID dump"),
    ("--cpu {d}/dump-empty", "{d}/dump-empty: empty, expected"),
    ("--cpu {d}/dump-binary", "{d}/dump-binary: a binary file"),
    ("--cpu {d}/dump-text", "{d}/dump-text: no CPUID leaf found"),
    ("--cpu {d}/dump-cut", "{d}/dump-cut: line 1: cut or damaged"),
    ("--cpu {d}/dump-no-leaf", "CPUID leaf 0x00000001 is missing"),
    ("--cpu {d}/dump-no-1f", "CPUID leaf 0x8000001f is missing"),
    ("--cpu {d}/dump-32-bit", "are reserved on dump-32-bit"),
    ("--la57", "5-level paging: epyc-7742 has none (CPUID 7 ECX[16] is 0)"),
    ("--cpu epyc-7763 --la57", "5-level paging: epyc-7763 has none"),
    # Command line
    ("--cmdline {long}", "command line of 2048 bytes: built-in takes up to 2047"),
    ("--kernel {k} --cmdline {long}", "command line of 2048 bytes: "),
    # Outputs
    ("--dram-out {d}/none/there", "{d}/none/there: No such file or directory"),
    ("--dram-out {d}/folder", "{d}/folder: Is a directory"),
    ("--dram-out {d}/noise/below", "{d}/noise/below: Not a directory"),
    ("--dram-out /dev/full", "/dev/full: No space left on device"),
    ("--trace {d}/none/there", "{d}/none/there: No such file or directory"),
    ("--trace {d}/folder", "{d}/folder: Is a directory"),
    ("--trace /dev/full", "/dev/full: No space left on device"),
]

MISUSED = [
    ("--ram many", "'many' is no size, expected 256M or 4G"),
    ("--ram 1P", "'1P' is no size"),
    ("--ram -1", "'-1' is no size"),
    ("--ram _", "'_' is no size"),
    ("--ram 010", "'010' is no size"),
    ("--ram 1.5G", "'1.5G' is no size"),
    ("--ram 0x", "'0x' is no size"),
    ("--ram G", "'G' is no size"),
    ("--seed x", "'x' is no integer, expected 23 or 0x17"),
    ("--seed 1.5", "'1.5' is no integer"),
    ("--caches warm", "'warm' is not one of 'coherent', 'incoherent', 'model'"),
    ("--expect maybe", "'maybe' is not one of 'active', 'inactive'"),
    ("--no-such-option", "No such option"),
    ("--kernel", "Option '--kernel' requires an argument"),
    ("surplus", "Got unexpected extra argument (surplus)"),
]


def refusal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int
) -> str:
    assert run(["boot", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("Error: ")


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_size for path in folder.rglob("*")}


@pytest.mark.req("BZ-14")
@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda text: text[:50])
def test_a_refusal_is_one_line_that_names_the_fact(
    arguments: str,
    said: str,
    folder: Path,
    real_kernel_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"d": str(folder), "k": str(real_kernel_path), "long": "x" * 2048}
    words = [word.format(**names) for word in arguments.split()]
    before = files(folder)
    assert said.format(**names) in refusal([*words, "--json"], capsys, code=1)
    assert files(folder) == before


@pytest.mark.parametrize(("arguments", "said"), MISUSED, ids=lambda text: text[:30])
def test_misuse_is_one_line_and_exit_code_2(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(arguments.split(), capsys, code=2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", ["--dram-out", "--trace"])
@pytest.mark.parametrize(
    "broken", ["--ram 25M", "--kernel {d}/noise", "--initrd {d}/missing", "--la57"]
)
def test_a_refused_boot_leaves_an_old_file_as_it_was(
    option: str,
    broken: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = tmp_path / "out"
    old.write_bytes(b"old")
    refusal([*broken.format(d=folder).split(), option, str(old)], capsys, code=1)
    assert old.read_bytes() == b"old"
    assert files(tmp_path) == {str(old): 3}


def test_a_write_that_fails_half_way_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # A disk that is full: no file may grow beyond 1 MiB.
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "from cbit.tools.cli import run\n"
        f"sys.exit(run(['boot', '--json', '--dram-out', {str(out)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"Error: {out}: File too large\n"
    assert files(tmp_path) == {}


def test_a_computer_too_small_for_the_machine_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "from cbit.tools.cli import run\n"
        "sys.exit(run(['boot', '--ram', '64G']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=False, text=True
    )
    assert done.returncode == 1
    said = "this computer's memory does not suffice"
    assert done.stderr == f"Error: {said}: [Errno 12] Cannot allocate memory\n"

    def too_much(*arguments: object, **options: object) -> None:
        raise MemoryError("Unable to allocate 32.0 GiB")

    monkeypatch.setattr("cbit.tools.boot.prepare", too_much)
    assert refusal([], capsys, code=1) == f"{said}: Unable to allocate 32.0 GiB\n"


@pytest.mark.parametrize("leaf", ["00000001-FFFFFFEF", "FFFFFFFF-FFFFFFFF"])
def test_a_dump_full_of_nonsense_boots_without_sme(
    leaf: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dump = tmp_path / "nonsense"
    dump.write_text(
        "CPUID 00000000: 00000010-68747541-444D4163-69746E65\n"
        "CPUID 00000001: 00830F10-00800800-7ED8320B-178BFBFF\n"
        "CPUID 80000000: 8000001F-68747541-444D4163-69746E65\n"
        "CPUID 80000001: 00830F10-40000000-75C237FF-2FD3FBFF\n"
        "CPUID 80000008: 00003030-010EB757-0000707F-00010007\n"
        f"CPUID 8000001F: {leaf}-FFFFFFFF-FFFFFFFF\n"
    )
    assert run(["boot", "--cpu", str(dump), "--expect", "inactive"]) == 0
    assert "SME: not active: " in capsys.readouterr().out


def test_the_installed_command_refuses_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cbit", "boot", "--ram", "20M"],
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"Error: built-in needs RAM at .*\n", done.stderr)


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m cbit boot | head -1",
        shell=True,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout == "[    0.000000] Linux version 6.1.0-cbit\n"
    assert done.stderr == ""
