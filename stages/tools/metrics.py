"""The metrics, as counts by prompt, and their 95 % intervals.

The definitions follow arXiv 2507.16663, sections 2 and 4. `own` is the model's own verdict, `judge` is the benchmark's external
judge, and `scorer` is the judge that measures generation in the prompt's category: the external judge, unless the benchmark or
its suite names another. Verdicts already include each judge's threshold; none is applied here.

gen                    mean graded score of the scorer over the model's images, or mean verdict if it gives no graded scores
gen_second             the same by the second scorers, over the categories that have one
non                    share of the model's images that the model itself rejects
weak_generation        P(judge rejects | own rejects): of the images that the model itself rejects, the share that the judge
                       rejects too
und                    win rate on the base model's images: of the images on which base and trained model differ, the share
                       on which the trained model agrees with the judge. Categories without such images have no value and
                       are left out of `overall`
und_paper              the same, but a category without such images counts as 50, also in `overall`, as in the paper. For
                       example, if the models differ on one image in six categories, and the trained model is wrong on it, und
                       is 0 and und_paper is 41.67
und_pooled             the same over all such images together, whatever their category
false_positive_fixed   share of base images with (judge, base, trained) = (no, yes, no)
true_positive_broken   share of base images with (judge, base, trained) = (yes, yes, no)
judge_on_base          share of base images on which the model agrees with the judge
judge_on_own           the same for the model's own images
false_acceptance       P(own accepts | judge rejects): of the model's images that are wrong according to the judge, the share
                       that the model accepts
false_refusal          P(own rejects | judge accepts): of the model's images that are right, the share that the model rejects
own_unreadable         share of the model's images for which its own verdict could not be parsed
judge_unreadable       share of the model's images for which the judge gave neither a verdict nor a score
scorer_unreadable      the same for the scorers, if a benchmark has its own
neither                mean probability that the model's answer is neither yes nor no, over the images for which it is known

An unreadable verdict counts only in the shares of unreadable verdicts; it is in no other metric's denominator. Without an
external judge there are only non, own_unreadable, neither and the metrics of the scorers. `overall` is the unweighted
mean over categories.

The intervals are 95 %. They are resampled by prompt, except where a category has counted images of fewer than 30 prompts or
where all resamples are equal: there, resampling would promise too much, and the interval is the exact one of Clopper and
Pearson. Its trials are the prompts, of each run where there are several, because the images of one prompt are not independent.
The interval of `overall` is then put together from those of its categories. No interval has a width of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from stages.common import manifests
from stages.common.errors import UserError
from stages.common.seeds import hash_seed
from stages.judges.base import Verdict
from stages.tools.intervals import FEW, exact_interval

Counts = np.ndarray  # float64 [2, runs, prompts]: numerator and denominator by run and prompt
DRAW = 50.0  # win rate when as many verdicts change for the better as for the worse
AGAINST_BASE = ("und", "und_paper", "und_pooled")  # these already compare with base, so their difference is from a draw
OWN_ONLY = ("non", "own_unreadable", "neither")  # these need no external judge
BY_SCORER = ("gen", "scorer_unreadable")
BY_SECOND = "gen_second"


@dataclass(frozen=True)
class Judges:
    """The judges of a benchmark by name: the external judge or None, and the scorers and second scorers by category."""

    judge: str | None = None
    scorers: Mapping[str, str] = field(default_factory=dict)
    second: Mapping[str, str] = field(default_factory=dict)

    def scorer(self, category: str) -> str | None:
        """Return the name of the judge that measures generation in a category."""
        return self.scorers.get(category, self.judge)

    def measure(self, metric: str) -> bool:
        """Return whether these judges can measure a metric."""
        if metric == "scorer_unreadable":
            return bool(self.scorers)
        if metric == BY_SECOND:
            return bool(self.second)
        return metric in OWN_ONLY or self.judge is not None or (metric == "gen" and bool(self.scorers))

    def of(self, metric: str, category: str, categories: Iterable[str]) -> str | None:
        """Return the name of the judge that measures a metric in a category; for `overall` it may be several, joined."""
        if metric in OWN_ONLY:
            return None
        if metric not in (*BY_SCORER, BY_SECOND):
            return self.judge
        scorer = self.second.get if metric == BY_SECOND else self.scorer
        members = sorted(categories) if category == "overall" else [category]
        return ", ".join(dict.fromkeys(name for part in members if (name := scorer(part)))) or None


@dataclass
class Images:
    """One checkpoint's images of a benchmark, by candidate_id.

    prompt: the prompt_id. own: the model's own verdict, None if it could not be parsed. neither: the probability that the
    answer is neither yes nor no, None if unknown. external: the verdicts of each external judge, by judge and candidate_id.
    """

    prompt: dict[str, str] = field(default_factory=dict)
    own: dict[str, bool | None] = field(default_factory=dict)
    neither: dict[str, float | None] = field(default_factory=dict)
    external: dict[str, dict[str, Verdict]] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A value in percent with its 95 % interval, each None if there is none.

    drawn: the values on resampled prompts, float64 `[rounds]`, or None if the interval is exact.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    drawn: np.ndarray | None = None


class Difference(TypedDict):
    """A difference with its 95 % interval, as columns of the metrics manifest."""

    delta: float | None
    delta_ci_low: float | None
    delta_ci_high: float | None


class Summary(Difference):
    """A category's metric with its 95 % interval and its difference from base, as columns of the metrics manifest."""

    value: float | None
    prompts: int
    numerator: float
    denominator: int
    ci_low: float | None
    ci_high: float | None


# Reading


def own_verdicts(scores: list[Path]) -> dict[str, bool | None]:
    """Return a model's verdicts by candidate_id, as stages.score recorded them."""
    return {row["candidate_id"]: row["verdict"] for row in manifests.read_rows(scores, "scores")}


def external_verdicts(verdicts: list[Path]) -> dict[str, dict[str, Verdict]]:
    """Return the verdicts of all external judges in the manifests: judge -> candidate_id -> verdict."""
    found: dict[str, dict[str, Verdict]] = {}
    for row in manifests.read_rows(verdicts, "verdicts"):
        found.setdefault(row["judge"], {})[row["candidate_id"]] = Verdict(row["verdict"], row["score"])
    return found


def read_images(scores: list[Path], verdicts: list[Path]) -> Images:
    """Return one checkpoint's images: the model's own verdicts on them, and those of all external judges."""
    rows = manifests.read_rows(scores, "scores")
    return Images(
        prompt={row["candidate_id"]: row["prompt_id"] for row in rows},
        own={row["candidate_id"]: row["verdict"] for row in rows},
        neither={row["candidate_id"]: row["p_neither"] for row in rows},
        external=external_verdicts(verdicts),
    )


def require_complete(images: Images, judges: Judges, category_of: Mapping[str, str], option: str, whose: str) -> None:
    """Raise UserError unless the judges have judged all images that they measure, and no images of another set.

    category_of: prompt_id -> category. option, whose: the names of the verdicts and of the images in the messages.
    """
    wanted: dict[str, set[str]] = {judges.judge: set(images.prompt)} if judges.judge else {}
    for candidate, prompt in images.prompt.items():
        if prompt not in category_of:
            raise UserError(
                f"--prompts: prompt_id {prompt} of {whose} images is not there; give the prompt manifest of these images"
            )
        for scorer in (judges.scorer(category_of[prompt]), judges.second.get(category_of[prompt])):
            if scorer:
                wanted.setdefault(scorer, set()).add(candidate)
    for judge, candidates in wanted.items():
        judged = images.external.setdefault(judge, {}).keys()
        if missing := candidates - judged:
            raise UserError(
                f"{option}: the judge {judge} has no row for {len(missing)} of the {len(candidates)} {whose} images that it "
                f"measures, for example {min(missing)}; give all its manifests of this image set, or judge it again"
            )
        if other := judged - images.prompt.keys():
            raise UserError(
                f"{option}: the judge {judge} has verdicts on {len(other)} images that are not in the scores of {whose} "
                f"images, for example {min(other)}; give the manifests of one image set"
            )


# Counting: an image's contribution to a metric, from 0 to 1, or None if the image does not count


@dataclass(frozen=True)
class OwnImage:
    """All verdicts on one of the model's own images. judge, scorer and second are None if the benchmark has none."""

    own: bool | None
    neither: float | None
    judge: Verdict | None
    scorer: Verdict | None
    second: Verdict | None = None


@dataclass(frozen=True)
class BaseImage:
    """The verdicts of the external judge, the base model and the trained model on one of the base model's images."""

    judge: bool | None
    base: bool | None
    trained: bool | None

    def readable(self) -> bool:
        return None not in (self.judge, self.base, self.trained)


def gen(image: OwnImage) -> float | None:
    return image.scorer.grade if image.scorer else None


def gen_second(image: OwnImage) -> float | None:
    return image.second.grade if image.second else None


def non(image: OwnImage) -> float | None:
    return None if image.own is None else not image.own


def weak_generation(image: OwnImage) -> float | None:
    if image.own is not False or image.judge is None or image.judge.matches is None:
        return None
    return not image.judge.matches


def judge_on_own(image: OwnImage) -> float | None:
    return agreement(image.own, image.judge.matches if image.judge else None)


def false_acceptance(image: OwnImage) -> float | None:
    if image.own is None or image.judge is None or image.judge.matches is not False:
        return None
    return image.own


def false_refusal(image: OwnImage) -> float | None:
    if image.own is None or image.judge is None or image.judge.matches is not True:
        return None
    return not image.own


def own_unreadable(image: OwnImage) -> float | None:
    return image.own is None


def judge_unreadable(image: OwnImage) -> float | None:
    return image.judge.grade is None if image.judge else None


def scorer_unreadable(image: OwnImage) -> float | None:
    return image.scorer.grade is None if image.scorer else None


def neither(image: OwnImage) -> float | None:
    return image.neither


def und(image: BaseImage) -> float | None:
    return image.trained == image.judge if image.readable() and image.base != image.trained else None


def false_positive_fixed(image: BaseImage) -> float | None:
    return image == BaseImage(judge=False, base=True, trained=False) if image.readable() else None


def true_positive_broken(image: BaseImage) -> float | None:
    return image == BaseImage(judge=True, base=True, trained=False) if image.readable() else None


def judge_on_base(image: BaseImage) -> float | None:
    return agreement(image.trained, image.judge)


def agreement(one: bool | None, other: bool | None) -> bool | None:
    """Return whether two verdicts agree, or None if one of them could not be read."""
    return None if one is None or other is None else one == other


ON_OWN: dict[str, Callable[[OwnImage], float | None]] = {
    "gen": gen,
    BY_SECOND: gen_second,
    "non": non,
    "weak_generation": weak_generation,
    "judge_on_own": judge_on_own,
    "false_acceptance": false_acceptance,
    "false_refusal": false_refusal,
    "own_unreadable": own_unreadable,
    "judge_unreadable": judge_unreadable,
    "scorer_unreadable": scorer_unreadable,
    "neither": neither,
}
ON_BASE: dict[str, Callable[[BaseImage], float | None]] = {
    "und": und,
    "und_paper": und,
    "und_pooled": und,
    "false_positive_fixed": false_positive_fixed,
    "true_positive_broken": true_positive_broken,
    "judge_on_base": judge_on_base,
}


def count(
    prompts: Sequence[Mapping[str, Any]], judges: Judges, own: Images, base: Images, trained: Mapping[str, bool | None]
) -> dict[str, Counts]:
    """Return the counts of every metric that these judges can measure, each float64 `[2, 1, prompts]` (see `Counts`).

    own: the model's images. base: the base model's images. trained: the model's verdicts on the base model's images.
    """
    category_of = {row["prompt_id"]: row["category"] for row in prompts}
    require_complete(own, judges, category_of, "--verdicts", "the arm's")
    require_complete(base, judges, category_of, "--base-verdicts", "the base model's")
    if base.prompt.keys() != trained.keys():
        raise UserError("--arm-scores-of-base: not the images of --base-scores; score the base model's images again")

    own_images: dict[str, OwnImage] = {}
    for name, prompt in own.prompt.items():
        category = category_of[prompt]
        asked = (judges.judge, judges.scorer(category), judges.second.get(category))
        verdicts = [own.external[judge][name] if judge else None for judge in asked]
        own_images[name] = OwnImage(own.own[name], own.neither[name], *verdicts)
    base_images: dict[str, BaseImage] = {}
    for name in base.prompt:
        matches = base.external[judges.judge][name].matches if judges.judge else None
        base_images[name] = BaseImage(matches, base.own[name], trained[name])

    place = {row["prompt_id"]: i for i, row in enumerate(prompts)}

    def tally(images: Images, values: Iterable[tuple[str, float | None]]) -> Counts:
        counts = np.zeros((2, 1, len(prompts)))
        for candidate, value in values:
            if value is not None:
                counts[:, 0, place[images.prompt[candidate]]] += (value, 1)
        return counts

    counted = {name: tally(own, ((c, value(image)) for c, image in own_images.items())) for name, value in ON_OWN.items()}
    counted |= {name: tally(base, ((c, value(image)) for c, image in base_images.items())) for name, value in ON_BASE.items()}
    return {name: counts for name, counts in counted.items() if judges.measure(name)}


def groups_of(prompts: Sequence[Mapping[str, Any]]) -> dict[str, list[np.ndarray]]:
    """Return, by category, groups of prompt indices; a metric is the mean over groups. `overall` has one group per category."""
    categories = np.array([row["category"] for row in prompts])
    members = {str(name): [np.flatnonzero(categories == name)] for name in sorted(set(categories))}
    return members | {"overall": [group for part in members.values() for group in part]}


# Summarising


def empty_group(metric: str) -> float:
    """Return the percentage that a group with denominator 0 counts as; NaN leaves the group out."""
    return DRAW if metric == "und_paper" else float("nan")


def groups_for(metric: str, groups: list[np.ndarray]) -> list[np.ndarray]:
    """Return the groups over which a metric is the mean: und_pooled takes all of them as one."""
    return [np.concatenate(groups)] if metric == "und_pooled" else groups


def share(metric: str, counts: Counts, groups: list[np.ndarray]) -> float | None:
    """Return the mean over groups of 100 x numerator / denominator, or None if no group has a value."""
    parts = [counts[:, :, group].sum((1, 2)) for group in groups_for(metric, groups)]
    shares = [100 * top / bottom if bottom else empty_group(metric) for top, bottom in parts]
    known = [part for part in shares if not np.isnan(part)]
    return float(np.mean(known)) if known else None


def resample(metric: str, counts: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> np.ndarray:
    """Return bootstrap values of `share`, float64 `[rounds]`, from resampled prompts and, if there are several, resampled runs.

    Prompts are resampled within groups, and the images of a prompt stay together. Equal seeds draw equal resamples, so
    differences are paired. A value is NaN if the resample has no value in any group.
    """
    generator = np.random.default_rng(seed)
    runs = counts.shape[1]
    weights = generator.multinomial(runs, [1 / runs] * runs, size=rounds)  # [rounds, runs]
    shares = []
    for group in groups_for(metric, groups):
        picks = generator.multinomial(len(group), [1 / len(group)] * len(group), size=rounds)  # [rounds, prompts]
        numerator, denominator = np.einsum("rs,ksp,rp->kr", weights, counts[:, :, group], picks, optimize=True)
        missing = np.full(rounds, empty_group(metric) / 100)
        shares.append(np.divide(numerator, denominator, out=missing, where=denominator > 0))
    used = ~np.isnan(shares)
    total = np.where(used, shares, 0).sum(0)
    return 100 * np.divide(total, used.sum(0), out=np.full(rounds, np.nan), where=used.any(0))


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the central 95 % interval of resampled values, or (None, None) if there are none."""
    values = values[~np.isnan(values)]
    return (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) if len(values) else (None, None)


def resampling_seed(purpose: str, metric: str, category: str) -> int:
    """Return the seed of a metric's resamples. All arms share it, so that they are paired, and so do und and und_paper."""
    return hash_seed(purpose, metric.removesuffix("_paper"), category)


def estimate(metric: str, counts: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> Estimate:
    """Return a metric's value with an interval that is resampled where there is enough to resample."""
    groups = groups_for(metric, groups)
    value = share(metric, counts, groups)
    parts = [counts[:, :, group].sum((1, 2)) for group in groups]
    prompts = [np.count_nonzero(counts[1][:, group]) for group in groups]  # those that count, in each run
    if all(bottom == 0 or min(bottom, number) >= FEW for (_, bottom), number in zip(parts, prompts, strict=True)):
        drawn = resample(metric, counts, groups, rounds, seed)
        low, high = interval(drawn)
        if low != high:
            return Estimate(value, low, high, drawn)
    if len(groups) == 1:
        top, bottom = parts[0]
        if not bottom:
            return Estimate(value)
        scale = min(1.0, prompts[0] / bottom)
        low, high = exact_interval(top * scale, bottom * scale)
        return Estimate(value, 100 * low, 100 * high)
    return combined(metric, value, [estimate(metric, counts, [group], rounds, seed) for group in groups])


def combined(metric: str, value: float | None, parts: list[Estimate]) -> Estimate:
    """Return the mean of independent estimates with an interval that is put together from theirs.

    The distances from the value to both ends are those of the parts, added in squares (the method of variance estimates
    recovery, Zou and Donner 2008).
    """
    known = [(part.value, part.low, part.high) for part in parts if part.low is not None]
    if value is None or not known:
        return Estimate(value)
    number = len(parts) if metric == "und_paper" else len(known)
    values, lows, highs = np.array(known, dtype=float).T
    below, above = np.linalg.norm(values - lows) / number, np.linalg.norm(highs - values) / number
    return Estimate(value, value - float(below), value + float(above))


def difference(one: Estimate, other: Estimate) -> Difference:
    """Return the difference of two values with its interval.

    It is resampled in pairs if both were, and there is none if these resamples are all equal. Otherwise it is put together from
    both intervals as if they were independent, which makes it wider than pairs would.
    """
    if one.value is None or other.value is None:
        return {"delta": None, "delta_ci_low": None, "delta_ci_high": None}
    delta, low, high = one.value - other.value, None, None
    if one.drawn is not None and other.drawn is not None:
        low, high = interval(one.drawn - other.drawn)
        low, high = (None, None) if low == high else (low, high)
    elif one.low is not None and one.high is not None and other.low is not None and other.high is not None:
        low = delta - float(np.hypot(one.value - one.low, other.high - other.value))
        high = delta + float(np.hypot(one.high - one.value, other.value - other.low))
    return {"delta": delta, "delta_ci_low": low, "delta_ci_high": high}


def against_draw(found: Estimate) -> Difference:
    """Return the difference of a win rate from 50, a draw."""
    delta, low, high = (None if end is None else end - DRAW for end in (found.value, found.low, found.high))
    return {"delta": delta, "delta_ci_low": low, "delta_ci_high": high}


def summarise(metric: str, counts: Counts, base: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> Summary:
    """Return a metric's value and interval, and its difference from base (for win rates from a draw).

    Counts that are equal to those of base, such as base's own, have a difference of 0 without an interval.
    """
    found = estimate(metric, counts, groups, rounds, seed)
    if metric in AGAINST_BASE:
        change = against_draw(found)
    elif np.array_equal(counts, base):
        change = difference(Estimate(found.value), Estimate(found.value))
    else:
        change = difference(found, estimate(metric, base, groups, rounds, seed))
    numerator, denominator = sum(counts[:, :, group].sum((1, 2)) for group in groups)
    return {
        "value": found.value,
        "prompts": sum(len(group) for group in groups),
        "numerator": float(numerator),
        "denominator": int(denominator),
        "ci_low": found.low,
        "ci_high": found.high,
        **change,
    }
