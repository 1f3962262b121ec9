"""Unpredictable numbers: one secret key a run, an independent stream for each purpose and step, and Poisson sampling.

A stream is AES-256 in counter mode under a key derived by BLAKE2b from (master key, purpose, step).  The same step
always gets the same stream, so a run that was killed repeats a step *exactly* instead of drawing fresh noise for the
same data (which would let an average of the attempts cancel the noise), and nothing but the step number has to be
saved.  Whoever learns the master key can subtract the noise: it stays in the private half of the run and is never
released or logged.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dpsyngen.errors import RunError, require
from dpsyngen.files import write_text

Purpose = Literal["sampling", "noise", "moments", "augmentation", "tag"]
_KEY_BYTES = 32
_BLOCK_WORDS = 2**16  # half a megabyte: stays in a core's cache


@dataclass(frozen=True)
class Randomness:
    """All random numbers of a private training run.

    Attributes:
        insecure_seed: None when the key came from the operating system; otherwise the seed that anyone can repeat,
            which voids the guarantee: such a run is stamped NOT PRIVATE.
    """

    _key: bytes = field(repr=False)
    insecure_seed: int | None = None

    @classmethod
    def from_system(cls) -> Randomness:
        """A fresh key from the operating system's entropy."""
        return cls(os.urandom(_KEY_BYTES))

    @classmethod
    def from_insecure_seed(cls, seed: int) -> Randomness:
        """A reproducible key, for tests and benchmarks only."""
        return cls(hashlib.blake2b(f"dpsyngen insecure seed {seed}".encode(), digest_size=_KEY_BYTES).digest(), seed)

    @property
    def secure(self) -> bool:
        """Whether the key is unpredictable."""
        return self.insecure_seed is None

    def _stream_key(self, purpose: Purpose, step: int, part: int) -> bytes:
        message = f"{purpose}/{step}/{part}".encode()
        return hashlib.blake2b(message, key=self._key, digest_size=_KEY_BYTES).digest()

    def words(self, purpose: Purpose, step: int, count: int, part: int = 0) -> NDArray[np.uint64]:
        """`count` independent uniform 64-bit words, the same ones for the same (purpose, step, part)."""
        return next(self.word_blocks(purpose, step, count, part, block=count), np.zeros(0, dtype=np.uint64))

    def word_blocks(
        self, purpose: Purpose, step: int, count: int, part: int = 0, block: int = _BLOCK_WORDS
    ) -> Iterator[NDArray[np.uint64]]:
        """The same words as :meth:`words`, at most `block` of them at a time."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        cipher = Cipher(algorithms.AES(self._stream_key(purpose, step, part)), modes.CTR(bytes(16))).encryptor()
        zeros = bytes(8 * min(block, count))
        for start in range(0, count, max(block, 1)):
            stream = cipher.update(zeros[: 8 * (count - start)])  # the key stream, xor-ed with zeros
            yield np.frombuffer(stream, dtype="<u8").astype(np.uint64, copy=False)

    def seed(self, purpose: Purpose, step: int, part: int = 0) -> int:
        """A 63-bit seed for a fast generator, for randomness that the guarantee does not rest on."""
        return int.from_bytes(self._stream_key(purpose, step, part)[:8], "little") >> 1

    def tag(self, text: str | bytes) -> str:
        """A keyed digest of `text`, 64 hexadecimal digits: equal for equal texts, useless to anyone without the key."""
        content = text.encode() if isinstance(text, str) else text
        return hashlib.blake2b(content, key=self._stream_key("tag", 0, 0), digest_size=32).hexdigest()

    def key_forms(self) -> tuple[bytes, bytes]:
        """The key in bytes and in hexadecimal digits, to search for it in what is about to be published."""
        return self._key, self._key.hex().encode()

    # ------------------------------------------------------------------------------------------- storage

    def save(self, path: Path) -> None:
        """Write the key to `path`, whole, readable by its owner only; FileExistsError if there is one already."""
        if path.exists() or path.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        write_text(path, json.dumps({"key": self._key.hex(), "insecure_seed": self.insecure_seed}), 0o600)

    @classmethod
    def load(cls, path: Path) -> Randomness:
        """Read what :meth:`save` wrote.  Raises :class:`RunError` if it is missing or damaged."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            key, seed = bytes.fromhex(stored["key"]), stored["insecure_seed"]
            if len(key) != _KEY_BYTES:
                raise ValueError("wrong key length")
            if seed is not None and (type(seed) is not int or cls.from_insecure_seed(seed)._key != key):
                raise ValueError("the key is not that of its seed")
            return cls(key, seed)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(
                f"the run's random state ({path.name}) cannot be read: {error}.  Without it the run cannot be "
                "continued privately (noise might be repeated): start a new run in another folder."
            ) from None


def poisson_sample(randomness: Randomness, step: int, records: int, sampling_rate: float) -> NDArray[np.int64]:
    """Indices of the records that step `step` uses, ascending.

    Formal guarantee: record i is included exactly when its own 64-bit word of the step's stream is below
    floor(sampling_rate * 2^64), so the inclusions are independent of each other, of the steps and of the data, each
    with a probability of at most `sampling_rate`, q in (0, 1].  `records` is the number of records present, which may
    differ from the declared number that fixed the rate.
    """
    require(0 < sampling_rate <= 1, "sampling_rate", sampling_rate, "in (0, 1]")
    if sampling_rate == 1:
        return np.arange(records, dtype=np.int64)
    # Rounded down, so that the probability is never above the one that is accounted for.
    threshold = np.uint64(int(sampling_rate * 2**64))
    chosen, start = [np.zeros(0, dtype=np.int64)], 0
    # In blocks: memory is that of the chosen indices, however many records there are.
    for words in randomness.word_blocks("sampling", step, records):
        chosen.append(np.flatnonzero(words < threshold) + start)
        start += len(words)
    return np.concatenate(chosen)
