"""Audit models side by side: the gap between drawing and judging, how good their own judge is, and whether to train.

    python -m stages.audit --config config.yaml --prompts prompts/geneval.parquet ... \\
        --metrics Show-o/metrics/geneval.parquet ... --scores geneval Show-o Show-o/scores/geneval/*.parquet \\
        --verdicts geneval Show-o Show-o/verdicts/qwen/geneval/*.parquet --paper stages/paper/results.csv --out audit

--scores and --verdicts are given once for each benchmark and model. No model is loaded. Without an external judge, only
non-unification and the numbers of rows can be measured.

The folder --out gets audit.parquet and forecast.parquet, the tables non, judge, agreement and forecast as CSV, Markdown and
LaTeX, verdict.md, and the picture audit.png.

Measures, for each category (subtask), for each stratum and for all strata together. The last two are unweighted means over
categories, except auc, agreement and kappa, which take the images of all of them together:

non, gen, weak_generation, false_acceptance, false_refusal, judge_on_own, own_unreadable
                  as in stages/tools/metrics.py, in percent
auc               how often p_yes is higher for a right image than for a wrong one of the same category
agreement, kappa  of two judges: `own` (the model), the external judge, and those of audit.judges (stages/tools/kappa.py)
weak_generation_by  of the images that the model itself refuses, the share that a judge of audit.judges refuses too, in percent

Forecast, for each selection of training data (stages/tools/forecast.py has the method):

rows              training rows: accepted images for SFT, pairs for DPO
selected, pool    share of the training prompts with rows, and without an accepted image, in percent
precision         share of right images among the accepted ones, in percent
correlation       how much images of one prompt resemble each other in being accepted
gain              of Gen. in points, from a line through the paper's results
gpu_hours         of drawing, judging and training, as stages/tools/cost.py estimates them
verdict           in words
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import Audit, Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file
from stages.common.seeds import hash_seed
from stages.families import describe
from stages.tools import arms, cost, forecast, kappa, metrics, rates, recipe
from stages.tools.forecast import Plan, Value
from stages.tools.intervals import FEW
from stages.tools.paper import read_results, same_benchmark
from stages.tools.rates import Rate
from stages.tools.result_table import Cell, Group, Line, Table, write

Row = dict[str, Any]
Place = tuple[str, str]  # a benchmark and one of its categories
OWN, MEAN, ALL = "own", "mean", "all strata"
BY_IMAGE = ("non", "gen", "weak_generation", "false_acceptance", "false_refusal", "judge_on_own", "own_unreadable")
EPOCHS = {"sft": 20, "dpo": 30}  # the paper's, where the configuration has no arms
OTHER = "other"  # the stratum of categories without a difficulty, where others have one
UNREADABLE = 5.0  # with more unreadable answers than this, in percent, there is a warning
CAUTION = (
    "The paper's rows have Non. of a whole benchmark, from its table of main results. Its audit by subtask is a figure, whose "
    "numbers are not known here. It has its own judge (Qwen2.5-VL-72B) and does not state how it sampled, so "
    "compare with care."
)


# Reading


@dataclass(frozen=True)
class Images:
    """A model's images of a category, an array entry each.

    candidate: the candidate_id. prompt: the prompt_id. p_yes: NaN where unreadable. verdicts: of each judge 1 or 0, NaN where
    it has none; `own` is the model's own. judge: the benchmark's external judge, if any.
    """

    candidate: np.ndarray
    prompt: np.ndarray
    p_yes: np.ndarray
    verdicts: dict[str, np.ndarray]
    judge: str | None

    def only(self, chosen: np.ndarray) -> Images:
        """Return the images for which `chosen` is true."""
        verdicts = {name: values[chosen] for name, values in self.verdicts.items()}
        return Images(self.candidate[chosen], self.prompt[chosen], self.p_yes[chosen], verdicts, self.judge)

    def right(self) -> np.ndarray:
        """Return the verdicts of the external judge, NaN where there are none."""
        return self.verdicts[self.judge] if self.judge else np.full(len(self.prompt), np.nan)


@dataclass(frozen=True)
class Audited:
    """What is known about a model: its images, and the rows of its metrics, by benchmark and category."""

    name: str
    images: dict[Place, Images]
    metrics: dict[tuple[Place, str], Row]


def strata_of(config: Config, categories: dict[Place, str | None]) -> dict[str, list[Place]]:
    """Return the categories of each stratum. categories: the difficulty of every category, None where it has none."""
    if config.audit.strata:
        found: dict[str, list[Place]] = {}
        for stratum, names in config.audit.strata.items():
            for name in names:
                places = [place for place in categories if place[1] == name]
                if not places:
                    known = ", ".join(dict.fromkeys(category for _, category in categories))
                    raise UserError(f"audit.strata.{stratum}: no benchmark has the category {name!r}; there are {known}")
                found.setdefault(stratum, []).extend(places)
        return found
    levels = {level for level in categories.values() if level}
    if not levels:
        return {name: [place for place in categories if place[0] == name] for name in dict.fromkeys(b for b, _ in categories)}
    ordered = [name for name in ("easy", "medium", "hard") if name in levels] + sorted(levels - {"easy", "medium", "hard"})
    found = {name: [place for place, level in categories.items() if level == name] for name in ordered}
    others = [place for place, level in categories.items() if not level]
    return found | ({OTHER: others} if others else {})


def read_categories(prompts: dict[str, list[Row]]) -> dict[Place, str | None]:
    """Return every category of the benchmarks with its difficulty, in the order of the manifests."""
    found: dict[Place, str | None] = {}
    for benchmark, rows in prompts.items():
        for row in rows:
            place = (benchmark, row["category"])
            found[place] = found.get(place) or row["difficulty"]
    return found


def read_images(
    config: Config, benchmark: str, prompts: Sequence[Row], scores: Sequence[Path], verdicts: Sequence[Path], model: str
) -> dict[Place, Images]:
    """Return a model's images of a benchmark by category. Raises UserError if a prompt or a verdict of a judge is missing."""
    category = {row["prompt_id"]: row["category"] for row in prompts}
    rows = manifests.read_rows(scores, "scores")
    external = metrics.external_verdicts(list(verdicts))
    judge = config.benchmarks[benchmark].judge
    judges = list(dict.fromkeys([*([judge] if judge else []), *config.audit.judges]))
    for row in rows:
        if row["prompt_id"] not in category:
            raise UserError(f"--prompts: prompt_id {row['prompt_id']} of {model} on {benchmark} is not there; give its prompts")
        if lacking := [name for name in judges if row["candidate_id"] not in external.get(name, {})]:
            raise UserError(
                f"--verdicts {benchmark} {model}: the judge {lacking[0]} has no row for {row['candidate_id']}; give all its "
                "manifests of this benchmark and model, or judge the images again"
            )
    found: dict[Place, Images] = {}
    for name in dict.fromkeys(category.values()):
        chosen = [row for row in rows if category[row["prompt_id"]] == name]
        said = {OWN: [row["verdict"] for row in chosen]}
        said |= {who: [external[who][row["candidate_id"]].matches for row in chosen] for who in judges}
        found[benchmark, name] = Images(
            candidate=np.array([row["candidate_id"] for row in chosen], str),
            prompt=np.array([row["prompt_id"] for row in chosen], str),
            p_yes=np.array([row["p_yes"] for row in chosen], float),
            verdicts={who: np.array(values, float) for who, values in said.items()},
            judge=judge,
        )
    return found


# Measuring


def scopes(strata: dict[str, list[Place]]) -> list[tuple[Row, list[Place]]]:
    """Return every category, every stratum and all of them: the columns that name them, and their categories."""
    found: list[tuple[Row, list[Place]]] = []
    for stratum, places in strata.items():
        found += [({"stratum": stratum, "benchmark": place[0], "category": place[1]}, [place]) for place in places]
        found.append(({"stratum": stratum}, places))
    return [*found, ({}, [place for places in strata.values() for place in places])]


def measured(model: Audited, strata: dict[str, list[Place]], further: Sequence[str]) -> list[Row]:
    """Return the rows of the audit manifest about a model. further: the judges of audit.judges."""
    rows: list[Row] = []
    for where, places in scopes(strata):
        images = [model.images[place] for place in places]
        found = [*shares(model, places), area(images), *agreements(images, where), *weak_generation_by(images, further)]
        rows += [{"model": model.name, **where, **row} for row in found]
    return rows


def shares(model: Audited, places: list[Place]) -> Iterable[Row]:
    """Yield the metrics of a category, or their means over several with an interval that is put together from theirs."""
    for name in BY_IMAGE:
        known = [model.metrics[place, name] for place in places if (place, name) in model.metrics]
        parts = [metrics.Estimate(row["value"], row["ci_low"], row["ci_high"]) for row in known if row["value"] is not None]
        if not known:
            continue
        value = float(np.mean([part.value for part in parts])) if parts else None
        found = parts[0] if len(places) == 1 and parts else metrics.combined(name, value, parts)
        n = sum(row["denominator"] for row in known)
        judge = ", ".join(dict.fromkeys(row["judge"] for row in known if row["judge"])) or None
        yield {"measure": name, "judge": judge, "value": found.value, "n": n, "ci_low": found.low, "ci_high": found.high}


def joined(images: Sequence[Images], values: Callable[[Images], np.ndarray]) -> np.ndarray:
    return np.concatenate([values(part) for part in images])


def of_rate(measure: str, rate: Rate, scale: float = 1.0, **judges: str | None) -> Row:
    value, low, high = (None if end is None else scale * end for end in (rate.value, rate.low, rate.high))
    return {"measure": measure, "value": value, "n": rate.n, "ci_low": low, "ci_high": high, **judges}


def area(images: Sequence[Images]) -> Row:
    """Return the AUC of p_yes against the external judge, compared within categories."""
    p_yes, right = joined(images, lambda part: part.p_yes), joined(images, Images.right)
    prompts = joined(images, lambda part: part.prompt)
    strata = np.concatenate([np.full(len(part.prompt), number) for number, part in enumerate(images)])
    known = ~np.isnan(p_yes) & ~np.isnan(right)
    judge = ", ".join(dict.fromkeys(part.judge for part in images if part.judge)) or None
    return of_rate("auc", rates.auc(p_yes[known], right[known] == 1, prompts[known], strata[known]), judge=judge)


def agreements(images: Sequence[Images], where: Row) -> Iterable[Row]:
    """Yield agreement and kappa of every two judges on the images that both have judged."""
    names = list(dict.fromkeys(name for part in images for name in part.verdicts))
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            both = [part for part in images if one in part.verdicts and other in part.verdicts]
            if not both:
                continue
            first, second = (np.concatenate([part.verdicts[name] for part in both]) for name in (one, other))
            known = ~np.isnan(first) & ~np.isnan(second)
            prompts = joined(both, lambda part: part.prompt)[known]
            seed = hash_seed("audit", one, other, *map(str, where.values()))
            equal, beyond_chance = kappa.agree(first[known] == 1, second[known] == 1, prompts, seed)
            yield of_rate("agreement", equal, 100, judge=one, other=other)
            yield of_rate("kappa", beyond_chance, judge=one, other=other)


def weak_generation_by(images: Sequence[Images], further: Sequence[str]) -> Iterable[Row]:
    """Yield for each further judge how many of the images that the model refuses it refuses too."""
    own, prompts = joined(images, lambda part: part.verdicts[OWN]), joined(images, lambda part: part.prompt)
    for name in further:
        verdicts = np.concatenate([part.verdicts[name] for part in images])
        refused = (own == 0) & ~np.isnan(verdicts)
        yield of_rate("weak_generation_by", rates.share(verdicts[refused] == 0, prompts[refused]), 100, judge=OWN, other=name)


def pick(rows: Iterable[Row], measure: str, stratum: str | None = None, place: Place | None = None) -> Row | None:
    """Return a model's row of a measure in a category, a stratum (without a category) or all of them (without a stratum)."""
    wanted = (measure, stratum, *(place or (None, None)))
    fields = ("measure", "stratum", "benchmark", "category")
    return next((row for row in rows if tuple(map(row.get, fields)) == wanted), None)


# The forecast


def plans(config: Config) -> dict[str, tuple[Plan, int]]:
    """Return the selections that are forecast, with their epochs: those of arms that the model itself judges, each once.

    A configuration without arms has the paper's two: SFT for 20 and DPO for 30 epochs.
    """
    found = {}
    chosen: Any = EPOCHS if not config.arms else dict.fromkeys(arms.selection_owner(config, name) for name in config.arms)
    for name in chosen:
        pairs = config.arm_pairs(name) if config.arms else config.pairs
        objective, count = (config.arms[name].objective, config.arms[name].candidates) if config.arms else (name, None)
        epochs = config.arms[name].epochs if config.arms else EPOCHS[name]
        if pairs.filter == "judge":
            drawn = count or config.generate.candidates
            most = pairs.chosen_per_prompt or drawn
            found[name] = (Plan(objective, drawn, pairs.accept_threshold, pairs.reject_threshold, most), epochs)
    return found


def gpu_hours(config: Config, plan: Plan, epochs: int, rows: Value) -> tuple[Value, str]:
    """Return the hours of one GPU for drawing, judging and training, and where they come from. config: with this model."""
    speeds = cost.speeds(config, config.audit.device or None)
    images = config.audit.prompts * plan.candidates
    exact = describe(config.model.family).likelihood == "exact"

    def together(count: float) -> float:
        works = [cost.Work("draw", "", "", images), cost.Work("judge", "", "", images)]
        if plan.objective == "dpo":
            works.append(cost.Work("reference", "", "", round(2 * count * (1 if exact else epochs))))
        works.append(cost.Work("train", "", "", round(count * epochs * (2 if plan.objective == "dpo" else 1))))
        return sum(time for time, _ in cost.hours(config, works, speeds).values())

    source = "; ".join(dict.fromkeys(speed.source for speed in speeds.values()))
    value, low, high = (None if end is None else together(end) for end in (rows.value, rows.low, rows.high))
    return Value(value, low, high), source


def forecast_rows(config: Config, model: Audited, line: forecast.Line, rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the forecast manifest about a model, without the verdict. rows: its rows of the audit."""
    like = config.audit.like or list(config.benchmarks)
    chosen = {place: images for place, images in model.images.items() if place[0] in like}
    own = config.audited(model.name).model_copy(update={"audit": config.audit})
    gap = pick(rows, "non")
    gain = line.predicted(Value(gap["value"], gap["ci_low"], gap["ci_high"]) if gap else Value(None))
    found: list[Row] = []
    for name, (plan, epochs) in plans(config).items():
        groups = {
            f"{place[0]} {place[1]}": forecast.group(part.p_yes, part.right(), part.prompt, plan)
            for place, part in chosen.items()
            if len(part.prompt)
        }
        seed = hash_seed("forecast", plan.objective)
        values = forecast.selection(groups, plan, config.audit.prompts, config.audit.correlation, seed)
        repeated = any(part.images.max() > 1 for part in groups.values())
        texts = {"correlation": "measured" if repeated else "assumed (audit.correlation)"}
        texts["gain"] = "a line through overall results of arXiv 2507.16663, with its correlation of 0.53; very uncertain"
        values["gain"] = gain
        values["gpu_hours"], texts["gpu_hours"] = gpu_hours(own, plan, epochs, values["rows"])
        n = sum(int(part.images.sum()) for part in groups.values())
        found += [
            {"model": model.name, "selection": name, "quantity": quantity, "n": n, "text": texts.get(quantity)}
            | {"value": value.value, "ci_low": value.low, "ci_high": value.high}
            for quantity, value in values.items()
        ]
    return found


# The verdict


@dataclass(frozen=True)
class Verdict:
    """Whether to train. state is one of STATES. sure: whether the interval agrees with the value that decided."""

    state: str
    sure: bool
    weak: list[str]
    known: list[str]


STATES = {
    "train": "train",
    "gap": "gap too small",
    "judge": "judge is too weak",
    "rows": "too few rows",
    "nothing": "cannot be said",
}


def weak_subtasks(rows: Sequence[Row], least: float) -> tuple[list[Row], list[Row]]:
    """Return the AUC rows of the categories below `least`, and those of all categories in which enough is known.

    Enough are FEW images with right and wrong ones among them.
    """
    known = [row for row in rows if row["measure"] == "auc" and row.get("category") and row["value"] is not None]
    known = [row for row in known if row["n"] >= FEW]
    return [row for row in known if row["value"] < least], known


def decide(rows: Sequence[Row], forecasts: Sequence[Row], settings: Audit) -> Verdict:
    """Return the verdict on a model: first the gap, then its judge, then how much there is to train on."""
    weak, known = weak_subtasks(rows, settings.least_auc)
    names = [row["category"] for row in weak], [row["category"] for row in known]
    gap, expected = pick(rows, "non"), [row for row in forecasts if row["quantity"] == "rows"]
    if gap is None or gap["value"] is None:
        return Verdict("nothing", True, *names)
    if gap["value"] < settings.least_gap:
        return Verdict("gap", gap["ci_high"] is not None and gap["ci_high"] < settings.least_gap, *names)
    if known and len(weak) > settings.most_weak * len(known):
        surely = [row for row in weak if row["ci_high"] is not None and row["ci_high"] < settings.least_auc]
        return Verdict("judge", len(surely) > settings.most_weak * len(known), *names)
    best = max(expected, key=lambda row: row["value"] or 0, default=None)
    if best is not None and (best["value"] or 0) < settings.least_rows:
        return Verdict("rows", best["ci_high"] is not None and best["ci_high"] < settings.least_rows, *names)
    wide = gap["ci_low"] is not None and gap["ci_low"] >= settings.least_gap
    certain = [row for row in known if row["ci_low"] is not None and row["ci_low"] >= settings.least_auc]
    enough = best is not None and best["ci_low"] is not None and best["ci_low"] >= settings.least_rows
    return Verdict("train", bool(known) and wide and enough and len(certain) >= (1 - settings.most_weak) * len(known), *names)


def ranged(row: Row | None, digits: int = 1, unit: str = "") -> str:
    """Return a value with its interval as text."""
    if row is None or row["value"] is None:
        return "not known"
    ends = "" if row["ci_low"] is None else f" ({row['ci_low']:,.{digits}f} to {row['ci_high']:,.{digits}f})"
    return f"{row['value']:,.{digits}f}{unit}{ends}"


def hours_text(row: Row) -> str:
    return (
        "an unknown time" if row["value"] is None else f"{row['value']:.2g} hours ({row['ci_low']:.2g} to {row['ci_high']:.2g})"
    )


def words(config: Config, line: forecast.Line, rows: Sequence[Row], forecasts: Sequence[Row]) -> tuple[str, list[str]]:
    """Return the verdict on a model: a heading, and sentences that give the reasons. rows, forecasts: those of the model."""
    settings, found = config.audit, decide(rows, forecasts, config.audit)
    gap, area_, weak_generation = pick(rows, "non"), pick(rows, "auc"), pick(rows, "weak_generation")
    heading = STATES[found.state] + ("" if found.sure or found.state == "nothing" else ", but not certain")
    said = [f"The model refuses {ranged(gap, unit=' %')} of its own images; below {settings.least_gap:g} % is too small a gap."]
    if weak_generation and weak_generation["value"] is not None:
        said.append(
            f"Of these refusals {ranged(weak_generation, unit=' %')} are weak drawing, because the external judge refuses the "
            "image too; about the others the two judges disagree."
        )
    if not found.known:
        said.append("How good its own judge is cannot be said: no subtask has enough images that an external judge has judged.")
    else:
        said.append(
            f"Its judge's AUC is {ranged(area_, 2)} within subtasks, and at least {settings.least_auc:g} in "
            f"{len(found.known) - len(found.weak)} of {len(found.known)} subtasks."
        )
    if found.weak:
        remedy = " Leave these out of the training prompts." if found.state == "train" else ""
        said.append(f"It is too weak in {', '.join(found.weak)}.{remedy}")
    unreadable = pick(rows, "own_unreadable")
    if unreadable and (unreadable["value"] or 0) > UNREADABLE:
        share = ranged(unreadable, unit=" %")
        said.append(f"Of its own answers {share} could not be read, so the question may not suit it (score.question).")
    for name in dict.fromkeys(row["selection"] for row in forecasts):
        part = {row["quantity"]: row for row in forecasts if row["selection"] == name}
        said.append(
            f"{name}: {settings.prompts:,} training prompts would give {ranged(part['rows'], 0)} rows, of which "
            f"{ranged(part['precision'], unit=' %')} right; {ranged(part['pool'], unit=' %')} of the prompts would wait in the "
            f"discard pool. Drawing, judging and training would take one GPU, or the CPU where there is none, about "
            f"{hours_text(part['gpu_hours'])}."
        )
    gain = next((row for row in forecasts if row["quantity"] == "gain"), None)
    said.append(
        f"The line through the paper's results predicts a change of Gen. by {ranged(gain)} points. Its correlation is 0.53, so "
        "the gap explains about a quarter of how gains differ; the interval says how little that fixes."
    )
    if gap and (gap["value"] or 0) > max(line.non):
        said.append(f"The paper's largest gap on this line is {max(line.non):.1f} %, so the prediction is an extrapolation.")
    return heading, said


# Tables


def cell(row: Row | None, scale: float = 1.0) -> Cell:
    if row is None:
        return Cell()
    value, low, high = (None if row[key] is None else scale * row[key] for key in ("value", "ci_low", "ci_high"))
    return Cell(value, low, high, row["n"])


def paper_line(config: Config, model: str, strata: dict[str, list[Place]], paper: Sequence[Row]) -> Line | None:
    """Return the paper's Non. of a model, in the strata that are a benchmark of the paper. None if it has none."""
    cells: dict[tuple[str, str], Cell] = {}
    sources: dict[str, None] = {}
    for stratum, places in strata.items():
        names = {benchmark for benchmark, _ in places}
        for row in paper:
            if row["model"] == model and len(names) == 1 and same_benchmark(config, min(names), row["benchmark"]):
                cells[stratum, MEAN] = Cell(float(row["value"]))
                sources[row["source"]] = None
    return Line(model, "; ".join(sources), cells, from_paper=True) if cells else None


def non_table(config: Config, strata: dict[str, list[Place]], rows: Sequence[Row], paper: Sequence[Row]) -> Table:
    """Return Non. by subtask and stratum, laid out like the paper's audit, its numbers below those of the same model."""
    groups = [Group(name, {f"{b} {c}": c for b, c in places} | {MEAN: MEAN}) for name, places in strata.items()]
    groups.append(Group(ALL, {MEAN: MEAN}))
    table: list[Line] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = {(ALL, MEAN): cell(pick(own, "non"))}
        for stratum, places in strata.items():
            cells |= {(stratum, " ".join(place)): cell(pick(own, "non", stratum, place)) for place in places}
            cells[stratum, MEAN] = cell(pick(own, "non", stratum))
        table.append(Line(model, config.run, cells))
        if known := paper_line(config, model, strata, paper):
            table.append(known)
    legend = (
        "Non-unification: the share of a model's own images that it refuses itself, in percent with 95 % intervals; n counts "
        "images. Means are unweighted means over subtasks."
    )
    caution = [CAUTION] if any(line.from_paper for line in table) else []
    return Table(f"Non-unification by subtask and stratum, run {config.run}", "", groups, table, [legend, *caution])


def judge_table(config: Config, strata: dict[str, list[Place]], rows: Sequence[Row]) -> Table:
    """Return weak generation and the quality of each model's own judge, by stratum."""
    named = {
        "gen": "Gen.",
        "weak_generation": "weak gen.",
        "false_acceptance": "false acc.",
        "false_refusal": "false ref.",
        "judge_on_own": "agreement",
        "auc": "100 AUC",
    }
    groups = [Group(name, named) for name in [*strata, ALL]]
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = {
            (group.name, name): cell(pick(own, name, None if group.name == ALL else group.name), 100 if name == "auc" else 1)
            for group in groups
            for name in named
        }
        table.append(Line(model, config.run, cells))
    legend = (
        "Percentages with 95 % intervals; n counts images. Gen.: the external judge or the scorers accept. Weak gen.: of the "
        "images that the model refuses, the share that the external judge refuses too. False acc.: of those that the external "
        "judge refuses, the share that the model accepts. False ref.: of those that it accepts, the share that the model "
        "refuses. Agreement: on the model's own images. AUC: how often p(yes) is higher for a right image than for a wrong one "
        "of the same subtask."
    )
    return Table(f"Weak generation and the model's own judge, run {config.run}", "", groups, table, [legend])


def agreement_table(config: Config, rows: Sequence[Row]) -> Table:
    """Return agreement and kappa of every two judges, over all strata together."""
    wanted = [row for row in rows if row["measure"] in ("agreement", "kappa") and not row.get("stratum")]
    pairs = list(dict.fromkeys(f"{row['judge']}, {row['other']}" for row in wanted))
    groups = [Group(pair, {"agreement": "agreement", "kappa": "100 kappa"}) for pair in pairs]
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {
            (f"{row['judge']}, {row['other']}", row["measure"]): cell(row, 100 if row["measure"] == "kappa" else 1)
            for row in wanted
            if row["model"] == model
        }
        table.append(Line(model, config.run, cells))
    legend = (
        "Of the images that both judges have judged: the share with equal verdicts in percent, and Cohen's kappa times 100, "
        "with 95 % intervals. own is the model itself."
    )
    return Table(f"Agreement of judges, run {config.run}", "", groups, table, [legend])


def forecast_table(config: Config, forecasts: Sequence[Row]) -> Table:
    """Return the forecast, with a line for each model and selection."""
    named = {
        "rows": "rows",
        "selected": "prompts with rows, %",
        "pool": "pool, %",
        "precision": "precision, %",
        "gain": "gain",
        "gpu_hours": "GPU hours",
    }
    groups = [Group("forecast", named)]
    table = []
    for model, name in dict.fromkeys((row["model"], row["selection"]) for row in forecasts):
        cells = {
            ("forecast", row["quantity"]): cell(row)
            for row in forecasts
            if (row["model"], row["selection"]) == (model, name) and row["quantity"] in named
        }
        table.append(Line(f"{model}, {name}", config.run, cells))
    legend = (
        f"What {config.audit.prompts:,} training prompts would give, with 95 % intervals; n counts the audited images behind "
        "it. Gain is in points of Gen., from a line through the paper's overall results with its correlation of 0.53. GPU "
        "hours are for one GPU, from measured speeds where speed/results has them, and otherwise from the generous limits of "
        "jobs."
    )
    like = f"As if the training prompts were like those of {', '.join(config.audit.like or config.benchmarks)}."
    assumed = {row["text"] for row in forecasts if row["quantity"] == "correlation"}
    notes = [legend, like, f"The correlation of images of one prompt is {' or '.join(sorted(filter(None, assumed)))}."]
    return Table(f"Forecast of a training, run {config.run}", "", groups, table, notes)


def with_recipe(config: Config, table: Table, models: Sequence[str]) -> Table:
    """Return a table with notes on how the images of every model were drawn and judged."""
    drawn = [f"{name}: {recipe.drawing(config.audited(name))} {recipe.asking(config.audited(name))}" for name in models]
    notes = [*table.notes, *drawn, *(recipe.benchmark(config, name) for name in config.benchmarks)]
    return Table(table.title, table.benchmark, table.groups, table.lines, notes)


# The picture


def bars(axis: Any, models: Sequence[str], labels: Sequence[str], values: Callable[[str, int], Row | None]) -> None:
    """Draw a group of points with intervals for each label, one for each model."""
    width = 0.7 / len(models)
    for number, model in enumerate(models):
        shown = [(place, row) for place in range(len(labels)) if (row := values(model, place)) and row["value"] is not None]
        x = [place + (number - (len(models) - 1) / 2) * width for place, _ in shown]
        axis.plot(x, [row["value"] for _, row in shown], "o", color=f"C{number}", markersize=5, label=model)
        for at, (_, row) in zip(x, shown, strict=True):
            if row["ci_low"] is not None:
                axis.plot([at, at], [row["ci_low"], row["ci_high"]], color=f"C{number}", linewidth=1.5)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")


def plot(config: Config, strata: dict[str, list[Place]], rows: Sequence[Row], forecasts: Sequence[Row], line: forecast.Line,
         out: Path) -> None:  # fmt: skip
    """Plot the gap by subtask, where it comes from, the rows of a training, and the gain that the gap predicts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    of = {model: [row for row in rows if row["model"] == model] for model in models}
    figure = Figure(figsize=(15, 9), layout="constrained")
    FigureCanvasAgg(figure)
    ((gap, branches), (amount, gain)) = figure.subplots(2, 2, width_ratios=(3, 2))

    columns = [(stratum, place) for stratum, places in strata.items() for place in places]
    bars(gap, models, [category for _, (_, category) in columns], lambda model, place: pick(of[model], "non", *columns[place]))
    edge = 0
    for number, (stratum, places) in enumerate(strata.items()):
        gap.axvspan(edge - 0.5, edge + len(places) - 0.5, color="#f2f2f7" if number % 2 == 0 else "white", zorder=0)
        gap.annotate(stratum, (edge - 0.4, 1.01), xycoords=("data", "axes fraction"), fontsize=9, color="#6e6e73")
        edge += len(places)
    gap.axhline(config.audit.least_gap, color="#8e8e93", linewidth=1, linestyle=":")
    gap.set(ylim=(0, 100), ylabel="Non., %", xlim=(-0.5, edge - 0.5))
    gap.set_title("Non-unification by subtask (dotted: the least gap)", pad=18)
    gap.legend(frameon=False, fontsize=9)

    measures = ("weak_generation", "false_acceptance", "false_refusal", "judge_on_own")
    bars(branches, models, ["weak\ngeneration", "false\nacceptance", "false\nrefusal", "agreement"],
         lambda model, place: pick(of[model], measures[place]))  # fmt: skip
    branches.set(ylim=(0, 102), ylabel="%", title="Against the external judge, all strata")

    names = list(dict.fromkeys(row["selection"] for row in forecasts))
    counted = {(row["model"], row["selection"]): row for row in forecasts if row["quantity"] == "rows"}
    bars(amount, models, names, lambda model, place: counted.get((model, names[place])))
    amount.axhline(config.audit.least_rows, color="#8e8e93", linewidth=1, linestyle=":")
    title = f"Rows from {config.audit.prompts:,} training prompts (dotted: the fewest)"
    amount.set(ylim=(0, None), ylabel="training rows", title=title)

    gaps = {model: row for model in models if (row := pick(of[model], "non")) and row["value"] is not None}
    end = max([*line.non, *(row["value"] for row in gaps.values())]) * 1.1
    axis = np.linspace(0, end, 50)
    band = [line.predicted(Value(float(x))) for x in axis]
    gain.fill_between(axis, [b.low for b in band], [b.high for b in band], color="#f2f2f7")  # type: ignore[misc]
    gain.plot(axis, [line.at(float(x)) for x in axis], color="#8e8e93", linewidth=1)
    gain.plot(line.non, line.gain, "x", color="#1c1c1e", label="the paper's results")
    for number, model in enumerate(models):
        if model in gaps:
            gain.plot(gaps[model]["value"], line.at(gaps[model]["value"]), "o", color=f"C{number}")
    gain.set(xlabel="Non. before training, %", ylabel="gain in Gen., points", title="The gain that the gap predicts (95 %)")
    gain.legend(frameon=False, fontsize=9, loc="upper left")
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


# The command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="prompt manifests, <benchmark>.parquet")
    parser.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics manifests of all models")
    several: Any = {"action": "append", "nargs": "+", "default": []}
    parser.add_argument("--scores", metavar=("BENCHMARK MODEL", "FILE"), required=True, help="a model's own scores", **several)
    parser.add_argument("--verdicts", metavar=("BENCHMARK MODEL", "FILE"), help="verdicts of all judges", **several)
    parser.add_argument("--paper", type=Path, required=True, help="the paper's results (CSV)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the audit")
    return parser.parse_args()


def grouped(option: str, given: Sequence[Sequence[str]]) -> dict[tuple[str, str], list[Path]]:
    """Return the files of an option by benchmark and model. Raises UserError where a name or the files are missing."""
    found: dict[tuple[str, str], list[Path]] = {}
    for words_ in given:
        if len(words_) < 3:
            raise UserError(f"{option} {' '.join(words_)}: give a benchmark, a model, and files")
        found.setdefault((words_[0], words_[1]), []).extend(map(Path, words_[2:]))
    return found


def read_models(arguments: argparse.Namespace, config: Config, prompts: dict[str, list[Row]]) -> list[Audited]:
    """Return all models of the arguments, in the configuration's order. Raises UserError on a file that is not given."""
    scores, verdicts = grouped("--scores", arguments.scores), grouped("--verdicts", arguments.verdicts)
    counted = manifests.read_rows(arguments.metrics, "metrics")
    found = []
    for model in config.to_audit():
        images: dict[Place, Images] = {}
        for benchmark, rows in prompts.items():
            if (benchmark, model) not in scores:
                raise UserError(f"--scores: none of {model} on {benchmark}; give its scores of its own images")
            files = verdicts.get((benchmark, model), [])
            images |= read_images(config, benchmark, rows, scores[benchmark, model], files, model)
        own = {((row["benchmark"], row["category"]), row["metric"]): row for row in counted if row["arm"] == model}
        if lacking := [place for place in images if (place, "non") not in own]:
            raise UserError(f"--metrics: none of {model} on {lacking[0][0]}; give its metrics of this benchmark")
        found.append(Audited(model, images, own))
    return found


def main() -> None:
    arguments = parse()
    config = load(arguments.config)
    prompts = {path.stem: manifests.read_rows(path, "prompts") for path in arguments.prompts}
    if unknown := sorted(prompts.keys() - config.benchmarks.keys()):
        raise UserError(
            f"--prompts: {unknown[0]} is no benchmark of {arguments.config}; there are {', '.join(config.benchmarks)}"
        )
    models = read_models(arguments, config, prompts)
    strata = strata_of(config, read_categories(prompts))
    paper = [
        row for row in read_results(arguments.paper)
        if (row["row"], row["metric"], row["category"]) == ("base", "non", "overall")
    ]  # fmt: skip
    line = forecast.paper_line(arguments.paper)

    rows: list[Row] = []
    forecasts: list[Row] = []
    said: dict[str, tuple[str, list[str]]] = {}
    for model in models:
        own = measured(model, strata, config.audit.judges)
        expected = forecast_rows(config, model, line, own)
        said[model.name] = words(config, line, own, expected)
        heading, sentences = said[model.name]
        text = f"{heading}. {' '.join(sentences)}"
        n = sum(len(part.prompt) for part in model.images.values())
        verdict: Row = {"model": model.name, "selection": "any", "quantity": "verdict", "n": n, "text": text}
        rows, forecasts = [*rows, *own], [*forecasts, *expected, verdict]

    out = arguments.out
    parents = [*arguments.prompts, *arguments.metrics]
    for given in (arguments.scores, arguments.verdicts):
        parents += [Path(path) for words_ in given for path in words_[2:]]
    facts = {"audit": config.audit.model_dump(exclude={"models"}), "models": [model.name for model in models]}
    for kind, lines in (("audit", rows), ("forecast", forecasts)):
        complete = [{"run": config.run, **row} for row in lines]
        manifests.write(out / f"{kind}.parquet", kind, complete, stage="stages.audit", settings=facts, parents=parents)
    names = [model.name for model in models]
    expected = [row for row in forecasts if row["quantity"] != "verdict"]
    write(out, "non", [with_recipe(config, non_table(config, strata, rows, paper), names)])
    write(out, "judge", [with_recipe(config, judge_table(config, strata, rows), names)])
    if any(row["measure"] == "kappa" for row in rows):
        write(out, "agreement", [with_recipe(config, agreement_table(config, rows), names)])
    write(out, "forecast", [with_recipe(config, forecast_table(config, expected), names)])
    parts = [f"## {name}: {heading}\n\n" + "\n".join(f"- {s}" for s in found) for name, (heading, found) in said.items()]
    with whole_file(out / "verdict.md") as temporary:
        temporary.write_text(f"# Whether to train, run {config.run}\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    plot(config, strata, rows, expected, line, out / "audit.png")
    for name, (heading, found) in said.items():
        print(f"{name}: {heading}.")
        print("\n".join(textwrap.fill(sentence, 118, initial_indent="  ", subsequent_indent="    ") for sentence in found))


if __name__ == "__main__":
    run_stage(main)
