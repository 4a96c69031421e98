"""What an attacker with the DIMMs sees: one pass over the cells of a machine."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..hw.types import PAGE_SIZE, PhysAddr
from .dram_file import DramImage, page_chunks
from .page_class import PageClass, classify
from .snoop_repeats import (
    Duplicates,
    DuplicateSearch,
    ReadableDram,
    Repeats,
    RepeatSearch,
)
from .snoop_strings import (
    ByteSearch,
    FoundStrings,
    StringSearch,
    strings_by_chance,
)


@dataclass(frozen=True)
class PageSpan:
    """Neighbouring pages that are present, with one `PageClass` each."""

    first_page: int
    classes: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PageCounts:
    """How many pages of each class; what was never written counts as zero."""

    zero: int
    plain: int
    encrypted: int


@dataclass(frozen=True)
class SnoopReport:
    """All that `snoop` found."""

    size: int  # end of RAM in bytes
    pages: PageCounts
    spans: tuple[PageSpan, ...]  # ascending; between them is nothing but zeros
    strings: FoundStrings
    strings_by_chance: int  # expected of the encrypted-looking pages
    finds: dict[bytes, list[PhysAddr]]
    duplicates: Duplicates
    repeats: Repeats | None  # None: there was no second snapshot


def snoop(
    image: DramImage,
    *,
    second: ReadableDram | None = None,
    needles: tuple[bytes, ...] = (),
    min_length: int = 8,
    num_strings: int = 20,
    progress: Callable[[int], None] | None = None,
) -> SnoopReport:
    """Classify every page, and search it for strings and for ciphertext that repeats.

    Time goes with the bytes that `image` yields, not with its size. Resident memory
    is a few chunks, and one byte for each page present.

    Args:
        image: the cells, read once and in order.
        second: another snapshot of the same machine, for ciphertext repeats.
        needles: bytes to find, none of them empty or with a zero byte.
        min_length: shortest run of printable ASCII that is a string.
        num_strings: how many strings to keep for showing.
        progress: called with the number of bytes done since the last call.

    Raises:
        CallerError: an argument or an extent of `image` is not as described.
        InputError: a dump is cut short while it is read.
        OSError: a dump cannot be read.
    """
    strings = StringSearch(min_length, num_strings)
    finds = ByteSearch(needles)
    duplicates = DuplicateSearch()
    repeats = RepeatSearch(second) if second is not None else None
    spans = []
    for address, chunk in page_chunks(image.size, image.extents()):
        pages = chunk.reshape(-1, PAGE_SIZE)
        classes = classify(pages)
        spans.append(PageSpan(address // PAGE_SIZE, classes))
        if classes.any():
            strings.feed(address, chunk)
            finds.feed(address, chunk)
            encrypted = classes == PageClass.ENCRYPTED
            duplicates.feed(pages[encrypted])
            if repeats is not None:
                repeats.feed(address, chunk, encrypted)
        if progress is not None:
            progress(chunk.size)
    counts = _counted(image.size, spans)
    return SnoopReport(
        size=image.size,
        pages=counts,
        spans=tuple(spans),
        strings=strings.finish(),
        strings_by_chance=strings_by_chance(counts.encrypted * PAGE_SIZE, min_length),
        finds=finds.finish(),
        duplicates=duplicates.finish(),
        repeats=repeats.finish() if repeats is not None else None,
    )


def _counted(size: int, spans: list[PageSpan]) -> PageCounts:
    totals = np.zeros(len(PageClass), np.int64)
    for span in spans:
        totals += np.bincount(span.classes, minlength=len(PageClass))
    plain, encrypted = int(totals[PageClass.PLAIN]), int(totals[PageClass.ENCRYPTED])
    return PageCounts(size // PAGE_SIZE - plain - encrypted, plain, encrypted)
