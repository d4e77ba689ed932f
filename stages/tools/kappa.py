"""How far judges agree on images: the share of equal verdicts, Cohen's kappa and, for more than two, Fleiss'.

Kappa is (a - e) / (1 - e), where a is the share of images on which both judges agree and e is the share that they would agree
on by chance, if each gave its own shares of yes and no to images at random (Cohen 1960). It is 1 for judges that always agree
and 0 for chance, and it has no value where both give one and the same answer to every image.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stages.tools import metrics
from stages.tools.intervals import FEW
from stages.tools.rates import Rate, share

ROUNDS = 2000  # resamples of prompts


def kappa(counts: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa, float `[...]`, of counts `[..., 4]`: both yes, only the first, only the second, both no.

    It is NaN where chance alone explains full agreement, and where nothing was counted.
    """
    total = counts.sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        both, first, second, neither = np.moveaxis(counts / total[..., None], -1, 0)
        by_chance = (both + first) * (both + second) + (neither + first) * (neither + second)
        return np.where(by_chance < 1, (both + neither - by_chance) / (1 - by_chance), np.nan)


def fleiss(sums: np.ndarray) -> np.ndarray:
    """Return Fleiss' kappa (Fleiss 1971) of several judges, float `[...]`.

    sums: float `[..., 3]`, over images: the share of pairs of judges who agree, the share of judges who say yes, and 1. The
    result is NaN where all say the same of every image.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        observed, yes = np.moveaxis(sums[..., :2] / sums[..., 2:], -1, 0)
        chance = yes**2 + (1 - yes) ** 2
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def tallies(one: np.ndarray, other: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Return how often both judges said yes, only the first, only the second, and neither, by prompt: float `[prompts, 4]`."""
    _, places = np.unique(prompts, return_inverse=True)
    cells = 2 * (1 - one.astype(int)) + (1 - other.astype(int))
    found = np.zeros((places.max() + 1 if len(places) else 0, 4))
    np.add.at(found, (places, cells), 1)
    return found


def agree(one: np.ndarray, other: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[Rate, Rate]:
    """Return the share of images on which two judges agree, and their kappa.

    one, other: bool `[n]`, the verdicts on the same images. prompts: the prompt of each image. The interval of kappa is the
    percentile interval of resampled prompts. It is left out where images of fewer than FEW prompts were judged, because
    resampling a few prompts would promise too much, and if it has no width.
    """
    return share(one == other, prompts), resampled(kappa, tallies(one, other, prompts), len(one), seed)


def agree_all(votes: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[Rate, Rate]:
    """Return the share of images on which all judges agree, and Fleiss' kappa. votes: bool `[n, judges]`; else see `agree`."""
    judges, yes = votes.shape[1], votes.sum(1)
    agreeing = (yes * (yes - 1) + (judges - yes) * (judges - yes - 1)) / (judges * (judges - 1))
    _, places = np.unique(prompts, return_inverse=True)
    sums = np.zeros((places.max() + 1 if len(places) else 0, 3))
    np.add.at(sums, places, np.stack([agreeing, yes / judges, np.ones(len(votes))], 1))
    return share((yes == 0) | (yes == judges), prompts), resampled(fleiss, sums, len(votes), seed)


def resampled(measure: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, n: int, seed: int) -> Rate:
    """Return a measure of counts summed over prompts, `[prompts, k]`, with its interval over n images; see `agree`."""
    value = float(measure(counts.sum(0))) if n else float("nan")
    if np.isnan(value):
        return Rate(None, n)
    low = high = None
    if len(counts) >= FEW:
        picks = np.random.default_rng(seed).multinomial(len(counts), [1 / len(counts)] * len(counts), size=ROUNDS)
        low, high = metrics.interval(measure(picks @ counts))
        low, high = (None, None) if low == high else (low, high)
    return Rate(value, n, None, low, high)
