"""The measures, as counts by prompt, and their 95 % intervals.

Definitions (arXiv 2507.16663, sections 2 and 4), und being the model's own verdict and judge the external one:

gen                    share of images that the judge says match
non                    share of the model's own images with und = 0
weak_generation        P(judge = 0 | und = 0): where the model refuses its own image, how often the judge agrees
und                    win rate on the base model's images: of the verdicts on which base and trained model differ, the share
                       where the trained one agrees with the judge; 50 with n = 0 where none differ, as the paper has it
false_positive_fixed   share of base images with (judge, before, after) = (0, 1, 0)
true_positive_broken   share of base images with (judge, before, after) = (1, 1, 0)
judge_on_base          share of base images on which und agrees with the judge
judge_on_own           the same on the model's own images

An answer that could not be read counts in no denominator but gen's. Without an external judge there is only non. `overall`
is the unweighted mean over categories.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.runtime import UserError

Counts = np.ndarray  # int64 [2, seeds, prompts]: numerator and denominator by run and prompt


@dataclass
class Images:
    """Verdicts on one set of images, by candidate_id; None where an answer could not be read."""

    prompt: dict[str, str] = field(default_factory=dict)
    judge: dict[str, bool | None] = field(default_factory=dict)
    und: dict[str, bool | None] = field(default_factory=dict)


def verdicts(paths: list[Path], threshold: float) -> dict[str, bool | None]:
    """Whether p_yes reaches the threshold, by candidate_id."""
    rows = manifests.read_rows(paths, "scores")
    return {row["candidate_id"]: None if row["p_yes"] is None else row["p_yes"] >= threshold for row in rows}


def read_images(judged: list[Path], scored: list[Path], threshold: float) -> Images:
    """The external judge's and a model's verdicts on the same images; UserError where they are not the same images."""
    prompt = {row["candidate_id"]: row["prompt_id"] for row in manifests.read_rows(judged, "scores")}
    images = Images(prompt, verdicts(judged, 0.5), verdicts(scored, threshold))
    if images.judge.keys() != images.und.keys():
        raise UserError(f"{scored[0]}: scores other images than {judged[0]}; give the manifests of one image set")
    return images


def count(prompts: list[dict[str, Any]], own: Images, base: Images, after: dict[str, bool | None]) -> dict[str, Counts]:
    """Every metric as int64 `[2, 1, prompts]`. own: the model on its own images; base: the base model on its own;
    after: the model's verdicts on the base model's images."""
    if base.judge.keys() != after.keys():
        raise UserError("--arm-scores-of-base: other images than --base-verdicts; score the base model's images again")
    place = {row["prompt_id"]: i for i, row in enumerate(prompts)}
    unknown = next((prompt for images in (own, base) for prompt in images.prompt.values() if prompt not in place), None)
    if unknown:
        raise UserError(
            f"--prompts: prompt_id {unknown} of the verdicts is not in the manifest; give the one they were drawn for"
        )
    Test = Callable[[str], bool]

    def tally(images: Images, counted: Test, among: Test) -> Counts:
        counts = np.zeros((2, 1, len(prompts)), dtype=np.int64)
        for candidate, prompt in images.prompt.items():
            if among(candidate):
                counts[:, 0, place[prompt]] += (counted(candidate), 1)
        return counts

    non = tally(own, lambda c: own.und[c] is False, lambda c: own.und[c] is not None)
    if all(verdict is None for verdict in base.judge.values()):
        return {"non": non}

    def readable(candidate: str) -> bool:
        return base.und[candidate] is not None and after[candidate] is not None

    def turned(judge: bool) -> Test:
        return lambda c: (base.judge[c], base.und[c], after[c]) == (judge, True, False)

    return {
        "gen": tally(own, lambda c: own.judge[c] is True, lambda c: True),
        "non": non,
        "weak_generation": tally(own, lambda c: own.judge[c] is False, lambda c: own.und[c] is False),
        "und": tally(base, lambda c: after[c] == base.judge[c], lambda c: readable(c) and base.und[c] != after[c]),
        "false_positive_fixed": tally(base, turned(False), readable),
        "true_positive_broken": tally(base, turned(True), readable),
        "judge_on_base": tally(base, lambda c: after[c] == base.judge[c], lambda c: after[c] is not None),
        "judge_on_own": tally(own, lambda c: own.und[c] == own.judge[c], lambda c: own.und[c] is not None),
    }


def groups_of(prompts: list[dict[str, Any]]) -> dict[str, list[np.ndarray]]:
    """Category -> the groups of prompt positions whose shares are averaged; overall: every category's."""
    categories = [row["category"] for row in prompts]
    members = {name: [np.flatnonzero(np.array(categories) == name)] for name in sorted(set(categories))}
    return members | {"overall": [group for part in members.values() for group in part]}


def share(metric: str, counts: Counts, groups: list[np.ndarray]) -> float | None:
    """100 x the mean over groups of numerator / denominator; groups without a denominator are left out."""
    parts = [counts[:, :, group].sum((1, 2)) for group in groups]
    shares = [numerator / denominator for numerator, denominator in parts if denominator]
    if not shares:
        return 50.0 if metric == "und" else None
    return 100 * float(np.mean(shares))


def resample(counts: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> np.ndarray:
    """`share` on resampled prompts (within groups) and, where there are several, resampled runs: float64 `[rounds]`.

    Images of one prompt stay together. Equal seeds draw equal resamples, so differences are paired. NaN where a resample
    has no denominator in any group.
    """
    generator = np.random.default_rng(seed)
    runs = counts.shape[1]
    weights = generator.multinomial(runs, [1 / runs] * runs, size=rounds)  # [rounds, runs]
    total, used = np.zeros(rounds), np.zeros(rounds)
    for group in groups:
        picks = generator.multinomial(len(group), [1 / len(group)] * len(group), size=rounds)  # [rounds, prompts]
        numerator, denominator = np.einsum("rs,ksp,rp->kr", weights, counts[:, :, group], picks, optimize=True)
        some = denominator > 0
        total[some] += numerator[some] / denominator[some]
        used += some
    return 100 * np.divide(total, used, out=np.full(rounds, np.nan), where=used > 0)


def interval(values: np.ndarray) -> tuple[float | None, float | None]:
    """The central 95 % of resampled values; None where there are none."""
    values = values[~np.isnan(values)]
    return (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) if len(values) else (None, None)


def summarise(metric: str, counts: Counts, base: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> dict[str, Any]:
    """value, numerator, denominator, interval, and the paired difference to base with its interval.

    und compares with the base model already: its difference is to 50, a draw.
    """
    value, drawn = share(metric, counts, groups), resample(counts, groups, rounds, seed)
    if metric == "und":
        reference, drawn_reference = 50.0, np.full(rounds, 50.0)
    else:
        reference, drawn_reference = share(metric, base, groups), resample(base, groups, rounds, seed)  # type: ignore[assignment]
    low, high = interval(drawn)
    delta_low, delta_high = interval(drawn - drawn_reference)
    numerator, denominator = sum(counts[:, :, group].sum((1, 2)) for group in groups)
    return {
        "value": value, "n": sum(len(group) for group in groups),
        "numerator": int(numerator), "denominator": int(denominator), "ci_low": low, "ci_high": high,
        "delta": None if value is None or reference is None else value - reference,
        "delta_ci_low": delta_low, "delta_ci_high": delta_high,
    }  # fmt: skip
