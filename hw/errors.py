"""The families of errors; every error of the package derives from `CbitError`.

Architectural exceptions have their own file, hw/faults.py.
"""


class CbitError(Exception):
    """Anything this package raises on purpose; the message is one line."""


class CallerError(CbitError, ValueError):
    """A caller's mistake: an argument outside what the docstring allows."""


class InputError(CbitError, ValueError):
    """A file from outside is not what it claims to be, or is cut short."""


class KernelError(CbitError):
    """The reference kernel refuses to go on."""


class HostProtocolError(CbitError):
    """The hypervisor answered what it must not: terminate, never retry."""
