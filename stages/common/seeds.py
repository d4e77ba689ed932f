"""Seeds and random numbers that depend on what is drawn, never on where or in which batch it is drawn."""

from __future__ import annotations

import hashlib

import numpy as np


def hash_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text (63, so that it fits a signed Parquet column)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def candidate_seed(run_seed: int, prompt_id: str, round_: int, index: int) -> int:
    return hash_seed("candidate", run_seed, prompt_id, round_, index)


def uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """`float64 [len(seeds), count]` in [0, 1): row i depends on seeds[i] alone (Philox, a counter-based generator)."""
    return np.stack([np.random.Generator(np.random.Philox(int(seed))).random(count) for seed in seeds])
