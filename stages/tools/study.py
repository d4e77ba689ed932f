"""Combine runs that differ only in their seed into one table: every arm compared with base, with intervals.

    python -m stages.tools.study --runs results/study-0 results/study-1 --out docs/study.csv --plot docs/study.png

Each seed has its own training prompts, candidates, training order and benchmark images; the benchmark prompts are the same.
The 95 % intervals are bootstrapped jointly over seeds and over prompts within categories; differences are paired in both.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file
from stages.tools import metrics
from stages.tools.arms import nodes, selection_owner

Row = dict[str, Any]
COLUMNS = (
    "benchmark", "arm", "category", "metric", "value", "delta", "delta_ci_low", "delta_ci_high", "denominator", "seeds",
)  # fmt: skip
ROUNDS = 4000


def files(run: Path, node: str, *folders: str) -> list[Path]:
    """Return the manifests of all shards, of one kind and one set of images."""
    return sorted(run.joinpath(node, *folders).glob("*.parquet"))


def counted(run: Path, config: Config, benchmark: str, prompts: list[Row]) -> dict[str, dict[str, metrics.Counts]]:
    """Return the counts of every metric by prompt in one run, by arm."""
    judges = metrics.Judges(config.benchmarks[benchmark].judge, config.scorers(benchmark))

    def images(arm: str) -> metrics.Images:
        looking = config.benchmark_judges(benchmark)
        verdicts = [path for judge in looking for path in files(run, arm, "verdicts", judge, benchmark)]
        return metrics.read_images(files(run, arm, "scores", benchmark), verdicts)

    base = images("base")
    found = {"base": metrics.count(prompts, judges, base, base, base.own)}
    for arm in config.arms:
        trained = metrics.own_verdicts(files(run, arm, "scores-of-base", benchmark))
        found[arm] = metrics.count(prompts, judges, images(arm), base, trained)
    return found


def evaluation_rows(runs: list[Path], config: Config, benchmark: str) -> list[Row]:
    """Return a benchmark's rows: every arm against base, and every arm with replay against the same arm without replay."""
    place = Path("prompts", f"{benchmark}.parquet")
    prompts = manifests.read_rows(runs[0] / place, "prompts")
    for run in runs[1:]:
        if manifests.read_rows(run / place, "prompts") != prompts:
            raise UserError(f"{run / place}: not the prompts of {runs[0]}; the runs of a study may differ only in their seed")
    arms = ["base", *config.arms]
    by_run = [counted(run, config, benchmark, prompts) for run in runs]
    counts = {
        arm: {name: np.concatenate([part[arm][name] for part in by_run], axis=1) for name in by_run[0][arm]} for arm in arms
    }
    pairs = [(arm, arm, "base") for arm in arms]
    pairs += [(f"{arm} against {twin}", arm, twin) for arm in arms if (twin := arm.removeprefix("c-")) != arm and twin in arms]
    rows = []
    for label, arm, reference in pairs:
        for name, found in counts[arm].items():
            for category, groups in metrics.groups_of(prompts).items():
                seed = metrics.resampling_seed("study", name, category)
                row: Row = {"benchmark": benchmark, "arm": label, "category": category, "metric": name, "seeds": len(runs)}
                row |= metrics.summarise(name, found, counts["base"][name], groups, ROUNDS, seed)
                if reference != "base":
                    twins = [metrics.resampled(name, of[name], groups, ROUNDS, seed) for of in (counts[arm], counts[reference])]
                    row |= metrics.difference(*twins)
                rows.append({column: row[column] for column in COLUMNS})
    return rows


def share_row(arm: str, metric: str, shares: list[tuple[int, int]]) -> Row:
    """Return the share pooled over runs, in percent, as a row about the training prompts. It has no difference from base."""
    numerator, denominator = (sum(part) for part in zip(*shares, strict=True))
    value = 100 * numerator / denominator if denominator else None
    row = dict.fromkeys(COLUMNS) | {"benchmark": "train", "arm": arm, "category": "overall", "metric": metric, "value": value}
    return row | {"denominator": denominator, "seeds": len(shares)}


def true_share(run: Path, node: str, judge: str, images: str, chosen: list[str]) -> tuple[int, int]:
    """Return how many of the chosen images match according to the judge, and for how many it has a verdict."""
    verdicts = metrics.external_verdicts(files(run, node, "verdicts", judge, images)).get(judge, {})
    known = [verdicts[name].matches for name in chosen]
    return known.count(True), known.count(True) + known.count(False)


def selection_rows(runs: list[Path], config: Config) -> list[Row]:
    """Return rows about the selection: prompts discarded and recovered by replay, and the precision of the chosen images.

    Precision is measured by the judge of the first benchmark. Without a judge it is left out.
    """
    rows = []
    tree = nodes(config)
    judge = next(iter(config.benchmarks.values())).judge if config.benchmarks else None
    for arm in config.arms:
        owner = selection_owner(config, arm)
        precise, discarded, recovered, again = [], [], [], []
        for run in runs:
            waits = manifests.read_rows(run / owner / "discard.parquet", "discard")
            total = len(manifests.read_rows(run / "prompts/train.parquet", "prompts"))
            discarded.append((len([row for row in waits if row["reason"] == "no_accepted"]), total))
            if judge:
                chosen = [row["chosen"] for row in manifests.read_rows(run / owner / "pairs.parquet", "pairs")]
                precise.append(true_share(run, "base", judge, "train", chosen))
            for node in tree[arm].replays:
                pool = manifests.read_rows(run / node / "replay/pool.parquet", "prompts")
                pairs = manifests.read_rows(run / node / "replay/pairs.parquet", "pairs")
                recovered.append((len({row["prompt_id"] for row in pairs}), len(pool)))
                if judge:
                    again.append(true_share(run, node, judge, "replay", [row["chosen"] for row in pairs]))
        shares = {
            "chosen_precision": precise,
            "discarded_prompts": discarded,
            "recovered_prompts": recovered,
            "recovered_precision": again,
        }
        rows += [share_row(arm, metric, found) for metric, found in shares.items() if found]
    return rows


def plot(rows: list[Row], benchmarks: list[str], arms: list[str], out: Path) -> None:
    """Plot the differences from base of Gen. and Non., and the win rate: a line per arm, a row per benchmark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (11, (0.45 * len(arms) + 1.4) * len(benchmarks))
    figure, axes = pyplot.subplots(len(benchmarks), 3, figsize=size, sharey=True, squeeze=False, layout="constrained")
    titles = {"gen": "Gen. (drawn right)", "non": "Non. (refuses its own)", "und": "Und. (win rate less 50)"}
    overall = {(row["benchmark"], row["arm"], row["metric"]): row for row in rows if row["category"] == "overall"}
    for benchmark, line in zip(benchmarks, axes, strict=True):
        for axis, (metric, title) in zip(line, titles.items(), strict=True):
            axis.axvline(0, color="#8e8e93", linewidth=1)
            for place, arm in enumerate(arms):
                row = overall.get((benchmark, arm, metric))
                if row is None or row["delta_ci_low"] is None:
                    continue
                clear = row["delta_ci_low"] > 0 or row["delta_ci_high"] < 0
                axis.plot([row["delta_ci_low"], row["delta_ci_high"]], [place] * 2, color="#1c1c1e", linewidth=1.5)
                axis.plot(row["delta"], place, "o", color="#1c1c1e", markerfacecolor="#1c1c1e" if clear else "white")
            axis.set_title(title if len(benchmarks) == 1 else f"{benchmark}: {title}", fontsize=10)
            axis.set_yticks(range(len(arms)), arms)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("points against base, 95 % interval", fontsize=8)
    axes[0, 0].invert_yaxis()
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def line(row: Row) -> str:
    """Return a row as a line for the terminal."""
    interval = ""
    if row["delta"] is not None and row["delta_ci_low"] is not None:
        interval = f"  {row['delta']:+6.2f} ({row['delta_ci_low']:+.2f} to {row['delta_ci_high']:+.2f})"
    name = f"{row['benchmark']:<12} {row['arm']:<20} {row['metric']:<22}"
    return f"{name} {row['value']:6.2f}{interval}  of {row['denominator']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="results folders that differ only in their seed")
    parser.add_argument("--out", type=Path, required=True, help="table to write (CSV)")
    parser.add_argument("--plot", type=Path, help="plot to write (PNG)")
    arguments = parser.parse_args()
    configs = [load(run / "run_config.yaml") for run in arguments.runs]
    first = configs[0]
    for run, config in zip(arguments.runs, configs, strict=True):
        if config.model_dump(exclude={"run", "seed"}) != first.model_dump(exclude={"run", "seed"}):
            raise UserError(f"{run}/run_config.yaml: differs from {arguments.runs[0]}'s in more than seed and run")
    rows = [row for benchmark in first.benchmarks for row in evaluation_rows(arguments.runs, first, benchmark)]
    rows += selection_rows(arguments.runs, first)
    with whole_file(arguments.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    if arguments.plot:
        plot(rows, list(first.benchmarks), list(first.arms), arguments.plot)
    for row in rows:
        if row["category"] == "overall" and row["value"] is not None:
            print(line(row))


if __name__ == "__main__":
    run_stage(main)
