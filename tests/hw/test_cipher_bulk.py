"""hw/cipher/engine: pages and lines in bulk, against the slow witness."""

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from cbit.hw.cipher import MemoryCipher, Tweaks, engine
from cbit.hw.errors import CallerError
from cbit.hw.types import CACHE_LINE_SIZE, PAGE_SIZE

from .test_cipher import Witness

Bytes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.intp]

PAGES = 72
LINES = 80
PER_BATCH = engine.BATCH_BYTES // PAGE_SIZE

SHAPES: dict[str, list[int]] = {
    "one": [5],
    "the first": [0],
    "neighbours": [7, 8, 9, 10],
    "scattered": [1, 4, 5, 30, 63, 71],
    "unsorted": [9, 2, 40, 3],
    "backwards": [12, 11, 10, 9],
    # First and last are as far apart as in a run of neighbours.
    "shuffled neighbours": [20, 22, 21, 23],
    "every second": list(range(0, PAGES, 2)),
}


def engines(seed: int, mode: str) -> tuple[MemoryCipher, Witness]:
    """Return an engine with drawn key and constants, and its witness."""
    rng = random.Random(seed)
    key = rng.randbytes(16)
    constants = [rng.randbytes(16) for _ in range(48)]
    xex = mode == "XEX"
    by_bit = dict(enumerate(constants, start=4))
    return MemoryCipher(key, Tweaks(constants), xex), Witness(key, by_bit, xex)


def memory(units: int, unit_size: int, seed: int) -> Bytes:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (units, unit_size), dtype=np.uint8)


def index(units: list[int]) -> Index:
    return np.array(units, np.intp)


@pytest.mark.req("MC-2", "MC-7", "MC-8")
@pytest.mark.parametrize("mode", ["XE", "XEX"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit_size", [PAGE_SIZE, CACHE_LINE_SIZE])
def test_chosen_units_are_enciphered_and_no_other_byte_changes(
    mode: str, shape: str, unit_size: int
) -> None:
    fast, slow = engines(1, mode)
    plain, target = memory(LINES, unit_size, 2), memory(LINES, unit_size, 3)
    expected = target.copy()
    # A page costs the witness 256 blocks, so of many pages only some are compared.
    units = SHAPES[shape] if unit_size == CACHE_LINE_SIZE else SHAPES[shape][:6]
    for unit in units:
        row = slow.encrypt(unit * unit_size, plain[unit].tobytes())
        expected[unit] = np.frombuffer(row, np.uint8)

    fast.encrypt_units(index(units), plain, target)
    assert np.array_equal(target, expected)
    back = memory(LINES, unit_size, 4)
    rest = np.setdiff1d(np.arange(LINES), units)
    untouched = back[rest].copy()
    fast.decrypt_units(index(units), target, back)
    assert np.array_equal(back[units], plain[units])
    assert np.array_equal(back[rest], untouched)


@pytest.mark.parametrize("mode", ["XE", "XEX"])
@pytest.mark.parametrize("shape", SHAPES)
def test_source_and_target_may_be_the_same_memory(mode: str, shape: str) -> None:
    fast, _ = engines(5, mode)
    units = index(SHAPES[shape])
    plain, apart = memory(PAGES, PAGE_SIZE, 6), memory(PAGES, PAGE_SIZE, 6)
    fast.encrypt_units(units, plain, apart)
    together = plain.copy()
    fast.encrypt_units(units, together, together)
    assert np.array_equal(together, apart)
    fast.decrypt_units(units, together, together)
    assert np.array_equal(together, plain)


@pytest.mark.parametrize("seed", range(20))
def test_law_random_lines_match_the_witness(seed: int) -> None:
    rng = random.Random(seed)
    fast, slow = engines(seed, rng.choice(["XE", "XEX"]))
    cells, lines = memory(4096, CACHE_LINE_SIZE, seed), rng.sample(range(4096), 40)
    out = np.zeros_like(cells)
    work, witness = rng.choice(
        [(fast.encrypt_units, slow.encrypt), (fast.decrypt_units, slow.decrypt)]
    )
    work(index(lines), cells, out)
    for line in lines:
        expected = witness(line * CACHE_LINE_SIZE, cells[line].tobytes())
        assert out[line].tobytes() == expected
    assert not np.delete(out, lines, axis=0).any()


@pytest.mark.req("MC-3")
@pytest.mark.parametrize("mode", ["XE", "XEX"])
def test_pages_far_up_have_tweaks_of_all_their_address_bits(mode: str) -> None:
    # A row number stands for an address; a view without memory behind it is enough.
    fast, slow = engines(7, mode)
    page = memory(1, PAGE_SIZE, 8)
    far = (1 << 40) - 1
    everywhere = np.broadcast_to(page, (far + 1, PAGE_SIZE))
    out = np.lib.stride_tricks.as_strided(
        np.empty(PAGE_SIZE, np.uint8), (far + 1, PAGE_SIZE), (0, 1)
    )
    fast.encrypt_units(index([far]), everywhere, out)
    expected = slow.encrypt(far * PAGE_SIZE, page[0].tobytes())
    assert out[far].tobytes() == expected


@pytest.mark.req("MC-39")
def test_a_page_beyond_the_constants_is_an_error() -> None:
    published = MemoryCipher(bytes(16), Tweaks([bytes(16)] * 28), True)
    everywhere = np.broadcast_to(np.zeros(PAGE_SIZE, np.uint8), (1 << 21, PAGE_SIZE))
    with pytest.raises(CallerError, match="address 0x100000000: no tweak constant"):
        published.encrypt_units(
            index([3, 1 << 20]), everywhere, np.zeros((1, PAGE_SIZE), np.uint8)
        )


def test_no_units_are_no_work() -> None:
    fast, _ = engines(9, "XEX")
    cells = memory(1, PAGE_SIZE, 9)
    before = cells.copy()
    fast.encrypt_units(index([]), cells, cells)
    assert np.array_equal(cells, before)


# --- batches and threads


@pytest.mark.parametrize("mode", ["XE", "XEX"])
@pytest.mark.parametrize("count", [PER_BATCH - 1, PER_BATCH, PER_BATCH + 1, 150])
def test_a_job_of_several_batches_is_the_sum_of_its_pages(
    mode: str, count: int
) -> None:
    fast, _ = engines(10, mode)
    plain = memory(count, PAGE_SIZE, 11)
    alone, together = np.zeros_like(plain), np.zeros_like(plain)
    for page in range(count):
        fast.encrypt_units(index([page]), plain, alone)
    fast.encrypt_units(np.arange(count), plain, together)
    assert np.array_equal(together, alone)


LARGE = engine.SHARED_JOB_BYTES // PAGE_SIZE


@pytest.mark.parametrize("mode", ["XE", "XEX"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [LARGE - 1, LARGE, LARGE + 1, LARGE + PER_BATCH + 5])
def test_a_large_job_is_shared_by_threads_without_a_seam(
    monkeypatch: pytest.MonkeyPatch, mode: str, threads: int, count: int
) -> None:
    fast, slow = engines(12, mode)
    monkeypatch.setattr(engine, "THREADS", threads)
    plain = memory(1, PAGE_SIZE, 13).repeat(count, axis=0)
    plain[:, :8] = np.arange(count, dtype="<u8").view(np.uint8).reshape(-1, 8)
    cells = plain.copy()
    fast.encrypt_units(np.arange(count), cells, cells)

    rng = random.Random(count)
    step = engine.SHARED_BATCH_BYTES // PAGE_SIZE
    edges = {edge + n for edge in range(step, count, step) for n in (-1, 0)}
    for page in sorted({0, *edges, count - 1, *rng.sample(range(count), 3)}):
        line = rng.randrange(PAGE_SIZE // CACHE_LINE_SIZE) * CACHE_LINE_SIZE
        wanted = plain[page, line : line + CACHE_LINE_SIZE].tobytes()
        stored = cells[page, line : line + CACHE_LINE_SIZE].tobytes()
        assert stored == slow.encrypt(page * PAGE_SIZE + line, wanted)

    fast.decrypt_units(np.arange(count), cells, cells)
    assert np.array_equal(cells, plain)


@pytest.mark.parametrize("mode", ["XE", "XEX"])
def test_scattered_pages_and_lines_of_a_large_job_come_back(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(engine, "THREADS", 2)
    fast, slow = engines(14, mode)
    plain = memory(LARGE * 2, PAGE_SIZE, 15)
    pages = np.random.default_rng(16).permutation(LARGE * 2)[: LARGE + 100]
    cells = plain.copy()
    fast.encrypt_units(pages, cells, cells)
    changed = (cells != plain).any(axis=1)
    assert np.array_equal(np.flatnonzero(changed), np.sort(pages))
    last = int(pages[-1])
    head = slow.encrypt(last * PAGE_SIZE, plain[last, :64].tobytes())
    assert cells[last, :64].tobytes() == head

    # The same bytes as lines, in another order: what pages did, lines undo.
    lines = (pages[:, None] * 64 + np.arange(64)).reshape(-1)[::-1]
    by_line = cells.reshape(-1, CACHE_LINE_SIZE)
    fast.decrypt_units(lines, by_line, by_line)
    assert np.array_equal(cells, plain)


def test_several_threads_may_use_one_engine_at_once() -> None:
    fast, _ = engines(17, "XEX")
    plain = memory(PAGES, PAGE_SIZE, 18)
    cells = np.zeros_like(plain)
    fast.encrypt_units(np.arange(PAGES), plain, cells)

    def rounds(work: int) -> bool:
        out = np.zeros_like(plain)
        for _ in range(10):
            if work % 2:
                fast.encrypt_units(np.arange(PAGES), plain, out)
            else:
                fast.decrypt_units(np.arange(PAGES), cells, out)
        return np.array_equal(out, cells if work % 2 else plain)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(rounds, range(8)))
