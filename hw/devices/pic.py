"""Two 8259A interrupt controllers in cascade, as in a PC.

Source: Intel 8259A data sheet (231468); edge and level register 4D0h: Intel 82371AB
data sheet (290562), ELCR.
"""

from __future__ import annotations

from collections.abc import Callable

MASTER, SLAVE, EDGE_LEVEL = 0x20, 0xA0, 0x4D0
CASCADE = 2
SPURIOUS = 7


class Chip:
    """One 8259A.

    Attributes:
        irr, isr, imr: request, in service, mask; bit n is input n.
        level: inputs that are level-triggered.
    """

    STATE = (
        *("irr", "isr", "imr", "level", "lines", "base", "auto_eoi", "read_isr"),
        *("step", "needs_icw3", "needs_icw4", "special_mask", "priority"),
        *("rotate_auto", "poll", "fully_nested"),
    )

    def __init__(self) -> None:
        self.irr = self.isr = self.level = self.lines = 0
        self.imr = 0xFF
        self.base = 0
        self.auto_eoi = self.rotate_auto = self.fully_nested = False
        self.read_isr = self.special_mask = self.poll = False
        self.needs_icw3 = self.needs_icw4 = False
        self.step = 0  # which ICW comes next; 0: initialised
        self.priority = 0  # the input that is served first

    def set_line(self, number: int, high: bool) -> None:
        """Drive an input; a request that is not held until it is taken is lost."""
        bit = 1 << number
        if high:
            if self.level & bit or not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            self.irr &= ~bit

    def set_level(self, inputs: int) -> None:
        """Choose the inputs whose level requests."""
        self.level = inputs
        self.irr = self.irr & ~inputs | self.lines & inputs

    def best(self) -> int | None:
        """Return the input to be served now, None if none may interrupt."""
        requests = self.irr & ~self.imr
        for turn in range(8):
            number = (self.priority + turn) % 8
            bit = 1 << number
            nested = self.fully_nested and number == CASCADE and requests & bit
            hidden = self.special_mask and self.imr & bit
            if self.isr & bit and not nested and not hidden:
                return None
            if requests & bit:
                return number
        return None

    def take(self, number: int) -> None:
        """Put an input in service."""
        bit = 1 << number
        if not self.level & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_auto:
            self.priority = (number + 1) % 8

    def read_command(self) -> int:
        """Return IRR or ISR, or answer a poll, which takes the request."""
        if not self.poll:
            return self.isr if self.read_isr else self.irr
        self.poll = False
        number = self.best()
        if number is None:
            return 0
        self.take(number)
        return 0x80 | number

    def write_command(self, value: int) -> None:
        """ICW1, OCW2 or OCW3."""
        if value & 0x10:
            self.isr = self.imr = 0
            self.irr = self.lines & self.level  # edges must come again
            self.special_mask = self.read_isr = self.poll = False
            self.auto_eoi = self.rotate_auto = self.fully_nested = False
            self.priority = 0
            self.needs_icw3, self.needs_icw4 = not value & 2, bool(value & 1)
            self.step = 2
        elif value & 0x08:
            self.poll = bool(value & 4)
            if value & 2:
                self.read_isr = bool(value & 1)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._end_of_interrupt(value)

    def write_data(self, value: int) -> None:
        """ICW2 to ICW4, or the mask."""
        if self.step == 2:
            self.base = value & 0xF8
            self.step = 3 if self.needs_icw3 else 4 if self.needs_icw4 else 0
        elif self.step == 3:
            self.step = 4 if self.needs_icw4 else 0
        elif self.step == 4:
            self.auto_eoi, self.fully_nested = bool(value & 2), bool(value & 0x10)
            self.step = 0
        else:
            self.imr = value

    def _end_of_interrupt(self, value: int) -> None:
        number: int | None = value & 7
        if not value & 0x40:  # not specific: the one served first
            order = [(self.priority + turn) % 8 for turn in range(8)]
            ended = self.isr & ~(self.imr if self.special_mask else 0)
            number = next((n for n in order if ended >> n & 1), None)
        if value & 0x20 and number is not None:
            self.isr &= ~(1 << number)
            if value & 0x80:
                self.priority = (number + 1) % 8
        elif value & 0xE0 == 0xC0:
            self.priority = (value & 7) + 1 & 7
        elif value & 0x60 == 0:
            self.rotate_auto = bool(value & 0x80)


class Pic:
    """The pair: 16 inputs, one output.

    Args:
        changed: called when the output may have become active.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self.master, self.slave = Chip(), Chip()
        self._changed = changed

    def set_line(self, irq: int, high: bool) -> None:
        """Drive IRQ 0 to 15."""
        chip = self.master if irq < 8 else self.slave
        chip.set_line(irq % 8, high)
        self._update()

    @property
    def pending(self) -> bool:
        """The output to the processor."""
        return self.master.best() is not None

    def acknowledge(self) -> int:
        """Run the acknowledge cycle; return the vector.

        With no request left the lowest input answers: a spurious interrupt.
        """
        number = self.master.best()
        if number is None:
            return self.master.base + SPURIOUS
        self.master.take(number)
        if number != CASCADE:
            return self.master.base + number
        inner = self.slave.best()
        if inner is None:
            return self.slave.base + SPURIOUS
        self.slave.take(inner)
        self.master.set_line(CASCADE, False)  # INT falls between two requests
        self._update()
        return self.slave.base + inner

    def read_port(self, port: int, size: int) -> int:
        """IMR, or the register that OCW3 chose."""
        if port >= EDGE_LEVEL:
            return (self.slave if port & 1 else self.master).level
        chip = self.slave if port >= SLAVE else self.master
        if port & 1:
            return chip.imr
        value = chip.read_command()
        self._update()
        return value

    def write_port(self, port: int, value: int, size: int) -> None:
        """Command or data of one chip, or the trigger modes."""
        value &= 0xFF
        if port >= EDGE_LEVEL:
            chip = self.slave if port & 1 else self.master
            chip.set_level(value & (0xDE if port & 1 else 0xF8))
        else:
            chip = self.slave if port >= SLAVE else self.master
            (chip.write_data if port & 1 else chip.write_command)(value)
        self._update()

    def state(self) -> dict[str, object]:
        """Return the state, for JSON."""
        return {
            name: {key: getattr(chip, key) for key in Chip.STATE}
            for name, chip in (("master", self.master), ("slave", self.slave))
        }

    def restore(self, state: dict[str, dict[str, int]]) -> None:
        """Set what `state` returned."""
        for name, chip in (("master", self.master), ("slave", self.slave)):
            for key in Chip.STATE:
                kind = type(getattr(chip, key))
                setattr(chip, key, kind(state[name][key]))

    def _update(self) -> None:
        self.master.set_line(CASCADE, self.slave.best() is not None)
        if self.pending:
            self._changed()
