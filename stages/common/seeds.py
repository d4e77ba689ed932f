"""Seeds and random numbers that depend only on what is drawn, not on the machine or the batch."""

from __future__ import annotations

import hashlib

import numpy as np


def hash_seed(*parts: object) -> int:
    """Return a 63-bit seed from the text of the parts. It has 63 bits so that it fits a signed Parquet column."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def candidate_seed(run_seed: int, prompt_id: str, round_: int, index: int) -> int:
    """Return the seed from which one candidate is drawn."""
    return hash_seed("candidate", run_seed, prompt_id, round_, index)


def draw_seed(run_seed: int, chosen: str, rejected: str | None, epoch: int) -> int:
    """Return the seed of everything random in the loss of one training row in one epoch (a mask, a timestep, noise).

    It is a function of the pair and the epoch, so chosen and rejected, policy and reference model share their draws.
    """
    return hash_seed("training draw", run_seed, chosen, rejected, epoch)


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """Return float64 `[len(seeds), count]` in [0, 1). Row i depends only on seeds[i] (Philox, a counter-based generator)."""
    return np.stack([np.random.Generator(np.random.Philox(int(seed))).random(count) for seed in seeds])
