"""Random generators of a run's noise (AES-128 in counter mode), its samples and its seeds.

There are three sources; a run's privacy statement names the source that the run used:

- :class:`SecureRandom`, AES-128 in counter mode with a key from the operating system: the default
  on the CPU. No known attack tells its output from random bits without the key.
- torch's generators, started from the operating system's random bits
  (:func:`os_seeded_generator`): the default on CUDA.
- torch's generators, started from a user's seed: anyone who knows the seed can reproduce the draws.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
from threading import Lock
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri
from torch import Tensor

from lowrank_dp import _validate

KEY_BYTES = 16
_STATE_BYTES = KEY_BYTES + 16  # the key, and the number of words drawn so far
_ZEROS = memoryview(bytes(1 << 18))  # plaintext: encrypted zeros are the keystream itself
_TAIL = 2**63 - 2**43  # a normal number whose word is beyond +-_TAIL takes a second word
_TWISTER_WORDS = 624  # words in the state of the Mersenne Twister, torch's CPU generator


class SecureRandom:
    """Cryptographic random generator on the CPU, replayable with its key.

    The bits are AES-128 (FIPS 197) in counter mode (NIST SP 800-38A): block i is the encryption of
    i, a big-endian number of 128 bits, and gives two little-endian words of 64 bits. OpenSSL
    computes the blocks, through the ``cryptography`` package. OpenSSL uses the processor's AES
    instructions where the processor has them. Otherwise OpenSSL's software gives the same numbers,
    but may read tables in an order that another process on the same machine could time. The
    generator refuses to be copied, pickled, or used in a forked process, where two generators would
    draw the same numbers for different sums.

    Args:
        key: 16 bytes; None takes them from the operating system.

    Raises:
        ValueError: if the key has another type or length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(KEY_BYTES) if key is None else key
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            _validate.fail(
                "key",
                f"{KEY_BYTES} bytes",
                type(key).__name__ if not isinstance(key, bytes) else f"{len(key)} bytes",
            )
        self._start(key, 0)

    def _start(self, key: bytes, position: int) -> None:
        self._key, self._process, self._lock = key, os.getpid(), Lock()
        self._seek(position)

    def _seek(self, position: int) -> None:
        block, rest = divmod(position, 2)
        counter = modes.CTR(block.to_bytes(16, "big"))
        self._cipher = Cipher(algorithms.AES(self._key), counter).encryptor()
        self._cipher.update(bytes(8 * rest))
        self._position = position

    def state(self) -> Tensor:
        """Key and position, 32 bytes (uint8), for :meth:`from_state`. The state is SECRET."""
        return torch.frombuffer(
            bytearray(self._key + self._position.to_bytes(16, "little")), dtype=torch.uint8
        )

    @classmethod
    def from_state(cls, state: Tensor) -> SecureRandom:
        """Create a generator that continues from the result of :meth:`state`.

        Raises:
            ValueError: if ``state`` is not 32 bytes in a uint8 tensor.
        """
        if state.dtype != torch.uint8 or state.shape != (_STATE_BYTES,):
            _validate.fail(
                "state", f"{_STATE_BYTES} bytes (uint8)", f"{tuple(state.shape)} of {state.dtype}"
            )
        data = state.numpy().tobytes()
        generator = cls(data[:KEY_BYTES])
        generator._start(data[:KEY_BYTES], int.from_bytes(data[KEY_BYTES:], "little"))
        return generator

    def words(self, size: int) -> np.ndarray:
        """Draw ``size`` words of 64 random bits, (size,) uint64.

        Raises:
            ValueError: if ``size`` is no integer >= 0, or in a process other than the one that made
                the generator.
        """
        if os.getpid() != self._process:
            raise ValueError(
                "this SecureRandom was made by another process and would draw the "
                "same numbers in both processes: make a new one after a fork"
            )
        drawn = np.empty(_validate.integer("size", size, low=0), dtype="<u8")
        keystream = drawn.view(np.uint8).data
        with self._lock:
            self._position += drawn.size  # first, so that an interrupted draw is never repeated
            try:
                for start in range(0, len(keystream), len(_ZEROS)):
                    part = keystream[start : start + len(_ZEROS)]
                    self._cipher.update_into(_ZEROS[: len(part)], part)
            except BaseException:  # the cipher may have stopped anywhere before the position
                self._seek(self._position)
                raise
        return drawn.astype(np.uint64, copy=False)

    def uniform(self, size: int) -> Tensor:
        """Draw uniform numbers in (0, 1), (size,) float64: exact odd multiples of 2^-53."""
        return torch.from_numpy(((self.words(size) >> np.uint64(12)) + 0.5) * 2.0**-52)

    def normal(self, size: int, std: float = 1.0) -> Tensor:
        """Draw normal numbers of standard deviation ``std``, (size,) float64 on the CPU.

        A number is z = sqrt(2) erfinv(x) for a signed uniform number x of 64 bits. If |x| is within
        2^-20 of 1 (|z| > 4.9), float64 rounds x coarsely; z is then computed from 1 - |x|, which is
        extended by 52 bits of a second word. The tails are thus neither cut off nor coarse.
        """
        drawn = self.words(size).view(np.int64)
        in_tail = size > 0 and (drawn.max() >= _TAIL or drawn.min() < -_TAIL)  # cached
        normal = torch.from_numpy(drawn).double().mul_(2.0**-63).erfinv_().mul_(math.sqrt(2) * std)
        if in_tail:
            rare = np.flatnonzero((drawn >= _TAIL) | (drawn < -_TAIL))
            left = (2**63 - 1) - (drawn[rare] ^ (drawn[rare] >> 63))  # words up to the end
            tail = -ndtri((left + self.uniform(len(rare)).numpy()) * 2.0**-64) * std
            normal[torch.from_numpy(rare)] = torch.from_numpy(np.copysign(tail, drawn[rare]))
        return normal

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a SecureRandom can't be copied or pickled, since the copies would draw "
            "the same noise for different sums: use state() and from_state()"
        )


Generator = torch.Generator | SecureRandom


def uniform(size: int, generator: Generator) -> Tensor:
    """Draw uniform numbers in [0, 1), (size,) float64.

    The numbers lie on a grid of 2^-52 or finer, so ``uniform(...) < rate`` is true with
    probability ``rate``, to within the grid.
    """
    if isinstance(generator, SecureRandom):
        return generator.uniform(size)
    return torch.rand(size, generator=generator, dtype=torch.float64)


def state_of(generator: Generator) -> Tensor:
    """Return the state of a generator, as a tensor of bytes."""
    return generator.state() if isinstance(generator, SecureRandom) else generator.get_state()


def generator_at(generator: Generator, state: Tensor) -> Generator:
    """Return a generator of the same kind at a saved state; changes a torch generator in place."""
    if isinstance(generator, SecureRandom):
        return SecureRandom.from_state(state)
    return generator.set_state(state)


def os_seeded_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """Create a torch generator whose start comes from the operating system's random bits.

    The generator is not cryptographic. On the CPU the generator is a Mersenne Twister, whose whole
    state is drawn; some thousands of outputs reveal the state. On a GPU the generator is Philox
    4x32-10 with a key of 63 random bits.
    """
    return _keyed_generator(os.urandom(32), device)


def seed_globally(key: bytes, device: torch.device | str = "cpu") -> None:
    """Start torch's global generators of the CPU and of ``device`` from all bits of ``key``."""
    torch.set_rng_state(_keyed_generator(key).get_state())
    if torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(_keyed_generator(key, device).get_state(), device)


def _keyed_generator(key: bytes, device: torch.device | str = "cpu") -> torch.Generator:
    """Create a torch generator from a hash of ``key``.

    On the CPU the hash gives the whole state, because ``manual_seed`` would keep only 32 bits.
    """
    generator, bits = torch.Generator(device), hashlib.shake_256(key)
    if generator.device.type != "cpu":
        return generator.manual_seed(int.from_bytes(bits.digest(8), "little") >> 1)
    state = generator.manual_seed(0).get_state()
    words = state[24 : 24 + 8 * _TWISTER_WORDS].view(torch.int64)  # after the counters
    drawn = np.frombuffer(bits.digest(4 * _TWISTER_WORDS), dtype="<u4")
    words.copy_(torch.from_numpy(drawn.astype(np.int64)))
    return generator.set_state(state)


def derive_seed(seed: int | None, purpose: str) -> int:
    """Derive a seed of 63 bits for one purpose from ``seed``.

    With ``seed=None``, the bits come from the operating system.
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little") >> 1
    return random.Random(f"lowrank_dp {purpose} {seed}").getrandbits(63)
