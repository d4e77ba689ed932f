"""A forecast of what a training would get from a model: rows, precision, discard pool and gain, from an audit's images.

**Rows and pool.** In each category, a prompt has its own share of accepted images. These shares are taken to follow a beta
distribution, so the number of accepted images among N has a beta-binomial distribution with two parameters: the share of
accepted images, which the audit measures, and the intraclass correlation, which says how much images of one prompt resemble
each other. At correlation 0 all prompts of a category are alike, and with N = 10 hardly one stays in the pool; at 1 every
prompt is accepted always or never. With two images or more for each prompt the correlation is measured (analysis of variance,
pooled over categories). One image for each prompt cannot show it: then the configuration's assumption stands for it, and the
interval covers the whole range that the configuration allows. For DPO, a prompt needs an accepted and a rejected image; the
share of rejected images has a beta distribution with the same correlation (together they are a Dirichlet-multinomial). The
least margin between them is not taken into account.

**Precision.** The share of right images among the accepted ones, as the external judge says, in each category, weighted by the
expected rows of the category. Selection takes the highest p_yes of a prompt first, which this leaves out.

**Gain.** A line from non-unification before training to the gain in Gen. after it. arXiv 2507.16663 reports a correlation of
0.53 between the two over models and subtasks, but not the points. Location and scale of the line are those of the overall
results that it does publish, for two models on three benchmarks (stages/paper/results.csv, SFT against base). Its interval is
the prediction interval of a simple regression with this correlation on so many points; it is wide, and it should be.

The intervals of rows, pool and precision are 95 % and for one training: prompts are resampled within categories, and how many
of the training prompts are selected is drawn for each resample. Where all prompts of a category have the same share of accepted
images, such as none, that share is drawn too (`_shares`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import betabinom

from stages.tools import metrics
from stages.tools.intervals import exact_interval, t_quantile
from stages.tools.paper import read_results

ROUNDS = 1000  # resamples
CORRELATION = 0.53  # of the gain in Gen. with Non. before training, over models and subtasks (arXiv 2507.16663)
EDGE = 1e-3  # the beta distribution has no correlation of exactly 0 or 1


@dataclass(frozen=True)
class Plan:
    """A selection of training data. most: rows of a prompt at most, for SFT. The thresholds are those of p_yes."""

    objective: str
    candidates: int
    accept: float
    reject: float
    most: int


@dataclass(frozen=True)
class Group:
    """The images of a category, an array entry for each prompt, float `[prompts]`.

    images, accepted, rejected: how many images it has, and how many of them a selection accepts and could reject. judged,
    right: of the accepted ones, how many the external judge has judged, and how many it says are right.
    """

    images: np.ndarray
    accepted: np.ndarray
    rejected: np.ndarray
    judged: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Value:
    """A forecast value with its 95 % interval; None where nothing can be said."""

    value: float | None
    low: float | None = None
    high: float | None = None


def group(p_yes: np.ndarray, right: np.ndarray, prompts: np.ndarray, plan: Plan) -> Group:
    """Return what a plan's selection sees in a category.

    p_yes: float `[n]`, NaN where unreadable, which is neither accepted nor rejected. right: 1, 0, or NaN where the external
    judge has no verdict. prompts: the prompt of each image.
    """
    _, places = np.unique(prompts, return_inverse=True)
    accepted, judged = p_yes >= plan.accept, ~np.isnan(right)

    def by_prompt(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(places, chosen.astype(float))

    kept = accepted & judged
    return Group(
        by_prompt(np.ones(len(p_yes))),
        by_prompt(accepted),
        by_prompt(p_yes < plan.reject),
        by_prompt(kept),
        by_prompt(kept & (right == 1)),
    )


# Numbers of accepted images


def none_of(share: np.ndarray, correlation: np.ndarray, count: int) -> np.ndarray:
    """Return the probability that none of `count` images of a prompt is one of those that have this share."""
    return np.asarray(betabinom.pmf(0, count, *_beta(share, correlation)))


def expected(share: np.ndarray, correlation: np.ndarray, count: int, most: int) -> np.ndarray:
    """Return the expected number of such images among `count`, where at most `most` of a prompt count."""
    first, second = _beta(share, correlation)
    return np.sum([betabinom.sf(number, count, first, second) for number in range(min(most, count))], axis=0)


def _beta(share: np.ndarray, correlation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both parameters of the beta distribution with this mean and intraclass correlation."""
    rho = np.clip(correlation, EDGE, 1 - EDGE)
    mean = np.clip(share, 1e-9, 1 - 1e-9)
    return mean * (1 - rho) / rho, (1 - mean) * (1 - rho) / rho


def correlation(groups: Sequence[Group], weights: Sequence[np.ndarray]) -> np.ndarray:
    """Return the intraclass correlation of acceptance within categories, float `[rounds]`: NaN where it cannot be measured.

    weights: for each group how often each prompt counts, float `[rounds, prompts]`. Prompts with one image show nothing.
    """
    between = within = free = prompts = images = np.zeros(len(weights[0]))
    for part, weight in zip(groups, weights, strict=True):
        repeated = part.images > 1
        n, accepted, weight = part.images[repeated], part.accepted[repeated], weight[:, repeated]
        shares = accepted / n
        total = np.maximum((weight * n).sum(1), 1)
        mean = (weight * accepted).sum(1) / total
        between = between + (weight * n * (shares - mean[:, None]) ** 2).sum(1)
        within = within + (weight * n * shares * (1 - shares)).sum(1)
        free = free + (weight * (n - 1)).sum(1)
        prompts = prompts + np.maximum(weight.sum(1) - 1, 0)
        images = images + (weight * n).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        size = images / (prompts + len(groups))
        one, other = between / prompts, within / free
        return np.clip((one - other) / (one + (size - 1) * other), 0, 1)


# The forecast of a selection


def selection(
    groups: dict[str, Group],
    plan: Plan,
    prompts: int,
    assumed: Sequence[float],
    seed: int,
    shares: dict[str, float] | None = None,
) -> dict[str, Value]:
    """Return the forecast of a selection from so many training prompts.

    assumed: the lowest, the assumed and the highest correlation, for prompts with one image. shares: the share of each category
    among the training prompts; all are equal if it is None. Returns rows, selected (prompts with rows, percent), pool (prompts
    without an accepted image, percent), precision (percent) and correlation.
    """
    parts = list(groups.values())
    mix = np.array([1 / len(parts) if shares is None else shares.get(name, 0.0) for name in groups])
    mix = mix / mix.sum()
    generator = np.random.default_rng(seed)
    once = [np.ones((1, len(part.images))) for part in parts]
    drawn = [_picks(generator, len(part.images)) for part in parts]
    measured = max(float(part.images.max()) for part in parts) > 1
    point = correlation(parts, once) if measured else np.array([np.nan])
    spread = correlation(parts, drawn) if measured else np.full(ROUNDS, np.nan)
    point = np.where(np.isnan(point), assumed[1], point)
    spread = np.where(np.isnan(spread), generator.uniform(assumed[0], assumed[2], ROUNDS), spread)
    best = _outcome(parts, mix, plan, once, point)
    resampled = _outcome(parts, mix, plan, drawn, spread, generator)

    # One training has a finite number of prompts, so its own counts vary around what is expected.
    selected, pool = (generator.binomial(prompts, np.clip(resampled[name], 0, 1)) / prompts for name in ("selected", "pool"))
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = prompts * selected * np.where(resampled["selected"] > 0, resampled["rows"] / resampled["selected"], 0)
    precision = _value(100 * best["precision"], 100 * resampled["precision"])
    if precision.low == precision.high and precision.value is not None:  # not one wrong, or not one right among them
        right, judged = (sum(float(getattr(part, name).sum()) for part in parts) for name in ("right", "judged"))
        trials = sum(np.count_nonzero(part.judged) for part in parts)  # prompts, because images of one resemble each other
        low, high = exact_interval(right * trials / judged, trials)
        precision = Value(precision.value, 100 * low, 100 * high)
    return {
        "rows": _value(prompts * best["rows"], rows),
        "selected": _value(100 * best["selected"], 100 * selected),
        "pool": _value(100 * best["pool"], 100 * pool),
        "precision": precision,
        "correlation": _value(point, spread),
    }


def _picks(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.multinomial(count, [1 / count] * count, size=ROUNDS).astype(float)


def _outcome(
    parts: Sequence[Group],
    mix: np.ndarray,
    plan: Plan,
    weights: Sequence[np.ndarray],
    rho: np.ndarray,
    generator: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Return what is expected of one training prompt, each float `[rounds]`: rows and shares. generator: that of resamples."""
    found = {name: np.zeros(len(rho)) for name in ("rows", "selected", "pool")}
    right, known = np.zeros(len(rho)), np.zeros(len(rho))
    for part, share, weight in zip(parts, mix, weights, strict=True):
        accepted, rejected = (_shares(part, count, weight, generator) for count in (part.accepted, part.rejected))
        without = none_of(accepted, rho, plan.candidates)
        if plan.objective == "sft":
            chosen, rows = 1 - without, expected(accepted, rho, plan.candidates, plan.most)
        else:
            undecided = none_of(np.minimum(accepted + rejected, 1), rho, plan.candidates)
            chosen = np.clip(1 - without - none_of(rejected, rho, plan.candidates) + undecided, 0, 1)
            rows = chosen
        judged = weight @ part.judged
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(judged > 0, weight @ part.right / judged, 0)
        right += np.where(judged > 0, share * rows * precision, 0)
        known += np.where(judged > 0, share * rows, 0)
        for name, value in (("rows", rows), ("selected", chosen), ("pool", without)):
            found[name] += share * value
    with np.errstate(divide="ignore", invalid="ignore"):
        return found | {"precision": np.where(known > 0, right / known, np.nan)}


def _shares(part: Group, count: np.ndarray, weight: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
    """Return the share of a category's images that are among `count`, float `[rounds]`.

    Where all prompts have the same share, as where none has an accepted image, resampling them shows no uncertainty. The share
    of resamples is then drawn from the posterior that as many prompts give after Jeffreys' prior.
    """
    shares = count / part.images
    if generator is None or np.ptp(shares) > 0:
        return np.asarray(weight @ count / (weight @ part.images))
    hits = len(shares) * float(shares[0])
    return generator.beta(hits + 0.5, len(shares) - hits + 0.5, size=len(weight))


def _value(best: np.ndarray, resampled: np.ndarray) -> Value:
    """Return a value with the interval of its resamples, which always contains it."""
    if np.isnan(best[0]):
        return Value(None)
    low, high = metrics.interval(resampled)
    value = float(best[0])
    return Value(value, None if low is None else min(low, value), None if high is None else max(high, value))


# The gain


@dataclass(frozen=True)
class Line:
    """A line from Non. to the gain in Gen., both in percent, with the points that give its location and scale."""

    non: tuple[float, ...]
    gain: tuple[float, ...]
    correlation: float = CORRELATION

    @property
    def slope(self) -> float:
        return float(self.correlation * np.std(self.gain, ddof=1) / np.std(self.non, ddof=1))

    def at(self, non: float) -> float:
        return float(np.mean(self.gain) + self.slope * (non - np.mean(self.non)))

    def predicted(self, non: Value) -> Value:
        """Return the gain that is predicted for a Non., with its prediction interval, to which that of Non. is added."""
        if non.value is None:
            return Value(None)
        count, squares = len(self.non), float(np.var(self.non) * len(self.non))
        rest = np.std(self.gain, ddof=1) * math.sqrt((1 - self.correlation**2) * (count - 1) / (count - 2))
        half = t_quantile(0.975, count - 2) * rest
        half *= math.sqrt(1 + 1 / count + (non.value - float(np.mean(self.non))) ** 2 / squares)
        value = self.at(non.value)
        low, high = (self.slope * (end - non.value) if end is not None else 0.0 for end in (non.low, non.high))
        return Value(value, value - math.hypot(half, low), value + math.hypot(half, high))


def paper_line(results: Path) -> Line:
    """Return the line through the paper's overall results: Non. of base, and the gain of SFT in Gen., for each benchmark."""
    known = {
        (row["model"], row["benchmark"], row["row"], row["metric"]): row["value"]
        for row in read_results(results)
        if row["category"] == "overall"
    }
    places = [(model, name) for model, name, row, metric in known if (row, metric) == ("base", "non")]
    points = [
        (known[*place, "base", "non"], known[*place, "sft", "gen"] - known[*place, "base", "gen"])
        for place in places
        if (*place, "sft", "gen") in known
    ]
    non, gain = zip(*points, strict=True)
    return Line(non, gain)
