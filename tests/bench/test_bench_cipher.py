"""How fast bytes pass the AES engine, against bare AES-128-ECB of `cryptography`."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB

from cbit.hw.cipher import PROFILES, MemoryCipher, Tweaks
from cbit.hw.machine import Machine

from .conftest import Ratios
from .pages import C_BASE, PLAIN_BASE, machine_with_pages

SIZE = 64 << 20
PAGES = SIZE // 4096


def bare_ecb(plain: np.ndarray[Any, Any]) -> Callable[[], object]:
    encryptor = Cipher(AES(bytes(16)), ECB()).encryptor()
    data = plain.reshape(-1).data
    out = np.empty(SIZE + 16, np.uint8)
    return lambda: encryptor.update_into(data, out.data)


@pytest.fixture(scope="module")
def plain() -> np.ndarray[Any, Any]:
    return np.frombuffer(os.urandom(SIZE), np.uint8).reshape(-1, 4096)


@pytest.mark.parametrize("order", ["ascending", "scattered"])
@pytest.mark.parametrize("mode", ["zen1-xe", "random"])
def test_cipher_of_scattered_pages(
    benchmark: Any, ratios: Ratios, plain: np.ndarray[Any, Any], mode: str, order: str
) -> None:
    profile = next(p for p in PROFILES if p.name == mode)
    tweaks = Tweaks(profile.constants(os.urandom))
    engine = MemoryCipher(bytes(16), tweaks, profile.whitens_output)
    pages, source = np.arange(PAGES), plain
    if order == "scattered":
        # 64 MiB of pages out of 256, in no order.
        pages = np.random.default_rng(1).choice(4 * PAGES, PAGES, replace=False)
        source = np.tile(plain, (4, 1))
    out = np.zeros_like(source)

    def work() -> None:
        engine.encrypt_units(pages, source, out)

    benchmark.pedantic(work, rounds=3)
    engine_time, ecb_time = ratios.times(work, bare_ecb(plain))
    what = f"cipher, 64 MiB, {order} pages, {mode}: speed / bare ECB"
    assert ratios.note(what, ecb_time / engine_time, ">= 0.35") >= 0.35


def test_copy_from_plain_to_encrypted_with_the_ciphertext_in_dram(
    benchmark: Any, ratios: Ratios, plain: np.ndarray[Any, Any]
) -> None:
    machine = machine_with_pages(SIZE)
    cpu = machine.cpu
    cpu.store(PLAIN_BASE, plain.tobytes())

    def work() -> None:
        cpu.copy(C_BASE, PLAIN_BASE, SIZE)
        machine.caches.drain()

    benchmark.pedantic(work, rounds=3)
    copy_time, ecb_time = ratios.times(work, bare_ecb(plain))
    what = "Cpu.copy, 64 MiB, C=0 to C=1, and drain: speed / bare ECB"
    assert ratios.note(what, ecb_time / copy_time, ">= 0.25") >= 0.25


def test_vector_the_benchmark_enciphers_for_real() -> None:
    machine: Machine = machine_with_pages(1 << 21)
    machine.cpu.store(PLAIN_BASE, b"attack at dawn!!" * 256)
    machine.cpu.copy(C_BASE, PLAIN_BASE, 4096)
    machine.caches.drain()
    pa = machine.cpu.translate(C_BASE).pa
    assert b"attack" not in machine.snoop(pa, 4096)
    assert machine.cpu.load(C_BASE, 16) == b"attack at dawn!!"
