"""AES-128 over memory: every 16-byte block by itself, tweaked by its address.

    XE    c = AES(m ^ T(p))
    XEX   c = AES(m ^ T(p)) ^ T(p)

Work comes as whole pages or whole cache lines at any addresses. A batch of pages is
gathered into a buffer that stays in the core's L2 cache, XORed with its tweaks,
enciphered by one call of OpenSSL, XORed again and scattered. numpy and OpenSSL
release the interpreter lock, so two threads share a large job.

Source: [SVR] III-A (XE), III-B (XEX); AES: [FIPS197].
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, modes
from cryptography.hazmat.primitives.ciphers.algorithms import AES

from ..arrays import Bytes, Index, Words
from ..errors import CallerError
from ..types import CACHE_LINE_SIZE, PAGE_SIZE
from .tweak import BLOCK_SIZE, Tweaks

BATCH_BYTES = 64 * PAGE_SIZE
"""How much one thread enciphers at once: buffers and tweaks stay in its L2 cache."""

SHARED_BATCH_BYTES = 256 * PAGE_SIZE
"""The same for two threads: longer, as they meet at the interpreter lock in between."""

SHARED_JOB_BYTES = 4 * SHARED_BATCH_BYTES
"""Jobs from this size up are worth waking a second thread for."""

THREADS = min(2, os.cpu_count() or 1)


class _Workspace(threading.local):
    """Buffers and AES contexts of one thread."""

    def __init__(self, key: bytes) -> None:
        # One more block than the data: OpenSSL's EVP asks for it.
        self.output: Bytes = np.empty(SHARED_BATCH_BYTES + BLOCK_SIZE, np.uint8)
        self.input: Words = np.empty(SHARED_BATCH_BYTES // 8, np.uint64)
        self.tweaks: Words = np.empty(SHARED_BATCH_BYTES // 8, np.uint64)
        cipher = Cipher(AES(key), modes.ECB())
        self.encryptor: CipherContext = cipher.encryptor()
        self.decryptor: CipherContext = cipher.decryptor()


class CipherState(NamedTuple):
    """What makes an engine: the key, the constants by address bit from 4, XEX or XE."""

    key: bytes
    constants: tuple[bytes, ...]
    whitens_output: bool


class MemoryCipher:
    """One key and one tweak table: the engine as one key slot sees it.

    Args:
        key: 16 bytes.
        tweaks: the engine's constants, the same for every key.
        whitens_output: True for XEX, False for XE.
    """

    def __init__(self, key: bytes, tweaks: Tweaks, whitens_output: bool) -> None:
        if len(key) != 16:
            raise CallerError(f"key of {len(key)} bytes: 16 expected (AES-128)")
        self._key = key
        self._tweaks = tweaks
        # T of every offset in a batch, by unit size: one table as long as the batch
        # makes one long XOR of what would be many short ones.
        self._offsets: dict[int, Words] = {
            unit: np.tile(
                tweaks.of_offsets[: unit // BLOCK_SIZE].reshape(-1),
                SHARED_BATCH_BYTES // unit,
            )
            for unit in (PAGE_SIZE, CACHE_LINE_SIZE)
        }
        self._whitens_output = whitens_output
        self._workspace = _Workspace(key)

    @classmethod
    def from_state(cls, state: CipherState) -> MemoryCipher:
        """Return an engine that enciphers as the one whose `state` it was.

        Raises:
            CallerError: the key or a constant has not 16 bytes.
        """
        if {len(constant) for constant in state.constants} - {BLOCK_SIZE}:
            raise CallerError(f"tweak constants: {BLOCK_SIZE} bytes each expected")
        return cls(state.key, Tweaks(list(state.constants)), state.whitens_output)

    def state(self) -> CipherState:
        """Return key and constants, for a snapshot: secrets."""
        return CipherState(self._key, self._tweaks.constants, self._whitens_output)

    def encrypt(self, address: int, plaintext: bytes) -> bytes:
        """Encipher whole blocks as they would lie in DRAM at `address`.

        Args:
            address: physical, a multiple of 16, the C-bit taken out.
            plaintext: a multiple of 16 bytes.
        """
        return self._few_blocks(address, plaintext, encrypt=True)

    def decrypt(self, address: int, ciphertext: bytes) -> bytes:
        """Undo `encrypt`; a wrong key or address gives other bytes, never an error."""
        return self._few_blocks(address, ciphertext, encrypt=False)

    def encrypt_units(self, units: Index, source: Bytes, target: Bytes) -> None:
        """Encipher pages or lines of `source` into the same places of `target`.

        Args:
            units: numbers of pages or lines, each once; rows of both arrays.
            source: plaintext, shape (all pages, 4096) or (all lines, 64).
            target: ciphertext, same shape; may be `source`.
        """
        self._units(units, source, target, encrypt=True)

    def decrypt_units(self, units: Index, source: Bytes, target: Bytes) -> None:
        """Decipher pages or lines; arguments as `encrypt_units`."""
        self._units(units, source, target, encrypt=False)

    def _units(
        self, units: Index, source: Bytes, target: Bytes, *, encrypt: bool
    ) -> None:
        unit_size = source.shape[1]
        assert unit_size in (PAGE_SIZE, CACHE_LINE_SIZE)
        # Every block stands alone: in ascending order memory is met in stretches.
        units = np.sort(units)
        tweaks = self._tweaks.of_many(units.astype(np.uint64) * np.uint64(unit_size))
        shares = THREADS if units.size * unit_size >= SHARED_JOB_BYTES else 1
        per_batch = (BATCH_BYTES if shares == 1 else SHARED_BATCH_BYTES) // unit_size
        # Shares are whole batches, so that threads do not split one.
        share = -(-units.size // (shares * per_batch)) * per_batch

        def work(start: int) -> None:
            for i in range(start, min(start + share, units.size), per_batch):
                batch = slice(i, min(i + per_batch, start + share))
                self._batch(units[batch], tweaks[batch], source, target, encrypt)

        others: list[Future[None]] = [
            _second_thread().submit(work, n * share) for n in range(1, shares)
        ]
        work(0)
        for other in others:
            other.result()

    def _batch(
        self,
        units: Index,
        unit_tweaks: Words,
        source: Bytes,
        target: Bytes,
        encrypt: bool,
    ) -> None:
        space = self._workspace
        count, unit_size = units.size, source.shape[1]
        length = count * unit_size
        first = int(units[0])
        contiguous = int(units[-1]) - first == count - 1 and (
            count == 1 or bool((np.diff(units) == 1).all())
        )

        tweaks = space.tweaks[: length // 8]
        self._spread_tweaks(unit_tweaks, unit_size, tweaks)
        data = space.input[: length // 8]
        if contiguous:
            plain = source[first : first + count].reshape(-1).view(np.uint64)
            self._whiten_input(plain, tweaks, data, encrypt)
        else:
            # Whole units as single items: taken with one memcpy each.
            item = f"V{unit_size}"
            taken = data.view(item)
            np.take(source.view(item).reshape(-1), units, out=taken, mode="clip")
            self._whiten_input(data, tweaks, data, encrypt)

        context = space.encryptor if encrypt else space.decryptor
        output = space.output
        if contiguous:
            # Straight to where it belongs, so that the stores to memory overlap with
            # AES. OpenSSL wants room for one block more and leaves it untouched.
            rows = target[first : first + count + 1]
            if len(rows) > count and rows.flags.c_contiguous:
                output = rows.reshape(-1)[: length + BLOCK_SIZE]
        context.update_into(data.data.cast("B"), output.data)
        result = output[:length].view(np.uint64)
        if self._whitens_output or not encrypt:
            np.bitwise_xor(result, tweaks, out=result)
        if output is space.output:
            target[units] = result.view(np.uint8).reshape(count, unit_size)

    def _whiten_input(
        self, rows: Words, tweaks: Words, data: Words, encrypt: bool
    ) -> None:
        if encrypt or self._whitens_output:
            np.bitwise_xor(rows, tweaks, out=data)
        elif rows is not data:
            data[:] = rows

    def _spread_tweaks(self, unit_tweaks: Words, unit_size: int, out: Words) -> None:
        """Fill `out` with T of every block: T of its unit ^ T of its offset."""
        # 16-byte items copy fastest as complex numbers; their bits are not looked at.
        spread = out.view(np.complex128).reshape(-1, unit_size // BLOCK_SIZE)
        spread[...] = unit_tweaks.view(np.complex128)
        np.bitwise_xor(out, self._offsets[unit_size][: out.size], out=out)

    def _few_blocks(self, address: int, data: bytes, *, encrypt: bool) -> bytes:
        if address % BLOCK_SIZE or len(data) % BLOCK_SIZE:
            raise CallerError(
                f"{len(data)} bytes at {address:#x}: whole 16-byte blocks expected"
            )
        numbers = np.arange(len(data) // BLOCK_SIZE, dtype=np.uint64)
        blocks = np.uint64(address) + numbers * np.uint64(BLOCK_SIZE)
        tweaks = self._tweaks.of_many(blocks).tobytes()
        if encrypt or self._whitens_output:
            data = _xor(data, tweaks)
        space = self._workspace
        context = space.encryptor if encrypt else space.decryptor
        data = context.update(data)
        return _xor(data, tweaks) if self._whitens_output or not encrypt else data


def _xor(left: bytes, right: bytes) -> bytes:
    whole = int.from_bytes(left, "little") ^ int.from_bytes(right, "little")
    return whole.to_bytes(len(left), "little")


@cache
def _second_thread() -> ThreadPoolExecutor:
    """Return the pool, made at the first large job."""
    return ThreadPoolExecutor(max(1, THREADS - 1), "cbit-aes")
