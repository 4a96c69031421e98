"""`cbit msr`, as a user runs it."""

import json

import pytest

from cbit.hw.msr import MSRS
from cbit.tools.cli import run

Capture = pytest.CaptureFixture[str]


def decoded(capsys: Capture, *arguments: str) -> str:
    assert run(["msr", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def failed(capsys: Capture, *arguments: str) -> tuple[int, str]:
    code = run(["msr", *arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return code, err


@pytest.mark.req("CM-T4")
def test_vector_syscfg_of_a_server_with_sme(capsys: Capture) -> None:
    # `rdmsr 0xC0010010` printed f40000 on an EPYC with SME active (public transcript).
    out = decoded(capsys, "0xC001_0010", "0xF40000")
    assert out.startswith("SYSCFG 0xc0010010 = 0x0000000000f40000\n")
    bits = {line.split()[0]: line.split()[2] for line in out.splitlines()[4:]}
    assert [bit for bit, value in bits.items() if value == "1"] == [
        "18",
        "20",
        "21",
        "22",
        "23",
    ]
    assert "reserved" not in out


@pytest.mark.parametrize(
    "address",
    ["0xC0010010", "0xc001_0010", "3221291024", "SYSCFG", "syscfg", "0o30000200020"],
)
@pytest.mark.parametrize(
    "value", ["0x800000", "0x80_0000", "8388608", "0b1" + "0" * 23]
)
def test_numbers_in_any_base_and_names_mean_the_same(
    address: str, value: str, capsys: Capture
) -> None:
    assert decoded(capsys, address, value) == decoded(capsys, "SYSCFG", "0x800000")


@pytest.mark.parametrize("name", [kind.NAME for kind in MSRS.values()])
def test_every_register_is_found_by_name_and_shows_its_fields(
    name: str, capsys: Capture
) -> None:
    kind = next(kind for kind in MSRS.values() if name == kind.NAME)
    out = decoded(capsys, name.lower().replace("_", "-"), "0")
    shown = [line.split()[:2] for line in out.splitlines()[4:]]
    assert shown == [[field.bits, field.name] for field in kind.FIELDS.values()]


def test_reserved_bits_are_called_out(capsys: Capture) -> None:
    out = decoded(capsys, "SYSCFG", "0x8000_0000_0080_0001")
    assert "reserved bits are set: 0x8000000000000001 (bits 0, 63)" in out


@pytest.mark.req("CM-38")
def test_wide_fields_are_shown_as_numbers(capsys: Capture) -> None:
    out = decoded(capsys, "PAT", "0x0407050600070106")
    values = [line.split()[2] for line in out.splitlines()[4:]]
    assert values == ["6", "1", "7", "0", "6", "5", "7", "4"]
    assert "0xffff888012345" in decoded(capsys, "VM_PAGE_FLUSH", "0xffff888012345001")


def test_json_says_the_same(capsys: Capture) -> None:
    facts = json.loads(decoded(capsys, "SEV_STATUS", "0x1000003", "--json"))
    assert facts["name"] == "SEV_STATUS"
    assert facts["address"] == 0xC001_0131
    assert facts["value"] == 0x100_0003
    assert (facts["fields"]["sev"], facts["fields"]["sev_es"]) == (1, 1)
    assert facts["bits"]["ibpb_on_entry"] == "23"
    assert facts["reserved"] == 1 << 24


def test_an_unknown_msr_is_refused_with_the_list(capsys: Capture) -> None:
    code, line = failed(capsys, "0xC001_0099", "0")
    assert code == 1
    assert "MSR 0xc0010099 is unknown" in line
    assert "SYSCFG 0xc0010010" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SYSCGF", "0"], "'SYSCGF' is no integer, expected one or a name: TSC, APIC"),
        (["SYSCFG", "full"], "'full' is no integer"),
        (["SYSCFG", "0x"], "'0x' is no integer"),
        (["SYSCFG", "010"], "'010' is no integer"),
        (["SYSCFG", ""], "'' is no integer"),
        (["", "0"], "'' is no integer"),
        (["0xZZ", "0"], "'0xZZ' is no integer"),
        (["SYSCFG", "0x1_0000_0000_0000_0000"], "expected 0 to 0xffffffffffffffff"),
        (["--", "SYSCFG", "-1"], "expected 0 to 0xffffffffffffffff"),
        (["SYSCFG"], "VALUE"),
        ([], "ADDR"),
        (["SYSCFG", "0", "1"], "unexpected extra argument"),
    ],
)
def test_what_is_no_number_is_misuse(
    arguments: list[str], message: str, capsys: Capture
) -> None:
    code, line = failed(capsys, *arguments)
    assert code == 2
    assert message in line
