"""Combine the runs of a study: every arm against base, and every claim as a contrast of two arms, with intervals.

    python -m stages.tools.study --runs results/study-* --out docs/study.csv --by-run docs/study-runs.csv \\
        --contrasts docs/contrasts.csv --plot docs/study.png

The runs may differ in seed, run and model.checkpoint. Each seed has its own training prompts, candidates, order of training and
benchmark images; the prompts of a benchmark are the same in all runs.

**What an interval holds for.** The recipe: the difference that one would find on average over further pretrained checkpoints of
this kind, further seeds and further prompts of these categories. `mean_variance_freedom` estimates the variance of the measured
difference from its parts: checkpoints (with the seeds within them) and prompts, which all checkpoints share. The interval is
Student's t with Satterthwaite's degrees of freedom, at least one less than the number of checkpoints. It assumes

- that the checkpoints are a random sample and their effects roughly normal. With three to five of them the t distribution pays
  for not knowing their spread, but nothing can show that they are typical;
- that runs are independent but for their checkpoint and the prompts. So every run should have its own seed: two checkpoints
  with the same seed train on the same prompts;
- that a share's numerator and denominator by prompt are not far from proportional (the first-order delta method).

In a simulation with 3 to 5 checkpoints of 1 or 2 seeds (tests/test_study.py) it covers the truth in 95 to 96 % where
checkpoints and seeds differ by 1 point, in 93 % where 3 checkpoints differ by 2, and in up to 98 % where they do not differ
at all. This is the share over all studies. Where the three checkpoints of a study happen to agree, its interval is narrow,
and such narrow intervals cover the truth less often than wide ones. Bootstrapping checkpoints and prompts together counts the
chance in the images twice. That hides that three checkpoints show too little of their spread, but where they differ by 3
points it covers only 85 %.

The column `interval` says what a row's interval holds for:

    checkpoints  the recipe, as above; from three checkpoints on
    seeds        this checkpoint, over its seeds and over prompts; from three seeds on
    prompts      the models that these runs trained, over prompts. It says nothing of another training. It stands where there
                 are fewer checkpoints or seeds, because two values cannot show a spread; where a category has counted fewer
                 than 30 images in all runs (then it is the exact interval of stages/tools/metrics.py); and where the
                 difference does not vary.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file, write_csv
from stages.count_answers import by_metric, categories_of, counts_of, read_answers
from stages.judge_report import external_judge
from stages.tools import metrics
from stages.tools.arms import nodes, replays, selection_owner
from stages.tools.intervals import FEW, t_quantile
from stages.understanding import understanding_kind
from stages.understanding.base import Answer

Row = dict[str, Any]
Groups = list[np.ndarray]
COLUMNS = (
    "benchmark", "arm", "category", "metric", "value", "delta", "delta_ci_low", "delta_ci_high", "interval", "n", "seeds",
    "models",
)  # fmt: skip
RUN_COLUMNS = ("model", "seed", "benchmark", "arm", "category", "metric", "value", "n")
CONTRAST_COLUMNS = (
    "claim", "arm", "against", "benchmark", "metric", "category", "difference", "ci_low", "ci_high", "interval", "n", "seeds",
    "models",
)  # fmt: skip
FEWEST = 3  # checkpoints, or seeds of one checkpoint, whose spread an interval may be computed from
ROUNDS = 2000  # resamples where the interval is over prompts only
MAY_DIFFER: Any = {"run": True, "seed": True, "model": {"checkpoint"}}

# The claims: what is said, the arm, what it is compared with, and the metrics. What the runs lack is left out.
DRAWING = ("gen", "non")
JUDGING = (
    "judge_on_base", "judge_on_own", "false_acceptance", "false_refusal",
    "pair_auc", "pair_accuracy", "random_accuracy", "adversarial_accuracy", "caption_true",
)  # fmt: skip
DATA = ("trained_precision",)
REPLAYED = ("recovered_prompts", "joined_precision")
CLAIMS: list[tuple[str, str, str, tuple[str, ...]]] = (
    [
        claim
        for sft in ("sft", "dpo")
        for claim in (
            ("training on its own judgement helps", sft, "base", DRAWING + JUDGING),
            ("selection by the model's judge helps", sft, f"{sft}-nobody", DRAWING + JUDGING + DATA),
            ("training without a judge helps", f"{sft}-nobody", "base", DRAWING + JUDGING),
            ("a perfect judge adds", f"{sft}-truth", sft, DRAWING + JUDGING + DATA),
            ("training on the truth helps", f"{sft}-truth", "base", DRAWING + JUDGING),
            ("replay adds", f"c-{sft}", sft, DRAWING + JUDGING + DATA),
            ("replay beats redrawing by the untrained model", f"c-{sft}", f"c-{sft}-base", DRAWING + JUDGING + DATA + REPLAYED),
            ("replay beats more rows", f"c-{sft}", f"c-{sft}-more", DRAWING + JUDGING + DATA),
            ("training with replay helps", f"c-{sft}", "base", DRAWING + JUDGING),
        )
    ]
    + [
        ("the anchor helps the judge", "sft-anchored", "sft", JUDGING),
        ("the anchor costs no drawing", "sft-anchored", "sft", DRAWING),
        ("training with the anchor helps", "sft-anchored", "base", DRAWING + JUDGING),
    ]
    + [
        (claim, arm, against, DRAWING + JUDGING + DATA)
        for claim, arm, against in (
            ("2 candidates instead of 10", "sft-n2", "sft"),
            ("4 candidates instead of 10", "sft-n4", "sft"),
            ("the projector is trained too", "sft-projector", "sft"),
            ("the projector is trained too", "sft-anchored-projector", "sft-anchored"),
            ("the vision tower is trained too", "sft-anchored-vision", "sft-anchored-projector"),
            ("12 epochs instead of 6", "sft-long", "sft"),
            ("replay after epoch 1 instead of 3", "c-sft-early", "c-sft"),
            ("replay after epoch 5 instead of 3", "c-sft-late", "c-sft"),
            ("replay after epochs 2 and 4 instead of 3", "c-sft-twice", "c-sft"),
            ("replay when Gen. stalls instead of after epoch 3", "c-sft-stall", "c-sft"),
            ("replay with the untrained judge", "c-sft-drawing", "c-sft"),
            ("replay with images of the untrained model", "c-sft-judging", "c-sft"),
            ("training on judgements alone", "judging-alone", "base"),
            ("training on judgements too", "sft-and-judging", "sft"),
            ("acceptance from 0.5", "sft-accept-50", "sft"),
            ("acceptance from 0.7", "sft-accept-70", "sft"),
            ("acceptance from 0.95", "sft-accept-95", "sft"),
            ("DPO without the loss of the chosen image", "dpo-nll-0", "dpo"),
            ("beta 0.03 instead of 0.1", "dpo-beta-03", "dpo"),
            ("beta 0.3 instead of 0.1", "dpo-beta-30", "dpo"),
            ("one prompt in ten is dropped", "sft-dropout", "sft"),
            ("one prompt in ten is dropped", "sft-dropout", "base"),
        )
    ]
)


@dataclass(frozen=True)
class Run:
    """One run of the study."""

    folder: Path
    model: str
    seed: int


# The interval of the recipe


def mean_variance_freedom(values: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over checkpoints and groups of prompts, its variance, and Satterthwaite's degrees of freedom.

    values: float `[..., checkpoints, prompts]`, with at least two checkpoints, and two prompts in each group.

    The variance of the checkpoints' means contains checkpoints, seeds and images, but not the prompts that they share. The
    variance of the prompts' means contains prompts and, again, images. What both contain is estimated from how prompts differ
    between checkpoints, and is taken away once.
    """
    checkpoints = values.shape[-2]
    between = np.mean([values[..., group].mean(-1) for group in groups], axis=0)  # [..., checkpoints]
    of_checkpoints = between.var(-1, ddof=1) / checkpoints
    of_prompts = of_images = np.zeros(values.shape[:-2])
    for group in groups:
        part = values[..., group]
        prompts = part.mean(-2, keepdims=True)
        rest = part - part.mean(-1, keepdims=True) - prompts + prompts.mean(-1, keepdims=True)
        squares = (rest**2).sum((-2, -1)) / ((checkpoints - 1) * (len(group) - 1))
        of_images = of_images + squares / (checkpoints * len(group)) / len(groups) ** 2
        of_prompts = of_prompts + prompts[..., 0, :].var(-1, ddof=1) / len(group) / len(groups) ** 2
    variance = of_prompts + np.maximum(of_checkpoints - of_images, 0)
    free = sum(map(len, groups)) - len(groups)
    parts = of_checkpoints**2 / (checkpoints - 1) + of_prompts**2 / free + of_images**2 / ((checkpoints - 1) * free)
    freedom = np.divide(variance**2, parts, out=np.ones_like(variance), where=parts > 0)
    return between.mean(-1), variance, np.maximum(freedom, checkpoints - 1)


def half_width(values: np.ndarray, groups: Groups) -> float:
    """Return half the width of the 95 % interval of a mean; 0 if the values do not vary or a group has a single prompt.

    values: float `[checkpoints, prompts]`. With one checkpoint, only prompts count as random.
    """
    if min(map(len, groups)) < 2:
        return 0.0
    if len(values) > 1:
        _, variance, freedom = (float(part) for part in mean_variance_freedom(values, groups))
    else:
        variance = sum(values[0, group].var(ddof=1) / len(group) for group in groups) / len(groups) ** 2
        freedom = sum(map(len, groups)) - len(groups)
    return t_quantile(0.975, freedom) * variance**0.5


def by_prompt(metric: str, counts: metrics.Counts, groups: Groups) -> np.ndarray | None:
    """Return a share in percent by run and prompt, `[runs, prompts]`, or None where a group has counted too little.

    The mean over a group is the group's share. If prompts differ in how many images they count, a prompt's value is its
    contribution to that share (its influence, plus the share).
    """
    values = np.zeros(counts.shape[1:])
    for group in metrics.groups_for(metric, groups):
        numerator, denominator = counts[:, :, group]
        if denominator.sum() < FEW:
            return None
        rate = numerator.sum() / denominator.sum()
        values[:, group] = 100 * (rate + (numerator - rate * denominator) / denominator.mean())
    return values


def units(runs: list[Run]) -> tuple[str, list[list[int]]]:
    """Return what an interval is over, as the column `interval` names it, and the places of the runs of each unit."""
    models = list(dict.fromkeys(run.model for run in runs))
    if len(models) >= FEWEST:
        return "checkpoints", [[place for place, run in enumerate(runs) if run.model == model] for model in models]
    if len(models) == 1 and len(runs) >= FEWEST:
        return "seeds", [[place] for place in range(len(runs))]
    return "prompts", [list(range(len(runs)))]


def contrast(metric: str, one: metrics.Counts, other: metrics.Counts | None, groups: Groups, runs: list[Run], seed: int) -> Row:
    """Return the difference between two arms with its interval. other: None for the difference of a win rate from a draw."""
    value = metrics.share(metric, one, groups)
    reference = metrics.DRAW if other is None else metrics.share(metric, other, groups)
    if value is None or reference is None or (other is not None and np.array_equal(one, other)):
        return dict(metrics.difference(metrics.Estimate(value), metrics.Estimate(reference)))
    mine, theirs = by_prompt(metric, one, groups), None if other is None else by_prompt(metric, other, groups)
    if mine is not None and (theirs is not None or other is None):
        change = mine if theirs is None else mine - theirs
        over, places = units(runs)
        means = np.stack([change[of_unit].mean(0) for of_unit in places])
        if half := half_width(means, metrics.groups_for(metric, groups)):
            delta = value - reference
            return {"delta": delta, "delta_ci_low": delta - half, "delta_ci_high": delta + half, "interval": over}
    found = metrics.estimate(metric, one, groups, ROUNDS, seed)
    if other is None:
        difference = metrics.against_draw(found)
    else:
        difference = metrics.difference(found, metrics.estimate(metric, other, groups, ROUNDS, seed))
    return difference | {"interval": None if difference["delta_ci_low"] is None else "prompts"}


# Benchmarks


def files(run: Path, config: Config, images: str, node: str, *kind: str) -> list[Path]:
    """Return the manifests of a set of images of one kind, as far as they exist."""
    return manifests.pieces(run.joinpath(node, *kind, images), config.shards(images))


def counted(run: Path, config: Config, benchmark: str, prompts: list[Row]) -> dict[str, dict[str, metrics.Counts]]:
    """Return the counts of every metric by prompt in one run, by arm."""
    chosen = config.benchmarks[benchmark]
    judges = metrics.Judges(chosen.judge, config.scorers(benchmark), chosen.second_scorers)

    def images(arm: str) -> metrics.Images:
        looking = config.benchmark_judges(benchmark)
        verdicts = [path for judge in looking for path in files(run, config, benchmark, arm, "verdicts", judge)]
        return metrics.read_images(files(run, config, benchmark, arm, "scores"), verdicts)

    base = images("base")
    found = {"base": metrics.count(prompts, judges, base, base, base.own)}
    for arm in config.arms:
        trained = metrics.own_verdicts(files(run, config, benchmark, arm, "scores-of-base"))
        found[arm] = metrics.count(prompts, judges, images(arm), base, trained)
    return found


def benchmark_prompts(runs: list[Run], benchmark: str) -> list[Row]:
    """Return the prompts of a benchmark, which must be the same in all runs."""
    place = Path("prompts", f"{benchmark}.parquet")
    prompts = manifests.read_rows(runs[0].folder / place, "prompts")
    for run in runs[1:]:
        if manifests.read_rows(run.folder / place, "prompts") != prompts:
            raise UserError(
                f"{run.folder / place}: not the prompts of {runs[0].folder}; the runs of a study have the same benchmarks"
            )
    return prompts


def benchmark_rows(runs: list[Run], config: Config, benchmark: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Return a benchmark's rows of the three tables: all runs together, every run, and contrasts."""
    prompts = benchmark_prompts(runs, benchmark)
    by_run = [counted(run.folder, config, benchmark, prompts) for run in runs]
    categories = metrics.groups_of(prompts)
    return rows_of(runs, benchmark, by_run, dict.fromkeys(by_run[0]["base"], categories))


def understanding_rows(runs: list[Run], config: Config, benchmark: str) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of an understanding benchmark. Its images, which are the same in all runs, take the place of prompts."""
    kind = understanding_kind(config.understanding_benchmark(benchmark).kind)
    place = Path("answers", f"{benchmark}.parquet")

    def asked(answers: list[Answer]) -> list[tuple[str, str, str | None]]:
        return [(answer.question_id, answer.question, answer.expected) for answer in answers]

    first = read_answers(runs[0].folder / "base" / place)
    questions = asked(first)
    categories = {name: categories_of(parts) for name, parts in by_metric(kind.measures(first)).items()}

    def counted_answers(path: Path) -> dict[str, metrics.Counts]:
        answers = read_answers(path)
        if asked(answers) != questions:
            raise UserError(f"{path}: not the questions of {runs[0].folder}; the runs of a study have the same benchmarks")
        return {name: counts_of(parts) for name, parts in by_metric(kind.measures(answers)).items()}

    by_run = [{arm: counted_answers(run.folder / arm / place) for arm in ("base", *config.arms)} for run in runs]
    return rows_of(runs, benchmark, by_run, categories)


def rows_of(
    runs: list[Run],
    benchmark: str,
    by_run: list[dict[str, dict[str, metrics.Counts]]],
    categories: dict[str, dict[str, Groups]],
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of the three tables from the counts of every run by arm and metric, and from the metrics' categories."""
    counts = {
        arm: {name: np.concatenate([part[arm][name] for part in by_run], axis=1) for name in found}
        for arm, found in by_run[0].items()
    }
    size = {"benchmark": benchmark, "seeds": len(runs), "models": len({run.model for run in runs})}
    together, each, contrasts = [], [], []
    for arm in counts:
        for name, found in counts[arm].items():
            for category, groups in categories[name].items():
                seed = metrics.resampling_seed("study", name, category)
                row = size | {"arm": arm, "category": category, "metric": name, "n": int(total(found, groups)[1])}
                base = None if name in metrics.AGAINST_BASE else counts["base"][name]
                value = {"value": metrics.share(name, found, groups)}
                together.append(row | value | contrast(name, found, base, groups, runs, seed))
                for place, run in enumerate(runs):
                    part = found[:, place : place + 1]
                    count = {"value": metrics.share(name, part, groups), "n": int(total(part, groups)[1])}
                    each.append(row | count | {"model": run.model, "seed": run.seed})
    for claim, arm, against, names in CLAIMS:
        for name in names:
            if arm not in counts or against not in counts or name not in counts[arm]:
                continue
            for category, groups in categories[name].items():
                one, other = counts[arm][name], counts[against][name]
                seed = metrics.resampling_seed("study", name, category)
                change = contrast(name, one, other, groups, runs, seed)
                row = size | {"claim": claim, "arm": arm, "against": against, "metric": name, "category": category}
                contrasts.append(row | as_contrast(change) | {"n": int(total(one, groups)[1])})
    return together, each, contrasts


def total(counts: metrics.Counts, groups: Groups) -> np.ndarray:
    """Return numerator and denominator over all runs and prompts."""
    return np.sum([counts[:, :, group].sum((1, 2)) for group in groups], axis=0)


def as_contrast(change: Row) -> Row:
    ends = {"ci_low": change["delta_ci_low"], "ci_high": change["delta_ci_high"], "interval": change.get("interval")}
    return {"difference": change["delta"]} | ends


# Training data

Share = tuple[int, int]  # a numerator and a denominator


def true_share(run: Path, config: Config, judge: str, images: str, node: str, chosen: list[str]) -> Share | None:
    """Return how many of the chosen images match according to the judge, and for how many it could tell.

    None where the judge has not looked at all of them, which the target `precision` makes it do.
    """
    verdicts = metrics.external_verdicts(files(run, config, images, node, "verdicts", judge)).get(judge, {})
    if not verdicts.keys() >= set(chosen):
        return None
    known = [verdicts[name].matches for name in chosen]
    return known.count(True), known.count(True) + known.count(False)


def added(shares: Iterable[Share | None]) -> Share | None:
    """Return the sum of shares, which is not known (None) if one of them is not."""
    right = count = 0
    for share in shares:
        if share is None:
            return None
        right, count = right + share[0], count + share[1]
    return right, count


def data_shares(run: Path, config: Config, arm: str) -> dict[str, Share | None]:
    """Return shares about an arm's training data in one run.

    chosen_precision: of the rows of the first selection, those whose image is right. discarded_prompts: of all training
    prompts, those that wait for a replay. recovered_prompts: of these, those that replay recovers. joined_precision: of the
    rows that join at replays, those whose image is right. trained_precision: the same for all rows. The external judge of
    the training candidates says what is right. Without one there is no precision. It is None where the judge has not
    looked at all rows.
    """
    owner, tree, replayed = selection_owner(config, arm), nodes(config), replays(config)
    judge = external_judge(config, "train")
    judged = (config.counterpart(arm) if config.arm_pairs(arm).matched else None) or arm
    waits = manifests.read_rows(run / selection_owner(config, judged) / "discard.parquet", "discard")
    prompts = manifests.read_rows(run / "prompts/train.parquet", "prompts")
    shares: dict[str, Share | None] = {}
    shares["discarded_prompts"] = (len([row for row in waits if row["reason"] == "no_accepted"]), len(prompts))
    selected = [row["chosen"] for row in manifests.read_rows(run / owner / "pairs.parquet", "pairs")]
    recovered: list[Share] = []
    precise: list[Share | None] = []
    for name in tree[arm].replays:
        pairs = manifests.read_rows(run / name / "replay/pairs.parquet", "pairs")
        drawn = replayed[name].draws is not None
        if drawn:
            pool = manifests.read_rows(run / name / "replay/pool.parquet", "prompts")
            recovered.append((len({row["prompt_id"] for row in pairs}), len(pool)))
        if judge:
            images, node = ("replay", name) if drawn else ("train", "base")
            precise.append(true_share(run, config, judge, images, node, [row["chosen"] for row in pairs]))
    if recovered:
        shares["recovered_prompts"] = added(recovered)
    if judge:
        first = true_share(run, config, judge, "train", "base", selected)
        shares["chosen_precision"] = added([first])
        shares["trained_precision"] = added([first, *precise])
    if precise:
        shares["joined_precision"] = added(precise)
    return shares


def percent(share: Share | None) -> float | None:
    return 100 * share[0] / share[1] if share and share[1] else None


def count_of(share: Share | None) -> int:
    return share[1] if share else 0


def data_rows(runs: list[Run], config: Config) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows about training data of the three tables.

    Training prompts differ between runs, so the interval of a contrast is that of the mean differences of checkpoints, or of
    seeds. With fewer than three of these, there is none.
    """
    shares = {arm: [data_shares(run.folder, config, arm) for run in runs] for arm in config.arms}
    common: Row = {"benchmark": "train", "category": "overall"}
    size = common | {"seeds": len(runs), "models": len({run.model for run in runs})}
    together, each, contrasts = [], [], []
    for arm, found in shares.items():
        for name in found[0]:
            pooled = added(part[name] for part in found)
            together.append(size | {"arm": arm, "metric": name, "value": percent(pooled), "n": count_of(pooled)})
            for run, part in zip(runs, found, strict=True):
                row = common | {"model": run.model, "seed": run.seed, "arm": arm, "metric": name}
                each.append(row | {"value": percent(part[name]), "n": count_of(part[name])})
    for claim, arm, against, names in CLAIMS:
        for name in names:
            if arm not in shares or against not in shares or not all(name in shares[a][0] for a in (arm, against)):
                continue
            sides = [[percent(part[name]) for part in shares[side]] for side in (arm, against)]
            if any(value is None for side in sides for value in side):
                continue
            change = np.subtract(*np.array(sides, dtype=float))
            over, places = units(runs)
            means = np.array([change[of_unit].mean() for of_unit in places])
            row = size | {"claim": claim, "arm": arm, "against": against, "metric": name}
            row |= {"n": count_of(added(part[name] for part in shares[arm])), "difference": float(means.mean())}
            if len(means) >= FEWEST and means.std() > 0:
                half = t_quantile(0.975, len(means) - 1) * float(means.std(ddof=1)) / len(means) ** 0.5
                row |= {"ci_low": row["difference"] - half, "ci_high": row["difference"] + half, "interval": over}
            contrasts.append(row)
    return together, each, contrasts


# Writing and showing


def draw_interval(axis: Any, place: int, value: float | None, low: float | None, high: float | None) -> None:
    """Draw a value with its interval; the point is filled if the interval excludes zero, and missing without an interval."""
    if value is None or low is None or high is None or low == high:
        return
    clear = low > 0 or high < 0
    axis.plot([low, high], [place] * 2, color="#1c1c1e", linewidth=1.5)
    axis.plot(value, place, "o", color="#1c1c1e", markerfacecolor="#1c1c1e" if clear else "white")


def plot(rows: list[Row], contrasts: list[Row], benchmarks: list[str], arms: list[str], out: Path) -> None:
    """Plot, for each benchmark, the arms' differences from base, and beside them the contrasts of the claims."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"gen": "Gen. (draws right)", "non": "Non. (refuses its own)", "false_acceptance": "accepts its wrong images"}
    claimed = {(row["claim"], row["arm"]) for row in contrasts if row["against"] != "base"}
    height = (0.35 * max(len(arms), len(claimed)) + 1.4) * len(benchmarks)
    figure, axes = pyplot.subplots(
        len(benchmarks), 4, figsize=(15, height), squeeze=False, layout="constrained", width_ratios=(1, 1, 1, 1.3)
    )
    for benchmark, line in zip(benchmarks, axes, strict=True):
        overall = [row for row in rows if row["benchmark"] == benchmark and row["category"] == "overall"]
        of_arm = {(row["arm"], row["metric"]): row for row in overall}
        over = dict.fromkeys(row["interval"] for row in overall if row["metric"] in titles and row.get("interval"))
        kinds = "95 % interval over " + " or ".join(over)
        for axis, (metric, title) in zip(line, titles.items(), strict=False):
            for place, arm in enumerate(arms):
                row = of_arm.get((arm, metric), {})
                draw_interval(axis, place, row.get("delta"), row.get("delta_ci_low"), row.get("delta_ci_high"))
            axis.set_title(f"{benchmark}: {title}", fontsize=10)
            axis.set_yticks(range(len(arms)), arms if metric == "gen" else [""] * len(arms))
            axis.set_xlabel(f"points against base,\n{kinds}", fontsize=8)
        known = [row for row in contrasts if row["benchmark"] == benchmark and row["category"] == "overall"]
        claims = {(row["claim"], row["arm"]): row for row in reversed(known) if row["against"] != "base"}  # its first metric
        shown = list(reversed(claims.values()))
        for place, row in enumerate(shown):
            draw_interval(line[3], place, row["difference"], row["ci_low"], row["ci_high"])
        names = [f"{row['claim']}\n{row['arm']} against {row['against']}, {row['metric']}" for row in shown]
        line[3].set_yticks(range(len(shown)), names, fontsize=7)
        line[3].set_title(f"{benchmark}: claims", fontsize=10)
        line[3].set_xlabel(f"points,\n{kinds}", fontsize=8)
    for axis in axes.flat:
        axis.axvline(0, color="#8e8e93", linewidth=1, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.invert_yaxis()
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def interval_text(change: float | None, low: float | None, high: float | None, over: str | None) -> str:
    if change is None:
        return ""
    return f"  {change:+6.2f}" + ("" if low is None or high is None else f" ({low:+.2f} to {high:+.2f}, over {over})")


def line(row: Row) -> str:
    """Return a row of the study as a line for the terminal."""
    change = interval_text(row.get("delta"), row.get("delta_ci_low"), row.get("delta_ci_high"), row.get("interval"))
    return f"{row['benchmark']:<12} {row['arm']:<14} {row['metric']:<22} {row['value']:6.2f} n {row['n']}{change}"


def claim_line(row: Row) -> str:
    """Return a contrast as a line for the terminal."""
    change = interval_text(row["difference"], row.get("ci_low"), row.get("ci_high"), row.get("interval"))
    return f"{row['claim']}: {row['arm']} against {row['against']}, {row['benchmark']} {row['metric']} n {row['n']}{change}"


def open_runs(folders: list[Path]) -> tuple[list[Run], Config]:
    """Return the runs and the configuration that they share.

    Raises UserError if they differ in more than they may, if two of them share a seed, or if checkpoints have different numbers
    of runs: the intervals would then be too narrow, or belong to another mean than the one shown.
    """
    configs = [load(folder / "run_config.yaml") for folder in folders]
    shared = configs[0].model_dump(exclude=MAY_DIFFER)
    runs: list[Run] = []
    for folder, config in zip(folders, configs, strict=True):
        if config.model_dump(exclude=MAY_DIFFER) != shared:
            raise UserError(
                f"{folder}/run_config.yaml: differs from that of {folders[0]} in more than run, seed and model.checkpoint; "
                "a study needs runs of one configuration"
            )
        run = Run(folder, root_checkpoint(config.model.checkpoint), config.seed)
        if twin := next((other for other in runs if other.seed == run.seed), None):
            raise UserError(
                f"{folder}/run_config.yaml: has the seed of {twin.folder}, {run.seed}, so both train on the same prompts; "
                "leave one of them out, or run it with another seed"
            )
        runs.append(run)
    counts = Counter(run.model for run in runs)
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{model} has {count}" for model, count in counts.items())
        raise UserError(f"--runs: checkpoints have different numbers of runs: {told}; give as many runs of each")
    return runs, configs[0]


def root_checkpoint(checkpoint: str) -> str:
    """Return the checkpoint that a run began from, where a former run trained this one (results/<run>/<arm>/checkpoint)."""
    former = Path(checkpoint).parent.parent / "run_config.yaml"
    return root_checkpoint(load(former).model.checkpoint) if former.is_file() else checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="results folders of the runs")
    parser.add_argument("--out", type=Path, required=True, help="table of all runs together (CSV)")
    parser.add_argument("--by-run", type=Path, help="table with a row for each run (CSV)")
    parser.add_argument("--contrasts", type=Path, help="table of the claims (CSV)")
    parser.add_argument("--plot", type=Path, help="plot to write (PNG)")
    arguments = parser.parse_args()
    runs, config = open_runs(arguments.runs)
    parts = [benchmark_rows(runs, config, benchmark) for benchmark in config.benchmarks]
    parts += [understanding_rows(runs, config, benchmark) for benchmark in config.understanding]
    parts.append(data_rows(runs, config))
    together, each, contrasts = ([row for part in parts for row in part[place]] for place in range(3))
    write_csv(arguments.out, COLUMNS, together)
    if arguments.by_run:
        write_csv(arguments.by_run, RUN_COLUMNS, each)
    if arguments.contrasts:
        write_csv(arguments.contrasts, CONTRAST_COLUMNS, contrasts)
    if arguments.plot:
        plot(together, contrasts, list(config.benchmarks), list(config.arms), arguments.plot)
    for rows, show in ((together, line), (contrasts, claim_line)):
        print("\n".join(show(row) for row in rows if row["category"] == "overall" and row.get("value", 0) is not None))


if __name__ == "__main__":
    run_stage(main)
