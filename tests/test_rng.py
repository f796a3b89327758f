"""Bits, distributions and replay of the secure generator, and an attack on torch's."""

import copy
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from lowrank_dp.mechanism import GaussianMechanism
from lowrank_dp.rng import SecureRandom, os_seeded_generator, seed_globally, uniform
from lowrank_dp.train import TrainConfig
from lowrank_dp.train.claims import source_of_noise

# --- the generator ------------------------------------------------------------------------------


KEY = b"sixteen bytes ok"


def at(key, position):
    """Generator of ``key`` after ``position`` words, made from its documented state."""
    return SecureRandom.from_state(
        torch.tensor([*key, *position.to_bytes(16, "little")], dtype=torch.uint8)
    )


def keystream(key, position, size):
    """Words from blocks of the counter, each of which is encrypted separately."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    halves = [(i // 2, i % 2 * 8) for i in range(position, position + size)]
    blocks = {block: cipher.update(block.to_bytes(16, "big")) for block, _ in halves}
    return [int.from_bytes(blocks[block][byte : byte + 8], "little") for block, byte in halves]


def test_bits_are_those_of_aes_128():
    """FIPS-197, appendix C.1, and SP 800-38A, appendix F.1.1, blocks 1 and 3."""
    other = "2b7e151628aed2a6abf7158809cf4f3c"
    for key, block, cipher in (
        (
            "000102030405060708090a0b0c0d0e0f",
            "00112233445566778899aabbccddeeff",
            "69c4e0d86a7b0430d8cdb78070b4c55a",
        ),
        (other, "6bc1bee22e409f96e93d7e117393172a", "3ad77bb40d7a3660a89ecaf32466ef97"),
        (other, "30c81c46a35ce411e5fbc1191a0a52ef", "43b1cd7f598ece23881b00e3ed030688"),
    ):
        secure = at(bytes.fromhex(key), 2 * int(block, 16))
        assert secure.words(2).astype("<u8").tobytes().hex() == cipher


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.integers(0, 2**127),
        *(st.integers(2**n - 9, 2**n + 9) for n in (33, 34, 64, 65, 66, 97, 127)),
    ),
    st.lists(st.integers(0, 9), max_size=5),
)
def test_any_position_gives_the_blocks_of_the_counter(position, sizes):
    """The counter carries at 32, 64 and 96 bits; draws begin and end within a block."""
    secure = at(KEY, position)
    for size in sizes:
        assert secure.words(size).tolist() == keystream(KEY, position, size)
        position += size
        assert secure.state().tolist() == [*KEY, *position.to_bytes(16, "little")]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 70_000), st.integers(0, 70_000))
def test_words_from_a_position_are_those_of_one_long_draw(start, size):
    long = SecureRandom(KEY).words(140_000)
    assert long.dtype == np.uint64
    np.testing.assert_array_equal(at(KEY, start).words(size), long[start : start + size])


def test_words_that_were_lost_or_drawn_by_another_thread_never_come_again():
    """If the position fell behind the drawn words, the same words would be noise of another sum."""

    class Interrupted:
        def update_into(self, *arguments):
            raise KeyboardInterrupt

    secure = SecureRandom(KEY)
    secure._cipher = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        secure.words(7)
    assert torch.equal(secure.state(), at(KEY, 7).state())
    assert secure.words(5).tolist() == at(KEY, 7).words(5).tolist()  # a replay draws the same words
    secure, size, calls = SecureRandom(KEY), 70_001, 40  # more words than one encryption call gives
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            drawn = {words.tobytes() for words in threads.map(secure.words, [size] * calls)}
    finally:
        sys.setswitchinterval(before)
    assert torch.equal(secure.state(), at(KEY, calls * size).state())
    whole = SecureRandom(KEY).words(calls * size).reshape(calls, size)
    assert drawn == {words.tobytes() for words in whole}


def test_draws_follow_their_laws():
    secure = SecureRandom(KEY)
    numbers, normal = secure.uniform(200_000).numpy(), secure.normal(200_000, 3.0).numpy() / 3
    assert 0 < numbers.min() and numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(normal[:-1], normal[1:])[0, 1]) < 5 / math.sqrt(200_000)
    assert SecureRandom().normal(0).shape == SecureRandom().uniform(0).shape == (0,)
    words = SecureRandom(KEY).words(100_000).view(np.int64)
    np.testing.assert_allclose(
        SecureRandom(KEY).normal(100_000, 3.0).numpy(),
        3 * math.sqrt(2) * special.erfinv(words / 2.0**63),
        rtol=1e-12,
    )


def test_tails_are_neither_cut_nor_coarse(monkeypatch):
    """Words near both ends give the values of mpmath's inverse normal distribution."""
    import mpmath

    ends = [2**63 - 1 - k for k in (0, 1, 5, 10**6, 2**42, 2**43, 2**44)]
    words = np.array([*ends, *(-1 - end for end in ends)], dtype=np.int64)
    given = {14: words}
    monkeypatch.setattr(
        SecureRandom,
        "words",
        lambda self, size: (
            given[size].copy() if size in given else np.full(size, 2**63, dtype=np.uint64)
        ).view(np.uint64),
    )
    normal = SecureRandom(bytes(16)).normal(len(words)).numpy()
    assert np.array_equal(normal[:7], -normal[7:]) and np.isfinite(normal).all()
    for half, name in ((slice(7), "upper"), (slice(7, 14), "lower")):  # words of one tail alone
        given[7] = words[half]
        assert np.array_equal(SecureRandom(bytes(16)).normal(7).numpy(), normal[half]), name
    with mpmath.workdps(40):
        for end, found in zip(ends, normal, strict=False):
            tail = mpmath.mpf(2**63 - 1 - end + 0.5) / 2**64
            exact = mpmath.findroot(lambda z, p=tail: mpmath.log(mpmath.ncdf(-z) / p), found)
            assert found == pytest.approx(float(exact), rel=1e-9)
    assert normal[0] > 9 and len(set(normal)) == len(normal)


@pytest.mark.parametrize("byte", [0, 255])
def test_the_ends_of_a_draw_are_finite(byte, monkeypatch):
    monkeypatch.setattr(
        SecureRandom,
        "words",
        lambda self, size: np.frombuffer(bytearray([byte]) * (8 * size), dtype=np.uint64),
    )
    secure = SecureRandom()
    assert 0 < float(secure.uniform(1)) < 1 and abs(float(secure.normal(1))) < 10


def test_a_state_goes_on_where_it_was_exported():
    for drawn in (0, 1, 7, 8, 9, 1000, 32769):
        secure = SecureRandom()
        secure.words(drawn)
        again = SecureRandom.from_state(secure.state())
        assert torch.equal(again.state(), secure.state())
        assert torch.equal(secure.normal(40_000), again.normal(40_000))
        assert torch.equal(uniform(9, secure), uniform(9, again))
    far = torch.tensor([0] * 16 + [255] * 9 + [0] * 7, dtype=torch.uint8)  # past 2^64 counts
    secure = SecureRandom.from_state(far)
    assert torch.equal(secure.state(), far)
    secure.words(1)
    assert secure.state()[16:].tolist() == [0] * 9 + [1] + [0] * 6


def test_any_calls_after_a_state_are_those_of_the_uninterrupted_generator():
    rng = np.random.default_rng(0)
    whole, broken_off = SecureRandom(KEY), SecureRandom(KEY)
    for call in range(400):
        size, kind = int(rng.choice([0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 5000])), rng.integers(3)
        broken_off = SecureRandom.from_state(broken_off.state())
        drawn = [(g.words, g.uniform, g.normal)[kind](size) for g in (whole, broken_off)]
        assert np.array_equal(*map(np.asarray, drawn)), (call, size, kind)
        assert torch.equal(whole.state(), broken_off.state())


def test_shapes_and_types_of_released_sums():
    mechanism = GaussianMechanism(1.0, 1.0, 0.1)
    sums = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.zeros((), dtype=torch.float64),
        "bf16": torch.ones(3, 4, dtype=torch.bfloat16),
        "strided": torch.zeros(8, 6)[::2, ::3],
    }
    for generator in (SecureRandom(), torch.Generator().manual_seed(0)):
        noisy = mechanism.add_noise(sums, generator)
        assert {name: total.shape for name, total in noisy.items()} == {
            name: total.shape for name, total in sums.items()
        }
        assert noisy["bf16"].dtype == torch.float32 and noisy["scalar"].dtype == torch.float64
        assert float(noisy["scalar"]) != 0
    assert torch.equal(GaussianMechanism(0.0, 1.0, 0.1).add_noise(sums)["bf16"], torch.ones(3, 4))


def test_keys_come_from_the_operating_system_and_no_two_are_alike(monkeypatch):
    draws = {float(SecureRandom().uniform(1)) for _ in range(20)}
    assert len(draws) == 20
    monkeypatch.setattr(os, "urandom", lambda size: bytes(range(size)))
    assert SecureRandom().state()[:16].tolist() == list(range(16))


def test_no_two_generators_share_a_sequence():
    """Copies, pickles and forked processes are refused."""
    secure = SecureRandom()
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            attempt(secure)
    child = os.fork()
    if child == 0:
        try:
            secure.words(1)
        except ValueError as error:
            os._exit(7 if "made by another process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for key in (b"short", "sixteen bytes ok", 5):
        with pytest.raises(ValueError, match=r"^key must be 16 bytes"):
            SecureRandom(key)
    for state in (torch.zeros(31, dtype=torch.uint8), torch.zeros(32), torch.zeros(5056).byte()):
        with pytest.raises(ValueError, match=r"^state must be 32 bytes"):
            SecureRandom.from_state(state)


def test_every_bit_of_a_key_counts_for_the_global_generator():
    """``torch.manual_seed`` keeps 32 bits of a seed, and all of them could be tried."""
    keys = [bytes(32), bytes(31) + b"\x01", b"\x01" + bytes(31), bytes(32)]
    with torch.random.fork_rng(devices=[]):
        draws = []
        for key in keys:
            seed_globally(key)
            draws.append(torch.nn.functional.dropout(torch.ones(100)))
    assert torch.equal(draws[0], draws[3])
    assert len({tuple(drawn.tolist()) for drawn in draws}) == 3


def test_noise_in_parts_is_the_noise_of_the_whole_law_and_on_a_fixed_grid():
    mechanism = GaussianMechanism(0.6, 2.5, 0.1)  # noise_std 1.5: a grid of 2^-24
    for dtype in (torch.float32, torch.float64):
        sums = {"a": torch.full((300, 200), 4.1, dtype=dtype), "b": torch.zeros((), dtype=dtype)}
        noisy = mechanism.add_noise(sums, SecureRandom(KEY))
        assert noisy["a"].dtype == dtype and noisy["b"].shape == ()
        noise = (noisy["a"] - 4.1).double().flatten().numpy()
        assert stats.kstest(noise / 1.5, "norm").pvalue > 1e-3
        steps = noisy["a"].double() * 2.0**24
        assert torch.equal(steps, steps.round())
        assert float((sums["a"] - 4.1).abs().max()) < 1e-6
        turned = {"a": torch.full((200, 300), 4.1, dtype=dtype).mT}  # not contiguous
        again = mechanism.add_noise(turned, SecureRandom(KEY))
        assert torch.equal(again["a"], noisy["a"])
    tiny = GaussianMechanism(1e-20, 2e-10, 0.1).add_noise({"a": torch.zeros(1000)}, SecureRandom())
    assert float(tiny["a"].std()) == pytest.approx(2e-30, rel=0.2)


def test_a_release_is_the_sum_and_the_noise_in_float64_rounded_to_the_grid_and_then_once():
    mechanism = GaussianMechanism(0.7, 2.0, 0.1)  # noise_std 1.4: a grid of 2^-24
    noise = SecureRandom(KEY).normal(3000, 1.4).tolist()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        total = (torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
        noisy = mechanism.add_noise({"a": total}, SecureRandom(KEY))["a"]
        exact = [
            round((drawn + entry) * 2**24) / 2**24
            for drawn, entry in zip(noise, total.tolist(), strict=True)
        ]
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(noisy, torch.tensor(exact, dtype=torch.float64).to(kept))


def test_statements_say_where_noise_comes_from():
    def said(**changes):
        return source_of_noise(replace(TrainConfig(noise_multiplier=1.0), **changes))

    assert said() == said(secure_rng=True) and "AES-128-CTR" in said()
    assert "not secret" in said(seed=3) and "AES" not in said(seed=3)
    assert "Philox" in said(device="cuda") and "not cryptographic" in said(device="cuda")
    assert said(device="cuda:1", secure_rng=True) == said()


# --- the attack ---------------------------------------------------------------------------------
# A torch generator's outputs are linear in its state over GF(2), so known outputs reveal the state.
# The attacker knows 24 bits of each output, as torch.rand shows, and solves for 8 bits per word.

WORDS, MIDDLE, KNOWN, HIDDEN = 624, 397, 24, 8
EXTRA = 700  # outputs after the first 624, which give more equations than unknowns


def untempered(y):
    y ^= y >> 18
    y ^= y << 15 & 0xEFC60000
    x = y
    for _ in range(5):
        x = y ^ (x << 7 & 0x9D2C5680)
    y = x
    for _ in range(3):
        x = y ^ x >> 11
    return x


def right(rows, count):
    return np.concatenate([rows[count:], np.zeros_like(rows[:count])])


def left(rows, count, mask):
    kept = np.array([mask >> i & 1 for i in range(32)], dtype=np.uint64)[:, None]
    return np.concatenate([np.zeros_like(rows[:count]), rows[:-count]]) * kept


def tempered(rows):
    """Output bits as coefficients over GF(2): 32 rows of unknowns, with the constant last."""
    rows = rows ^ right(rows, 11)
    rows = rows ^ left(rows, 7, 0x9D2C5680)
    rows = rows ^ left(rows, 15, 0xEFC60000)
    return rows ^ right(rows, 18)


def following(first, second, middle):
    """Next word of the Mersenne Twister, from the words k, k + 1 and k + 397."""
    mixed = np.concatenate([second[:31], first[31:]])
    odd = np.array([0x9908B0DF >> i & 1 for i in range(32)], dtype=np.uint64)[:, None] * mixed[:1]
    return middle ^ right(mixed, 1) ^ odd


def recovered_state(outputs):
    """Find the 624 words whose outputs have the known 24 low bits; None if there are none."""
    unknowns = HIDDEN * WORDS
    columns = unknowns // 64 + 1  # the constant is the last bit
    inverse = np.array(
        [[untempered(1 << j) >> i & 1 for j in range(32)] for i in range(32)], dtype=bool
    )
    words = []
    for k in range(WORDS):
        bits = np.zeros((32, columns), dtype=np.uint64)
        for j in range(32):
            if j < KNOWN:
                bits[j, -1] = int(outputs[k]) >> j & 1
            else:
                place = HIDDEN * k + j - KNOWN
                bits[j, place // 64] = 1 << place % 64
        words.append(np.stack([np.bitwise_xor.reduce(bits[row], axis=0) for row in inverse]))
    equations = []
    for k in range(EXTRA):
        words.append(following(words[k], words[k + 1], words[k + MIDDLE]))
        bits = tempered(words[-1])[:KNOWN]
        bits[:, -1] ^= np.array(
            [int(outputs[WORDS + k]) >> j & 1 for j in range(KNOWN)], dtype=np.uint64
        )
        equations.append(bits)
    solution = solved(np.concatenate(equations), unknowns)
    if solution is None:
        return None
    return np.array(
        [
            sum(
                (int(np.bitwise_count(row[:-1] & solution).sum() + row[-1]) & 1) << i
                for i, row in enumerate(word)
            )
            for word in words[:WORDS]
        ],
        dtype=np.uint32,
    )


def solved(rows, unknowns):
    """Find the unknowns that make every row 0, as packed bits; None if there is no solution."""
    rank, pivots = 0, []
    for place in range(unknowns):
        column, bit = place // 64, np.uint64(place % 64)
        has = np.flatnonzero(rows[rank:, column] >> bit & np.uint64(1)) + rank
        if not len(has):
            continue
        rows[[rank, has[0]]] = rows[[has[0], rank]]
        rows[has[1:], column:] ^= rows[rank, column:]
        pivots.append(place)
        rank += 1
    if rows[rank:, -1].any():
        return None
    solution = np.zeros(rows.shape[1] - 1, dtype=np.uint64)
    for row, place in zip(rows[:rank][::-1], pivots[::-1], strict=True):
        value = int(np.bitwise_count(row[:-1] & solution).sum() + row[-1]) & 1
        solution[place // 64] |= np.uint64(value << place % 64)
    return solution


def test_a_twister_can_be_predicted_from_its_draws_and_the_secure_generator_not():
    """From a twister's earlier draws, an attacker computes the noise of the next release."""
    mechanism = GaussianMechanism(1.0, 1.0, 0.1)
    generator = os_seeded_generator()
    shown = (torch.rand(WORDS + EXTRA, generator=generator) * 2**KNOWN).long()
    state = recovered_state(shown.numpy())
    assert state is not None
    secret = mechanism.add_noise({"w": torch.zeros(40, 50)}, generator)["w"]
    attacker = torch.Generator().manual_seed(0)
    whole = attacker.get_state()
    whole[24 : 24 + 8 * WORDS].view(torch.int64).copy_(torch.from_numpy(state.astype(np.int64)))
    attacker.set_state(whole)
    assert torch.equal((torch.rand(EXTRA, generator=attacker) * 2**KNOWN).long(), shown[WORDS:])
    assert torch.equal(torch.randn(40, 50, generator=attacker), secret)

    secure = SecureRandom()
    assert recovered_state(secure.words(WORDS + EXTRA) & np.uint64(2**KNOWN - 1)) is None
