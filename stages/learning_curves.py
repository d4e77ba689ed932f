"""Learning curves: how the metrics of each arm change with its epochs of training, as a CSV file and a plot.

    python -m stages.learning_curves --config config.yaml --metrics base/metrics/validation.parquet \\
        sft-epoch3/metrics/validation.parquet sft/metrics/validation.parquet \\
        --out learning_curves.csv --plot learning_curves.png

The metrics are those of the base model (epoch 0), of the arms' checkpoints during training, and of the arms. Arms that share a
checkpoint share its point. The CSV file has every metric and category. The plot shows Gen., Non. and how often the model agrees
with the external judge on the base model's images, all overall, with 95 % intervals as bands.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file, write_csv
from stages.tools import arms

Row = dict[str, Any]
COPIED = ("category", "metric", "judge", "value", "denominator")
INTERVALS = ("ci_low", "ci_high", "delta", "delta_ci_low", "delta_ci_high")
COLUMNS = ("benchmark", "arm", "epoch", "checkpoint", *COPIED, *INTERVALS)
STYLES = ("o-", "o--", "o:", "o-.")  # arms that share checkpoints have lines on top of each other
SHOWN = {
    "gen": "Gen. (drawn right)",
    "non": "Non. (refuses its own)",
    "judge_on_base": "judge accuracy (on base's images)",
}


def curve_rows(metrics: list[Row], tree: dict[str, arms.Node], names: list[str]) -> list[Row]:
    """Return a row for each benchmark, arm, epoch, category and metric. names: the arms.

    Raises UserError if a checkpoint of an arm has no metrics on a benchmark.
    """
    found: dict[tuple[str, str], list[Row]] = {}
    for row in metrics:
        found.setdefault((row["benchmark"], row["arm"]), []).append(row)
    rows: list[Row] = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in metrics):
        for arm in names:
            for epoch, checkpoint in [(0, "base"), *((node.epoch, node.name) for node in arms.path(tree, arm))]:
                if (benchmark, checkpoint) not in found:
                    raise UserError(
                        f"--metrics: no metrics of {checkpoint} on {benchmark}, which the curve of {arm} needs; give the "
                        "metrics of base and of every checkpoint"
                    )
                point = {"benchmark": benchmark, "arm": arm, "epoch": epoch, "checkpoint": checkpoint}
                rows += [point | {key: row[key] for key in (*COPIED, *INTERVALS)} for row in found[benchmark, checkpoint]]
    return rows


def plot(rows: list[Row], out: Path) -> None:
    """Plot a line for each arm, with a row of panels for each benchmark. Equal metrics give equal files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    overall = [row for row in rows if row["category"] == "overall" and row["value"] is not None]
    benchmarks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("benchmark", "arm"))
    shown = [metric for metric in SHOWN if any(row["metric"] == metric for row in overall)]
    figure = Figure(figsize=(4 * len(shown), 3.2 * len(benchmarks)), layout="constrained")
    FigureCanvasAgg(figure)
    for benchmark, panels in zip(benchmarks, figure.subplots(len(benchmarks), len(shown), squeeze=False), strict=True):
        for metric, panel in zip(shown, panels, strict=True):
            for number, arm in enumerate(names):
                line = [row for row in overall if (row["benchmark"], row["metric"], row["arm"]) == (benchmark, metric, arm)]
                banded = [row for row in line if row["ci_low"] is not None]
                color, style = f"C{number}", STYLES[number % len(STYLES)]
                panel.plot([row["epoch"] for row in line], [row["value"] for row in line], style, color=color, label=arm)
                low, high = ([row[end] for row in banded] for end in ("ci_low", "ci_high"))
                panel.fill_between([row["epoch"] for row in banded], low, high, color=color, alpha=0.1, linewidth=0)
            panel.set_title(SHOWN[metric] if len(benchmarks) == 1 else f"{benchmark}: {SHOWN[metric]}", fontsize=10)
            panel.set_xlabel("epoch")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("percent")
        panels[0].legend(fontsize=8, frameon=False)
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--metrics", type=Path, nargs="+", required=True, help="metrics manifests of base and of every checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="table to write (CSV)")
    parser.add_argument("--plot", type=Path, required=True, help="plot to write (PNG)")
    arguments = parser.parse_args()
    config = load(arguments.config)
    rows = curve_rows(manifests.read_rows(arguments.metrics, "metrics"), arms.nodes(config), list(config.arms))
    write_csv(arguments.out, COLUMNS, rows)
    plot(rows, arguments.plot)
    print(f"{len(rows)} points of {len(config.arms)} arms")


if __name__ == "__main__":
    run_stage(main)
