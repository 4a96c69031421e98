"""A kernel whose machine code is wrong shows what silicon would show.

The image's own instructions are found by their bytes and changed; nothing else is.
"""

from __future__ import annotations

from pathlib import Path

from cbit.boot.image import load_image
from cbit.boot.native_loader import load_native
from cbit.hw import Machine
from cbit.hw.devices import Platform
from cbit.hw.models import load_model
from cbit.hw.native import Ending, NativeCore, Stop, engine_model
from cbit.hw.types import PhysAddr
from cbit.tools.boot_run import firmware_memory_map

from .conftest import COHERENT, INCOHERENT

ROUTINE = bytes.fromhex("0f22da 0f20e2")
"""Start of __enc_copy: MOV CR3, RDX; MOV RDX, CR4."""

WBINVD, NOP2 = b"\x0f\x09", b"\x66\x90"
REP_MOVSB = b"\xf3\xa4"


def run(
    kernel: Path, model: str, changes: list[tuple[bytes, bytes, int]], until: str
) -> tuple[Machine, Stop, str]:
    """Boot a kernel after changing what `changes` name: old, new, which occurrence."""
    machine = Machine(engine_model(load_model(model)), ram=512 << 20, seed=1)
    image = load_image(kernel)
    entry = load_native(
        machine.cpu,
        image,
        e820=firmware_memory_map(machine),
        command_line=b"console=ttyS0 earlyprintk=ttyS0 mem_encrypt=on nokaslr",
    )
    text = image.plain_bytes(image.layout.text_start, image.layout.bss.start)
    for old, new, which in changes:
        at = -1
        for _ in range(which + 1):
            at = text.index(old, at + 1)
        # Through the loader's identity map, before anything is encrypted.
        machine.cpu.store(image.layout.text_start + at, new)
    console = bytearray()
    cores: list[NativeCore] = []

    def show(data: bytes) -> None:
        console.extend(data)
        if until.encode() in console[-200:]:
            cores[0].stop("seen")

    core = NativeCore(machine, Platform(machine.map, console=show))
    cores.append(core)
    core.enter(
        entry.rip,
        rsp=entry.rsp,
        rsi=entry.rsi,
        gdt_base=entry.gdt_base,
        gdt_limit=entry.gdt_limit,
    )
    stop = core.run(60)
    core.close()
    return machine, stop, console.decode(errors="replace")


def copy_routine(kernel: Path) -> bytes:
    """Return the bytes of sme_encrypt_execute's copy routine."""
    image = load_image(kernel)
    text = image.plain_bytes(image.layout.text_start, image.layout.bss.start)
    at = text.index(ROUTINE)
    return text[at : at + 256]


def test_the_untouched_kernel_prints_the_line(real_kernel_path: Path) -> None:
    _, stop, console = run(real_kernel_path, COHERENT, [], "active: AMD SME")
    assert stop == Stop(Ending.STOPPED, "seen")
    assert "Memory Encryption Features active: AMD SME" in console


def test_without_the_c_bit_in_cr3_the_tables_are_garbage(
    real_kernel_path: Path,
) -> None:
    # startup_64: ADDQ $(early_top_pgt - __START_KERNEL_map), RAX behind the call that
    # returned the mask. Without the mask the tables, encrypted in place, read as noise.
    image = load_image(real_kernel_path)
    start = image.layout.text_start
    text = image.plain_bytes(start, PhysAddr(start + 0x400))
    at = text.index(b"\x48\x05")  # ADD RAX, imm32
    imm = text[at + 2 : at + 6]
    changed = b"\xb8" + imm + b"\x90"  # MOV EAX, imm32; NOP
    machine, stop, console = run(
        real_kernel_path, COHERENT, [(b"\x48\x05" + imm, changed, 0)], "Linux version"
    )
    assert stop.ending is Ending.FAULT
    assert "triple fault" in stop.reason
    assert "Linux version" not in console
    # What the walk read is what a probe reads there: ciphertext.
    encryption = machine.model.memory_encryption
    assert not machine.cpu.read_cr3() >> encryption.c_bit & 1


def test_without_wbinvd_an_incoherent_part_reports_the_copy(
    real_kernel_path: Path,
) -> None:
    routine = copy_routine(real_kernel_path)
    at = routine.index(WBINVD)
    whole = routine[: at + 2]
    changed = whole[:at] + NOP2
    sound, _, _ = run(real_kernel_path, INCOHERENT, [], "Linux version")
    machine, stop, _ = run(
        real_kernel_path, INCOHERENT, [(whole, changed, 0)], "Linux version"
    )
    # The loader's plain lines are still dirty when the copy goes through C = 1.
    met = [hazard for hazard in machine.caches.hazards_met if hazard.slot == 1]
    assert not [h for h in sound.caches.hazards_met if h.slot == 1 and h.write]
    assert any(h.kind == "dirty-alias" and h.other_slot == 0 for h in met)
    assert stop.ending in (Ending.STOPPED, Ending.FAULT, Ending.HALTED, Ending.TIMEOUT)


def test_a_copy_that_is_not_written_back_leaves_noise(real_kernel_path: Path) -> None:
    # The second REP MOVSB becomes two NOPs: nothing is written through C = 1, so the
    # kernel's own text reads as noise as soon as it is fetched through the C-bit.
    routine = copy_routine(real_kernel_path)
    first = routine.index(REP_MOVSB)
    at = routine.index(REP_MOVSB, first + 2)
    whole = routine[: at + 2]
    _, stop, console = run(
        real_kernel_path,
        COHERENT,
        [(whole, whole[:at] + NOP2, 0)],
        "Linux version",
    )
    assert stop.ending is not Ending.STOPPED
    assert "Linux version" not in console
