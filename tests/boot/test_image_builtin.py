"""boot/image/builtin.py: a kernel from a seed, laid out like Linux, full of secrets."""

import time

import pytest

from cbit.boot.image import builtin_image
from cbit.hw.errors import CallerError
from cbit.hw.types import PhysAddr


def test_the_same_seed_makes_the_same_kernel_and_another_seed_another() -> None:
    first, again, other = builtin_image(1), builtin_image(1), builtin_image(2)
    assert first == again
    assert first != other
    assert first.layout == other.layout


@pytest.mark.req("LB-30", "LB-32")
@pytest.mark.parametrize("size", [4 << 20, 6 << 20, 32 << 20])
def test_it_is_laid_out_as_the_linker_script_does(size: int) -> None:
    image = builtin_image(0, size)
    layout = image.layout
    assert image.entry == layout.text_start == 0x100_0000
    assert layout.bss.end - layout.text_start == size
    assert layout.bss_decrypted.end == layout.bss.end < layout.end
    assert layout.bss_decrypted.size == 2 << 20
    assert layout.bss_decrypted.start % (2 << 20) == 0
    assert layout.workarea.start == layout.kernel_end
    assert layout.workarea.size == 4 << 20
    assert all(segment.paddr % 4096 == 0 for segment in image.segments)
    assert image.segments[-1].end == layout.end


def test_segments_touch_and_their_link_addresses_agree_with_the_layout() -> None:
    image = builtin_image(0)
    ends = [segment.end for segment in image.segments]
    assert [segment.paddr for segment in image.segments[1:]] == ends[:-1]
    for segment in image.segments:
        assert segment.vaddr == image.layout.virt(segment.paddr)
        assert segment.data.readonly


def test_a_probe_finds_secrets_and_pages_of_zeros_in_it() -> None:
    image = builtin_image(5)
    plain = image.plain_bytes(image.layout.text_start, image.layout.bss.start)
    for secret in (
        b"Linux version 6.1.0-cbit",
        b"root:$6$",
        b"PRIVATE KEY",
        b"customer",
    ):
        assert secret in plain
    pages = {plain[at : at + 4096] for at in range(0, len(plain), 4096)}
    assert bytes(4096) in pages
    assert len(pages) > 300
    after = image.plain_bytes(image.layout.bss.start, image.layout.end)
    assert after.count(0) == len(after)


def test_whoever_executes_it_halts_at_the_entry() -> None:
    image = builtin_image(0)
    code = image.plain_bytes(image.entry, PhysAddr(image.entry + 4))
    assert code.hex(" ") == "fa f4 eb fd"  # cli; hlt; jmp -3


def test_it_is_made_in_a_moment() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        builtin_image(9)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.030


@pytest.mark.parametrize("size", [0, 2 << 20, (4 << 20) + 4096, 514 << 20, -(4 << 20)])
def test_an_odd_size_is_refused(size: int) -> None:
    with pytest.raises(CallerError, match="4 MiB"):
        builtin_image(0, size)
