"""The trace of a machine as a file: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import BinaryIO

from ..hw.trace import Event


def event_writer(file: BinaryIO) -> Callable[[Event], None]:
    """Return a listener that writes each event as a line of `file`."""

    def write(event: Event) -> None:
        file.write(json.dumps(event.as_json()).encode() + b"\n")

    return write
