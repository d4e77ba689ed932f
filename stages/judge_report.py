"""Report how well a model's own judge agrees with the external judge, and where the accept threshold cuts.

    python -m stages.judge_report --config config.yaml --prompts validation prompts/validation.parquet \\
        --scores validation base base/scores/validation/*.parquet \\
        --verdicts validation base base/verdicts/shapes/validation/*.parquet \\
        --scores validation sft ... --verdicts validation sft ... --out judge_report.parquet --plot judge_report.png

--scores and --verdicts are given once for each set of images and each checkpoint: the set (a benchmark's name, or train for
the candidates of the training prompts), the checkpoint (base, or the arm), and the manifests. Without verdicts, only
`accepted` and `pool` are measured. No model is loaded.

p_yes is the model's own probability that an image matches its prompt, and an image is right or wrong according to the external
judge. Every measure is computed for all images together (the category `overall`) and for each category. Those marked with *
are also computed for each reason that the external judge gives: then only the wrong images with that reason count, and the
right images of the categories in which it occurs. The AUC of a reason compares each wrong image with the right images of its
own category, because categories may differ in their p_yes.

right *               share of right images
auc *                 probability that a right image has a higher p_yes than a wrong one; a tie counts as half
roc_right, roc_wrong  share of the right and of the wrong images with p_yes >= threshold: the ROC curve *
ece                   expected calibration error: the mean distance of p_yes from the share of right images, over ten bins
calibration           share of right images among those with p_yes in the bin
calibration_p_yes     their mean p_yes
histogram_right, histogram_wrong  share of the right and of the wrong images whose p_yes is in the bin
accuracy              share of images on which the model's own verdict (at score.verdict_threshold) agrees with the external one
false_acceptance *    share of the wrong images that the model's own verdict accepts
false_refusal         share of the right images that it refuses
neither               mean probability that the answer is neither yes nor no
neither_dominates     share of images for which this probability is above one half
own_unreadable        share of images for which the model's own answer could not be read
external_unreadable   share of images for which the external judge gave no verdict
precision             share of right images among those with p_yes >= threshold, which are those that a selection would accept
accepted              share of images with p_yes >= threshold
pool                  share of prompts of which no image has p_yes >= threshold: they would be in the discard pool
near                  share of images whose p_yes is at most WINDOW away from the accept threshold
right_above, right_below  share of right images among those up to WINDOW above, and below, the accept threshold
right_gain            the difference of these two shares, compared within categories
finding, warning      what this means for the selection, in words; `threshold_finding` says whether the threshold cuts where
                      p_yes carries information

An image whose p_yes or external verdict cannot be read counts only in `own_unreadable` and `external_unreadable`, except that
an unreadable p_yes is never accepted. stages/tools/rates.py defines the intervals.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file
from stages.tools import rates
from stages.tools.intervals import FEW
from stages.tools.rates import Rate

Row = dict[str, Any]
OVERALL = "overall"
STEPS = [round(0.05 * step, 2) for step in range(1, 20)]  # thresholds for which precision and pool are computed
BINS, FINE_BINS, ROC_POINTS = 10, 20, 101  # of the calibration, of the histogram, and at most of a ROC curve
WINDOW = 0.1  # images whose p_yes differs from a threshold by at most this are near it
FEW_NEITHER = 0.05  # if neither yes nor no is the most probable answer more often than this, there is a warning
FEW_NEAR = 0.05  # if at most this share of the images is near, the exact place of the threshold hardly matters
WEAK = 0.6  # an AUC that is certainly at most this hardly differs from chance


# Reading


@dataclass(frozen=True)
class Images:
    """A checkpoint's images of one set, an array entry each.

    prompt: a number for each prompt. category: its category. p_yes, neither: NaN where unknown. own, right: the model's own and
    the external verdict as 1 and 0, NaN where unreadable. reason: why the image is wrong; empty where that is not known.
    """

    prompt: np.ndarray
    category: np.ndarray
    p_yes: np.ndarray
    neither: np.ndarray
    own: np.ndarray
    right: np.ndarray
    reason: np.ndarray

    def only(self, chosen: np.ndarray) -> Images:
        """Return the images for which `chosen` is true."""
        return Images(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def of(self, category: str) -> Images:
        return self if category == OVERALL else self.only(self.category == category)

    @property
    def readable(self) -> np.ndarray:
        """Whether both p_yes and the external verdict are known."""
        return ~np.isnan(self.p_yes) & ~np.isnan(self.right)


@dataclass(frozen=True)
class Judged:
    """The images of a set by one checkpoint, and the external judge that has judged them, if any."""

    set: str
    checkpoint: str
    judge: str | None
    images: Images

    @property
    def categories(self) -> list[str]:
        return [OVERALL, *sorted(set(self.images.category))]


def read(name: str, prompts: Path, scores: Sequence[Path], verdicts: Sequence[Path], judge: str | None) -> Images:
    """Return the images of the scores. Raises UserError if a prompt or a verdict of the judge is missing.

    name: the set and the checkpoint, for messages.
    """
    scored = manifests.read_rows(scores, "scores")
    known = manifests.prompts_of(prompts, scored)
    judged = {row["candidate_id"]: row for row in manifests.read_rows(verdicts, "verdicts") if row["judge"] == judge}
    missing = [row["candidate_id"] for row in scored if row["candidate_id"] not in judged] if judge else []
    if missing:
        raise UserError(
            f"--verdicts {name}: the judge {judge} has no row for {len(missing)} of the {len(scored)} images of --scores, "
            f"for example {missing[0]}; give all its manifests of this set and checkpoint, or judge the images again"
        )
    external = [judged.get(row["candidate_id"], {}) for row in scored]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(row["prompt_id"] for row in scored))}
    return Images(
        prompt=np.array([numbers[row["prompt_id"]] for row in scored], int),
        category=np.array([known[row["prompt_id"]]["category"] for row in scored], str),
        p_yes=np.array([row["p_yes"] for row in scored], float),
        neither=np.array([row["p_neither"] for row in scored], float),
        own=np.array([row["verdict"] for row in scored], float),
        right=np.array([row.get("verdict") for row in external], float),
        reason=np.array([row.get("reason") or "" for row in external], str),
    )


# Measuring: each function yields rows without the columns that say to which images they belong


def row(measure: str, rate: Rate, **places: Any) -> Row:
    """Return a row of the report. places: its reason, threshold, upper or text."""
    return {
        "measure": measure,
        "value": rate.value,
        "numerator": rate.numerator,
        "n": rate.n,
        "ci_low": rate.low,
        "ci_high": rate.high,
        **places,
    }


def mean(values: np.ndarray) -> Rate:
    """Return the mean of the values, without an interval."""
    return Rate(float(values.mean()), len(values), float(values.sum())) if len(values) else Rate(None, 0)


def separation(images: Images, reason: str | None = None) -> Iterator[Row]:
    """Yield how well p_yes separates right from wrong images, all of them or those with one reason."""
    seen = images.only(images.readable)
    if reason:
        wrong = (seen.right == 0) & (seen.reason == reason)
        seen = seen.only(wrong | (seen.right == 1) & np.isin(seen.category, seen.category[wrong]))
    right = seen.right == 1
    strata = seen.category if reason else np.zeros(len(right))
    yield row("right", rates.share(right, seen.prompt), reason=reason)
    yield row("auc", rates.auc(seen.p_yes, right, seen.prompt, strata), reason=reason)
    thresholds = np.unique(seen.p_yes)
    if len(thresholds) > ROC_POINTS:
        thresholds = np.unique(np.quantile(seen.p_yes, np.linspace(0, 1, ROC_POINTS), method="nearest"))
    for measure, values in (("roc_right", seen.p_yes[right]), ("roc_wrong", seen.p_yes[~right])):
        for threshold in thresholds:
            yield row(measure, mean(values >= threshold), threshold=float(threshold), reason=reason)
    wrong = seen.only(~right & ~np.isnan(seen.own))
    yield row("false_acceptance", rates.share(wrong.own == 1, wrong.prompt), reason=reason)


def verdicts(images: Images) -> Iterator[Row]:
    """Yield how often the model's own verdicts are true, and how often a verdict could not be read."""
    seen = images.only(~np.isnan(images.own) & ~np.isnan(images.right))
    yield row("accuracy", rates.share(seen.own == seen.right, seen.prompt))
    right = seen.only(seen.right == 1)
    yield row("false_refusal", rates.share(right.own == 0, right.prompt))
    answered = images.only(~np.isnan(images.neither))
    yield row("neither", mean(answered.neither))
    yield row("neither_dominates", rates.share(answered.neither > 0.5, answered.prompt))
    yield row("own_unreadable", rates.share(np.isnan(images.own), images.prompt))
    yield row("external_unreadable", rates.share(np.isnan(images.right), images.prompt))


def binned(p_yes: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each p_yes, from 0. A p_yes of 1 belongs to the last bin."""
    return np.minimum((p_yes * bins + 1e-9).astype(int), bins - 1)


def calibration(images: Images) -> Iterator[Row]:
    """Yield the calibration of p_yes, and its histograms for right and for wrong images."""
    seen = images.only(images.readable)
    places, distance = binned(seen.p_yes, BINS), 0.0
    for number in range(BINS):
        inside = seen.only(places == number)
        ends = {"threshold": number / BINS, "upper": (number + 1) / BINS}
        yield row("calibration", rates.share(inside.right == 1, inside.prompt), **ends)
        yield row("calibration_p_yes", mean(inside.p_yes), **ends)
        if len(inside.p_yes):
            distance += len(inside.p_yes) * abs(inside.right.mean() - inside.p_yes.mean())
    n = len(seen.p_yes)
    yield row("ece", Rate(float(distance / n), n, float(distance)) if n else Rate(None, 0))
    for measure, chosen in (("histogram_right", seen.right == 1), ("histogram_wrong", seen.right == 0)):
        part = seen.only(chosen)
        places = binned(part.p_yes, FINE_BINS)
        for number in range(FINE_BINS):
            ends = {"threshold": number / FINE_BINS, "upper": (number + 1) / FINE_BINS}
            yield row(measure, rates.share(places == number, part.prompt), **ends)


def selection(images: Images, thresholds: Sequence[float], precision: bool) -> Iterator[Row]:
    """Yield what a selection at each threshold would accept. precision: whether an external judge has judged the images."""
    numbers = np.unique(images.prompt)
    for threshold in thresholds:
        accepted = images.p_yes >= threshold  # false for NaN
        yield row("accepted", rates.share(accepted, images.prompt), threshold=threshold)
        yield row("pool", rates.share(~np.isin(numbers, images.prompt[accepted]), numbers), threshold=threshold)
        if precision:
            seen = images.only(accepted & ~np.isnan(images.right))
            yield row("precision", rates.share(seen.right == 1, seen.prompt), threshold=threshold)


def pick(rows: Sequence[Row], measure: str, category: str = OVERALL, reason: str | None = None) -> list[Row]:
    """Return the rows of a measure in their order."""
    return [
        line for line in rows if line["measure"] == measure and line["category"] == category and line.get("reason") == reason
    ]


# Finding: does the accept threshold cut where the model's judge knows something?


@dataclass(frozen=True)
class Finding:
    """What the images near a threshold say. state is one of the keys of STATES."""

    state: str
    threshold: float
    near: Rate
    above: Rate
    below: Rate
    gain: Rate

    def rows(self) -> Iterator[Row]:
        measures = {"near": self.near, "right_above": self.above, "right_below": self.below, "right_gain": self.gain}
        for measure, rate in measures.items():
            yield row(measure, rate, threshold=self.threshold)


STATES = {
    "informative": "informative",
    "uninformative": "NO INFORMATION",
    "few near": "few images near",
    "too few": "too few to tell",
    "only 0 or 1": "p_yes only 0 or 1",
    "nothing": "nothing to compare",
}


def threshold_finding(images: Images, threshold: float) -> Finding:
    """Compare the images whose p_yes is up to WINDOW above a threshold with those up to WINDOW below it.

    few near       at most FEW_NEAR of the images are near. The judge decides clearly, which is good, and the exact threshold
                   hardly matters.
    too few        more are near, but those on one side are of fewer than FEW prompts, or no category has some on both sides.
    informative    the interval of the difference is above 0: a higher p_yes means more right images. Images are compared
                   within categories, since otherwise categories that differ in both p_yes and difficulty could make a
                   difference that no selection among the candidates of one prompt can use.
    uninformative  the interval contains 0 or is below it.
    only 0 or 1    p_yes has no other values, as in score.mode answer, so all thresholds above 0 accept the same images.
    nothing        no image has both a p_yes and a verdict of the external judge.
    """
    seen = images.only(images.readable)
    right, above = seen.right == 1, seen.p_yes >= threshold
    # Rounding makes the distance of p_yes 0.75 from the threshold 0.85 larger than 0.1.
    near = np.abs(seen.p_yes - threshold) <= WINDOW + 1e-9
    sides = near & above, near & ~above
    one, other = (rates.share(right[side], seen.prompt[side]) for side in sides)
    gain = rates.difference(right[near], above[near], seen.prompt[near], seen.category[near])
    share = rates.share(near, seen.prompt)
    if not len(near):
        state = "nothing"
    elif set(np.unique(seen.p_yes)) <= {0.0, 1.0}:
        state = "only 0 or 1"
    elif near.mean() <= FEW_NEAR:
        state = "few near"
    elif min(len(np.unique(seen.prompt[side])) for side in sides) < FEW or gain.low is None:
        state = "too few"
    else:
        state = "informative" if gain.low > 0 else "uninformative"
    return Finding(state, threshold, share, one, other, gain)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def threshold_sentence(finding: Finding) -> str:
    """Return the finding in words."""
    near, above, below, gain = finding.near, finding.above, finding.below, finding.gain
    threshold = f"The accept threshold {finding.threshold:g}"
    if finding.state == "nothing":
        return f"{threshold} cannot be examined, because no image has both a readable p_yes and an external verdict."
    if finding.state == "only 0 or 1":
        return (
            f"{threshold} decides nothing: p_yes is only 0 or 1, as always in score.mode answer, so every threshold above 0 "
            "accepts the same images."
        )
    if finding.state == "few near":
        return (
            f"{threshold} could as well lie a little higher or lower: only {near.numerator} of {near.n} images have a p_yes "
            f"within {WINDOW:g} of it. The judge decides clearly, rightly or wrongly."
        )
    if finding.state == "too few":
        many = min(above.n, below.n) >= FEW and gain.low is not None
        reason = "which are of too few prompts" if many else "which is too few"
        return (
            f"{threshold} cannot be examined: {above.n} images have a p_yes up to {WINDOW:g} above it and {below.n} up to "
            f"{WINDOW:g} below it, {reason} to compare them."
        )
    assert gain.value is not None and gain.low is not None and gain.high is not None
    compared = (
        f"{percent(above.value)} of the {above.n} images up to {WINDOW:g} above it are right, and {percent(below.value)} of "
        f"the {below.n} up to {WINDOW:g} below it. Within categories, the difference is {100 * gain.value:+.0f} points "
        f"({100 * gain.low:+.0f} to {100 * gain.high:+.0f})."
    )
    if finding.state == "informative":
        return f"{threshold} cuts where p_yes carries information: {compared}"
    return f"{threshold} cuts where a higher p_yes is not seen to mean more right images: {compared}"


def listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def blind_sentence(measured: Sequence[Row]) -> str | None:
    """Return a sentence on the categories and reasons for which p_yes does not tell right from wrong images, or None.

    measured: the rows of a set and a checkpoint. A group is named if the interval of its AUC contains 0.5 or ends below
    WEAK, and if it has at least FEW right and FEW wrong images.
    """
    found = []
    counts = {(line["category"], line.get("reason")): line for line in measured if line["measure"] == "right"}
    for line in measured:
        if line["measure"] == "auc" and line["value"] is not None and (line["ci_low"] <= 0.5 or line["ci_high"] <= WEAK):
            counted = counts[line["category"], line.get("reason")]
            right, wrong = int(counted["numerator"]), int(counted["n"] - counted["numerator"])
            if min(right, wrong) >= FEW:
                name = "all images together" if line["category"] == OVERALL else line["category"]
                name = f"errors of {line['reason']}" if line.get("reason") else name
                interval = f"{line['ci_low']:.2f} to {line['ci_high']:.2f}"
                found.append(f"{name} (AUC {line['value']:.2f}, {interval}, {right} right and {wrong} wrong)")
    return f"p_yes hardly tells right images from wrong ones for {listed(found)}." if found else None


def selection_sentence(measured: Sequence[Row], threshold: float) -> str:
    """Return in words what a selection at a threshold would accept."""
    precision, accepted, pool = (
        next(line for line in pick(measured, measure) if line["threshold"] == threshold)
        for measure in ("precision", "accepted", "pool")
    )
    return (
        f"A selection at {threshold:g} accepts {percent(accepted['value'])} of {accepted['n']} images, of which "
        f"{percent(precision['value'])} are right, and leaves {percent(pool['value'])} of {pool['n']} prompts without an "
        "accepted image."
    )


def neither_sentence(measured: Sequence[Row]) -> str | None:
    """Return a sentence if the model often answers neither yes nor no, or None."""
    (dominates,) = pick(measured, "neither_dominates")
    if dominates["value"] is None or dominates["value"] <= FEW_NEITHER:
        return None
    return (
        f"The most probable answer about {percent(dominates['value'])} of {dominates['n']} images is neither yes nor no, so "
        "the question does not suit the model (score.question, score.answer_prefix)."
    )


def findings(judged: Judged, accept: Sequence[float], measured: Sequence[Row]) -> Iterator[Row]:
    """Yield the finding for each accept threshold and category, and the findings and warnings about all images in words."""

    def in_words(measure: str, text: str, threshold: float | None = None) -> Row:
        counted = Rate(None, int(judged.images.readable.sum()))
        return {"category": OVERALL, **row(measure, counted, threshold=threshold, text=text)}

    for threshold in accept:
        by_category = {name: threshold_finding(judged.images.of(name), threshold) for name in judged.categories}
        for category, finding in by_category.items():
            for line in finding.rows():
                yield {"category": category, **line}
        overall = by_category.pop(OVERALL)
        text = threshold_sentence(overall)
        without = [name for name, finding in by_category.items() if finding.state == "uninformative"]
        if without and len(by_category) > 1:
            text += f" Seen alone, {listed(without)} {'shows' if len(without) == 1 else 'show'} no clear difference."
        yield in_words("warning" if overall.state == "uninformative" else "finding", text, threshold)
        yield in_words("finding", selection_sentence(measured, threshold), threshold)
    for warning in (blind_sentence(measured), neither_sentence(measured)):
        if warning:
            yield in_words("warning", warning)


def report(judged: Judged, accept: Sequence[float]) -> list[Row]:
    """Return all rows about a checkpoint's images of one set. accept: the accept thresholds of the configuration."""
    thresholds = sorted({*STEPS, *accept})
    measured: list[Row] = []
    for category in judged.categories:
        images = judged.images.of(category)
        found = [*selection(images, thresholds, judged.judge is not None)]
        if judged.judge is not None:
            found += [*separation(images), *verdicts(images), *calibration(images)]
            wrong = images.reason[images.right == 0]
            for reason in sorted(set(wrong) - {""}) if category == OVERALL else []:
                found += separation(images, reason)
        measured += [{"category": category, **line} for line in found]
    if judged.judge is not None:
        measured += findings(judged, accept, measured)
    common = {"set": judged.set, "checkpoint": judged.checkpoint, "judge": judged.judge}
    return [common | line for line in measured]


# Printing


def with_count(rows: Sequence[Row], measure: str) -> str:
    """Return a share with its interval and the number behind it, as text."""
    (line,) = pick(rows, measure)
    if line["value"] is None:
        return f"- (n {line['n']})"
    return f"{100 * line['value']:.1f} ({100 * line['ci_low']:.1f} to {100 * line['ci_high']:.1f}, n {line['n']})"


def table(parts: dict[str, list[Row]], states: dict[str, str]) -> str:
    """Return a table with a line for each checkpoint. parts: the rows of each. states: the finding of each in a few words."""
    shown = ("accuracy", "false_acceptance", "false_refusal")
    lines = [["", "auc", "ece", *shown, "accept threshold"]]
    for checkpoint, rows in parts.items():
        (area,), (error,) = pick(rows, "auc"), pick(rows, "ece")
        curve = "-" if area["value"] is None else f"{area['value']:.3f} ({area['ci_low']:.3f} to {area['ci_high']:.3f})"
        missed = "-" if error["value"] is None else f"{error['value']:.3f}"
        lines.append([checkpoint, curve, missed, *(with_count(rows, name) for name in shown), states[checkpoint]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def sentences(rows: Sequence[Row]) -> list[str]:
    """Return the findings in words, marked where they are warnings."""
    return [
        ("Warning: " if line["measure"] == "warning" else "") + line["text"]
        for line in rows
        if line["measure"] in ("finding", "warning")
    ]


# The picture

INK, QUIET, GOOD, BAD = "#1c1c1e", "#8e8e93", "#1a9850", "#d73027"
NOTE = 8  # font size of legends and labels


def draw_roc(axis: Any, rows: Sequence[Row], categories: Sequence[str]) -> None:
    """Draw the ROC curve of all images and of each category."""
    axis.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
    for number, category in enumerate([*categories, OVERALL]):
        x, y = ([line["value"] for line in pick(rows, name, category)] for name in ("roc_wrong", "roc_right"))
        (area,) = pick(rows, "auc", category)
        if area["value"] is not None:
            style = {"color": INK, "linewidth": 2.5} if category == OVERALL else {"color": f"C{number}", "linewidth": 1.2}
            axis.plot([1, *x, 0], [1, *y, 0], label=f"{category} {area['value']:.2f}", **style)
    axis.set(xlabel="share of wrong images at or above a p_yes", ylabel="share of right images", title="ROC of p_yes, with AUC")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=NOTE, frameon=False, loc="lower right")


def draw_auc(axis: Any, parts: dict[str, list[Row]], categories: Sequence[str]) -> None:
    """Draw the AUC of each category and each reason: the first checkpoint with its interval, the others as small points."""
    first, *others = parts.values()
    reasons = list(dict.fromkeys(line["reason"] for line in first if line.get("reason")))
    groups = [*((name, None) for name in [OVERALL, *categories]), *((OVERALL, reason) for reason in reasons)]
    labels = []
    for place, (category, reason) in enumerate(groups):
        for rows in others:
            for line in pick(rows, "auc", category, reason):
                if line["value"] is not None:
                    axis.plot(line["value"], place, "o", color=QUIET, markersize=3)
        (line,), (right,) = (pick(first, measure, category, reason) for measure in ("auc", "right"))
        if line["value"] is not None:
            axis.plot([line["ci_low"], line["ci_high"]], [place] * 2, color=INK, linewidth=1.5)
            axis.plot(line["value"], place, "o", color=BAD if reason else INK, markersize=5)
        name = f"error: {reason}" if reason else category
        labels.append(f"{name}  {right['numerator']:.0f} | {right['n'] - right['numerator']:.0f}")
    axis.axvline(0.5, color=QUIET, linewidth=1, linestyle=":")
    if reasons:
        axis.axhline(len(categories) + 0.5, color=QUIET, linewidth=0.8)
    axis.set_yticks(range(len(groups)), labels, fontsize=NOTE)
    axis.invert_yaxis()
    axis.set(title="AUC, with numbers right | wrong", xlabel="AUC (0.5 is chance)" + (", grey: the arms" if others else ""))


def draw_calibration(axis: Any, parts: dict[str, list[Row]]) -> None:
    """Draw the share of right images by p_yes: the first checkpoint with intervals and numbers, the others as lines."""
    axis.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
    for number, (checkpoint, rows) in enumerate(parts.items()):
        measured = zip(pick(rows, "calibration_p_yes"), pick(rows, "calibration"), strict=True)
        bins = [(x["value"], y) for x, y in measured if x["value"] is not None and y["value"] is not None]
        (error,) = pick(rows, "ece")
        if not bins:
            continue
        x, y = [x for x, _ in bins], [line["value"] for _, line in bins]
        label = f"{checkpoint} {error['value']:.3f}"
        if number:
            axis.plot(x, y, color=f"C{number}", linewidth=1, label=label)
            continue
        axis.plot(x, y, "o-", color=INK, markersize=4, label=label)
        for place, line in bins:
            few = line["n"] < FEW
            style = {"color": QUIET if few else INK, "linewidth": 0.7 if few else 1.3}
            axis.plot([place] * 2, [line["ci_low"], line["ci_high"]], zorder=0 if few else 2, **style)
            note = {"fontsize": NOTE - 1, "color": QUIET, "textcoords": "offset points"}
            axis.annotate(str(line["n"]), (place, line["value"]), xytext=(3, -9), **note)
    axis.set(xlabel="mean p_yes of a bin", ylabel="share of right images", title="Calibration, with ECE")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=NOTE, frameon=False, loc="upper left")


def draw_histogram(axis: Any, rows: Sequence[Row], accept: Sequence[float]) -> None:
    """Draw the numbers of right and of wrong images by p_yes, and what is near the accept threshold."""
    for threshold in accept:
        axis.axvspan(threshold - WINDOW, threshold + WINDOW, color="#f2f2f7")
        axis.axvline(threshold, color=INK, linewidth=1)
    for measure, color, sign, name in (("histogram_right", GOOD, 1, "right"), ("histogram_wrong", BAD, -1, "wrong")):
        lines = pick(rows, measure)
        heights = [sign * line["numerator"] for line in lines]
        axis.bar([line["threshold"] for line in lines], heights, 1 / FINE_BINS, align="edge", color=color)
        axis.annotate(f"{name}, n {lines[0]['n']}", (0.3, 0.93 if sign > 0 else 0.04), xycoords="axes fraction", color=color)
    axis.axhline(0, color=INK, linewidth=0.8)
    axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    axis.set(
        xlim=(0, 1),
        xlabel="p_yes (grey: near the accept threshold)",
        ylabel="images",
        title="p_yes of right and of wrong images",
    )


def draw_selection(axis: Any, rows: Sequence[Row], training: Sequence[Row], accept: Sequence[float]) -> None:
    """Draw precision, accepted share and pool by threshold; for the training candidates the pool, and precision if known."""
    for threshold in accept:
        axis.axvline(threshold, color=INK, linewidth=1)
    for part, style, whose in ((rows, "-", ""), (training, "--", ", training prompts")):
        for measure, color in (("precision", GOOD), ("accepted", QUIET), ("pool", BAD)):
            lines = [line for line in pick(part, measure) if line["value"] is not None]
            if not lines or (whose and measure == "accepted"):
                continue
            x, y = [line["threshold"] for line in lines], [line["value"] for line in lines]
            axis.plot(x, y, style, color=color, linewidth=1.5, label=f"{measure}{whose}")
            if not whose:
                low, high = ([line[end] for line in lines] for end in ("ci_low", "ci_high"))
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set(xlim=(0, 1), ylim=(0, 1.25), xlabel="threshold of p_yes", ylabel="share", title="What a threshold would select")
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axis.legend(fontsize=NOTE, frameon=False, loc="upper left", ncols=2)


def draw_rates(axis: Any, parts: dict[str, list[Row]]) -> None:
    """Draw accuracy, false acceptance and false refusal of each checkpoint with their intervals and numbers."""
    measures = (("accuracy", INK), ("false_acceptance", BAD), ("false_refusal", "#4575b4"))
    for place, rows in enumerate(parts.values()):
        for number, (measure, color) in enumerate(measures):
            (line,) = pick(rows, measure)
            height = place + 0.24 * (number - 1)
            label = measure.replace("_", " ") if place == 0 else None
            if line["value"] is not None:
                axis.plot([line["ci_low"], line["ci_high"]], [height] * 2, color=color, linewidth=1.5)
                axis.plot(line["value"], height, "o", color=color, markersize=4, label=label)
                note = f"n {line['n']}"
                axis.annotate(note, (line["ci_high"] + 0.02, height), fontsize=NOTE - 1, va="center", color=QUIET)
    axis.set_yticks(range(len(parts)), list(parts), fontsize=NOTE)
    axis.set_ylim(len(parts) - 0.5, -0.9)
    axis.set(xlim=(0, 1.1), xlabel="share, 95 % interval", title="The model's own verdicts")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=NOTE, frameon=False, loc="upper center", ncols=3, columnspacing=1)


def plot(reports: Sequence[tuple[Judged, list[Row]]], accept: Sequence[float], out: Path) -> None:
    """Draw a block of six panels for each judged set, with its findings in words. The first checkpoint of a set is in front."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(dict.fromkeys(judged.set for judged, _ in reports if judged.judge is not None))
    training = next((rows for judged, rows in reports if judged.set == "train"), [])
    figure = Figure(figsize=(15, 9.6 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    blocks = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for name, block in zip(shown, blocks, strict=True):
        members = [(judged, rows) for judged, rows in reports if judged.set == name]
        parts = {judged.checkpoint: rows for judged, rows in members}
        front, rows = members[0]
        wrapped = [textwrap.fill(sentence, 150) for sentence in sentences(rows)]
        title = f"{name}: the judge of {front.checkpoint} against {front.judge} ({len(front.images.prompt)} images)"
        block.suptitle("\n".join([title, *wrapped]), x=0.01, ha="left", fontsize=11)
        axes = block.subplots(2, 3)
        draw_histogram(axes[0, 0], rows, accept)
        draw_roc(axes[0, 1], rows, front.categories[1:])
        draw_auc(axes[0, 2], parts, front.categories[1:])
        draw_selection(axes[1, 0], rows, training if name != "train" else [], accept)
        draw_calibration(axes[1, 1], parts)
        draw_rates(axes[1, 2], parts)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=NOTE)
            axis.title.set_fontsize(11)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


# The command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    several: Any = {"action": "append", "nargs": "+", "default": []}
    parser.add_argument("--prompts", metavar=("SET", "FILE"), required=True, help="a set and its prompt manifest", **several)
    parser.add_argument(
        "--scores",
        metavar=("SET CHECKPOINT", "FILE"),
        required=True,
        help="a set, a checkpoint, and the checkpoint's scores of its own images",
        **several,
    )
    parser.add_argument(
        "--verdicts", metavar=("SET CHECKPOINT", "FILE"), help="the same with verdicts of the external judge", **several
    )
    parser.add_argument("--out", type=Path, required=True, help="judge report (Parquet)")
    parser.add_argument("--plot", type=Path, required=True, help="judge report (PNG)")
    return parser.parse_args()


def grouped(option: str, given: Sequence[Sequence[str]], names: int) -> dict[tuple[str, ...], list[Path]]:
    """Return the files of an option by the names before them. Raises UserError where a name or the files are missing."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for words in given:
        if len(words) <= names:
            raise UserError(f"{option} {' '.join(words)}: give {'a set' if names == 1 else 'a set, a checkpoint'} and files")
        found.setdefault(tuple(words[:names]), []).extend(map(Path, words[names:]))
    return found


def external_judge(config: Config, name: str) -> str | None:
    """Return the external judge of a set. The training candidates have that of the first benchmark that has one."""
    if name == "train":
        return next((benchmark.judge for benchmark in config.benchmarks.values() if benchmark.judge), None)
    if name not in config.benchmarks:
        raise UserError(f"--scores {name}: not train, and not in the section benchmarks: {', '.join(config.benchmarks)}")
    return config.benchmarks[name].judge


def main() -> None:
    arguments = parse()
    config = load(arguments.config)
    accept = config.accept_thresholds()
    prompts = grouped("--prompts", arguments.prompts, 1)
    scores, verdict_files = (grouped(f"--{name}", getattr(arguments, name), 2) for name in ("scores", "verdicts"))
    if unused := sorted(verdict_files.keys() - scores.keys()):
        raise UserError(f"--verdicts {' '.join(unused[0])}: there is no --scores of this set and checkpoint; give it, too")

    reports: list[tuple[Judged, list[Row]]] = []
    for (name, checkpoint), paths in scores.items():
        if (name,) not in prompts:
            raise UserError(f"--prompts: none for the set {name} of --scores; give its prompt manifest")
        files = verdict_files.get((name, checkpoint), [])
        judge = external_judge(config, name) if files else None
        judged = Judged(name, checkpoint, judge, read(f"{name} {checkpoint}", prompts[(name,)][0], paths, files, judge))
        reports.append((judged, report(judged, accept)))
    if not any(judged.judge for judged, _ in reports):
        raise UserError("--verdicts: none is of a judge of the section benchmarks; name a judge there and judge the images")

    parents = [path for files in (prompts, scores, verdict_files) for paths in files.values() for path in paths]
    lines = [{"run": config.run, **line} for _, rows in reports for line in rows]
    facts = {"accept_thresholds": accept}
    manifests.write(arguments.out, "judge_report", lines, stage="stages.judge_report", settings=facts, parents=parents)
    plot(reports, accept, arguments.plot)
    for name in dict.fromkeys(judged.set for judged, _ in reports if judged.judge):
        members = [(judged, rows) for judged, rows in reports if judged.set == name]
        found = {
            judged.checkpoint: ", ".join(STATES[threshold_finding(judged.images, threshold).state] for threshold in accept)
            for judged, _ in members
        }
        front, rows = members[0]
        print(f"Judge report of {name}: the model's own judge against {front.judge}, with 95 % intervals.")
        print("auc and ece are between 0 and 1; the shares are percentages.")
        print(table({judged.checkpoint: lines for judged, lines in members}, found))
        for sentence in sentences(rows):
            print(textwrap.fill(f"{front.checkpoint}: {sentence}", 120))


if __name__ == "__main__":
    run_stage(main)
