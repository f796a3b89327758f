"""Time of noise from the cryptographic generator, compared with torch's, on one thread."""

from __future__ import annotations

import time

import torch

from lowrank_dp.mechanism import GaussianMechanism, SecureRandom, os_seeded_generator

MILLION = 10**6


def seconds(generator: object, size: int = 4 * MILLION, repeats: int = 7) -> float:
    """CPU seconds per million entries, the smallest of ``repeats`` runs."""
    mechanism, sums = GaussianMechanism(1.0, 1.0, 0.1), {"w": torch.zeros(size)}
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        mechanism.add_noise(sums, generator)
        best = min(best, time.process_time() - started)
    return best / (size / MILLION)


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain, secure = seconds(os_seeded_generator()), seconds(SecureRandom())
    print(
        f"noise for a million entries: torch {plain * 1e3:.1f} ms, secure {secure * 1e3:.1f} ms "
        f"({secure / plain:.2f} times), processor time of one core"
    )
