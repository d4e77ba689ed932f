"""Hold the forecast of an audit against what training then did, over finished runs whose benchmark has an external judge.

    python -m stages.tools.forecast_check --runs results/tiny-janus --out forecast.csv --plot forecast.png

For each run, the forecast is made from the base model's images of the benchmarks, as `snakemake audit` makes it, once from the
first image of each prompt and once from all of them. It is compared with

rows, selected, pool   of the selection (pairs.parquet and discard.parquet of the arm), from all training candidates
precision              share of right images among the rows, if the external judge has judged the training candidates
                       (`snakemake precision`); the benchmarks' external judge must be one
gain                   of Gen. on the benchmark, overall and in each category, for which the line takes that category's Non.

An arm that has not been trained or evaluated has no gain. The forecast takes the categories in the proportions of the training
prompts. `error` is forecast minus found, in the unit of the quantity, and `relative` the same in percent of what was found.
`inside` says whether the interval contains it. What was found of gain is itself measured with an error (`found_ci_low`,
`found_ci_high`).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.audit import Images, Place, plans, read_images  # the stage's own functions, so that the forecast cannot differ
from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file, write_csv
from stages.common.seeds import hash_seed
from stages.judge_report import external_judge
from stages.tools import forecast
from stages.tools.arms import selection_owner
from stages.tools.forecast import Line, Value
from stages.tools.study import files, true_share

Row = dict[str, Any]
COLUMNS = (
    *("run", "arm", "images", "benchmark", "category", "quantity", "forecast", "ci_low", "ci_high"),
    *("found", "found_ci_low", "found_ci_high", "error", "relative", "inside"),
)
SHOWN = {
    "rows": "training rows",
    "pool": "discard pool, % of prompts",
    "precision": "precision, %",
    "gain": "gain in Gen., points",
}
PAPER = Path(__file__).resolve().parents[1] / "paper" / "results.csv"


def audited(run: Path, config: Config) -> dict[str, dict[Place, Images]]:
    """Return the base model's images of all benchmarks by category: the first of each prompt, and all of them."""
    config = config.model_copy(update={"audit": config.audit.model_copy(update={"judges": []})})  # they measure agreement only
    every: dict[Place, Images] = {}
    first: dict[Place, Images] = {}
    for name, benchmark in config.benchmarks.items():
        prompts = manifests.read_rows(run / "prompts" / f"{name}.parquet", "prompts")
        scores = files(run, config, name, "base", "scores")
        verdicts = files(run, config, name, "base", "verdicts", benchmark.judge) if benchmark.judge else []
        images = read_images(config, name, prompts, scores, verdicts, "base")
        drawn = manifests.read_rows(files(run, config, name, "base", "candidates"), "candidates", without=("tokens", "latents"))
        firsts = [row["candidate_id"] for row in drawn if row["index"] == 0]
        every |= images
        first |= {place: part.only(np.isin(part.candidate, firsts)) for place, part in images.items()}
    return {"first": first, "all": every}


def selected(run: Path, config: Config, arm: str) -> dict[str, Value]:
    """Return what an arm's selection found: rows, and selected, pool and precision in percent."""
    pairs = manifests.read_rows(run / arm / "pairs.parquet", "pairs")
    waiting = [row for row in manifests.read_rows(run / arm / "discard.parquet", "discard") if row["reason"] == "no_accepted"]
    prompts = len(manifests.read_rows(run / "prompts/train.parquet", "prompts"))
    judge = external_judge(config, "train")
    chosen = [row["chosen"] for row in pairs]
    right, judged = (true_share(run, config, judge, "train", "base", chosen) if judge else None) or (0, 0)
    return {
        "rows": Value(float(len(pairs))),
        "selected": Value(100 * len({row["prompt_id"] for row in pairs}) / prompts),
        "pool": Value(100 * len(waiting) / prompts),
        "precision": Value(100 * right / judged if judged else None),
    }


def compared(where: Row, quantity: str, expected: Value, found: Value) -> Row:
    """Return a row of the table."""
    row = where | {"quantity": quantity, "forecast": expected.value, "ci_low": expected.low, "ci_high": expected.high}
    row |= {"found": found.value, "found_ci_low": found.low, "found_ci_high": found.high}
    if expected.value is None or found.value is None:
        return row
    error = expected.value - found.value
    inside = None if expected.low is None or expected.high is None else expected.low <= found.value <= expected.high
    return row | {"error": error, "relative": 100 * error / found.value if found.value else None, "inside": inside}


def of_selections(run: Path, config: Config) -> Iterable[Row]:
    """Yield the comparison of every selection that the model itself makes."""
    training = Counter(row["category"] for row in manifests.read_rows(run / "prompts/train.parquet", "prompts"))
    for images, places in audited(run, config).items():
        known = {place: part for place, part in places.items() if place[1] in training}
        if not known:
            raise UserError(f"{run}: no benchmark has a category of the training prompts, so nothing can be compared")
        several = Counter(category for _, category in known)
        shares = {f"{b} {c}": training[c] / several[c] for b, c in known}
        for arm, (plan, _) in plans(config).items():
            groups = {f"{b} {c}": forecast.group(p.p_yes, p.right(), p.prompt, plan) for (b, c), p in known.items()}
            seed = hash_seed("forecast", plan.objective)
            count = sum(training.values())
            expected = forecast.selection(groups, plan, count, config.audit.correlation, seed, shares)
            where = {"run": config.run, "arm": arm, "images": images}
            for quantity, found in selected(run, config, arm).items():
                yield compared(where, quantity, expected[quantity], found)


def metric_rows(run: Path, node: str, benchmark: str) -> list[Row]:
    """Return the metrics of a checkpoint on a benchmark; none if it has not been evaluated."""
    path = run / node / "metrics" / f"{benchmark}.parquet"
    return manifests.read_rows(path, "metrics") if path.is_file() else []


def of_gains(run: Path, config: Config, line: Line) -> Iterable[Row]:
    """Yield the comparison of the gain of every arm whose selection the model itself makes."""
    own = plans(config)
    for benchmark in config.benchmarks:
        gaps = {
            row["category"]: Value(row["value"], row["ci_low"], row["ci_high"])
            for row in metric_rows(run, "base", benchmark)
            if row["metric"] == "non"
        }
        for arm in config.arms:
            if selection_owner(config, arm) not in own:
                continue
            for row in metric_rows(run, arm, benchmark):
                if row["metric"] == "gen" and row["category"] in gaps:
                    where = {
                        "run": config.run,
                        "arm": arm,
                        "images": "all",
                        "benchmark": benchmark,
                        "category": row["category"],
                    }
                    found = Value(row["delta"], row["delta_ci_low"], row["delta_ci_high"])
                    yield compared(where, "gain", line.predicted(gaps[row["category"]]), found)


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the error of each quantity in words, and how gains went with Non. over runs, arms and categories."""
    said = []
    for images in ("first", "all"):
        for quantity in (*SHOWN, "selected"):
            part = [r for r in rows if (r["images"], r["quantity"]) == (images, quantity) and r.get("error") is not None]
            part = [row for row in part if row.get("category") in (None, "overall")]
            if part:
                errors = np.array([row["error"] for row in part])
                inside = sum(bool(row["inside"]) for row in part)
                said.append(
                    f"{quantity}, from {'the first image of each prompt' if images == 'first' else 'all images'}: mean error "
                    f"{errors.mean():+.1f}, mean absolute error {np.abs(errors).mean():.1f}, {inside} of {len(part)} intervals "
                    "contain what was found."
                )
    return said


def correlation(runs: Sequence[Path]) -> str:
    """Return in words how gains in Gen. correlate with Non. of base, over runs, categories, and arms that are no controls."""
    non, gain = [], []
    for run in runs:
        config = load(run / "run_config.yaml")
        for benchmark in config.benchmarks:
            base = metric_rows(run, "base", benchmark)
            gaps = {row["category"]: row["value"] for row in base if row["metric"] == "non" and row["category"] != "overall"}
            for arm in plans(config):
                for row in metric_rows(run, arm, benchmark):
                    if row["metric"] == "gen" and row["category"] in gaps and row["delta"] is not None:
                        non.append(gaps[row["category"]])
                        gain.append(row["delta"])
    if len(non) < 3 or np.std(non) == 0 or np.std(gain) == 0:
        return "There are too few runs and categories for a correlation of gain with Non."
    value = float(np.corrcoef(non, gain)[0, 1])
    return (
        f"Over {len(non)} cases (by run, category, and arm for which the model itself selects), "
        f"gain in Gen. correlates with Non. before training at {value:.2f}."
    )


def plot(rows: Sequence[Row], out: Path) -> None:
    """Plot what was found against the forecast, a panel for each quantity. The diagonal is a perfect forecast."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    styles = {"first": ("#fc8d59", "o", "from one image a prompt"), "all": ("#1c1c1e", "s", "from all images")}
    for axis, (quantity, title) in zip(figure.subplots(2, 2).flat, SHOWN.items(), strict=True):
        ends: list[float] = []
        for images, (color, marker, label) in styles.items():
            part = [r for r in rows if (r["images"], r["quantity"]) == (images, quantity) and r.get("error") is not None]
            whole = [row for row in part if row.get("category") in (None, "overall")]
            small = [row for row in part if row not in whole]
            axis.plot([r["forecast"] for r in small], [r["found"] for r in small], ".", color="#c7c7cc", zorder=0)
            for row in whole:
                axis.plot([row["ci_low"], row["ci_high"]], [row["found"]] * 2, color=color, linewidth=1)
            if whole:
                places = [row["forecast"] for row in whole], [row["found"] for row in whole]
                axis.plot(*places, marker, color=color, markersize=6, label=label)
            ends += [row[end] for row in part for end in ("forecast", "found")]
        if ends:
            axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#8e8e93", linewidth=1, linestyle=":")
        axis.set(title=title, xlabel="forecast, with its 95 % interval", ylabel="found")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="results folders of finished runs")
    parser.add_argument("--paper", type=Path, default=PAPER, help="the paper's results (CSV)")
    parser.add_argument("--out", type=Path, required=True, help="table (CSV)")
    parser.add_argument("--plot", type=Path, help="plot to write (PNG)")
    arguments = parser.parse_args()
    line = forecast.paper_line(arguments.paper)
    rows: list[Row] = []
    for run in arguments.runs:
        config = load(run / "run_config.yaml")
        if not config.arms:
            raise UserError(f"{run}: this run only audited, so there is no training to compare with; give runs with arms")
        rows += [*of_selections(run, config), *of_gains(run, config, line)]
    write_csv(arguments.out, COLUMNS, rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    print("\n".join([*summary(rows), correlation(arguments.runs)]))


if __name__ == "__main__":
    run_stage(main)
