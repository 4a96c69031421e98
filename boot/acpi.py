"""ACPI tables of a PC with one processor and no I/O APIC, as firmware would leave them.

    RSDP -> XSDT -> FADT -> FACS
                 |       `> DSDT   how to switch off, nothing else
                 `> MADT           one local APIC, and a pair of 8259s beside it

All of them lie in one block whose first bytes are the RSDP.

Source: ACPI Specification 6.4, chapter 5.2; layouts of revisions that 2.0 and 3.0 have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from construct import Array, Bytes, Construct, Int8ul, Int16ul, Int32ul, Int64ul

from ..hw.errors import CallerError
from ..hw.layouts import Layout, layout
from ..hw.types import PhysAddr

LOCAL_APIC = PhysAddr(0xFEE0_0000)
SCI_INTERRUPT = 9

PM1A_EVENT_PORT, PM1A_EVENT_LENGTH = 0x600, 4
PM1A_CONTROL_PORT, PM1A_CONTROL_LENGTH = 0x604, 2
PM_TIMER_PORT, PM_TIMER_LENGTH = 0x608, 4
RESET_PORT, RESET_VALUE = 0xCF9, 6

SLEEP_TYPE_OFF = 5
"""SLP_TYP of PM1 control that, with SLP_EN (bit 13), switches the machine off."""

TABLE_ALIGNMENT = 64
"""What the FACS asks for; the RSDP asks for 16."""

OEM_ID = b"CBIT  "
OEM_TABLE_ID = b"CBITPC  "
CREATOR_ID = b"CBIT"

RSDP = layout(
    36,
    (0x00, "signature", Bytes(8)),
    (0x08, "checksum", Int8ul),  # of the first 20 bytes
    (0x09, "oem_id", Bytes(6)),
    (0x0F, "revision", Int8ul),
    (0x10, "rsdt_address", Int32ul),
    (0x14, "length", Int32ul),
    (0x18, "xsdt_address", Int64ul),
    (0x20, "extended_checksum", Int8ul),  # of all 36
)
"""Root pointer. Source: ACPI 6.4, 5.2.5.3."""

HEADER_FIELDS: tuple[tuple[int, str, Construct], ...] = (
    (0x00, "signature", Bytes(4)),
    (0x04, "length", Int32ul),
    (0x08, "revision", Int8ul),
    (0x09, "checksum", Int8ul),
    (0x0A, "oem_id", Bytes(6)),
    (0x10, "oem_table_id", Bytes(8)),
    (0x18, "oem_revision", Int32ul),
    (0x1C, "creator_id", Bytes(4)),
    (0x20, "creator_revision", Int32ul),
)
"""What every table but RSDP and FACS begins with. Source: ACPI 6.4, 5.2.6."""

HEADER = layout(36, *HEADER_FIELDS)

XSDT = layout(52, *HEADER_FIELDS, (0x24, "entries", Array(2, Int64ul)))
"""Addresses of the other tables. Source: ACPI 6.4, 5.2.8."""

GENERIC_ADDRESS = layout(
    12,
    (0x00, "space", Int8ul),
    (0x01, "width_bits", Int8ul),
    (0x02, "offset_bits", Int8ul),
    (0x03, "access_size", Int8ul),
    (0x04, "address", Int64ul),
)
"""Where a register is. Source: ACPI 6.4, 5.2.3.2."""

FADT = layout(
    244,
    *HEADER_FIELDS,
    (0x24, "firmware_ctrl", Int32ul),
    (0x28, "dsdt", Int32ul),
    (0x2E, "sci_int", Int16ul),
    (0x30, "smi_cmd", Int32ul),
    (0x38, "pm1a_evt_blk", Int32ul),
    (0x40, "pm1a_cnt_blk", Int32ul),
    (0x4C, "pm_tmr_blk", Int32ul),
    (0x58, "pm1_evt_len", Int8ul),
    (0x59, "pm1_cnt_len", Int8ul),
    (0x5B, "pm_tmr_len", Int8ul),
    (0x60, "p_lvl2_lat", Int16ul),
    (0x62, "p_lvl3_lat", Int16ul),
    (0x6D, "iapc_boot_arch", Int16ul),
    (0x70, "flags", Int32ul),
    (0x74, "reset_reg", GENERIC_ADDRESS.record),
    (0x80, "reset_value", Int8ul),
    (0x8C, "x_dsdt", Int64ul),
    (0x94, "x_pm1a_evt_blk", GENERIC_ADDRESS.record),
    (0xAC, "x_pm1a_cnt_blk", GENERIC_ADDRESS.record),
    (0xD0, "x_pm_tmr_blk", GENERIC_ADDRESS.record),
)
"""Fixed hardware, revision 3. The fields left out are zero, which says: there is none.

Source: ACPI 6.4, 5.2.9; length and revision of ACPI 3.0.
"""

FACS = layout(
    64,
    (0x00, "signature", Bytes(4)),
    (0x04, "length", Int32ul),
    (0x20, "version", Int8ul),
)
"""Global lock and waking vectors, all zero. Source: ACPI 6.4, 5.2.10."""

MADT = layout(
    84,
    *HEADER_FIELDS,
    (0x24, "local_apic", Int32ul),
    (0x28, "flags", Int32ul),
    # One structure of type 0, processor local APIC.
    (0x2C, "type", Int8ul),
    (0x2D, "entry_length", Int8ul),
    (0x2E, "processor_uid", Int8ul),
    (0x2F, "apic_id", Int8ul),
    (0x30, "entry_flags", Int32ul),
    # Type 1, I/O APIC.
    (0x34, "io_type", Int8ul),
    (0x35, "io_length", Int8ul),
    (0x36, "io_apic_id", Int8ul),
    (0x38, "io_apic", Int32ul),
    (0x3C, "io_first_interrupt", Int32ul),
    # Type 2, interrupt source override, twice: the timer and the SCI.
    (0x40, "timer_type", Int8ul),
    (0x41, "timer_length", Int8ul),
    (0x43, "timer_source", Int8ul),
    (0x44, "timer_interrupt", Int32ul),
    (0x4A, "sci_type", Int8ul),
    (0x4B, "sci_length", Int8ul),
    (0x4D, "sci_source", Int8ul),
    (0x4E, "sci_interrupt", Int32ul),
    (0x52, "sci_flags", Int16ul),
)
"""Interrupt controllers. Source: ACPI 6.4, 5.2.12, 5.2.12.2, .3 and .5."""

DSDT_CODE = bytes.fromhex(
    "08 5f53355f"  # NameOp, the name _S5_
    "12 08 04"  # PackageOp, 8 bytes from this length on, 4 elements
    "0a05 0a05 00 00"  # BytePrefix and SLEEP_TYPE_OFF, twice; ZeroOp, twice
)
"""AML of `Name (_S5, Package () {5, 5, 0, 0})`.

Source: ACPI 6.4, 20.2.5.1, 20.2.5.4, 20.2.4 (package length); 7.4.2 (\\_Sx).
"""

IO_SPACE = 1
ACCESS_BYTE, ACCESS_WORD, ACCESS_DWORD = 1, 2, 3

LEGACY_DEVICES, VGA_NOT_PRESENT = 1 << 0, 1 << 2
"""Bits of `iapc_boot_arch`: COM1 may be probed, a VGA may not. Bit 1 is 0: no 8042."""

WBINVD, PROC_C1 = 1 << 0, 1 << 2
PWR_BUTTON, SLP_BUTTON, FIX_RTC = 1 << 4, 1 << 5, 1 << 6
RESET_REG_SUP = 1 << 10
"""Bits of the FADT's `flags`; for buttons and RTC, 1 means: not fixed hardware."""

NO_C2, NO_C3 = 101, 1001
"""Latencies in microseconds from which a C state counts as absent."""

PCAT_COMPAT = 1
"""MADT flag: a pair of 8259s as well."""
PROCESSOR_ENABLED = 1

IO_APIC = 0xFEC0_0000
TIMER_INPUT = 2
"""Of the I/O APIC, where a PC's IRQ 0 arrives."""
ACTIVE_HIGH, LEVEL_TRIGGERED = 1, 3 << 2


def build_acpi(base: PhysAddr) -> bytes:
    """Return the tables, to be stored at `base`; the RSDP is at `base` itself.

    Args:
        base: where the block will lie: a multiple of 64, below 4 GiB.

    Raises:
        CallerError: `base` is not aligned, or the block would cross 4 GiB.
    """
    places = _places(base)
    tables = {
        "RSDP": _rsdp(places["XSDT"]),
        "XSDT": _table(XSDT, b"XSDT", 1, {"entries": [places["FADT"], places["MADT"]]}),
        "FADT": _fadt(places["FACS"], places["DSDT"]),
        "MADT": _madt(),
        "FACS": FACS.build({"signature": b"FACS", "length": FACS.size, "version": 1}),
        "DSDT": _table(HEADER, b"DSDT", 2, {}, DSDT_CODE),
    }
    block = bytearray()
    for name, table in tables.items():
        block.extend(bytes(places[name] - base - len(block)))
        block.extend(table)
    return bytes(block)


def _places(base: int) -> dict[str, int]:
    """Return the address of every table, in the order of the addresses."""
    sizes = {
        "RSDP": RSDP.size,
        "XSDT": XSDT.size,
        "FADT": FADT.size,
        "MADT": MADT.size,
        "FACS": FACS.size,
        "DSDT": HEADER.size + len(DSDT_CODE),
    }
    places, at = {}, base
    for name, size in sizes.items():
        places[name] = at
        at += -(-size // TABLE_ALIGNMENT) * TABLE_ALIGNMENT
    if base % TABLE_ALIGNMENT or not 0 < base < at <= 1 << 32:
        raise CallerError(
            f"ACPI tables at {base:#x}; expected a multiple of {TABLE_ALIGNMENT} "
            "with room for them below 4 GiB"
        )
    return places


def _rsdp(xsdt: int) -> bytes:
    built = bytearray(
        RSDP.build(
            {
                "signature": b"RSD PTR ",
                "checksum": 0,
                "oem_id": OEM_ID,
                "revision": 2,
                "rsdt_address": 0,
                "length": RSDP.size,
                "xsdt_address": xsdt,
                "extended_checksum": 0,
            }
        )
    )
    RSDP.put(built, "checksum", _checksum(built[: RSDP.offsets["length"]]))
    RSDP.put(built, "extended_checksum", _checksum(built))
    return bytes(built)


def _fadt(facs: int, dsdt: int) -> bytes:
    values = {
        "firmware_ctrl": facs,
        "dsdt": dsdt,
        "sci_int": SCI_INTERRUPT,
        "smi_cmd": 0,  # ACPI mode is always on
        "pm1a_evt_blk": PM1A_EVENT_PORT,
        "pm1a_cnt_blk": PM1A_CONTROL_PORT,
        "pm_tmr_blk": PM_TIMER_PORT,
        "pm1_evt_len": PM1A_EVENT_LENGTH,
        "pm1_cnt_len": PM1A_CONTROL_LENGTH,
        "pm_tmr_len": PM_TIMER_LENGTH,
        "p_lvl2_lat": NO_C2,
        "p_lvl3_lat": NO_C3,
        "iapc_boot_arch": LEGACY_DEVICES | VGA_NOT_PRESENT,
        "flags": WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | FIX_RTC | RESET_REG_SUP,
        "reset_reg": _port(RESET_PORT, 1, ACCESS_BYTE),
        "reset_value": RESET_VALUE,
        "x_dsdt": dsdt,
        "x_pm1a_evt_blk": _port(PM1A_EVENT_PORT, PM1A_EVENT_LENGTH, ACCESS_WORD),
        "x_pm1a_cnt_blk": _port(PM1A_CONTROL_PORT, PM1A_CONTROL_LENGTH, ACCESS_WORD),
        "x_pm_tmr_blk": _port(PM_TIMER_PORT, PM_TIMER_LENGTH, ACCESS_DWORD),
    }
    return _table(FADT, b"FACP", 3, values)


def _madt() -> bytes:
    values = {
        "local_apic": LOCAL_APIC,
        "flags": PCAT_COMPAT,
        "type": 0,
        "entry_length": 8,
        "processor_uid": 0,
        "apic_id": 0,
        "entry_flags": PROCESSOR_ENABLED,
        "io_type": 1,
        "io_length": 12,
        "io_apic_id": 0,
        "io_apic": IO_APIC,
        "io_first_interrupt": 0,
        "timer_type": 2,
        "timer_length": 10,
        "timer_source": 0,
        "timer_interrupt": TIMER_INPUT,
        "sci_type": 2,
        "sci_length": 10,
        "sci_source": SCI_INTERRUPT,
        "sci_interrupt": SCI_INTERRUPT,
        "sci_flags": ACTIVE_HIGH | LEVEL_TRIGGERED,
    }
    return _table(MADT, b"APIC", 1, values)


def _port(port: int, length: int, access_size: int) -> dict[str, int]:
    return {
        "space": IO_SPACE,
        "width_bits": 8 * length,
        "offset_bits": 0,
        "access_size": access_size,
        "address": port,
    }


def _table(
    form: Layout,
    signature: bytes,
    revision: int,
    values: Mapping[str, Any],
    body: bytes = b"",
) -> bytes:
    """Return a table with its header: the record of `form`, then `body`."""
    head = {
        "signature": signature,
        "length": form.size + len(body),
        "revision": revision,
        "checksum": 0,
        "oem_id": OEM_ID,
        "oem_table_id": OEM_TABLE_ID,
        "oem_revision": 1,
        "creator_id": CREATOR_ID,
        "creator_revision": 1,
    }
    built = bytearray(form.build({**head, **values}) + body)
    form.put(built, "checksum", _checksum(built))
    return bytes(built)


def _checksum(table: bytes | bytearray) -> int:
    """Return the byte that makes the sum of all bytes 0 modulo 256."""
    return -sum(table) & 0xFF
