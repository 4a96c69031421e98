"""boot/image: a bzImage of every compression, cut and corrupt ones, and a real one."""

import bz2
import gzip
import lzma
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from cbit.boot.image import KernelImage, load_image
from cbit.boot.image.decompress import Corrupt, Output
from cbit.boot.params import BootParams
from cbit.hw.errors import CallerError, InputError
from cbit.hw.types import PhysAddr

PADDR = 0x100_0000
CODE = Random(1).randbytes(3000) + bytes(9000) + Random(2).randbytes(1192)
VERSION = b"6.1.0-test (somebody) #1"


def vmlinux(code: bytes = CODE) -> bytes:
    """An ELF file of one segment, with relocations behind it as in a bzImage."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, PADDR, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    load = struct.pack(
        "<IIQQQQQQ",
        1,
        7,
        120,
        (1 << 64) - (1 << 31) + PADDR,
        PADDR,
        len(code),
        0x8000,
        0,
    )
    if len(code) > 0x8000:
        load = load[:40] + struct.pack("<QQ", len(code), 0)
    return ident + header + load + code + b"relocations"


def in_legacy_blocks(plain: bytes, size: int = 4096) -> bytes:
    stream = b"\x02\x21\x4c\x18"
    for at in range(0, len(plain), size):
        block = lz4.block.compress(plain[at : at + size], store_size=False)
        stream += struct.pack("<I", len(block)) + block
    return stream


def as_xz(plain: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "lzma": lambda plain: lzma.compress(plain, lzma.FORMAT_ALONE),
    "xz": as_xz,
    "lz4": in_legacy_blocks,
    "zstd": lambda plain: zstandard.compress(plain, 3),
}


def payload(name: str, plain: bytes) -> bytes:
    """Compress as the kernel's build does: with the size behind, gzip has it."""
    if name == "none":
        return plain
    size = b"" if name == "gzip" else struct.pack("<I", len(plain))
    return COMPRESSIONS[name](plain) + size


def bzimage(packed: bytes, **changes: int) -> bytes:
    """A bzImage of two real-mode sectors whose code is a stub and the payload."""
    stub = b"\xf4" * 0x80
    code = stub + packed
    code += bytes(-len(code) % 16)
    fields = {
        "setup_sects": (0x1F1, "B", 1),
        "syssize": (0x1F4, "I", len(code) // 16),
        "boot_flag": (0x1FE, "H", 0xAA55),
        "jump": (0x200, "H", 0x6AEB),
        "header": (0x202, "I", 0x5372_6448),
        "version": (0x206, "H", 0x20F),
        "kernel_version": (0x20E, "H", 0x100),
        "cmdline_size": (0x238, "I", 2047),
        "payload_offset": (0x248, "I", len(stub)),
        "payload_length": (0x24C, "I", len(packed)),
        "init_size": (0x260, "I", 0x100_0000),
    }
    setup = bytearray(1024)
    setup[0x300 : 0x300 + len(VERSION)] = VERSION
    for name, (offset, kind, value) in fields.items():
        struct.pack_into("<" + kind, setup, offset, changes.get(name, value))
    return bytes(setup) + code


def load(tmp_path: Path, content: bytes) -> KernelImage:
    path = tmp_path / "vmlinuz-test"
    path.write_bytes(content)
    return load_image(path)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "none"])
def test_a_payload_of_every_compression_loads(tmp_path: Path, compression: str) -> None:
    image = load(tmp_path, bzimage(payload(compression, vmlinux())))
    assert (image.kind, image.compression) == ("bzImage", compression)
    assert (image.name, image.version) == ("vmlinuz-test", VERSION.decode())
    assert (image.entry, image.command_line_size) == (PADDR, 2047)
    assert bytes(image.segments[0].data) == CODE
    assert image.segments[0].data.readonly


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "none"])
def test_a_bzimage_cut_anywhere_is_refused(tmp_path: Path, compression: str) -> None:
    whole = bzimage(payload(compression, vmlinux()))
    for length in [*range(0, 0x280, 7), *range(0x280, len(whole), 61), len(whole) - 1]:
        with pytest.raises(InputError, match="vmlinuz-test: "):
            load(tmp_path, whole[:length])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_payload_cut_anywhere_is_refused(tmp_path: Path, compression: str) -> None:
    whole = payload(compression, vmlinux())
    for length in [*range(64), *range(64, len(whole), 97), len(whole) - 1]:
        with pytest.raises(InputError, match=r"vmlinuz-test.*: offset 0x"):
            load(tmp_path, bzimage(whole[:length]))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_stream_cut_before_a_right_size_is_refused(
    tmp_path: Path, compression: str
) -> None:
    plain = vmlinux()
    whole = COMPRESSIONS[compression](plain)
    for lost in (5, 9, 100, len(whole) - 8):
        packed = whole[: len(whole) - lost] + struct.pack("<I", len(plain))
        with pytest.raises(InputError, match=f"{compression} stream"):
            load(tmp_path, bzimage(packed))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_size_that_the_stream_does_not_keep_is_refused(
    tmp_path: Path, compression: str, wrong: int
) -> None:
    plain = vmlinux()
    packed = payload(compression, plain)[:-4] + struct.pack("<I", len(plain) + wrong)
    with pytest.raises(InputError, match=f"{compression} stream"):
        load(tmp_path, bzimage(packed))


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("junk", [1, 10, 9000])
def test_junk_behind_the_end_of_a_stream_is_refused(
    tmp_path: Path, compression: str, junk: int
) -> None:
    plain = vmlinux()
    packed = COMPRESSIONS[compression](plain) + b"\xcc" * junk
    with pytest.raises(InputError, match=f"{compression} stream"):
        load(tmp_path, bzimage(packed + struct.pack("<I", len(plain))))


def test_a_zstd_frame_that_does_not_say_its_size_loads_if_the_end_is_right(
    tmp_path: Path,
) -> None:
    # What `zstd` writes from a pipe, as in the kernel's build.
    plain = vmlinux()
    packed = zstandard.ZstdCompressor(write_content_size=False).compress(plain)
    good = packed + struct.pack("<I", len(plain))
    assert load(tmp_path, bzimage(good)).segments[0].data == CODE
    for wrong in (-1, 1):
        with pytest.raises(InputError, match="zstd stream"):
            load(tmp_path, bzimage(packed + struct.pack("<I", len(plain) + wrong)))


def test_a_zstd_frame_that_claims_a_terabyte_is_refused(tmp_path: Path) -> None:
    frame = bytes.fromhex("28b52ffd e0") + struct.pack("<Q", 1 << 40) + bytes(64)
    packed = frame + struct.pack("<I", 0x4000)
    with pytest.raises(InputError, match="frame of 0x10000000000 bytes"):
        load(tmp_path, bzimage(packed))


def test_an_lz4_block_that_is_cut_is_refused_with_its_place(tmp_path: Path) -> None:
    plain = vmlinux()
    packed = in_legacy_blocks(plain)[:-20] + struct.pack("<I", len(plain))
    with pytest.raises(InputError, match=r"block of 0x\w+ bytes at 0x\w+, got 0x"):
        load(tmp_path, bzimage(packed))


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "none"])
def test_no_flipped_bit_raises_anything_but_a_refusal(
    tmp_path: Path, compression: str
) -> None:
    whole = bzimage(payload(compression, vmlinux()))
    rng = Random(compression)
    for _ in range(150):
        broken = bytearray(whole)
        at = rng.choice([rng.randrange(0x1F1, 0x26C), rng.randrange(len(whole))])
        broken[at] ^= 1 << rng.randrange(8)
        with suppress(InputError):
            load(tmp_path, bytes(broken))


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_stream_that_grows_beyond_its_size_is_refused(
    tmp_path: Path, compression: str
) -> None:
    bomb = COMPRESSIONS[compression](vmlinux() + bytes(48 << 20))
    packed = bomb + struct.pack("<I", 0x4000)
    with pytest.raises(InputError, match="promise"):
        load(tmp_path, bzimage(packed))


@pytest.mark.parametrize(
    ("size", "changes", "limit"),
    [
        (0, {}, 0x100_0000),
        (0x100_0001, {}, 0x100_0000),
        (0x4000_0001, {"init_size": 0xFFFF_FFFF}, 0x4000_0000),
        (0x4000_0001, {"version": 0x209, "init_size": 0}, 0x4000_0000),
    ],
)
def test_a_size_over_init_size_or_1_gib_is_refused_before_anything_is_allocated(
    tmp_path: Path, size: int, changes: dict[str, int], limit: int
) -> None:
    packed = in_legacy_blocks(vmlinux()) + struct.pack("<I", size)
    with pytest.raises(InputError, match=f"size {size:#x}; expected 1 to {limit:#x}"):
        load(tmp_path, bzimage(packed, **changes))


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"boot_flag": 0}, "offset 0x1fe: neither an ELF file nor a bzImage"),
        ({"header": 0}, "offset 0x202: neither an ELF file nor a bzImage"),
        ({"version": 0x207}, "offset 0x206: boot protocol 2.07; expected 2.08"),
        ({"jump": 0x6A90}, "offset 0x200: jump 0x90"),
        ({"jump": 0x8FEB}, "offset 0x200: jump 0xeb 0x8f"),
        ({"kernel_version": 0x200}, "offset 0x20e: version string at 0x400"),
        ({"payload_offset": 0xFFFF_FFFF}, "offset 0x248: payload"),
        ({"payload_offset": 0}, "payload begins f4 f4 f4 f4 f4 f4; expected gzip"),
        ({"payload_length": 0}, "payload begins ; expected gzip"),
        ({"setup_sects": 200}, "offset 0x19200: protected-mode code"),
        ({"syssize": 0xFFFF_FFFF}, "protected-mode code takes 0xffffffff0 bytes"),
    ],
)
def test_a_wrong_header_is_refused_with_its_offset(
    tmp_path: Path, changes: dict[str, int], fact: str
) -> None:
    with pytest.raises(InputError, match=fact):
        load(tmp_path, bzimage(payload("gzip", vmlinux()), **changes))


def test_protocol_2_08_is_enough_and_no_version_string_is_none(tmp_path: Path) -> None:
    packed = payload("zstd", vmlinux())
    image = load(tmp_path, bzimage(packed, version=0x208, kernel_version=0))
    assert image.version is None


def test_setup_sects_of_zero_stands_for_four(tmp_path: Path) -> None:
    image = bzimage(payload("gzip", vmlinux()), setup_sects=0)
    image = image[:1024] + bytes(3 * 512) + image[1024:]
    assert load(tmp_path, image).compression == "gzip"


def test_the_setup_header_is_what_the_boot_loader_copies(tmp_path: Path) -> None:
    content = bzimage(payload("gzip", vmlinux()))
    image = load(tmp_path, content)
    assert image.setup_header == content[0x1F1 : 0x202 + 0x6A]
    params = BootParams.from_setup_header(image.setup_header)
    assert (params.version, params.init_size, params.sentinel) == (0x20F, 0x100_0000, 0)


def test_a_block_of_8_mib_fills_exactly_and_more_than_8_mib_needs_two(
    tmp_path: Path,
) -> None:
    code = Random(3).randbytes(4096) * 2049  # one page more than a block holds
    plain = vmlinux(code)
    packed = in_legacy_blocks(plain, size=8 << 20) + struct.pack("<I", len(plain))
    assert load(tmp_path, bzimage(packed)).segments[0].data == code
    packed = in_legacy_blocks(plain, size=16 << 20) + struct.pack("<I", len(plain))
    with pytest.raises(InputError, match="bad block at 0x4"):
        load(tmp_path, bzimage(packed))


def test_a_second_legacy_frame_continues_the_first(tmp_path: Path) -> None:
    plain = vmlinux()
    packed = in_legacy_blocks(plain[:5000]) + in_legacy_blocks(plain[5000:])
    packed += struct.pack("<I", len(plain))
    assert load(tmp_path, bzimage(packed)).segments[0].data == CODE


@given(st.lists(st.sampled_from([0, 1, 4095, 4096, 4097, 9000]), max_size=6))
def test_law_output_is_the_chunks_joined(sizes: list[int]) -> None:
    chunks = [
        Random(i).randbytes(n) if i % 2 else bytes(n) for i, n in enumerate(sizes)
    ]
    output = Output(sum(sizes) + 1)
    for chunk in chunks:
        output.append(chunk)
    with pytest.raises(Corrupt, match="promise"):
        output.finish()
    output.append(b"\x01")
    assert bytes(output.finish()) == b"".join(chunks) + b"\x01"
    with pytest.raises(Corrupt, match="promise"):
        output.append(b"\x01")


def test_runs_of_zeros_take_no_memory() -> None:
    def resident() -> int:
        pages = Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    zeros = bytes(128 << 20)
    output = Output(len(zeros) + 100)
    before = resident()
    output.append(b"\x01" * 100)
    output.append(zeros)
    assert resident() - before < 8 << 20
    assert output.finish()[-1] == 0


@pytest.mark.parametrize("content", [b"", b"\x7fEL", b"text\n" * 200, bytes(4096)])
def test_a_file_that_is_no_kernel_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="vmlinuz-test: "):
        load(tmp_path, content)


def test_a_folder_or_device_is_refused_and_a_missing_file_is_an_os_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="not a regular file"):
        load_image("/dev/null")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match="directory"):
            load_image(path)


def test_plain_bytes_are_zero_where_the_file_brings_none(tmp_path: Path) -> None:
    image = load(tmp_path, bzimage(payload("gzip", vmlinux())))
    low, high = PhysAddr(PADDR - 16), PhysAddr(PADDR + 0x8000)
    assert image.plain_bytes(low, high) == bytes(16) + CODE.ljust(0x8000, b"\0")
    assert image.plain_bytes(PhysAddr(PADDR + 10), PhysAddr(PADDR + 20)) == CODE[10:20]
    assert image.plain_bytes(low, low) == b""
    with pytest.raises(CallerError, match="ends before it starts"):
        image.plain_bytes(high, low)


def test_the_real_kernel_carries_the_release_that_its_header_names(
    real_kernel_path: Path,
) -> None:
    image = load_image(real_kernel_path)
    assert image.version
    banner = b"Linux version " + image.version.split()[0].encode()
    plain = image.plain_bytes(image.layout.text_start, image.layout.bss.start)
    assert banner in plain
    assert image.entry == image.layout.text_start == image.segments[0].paddr


@pytest.mark.req("LB-30", "LB-32")
def test_the_real_kernel_is_laid_out_as_the_linker_script_says(
    real_kernel_path: Path,
) -> None:
    layout = load_image(real_kernel_path).layout
    assert layout.found_by in ("symbols", "sections")
    assert layout.kernel_start == layout.text_start
    assert layout.kernel_start % 0x20_0000 == layout.kernel_end % 0x20_0000 == 0
    assert 0 <= layout.kernel_end - layout.end < 0x20_0000
    assert layout.bss_decrypted.end == layout.bss.end < layout.end
    assert layout.workarea.start == layout.kernel_end
    assert layout.workarea.size == 4 << 20


def test_the_bss_and_work_area_of_the_real_kernel_start_as_zeros(
    real_kernel_path: Path,
) -> None:
    image = load_image(real_kernel_path)
    for part in (image.layout.bss, image.layout.workarea):
        assert image.plain_bytes(part.start, part.end).count(0) == part.size


def test_the_real_kernel_is_in_memory_once(real_kernel_path: Path) -> None:
    # In a process of its own; VmHWM is the most that was ever resident.
    program = """
import sys
from cbit.boot.image import load_image, bzimage
def peak():
    rows = open("/proc/self/status").read().split("\\n")
    return int(next(r for r in rows if r.startswith("VmHWM")).split()[1]) << 10
before = peak()
image = load_image(sys.argv[1])
print(before, peak(), sum(len(s.data) for s in image.segments))
"""
    command = [sys.executable, "-c", program, str(real_kernel_path)]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ})
    before, peak, plain = (int(word) for word in done.stdout.split())
    file_size = real_kernel_path.stat().st_size
    assert peak - before < file_size + plain + (40 << 20)
