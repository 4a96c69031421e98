"""Small whole machines for the tests of early boot, and witnesses of what they hold.

The witnesses read tables and cells by rules of their own; they share no code with
boot/ and kernel/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from cbit.boot.early_tables import KernelData
from cbit.boot.image import KernelImage, KernelLayout, builtin_image
from cbit.boot.loader import HandOver, load_kernel
from cbit.boot.params import BootParams
from cbit.boot.startup import Booted, BootLog, Stage, startup
from cbit.hw.cpu import Cpu
from cbit.hw.cpuid import CpuidLeaf, CpuModel
from cbit.hw.machine import Machine
from cbit.hw.models import load_model
from cbit.hw.trace import Event
from cbit.hw.types import PhysAddr
from cbit.kernel.cc import EncryptionState
from cbit.tools.boot_run import firmware_memory_map

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

COHERENT = "epyc-7763"  # CPUID 8000_001F EAX[10] is 1, C-bit 51
INCOHERENT = "epyc-7742"  # EAX[10] is 0, C-bit 47
FIVE_LEVELS = "epyc-9654"  # LA57, C-bit 51

TABLE_ADDRESS = 0x000F_FFFF_FFFF_F000
PRESENT, LARGE = 1 << 0, 1 << 7

Cells = npt.NDArray[np.uint8]
Fact = tuple[str | int, ...]
cached_model = cache(load_model)
cached_builtin = cache(builtin_image)


class Enough(Exception):
    """Ends a boot at the stage that a test wants to look at."""


@dataclass(frozen=True)
class Leaf:
    """What the walk of a test found.

    Attributes:
        pa: physical address without the C-bit.
        entry: the leaf entry; shift: log2 of what it maps.
        c_bits: C of CR3 and of every entry on the way, the leaf last.
    """

    pa: int
    entry: int
    shift: int
    c_bits: tuple[bool, ...]


@dataclass
class Board:
    """A machine with a kernel loaded, its boot core at the kernel's entry."""

    machine: Machine
    cpu: Cpu
    image: KernelImage
    hand_over: HandOver
    initrd: bytes
    events: list[Event] = field(default_factory=list)
    log: BootLog = field(default_factory=BootLog)

    @property
    def layout(self) -> KernelLayout:
        return self.hand_over.layout

    @property
    def data(self) -> KernelData:
        return KernelData.place(self.layout)

    @property
    def c_mask(self) -> int:
        return 1 << (self.cpu.model.table.leaf(0x8000_001F).ebx & 63)

    @property
    def state(self) -> EncryptionState:
        """What detection decides on a machine where SME is asked for."""
        return EncryptionState(self.c_mask)

    @property
    def levels(self) -> int:
        return 5 if self.cpu.read_cr4() & 1 << 12 else 4

    def start(
        self, observe: Callable[[Stage, EncryptionState], None] = lambda *_: None
    ) -> Booted:
        return startup(self.cpu, self.hand_over, self.log, observe)

    def run_to(self, wanted: Stage) -> None:
        """Boot, and leave the machine as it is at a stage."""

        def observe(stage: Stage, state: EncryptionState) -> None:
            if stage is wanted:
                raise Enough

        try:
            self.start(observe)
        except Enough:
            return
        raise AssertionError(f"{wanted} was not reached")

    def change_params(self, **changes: int) -> None:
        """Rewrite fields of the zero page through the core, plain."""
        at = self.hand_over.boot_params
        params = BootParams.parse(self.cpu.load(at, 4096))
        changed = replace(params, **changes)  # type: ignore[arg-type]
        self.cpu.store(at, changed.build())

    def facts(self, *kinds: str) -> list[Fact]:
        """Return the events of some kinds, each as a short tuple."""
        return [_short(event) for event in self.events if event.kind in kinds]

    def through(self, c_bit: bool, pa: int, length: int) -> bytes:
        """Return what software reads at `pa` through a mapping with this C-bit."""
        slot = self.machine.controller.slot_for(c_bit)
        return self.machine.bus.load(pa, length, slot)

    def table(self, pa: int, *, c_bit: bool) -> list[int]:
        words = np.frombuffer(self.through(c_bit, pa, 4096), "<u8")
        return [int(word) for word in words]

    def cells(self, start: int, end: int) -> Cells:
        """Return DRAM as a probe reads it once the caches have come to rest."""
        self.machine.caches.drain()
        return self.machine.dram.cells[start:end].copy()

    def plain(self, start: int, end: int) -> bytes:
        """Return what the loader put there, from the image, not from memory."""
        return self.image.plain_bytes(PhysAddr(start), PhysAddr(end))

    def walk(self, root: int, va: int) -> Leaf:
        """Translate by hand; LookupError where an entry is not present."""
        entry, path = root, [bool(root & self.c_mask)]
        for shift in (48, 39, 30, 21, 12)[5 - self.levels :]:
            table = entry & TABLE_ADDRESS & ~self.c_mask
            slot = table + 8 * (va >> shift & 511)
            entry = int.from_bytes(self.through(path[-1], slot, 8), "little")
            if not entry & PRESENT:
                raise LookupError(f"{va:#x}: entry {entry:#x} at {slot:#x}")
            path.append(bool(entry & self.c_mask))
            if shift == 12 or entry & LARGE:
                break
        size = 1 << shift
        frame = entry & TABLE_ADDRESS & ~self.c_mask & -size
        return Leaf(frame | va & size - 1, entry, shift, tuple(path))

    def maps(self, root: int, va: int) -> bool:
        try:
            self.walk(root, va)
        except LookupError:
            return False
        return True


def board(
    model: CpuModel | str = COHERENT,
    *,
    image: KernelImage | None = None,
    cmdline: bytes = b"mem_encrypt=on",
    initrd: bytes | None = None,
    ram: int = 64 * MIB,
    la57: bool = False,
    coherent: bool | None = None,
    smee: bool = True,
    tsme: bool = False,
    hazards: str = "record",
    seed: int = 1,
    core: type[Cpu] = Cpu,
) -> Board:
    """Build a machine and load a kernel; the trace starts where the loader does."""
    if isinstance(model, str):
        model = cached_model(model)
    machine = Machine(
        model,
        ram=ram,
        smee=smee,
        tsme=tsme,
        coherent=coherent,
        hazards=hazards,
        seed=seed,
    )
    cpu = machine.cpu
    if core is not Cpu:
        cpu = core(
            0,
            machine.model,
            machine.msrs[0],
            machine.bus,
            machine.caches,
            machine.controller,
            machine.trace,
        )
    events: list[Event] = []
    machine.trace.listen(events.append)
    image = image or cached_builtin(1)
    hand_over = load_kernel(
        cpu,
        image,
        e820=firmware_memory_map(machine),
        command_line=cmdline,
        initrd=initrd,
        five_levels=la57,
    )
    return Board(machine, cpu, image, hand_over, initrd or b"", events)


def altered(model: str, leaf: int, **registers: int) -> CpuModel:
    """Return a shipped processor with some registers of one leaf changed."""
    base = cached_model(model)
    changed: CpuidLeaf = base.table.leaf(leaf)._replace(**registers)
    table = base.table.replace({(leaf, 0): changed})
    return CpuModel(f"{model}-altered", "made by a test", table)


def equal_blocks(cells: Cells, plain: bytes) -> list[int]:
    """Return the offsets of the 16-byte blocks that are the same in both."""
    left = cells.reshape(-1, 16)
    right = np.frombuffer(plain, np.uint8).reshape(-1, 16)
    return [int(i) * 16 for i in np.flatnonzero((left == right).all(axis=1))]


def random_bytes(length: int, seed: int = 7) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def _short(event: Event) -> Fact:
    names = {
        "cpuid": ("leaf",),
        "rdmsr": ("index",),
        "wrmsr": ("index", "value"),
        "cr": ("register", "value"),
        "flush": ("what",),
    }
    return event.kind, *(event.facts[name] for name in names[event.kind])
