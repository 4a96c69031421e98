"""Small guests in machine code: tables, gates and code in memory, run and looked at.

The machine is brought into long mode on the loader's identity map of 4 GiB. Every
vector has a handler of one HLT, and interrupt gates clear IF, so an unexpected event
ends the run as HALTED, with the frame on the stack and the vector in RIP.
"""

from __future__ import annotations

from typing import NamedTuple

from cbit.boot.loader import BOOT_TABLES, enter_long_mode
from cbit.hw.cpu import Cr0, Cr4
from cbit.hw.devices import Platform
from cbit.hw.machine import Machine
from cbit.hw.models import load_model
from cbit.hw.msr import Efer
from cbit.hw.native import Ending, NativeCore, Stop, engine_model
from cbit.hw.trace import Event

NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)

GDT, IDT, TSS = 0x10_0000, 0x10_1000, 0x10_2000
HANDLERS, LONG_HANDLERS = 0x10_3000, 0x10_5000
STACK, IST1, RSP0 = 0x11_0000, 0x11_4000, 0x11_8000
PROLOGUE = 0x11_9000
TABLES = 0x12_0000
"""Page tables that `Guest.map` adds."""

CODE = 0x20_0000
DATA = 0x40_0000
USER_CODE, USER_STACK = 0x40_0000_0000, 0x40_0001_0000
"""Where user mode sees its code, and the end of its stack."""

KERNEL_CS, KERNEL_SS = 0x10, 0x18
USER_SS, USER_CS, TASK = 0x2B, 0x33, 0x40
STAR = 0x0023_0010 << 32

P, RW, US, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
IF = 1 << 9


def code(text: str) -> bytes:
    """Return the bytes of lines `hex ; assembly`."""
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in text.splitlines())


LOAD_TABLES = code("""
    0f0118 ; lidt [rax]
    0f00d9 ; ltr cx
    f4     ; hlt
    """)

ENTER_USER = code("""
    6a2b ; push 0x2b
    4150 ; push r8
    4151 ; push r9
    6a33 ; push 0x33
    4152 ; push r10
    48cf ; iretq
    """)
"""To R10 in user mode, stack R8, RFLAGS R9."""


class Frame(NamedTuple):
    """What an event pushes, error code left out."""

    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int


class Guest:
    """A machine, its platform, and a core that is ready to run code.

    Args:
        model: a processor; its C-bit is `c`.
        coherent: as for `Machine`; None takes the model's word.
        cr4: bits beside PAE, PGE and OSFXSR.
        five_levels: LA57.
        smee, hazards: as for `Machine`.
        machine: one that is set up already, with its own tables.

    Attributes:
        events: what the machine emitted, in order.
        console: what the guest wrote to the debug console.
    """

    def __init__(
        self,
        *,
        model: str = "epyc-7763",
        coherent: bool | None = None,
        seed: int = 1,
        cr4: int = 0,
        five_levels: bool = False,
        smee: bool = True,
        hazards: str = "record",
        machine: Machine | None = None,
    ) -> None:
        fresh = machine is None
        self.machine = machine or Machine(
            engine_model(load_model(model)),
            ram=32 << 20,
            coherent=coherent,
            seed=seed,
            smee=smee,
            hazards=hazards,
        )
        self.cpu = self.machine.cpu
        self.c = 1 << self.machine.model.memory_encryption.c_bit
        self.console = bytearray()
        self.platform = Platform(self.machine.map, console=self.console.extend)
        self.events: list[Event] = []
        self.levels = 5 if five_levels else 4
        self.root = BOOT_TABLES + (0 if five_levels else 0x1000)
        self._next_table, self._next_handler = TABLES, LONG_HANDLERS
        if fresh:
            self._set_up(cr4, five_levels)
        self.core = NativeCore(self.machine, self.platform)
        self.regs = self.core.state.regs
        if fresh:
            self.core.enter(PROLOGUE, rsp=STACK, gdt_base=GDT, gdt_limit=0x4F)
            self.set(rax=IDT - 16, rcx=TASK)
            assert self.core.run(10) == Stop(
                Ending.HALTED, "HLT with interrupts disabled"
            )
        self.machine.trace.listen(self.events.append)

    def _set_up(self, cr4: int, five_levels: bool) -> None:
        cpu = self.cpu
        enter_long_mode(cpu, five_levels)
        cpu.write_cr4(cpu.read_cr4() | Cr4.of(pge=1, osfxsr=1).value | cr4)
        cpu.write_cr0(cpu.read_cr0() | Cr0.of(write_protect=1).value)
        cpu.wrmsr(Efer.ADDRESS, cpu.rdmsr(Efer.ADDRESS) | 0x801)  # NXE, SCE
        for selector, descriptor in (
            (0x10, 0x00AF_9B00_0000_FFFF),
            (0x18, 0x00CF_9300_0000_FFFF),
            (0x20, 0x00CF_FB00_0000_FFFF),
            (0x28, 0x00CF_F300_0000_FFFF),
            (0x30, 0x00AF_FB00_0000_FFFF),
            (TASK, 0x0000_8900_0000_0067 | (TSS & 0xFF_FFFF) << 16),
            (TASK + 8, 0),
        ):
            cpu.store64(GDT + selector, descriptor)
        for field, value in ((0x04, RSP0), (0x24, IST1), (0x66, 0x68)):
            cpu.store(TSS + field, value.to_bytes(2 if field == 0x66 else 8, "little"))
        for vector in range(256):
            self.gate(vector, HANDLERS + 16 * vector)
            cpu.store(HANDLERS + 16 * vector, b"\xf4")
        cpu.store(IDT - 16, (0xFFF).to_bytes(2, "little") + IDT.to_bytes(8, "little"))
        cpu.store(PROLOGUE, LOAD_TABLES)

    # Tables

    def gate(
        self,
        vector: int,
        target: int,
        *,
        dpl: int = 0,
        ist: int = 0,
        trap: bool = False,
        present: bool = True,
    ) -> None:
        """Write an IDT gate."""
        kind = (0xF if trap else 0xE) | dpl << 5 | present << 7
        low = target & 0xFFFF | KERNEL_CS << 16 | ist << 32 | kind << 40
        low |= (target >> 16 & 0xFFFF) << 48
        self.cpu.store64(IDT + 16 * vector, low)
        self.cpu.store64(IDT + 16 * vector + 8, target >> 32)

    def handler(
        self,
        vector: int,
        handler: bytes,
        *,
        dpl: int = 0,
        ist: int = 0,
        trap: bool = False,
    ) -> int:
        """Let code handle a vector; return where it lies."""
        address = self._next_handler
        self._next_handler += len(handler) + 15 & -16
        self.cpu.store(address, handler)
        self.gate(vector, address, dpl=dpl, ist=ist, trap=trap)
        return address

    def entry_address(self, va: int, shift: int = 12, *, c: bool = False) -> int:
        """Return where the leaf entry of `va` lies; makes the tables above it.

        Args:
            va: canonical.
            shift: of the leaf's size, 12 or 21.
            c: new tables are pointed to with the C-bit, but are stored plain.
        """
        cpu, table = self.cpu, self.root
        for level in range(self.levels - 1, (shift - 12) // 9, -1):
            at = table + 8 * (va >> 12 + 9 * level & 511)
            entry = cpu.load64(at)
            if not entry & P:
                cpu.fill(self._next_table, 0, 4096)
                entry = self._next_table | P | RW | US | (self.c if c else 0)
                cpu.store64(at, entry)
                self._next_table += 4096
            table = entry & 0x7FFF_FFFF_F000 & ~self.c
        return table + 8 * (va >> shift & 511)

    def map(self, va: int, pa: int, flags: int = P | RW, shift: int = 12) -> int:
        """Map one page; return where its entry lies."""
        at = self.entry_address(va, shift)
        self.cpu.store64(at, pa | flags | (PS if shift > 12 else 0))
        return at

    # Running

    def set(self, **registers: int) -> None:
        """Set general registers by name."""
        for name, value in registers.items():
            self.regs[NAMES.index(name)] = value

    def __getattr__(self, name: str) -> int:
        if name in NAMES:
            return self.regs[NAMES.index(name)]
        raise AttributeError(name)

    def run(
        self, program: bytes = b"", *, at: int = CODE, rflags: int = 2, **registers: int
    ) -> Stop:
        """Store code at `at`, run it from there in kernel mode until the run ends."""
        if program:
            self.place(at, program)
        self.set(rsp=STACK)
        self.set(**registers)
        self.core.state.rflags = rflags
        self.core.state.rip = at
        return self.core.run(20)

    def run_user(
        self, program: bytes, *, rflags: int = 2, frame: int = DATA, **registers: int
    ) -> Stop:
        """Run code in user mode, at USER_CODE; its two pages lie at `frame`."""
        self.map(USER_CODE, frame, P | RW | US)
        self.map(USER_STACK - 4096, frame + 4096, P | RW | US)
        self.place(frame, program)
        return self.run(
            ENTER_USER, r8=USER_STACK, r9=rflags, r10=USER_CODE, **registers
        )

    def place(self, pa: int, program: bytes) -> None:
        """Store code through the identity map and tell the core."""
        self.cpu.store(pa, program)
        self.core.filler.changed(0, pa >> 12, (pa + len(program) - 1 >> 12) + 1)

    # Looking

    @property
    def rip(self) -> int:
        """Where the run ended."""
        return self.core.state.rip

    @property
    def vector(self) -> int | None:
        """The event whose handler of one HLT ended the run."""
        number, inside = divmod(self.rip - HANDLERS, 16)
        return number if inside == 1 and 0 <= number < 256 else None

    def frame(self, *, error_code: bool = False) -> Frame:
        """Return the frame at RSP."""
        words = self.cpu.load_array(self.rsp + 8 * error_code, 5)
        return Frame(*map(int, words))

    @property
    def error_code(self) -> int:
        """The error code at RSP."""
        return self.cpu.load64(self.rsp)

    def event_kinds(self) -> list[str]:
        """Return the kinds of the events so far."""
        return [event.kind for event in self.events]
