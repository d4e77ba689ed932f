"""The table at the end of a run: every arm against base, as CSV and on the terminal.

python -m stages.report --metrics base/metrics.parquet sft/metrics.parquet --out summary.csv
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.runtime import run_stage, whole_file

SUMMARY = ("gen", "und", "non", "weak_generation", "judge_on_base", "judge_on_own")
Row = dict[str, Any]


def summary_rows(metrics: list[Row]) -> list[Row]:
    """One row for each arm and category, in the order of the metrics: value, interval and number of counted verdicts."""
    table: dict[tuple[str, str], Row] = {}
    for row in metrics:
        if row["metric"] in (*SUMMARY, "false_positive_fixed", "true_positive_broken"):
            line = table.setdefault((row["arm"], row["category"]), {"arm": row["arm"], "category": row["category"]})
            name = row["metric"]
            line |= {name: row["value"], f"{name}_ci_low": row["ci_low"], f"{name}_ci_high": row["ci_high"]}
            line[f"{name}_n"] = row["denominator"]
    return list(table.values())


def show(rows: list[Row]) -> str:
    """The overall rows as a table for the terminal."""
    lines = [f"{'arm':<14}" + "".join(f"{name:>25}" for name in SUMMARY)]
    for row in rows:
        if row["category"] != "overall":
            continue
        cells = []
        for name in SUMMARY:
            value, low, high = (row[key] for key in (name, f"{name}_ci_low", f"{name}_ci_high"))
            interval = f" [{low:.1f}, {high:.1f}]" if low is not None else " (none differ)" if name == "und" else ""
            cells.append(f"{'-' if value is None else f'{value:.1f}'}{interval}")
        lines.append(f"{row['arm']:<14}" + "".join(f"{cell:>25}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics manifests, base first")
    parser.add_argument("--out", type=Path, required=True, help="summary.csv")
    arguments = parser.parse_args()
    rows = summary_rows(manifests.read_rows(arguments.metrics, "metrics"))
    with whole_file(arguments.out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([{k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    print("overall, percent, 95 % intervals over prompts; und is a win rate on the base model's images, 50 means no change")
    print(show(rows))


if __name__ == "__main__":
    run_stage(main)
