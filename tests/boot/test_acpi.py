"""boot/acpi.py: the tables, read back by offsets of the specification."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from cbit.boot import acpi
from cbit.boot.acpi import build_acpi
from cbit.hw.devices import ioapic, lapic, power
from cbit.hw.errors import CallerError
from cbit.hw.types import PhysAddr

from ..initramfs import batch, initramfs

QEMU = "qemu-system-x86_64"
BASE = 0x3FFF_0000


class Tables:
    """What an operating system finds when it starts at the RSDP."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.block = build_acpi(PhysAddr(base))
        self.rsdp = self.block[:36]
        self.xsdt = self.table(self.number(self.rsdp, 24, 8))
        entries = [self.number(self.xsdt, at, 8) for at in range(36, len(self.xsdt), 8)]
        found = [self.table(entry) for entry in entries]
        self.by_signature = {table[:4]: table for table in found}
        self.fadt, self.madt = self.by_signature[b"FACP"], self.by_signature[b"APIC"]
        self.dsdt = self.table(self.number(self.fadt, 140, 8))
        self.facs = self.table(self.number(self.fadt, 36, 4))

    def table(self, pa: int) -> bytes:
        at = pa - self.base
        assert 0 <= at <= len(self.block) - 8
        length = self.number(self.block, at + 4, 4)
        assert at + length <= len(self.block)
        return self.block[at : at + length]

    @staticmethod
    def number(data: bytes, at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], "little")


@pytest.fixture(params=[BASE, 0xBFFF_0000, 0x40, 0xFFFF_0000])
def tables(request: pytest.FixtureRequest) -> Tables:
    return Tables(request.param)


def test_the_root_pointer_is_the_first_thing(tables: Tables) -> None:
    assert tables.rsdp[:8] == b"RSD PTR "
    assert tables.rsdp[15] == 2
    assert struct.unpack_from("<II", tables.rsdp, 16) == (0, 36)


def test_every_checksum_is_right(tables: Tables) -> None:
    assert sum(tables.rsdp[:20]) % 256 == 0
    for table in (tables.rsdp, tables.xsdt, tables.fadt, tables.madt, tables.dsdt):
        assert sum(table) % 256 == 0


def test_signatures_revisions_and_lengths_are_the_specifications(
    tables: Tables,
) -> None:
    found = [
        (table[:4], table[8], len(table))
        for table in (tables.xsdt, tables.fadt, tables.madt)
    ]
    assert found == [(b"XSDT", 1, 52), (b"FACP", 3, 244), (b"APIC", 1, 84)]
    assert list(tables.by_signature) == [b"FACP", b"APIC"]
    assert (tables.dsdt[:4], tables.dsdt[8]) == (b"DSDT", 2)
    assert (tables.facs[:4], len(tables.facs), tables.facs[32]) == (b"FACS", 64, 1)


def test_both_addresses_of_the_dsdt_agree_and_the_facs_is_aligned(
    tables: Tables,
) -> None:
    number = tables.number
    assert number(tables.fadt, 40, 4) == number(tables.fadt, 140, 8)
    assert number(tables.fadt, 36, 4) % 64 == 0


def test_the_fixed_hardware_is_where_it_was_promised(tables: Tables) -> None:
    fadt, number = tables.fadt, tables.number
    ports = [number(fadt, at, 4) for at in (56, 64, 76)]
    assert ports == [0x600, 0x604, 0x608]
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert number(fadt, 46, 2) == 9
    assert number(fadt, 48, 4) == 0
    # Generic addresses: space, width, offset, access size, address.
    gas = [struct.unpack_from("<BBBBQ", fadt, at) for at in (148, 172, 208)]
    assert gas == [(1, 32, 0, 2, 0x600), (1, 16, 0, 2, 0x604), (1, 32, 0, 3, 0x608)]
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)


def test_no_second_block_no_gpe_and_no_fixed_button_is_promised(
    tables: Tables,
) -> None:
    fadt, number = tables.fadt, tables.number
    assert [number(fadt, at, 4) for at in (60, 68, 72, 80, 84)] == [0] * 5
    assert fadt[90] == fadt[92] == fadt[93] == 0
    flags = number(fadt, 112, 4)
    assert flags & 0b111_0000 == 0b111_0000  # power button, sleep button, RTC
    assert flags & 1 << 10  # the reset register is supported
    assert not flags & 1 << 20  # not hardware-reduced
    assert number(fadt, 96, 2) > 100  # no C2
    assert number(fadt, 98, 2) > 1000  # no C3


def test_one_processor_and_the_legacy_controllers_are_all_there_is(
    tables: Tables,
) -> None:
    assert struct.unpack_from("<II", tables.madt, 36) == (0xFEE0_0000, 1)
    assert struct.unpack_from("<BBBBI", tables.madt, 44) == (0, 8, 0, 0, 1)
    io_apic = struct.unpack_from("<BBBBII", tables.madt, 52)
    assert io_apic == (1, 12, 0, 0, 0xFEC0_0000, 0)
    overrides = [struct.unpack_from("<BBBBIH", tables.madt, at) for at in (64, 74)]
    assert overrides == [(2, 10, 0, 0, 2, 0), (2, 10, 0, 9, 9, 0xD)]


def test_vector_the_dsdt_is_what_iasl_compiles(tables: Tables) -> None:
    # iasl 20200925 of `Name (_S5, Package () {5, 5, 0, 0})`.
    code = bytes.fromhex("085f53355f1208040a050a050000")
    assert tables.dsdt[36:] == code


@pytest.mark.skipif(not shutil.which("iasl"), reason="a second witness where installed")
def test_iasl_reads_every_table(tables: Tables, tmp_path: Path) -> None:
    for table in (tables.xsdt, tables.fadt, tables.madt, tables.facs, tables.dsdt):
        file = tmp_path / f"{table[:4].decode()}.dat"
        file.write_bytes(table)
        command = ["iasl", "-d", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        said = done.stdout + done.stderr
        assert "rror" not in said
        assert "nvalid" not in said
        assert "hecksum" not in said
    text = (tmp_path / "DSDT.dsl").read_text()
    assert "Name (_S5, Package (0x04)" in text


@pytest.mark.skipif(not shutil.which(QEMU), reason="a kernel reads it where QEMU is")
def test_a_kernel_takes_the_tables_without_a_complaint_and_switches_off_by_them(
    real_kernel_path: Path, busybox_path: Path, tmp_path: Path
) -> None:
    # QEMU's older board has its PM registers at 0x600 too. Its own value for "off"
    # is another; the one for suspend to disk, which ends QEMU as well, can be chosen.
    at = 0xF00_0000
    tables, archive = tmp_path / "tables", tmp_path / "initramfs"
    tables.write_bytes(build_acpi(PhysAddr(at)))
    archive.write_bytes(initramfs(busybox_path.read_bytes(), batch(["dmesg"])))
    command = [QEMU, "-accel", "tcg", "-machine", "pc,hpet=off", "-m", "256"]
    command += ["-nographic", "-no-reboot", "-global", "PIIX4_PM.s4_val=5"]
    command += ["-device", f"loader,file={tables},addr={at:#x},force-raw=on"]
    command += ["-kernel", str(real_kernel_path), "-initrd", str(archive), "-append"]
    command += [f"console=ttyS0 quiet acpi_rsdp={at:#x} memmap=64K#{at:#x}"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300, check=True
    )
    said = done.stdout.decode(errors="replace")
    for fact in (
        "ACPI: RSDP 0x000000000F000000 000024 (v02 CBIT  )",
        "ACPI: 1 ACPI AML tables successfully acquired and loaded",
        "ACPI: PM: (supports S0 S5)",
        "ACPI: Using IOAPIC for interrupt routing",
        "reboot: Power down",
    ):
        assert fact in said
    assert not re.search(r"ACPI (BIOS )?(Error|Warning)|ACPI: .*[Ii]nvalid", said)


@pytest.mark.parametrize("base", [0, 0x10, BASE + 32, 0xFFFF_FFC0, 1 << 32, -64])
def test_a_place_that_is_none_is_refused(base: int) -> None:
    with pytest.raises(CallerError, match="expected a multiple of 64"):
        build_acpi(PhysAddr(base))


def test_the_tables_name_the_ports_and_places_where_the_devices_answer() -> None:
    # boot/ may not look at devices, so each side has the numbers: they must agree.
    assert (acpi.PM1A_EVENT_PORT, acpi.PM1A_CONTROL_PORT, acpi.PM_TIMER_PORT) == (
        power.PM1_STATUS,
        power.PM1_CONTROL,
        power.PM_TIMER,
    )
    assert acpi.SLEEP_TYPE_OFF == power.SLEEP_TYPE_OFF
    assert acpi.RESET_PORT == power.RESET_CONTROL
    assert (acpi.LOCAL_APIC, acpi.IO_APIC) == (lapic.BASE, ioapic.BASE)
    assert acpi.TIMER_INPUT == ioapic.TIMER_INPUT
