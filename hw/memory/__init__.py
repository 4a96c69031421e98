"""Memory as the silicon has it: DRAM cells, key slots, tagged caches, the map."""

from .bus import MemoryBus
from .cache import CacheHierarchy
from .controller import SLOT_HOST, SLOT_NONE, MemoryController, slot_of_asid
from .dram import Dram
from .hazard import Hazard, HazardError, HazardPolicy
from .memory_map import MemoryMap, Mmio, Region, RegionKind

__all__ = [
    "SLOT_HOST",
    "SLOT_NONE",
    "CacheHierarchy",
    "Dram",
    "Hazard",
    "HazardError",
    "HazardPolicy",
    "MemoryBus",
    "MemoryController",
    "MemoryMap",
    "Mmio",
    "Region",
    "RegionKind",
    "slot_of_asid",
]
