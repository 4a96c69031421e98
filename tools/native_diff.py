"""The oracle: the reference and the kernel's own code, on two equal machines.

The same image, boot parameters and key twice. boot/ runs on one machine, the image's
machine code on the other, both up to the moment before CR3 names the kernel's own
tables: everything is encrypted then. What happened and what memory holds must agree.

A stripped kernel does not say where its early tables lie; its CR3 and the tables
themselves do. The reference puts its own there, so that every byte can be compared.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any

import numpy as np

from ..boot.early_tables import FIXMAP_PMDS, KernelData
from ..boot.image import KernelImage, KernelLayout, load_image
from ..boot.loader import HandOver, load_kernel
from ..boot.startup import BootLog, Stage, startup
from ..hw.arrays import Words
from ..hw.devices import Platform
from ..hw.errors import CbitError, KernelError
from ..hw.machine import Machine
from ..hw.memory import SLOT_NONE
from ..hw.models import DEFAULT_MODEL, load_model
from ..hw.native import Ending, NativeCore, engine_model
from ..hw.psp import RandomSource
from ..hw.trace import Event
from ..hw.types import PAGE_SHIFT, PAGE_SIZE, PhysAddr
from ..kernel.cc import EncryptionState
from .boot_run import firmware_memory_map, read_initrd
from .known_differences import KNOWN, KNOWN_EVENTS, Context, Word

DEFAULT_COMMAND_LINE = "mem_encrypt=on"
DEFAULT_RAM = 512 << 20
TIMEOUT = 120.0
STACK = 0x8_F000
WATCHED = frozenset({"cr", "wrmsr", "flush"})


@dataclass(frozen=True)
class DiffRequest:
    """What `cbit diff` was asked for; the defaults are the command's."""

    kernel: str
    cpu: str = DEFAULT_MODEL
    ram: int = DEFAULT_RAM
    cmdline: str = DEFAULT_COMMAND_LINE
    initrd: str | None = None
    smee: bool = True
    tsme: bool = False
    la57: bool = False
    seed: int = 0


@dataclass
class Side:
    """One of the two machines.

    Attributes:
        history: register writes and flushes, as one line each.
        cr3: what CR3 was about to become.
    """

    machine: Machine
    hand_over: HandOver
    history: list[str] = field(default_factory=list)
    cr3: int = 0


@dataclass
class Comparison:
    """What came out.

    Attributes:
        words: differing words that nothing explains.
        events: history lines that nothing explains: "reference" or "native", line.
        known: how many words or events each known difference covers, by name.
        compared: bytes of DRAM compared.
        masks: sme_me_mask and physical_mask of the two sides.
    """

    words: list[Word]
    events: list[tuple[str, str]]
    known: Counter[str]
    compared: int
    reference: Side
    native: Side
    layout: KernelLayout
    masks: dict[str, tuple[int, int]]

    @property
    def equal(self) -> bool:
        """Nothing differs that is not known."""
        masks_agree = all(left == right for left, right in self.masks.values())
        return not self.words and not self.events and masks_agree


class _Reached(Exception):
    """The reference stands where the comparison is made."""


def compare(request: DiffRequest) -> Comparison:
    """Run both sides and compare them.

    Raises:
        InputError, KernelError: the image cannot be loaded or booted.
        CbitError: a side did not get to the kernel's own tables.
        OSError: a file cannot be read.
    """
    image = load_image(request.kernel)
    native, stack = _run_native(request, image)
    reference, state = _run_reference(request, image, native)
    for side in (reference, native):
        side.machine.caches.drain()
    layout = native.hand_over.layout
    context = Context(layout, state, stack)
    words, known = _compare_memory(reference, native, image, context)
    events = _compare_histories(reference.history, native.history, known)
    masks = {"me_mask": (state.me_mask, _me_mask(native))}
    return Comparison(
        words,
        events,
        known,
        reference.machine.dram.size,
        reference,
        native,
        layout,
        masks,
    )


def time_encryption(request: DiffRequest, image: KernelImage) -> tuple[float, float]:
    """Return the seconds that the two sides take to encrypt the kernel in place.

    From the CR3 of the copy routine to the kernel's own tables: native, reference.
    """
    marks: list[float] = []

    def note(event: Event) -> None:
        if event.facts["register"] == "cr3":
            marks.append(time.perf_counter())

    native, _ = _run_native(request, image, note)
    native_seconds = marks[-1] - marks[1]
    marks.clear()
    _run_reference(request, image, native, note)
    return native_seconds, marks[-1] - marks[-3]


def _build(request: DiffRequest, image: KernelImage) -> Side:
    machine = Machine(
        engine_model(load_model(request.cpu)),
        ram=request.ram,
        smee=request.smee,
        tsme=request.tsme,
        seed=request.seed,
    )
    hand_over = load_kernel(
        machine.cpu,
        image,
        e820=firmware_memory_map(machine),
        command_line=os.fsencode(request.cmdline),
        initrd=read_initrd(request.initrd),
        five_levels=request.la57,
        rng_seed=RandomSource(request.seed).draw(32),
    )
    return Side(machine, hand_over)


def _watch(side: Side, reached: Callable[[], None]) -> None:
    """Keep the history, and stop before CR3 names a table inside the kernel."""
    layout = side.hand_over.layout
    encryption = side.machine.model.memory_encryption
    c_mask = 1 << encryption.c_bit if encryption.usable else 0

    def on_event(event: Event) -> None:
        facts = event.facts
        if event.kind == "cr":
            value = int(facts["value"])
            own_table = layout.text_start <= value & ~c_mask < layout.end
            if facts["register"] == "cr3" and own_table:
                side.cr3 = value
                reached()
            side.history.append(f"{facts['register']} {value:#x}")
        elif event.kind == "wrmsr":
            side.history.append(f"wrmsr {facts['index']:#x} {facts['value']:#x}")
        elif facts["what"] == "wbinvd":
            side.history.append("flush wbinvd")

    side.machine.trace.listen(on_event, WATCHED)


def _run_native(
    request: DiffRequest,
    image: KernelImage,
    note: Callable[[Event], None] | None = None,
) -> tuple[Side, int]:
    side = _build(request, image)
    machine = side.machine
    core = NativeCore(machine, Platform(machine.map, console=lambda data: None))
    core.enter(image.entry, rsi=side.hand_over.boot_params, rsp=STACK)
    reached: list[int] = []

    def stop() -> None:
        if not reached:
            reached.append(core.state.regs[4])
            raise _Reached

    if note is not None:
        machine.trace.listen(note, frozenset({"cr"}))
    _watch(side, stop)
    try:
        end = core.run(TIMEOUT)
    except _Reached:
        return side, reached[0]
    finally:
        core.close()
    raise CbitError(
        f"{image.name}: its code did not come to its own page tables: "
        f"{end.ending.value}: {end.reason}"
        + (" (a fault)" if end.ending is Ending.FAULT else "")
    )


def _run_reference(
    request: DiffRequest,
    image: KernelImage,
    native: Side,
    note: Callable[[Event], None] | None = None,
) -> tuple[Side, EncryptionState]:
    side = _build(request, image)
    states = [EncryptionState()]

    def stop() -> None:
        raise _Reached

    def observe(stage: Stage, state: EncryptionState) -> None:
        states.append(state)

    if note is not None:
        side.machine.trace.listen(note, frozenset({"cr"}))
    _watch(side, stop)
    data = _places(native, request.la57)
    try:
        startup(side.machine.cpu, side.hand_over, BootLog(), observe, data)
    except _Reached:
        return side, states[-1]
    raise CbitError("the reference did not come to its own page tables")


def _places(native: Side, five_levels: bool) -> KernelData:
    """Read from the real kernel's tables where it keeps them."""
    layout = native.hand_over.layout
    read = _Plaintext(native.machine)
    c_mask = _me_mask(native)
    page = ~(PAGE_SIZE - 1) & ~c_mask & (1 << 52) - 1

    def child(table: int, index: int) -> PhysAddr:
        entry = int(read.page(table >> PAGE_SHIFT, native.cr3 & c_mask != 0)[index])
        if not entry & 1:
            raise KernelError(
                f"the kernel's early table at {table:#x}: entry {index} is "
                f"{entry:#x}; a present one expected"
            )
        return PhysAddr(entry & page)

    top = PhysAddr(native.cr3 & page)
    own = KernelData.place(layout)
    level4 = child(top, 511) if five_levels else own.level4_kernel_pgt
    level3 = child(level4, 511) if five_levels else child(top, 511)
    fixmap = child(level3, 511)
    return replace(
        own,
        early_top_pgt=top,
        level4_kernel_pgt=level4,
        level3_kernel_pgt=level3,
        level2_kernel_pgt=child(level3, 510),
        level2_fixmap_pgt=fixmap,
        level1_fixmap_pgt=child(fixmap, FIXMAP_PMDS[0]),
        early_dynamic_pgts=child(child(top, 0), 0) if five_levels else child(top, 0),
    )


class _Plaintext:
    """Pages of a machine as whoever wrote them meant them."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def page(self, page: int, c_bit: bool | None = None) -> Words:
        """Return 512 words, through the slot given or the one that wrote DRAM last."""
        machine = self._machine
        if c_bit is None:
            slot = max(int(machine.dram.written_by[page]) - 1, SLOT_NONE)
        else:
            slot = machine.controller.slot_for(c_bit)
        view = machine.caches.claim(slot, page << PAGE_SHIFT, PAGE_SIZE)
        return view.view(np.uint64).copy()


def _me_mask(native: Side) -> int:
    """Return the C-bit if the real kernel's CR3 carries it."""
    encryption = native.machine.model.memory_encryption
    if not encryption.usable:
        return 0
    return native.cr3 & 1 << encryption.c_bit


def _compare_memory(
    reference: Side, native: Side, image: KernelImage, context: Context
) -> tuple[list[Word], Counter[str]]:
    left, right = reference.machine.dram, native.machine.dram
    known: Counter[str] = Counter()
    unknown = []
    plain_left, plain_right = _Plaintext(reference.machine), _Plaintext(native.machine)
    regions = sorted(
        {int(pa) for pa, _ in left.extents()} | {int(pa) for pa, _ in right.extents()}
    )
    for region in regions:
        first = region >> PAGE_SHIFT
        span = slice(first, min(first + 512, left.size >> PAGE_SHIFT))
        differs = (left.pages[span] != right.pages[span]).any(axis=1)
        for page in (np.flatnonzero(differs) + first).tolist():
            a, b = plain_left.page(page), plain_right.page(page)
            start = PhysAddr(page << PAGE_SHIFT)
            brought = np.frombuffer(
                image.plain_bytes(start, PhysAddr(start + PAGE_SIZE)), np.uint64
            )
            indices = np.flatnonzero(a != b).tolist()
            if not indices:  # the same plaintext, not the same tag
                unknown.append(Word(start, 0, 0, 0))
            for index in indices:
                word = Word(
                    start + 8 * index, int(brought[index]), int(a[index]), int(b[index])
                )
                found = next(
                    (
                        k
                        for k in KNOWN
                        if known[k.name] < k.most and k.holds(word, context)
                    ),
                    None,
                )
                if found is None:
                    unknown.append(word)
                else:
                    known[found.name] += 1
    return unknown, known


def _compare_histories(
    reference: list[str], native: list[str], known: Counter[str]
) -> list[tuple[str, str]]:
    allowed = {event for event, _, _ in KNOWN_EVENTS}
    unknown = []
    matcher = SequenceMatcher(None, reference, native, autojunk=False)
    for kind, i, j, m, n in matcher.get_opcodes():
        if kind == "equal":
            continue
        for line in reference[i:j]:
            if line in allowed:
                known[f"{line} (event)"] += 1
            else:
                unknown.append(("reference", line))
        unknown += [("native", line) for line in native[m:n]]
    return unknown


def where(pa: int, layout: KernelLayout) -> tuple[str, str]:
    """Return a name and a requirement's number for an address."""
    area = layout.workarea
    buffer_end = area.start + 2 * PAGE_SIZE + (2 << 20)
    for start, end, name, row in (
        (area.start, area.start + 2 * PAGE_SIZE, "work area: stack, routine", "LB-60"),
        (area.start, buffer_end, "work area: buffer", "LB-33"),
        (buffer_end, area.end, "work area: page-table pool", "LB-34"),
        (
            layout.bss_decrypted.start,
            layout.bss_decrypted.end,
            ".bss..decrypted",
            "LB-23",
        ),
        (layout.bss.start, layout.bss.end, ".bss", "LB-30"),
        (layout.text_start, layout.kernel_end, "kernel image", "LB-30"),
    ):
        if start <= pa < end:
            return name, row
    return "outside the kernel", "LB-31"


def facts(result: Comparison) -> dict[str, Any]:
    """Return the JSON object of `cbit diff`."""
    return {
        "equal": result.equal,
        "compared": result.compared,
        "masks": {
            name: {
                "reference": hex(left),
                "native": hex(right),
            }
            for name, (left, right) in result.masks.items()
        },
        "cr3": {
            "reference": hex(result.reference.cr3),
            "native": hex(result.native.cr3),
        },
        "history": {
            "reference": result.reference.history,
            "native": result.native.history,
        },
        "differences": [
            {
                "pa": hex(word.pa),
                "where": where(word.pa, result.layout)[0],
                "row": where(word.pa, result.layout)[1],
                "image": hex(word.image),
                "reference": hex(word.reference),
                "native": hex(word.native),
            }
            for word in result.words
        ],
        "events": [{"side": side, "event": line} for side, line in result.events],
        "known": dict(result.known),
    }
