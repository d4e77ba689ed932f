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

SHOWN = ("gen", "non", "und", "judge_on_base", "judge_on_own")
Row = dict[str, Any]


def summary_rows(metrics: list[Row]) -> list[Row]:
    """One row for each arm and category: value, 95 % interval, counted verdicts and difference to base of every metric."""
    table: dict[tuple[str, str], Row] = {}
    for row in metrics:
        line = table.setdefault((row["arm"], row["category"]), {"arm": row["arm"], "category": row["category"]})
        name = row["metric"]
        line |= {name: row["value"], f"{name}_n": row["denominator"]}
        line |= {f"{name}_{key}": row[key] for key in ("ci_low", "ci_high", "delta", "delta_ci_low", "delta_ci_high")}
    return list(table.values())


def show(rows: list[Row]) -> str:
    """The overall rows as a table for the terminal: value, and the interval of the difference to base."""
    lines = [f"{'':<14}" + "".join(f"{name:>24}" for name in SHOWN)]
    for row in rows:
        if row["category"] != "overall":
            continue
        cells = []
        for name in SHOWN:
            value, low, high = (row.get(key) for key in (name, f"{name}_delta_ci_low", f"{name}_delta_ci_high"))
            change = "" if row["arm"] == "base" or low is None else f" ({low:+.1f} to {high:+.1f})"
            cells.append(f"{'-' if value is None else f'{value:.1f}'}{change}")
        lines.append(f"{row['arm']:<14}" + "".join(f"{cell:>24}" for cell in cells))
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
    print("overall, percent; in brackets the 95 % interval of the difference to base, clustered by prompt")
    print(show(rows))
    print("gen: the judge says the image matches; non: the model refuses its own image; und: win rate over base, 50 is a draw")


if __name__ == "__main__":
    run_stage(main)
