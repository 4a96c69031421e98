"""The board: memory, caches, AMD-SP and cores put together; reset and power loss."""

from __future__ import annotations

import random

from .cipher import PROFILES, EngineProfile, profile_named
from .cpu import Cpu
from .cpuid import CpuModel
from .errors import CallerError
from .memory import (
    CacheHierarchy,
    Dram,
    HazardPolicy,
    MemoryBus,
    MemoryController,
    MemoryMap,
)
from .models import DEFAULT_MODEL, load_model
from .msr import MsrFile, Syscfg, TopMem, TopMem2
from .psp import SecureProcessor
from .trace import Trace
from .types import PhysAddr

DEFAULT_RAM = 1 << 30

TOP_MEM_SHIFT = 23
"""TOP_MEM and TOP_MEM2 count in units of 8 MiB."""


class Machine:
    """An AMD machine with memory encryption.

    Args:
        model: a `CpuModel`, or the name of one, or the path of a raw CPUID dump.
        ram: bytes of RAM, a multiple of 4096; costs nothing until touched.
        smee: firmware sets SYSCFG[23]; without effect where the part has no SME.
        tsme: firmware turns on transparent SME.
        coherent: whether caches keep tags coherent; None takes the model's word.
        profile: engine profile, see `cbit.hw.cipher.PROFILES`; None takes "random".
        hazards: "record" or "raise", for accesses that silicon leaves undefined.
        cores: how many.
        seed: makes keys and the order of evictions repeatable.

    Attributes:
        cpu: the boot core.
        cpus: all cores; msrs: their MSR files, in the same order.
        dram: the cells; what only tools and tests look at.
        caches, bus, controller, trace: as named.
        ram, tsme: as given.

    Raises:
        CallerError: an unknown model, profile or policy, no core, or a RAM size that
            cannot be.
    """

    def __init__(
        self,
        model: CpuModel | str = DEFAULT_MODEL,
        *,
        ram: int = DEFAULT_RAM,
        smee: bool = True,
        tsme: bool = False,
        coherent: bool | None = None,
        profile: EngineProfile | str | None = None,
        hazards: HazardPolicy | str = HazardPolicy.RECORD,
        cores: int = 1,
        seed: int | None = None,
    ) -> None:
        self.model = load_model(model) if isinstance(model, str) else model
        encryption = self.model.memory_encryption
        if profile is None:
            profile = PROFILES[-1]
        elif isinstance(profile, str):
            profile = profile_named(profile)
        if coherent is None:
            coherent = encryption.hw_coherent
        self.ram = ram
        self.tsme = tsme
        width = self.model.phys_bits
        if encryption.usable:  # elsewhere the reduction may be nonsense as well
            width = encryption.phys_bits_with_sme
        self.map = MemoryMap.pc(ram)
        if self.map.ram_end > 1 << width:
            raise CallerError(
                f"RAM up to {self.map.ram_end:#x}: {self.model.name} addresses {width} "
                "bits once SME has taken its share"
            )
        if cores < 1:
            raise CallerError(f"{cores} cores: 1 or more expected")
        self.trace = Trace()
        self.dram = Dram(self.map.ram_end)
        self.controller = MemoryController(transparent=tsme)
        self.caches = CacheHierarchy(
            self.dram,
            self.controller,
            coherent=coherent,
            random_source=random.Random(seed),
            hazards=HazardPolicy(hazards),
            trace=self.trace,
        )
        self.bus = MemoryBus(self.map, self.caches, self.controller, self.trace)
        self.psp = SecureProcessor(self.controller, profile, seed)
        self.psp.reset()
        self.msrs = [
            MsrFile(self.model, smee=smee, boot_core=not index)
            for index in range(cores)
        ]
        self.cpus = [
            Cpu(
                index,
                self.model,
                msrs,
                self.bus,
                self.caches,
                self.controller,
                self.trace,
            )
            for index, msrs in enumerate(self.msrs)
        ]
        self.cpu = self.cpus[0]
        self._announce_memory()

    @property
    def smee(self) -> bool:
        """SYSCFG[23] of the boot core: memory encryption is enabled."""
        return bool(self.msrs[0].get(Syscfg).mem_encrypt)

    def reset(self) -> None:
        """RESET#: caches are written back, the AMD-SP makes a new key, DRAM stays.

        What was stored through C = 1 before is unreadable afterwards.
        """
        self.caches.write_back_invalidate()
        self._restart()

    def power_loss(self) -> None:
        """Power goes and comes back: lines that were not written back are lost.

        DRAM keeps its cells, as NVDIMMs and frozen DIMMs do.
        """
        self.caches.lose()
        self._restart()

    def snoop(self, pa: PhysAddr | int, length: int) -> bytes:
        """Return what a probe on the memory bus reads: the cells as they are now.

        Lines that are still dirty in a cache have not arrived; `caches.drain()` lets
        them.

        Raises:
            CallerError: [pa, pa + length) does not lie in DRAM.
        """
        if not 0 <= pa <= pa + length <= self.dram.size:
            raise CallerError(
                f"[{pa:#x}, {pa + length:#x}) is outside DRAM of "
                f"{self.dram.size:#x} bytes"
            )
        return self.dram.cells[pa : pa + length].tobytes()

    def _restart(self) -> None:
        self.psp.reset()
        if self.trace.active:
            self.trace.emit("reset")
        for cpu in self.cpus:
            cpu.reset()
        self._announce_memory()

    def _announce_memory(self) -> None:
        """Set TOP_MEM and TOP_MEM2 on every core, as firmware does."""
        for msrs in self.msrs:
            low, *high = [region.end for region in self.map.ram()[1:]]
            msrs.set(TopMem.of(tom=-(-low >> TOP_MEM_SHIFT)))
            if high:
                msrs.set(TopMem2.of(tom2=-(-high[0] >> TOP_MEM_SHIFT)))
