"""One core: what instructions can do to memory, control registers and MSRs."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

import numpy as np

from ..arrays import Words
from ..cpuid import CpuidLeaf, CpuModel
from ..errors import CallerError, CbitError
from ..faults import CpuException, GeneralProtection, PageFault
from ..memory import CacheHierarchy, MemoryBus, MemoryController, slot_of_asid
from ..msr import Efer, MsrFile, Syscfg, VmPageFlush
from ..paging import (
    LONG_4_LEVEL,
    LONG_5_LEVEL,
    Access,
    AddressRules,
    Protection,
    Translation,
)
from ..trace import Trace
from ..types import PAGE_OFFSET_MASK, PAGE_SHIFT, PAGE_SIZE, VirtAddr
from .control import Cr0, Cr3, Cr4, check_cr0, check_cr3, check_cr4, kept_cr0
from .mmu import Mmu, Run
from .state import CpuState

ExceptionHandler = Callable[["Cpu", CpuException], bool]
"""Called with the fault; True means the cause is gone and the access is retried."""

RESET_CR0 = 0x6000_0010
"""CD, NW and ET. Source: [APM2] Table 14-1."""

MOST_ROOTS = 64
"""Values of CR3 that are known to be valid in a mode."""

MOVE_SIZE = 8
"""Bytes that REP MOVS moves at a time where source and target are one frame."""

_U64 = Struct("<Q")
_unpack_u64 = _U64.unpack_from
_pack_u64 = _U64.pack_into

_READ = int(Access.READ)
_WRITE = int(Access.WRITE)
_FETCH = int(Access.FETCH)


class UnmodelledMode(CbitError):
    """Paging outside long mode: 32-bit and legacy PAE tables are not modelled."""


class Cpu:
    """A core over the memory of one machine.

    Args:
        index: which core; 0 boots.
        model: what CPUID answers.
        msrs: this core's MSRs.
        bus: physical accesses.
        caches: for flush instructions.
        controller: which slot a C-bit selects.
        trace: receives events.

    Attributes:
        cr2: address of the last page fault.
        mmu: translates; for a native core that runs this one's code.
    """

    def __init__(
        self,
        index: int,
        model: CpuModel,
        msrs: MsrFile,
        bus: MemoryBus,
        caches: CacheHierarchy,
        controller: MemoryController,
        trace: Trace,
    ) -> None:
        self.index = index
        self.model = model
        self.msrs = msrs
        self._bus = bus
        self._caches = caches
        self._readable = caches.readable
        self._controller = controller
        self._trace = trace
        self._roots: dict[int, Cr3] = {}
        self._handlers: dict[int, ExceptionHandler] = {}
        self.mmu = Mmu(bus, self._page_fault)
        # Bound once: the shortest way to a byte is the one taken most.
        self._load_views, self._store_views = (
            self.mmu.load_views,
            self.mmu.store_views,
        )
        self._translate, self._runs = self.mmu.translate, self.mmu.runs
        caches.hold_views(self.mmu.tags_changed)
        msrs.on_write(self._msr_written)
        self.reset()

    def reset(self) -> None:
        """Enter the state after RESET#: paging off, CPL 0, TLB empty."""
        self.cr2 = 0
        self._cr0 = Cr0(RESET_CR0)
        self._cr3 = Cr3(0)
        self.mmu.root = 0
        self.mmu.user = False
        self._cr4 = Cr4(0)
        self._cpl = 0
        self._alignment_check = False
        self._handlers.clear()
        self.msrs.reset()
        self._enter_mode()
        self.mmu.flush(keep_global=False)

    def state(self) -> CpuState:
        """Return the registers that are not MSRs. TLB and handlers are left out."""
        return CpuState(
            self._cr0.value,
            self.cr2,
            self._cr3.value,
            self._cr4.value,
            self._cpl,
            self._alignment_check,
        )

    def restore(self, state: CpuState) -> None:
        """Take over registers, past all rules; the TLB is empty afterwards.

        The MSRs of the same moment are in place already.

        Raises:
            CallerError: over 64 bits, a CPL that is not 0 or 3, or paging outside
                long mode.
        """
        cr0, cr2, cr3, cr4, cpl, alignment_check = state
        new = Cr0(cr0)
        if new.paging and not self.msrs.get(Efer).lma:
            raise CallerError(f"CR0 {cr0:#x}: paging with EFER.LMA = 0")
        self._cr0, self._cr3, self._cr4 = new, Cr3(cr3), Cr4(cr4)
        self.cr2, self.mmu.root, self.cpl = cr2, cr3, cpl
        self.alignment_check = alignment_check  # enters the mode as well
        self.mmu.flush(keep_global=False)

    # Identification and registers

    def cpuid(self, leaf: int, subleaf: int = 0) -> CpuidLeaf:
        """CPUID: return EAX, EBX, ECX, EDX of a leaf."""
        answer = self.model.table.leaf(leaf, subleaf)
        if self._trace.active:
            self._trace.emit(
                "cpuid",
                leaf=leaf,
                subleaf=subleaf,
                eax=answer.eax,
                ebx=answer.ebx,
                ecx=answer.ecx,
                edx=answer.edx,
            )
        return answer

    def rdmsr(self, index: int) -> int:
        """RDMSR: return a 64-bit register.

        Raises:
            GeneralProtection: no such register, or it cannot be read.
        """
        value = self.msrs.read(index)
        if self._trace.active:
            self._trace.emit("rdmsr", index=index, value=value)
        return value

    def wrmsr(self, index: int, value: int) -> None:
        """WRMSR: write a 64-bit register.

        Raises:
            GeneralProtection: no such register, read-only, or reserved bits.
        """
        self.msrs.write(index, value, paging=bool(self._cr0.paging))
        if self._trace.active:
            self._trace.emit("wrmsr", index=index, value=value)

    def read_cr0(self) -> int:
        """MOV from CR0."""
        return self._cr0.value

    def read_cr3(self) -> int:
        """MOV from CR3: table address with its C-bit, PCID."""
        return self._cr3.value

    def read_cr4(self) -> int:
        """MOV from CR4."""
        return self._cr4.value

    def write_cr0(self, value: int) -> None:
        """MOV to CR0; setting PG with EFER.LME enters long mode.

        Raises:
            GeneralProtection: an invalid combination.
            UnmodelledMode: paging outside long mode.
        """
        new = Cr0(value)
        efer = self.msrs.get(Efer)
        check_cr0(self._cr0, new, self._cr4, efer)
        if new.paging and not efer.lme:
            raise UnmodelledMode(f"MOV CR0 {value:#x}: paging with EFER.LME = 0")
        self._note_cr(0, value)
        turned = new.paging != self._cr0.paging
        self._cr0 = kept_cr0(new)
        self.msrs.set(efer.replace(lma=new.paging & efer.lme))
        self._enter_mode()
        if turned:
            self.mmu.flush(keep_global=False)

    def write_cr3(self, value: int) -> None:
        """MOV to CR3: address of the top table, its C-bit, PCID.

        Drops translations that are not global; the hint to keep them (bit 63 with
        CR4.PCIDE) is accepted and not taken.

        Raises:
            GeneralProtection: bits above the reduced physical width.
        """
        kept = self._roots.get(value)
        if kept is None:
            new = Cr3(value)
            check_cr3(new, self._cr4, self.mmu.rules)
            if len(self._roots) >= MOST_ROOTS:
                self._roots.clear()
            kept = self._roots[value] = new.replace(no_flush=0)
        self._note_cr(3, value)
        self._cr3 = kept
        self.mmu.root = self._cr3.value
        self.mmu.flush(keep_global=bool(self._cr4.pge))

    def write_cr4(self, value: int) -> None:
        """MOV to CR4; a change of PGE, PAE, LA57, SMEP or PCIDE flushes the TLB.

        Raises:
            GeneralProtection: reserved bits, or a feature that CPUID does not offer.
        """
        new = Cr4(value)
        long_mode = bool(self.msrs.get(Efer).lma)
        check_cr4(self._cr4, new, self._cr3, self.model, long_mode=long_mode)
        self._note_cr(4, value)
        changed = new.value ^ self._cr4.value
        self._cr4 = new
        self._enter_mode()
        if changed & _FLUSHING_CR4:
            self.mmu.flush(keep_global=False)

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 (kernel) or 3 (user)."""
        return self._cpl

    @cpl.setter
    def cpl(self, level: int) -> None:
        if level not in (0, 3):
            raise CallerError(f"CPL {level}: 0 or 3 expected")
        self._cpl = level
        self.mmu.user = level == 3
        self.mmu.drop_views()

    def enter_privilege(self, level: int, *, alignment_check: bool) -> None:
        """Take over CPL and RFLAGS.AC from a core that runs machine code."""
        if level != self._cpl:
            self.cpl = level
        if alignment_check != self._alignment_check:
            self.alignment_check = alignment_check

    @property
    def alignment_check(self) -> bool:
        """RFLAGS.AC, what STAC and CLAC change: it lifts SMAP."""
        return self._alignment_check

    @alignment_check.setter
    def alignment_check(self, value: bool) -> None:
        self._alignment_check = value
        self._enter_mode()

    def set_handler(self, vector: int, handler: ExceptionHandler | None) -> None:
        """Install the handler of an exception, or remove it with None."""
        if handler is None:
            self._handlers.pop(vector, None)
        else:
            self._handlers[vector] = handler

    # Loads and stores

    def load64(self, va: int) -> int:
        """Load 8 bytes, little-endian.

        Raises:
            PageFault: no handler cured the failed translation.
            GeneralProtection: `va` is not canonical.
        """
        view = self._load_views.get(va >> 12)
        if view is not None and (offset := va & 0xFFF) <= 0xFF8:
            return _unpack_u64(view, offset)[0]  # type: ignore[no-any-return]
        if (offset := va & 0xFFF) <= 0xFF8:
            found = self._translate(va, _READ)
            pa, slot = found.pa, found.slot
            view = self._readable.get(pa | slot) or self._caches.page_view(
                slot, pa >> 12, write=False
            )
            if view is not None:
                self._load_views[va >> 12] = view
                return _unpack_u64(view, offset)[0]  # type: ignore[no-any-return]
        return int.from_bytes(self._load_slow(va, 8, _READ), "little")

    def store64(self, va: int, value: int) -> None:
        """Store 8 bytes, little-endian; raises as `load64`."""
        view = self._store_views.get(va >> 12)
        if view is not None and (offset := va & 0xFFF) <= 0xFF8:
            _pack_u64(view, offset, value)
            return
        if va & 0xFFF > 0xFF8:
            # One instruction: a fault on its second page leaves the first untouched.
            self._translate(va, _WRITE)
            self._translate(va + 8 & -PAGE_SIZE, _WRITE)
        self._store_slow(va, value.to_bytes(8, "little"))

    def load(self, va: VirtAddr | int, length: int) -> bytes:
        """Load `length` bytes; raises as `load64`."""
        view = self._load_views.get(va >> 12)
        offset = va & PAGE_OFFSET_MASK
        if view is not None and offset + length <= PAGE_SIZE:
            return bytes(view[offset : offset + length])
        return self._load_slow(va, length, _READ)

    def store(self, va: VirtAddr | int, data: bytes | memoryview) -> None:
        """Store bytes; raises as `load64`. Pages before a fault keep what came."""
        view = self._store_views.get(va >> 12)
        offset = va & PAGE_OFFSET_MASK
        if view is not None and offset + len(data) <= PAGE_SIZE:
            view[offset : offset + len(data)] = data
            return
        self._store_slow(va, data)

    def fetch(self, va: VirtAddr | int, length: int) -> bytes:
        """Fetch instruction bytes: as a load, but NX and SMEP apply."""
        return self._load_slow(va, length, _FETCH)

    def load_array(self, va: VirtAddr | int, count: int) -> Words:
        """Load `count` 64-bit words, one translation per page."""
        return np.frombuffer(self._load_slow(va, 8 * count, _READ), "<u8")

    def store_array(self, va: VirtAddr | int, words: Words) -> None:
        """Store 64-bit words, one translation per page."""
        self._store_slow(va, np.ascontiguousarray(words, "<u8").data.cast("B"))

    def copy(self, target: VirtAddr | int, source: VirtAddr | int, length: int) -> None:
        """REP MOVSB: copy upwards through both mappings.

        Where a run of source and target is the same frame under two tags, the bytes
        move `MOVE_SIZE` at a time, alternating between the tags, as microcode does;
        between different frames whole runs move at memory speed.
        """
        done = 0
        for to in self._runs(target, length, _WRITE):
            end = done + to.length
            for run in self._runs(source + done, to.length, _READ):
                into = to.pa + to.length - (end - done)
                self._copy_run(into, to.slot, run)
                done += run.length

    def fill(self, va: VirtAddr | int, value: int, length: int) -> None:
        """REP STOSB: store `length` copies of a byte."""
        for run in self._runs(va, length, _WRITE):
            view = self._bus.claim_ram(run.pa, run.length, run.slot)
            if view is None:
                self._bus.store(run.pa, bytes([value]) * run.length, run.slot)
            else:
                view[:] = value

    # Flushes

    def invlpg(self, va: VirtAddr | int) -> None:
        """INVLPG: drop the translations of the page that holds `va`, global or not."""
        self.mmu.invlpg(va)

    def wbinvd(self) -> None:
        """WBINVD: write back and empty the caches."""
        self._caches.write_back_invalidate()

    def clflush(self, va: VirtAddr | int) -> None:
        """CLFLUSH: write back and drop the line of `va`, under this mapping's tag.

        Raises:
            PageFault: `va` is not mapped for reading.
        """
        for run in self._runs(va, 1, _READ):
            self._bus.flush_line(run.pa, run.slot)

    # Translation

    def translate(self, va: VirtAddr | int, *, write: bool = False) -> Translation:
        """Return the translation that an access would use, and fill the TLB.

        Raises:
            PageFault, GeneralProtection: as the access would.
        """
        return self._translate(va, _WRITE if write else _READ)

    # The slow paths

    def _load_slow(self, va: int, length: int, access: int) -> bytes:
        parts = []
        for run in self._runs(va, length, access):
            parts.append(self._bus.load(run.pa, run.length, run.slot))
        if len(parts) != 1:
            return b"".join(parts)
        if access == _READ:
            self._keep_view(va, run, write=False)
        return parts[0]

    def _store_slow(self, va: int, data: bytes | memoryview) -> None:
        done = 0
        for run in self._runs(va, len(data), _WRITE):
            part = data[done : done + run.length]
            self._bus.store(run.pa, part, run.slot)
            done += run.length
        if data and done == run.length:
            self._keep_view(va, run, write=True)

    def _keep_view(self, va: int, only: Run, *, write: bool) -> None:
        """Let later accesses to the first page go straight to its bytes, if they may.

        `only` is the one run of the access.
        """
        view = self._caches.page_view(only.slot, only.pa >> PAGE_SHIFT, write=write)
        if view is not None:
            views = self._store_views if write else self._load_views
            views[va >> PAGE_SHIFT] = view

    def _copy_run(self, into: int, slot: int, run: Run) -> None:
        if into < run.pa + run.length and run.pa < into + run.length:
            # Closer together, a byte that was stored is a byte to be loaded soon.
            step = min(into - run.pa, MOVE_SIZE) if into > run.pa else MOVE_SIZE
            for done in range(0, run.length, step):
                size = min(step, run.length - done)
                data = self._bus.load(run.pa + done, size, run.slot)
                self._bus.store(into + done, data, slot)
            return
        source = self._bus.stream_ram(run.pa, run.length, run.slot)
        if source is None or _share_a_page(into, run):
            data = self._bus.load(run.pa, run.length, run.slot)
            self._bus.store(into, data, slot)
            return
        target = self._bus.claim_ram(into, run.length, slot)
        if target is None:
            self._bus.store(into, source.tobytes(), slot)
        else:
            np.copyto(target, source)

    # Modes

    def _enter_mode(self) -> None:
        """Derive the walker from CR0, CR4, EFER, SYSCFG and the model."""
        self._roots.clear()
        layout = LONG_5_LEVEL if self._cr4.la57 else LONG_4_LEVEL
        protection = Protection(
            write_protect=bool(self._cr0.write_protect),
            smep=bool(self._cr4.smep),
            smap=bool(self._cr4.smap) and not self._alignment_check,
        )
        self.mmu.enter(
            layout if self._cr0.paging else None, self._address_rules(), protection
        )

    def _address_rules(self) -> AddressRules:
        """Width and C-bit: reduced from the moment SYSCFG[23] is set.

        Source: Linux 6.1.192 arch/x86/kernel/cpu/amd.c, early_detect_mem_encrypt().
        """
        model = self.model
        width, c_mask = model.phys_bits, 0
        encryption = model.memory_encryption
        if self.msrs.get(Syscfg).mem_encrypt and encryption.usable:
            width = encryption.phys_bits_with_sme
            c_mask = 1 << encryption.c_bit
        no_execute = bool(self.msrs.get(Efer).nxe)
        return AddressRules(width, c_mask, no_execute, model.page_1gb)

    def _msr_written(self, index: int, value: int) -> None:
        if index == Efer.ADDRESS:
            self._enter_mode()
        elif index == Syscfg.ADDRESS:
            # Width and C-bit change what every cached translation means.
            self._enter_mode()
            self.mmu.flush(keep_global=False)
        elif index == VmPageFlush.ADDRESS:
            self._flush_guest_page(VmPageFlush(value))

    def _flush_guest_page(self, request: VmPageFlush) -> None:
        """Write back and drop the lines of a page that an ASID marked private.

        Source: [APM2] 15.34.9: through the host's tables, for a supervisor page.
        """
        try:
            found = self.mmu.probe(request.page << PAGE_SHIFT)
        except PageFault as fault:
            raise GeneralProtection(
                f"WRMSR VM_PAGE_FLUSH {request.value:#x}: {fault.reason}"
            ) from None
        self._bus.flush_page(found.pa, slot_of_asid(request.asid))

    def note_page_fault(self, fault: PageFault) -> None:
        """Set CR2 and tell the trace."""
        self.cr2 = fault.address
        if self._trace.active:
            self._trace.emit("page-fault", va=fault.address, code=int(fault.code))

    def _page_fault(self, fault: PageFault) -> bool:
        """Set CR2 and call the handler; tell whether it cured the fault."""
        self.note_page_fault(fault)
        handler = self._handlers.get(PageFault.vector)
        if handler is None:
            return False
        # A gate leads to CPL 0, and IRET back.
        level, self.cpl = self._cpl, 0
        try:
            return handler(self, fault)
        finally:
            self.cpl = level

    def _note_cr(self, number: int, value: int) -> None:
        if self._trace.active:
            self._trace.emit("cr", register=f"cr{number}", value=value)


_FLUSHING_CR4 = sum(
    Cr4.FIELDS[name].mask for name in ("pge", "pae", "la57", "smep", "pcide")
)


def _share_a_page(into: int, run: Run) -> bool:
    """Tell whether two disjoint ranges of equal length have a page in common."""
    low, high = sorted((into, run.pa))
    return (low + run.length - 1) >> PAGE_SHIFT >= high >> PAGE_SHIFT
