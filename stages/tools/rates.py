"""Shares, differences of shares and areas under ROC curves, each with a 95 % interval whose width is never zero.

Several images belong to one prompt and resemble each other, so an interval that took them for independent would be too
narrow. All functions therefore take the prompt of each image, as an array of any kind of label. How much images of one prompt
resemble each other can only be learned from many prompts. With fewer than FEW, each prompt counts as one image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stages.tools.intervals import FEW, Z, exact_interval, wilson


@dataclass(frozen=True)
class Rate:
    """An estimate from n images or prompts with its 95 % interval. The value is None if there are none.

    numerator: the sum of what was counted, where the value is a share or a mean.
    """

    value: float | None
    n: int
    numerator: float | None = None
    low: float | None = None
    high: float | None = None


def share(hits: np.ndarray, prompts: np.ndarray) -> Rate:
    """Return the share of true values in `hits`, bool `[n]`.

    Below FEW prompts the interval is Clopper and Pearson's, with prompts as its trials. Otherwise it is Wilson's, for the
    effective number of images: the number of independent images that would make the share as certain as these do (see
    `effective_count`).
    """
    n, numerator, trials = len(hits), int(hits.sum()), len(np.unique(prompts))
    if not n:
        return Rate(None, 0, 0)
    if trials < FEW:
        low, high = exact_interval(numerator * trials / n, trials)
    else:
        low, high = wilson(numerator / n, effective_count(hits, prompts))
    return Rate(numerator / n, n, numerator, low, high)


def effective_count(hits: np.ndarray, prompts: np.ndarray) -> float:
    """Return the number of images divided by the design effect, which is at least 1.

    The design effect is the variance of the share with prompts as clusters, divided by that of independent images. If all
    values are equal, their correlation is unknown, and each prompt counts as one image.
    """
    n, value = len(hits), float(hits.mean())
    if value in (0, 1):
        return len(np.unique(prompts))
    variance = clustered_variance((hits - value) / n, prompts)
    return n / max(1.0, variance / (value * (1 - value) / n))


def clustered_variance(influence: np.ndarray, prompts: np.ndarray) -> float:
    """Return the variance of an estimate from the influence of each image on it, `[n]`. Influences sum to zero."""
    _, places = np.unique(prompts, return_inverse=True)
    totals = np.bincount(places, influence)
    return float((totals**2).sum() * len(totals) / max(1, len(totals) - 1))


def difference(hits: np.ndarray, above: np.ndarray, prompts: np.ndarray, strata: np.ndarray) -> Rate:
    """Return the share of hits among images above a threshold minus that among the others, compared within strata.

    hits, above: bool `[n]`. strata: the stratum of each image. A stratum with images on one side only tells nothing and is left
    out. The weights are those of Mantel and Haenszel, proportional to a b / (a + b) for a images above and b below.

    The variance is that of prompts as clusters, but at least that of independent images with one hit and one miss added to each
    side of each stratum (Agresti and Caffo). A difference without any variation therefore has an interval too. Below FEW
    prompts, these independent images are as many as there are prompts on that side.
    """
    few = len(np.unique(prompts)) < FEW
    influence, used = np.zeros(len(hits)), np.zeros(len(hits), bool)
    total = value = independent = 0.0
    for stratum in np.unique(strata):
        sides = [(strata == stratum) & (above == side) for side in (True, False)]
        counts = [int(side.sum()) for side in sides]
        if not all(counts):
            continue
        weight = counts[0] * counts[1] / sum(counts)
        shares = [hits[side].mean() for side in sides]
        value += weight * (shares[0] - shares[1])
        total += weight
        for side, count, part, sign in zip(sides, counts, shares, (1, -1), strict=True):
            influence[side] = sign * weight * (hits[side] - part) / count
            used |= side
            trials = len(np.unique(prompts[side])) if few else count
            shrunk = (part * trials + 1) / (trials + 2)
            independent += weight**2 * shrunk * (1 - shrunk) / (trials + 2)
    if not total:
        return Rate(None, 0)
    variance = max(clustered_variance(influence[used], prompts[used]), independent) / total**2
    value, half = float(value / total), Z * math.sqrt(variance)
    return Rate(value, int(used.sum()), None, max(-1.0, value - half), min(1.0, value + half))


def auc(values: np.ndarray, right: np.ndarray, prompts: np.ndarray, strata: np.ndarray) -> Rate:
    """Return the area under the ROC curve: how often a right image has a higher value than a wrong one. A tie counts as half.

    right: bool `[n]`. strata: a wrong image is compared with the right images of its stratum, and wrong images weigh the same.
    Strata without a right or without a wrong image are left out.

    The interval has the variance of prompts as clusters (Obuchowski). If the right or the wrong images are of fewer than FEW
    prompts, or if there is no variation, it is Clopper and Pearson's. The smaller of these numbers of prompts is its trials.
    """
    influence, used = np.zeros(len(values)), np.zeros(len(values), bool)
    members = {}
    for stratum in np.unique(strata):
        sides = (strata == stratum) & right, (strata == stratum) & ~right
        if sides[0].any() and sides[1].any():
            members[stratum] = sides
    n_wrong = int(sum(wrong.sum() for _, wrong in members.values()))
    if not n_wrong:
        return Rate(None, 0)
    value = 0.0
    for good, bad in members.values():
        beaten, lost = placements(values[good], values[bad])
        weight = bad.sum() / n_wrong
        value += weight * float(beaten.mean())
        influence[good] = weight * (beaten - beaten.mean()) / good.sum()
        influence[bad] = weight * (lost - lost.mean()) / bad.sum()
        used |= good | bad
    n = int(used.sum())
    variance = clustered_variance(influence[used], prompts[used])
    pairs = min(len(np.unique(prompts[used & side])) for side in (right, ~right))
    if pairs < FEW or variance < 1e-12:
        concordant = round(value * pairs, 6)
        low, high = exact_interval(math.floor(concordant), pairs)[0], exact_interval(math.ceil(concordant), pairs)[1]
    else:
        half = Z * math.sqrt(variance)
        low, high = max(0.0, value - half), min(1.0, value + half)
    return Rate(float(value), n, None, float(low), float(high))


def placements(right: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each right value the share of wrong values below it, and for each wrong value that of right values above it.

    A tie counts as half.
    """

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        ordered = np.sort(others)
        return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(others))

    return below(right, wrong), 1 - below(wrong, right)
