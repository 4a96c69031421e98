"""A distribution's kernel, whole: encrypted in place, read back, looked for in DRAM."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest

from cbit.boot.image import KernelImage, load_image
from cbit.boot.startup import Stage
from cbit.hw.errors import KernelError
from cbit.hw.types import PhysAddr

from .acceptance import findings
from .conftest import (
    COHERENT,
    FIVE_LEVELS,
    INCOHERENT,
    MIB,
    Board,
    Cells,
    board,
    equal_blocks,
    random_bytes,
)

INITRD = random_bytes(7 * MIB + 1234)
RAM = 128 * MIB
cached_image = cache(load_image)


class Case(NamedTuple):
    """A machine for the real kernel."""

    model: str
    la57: bool = False
    tsme: bool = False
    initrd: bytes = b""
    line: bytes = b"mem_encrypt=on console=ttyS0"


ACTIVE = {
    "incoherent": Case(INCOHERENT),
    "incoherent-initrd": Case(INCOHERENT, initrd=INITRD),
    "coherent-initrd": Case(COHERENT, initrd=INITRD),
    "la57-initrd": Case(FIVE_LEVELS, la57=True, initrd=INITRD),
    "tsme": Case(COHERENT, tsme=True, initrd=INITRD),
}
by_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in ACTIVE.items()]
)


@pytest.fixture(scope="session")
def image(real_kernel_path: Path) -> KernelImage:
    return cached_image(real_kernel_path)


def loaded(image: KernelImage, case: Case) -> Board:
    return board(
        case.model,
        image=image,
        ram=RAM,
        la57=case.la57,
        tsme=case.tsme,
        initrd=case.initrd,
        cmdline=case.line,
        seed=3,
    )


def parts(made: Board) -> list[tuple[int, int]]:
    """Return the encrypted kernel without the reference's own variables in it.

    Under TSME gaps between segments are garbage from the start: nobody wrote there.
    """
    layout, data = made.layout, made.data
    after = data.end, layout.kernel_end
    if not made.machine.tsme:
        return [(layout.text_start, data.early_top_pgt), after]
    ranges = [(s.paddr, s.paddr + len(s.data) & -16) for s in made.image.segments]
    last = ranges.pop()  # it brings .bss, .brk and the work area as zeros
    return [*ranges, (last[0], data.early_top_pgt), after]


def strings(image: KernelImage) -> list[bytes]:
    """Return texts that are in the image: the banner and some drawn from the rest."""
    layout = image.layout
    plain = image.plain_bytes(layout.text_start, layout.bss.start)
    found = sorted(set(re.findall(rb"[A-Za-z][\w ,.:%'()/-]{30,80}", plain)))
    assert len(found) > 10_000
    return [b"Linux version ", *Random(1).sample(found, 12)]


@pytest.mark.req("LB-T3", "LB-30", "LB-32", "LB-56", "LB-57", "WP-1", "WP-13", "WP-20")
@by_case
def test_right_after_the_encryption(image: KernelImage, case: Case) -> None:
    made = loaded(image, case)
    low = made.through(False, 0x9_0000, 0x3000)
    made.run_to(Stage.ENCRYPTED)
    made.machine.caches.drain()

    for start, end in parts(made):
        plain = made.plain(start, end)
        assert made.through(True, start, end - start) == plain
        assert equal_blocks(made.machine.dram.cells[start:end], plain) == []
    if case.initrd:
        assert made.hand_over.initrd is not None
        start, size = made.hand_over.initrd
        whole = size & -16
        assert made.through(True, start, size) == INITRD
        cells = made.machine.dram.cells[start : start + whole]
        assert equal_blocks(cells, INITRD[:whole]) == []

    layout = made.layout
    probe = made.machine.snoop(layout.text_start, layout.kernel_end - layout.text_start)
    assert [text for text in strings(image) if text in probe] == []

    area = layout.workarea
    probe = made.machine.snoop(area.start, area.size)
    assert (probe == made.through(False, area.start, area.size)) != case.tsme
    assert (made.machine.snoop(0x9_0000, 0x3000) == low) != case.tsme
    assert made.machine.caches.hazards_met == []


@pytest.mark.req("LB-T1", "LB-T3", "LB-23", "LB-37", "LB-74", "BZ-12", "BZ-13")
@pytest.mark.parametrize(
    "name", ["incoherent-initrd", "coherent-initrd", "la57-initrd"]
)
def test_the_whole_boot_is_accepted(image: KernelImage, name: str) -> None:
    made = loaded(image, ACTIVE[name])
    assert findings(made) == []
    assert made.log.messages[-1] == "Memory Encryption Features active: AMD SME"
    start, end = made.layout.text_start, made.layout.bss.start
    va = made.layout.virt(PhysAddr(start))
    assert made.cpu.load(va, end - start) == made.plain(start, end)


@pytest.mark.req("LB-56", "WP-1")
def test_dram_decrypts_to_the_image_with_the_engine_alone(image: KernelImage) -> None:
    made = loaded(image, ACTIVE["incoherent"])
    made.run_to(Stage.ENCRYPTED)
    start, end = parts(made)[0]
    cells: Cells = made.cells(start, end)
    engine = made.machine.controller.engine(1)
    assert engine.decrypt(start, cells.tobytes()) == made.plain(start, end)


@pytest.mark.req("LB-8", "LB-9", "LB-10", "LB-T3")
@pytest.mark.parametrize("model", [COHERENT, INCOHERENT])
def test_without_the_option_dram_is_the_image(image: KernelImage, model: str) -> None:
    made = loaded(image, Case(model, line=b"console=ttyS0", initrd=INITRD))
    booted = made.start()
    assert booted.encrypted is None
    start, end = made.layout.text_start, made.layout.bss.start
    cells = made.cells(start, end).tobytes()
    assert cells == made.plain(start, end)
    assert all(text in cells for text in strings(image))
    assert made.hand_over.initrd is not None
    place, size = made.hand_over.initrd
    assert made.machine.snoop(place, size) == INITRD


@pytest.mark.req("LB-32", "BZ-14")
def test_a_machine_too_small_for_kernel_and_initrd_is_refused(
    image: KernelImage,
) -> None:
    end = image.layout.workarea.end
    with pytest.raises(KernelError, match="overlaps the kernel and its work area"):
        board(image=image, ram=end + 4 * MIB, initrd=INITRD)
    with pytest.raises(KernelError, match="work area included; RAM ends at"):
        board(image=image, ram=end - MIB)
    board(image=image, ram=end).start()
