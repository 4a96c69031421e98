"""An emulated AMD machine with memory encryption, and the OS code that enables it."""

__version__ = "0.1.0"
