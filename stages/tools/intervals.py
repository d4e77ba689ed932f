"""Quantiles of the beta and of Student's t distribution, and the exact interval of a share.

These few lines stand in for scipy, which this project does not need otherwise.
"""

from __future__ import annotations

import math
from functools import cache


def beta_probability(x: float, a: float, b: float) -> float:
    """Return P(X <= x) for X of the beta distribution with a and b (the regularised incomplete beta function)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the continued fraction converges fast only below this
        return 1 - beta_probability(1 - x, b, a)
    factor = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # Lentz's method: numerator and denominator of successive approximants, kept as ratios.
    upper, lower = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = lower
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            lower = 1 / (1 + term * lower)
            upper = 1 + term / upper
            fraction *= upper * lower
        if abs(upper * lower - 1) < 1e-14:
            break
    return factor * fraction / a


@cache
def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return the x at which the beta distribution with a and b reaches a probability, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_probability(middle, a, b) < probability else (low, middle)
    return (low + high) / 2


def exact_interval(successes: float, trials: float, level: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a share. It covers the share at least as often as its level says.

    The trials are taken as independent. For grades between 0 and 1, whose sum need not be whole, it is conservative, because
    no grades with the same mean vary more than a yes and a no.
    """
    tail = (1 - level) / 2
    low = beta_quantile(tail, successes, trials - successes + 1) if successes > 0 else 0.0
    high = beta_quantile(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return low, high


@cache
def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t distribution for a probability above one half; the degrees may be fractions."""
    x = beta_quantile(2 * (1 - probability), freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)
