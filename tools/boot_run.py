"""One boot of the reference kernel on a new machine, and what there is to say of it.

The observer takes digests at the moments that matter: of the kernel's plaintext just
before it is encrypted, through C = 1 right afterwards, of DRAM at the end.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..boot.image import KernelImage, builtin_image, load_image
from ..boot.loader import HandOver, load_kernel
from ..boot.params import E820Entry, E820Type
from ..boot.startup import Booted, BootLog, Stage, startup
from ..hw.cpuid import CpuModel
from ..hw.errors import InputError
from ..hw.machine import Machine
from ..hw.memory import SLOT_NONE, RegionKind
from ..hw.models import DEFAULT_MODEL, load_model
from ..hw.psp import RandomSource
from ..hw.trace import Event
from ..hw.types import PAGE_SIZE, PhysAddr, align_up
from ..kernel.cc import EncryptionState
from .dram_file import write_dram_file

DEFAULT_COMMAND_LINE = "mem_encrypt=on"
DEFAULT_RAM = 1 << 30
COHERENT = {"coherent": True, "incoherent": False, "model": None}
"""Values of --caches, as `Machine` takes them."""

BUILTIN_SEED = 2016
"""Of the built-in image when no seed is given: the year of the white paper."""


@dataclass(frozen=True)
class BootRequest:
    """What `cbit boot` was asked for; the defaults are the command's.

    Attributes:
        cpu: name of a model, or path of a raw CPUID dump.
        ram: bytes.
        caches: "coherent", "incoherent", or "model" for what CPUID says.
        seed: None for real randomness.
    """

    cpu: str = DEFAULT_MODEL
    ram: int = DEFAULT_RAM
    cmdline: str = DEFAULT_COMMAND_LINE
    kernel: str | None = None
    initrd: str | None = None
    smee: bool = True
    tsme: bool = False
    la57: bool = False
    caches: str = "model"
    seed: int | None = None


@dataclass
class RangeDigests:
    """SHA-256 of one range at three places.

    Attributes:
        start, end: physical addresses, half open, whole pages.
        sha256: of the plaintext: just before the encryption, or at the end where
            nothing was encrypted.
        through_c1: read with the C-bit right after the encryption; None without.
        dram: of the cells at the end, once the caches have come to rest.
    """

    start: PhysAddr
    end: PhysAddr
    sha256: str = ""
    through_c1: str | None = None
    dram: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the JSON object of the range."""
        return {
            "start": hex(self.start),
            "end": hex(self.end),
            "sha256": self.sha256,
            "sha256_through_c1": self.through_c1,
            "sha256_dram": self.dram,
            "dram_equals_plain": self.dram == self.sha256,
        }


@dataclass
class BootRun:
    """A machine, what was loaded, and what came of it.

    `image` has no segments any more once they are loaded.
    """

    request: BootRequest
    model: CpuModel
    machine: Machine
    image: KernelImage
    log: BootLog = field(default_factory=BootLog)
    kernel: RangeDigests | None = None
    initrd: RangeDigests | None = None
    booted: Booted | None = None
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """Return the JSON object of `cbit boot --json`."""
        assert self.booted is not None
        assert self.kernel is not None
        encryption = self.model.memory_encryption
        done = self.booted.encrypted
        slots = self.machine.dram.count_pages()
        plain = slots.get(SLOT_NONE, 0)
        present = encryption.present
        return {
            "cpu": self.model.name,
            "c_bit": encryption.c_bit if present else None,
            "phys_bits": self.model.phys_bits,
            "reduction": encryption.phys_reduction if present else None,
            "sme": {
                "supported": encryption.sme,
                "enabled": self.machine.smee,
                "active": self.active,
                "transparent": self.machine.tsme,
                "reason": self.booted.detection.reason,
            },
            "cr3": hex(self.machine.cpu.read_cr3()),
            "kernel": self.kernel.facts(),
            "initrd": self.initrd.facts() if self.initrd else None,
            "workarea": done
            and {
                "start": hex(done.workarea.start),
                "end": hex(done.workarea.end),
                "pgtable_pages": done.workarea.pgtable_pages,
            },
            "pages": {"encrypted": sum(slots.values()) - plain, "plain": plain},
            "hazards": len(self.machine.caches.hazards_met),
            "seconds": round(self.seconds, 6),
        }

    @property
    def active(self) -> bool:
        """The kernel uses the C-bit."""
        return self.booted is not None and self.booted.state.me_mask != 0


def prepare(
    request: BootRequest,
    *,
    on_event: Callable[[Event], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> BootRun:
    """Build the machine and read the images.

    Args:
        request: what was asked for.
        on_event: receives the machine's trace; None leaves the trace off.
        say: receives each line of the boot log.

    Raises:
        CallerError: an unknown model or an impossible RAM size.
        InputError: a file is not what it should be.
        OSError: a file cannot be read.
    """
    model = load_model(request.cpu)
    machine = Machine(
        model,
        ram=request.ram,
        smee=request.smee,
        tsme=request.tsme,
        coherent=COHERENT[request.caches],
        seed=request.seed,
    )
    if on_event is not None:
        machine.trace.listen(on_event)
    if request.kernel is None:
        image = builtin_image(BUILTIN_SEED if request.seed is None else request.seed)
    else:
        image = load_image(request.kernel)
    return BootRun(request, model, machine, image, BootLog(say))


def boot(run: BootRun) -> None:
    """Load and boot; fills in the rest of `run`.

    Raises:
        KernelError: loader or kernel refuse.
        OSError: the initrd cannot be read.
    """
    started = time.perf_counter()
    request, machine, image = run.request, run.machine, run.image
    _greet(run)
    hand_over = load_kernel(
        machine.cpu,
        image,
        e820=firmware_memory_map(machine),
        command_line=os.fsencode(request.cmdline),
        initrd=read_initrd(request.initrd),
        five_levels=request.la57,
        rng_seed=RandomSource(request.seed).draw(32),
    )
    run.kernel, run.initrd = _ranges(image, hand_over)
    # The bytes are in memory now: a file of 50 MB need not be there twice.
    run.image = image = replace(image, segments=())
    run.booted = startup(machine.cpu, hand_over, run.log, partial(_observe, run))
    run.seconds = time.perf_counter() - started


def firmware_memory_map(machine: Machine) -> list[E820Entry]:
    """Return the e820 map that firmware would report for a machine."""
    kinds = {RegionKind.RAM: E820Type.RAM, RegionKind.ROM: E820Type.RESERVED}
    return [
        E820Entry(region.start, region.end - region.start, kinds[region.kind])
        for region in machine.map.regions
        if region.kind in kinds
    ]


def write_dram(run: BootRun, path: str) -> None:
    """Write the cells as a probe would read them: raw, sparse, offset = address.

    Raises:
        OSError: the file cannot be written; then there is none.
    """
    write_dram_file(path, run.machine.dram.size, run.machine.dram.extents())


def _observe(run: BootRun, stage: Stage, state: EncryptionState) -> None:
    """Take the digests that can be taken at this stage."""
    ranges = [r for r in (run.kernel, run.initrd) if r is not None]
    machine = run.machine
    active = state.me_mask != 0
    if stage is Stage.TABLES_BUILT and active:
        for part in ranges:
            part.sha256 = _digest_through(machine, part, c_bit=False)
    elif stage is Stage.ENCRYPTED and active:
        for part in ranges:
            part.through_c1 = _digest_through(machine, part, c_bit=True)
    elif stage is Stage.DONE:
        machine.caches.drain()
        for part in ranges:
            if not active:
                part.sha256 = _digest_through(machine, part, c_bit=False)
            cells = machine.dram.cells[part.start : part.end]
            part.dram = hashlib.sha256(cells.data).hexdigest()


def _digest_through(machine: Machine, part: RangeDigests, *, c_bit: bool) -> str:
    slot = machine.controller.slot_for(c_bit)
    view = machine.caches.claim(slot, part.start, part.end - part.start)
    return hashlib.sha256(view.data).hexdigest()


def _ranges(
    image: KernelImage, hand_over: HandOver
) -> tuple[RangeDigests, RangeDigests | None]:
    kernel = RangeDigests(image.layout.kernel_start, image.layout.kernel_end)
    if hand_over.initrd is None:
        return kernel, None
    start, size = hand_over.initrd
    return kernel, RangeDigests(start, PhysAddr(align_up(start + size, PAGE_SIZE)))


def read_initrd(path: str | None) -> bytes | None:
    """Return an initrd's bytes, None if none was named.

    Raises:
        InputError: no regular file, or an empty one.
        OSError: it cannot be read.
    """
    if path is None:
        return None
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path}: not a regular file; expected an initrd")
        data = file.read()
    if not data:
        raise InputError(f"{path}: empty; expected an initrd")
    return data


def _greet(run: BootRun) -> None:
    """Say what boots on what, and what the processor and firmware offer."""
    image, machine, encryption = run.image, run.machine, run.model.memory_encryption
    if image.version:
        run.log.say(f"Linux version {image.version}")
    else:
        run.log.say(f"Booting {image.name} ({image.kind})")
    run.log.say(f"CPU0: {run.model.brand} [{run.model.name}]")
    ram = machine.map.ram_bytes >> 20
    caches = "coherent" if machine.caches.coherent else "not coherent"
    run.log.say(f"Memory: {ram} MiB, caches {caches} across C-bit settings")
    supported = encryption.sme
    firmware = "1" if machine.smee else "0"
    run.log.say(
        f"SME: supported by CPUID: {'yes' if supported else 'no'}; "
        f"enabled by firmware: SYSCFG[23] is {firmware}; "
        f"transparent (TSME): {'on' if machine.tsme else 'off'}"
    )
