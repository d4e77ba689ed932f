"""What the terms say: every measure with its interval.

    python -m stages.dynamics.claims --config config.yaml --dynamics results/tiny-janus/dynamics --followed sft \\
        --scores base/scores/validation/*.parquet --scores-of-base sft sft/scores-of-base/validation/*.parquet \\
        --verdicts base/verdicts/shapes/validation/*.parquet --metrics base/metrics/validation.parquet --out claims.parquet

Reads what the other commands have written to the folder of the run's dynamics: for the checkpoints --nodes, for the arms
--followed, and in as many pieces as dynamics.shards says. What is left there of other ones is not read. Claims for which
something is missing are left out. With --proxies, it takes only what a model of any size can afford (similarities, compressed
gradients), even where there is more. No model is loaded. The claims:

step          predicted against measured after one step: `slope` of measured on predicted through zero (1 if the first order is
              right), `error` (length of the difference by that of the prediction) by size, and `order`: by which power of the
              size the difference falls, over the three smallest sizes (2 if only the second order is missing).
              `adamw_by_sgd`: correlation of what a step of gradient descent is predicted to do with what AdamW's step did
path          the same for a whole training: `slope` and `explained` (squared correlation over probes) of the summed first-order
              terms, and of the first-order term at the base model (from_base)
gain          of Gen. by category, in points. `measured` is that of the benchmark. `measured_on_probes` weighs the base model's
              images by how their likelihood changed: the mean of (right - mean right) exp(change) is the gain exactly, up to
              chance in the images, where images are drawn without guidance at temperature 1; `effective_images` is the
              number of equally weighed images that would be as good, (sum of weights)^2 by the sum of their squares.
              `first_order` has the summed first-order change in place of exp(change)
judging       of the answering branch on the base model's images by category, in points: share of verdicts that the external
              judge confirms, after minus before, with measured log odds and with those that the summed first-order terms
              predict; overall is the mean over categories
signs         share of pairs of a probe and a training row in which two terms have the same sign (`same`), and the share that
              independent signs of the same frequencies would have (`chance`)
category      mean term for training rows of the probe's own category (`own`), of others (`other`), and the difference
pair          mean term of every category's probes (first) for every category's training rows (second), objective sft
judges        the posterior over alternative prompts against the branch that answers: area under the ROC curve of each for the
              external judge's verdict, rank correlation, share of equal verdicts; `moved`: correlation over training rows of
              their mean effect on both, and over probes of what training did to both
rows          per training row: `gen`, its effect on Gen. (mean over probes of (right - mean right) times Delta G), and `judge`,
              that on the answering branch (mean Delta J, counted negative for wrong images), and `size`, the mean of |Delta G|;
              for right, wrong (falsely accepted) and replayed rows, and differences
corrections   false-positive corrections (judge no, before yes, after no), other images (`random`) and false positives that stay
              (`kept`): similarity of the prompt to the nearest training prompt, and of the image to the image of that pair
proxies       rank correlation over pairs of probes of a similarity with the cosine of their gradients, with the same category
              left in (`all`) and within a category (`within`)
kernel        per checkpoint: mean trace of the kernel between logits, effective rank (squared trace by squared norm), and mean
              alignment (trace by the root of the traces) of pairs of one category and of two
density       of Delta G over pairs of a probe and a training row with the trained loss, and (kernel) over pairs of two probes
              with the summed loss of the paper: quantiles and share above zero
sketch        estimates from compressed gradients against the exact Delta G over pairs

The group `compressed` has estimates from compressed gradients in the place of exact terms, for density, and with --proxies also
for category, pair, rows and proxies. Their `beyond_noise` is the share of pairs whose estimate is more than twice as large as
the standard deviation of its error, of which independent errors alone would give five percent.

Intervals are 95 %: 1,000 resamples of prompts with their probes, and of training rows where there are any, both at once. Where
pairs are of two probes (kernel), one resample of prompts draws both of them. There is no interval where all resamples agree, as
they do where a share is 0 or 1.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.seeds import hash_seed
from stages.dynamics.items import similarity

Row = dict[str, Any]
ROUNDS = 1000
TERMS = ("delta_g", "delta_u", "delta_j")
COMPRESSED = "compressed"  # the group of what is estimated from compressed gradients at the base model


@dataclass(frozen=True)
class Found:
    """One measure; see the columns of the manifest `dynamics_claims`."""

    claim: str
    group: str
    measure: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int


def plain(claim: str, group: str, measure: str, value: float, n: int) -> Found:
    """Return a measure without an interval; empty if it is not a finite number."""
    return Found(claim, group, measure, float(value) if np.isfinite(value) else None, None, None, n)


def interval(claim: str, group: str, measure: str, numbers: np.ndarray, n: int) -> Found:
    """Return a measure with its interval. numbers: the value itself, then those of the resamples."""
    known = numbers[1:][np.isfinite(numbers[1:])]
    if not np.isfinite(numbers[0]) or len(known) < ROUNDS / 2:
        return plain(claim, group, measure, numbers[0], n)
    low, high = np.quantile(known, [0.025, 0.975])
    if high - low <= 1e-12 * max(1.0, abs(numbers[0])):  # all resamples are equal, which says nothing about other samples
        return plain(claim, group, measure, numbers[0], n)
    return Found(claim, group, measure, float(numbers[0]), float(low), float(high), n)


def weights(clusters: Sequence[str], *seed: object) -> np.ndarray:
    """Return how often each item is drawn, `[1 + ROUNDS, n]`: once in the first row, then as resamples of clusters draw it."""
    labels, places = np.unique(np.asarray(clusters), return_inverse=True)
    generator = np.random.default_rng(hash_seed("dynamics claims", len(clusters), *seed))
    drawn = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=ROUNDS)
    return np.concatenate([np.ones((1, len(labels))), drawn])[:, places]


def resampled(claim: str, group: str, measure: str, statistic: Callable[..., float], clusters: Sequence[str]) -> Found:
    """Return a statistic of items with its interval. statistic: takes the indices of items, repeated as they are drawn."""
    if not len(clusters):
        return Found(claim, group, measure, None, None, None, 0)
    every = np.arange(len(clusters))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample may lack a group, and its value is then left out
        drawn = weights(clusters, claim, group, measure).astype(int)
        numbers = np.array([statistic(np.repeat(every, counts)) for counts in drawn], dtype=float)
    return interval(claim, group, measure, numbers, len(clusters))


def slope(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Return the slope of measured on predicted through zero."""
    return float(predicted @ measured / (predicted @ predicted))


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first, second)[0, 1]) if len(first) > 2 and first.std() and second.std() else float("nan")


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import rankdata

    return correlation(rankdata(first), rankdata(second))


def area(scores: np.ndarray, right: np.ndarray) -> float:
    """Return the area under the ROC curve; a tie counts as half."""
    from scipy.stats import rankdata

    positive, negative = right.sum(), (~right).sum()
    if not positive or not negative:
        return float("nan")
    return float((rankdata(scores)[right].sum() - positive * (positive + 1) / 2) / (positive * negative))


class Pairs:
    """Pairs of a probe and a training row, with resamples of both at once. A result has an entry for each resample.

    Where the rows are probes themselves, a resample draws each prompt as often on one side of the pairs as on the other.
    """

    def __init__(self, probes: Sequence[Row], rows: Sequence[Row]) -> None:
        self.shape = (len(probes), len(rows))
        if all("row_id" in row for row in rows):
            self.left = weights([probe["prompt_id"] for probe in probes], "probes")
            self.right = weights([row["row_id"] for row in rows], "rows")
        else:
            both = weights([probe["prompt_id"] for probe in (*probes, *rows)], "probes")
            self.left, self.right = both[:, : len(probes)], both[:, len(probes) :]

    def mean(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the mean of values `[probes, rows]` over the pairs of a mask, `[1 + ROUNDS]`."""
        mask = np.ones(self.shape) if mask is None else np.broadcast_to(mask, self.shape).astype(float)
        with np.errstate(all="ignore"):
            return ((self.left @ (values * mask)) * self.right).sum(1) / ((self.left @ mask) * self.right).sum(1)

    def correlation(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the correlation of two values over pairs, `[1 + ROUNDS]`."""
        one, two = self.mean(first), self.mean(second)
        spread = (self.mean(first**2) - one**2) * (self.mean(second**2) - two**2)
        return (self.mean(first * second) - one * two) / np.sqrt(np.maximum(spread, 1e-300))

    def correlation_of_rows(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Return the correlation over rows of the means over probes of two values, `[1 + ROUNDS]`."""
        total = self.left.sum(1, keepdims=True)
        one, two, share = self.left @ first / total, self.left @ second / total, self.right / self.right.sum(1, keepdims=True)
        one, two = one - (share * one).sum(1, keepdims=True), two - (share * two).sum(1, keepdims=True)
        spread = (share * one**2).sum(1) * (share * two**2).sum(1)
        return (share * one * two).sum(1) / np.sqrt(np.maximum(spread, 1e-300))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass
class Terms:
    """Terms at one checkpoint as matrices [probes, rows], for one objective and all parameters. probes, rows: in that order."""

    probes: list[Row]
    rows: list[Row]
    values: dict[str, np.ndarray]


def read_terms(files: Sequence[Path], probes: dict[str, Row], rows: dict[str, Row], subset: str = "all") -> dict[str, Terms]:
    """Return the terms of a checkpoint by objective: sft, dpo and kernel."""
    import pandas

    table = pandas.concat([manifests.read(path, "dynamics_terms").to_pandas() for path in files])
    table = table[table.subset == subset]
    found = {}
    for objective, part in table.groupby("objective"):
        known = probes if objective == "kernel" else rows
        grids = {term: part.pivot(index="candidate_id", columns="row_id", values=term) for term in TERMS}
        first = grids["delta_g"]
        numbers = {term: grid.to_numpy(dtype=float) for term, grid in grids.items() if grid.notna().all(axis=None)}
        found[str(objective)] = Terms([probes[name] for name in first.index], [known[name] for name in first.columns], numbers)
    return found


def matching(rows: Sequence[Row], **wanted: Any) -> np.ndarray:
    """Return a mask of the rows with these values."""
    return np.array([all(row[key] == value for key, value in wanted.items()) for row in rows], dtype=bool)


# --- claims ----------------------------------------------------------------------------------------------------------


def prompts_of(names: Sequence[str], probes: dict[str, Row]) -> list[str]:
    return [probes[name]["prompt_id"] for name in names]


def step_claims(path: Path, probes: dict[str, Row]) -> list[Found]:
    table = manifests.read(path, "dynamics_steps").to_pandas()
    found: list[Found] = []
    for (objective, optimizer, quantity), part in table.groupby(["objective", "optimizer", "quantity"]):
        group, errors = f"{objective}, {optimizer}, {quantity}", {}
        for size, at in part.groupby("size"):
            p, m, named = at.predicted.to_numpy(), at.measured.to_numpy(), f"{group}, size {size:g}"
            errors[size] = float(np.linalg.norm(m - p))
            clusters = prompts_of(at.candidate_id, probes)
            found.append(resampled("step", named, "slope", lambda i, p=p, m=m: slope(p[i], m[i]), clusters))
            found.append(plain("step", named, "error", errors[size] / float(np.linalg.norm(p)), len(p)))
        sizes = sorted(errors)[:3]
        if len(sizes) > 1 and all(errors[size] > 0 for size in sizes):
            order = np.polyfit(np.log(sizes), np.log([errors[size] for size in sizes]), 1)[0]
            found.append(plain("step", group, "order", order, len(sizes)))
    for (objective, quantity), part in table[table["size"] == 1].groupby(["objective", "quantity"]):
        if {"sgd", "adamw"} <= set(part.optimizer):
            grid = part.pivot(index="candidate_id", columns="optimizer", values=["predicted", "measured"])
            p, m, group = grid["predicted"]["sgd"].to_numpy(), grid["measured"]["adamw"].to_numpy(), f"{objective}, {quantity}"
            clusters = prompts_of(grid.index, probes)
            found.append(resampled("step", group, "adamw_by_sgd", lambda i, p=p, m=m: correlation(p[i], m[i]), clusters))
    return found


def path_claims(path: Path, probes: dict[str, Row], values: dict[str, Row], metrics: list[Row]) -> list[Found]:
    table = manifests.read(path, "dynamics_path").to_pandas()
    arm, last = path.stem, table.epoch.max()
    found: list[Found] = []
    for (epoch, quantity), part in table.groupby(["epoch", "quantity"]):
        clusters = prompts_of(part.candidate_id, probes)
        for name in ("summed", "from_base"):
            p, m, group = part[name].to_numpy(), part.measured.to_numpy(), f"{arm}, {quantity}, epoch {epoch}, {name}"
            found.append(resampled("path", group, "slope", lambda i, p=p, m=m: slope(p[i], m[i]), clusters))
            found.append(resampled("path", group, "explained", lambda i, p=p, m=m: correlation(p[i], m[i]) ** 2, clusters))
    end = table[table.epoch == last]
    found += gain_claims(arm, end[end.quantity == "g"], probes, metrics)
    found += judging_claims(arm, end[end.quantity == "j"], probes, values)
    grid = end.pivot(index="candidate_id", columns="quantity", values="measured").dropna()
    if {"u", "j"} <= set(grid.columns):
        u, j, clusters = grid["u"].to_numpy(), grid["j"].to_numpy(), prompts_of(grid.index, probes)
        found.append(resampled("judges", f"{arm}, training", "moved", lambda i: correlation(u[i], j[i]), clusters))
    return found


def gain_of(right: np.ndarray, factor: np.ndarray, categories: np.ndarray) -> float:
    """Return 100 times the mean over categories of the mean of (right - mean right) times a factor."""
    parts = [categories == name for name in np.unique(categories)]
    return 100 * float(np.mean([((right[part] - right[part].mean()) * factor[part]).mean() for part in parts]))


def gain_claims(arm: str, table: Any, probes: dict[str, Row], metrics: list[Row]) -> list[Found]:
    """Return the gain of Gen. in points, by category and overall (the mean over categories)."""
    rows = [row for row in table.to_dict("records") if probes[row["candidate_id"]]["right"] is not None]
    mine = [probes[row["candidate_id"]] for row in rows]
    right = np.array([float(probe["right"]) for probe in mine])
    categories = np.array([probe["category"] for probe in mine])
    clusters = np.array([probe["prompt_id"] for probe in mine])
    factors = {"first_order": np.array([row["summed"] for row in rows]),
               "measured_on_probes": np.exp([row["measured"] for row in rows])}  # fmt: skip
    found: list[Found] = []
    for name in ["overall", *np.unique(categories)]:
        part = np.ones(len(rows), dtype=bool) if name == "overall" else categories == name
        for measure, factor in factors.items():
            arrays = (right[part], factor[part], categories[part])
            statistic = lambda i, arrays=arrays: gain_of(*(array[i] for array in arrays))  # noqa: E731
            found.append(resampled("gain", f"{arm}, {name}", measure, statistic, clusters[part]))
        factor = factors["measured_on_probes"][part]
        effective = factor.sum() ** 2 / (factor**2).sum() if len(factor) else 0.0
        found.append(plain("gain", f"{arm}, {name}", "effective_images", effective, len(factor)))
    for row in metrics:
        if row["arm"] == arm and row["metric"] == "gen":
            bounds = (row["delta"], row["delta_ci_low"], row["delta_ci_high"])
            found.append(Found("gain", f"{arm}, {row['category']}", "measured", *bounds, row["denominator"]))
    return found


def mean_of_categories(values: np.ndarray, categories: np.ndarray) -> float:
    return float(np.mean([values[categories == name].mean() for name in np.unique(categories)]))


def judging_claims(arm: str, table: Any, probes: dict[str, Row], values: dict[str, Row]) -> list[Found]:
    """Return how often the answering branch is right before and after training, by category and overall."""
    rows = [row for row in table.to_dict("records") if probes[row["candidate_id"]]["right"] is not None]
    rows = [row for row in rows if row["candidate_id"] in values]
    mine = [probes[row["candidate_id"]] for row in rows]
    clusters, categories = (np.array([probe[key] for probe in mine]) for key in ("prompt_id", "category"))
    right = np.array([probe["right"] for probe in mine], dtype=bool)
    before = np.array([values[row["candidate_id"]]["log_odds"] for row in rows], dtype=float)
    first, change = (np.array([row[name] for row in rows], dtype=float) for name in ("summed", "measured"))
    agrees = {name: (odds > 0) == right for name, odds in (("", before), ("f", before + first), ("m", before + change))}
    gains = {
        "before": 100.0 * agrees[""],
        "measured": 100.0 * agrees["m"] - 100.0 * agrees[""],
        "first_order": 100.0 * agrees["f"] - 100.0 * agrees[""],
        "verdicts_foretold": 100.0 * (agrees["f"] == agrees["m"]),
    }
    found: list[Found] = []
    for name in ["overall", *np.unique(categories)]:
        part = np.ones(len(rows), dtype=bool) if name == "overall" else categories == name
        for measure, each in gains.items():
            arrays = (each[part], categories[part])
            statistic = lambda i, arrays=arrays: mean_of_categories(*(array[i] for array in arrays))  # noqa: E731
            found.append(resampled("judging", f"{arm}, {name}", measure, statistic, clusters[part]))
    return found


def same_category(of: Terms) -> np.ndarray:
    return np.array([[probe["category"] == row["category"] for row in of.rows] for probe in of.probes], dtype=bool)


def sign_claims(node: str, terms: dict[str, Terms]) -> list[Found]:
    found: list[Found] = []
    for objective, of in terms.items():
        if objective == "kernel":
            continue
        pairs, own = Pairs(of.probes, of.rows), same_category(of)
        right, wrong = (matching(of.probes, right=value)[:, None] for value in (True, False))
        large = np.abs(of.values["delta_g"]) > np.median(np.abs(of.values["delta_g"]))
        masks = {"all": np.ones(pairs.shape, dtype=bool), "own category": own, "other category": ~own,
                 "right images": right, "wrong images": wrong, "large": large, "small": ~large}  # fmt: skip
        for first, second in combinations(of.values, 2):
            one, two = of.values[first] > 0, of.values[second] > 0
            for name, mask in masks.items():
                group, n = (
                    f"{node}, {objective}, {first[-1]} and {second[-1]}, {name}",
                    int(np.broadcast_to(mask, pairs.shape).sum()),
                )
                same, p, q = (pairs.mean(values.astype(float), mask) for values in (one == two, one, two))
                found.append(interval("signs", group, "same", same, n))
                found.append(interval("signs", group, "more_than_chance", same - p * q - (1 - p) * (1 - q), n))
    return found


def category_claims(node: str, terms: dict[str, Terms]) -> list[Found]:
    found: list[Found] = []
    for objective, of in terms.items():
        pairs, own = Pairs(of.probes, of.rows), same_category(of)
        others = np.array([[probe is not row for row in of.rows] for probe in of.probes])  # a probe with itself says nothing
        for term, values in of.values.items():
            group, n = f"{node}, {objective}, {term[-1]}", int(others.sum())
            mine, theirs = pairs.mean(values, own & others), pairs.mean(values, ~own)
            for measure, numbers in (("own", mine), ("other", theirs), ("difference", mine - theirs)):
                found.append(interval("category", group, measure, numbers, n))
        if objective == "sft":
            names = sorted({probe["category"] for probe in of.probes})
            for first, second in product(names, names):
                part = of.values["delta_g"][np.ix_(matching(of.probes, category=first), matching(of.rows, category=second))]
                if part.size:
                    found.append(plain("pair", f"{node}, {first}, {second}", "g", part.mean(), part.size))
    return found


def judge_claims(node: str, terms: dict[str, Terms], values: dict[str, Row]) -> list[Found]:
    found: list[Found] = []
    of = next(iter(terms.values()))
    mine = [(probe, values[probe["candidate_id"]]) for probe in of.probes]
    mine = [(probe, row) for probe, row in mine if row["log_odds"] is not None]
    clusters = [probe["prompt_id"] for probe, _ in mine]
    posterior, odds = (np.array([row[name] for _, row in mine]) for name in ("posterior", "log_odds"))
    first = np.array([row["weights"][0] >= max(row["weights"]) for _, row in mine], dtype=bool)
    found.append(resampled("judges", node, "rank_correlation", lambda i: rank_correlation(posterior[i], odds[i]), clusters))
    found.append(resampled("judges", node, "equal_verdicts", lambda i: float((first == (odds > 0))[i].mean()), clusters))
    if mine and all(probe["right"] is not None for probe, _ in mine):
        right = np.array([probe["right"] for probe, _ in mine], dtype=bool)
        for name, scores, verdict in (("posterior", posterior, first), ("log_odds", odds, odds > 0)):
            group = f"{node}, {name}"
            found.append(resampled("judges", group, "auc", lambda i, s=scores: area(s[i], right[i]), clusters))
            found.append(resampled("judges", group, "accuracy", lambda i, v=verdict: float((v == right)[i].mean()), clusters))
    for objective, part in terms.items():
        if objective != "kernel" and "delta_j" in part.values:
            pairs, one, two = Pairs(part.probes, part.rows), part.values["delta_u"], part.values["delta_j"]
            group, n = f"{node}, {objective}", len(part.rows)
            found.append(interval("judges", f"{group}, rows", "moved", pairs.correlation_of_rows(one, two), n))
            found.append(interval("judges", f"{group}, pairs", "moved", pairs.correlation(one, two), one.size))
    return found


def row_claims(node: str, terms: dict[str, Terms]) -> list[Found]:
    found: list[Found] = []
    for objective, of in terms.items():
        if objective == "kernel" or any(probe["right"] is None for probe in of.probes):
            continue
        pairs, right = Pairs(of.probes, of.rows), np.array([float(probe["right"]) for probe in of.probes])
        categories = np.array([probe["category"] for probe in of.probes])
        means = np.array([right[categories == name].mean() for name in categories])
        effects = {"gen": (right - means)[:, None] * of.values["delta_g"], "size": np.abs(of.values["delta_g"])}
        if "delta_j" in of.values:
            effects["judge"] = np.where(right > 0.5, 1.0, -1.0)[:, None] * of.values["delta_j"]
        replayed = np.array([row["round"] > 0 for row in of.rows])
        groups = {"right": matching(of.rows, right=True) & ~replayed, "wrong": matching(of.rows, right=False) & ~replayed,
                  "replayed": replayed, "first round": ~replayed}  # fmt: skip
        for measure, values in effects.items():
            numbers = {name: pairs.mean(values, mask[None]) for name, mask in groups.items() if mask.any()}
            for name, mean in numbers.items():
                found.append(interval("rows", f"{node}, {objective}, {name}", measure, mean, int(groups[name].sum())))
            for one, two in (("wrong", "right"), ("replayed", "first round")):
                if one in numbers and two in numbers:
                    group, n = f"{node}, {objective}, {one} minus {two}", int(groups[one].sum())
                    found.append(interval("rows", group, measure, numbers[one] - numbers[two], n))
    return found


def density_claims(node: str, terms: dict[str, Terms]) -> list[Found]:
    found: list[Found] = []
    for objective, of in terms.items():
        others = np.array([[probe is not row for row in of.rows] for probe in of.probes])
        values, group = of.values["delta_g"][others], f"{node}, {objective}"
        for share in (0.05, 0.25, 0.5, 0.75, 0.95):
            found.append(plain("density", group, f"quantile {share:g}", np.quantile(values, share), len(values)))
        above = Pairs(of.probes, of.rows).mean((of.values["delta_g"] > 0).astype(float), others)
        found.append(interval("density", group, "above zero", above, len(values)))
    return found


def kernel_claims(path: Path, probes: dict[str, Row]) -> list[Found]:
    table = manifests.read(path, "dynamics_logits").to_pandas()
    if table.empty:
        return []
    grid = table.pivot(index="candidate_id", columns="other_id", values="trace")
    grid = grid.loc[grid.columns]
    traces = grid.to_numpy().diagonal()
    norms = table.dropna(subset=["norm"]).set_index("candidate_id").norm.reindex(grid.index).to_numpy()
    align = grid.to_numpy() / np.sqrt(np.outer(traces, traces))
    names = np.array([probes[name]["category"] for name in grid.index])
    others = ~np.eye(len(names), dtype=bool)
    same = (names[:, None] == names[None, :]) & others
    node, clusters = "base", prompts_of(grid.index, probes)
    found = [
        resampled("kernel", node, "trace", lambda i: float(traces[i].mean()), clusters),
        resampled("kernel", node, "effective_rank", lambda i: float((traces[i] ** 2 / norms[i] ** 2).mean()), clusters),
    ]
    for measure, mask in (("alignment own", same), ("alignment other", ~same & others)):
        statistic = lambda i, m=mask: float(align[np.ix_(i, i)][m[np.ix_(i, i)]].mean())  # noqa: E731
        found.append(resampled("kernel", node, measure, statistic, clusters))
    return found


def embeddings_of(files: Sequence[Path]) -> dict[str, dict[str, Row]]:
    """Return the rows of the embeddings manifests by source and candidate, with vectors as float32 arrays."""
    found: dict[str, dict[str, Row]] = {}
    for path in files:
        table = manifests.read(path, "dynamics_embeddings")
        vectors = zip(table["prompt"], table["image"], strict=True)  # Python numbers would need eight times the memory
        for row, (prompt, image) in zip(table.drop_columns(["prompt", "image"]).to_pylist(), vectors, strict=True):
            arrays = {"prompt": prompt.values.to_numpy() if prompt.is_valid else None, "image": image.values.to_numpy()}
            found.setdefault(row["source"], {})[row["candidate_id"]] = row | arrays
    return found


def vectors(rows: Sequence[Row], side: str) -> np.ndarray:
    """Return the embeddings of rows, float64 `[n, d]`. side: prompt or image."""
    return np.array([row[side] for row in rows], dtype=float)


def correction_claims(
    arm: str, groups: dict[str, list[str]], pairs: list[str], sources: dict[str, dict[str, Row]]
) -> list[Found]:
    """Return similarities of groups of images to their nearest training pair, for every source that embeds prompts."""
    found: list[Found] = []
    for source, rows in sources.items():
        trained = [rows[name] for name in pairs if name in rows]
        if not trained or trained[0]["prompt"] is None:
            continue
        prompts, images = (vectors(trained, side) for side in ("prompt", "image"))
        for group, names in groups.items():
            mine = [rows[name] for name in names if name in rows]
            if not mine:
                continue
            clusters = [row["prompt_id"] for row in mine]
            alike = vectors(mine, "prompt") @ prompts.T
            nearest = alike.argmax(1)
            seen = (vectors(mine, "image") * images[nearest]).sum(1)
            means = {"prompt": alike.max(1), "image": seen, "prompt, mean over pairs": alike.mean(1)}
            for measure, values in means.items():
                statistic = lambda i, v=values: float(v[i].mean())  # noqa: E731
                found.append(resampled("corrections", f"{arm}, {source}, {group}", measure, statistic, clusters))
    return found


def proxy_claims(node: str, terms: dict[str, Terms], sources: dict[str, dict[str, Row]]) -> list[Found]:
    """Return how well similarities of two probes follow the cosine of the gradients of their log-likelihoods."""
    if "kernel" not in terms:
        return []
    of = terms["kernel"]
    order = [next(k for k, row in enumerate(of.rows) if row["candidate_id"] == probe["candidate_id"]) for probe in of.probes]
    kernel = of.values["delta_g"][:, order]
    cosine = kernel / np.sqrt(np.outer(kernel.diagonal(), kernel.diagonal()))
    names, clusters = ([probe[key] for probe in of.probes] for key in ("candidate_id", "prompt_id"))
    category = np.array([probe["category"] for probe in of.probes])
    measures = {"words, prompt": np.array([[similarity(a["prompt"], b["prompt"]) for b in of.probes] for a in of.probes])}
    for source, rows in sources.items():
        if all(name in rows for name in names):
            for side in ("prompt", "image"):
                if rows[names[0]][side] is not None:
                    mine = vectors([rows[name] for name in names], side)
                    measures[f"{source}, {side}"] = mine @ mine.T
    found: list[Found] = []
    for name, alike in measures.items():
        for where in ("all", "within"):

            def statistic(i: np.ndarray, a: Any = alike, w: str = where) -> float:
                one, two = np.triu_indices(len(i), 1)
                one, two = i[one], i[two]
                kept = one != two
                if w == "within":
                    kept &= category[one] == category[two]
                return rank_correlation(a[one[kept], two[kept]], cosine[one[kept], two[kept]])

            found.append(resampled("proxies", f"{node}, {name}", where, statistic, clusters))
    return found


def compressed_terms(
    files: Sequence[Path], probes: dict[str, Row], rows: dict[str, Row]
) -> tuple[dict[str, Terms], list[Found]]:
    """Return Delta G as compressed gradients estimate it, by objective, and how much of it is beyond the errors.

    Only probes that have a sketch are in it. The standard deviation of an estimate is at most about the product of the two
    gradients' lengths divided by the root of the number of buckets. A probe's product with itself is exact.
    """
    found = manifests.read_rows(files, "dynamics_sketches")
    sketches = {name: [row for row in found if row["kind"] == name] for name in ("probe", "sft", "dpo")}
    if not sketches["probe"]:
        return {}, []
    arrays = {kind: np.array([row["sketch"] for row in part], dtype=float) for kind, part in sketches.items()}
    lengths = {kind: np.array([row["norm"] for row in part], dtype=float) for kind, part in sketches.items()}
    mine = [probes[row["item_id"]] for row in sketches["probe"]]
    terms, claims = {}, []
    for objective, kind in (("sft", "sft"), ("dpo", "dpo"), ("kernel", "probe")):
        if not sketches[kind]:
            continue
        other = mine if objective == "kernel" else [rows[row["item_id"]] for row in sketches[kind]]
        values = arrays["probe"] @ arrays[kind].T
        if objective == "kernel":
            np.fill_diagonal(values, lengths["probe"] ** 2)
        terms[objective] = Terms(mine, other, {"delta_g": values})
        errors = np.outer(lengths["probe"], lengths[kind]) / arrays[kind].shape[1] ** 0.5
        mask = np.array([[probe is not row for row in other] for probe in mine])
        beyond = Pairs(mine, other).mean((np.abs(values) > 2 * errors).astype(float), mask)
        claims.append(interval("density", f"{COMPRESSED}, {objective}", "beyond_noise", beyond, int(mask.sum())))
    return terms, claims


def sketch_claims(guesses: dict[str, Terms], terms: dict[str, Terms]) -> list[Found]:
    """Return how well sketched gradients give Delta G: correlation over pairs with the exact values."""
    found: list[Found] = []
    for objective, of in terms.items():
        if objective == "kernel" or objective not in guesses:
            continue
        estimate = guesses[objective]
        left = {probe["candidate_id"]: place for place, probe in enumerate(estimate.probes)}
        right = {row["row_id"]: place for place, row in enumerate(estimate.rows)}
        places = ([left[probe["candidate_id"]] for probe in of.probes], [right[row["row_id"]] for row in of.rows])
        guess, exact = estimate.values["delta_g"][np.ix_(*places)], of.values["delta_g"]
        pairs = Pairs(of.probes, of.rows)
        found.append(interval("sketch", objective, "correlation", pairs.correlation(guess, exact), exact.size))
        same = ((guess > 0) == (exact > 0)).astype(float)
        found.append(interval("sketch", objective, "same sign", pairs.mean(same), exact.size))
    return found


def corrected(base: list[Row], after: list[Row], right: dict[str, Any]) -> dict[str, list[str]]:
    """Return candidate ids: false positives that are corrected, those that stay, and all images that are not corrected."""
    later = {row["candidate_id"]: row["verdict"] for row in after}
    wrong = [row["candidate_id"] for row in base if row["verdict"] and right.get(row["candidate_id"]) is False]
    fixed = [name for name in wrong if later.get(name) is False]
    rest = [row["candidate_id"] for row in base if row["candidate_id"] not in set(fixed)]
    return {"corrected": fixed, "kept": [name for name in wrong if later.get(name)], "random": rest}


def exact_claims(
    folder: Path,
    shards: int,
    nodes: Sequence[str],
    followed: Sequence[str],
    probes: dict[str, Row],
    rows: dict[str, Row],
    metrics: list[Row],
    sources: dict[str, dict[str, Row]],
    guesses: dict[str, Terms],
) -> tuple[list[Found], list[Path]]:
    """Return the claims from exact terms, steps, followed trainings and logits, as far as there are any, and the files read.

    shards: how many pieces share the terms. nodes: the checkpoints with terms. followed: the arms with a followed training.
    """
    found: list[Found] = []
    files: list[Path] = []
    for node in sorted(nodes, key=lambda name: (name != "base", name)):
        of_terms, of_values = (manifests.pieces(folder / node / kind, shards) for kind in ("terms", "values"))
        if not of_terms:
            continue
        terms = read_terms(of_terms, probes, rows)
        values = {row["candidate_id"]: row for row in manifests.read_rows(of_values, "dynamics_values")}
        found += sign_claims(node, terms) + category_claims(node, terms) + judge_claims(node, terms, values)
        found += row_claims(node, terms) + density_claims(node, terms)
        files += [*of_terms, *of_values]
        if node == "base":
            found += proxy_claims(node, terms, sources) + sketch_claims(guesses, terms)
            for path in (folder / "path" / f"{arm}.parquet" for arm in sorted(followed)):
                if not path.exists():
                    continue
                found += path_claims(path, probes, values, metrics)
                files.append(path)
    steps, logits = folder / "steps.parquet", folder / "logits.parquet"
    found += step_claims(steps, probes) if steps.exists() else []
    found += kernel_claims(logits, probes) if logits.exists() else []
    return found, files + [path for path in (steps, logits) if path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--dynamics", type=Path, required=True, help="the folder of the run's dynamics")
    parser.add_argument("--nodes", nargs="*", default=["base"], help="the checkpoints whose terms are read")
    parser.add_argument("--followed", nargs="*", default=[], metavar="ARM", help="the arms whose followed training is read")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the base model's scores of the benchmark")
    parser.add_argument("--scores-of-base", nargs="+", action="append", default=[], metavar="ARM FILE",
                        help="an arm's scores of the base model's images")  # fmt: skip
    parser.add_argument(
        "--pairs", nargs=2, action="append", default=[], metavar=("ARM", "PAIRS"), help="an arm's training data"
    )
    parser.add_argument("--verdicts", type=Path, nargs="*", default=[], help="the external judge's verdicts on those images")
    parser.add_argument("--metrics", type=Path, nargs="*", default=[], help="metrics of the benchmark")
    parser.add_argument("--proxies", action="store_true", help="take only similarities and compressed gradients")
    parser.add_argument("--out", type=Path, required=True, help="manifest of the claims")
    arguments = parser.parse_args()
    config, folder = load(arguments.config), arguments.dynamics
    chosen = [folder / "probes.parquet", folder / "rows.parquet"]
    probes = {row["candidate_id"]: row for row in manifests.read_rows(chosen[0], "dynamics_probes")}
    rows = {row["row_id"]: row for row in manifests.read_rows(chosen[1], "dynamics_rows")}
    embeddings, sketches = (manifests.pieces(folder / kind, config.dynamics.shards) for kind in ("embeddings", "sketches"))
    sources = embeddings_of(embeddings)
    guesses, found = compressed_terms(sketches, probes, rows)
    found = density_claims(COMPRESSED, guesses) + found
    files = [*embeddings, *sketches]
    if arguments.proxies:
        found += category_claims(COMPRESSED, guesses) + row_claims(COMPRESSED, guesses)
        found += proxy_claims(COMPRESSED, guesses, sources)
    else:
        metrics = manifests.read_rows(arguments.metrics, "metrics")
        read = (folder, config.dynamics.shards, arguments.nodes, arguments.followed)
        exact, more = exact_claims(*read, probes, rows, metrics, sources, guesses)
        found, files = exact + found, files + more
    right = {row["candidate_id"]: row["verdict"] for row in manifests.read_rows(arguments.verdicts, "verdicts")}
    base = manifests.read_rows(arguments.scores, "scores")
    pairs = {arm: [row["chosen"] for row in manifests.read_rows(Path(path), "pairs")] for arm, path in arguments.pairs}
    for arm, *paths in arguments.scores_of_base:
        groups = corrected(base, manifests.read_rows([Path(path) for path in paths], "scores"), right)
        found += correction_claims(arm, groups, pairs.get(arm, []), sources)
    table = [{"run": config.run, "seed": config.seed, **vars(item)} for item in found]
    facts = {"files": [str(path.relative_to(folder)) for path in files]}  # from which the page draws its pictures
    manifests.write(
        arguments.out, "dynamics_claims", table, stage="stages.dynamics.claims", settings=facts, parents=[*chosen, *files]
    )
    print(f"{len(table)} measures")


if __name__ == "__main__":
    run_stage(main)
