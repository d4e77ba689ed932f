"""95 % intervals of shares, and the quantiles from which intervals are made."""

from __future__ import annotations

import math
from functools import cache
from statistics import NormalDist

from scipy.special import betaincinv, stdtrit

FEW = 30  # with fewer images or prompts than this, intervals are exact instead of resampled or approximated
Z = NormalDist().inv_cdf(0.975)


@cache
def exact_interval(successes: float, trials: float) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share. It covers the share in at least 95 % of all cases.

    The trials are taken as independent. For grades between 0 and 1, whose sum need not be whole, it is conservative, because
    no grades with the same mean vary more than a yes and a no.
    """
    low = float(betaincinv(successes, trials - successes + 1, 0.025)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, trials - successes, 0.975)) if successes < trials else 1.0
    return low, high


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of so many independent trials, which need not be a whole number."""
    weight = Z**2 / trials
    middle, half = share + weight / 2, math.sqrt(weight * share * (1 - share) + weight**2 / 4)
    return max((middle - half) / (1 + weight), 0.0), min((middle + half) / (1 + weight), 1.0)


@cache
def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution; the degrees of freedom may be fractions."""
    return float(stdtrit(freedom, probability))
