"""A small kernel of our own, made from a seed: no file, no compiler, no licence.

Its text is random bytes in the shape of functions and does nothing. Its data holds
what a thief with a bus probe would look for, all of it invented, so that a snoop of
DRAM shows in plain words what encryption hides.
"""

from __future__ import annotations

import base64
from random import Random

from ...hw.errors import CallerError
from ...hw.types import LARGE_PAGE_SIZE, PAGE_SIZE, PhysAddr, VirtAddr, align_up
from ...kernel.setup import COMMAND_LINE_SIZE
from .kernel import KernelImage, Segment
from .layout import KernelLayout, Range, workarea_behind

TEXT_START = PhysAddr(0x100_0000)
VIRTUAL_BASE = VirtAddr(0xFFFF_FFFF_8100_0000)
BUILTIN_SIZE = 4 << 20
BRK_SIZE = 64 << 10
VERSION = "6.1.0-cbit"

HALT = bytes.fromhex("fa f4 eb fd")  # cli; hlt; jmp to the hlt
FUNCTION_STEP = 256
PROLOGUE = bytes.fromhex("f3 0f 1e fa 55 48 89 e5")  # endbr64; push rbp; mov rbp, rsp
EPILOGUE = bytes.fromhex("5d c3 cc cc cc cc cc cc")  # pop rbp; ret; int3 ...

SENTENCES = (
    f"Linux version {VERSION} (reference) (made from a seed, no compiler) #1 SMP",
    "If you can read this on the memory bus, nobody has set the C-bit.",
    "The key of this machine was drawn at reset and never leaves the processor.",
    "Sixteen bytes at a time, each block is tied to the place where it lies.",
    "A page of zeros has as many ciphertexts as it has blocks.",
    "Panic: attempted to read somebody else's memory.",
)
NAMES = ("Ada Beck", "Bo Chandra", "Cleo Duarte", "Dev Eriksen", "Edda Fofana")


def builtin_image(seed: int, size: int = BUILTIN_SIZE) -> KernelImage:
    """Make a kernel that is the same for the same seed and size.

    Half of what .bss..decrypted leaves is text; read-only data, data and .bss share
    the rest. The entry holds CLI, HLT and a jump back.

    Args:
        seed: any integer.
        size: bytes from _text to the end of .bss, a multiple of 2 MiB, from 4 MiB up;
            64 KiB of .brk follow.

    Raises:
        CallerError: `size` is not such a multiple, or over 512 MiB.
    """
    if size % LARGE_PAGE_SIZE or not 2 <= size // LARGE_PAGE_SIZE <= 256:
        raise CallerError(
            f"a size of 4 MiB to 512 MiB in steps of 2 MiB, got {size:#x}"
        )
    rng = Random(seed)
    room = size - LARGE_PAGE_SIZE
    text_size, rodata_size, data_size = room // 2, room // 8, room // 8
    text = _text(rng, text_size)
    rodata = _page(rng, _read_only_words(), rodata_size)
    data = _page(rng, _secrets(rng), data_size)
    plain = memoryview(text + rodata + data).toreadonly()

    bss_end = PhysAddr(TEXT_START + size)
    end = PhysAddr(bss_end + BRK_SIZE)
    bss_start = PhysAddr(TEXT_START + len(plain))
    segments = (
        _segment(plain, 0, text_size, text_size),
        _segment(plain, text_size, rodata_size, rodata_size),
        _segment(
            plain, text_size + rodata_size, data_size, end - bss_start + data_size
        ),
    )
    layout = KernelLayout(
        text_start=TEXT_START,
        end=end,
        bss=Range(bss_start, bss_end),
        bss_decrypted=Range(PhysAddr(bss_end - LARGE_PAGE_SIZE), bss_end),
        workarea=workarea_behind(end),
        virtual_base=VIRTUAL_BASE,
        found_by="symbols",
    )
    return KernelImage(
        name="built-in",
        kind="built-in",
        segments=segments,
        entry=TEXT_START,
        layout=layout,
        setup_header=None,
        version=VERSION,
        compression="none",
        command_line_size=COMMAND_LINE_SIZE - 1,
    )


def _segment(plain: memoryview, offset: int, size: int, memory_size: int) -> Segment:
    return Segment(
        PhysAddr(TEXT_START + offset),
        VirtAddr(VIRTUAL_BASE + offset),
        plain[offset : offset + size],
        memory_size,
    )


def _text(rng: Random, size: int) -> bytes:
    """Return random bytes cut into functions, the entry before them."""
    code = bytearray(rng.randbytes(size))
    for at in range(0, size, FUNCTION_STEP):
        code[at : at + len(PROLOGUE)] = PROLOGUE
        last = at + FUNCTION_STEP - len(EPILOGUE)
        code[last : last + len(EPILOGUE)] = EPILOGUE
    code[: len(HALT)] = HALT
    return bytes(code)


def _page(rng: Random, words: bytes, size: int) -> bytes:
    """Return words, then random tables, then zeros: what data sections look like."""
    start = align_up(len(words), PAGE_SIZE)
    tables = rng.randbytes((size - start) // 2)
    return (words.ljust(start, b"\0") + tables).ljust(size, b"\0")


def _read_only_words() -> bytes:
    return b"\0".join(sentence.encode() for sentence in SENTENCES) + b"\0"


def _secrets(rng: Random) -> bytes:
    """Return a password file, a private key and customer records, all invented."""
    salt, digest = (base64.b64encode(rng.randbytes(n)).decode() for n in (12, 64))
    key = base64.b64encode(rng.randbytes(1190)).decode()
    key_rows = [key[at : at + 64] for at in range(0, len(key), 64)]
    rows = [
        f"root:$6${salt.rstrip('=')}${digest.rstrip('=')}:19700:0:99999:7:::",
        "",
        "-----BEGIN {0}-----\n{1}\n-----END {0}-----".format(
            "RSA PRIVATE KEY", "\n".join(key_rows)
        ),
        "",
        "customer;name;account;balance",
    ]
    for number, name in enumerate(NAMES, start=1):
        account = f"XX{rng.randrange(100):02} {rng.randrange(10**12):012}"
        balance = f"{rng.randrange(10**6)}.{rng.randrange(100):02}"
        rows.append(f"{number:06};{name};{account};{balance}")
    return "\n".join(rows).encode() + b"\n"
