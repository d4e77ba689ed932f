"""Several runs of one configuration that differ in their seed, as one table: every arm against base, with intervals.

    python -m stages.tools.study --runs results/study-0 results/study-1 --out docs/study.csv --plot docs/study.png

Each seed draws its own training prompts, candidates, training order and evaluation images; the held-out prompts are the
same. Intervals are 95 %, bootstrapped over seeds and over prompts within categories at once, differences paired in both.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.arms import nodes, selection_owner
from stages.common.config import Config, load
from stages.common.runtime import UserError, run_stage, whole_file
from stages.common.seeds import hash_seed
from stages.tools import metrics

Row = dict[str, Any]
COLUMNS = ("arm", "category", "metric", "value", "delta", "delta_ci_low", "delta_ci_high", "n", "seeds")
ROUNDS = 4000


def files(run: Path, node: str, kind: str, images: str) -> list[Path]:
    return sorted((run / node / kind / images).glob("*.parquet"))


def counted(run: Path, arms: list[str], prompts: list[Row], threshold: float) -> dict[str, dict[str, metrics.Counts]]:
    """By arm, every metric's counts by prompt in one run."""

    def images(arm: str) -> Any:
        return metrics.read_images(
            files(run, arm, "verdicts", "evaluation"), files(run, arm, "scores", "evaluation"), threshold
        )

    base, found = images("base"), {}
    for arm in arms:
        after = files(run, arm, "scores", "evaluation" if arm == "base" else "base-evaluation")
        found[arm] = metrics.count(prompts, images(arm), base, metrics.verdicts(after, threshold))
    return found


def evaluation_rows(runs: list[Path], config: Config) -> list[Row]:
    """Every arm against base, and every arm with replay against its twin without."""
    prompts = manifests.read_rows(runs[0] / "prompts/evaluation.parquet", "prompts")
    for run in runs[1:]:
        if manifests.read_rows(run / "prompts/evaluation.parquet", "prompts") != prompts:
            raise UserError(f"{run}/prompts/evaluation.parquet: not the held-out prompts of {runs[0]}; runs may differ in seed")
    arms = ["base", *config.arms]
    by_run = [counted(run, arms, prompts, config.evaluate.verdict_threshold) for run in runs]
    counts = {
        arm: {name: np.concatenate([part[arm][name] for part in by_run], axis=1) for name in by_run[0][arm]} for arm in arms
    }
    pairs = [(arm, arm, "base") for arm in arms]
    pairs += [(f"{arm} against {twin}", arm, twin) for arm in arms if (twin := arm.removeprefix("c-")) != arm and twin in arms]
    rows = []
    for label, arm, reference in pairs:
        for name, found in counts[arm].items():
            for category, groups in metrics.groups_of(prompts).items():
                seed = hash_seed("study", name, category)
                row = metrics.summarise(name, found, counts[reference][name], groups, ROUNDS, seed)
                if reference != "base":  # und too is compared with the twin's, where summarise compares with a draw
                    one, other = metrics.share(name, found, groups), metrics.share(name, counts[reference][name], groups)
                    row["delta"] = None if one is None or other is None else one - other
                    drawn = [metrics.resample(part, groups, ROUNDS, seed) for part in (found, counts[reference][name])]
                    row["delta_ci_low"], row["delta_ci_high"] = metrics.interval(drawn[0] - drawn[1])
                row |= {"n": row["denominator"], "arm": label, "category": category, "metric": name, "seeds": len(runs)}
                rows.append({column: row[column] for column in COLUMNS})
    return rows


def share_row(arm: str, metric: str, shares: list[tuple[int, int]]) -> Row:
    """Pooled share in percent over the runs, as a row without a difference."""
    numerator, denominator = (sum(part) for part in zip(*shares, strict=True))
    value = 100 * numerator / denominator if denominator else None
    row = dict.fromkeys(COLUMNS) | {"arm": arm, "category": "overall", "metric": metric, "value": value}
    return row | {"n": denominator, "seeds": len(shares)}


def selection_rows(runs: list[Path], config: Config) -> list[Row]:
    """What was selected, held against the truth: precision of the chosen, prompts discarded, recovered by replay."""
    rows = []
    tree = nodes(config)
    for arm in config.arms:
        owner = selection_owner(config, arm)
        precise, discarded, recovered, again = [], [], [], []
        for run in runs:
            true = metrics.verdicts(files(run, "base", "verdicts", "train"), 0.5)
            chosen = [row["chosen"] for row in manifests.read_rows(run / owner / "pairs.parquet", "pairs")]
            precise.append((sum(true[name] is True for name in chosen), len(chosen)))
            waits = manifests.read_rows(run / owner / "discard.parquet", "discard")
            total = len(manifests.read_rows(run / "prompts/train.parquet", "prompts"))
            discarded.append((len([row for row in waits if row["reason"] == "no_accepted"]), total))
            for node in tree[arm].replays:
                pool = manifests.read_rows(run / node / "replay/pool.parquet", "prompts")
                pairs = manifests.read_rows(run / node / "replay/pairs.parquet", "pairs")
                true = metrics.verdicts(files(run, node, "verdicts", "replay"), 0.5)
                recovered.append((len({row["prompt_id"] for row in pairs}), len(pool)))
                again.append((sum(true[row["chosen"]] is True for row in pairs), len(pairs)))
        rows += [share_row(arm, "chosen_precision", precise), share_row(arm, "discarded_prompts", discarded)]
        if recovered:
            rows += [share_row(arm, "recovered_prompts", recovered), share_row(arm, "recovered_precision", again)]
    return rows


def plot(rows: list[Row], arms: list[str], out: Path) -> None:
    """Difference to base of Gen. and Non. and the win rate, with intervals, one line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.45 * len(arms) + 1.4), sharey=True, layout="constrained")
    titles = {"gen": "Gen. (drawn right)", "non": "Non. (refuses its own)", "und": "Und. (win rate less 50)"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        axis.axvline(0, color="#8e8e93", linewidth=1)
        for place, arm in enumerate(arms):
            row = next(r for r in rows if (r["arm"], r["category"], r["metric"]) == (arm, "overall", metric))
            if row["delta_ci_low"] is None:
                continue
            clear = row["delta_ci_low"] > 0 or row["delta_ci_high"] < 0
            axis.plot([row["delta_ci_low"], row["delta_ci_high"]], [place] * 2, color="#1c1c1e", linewidth=1.5)
            axis.plot(row["delta"], place, "o", color="#1c1c1e", markerfacecolor="#1c1c1e" if clear else "white")
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(arms)), arms)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("points against base, 95 % interval", fontsize=8)
    axes[0].invert_yaxis()
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="results folders that differ in their seed")
    parser.add_argument("--out", type=Path, required=True, help="CSV")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args()
    configs = [load(run / "run_config.yaml") for run in arguments.runs]
    first = configs[0].model_dump(exclude={"run", "seed"})
    for run, config in zip(arguments.runs, configs, strict=True):
        if config.model_dump(exclude={"run", "seed"}) != first:
            raise UserError(f"{run}/run_config.yaml: differs from {arguments.runs[0]}'s in more than seed and run")
    rows = evaluation_rows(arguments.runs, configs[0]) + selection_rows(arguments.runs, configs[0])
    with whole_file(arguments.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    if arguments.plot:
        plot(rows, list(configs[0].arms), arguments.plot)
    for row in rows:
        if row["category"] == "overall" and row["value"] is not None:
            interval = "" if row["delta"] is None or row["delta_ci_low"] is None else (
                f"  {row['delta']:+6.2f} ({row['delta_ci_low']:+.2f} to {row['delta_ci_high']:+.2f})"
            )  # fmt: skip
            print(f"{row['arm']:<20} {row['metric']:<22} {row['value']:6.2f}{interval}  n {row['n']}")


if __name__ == "__main__":
    run_stage(main)
