"""boot/params.py: the zero page keeps its offsets and every byte of others."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbit.boot.params import (
    BOOT_PARAMS,
    E820_ENTRY,
    SETUP_DATA_HEADER,
    BootParams,
    E820Entry,
    E820Type,
    SetupData,
    SetupDataType,
    SetupIndirect,
)
from cbit.hw.errors import CallerError, InputError
from cbit.hw.types import PhysAddr
from cbit.kernel.setup import BOOT_PARAMS_SIZE

# Offsets as zero-page.rst and boot.rst of Linux 6.1 print them, not as the code does.
DOCUMENTED = """
070 acpi_rsdp_addr   0C0 ext_ramdisk_image  0C4 ext_ramdisk_size  0C8 ext_cmd_line_ptr
13C cc_blob_address  140 edid_info          1C0 efi_info          1E8 e820_entries
1EF sentinel         1F1 setup_sects        1F4 syssize           1FE boot_flag
200 jump             202 header             206 version           20E kernel_version
210 type_of_loader   211 loadflags          214 code32_start      218 ramdisk_image
21C ramdisk_size     224 heap_end_ptr       228 cmd_line_ptr      22C initrd_addr_max
230 kernel_alignment 234 relocatable_kernel 236 xloadflags        238 cmdline_size
240 hardware_subarch_data 248 payload_offset 24C payload_length   250 setup_data
258 pref_address     260 init_size          264 handover_offset 268 kernel_info_offset
290 edd_mbr_sig_buffer 2D0 e820_table       D00 eddbuf
"""


def some_page(seed: int, entries: int) -> bytes:
    page = bytearray(Random(seed).randbytes(BOOT_PARAMS_SIZE))
    page[0x1E8] = entries
    return bytes(page)


def test_vector_fields_lie_where_linux_documents_them() -> None:
    words = DOCUMENTED.split()
    documented = dict(zip(words[1::2], words[0::2], strict=True))
    assert {n: f"{BOOT_PARAMS.offsets[n]:03X}" for n in documented} == documented


@pytest.mark.parametrize("seed", range(20))
def test_law_the_declared_page_keeps_every_byte(seed: int) -> None:
    page = Random(seed).randbytes(BOOT_PARAMS_SIZE)
    assert BOOT_PARAMS.build(BOOT_PARAMS.parse(page)) == page


@pytest.mark.parametrize("seed", range(20))
def test_law_a_page_that_is_read_and_written_keeps_every_byte(seed: int) -> None:
    page = some_page(seed, entries=seed * 128 // 19)
    params = BootParams.parse(page)
    assert params.build() == page
    assert BootParams.parse(params.build()) == params


def test_a_change_reaches_only_its_own_field() -> None:
    page = some_page(1, entries=3)
    built = replace(BootParams.parse(page), setup_data=0x1122_3344_5566_7788).build()
    assert built[0x250:0x258].hex() == "8877665544332211"
    assert built[:0x250] + built[0x258:] == page[:0x250] + page[0x258:]


def test_the_page_of_a_kernel_without_header_says_that_it_is_linux() -> None:
    page = BootParams.from_setup_header(None).build()
    assert page[0x1FE:0x200] == b"\x55\xaa"
    assert page[0x202:0x208] == b"HdrS\x0f\x02"
    assert page[:0x1FE] == bytes(0x1FE)
    assert page[0x208:] == bytes(0x1000 - 0x208)


def test_a_setup_header_is_copied_and_nothing_around_it() -> None:
    header = Random(7).randbytes(0x26C - 0x1F1)
    page = BootParams.from_setup_header(header).build()
    assert page[0x1F1:0x26C] == header
    assert page[:0x1F1] + page[0x26C:] == bytes(0x1000 - len(header))


def test_a_setup_header_that_reaches_the_edd_signatures_is_refused() -> None:
    BootParams.from_setup_header(bytes(0x290 - 0x1F1))
    with pytest.raises(CallerError, match="0x291"):
        BootParams.from_setup_header(bytes(0x291 - 0x1F1))


@pytest.mark.req("LB-31")
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_law_an_initrd_address_has_its_low_half_in_the_header_and_its_high_half_before(
    start: int, length: int
) -> None:
    params = BootParams().with_initrd(PhysAddr(start), length)
    page = params.build()
    assert page[0x218:0x220] == bytes(
        (start & 0xFFFF_FFFF).to_bytes(4, "little")
        + (length & 0xFFFF_FFFF).to_bytes(4, "little")
    )
    assert page[0x0C0:0x0C8] == bytes(
        (start >> 32).to_bytes(4, "little") + (length >> 32).to_bytes(4, "little")
    )
    assert (params.initrd_start, params.initrd_len) == (start, length)


@pytest.mark.req("LB-31")
@pytest.mark.parametrize(
    ("start", "length", "end"),
    [
        (0x1000, 0x1000, 0x2000),
        (0x1001, 0x1000, 0x3000),
        (0x1FFF, 1, 0x2000),
        (0x1_0000_0800, 0x2_0000_0800, 0x3_0000_1000),
    ],
)
def test_the_end_of_the_initrd_is_rounded_up_and_its_start_is_not(
    start: int, length: int, end: int
) -> None:
    params = BootParams().with_initrd(PhysAddr(start), length)
    assert (params.initrd_start, params.initrd_end) == (start, end)


@pytest.mark.req("LB-9")
@given(st.integers(0, 2**64 - 1))
def test_law_the_command_line_pointer_joins_both_halves(pa: int) -> None:
    params = BootParams().with_cmd_line(PhysAddr(pa))
    page = params.build()
    halves = page[0x228:0x22C] + page[0x0C8:0x0CC]
    assert int.from_bytes(halves, "little") == pa == params.cmd_line


def test_an_address_of_more_than_64_bits_is_refused() -> None:
    with pytest.raises(CallerError, match="64 bits"):
        BootParams().with_cmd_line(PhysAddr(1 << 64))
    with pytest.raises(CallerError, match="64 bits"):
        BootParams().with_initrd(PhysAddr(0), -1)


def test_vector_an_e820_entry_is_address_size_type_in_20_bytes() -> None:
    entry = E820Entry(PhysAddr(0x10_0000), 0x7FF0_0000, E820Type.RAM)
    assert entry.build().hex(" ", 4) == "00001000 00000000 0000f07f 00000000 01000000"
    assert E820_ENTRY.size == 20


def test_the_map_starts_at_0x2d0_and_is_counted_at_0x1e8() -> None:
    table = (
        E820Entry(PhysAddr(0), 0x9_FC00, E820Type.RAM),
        E820Entry(PhysAddr(0x9_FC00), 0x400, E820Type.RESERVED),
    )
    page = BootParams(e820_table=table).build()
    assert page[0x1E8] == 2
    assert page[0x2D0 : 0x2D0 + 40] == table[0].build() + table[1].build()
    assert BootParams.parse(page).e820_table == table


def test_an_e820_type_is_named_where_it_is_known() -> None:
    known = E820Entry.parse(E820Entry(PhysAddr(0), 1, 0xEFFF_FFFF).build())
    other = E820Entry.parse(E820Entry(PhysAddr(0), 1, 99).build())
    assert (known.type, other.type) == (E820Type.SOFT_RESERVED, 99)


def test_the_table_holds_128_entries_and_no_more() -> None:
    entry = E820Entry(PhysAddr(0), 1, E820Type.RAM)
    full = BootParams(e820_table=(entry,) * 128)
    assert BootParams.parse(full.build()) == full
    with pytest.raises(CallerError, match="got 129"):
        BootParams(e820_table=(entry,) * 129).build()
    with pytest.raises(InputError, match="e820_entries at 0x1e8 is 129"):
        BootParams.parse(some_page(0, entries=129))


@pytest.mark.parametrize("length", [0, 4095, 4097])
def test_a_zero_page_is_4096_bytes(length: int) -> None:
    with pytest.raises(CallerError, match="4096"):
        BootParams.parse(bytes(length))


def test_vector_a_setup_data_node_is_next_type_length_data() -> None:
    node = SetupData(SetupDataType.RNG_SEED, b"seed", PhysAddr(0x1234))
    assert node.build().hex(" ", 4) == "34120000 00000000 09000000 04000000 73656564"


@given(st.integers(0, 2**32 - 1), st.binary(max_size=40), st.integers(0, 2**64 - 1))
def test_law_a_node_is_read_as_it_was_written(kind: int, data: bytes, at: int) -> None:
    node = SetupData(kind, data, PhysAddr(at))
    assert SetupData.parse(node.build() + b"what follows") == node


def test_a_node_cut_anywhere_is_refused() -> None:
    whole = SetupData(SetupDataType.DTB, b"tree").build()
    for length in range(len(whole)):
        with pytest.raises(InputError, match="setup_data"):
            SetupData.parse(whole[:length])


def test_an_indirect_node_says_where_its_data_lies() -> None:
    target = SetupIndirect(SetupDataType.EFI, PhysAddr(0x8_0000_0000), 0x70)
    node = SetupData(SetupDataType.INDIRECT, target.build())
    assert SetupData.parse(node.build()).indirect == target
    assert SetupData(SetupDataType.EFI, target.build()).indirect is None
    with pytest.raises(InputError, match="INDIRECT has 24 bytes"):
        _ = SetupData(SetupDataType.INDIRECT, target.build()[:23]).indirect


def test_vector_an_indirect_node_has_bit_31_for_its_type() -> None:
    node = SetupData(SetupDataType.INDIRECT, SetupIndirect(4, PhysAddr(1), 2).build())
    head = SETUP_DATA_HEADER.parse(node.build()[:16])
    assert (head["type"], head["len"]) == (0x8000_0000, 24)
    assert node.data.hex(" ", 8) == (
        "0400000000000000 0200000000000000 0100000000000000"
    )
