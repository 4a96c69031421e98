"""`MsrFile`: the model-specific registers of one core, as RDMSR and WRMSR see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from ..cpuid import CpuModel
from ..errors import CallerError
from ..faults import GeneralProtection
from .registers import Msr
from .rule import Access, MsrRule, Write
from .rules import RULE_BY_ADDRESS, RULES
from .system import ApicBase

MsrType = TypeVar("MsrType", bound=Msr)


class Served(NamedTuple):
    """Who holds a register in place of the file."""

    read: Callable[[], int]
    write: Callable[[int], None] | None


class MsrFault(GeneralProtection):
    """#GP(0) out of RDMSR or WRMSR.

    Attributes:
        index: the MSR's address.
        value: the operand of WRMSR; None for RDMSR.
    """

    def __init__(self, index: int, value: int | None, reason: str) -> None:
        self.index = index
        self.value = value
        known = RULE_BY_ADDRESS.get(index)
        name = f" ({known.register.NAME})" if known else ""
        operand = "" if value is None else f" <- {value:#x}"
        verb = "RDMSR" if value is None else "WRMSR"
        super().__init__(f"{verb} {index:#010x}{name}{operand}: {reason}")


class MsrFile:
    """The registers of one core; every core has a file of its own.

    `read` and `write` obey the rules that software is under. `get` and `set` are the
    hardware's own access: they never fault and call nobody back.

    Args:
        model: the processor; it decides which registers and bits exist.
        smee: firmware switches memory encryption on (SYSCFG[23]); without effect on a
            part that has no usable C-bit, or under a hypervisor.
        boot_core: the core that boots, which APIC_BASE tells.
    """

    def __init__(
        self, model: CpuModel, smee: bool = True, *, boot_core: bool = True
    ) -> None:
        self.model = model
        self.smee = smee
        self.boot_core = boot_core
        self._values: dict[int, int] = {}
        self._served: dict[int, Served] = {}
        self._callbacks: list[Callable[[int, int], None]] = []
        self.reset()

    def reset(self) -> None:
        """Give every register the value it has when firmware hands over."""
        self._values = {
            rule.register.ADDRESS: rule.reset(self.model, self.smee) for rule in RULES
        }
        self.set(self.get(ApicBase).replace(boot_core=int(self.boot_core)))

    def read(self, index: int) -> int:
        """Execute RDMSR.

        Args:
            index: ECX, 32 bits.

        Raises:
            GeneralProtection: the processor has no such MSR, or it cannot be read; a
                `MsrFault`, which names the MSR and what was expected.
        """
        rule = self._rule(index, None)
        if Access.READ not in rule.access:
            raise MsrFault(index, None, _refused_access(rule))
        return rule.shown(self._held(index), self)

    def write(self, index: int, value: int, *, paging: bool = False) -> None:
        """Execute WRMSR.

        Args:
            index: ECX, 32 bits.
            value: EDX:EAX, 64 bits.
            paging: CR0.PG is 1; EFER.LME cannot change then.

        Raises:
            GeneralProtection: no such MSR, a read-only one, a reserved bit, or a value
                that the register refuses; nothing has changed then.
        """
        if not 0 <= value < 1 << 64:
            raise CallerError(f"WRMSR {index:#x}: 64 bits, got {value:#x}")
        rule = self._rule(index, value)
        if Access.WRITE not in rule.access:
            raise MsrFault(index, value, _refused_access(rule))
        writable = rule.writable_mask(self.model)
        if value & ~writable:
            raise MsrFault(
                index,
                value,
                f"bits {value & ~writable:#x} are reserved on {self.model.name}, "
                f"expected only bits of {writable:#x}",
            )
        served = self._served.get(index)
        if served is not None and served.write is None:
            raise MsrFault(index, value, "the hardware's own, expected no write")
        write = Write(self._held(index), value, paging, self.model, self)
        if reason := rule.objection(write):
            raise MsrFault(index, value, reason)
        kept = self._values[index] = rule.kept(write)
        if served is not None and served.write is not None:
            served.write(kept)
        told = rule.shown(kept, self) if Access.READ in rule.access else value
        for callback in self._callbacks:
            callback(index, told)

    def get(self, kind: type[MsrType]) -> MsrType:
        """Return a register as the hardware knows it, decoded; absent ones as reset."""
        return kind(self._values[_known(kind)])

    def set(self, register: Msr) -> None:
        """Change a register from the hardware's side, past all rules."""
        self._values[_known(type(register))] = register.value

    def state(self) -> dict[int, int]:
        """Return every register's value by address."""
        return dict(self._values)

    def restore(self, state: Mapping[int, int]) -> None:
        """Take over values, past all rules; registers left out keep theirs.

        Raises:
            CallerError: a register that the machine has not, or over 64 bits.
        """
        for index, value in state.items():
            if index not in self._values or not 0 <= value < 1 << 64:
                raise CallerError(f"MSR {index:#x} = {value:#x}: no such register")
        self._values.update(state)

    def declares(self, index: int) -> bool:
        """Tell whether the processor has a register."""
        rule = RULE_BY_ADDRESS.get(index)
        return rule is not None and rule.present(self.model)

    def serve(
        self,
        register: type[Msr] | int,
        read: Callable[[], int],
        write: Callable[[int], None] | None = None,
    ) -> None:
        """Let the hardware hold a register: software's accesses go to these functions.

        The rules hold as before; `write` gets what they accepted.

        Args:
            register: its class or its address.
            read: returns the value now, 64 bits.
            write: takes a new one; None: software cannot write, which is #GP.

        Raises:
            CallerError: no such register is declared.
        """
        self._served[_known(register)] = Served(read, write)

    def take_back(self, register: type[Msr] | int) -> None:
        """End what `serve` began; the register keeps the value it has now.

        Raises:
            CallerError: nobody serves the register.
        """
        index = _known(register)
        if index not in self._served:
            raise CallerError(f"MSR {index:#x}: nobody serves it")
        self._values[index] = self._held(index)
        del self._served[index]

    def on_write(self, callback: Callable[[int, int], None]) -> None:
        """Call `callback` with index and new value after each write by software.

        For a write-only command register the value is what was written. The register
        has changed by then; an exception of the callback reaches the writer.
        """
        self._callbacks.append(callback)

    def _held(self, index: int) -> int:
        served = self._served.get(index)
        return self._values[index] if served is None else served.read()

    def _rule(self, index: int, value: int | None) -> MsrRule:
        if not 0 <= index < 1 << 32:
            raise CallerError(f"an MSR's address has 32 bits, got {index:#x}")
        rule = RULE_BY_ADDRESS.get(index)
        if rule is None or not rule.present(self.model):
            needs = rule.needs if rule else f"one of the {len(RULES)} declared MSRs"
            raise MsrFault(
                index, value, f"not present on {self.model.name}, expected {needs}"
            )
        return rule


def _known(register: type[Msr] | int) -> int:
    """Return the address of a register that the machine has declared."""
    index = register if isinstance(register, int) else register.ADDRESS
    if index not in RULE_BY_ADDRESS:
        name = f"{index:#x}" if isinstance(register, int) else register.__name__
        raise CallerError(f"{name} is no MSR of the machine")
    return index


def _refused_access(rule: MsrRule) -> str:
    return {
        Access.NONE: "for a guest only, expected an access in guest mode",
        Access.READ: "read-only, expected RDMSR",
        Access.WRITE: "write-only, expected WRMSR",
    }[rule.access]
