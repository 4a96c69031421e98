"""`cbit cpuid` and `cbit models`, as a user runs them."""

import json
import os
import platform
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from cbit.hw.cpuid import host
from cbit.hw.models import load_model, model_aliases, model_names
from cbit.tools.cli import run

KEYS = {
    "sme": bool,
    "sev": bool,
    "sev_es": bool,
    "sev_snp": bool,
    "page_flush_msr": bool,
    "vmpl": bool,
    "hw_coherent": bool,
    "vte": bool,
    "c_bit": int,
    "phys_reduction": int,
    "num_vmpl": int,
    "max_sev_guests": int,
    "min_sev_no_es_asid": int,
    "phys_bits": int,
    "phys_bits_with_sme": int,
    "usable": bool,
    "name": str,
    "brand": str,
    "source": str,
}
"""What programs rely on, at the top level."""

Capture = pytest.CaptureFixture[str]


def failed(capsys: Capture, *arguments: str) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its only line."""
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize("name", model_names())
def test_json_has_the_promised_keys_of_the_promised_types(
    name: str, capsys: Capture
) -> None:
    assert run(["cpuid", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {key: type(facts[key]) for key in KEYS} == KEYS
    assert (facts["reason"] is None) == facts["usable"]


@pytest.mark.req("CM-T2", "CM-T3")
def test_vector_json_of_rome(capsys: Capture) -> None:
    # InstLatx64 AuthenticAMD0830F10: 0001000F-0000016F-000001FD-00000001
    run(["cpuid", "rome", "--json"])
    facts = json.loads(capsys.readouterr().out)
    expected = {
        "sme": True,
        "sev": True,
        "sev_es": True,
        "sev_snp": False,
        "page_flush_msr": True,
        "vte": True,
        "c_bit": 47,
        "phys_reduction": 5,
        "max_sev_guests": 509,
        "min_sev_no_es_asid": 1,
        "phys_bits": 48,
        "phys_bits_with_sme": 43,
        "usable": True,
        "reason": None,
        "hypervisor": False,
    }
    assert {key: facts[key] for key in expected} == expected


def test_the_text_shows_every_field_and_the_verdict(capsys: Capture) -> None:
    assert run(["cpuid", "epyc-9655"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("AMD EPYC 9655 96-Core Processor (epyc-9655)\n")
    assert "C-bit 51, physical addresses 52 -> 46 bits" in out
    lines = {tuple(line.split()[:5]) for line in out.splitlines()}
    assert ("0x80000000", "EAX", "31:0", "max_leaf", "0x80000028") in lines
    assert ("0x80000008", "EAX", "7:0", "phys_bits", "52") in lines
    assert ("0x8000001f", "EBX", "11:6", "phys_addr_reduction", "6") in lines
    assert ("0x8000001f", "EAX", "2", "page_flush_msr", "0") in lines
    assert ("0x00000001", "ECX", "31", "hypervisor", "0") in lines
    # Bit 20 is set on Turin and has no name.
    assert ("0x8000001f", "EAX", "(reserved)", "0x100000", "bits") in lines


@pytest.mark.req("CM-21", "BZ-6")
def test_a_leaf_that_cannot_be_used_is_explained(capsys: Capture) -> None:
    assert run(["cpuid", "rembrandt"]) == 0
    assert "not usable: the SME bit is 1 but the C-bit position is 0" in (
        capsys.readouterr().out
    )


@pytest.mark.req("CM-3", "CM-5")
def test_a_processor_without_the_leaf_is_decoded_as_far_as_it_goes(
    capsys: Capture,
) -> None:
    assert run(["cpuid", "no-leaf"]) == 0
    out = capsys.readouterr().out
    assert "no CPUID leaf 0x8000001f; the highest extended leaf is 0x8000001e" in out
    assert "c_bit_position" not in out
    run(["cpuid", "no-leaf", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["present"], facts["hypervisor"], facts["usable"]) == (
        False,
        True,
        False,
    )


def test_a_dump_of_ones_own_is_read_by_its_path(
    tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "server.txt"
    file.write_text((files("cbit.hw.models") / "epyc-7763.txt").read_text())
    assert run(["cpuid", str(file), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["source"], facts["c_bit"]) == ("server", str(file), 51)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, expected"),
        (b"\x7fELF\x02\x01\x01\x00\x00", "a binary file"),
        (b"nothing here\n", "no CPUID leaf found"),
        (b"CPUID 00000000: 00000010-6874", "line 1: cut or damaged"),
        (
            b"CPUID 00000000: 00000010-68747541-444D4163-69746E65\n",
            "CPUID leaf 0x00000001 is missing",
        ),
    ],
)
def test_a_file_that_is_no_dump_is_refused_in_one_line(
    tmp_path: Path, capsys: Capture, content: bytes, message: str
) -> None:
    file = tmp_path / "dump"
    file.write_bytes(content)
    code, line = failed(capsys, "cpuid", str(file))
    assert code == 1
    assert message in line
    assert str(file) in line


def test_an_unknown_name_lists_the_models(capsys: Capture) -> None:
    code, line = failed(capsys, "cpuid", "epyc-9999")
    assert code == 1
    assert "'epyc-9999'" in line
    assert "epyc-7742 (rome)" in line


@pytest.mark.parametrize(
    "arguments", [[], ["rome", "--host"], ["rome", "milan"], ["--bogus"]]
)
def test_neither_both_or_too_much_is_misuse(
    arguments: list[str], capsys: Capture
) -> None:
    assert failed(capsys, "cpuid", *arguments)[0] == 2


def test_the_host_is_decoded_like_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(host, "read_with_tool", lambda: load_model("milan").table)
    assert run(["cpuid", "--host", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["alias"], facts["c_bit"]) == ("host", None, 51)
    assert facts["source"] == "the cpuid tool"


def test_this_machine_is_decoded_or_the_reason_is_told(capsys: Capture) -> None:
    code = run(["cpuid", "--host", "--json"])
    out, err = capsys.readouterr()
    if platform.machine() != "x86_64":
        assert code == 1
        assert err.startswith("Error: cannot read this machine's CPUID")
        return
    facts = json.loads(out)
    assert {key: type(facts[key]) for key in KEYS} == KEYS
    if facts["vendor"] == "GenuineIntel":
        assert (facts["present"], facts["usable"]) == (False, False)
        assert "no CPUID leaf 0x8000001f" in facts["reason"]


def test_models_lists_every_processor_in_plain_columns(capsys: Capture) -> None:
    assert run(["models"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    columns = "NAME", "ALIAS", "C-BIT", "LOST", "WIDTH", "SEV", "COHERENT", "BRAND"
    assert heading.split() == list(columns)
    assert [line.split()[0] for line in lines] == list(model_names())
    rows = [" ".join(line.split()) for line in lines]
    for expected in (
        "epyc-7742 rome 47 5 48 -> 43 SEV-ES no AMD EPYC 7742 64-Core Processor",
        "epyc-7763 milan 51 5 48 -> 43 SEV-SNP yes AMD EPYC 7763 64-Core Processor",
        "ryzen-7950x raphael 51 2 48 -> 46 - no AMD Ryzen 9 7950X 16-Core Processor",
        "epyc-7401p-guest no-leaf - - 48 - no AMD EPYC 7401P 24-Core Processor",
    ):
        assert expected in rows
    assert not any("\x1b" in line for line in lines)


def test_models_as_json_says_of_each_what_cpuid_says(capsys: Capture) -> None:
    run(["models", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert {facts["alias"]: facts["name"] for facts in listed} == model_aliases()
    run(["cpuid", "genoa", "--json"])
    assert json.loads(capsys.readouterr().out) in listed


def python(code: str, **environment: str) -> str:
    """Run Python code in a process of its own; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ).stdout


def test_models_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys; from cbit.tools.cli import run; run(['models'])\n"
        "print('loaded', {'numpy', 'rich', 'cryptography'} & set(sys.modules))"
    )
    assert python(code).endswith("loaded set()\n")


TERMINAL = """
import sys
from cbit.tools.cli import run
sys.stdout.isatty = lambda: True
run(["models"])
"""


def test_a_terminal_gets_a_frame_and_no_colour_turns_colours_off() -> None:
    wide = {"COLUMNS": "120", "TERM": "xterm-256color"}
    drawn = python(TERMINAL, **wide)
    assert "─" in drawn
    assert "AMD Ryzen 7 1800X Eight-Core Processor" in drawn
    plain = python(TERMINAL, **wide, NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "\x1b[38" not in plain
    narrow = python(TERMINAL, COLUMNS="80", TERM="xterm", NO_COLOR="1")
    assert "epyc-7401p-guest" in narrow
    assert "48 -> 43" in narrow
