"""A core that executes machine code with Unicorn, over the memory of a `Machine`."""

from .core import Ending, NativeCore, Stop
from .engine import EngineError
from .features import engine_model
from .fill import NativeFailure

__all__ = [
    "Ending",
    "EngineError",
    "NativeCore",
    "NativeFailure",
    "Stop",
    "engine_model",
]
