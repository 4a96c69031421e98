"""A core: control registers, MSRs, loads and stores through the MMU, flushes."""

from .control import Cr0, Cr3, Cr4
from .core import Cpu, ExceptionHandler, UnmodelledMode

__all__ = ["Cpu", "Cr0", "Cr3", "Cr4", "ExceptionHandler", "UnmodelledMode"]
