"""Ciphertext, plaintext and zeros are told apart, with known error rates."""

import lzma
import math
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from elftools.elf.elffile import ELFFile
from pytest_benchmark.fixture import BenchmarkFixture

from cbit.hw.types import PAGE_SIZE
from cbit.tools.dram_file import ByteArray
from cbit.tools.page_class import (
    ENTROPY_DEVIATION,
    ENTROPY_MEAN,
    PageClass,
    classify,
    page_entropy,
)

TEXT = "".join(pydoc_data.topics.topics.values()).encode()


def as_pages(content: bytes) -> ByteArray:
    whole = len(content) // PAGE_SIZE * PAGE_SIZE
    return np.frombuffer(content[:whole], np.uint8).reshape(-1, PAGE_SIZE)


def encrypted(plaintext: ByteArray, seed: int) -> ByteArray:
    """Encipher blocks with AES and an address tweak, as the memory controller does."""
    rng = np.random.default_rng(seed)
    blocks = plaintext.reshape(-1).view(np.uint64).reshape(-1, 2)
    tweak = np.zeros_like(blocks)
    for bit in range(len(blocks).bit_length()):
        constant = rng.integers(0, 1 << 64, 2, dtype=np.uint64)
        tweak ^= np.where(np.arange(len(blocks))[:, None] >> bit & 1, constant, 0)
    cipher = Cipher(algorithms.AES128(rng.bytes(16)), modes.ECB()).encryptor()
    mixed = np.frombuffer(cipher.update((blocks ^ tweak).tobytes()), np.uint64)
    return (mixed ^ tweak.reshape(-1)).view(np.uint8).reshape(-1, PAGE_SIZE)


def machine_code() -> bytes:
    library = next(Path(np.__file__).parent.rglob("_multiarray_umath*.so"))
    with library.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".text")
        assert section is not None
        return bytes(section.data())


def binomial(count: int, trials: int, chance: float) -> float:
    return math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(count + 1)
        - math.lgamma(trials - count + 1)
        + count * math.log(chance)
        + (trials - count) * math.log1p(-chance)
    )


def test_vector_mean_and_deviation_follow_from_the_multinomial_law() -> None:
    # Counts beyond 120 have no weight: 16 are expected.
    counts = range(121)
    term = [count * math.log2(count) if count else 0.0 for count in counts]
    one = [binomial(count, 4096, 1 / 256) for count in counts]
    first = sum(p * t for p, t in zip(one, term, strict=True))
    square = sum(p * t * t for p, t in zip(one, term, strict=True))
    pair = sum(
        one[a] * term[a] * sum(binomial(b, 4096 - a, 1 / 255) * term[b] for b in counts)
        for a in counts
    )
    variance = 256 * (square - first**2) + 256 * 255 * (pair - first**2)
    assert 12 - 256 / 4096 * first == pytest.approx(ENTROPY_MEAN, abs=1e-6)
    assert math.sqrt(variance) / 4096 == pytest.approx(ENTROPY_DEVIATION, abs=1e-6)


def test_vector_entropy_of_known_histograms() -> None:
    histograms = np.zeros((3, 256), np.intp)
    histograms[0, 7] = 4096  # one value
    histograms[1, :2] = 2048  # two values: a coin
    histograms[2] = 16  # all values alike
    assert page_entropy(histograms).tolist() == [0.0, 1.0, 8.0]


@pytest.mark.parametrize("what", ["zeros", "text", "random"])
def test_encrypted_pages_are_called_encrypted(what: str) -> None:
    num_pages = 8000
    plaintext = np.zeros((num_pages, PAGE_SIZE), np.uint8)
    if what == "text":
        plaintext[:] = np.resize(as_pages(TEXT), plaintext.shape)
    elif what == "random":
        rng = np.random.default_rng(9)
        plaintext = rng.integers(0, 256, plaintext.shape, dtype=np.uint8)
    classes = classify(encrypted(plaintext, seed=5))
    assert (classes != PageClass.ENCRYPTED).sum() / num_pages < 1e-3
    assert (classes != PageClass.ENCRYPTED).sum() == 0  # the seeds are fixed


def made_up_code(rng: np.random.Generator) -> bytes:
    """Make instruction-like bytes: few opcodes, REX prefixes, small displacements."""
    opcodes = rng.choice(np.frombuffer(b"\x48\x8b\x89\x0f\xe8\x74\x83\xc3", "u1"), 1400)
    modrm = rng.integers(0, 256, 1400)
    displacement = rng.integers(0, 64, 1400) * 8 & 0xFF
    return np.stack([opcodes, modrm, displacement], 1).astype(np.uint8).tobytes()


def pointers(rng: np.random.Generator) -> bytes:
    places = rng.integers(0, 1 << 24, PAGE_SIZE // 8, dtype=np.uint64)
    return (np.uint64(0xFFFF_8880_0000_0000) + places).tobytes()


def page_table(rng: np.random.Generator) -> bytes:
    frames = rng.integers(0, 1 << 22, PAGE_SIZE // 8, dtype=np.uint64)
    return (frames << np.uint64(12) | np.uint64(0x8000_8000_0000_0063)).tobytes()


def doubles(rng: np.random.Generator) -> bytes:
    return rng.random(PAGE_SIZE // 8).tobytes()[: PAGE_SIZE // 2] + bytes(PAGE_SIZE)


@pytest.mark.parametrize("make", [made_up_code, pointers, page_table, doubles])
def test_code_and_tables_are_never_called_encrypted(
    make: Callable[[np.random.Generator], bytes],
) -> None:
    for seed in range(500):
        page = as_pages(make(np.random.default_rng(seed)))
        assert classify(page)[0] == PageClass.PLAIN


def test_english_text_is_never_called_encrypted() -> None:
    pages = as_pages(TEXT)
    assert len(pages) > 100
    assert (classify(pages) == PageClass.PLAIN).all()


def test_real_machine_code_is_never_called_encrypted() -> None:
    pages = as_pages(machine_code())
    assert len(pages) > 100
    assert not (classify(pages) == PageClass.ENCRYPTED).any()


def test_zero_pages_are_zero_and_one_byte_makes_them_plain() -> None:
    pages = np.zeros((3, PAGE_SIZE), np.uint8)
    pages[1, 4095] = 1
    assert classify(pages).tolist() == [
        PageClass.ZERO,
        PageClass.PLAIN,
        PageClass.ZERO,
    ]


def test_a_page_too_even_for_chance_is_plain() -> None:
    rng = np.random.default_rng(2)
    permutations = [rng.permutation(256).astype(np.uint8) for _ in range(16)]
    assert classify(np.concatenate(permutations)[None])[0] == PageClass.PLAIN


def test_half_a_page_of_even_tables_does_not_hide_half_a_page_of_text() -> None:
    # In the sum of both the entropy can be that of ciphertext.
    rng = np.random.default_rng(3)
    for length in range(512, 3072, 64):
        tables = [rng.permutation(256).astype(np.uint8) for _ in range(16)]
        page = np.concatenate(tables)
        page[-length:] = np.frombuffer(TEXT[:length], np.uint8)
        assert classify(page[None])[0] == PageClass.PLAIN


def test_one_line_of_zeros_in_ciphertext_makes_a_page_plain() -> None:
    pages = encrypted(np.zeros((200, PAGE_SIZE), np.uint8), seed=1)
    pages[:, 640:704] = 0
    assert (classify(pages) == PageClass.PLAIN).all()


def test_compressed_data_cannot_be_told_from_ciphertext() -> None:
    packed = as_pages(lzma.compress(TEXT))[1:]
    assert (classify(packed) == PageClass.ENCRYPTED).mean() > 0.9


def test_any_number_of_pages_can_be_classified() -> None:
    empty: npt.NDArray[np.uint8] = np.empty((0, PAGE_SIZE), np.uint8)
    assert classify(empty).shape == (0,)


def test_speed_of_classifying_ciphertext(benchmark: BenchmarkFixture) -> None:
    pages = encrypted(np.zeros((2048, PAGE_SIZE), np.uint8), seed=1)
    benchmark(classify, pages)
