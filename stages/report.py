"""The tables at the end of a run: every arm compared with base on each benchmark, as one CSV file and on the terminal.

python -m stages.report --metrics base/metrics/validation.parquet sft/metrics/validation.parquet --out summary.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.errors import run_stage
from stages.common.files import write_csv

SHOWN = (
    ("gen", "gen_second", "non", "judge_on_base", "judge_on_own"),
    ("und_paper", "und_pooled", "false_acceptance", "false_refusal"),
)
UNREADABLE = ("own_unreadable", "judge_unreadable", "scorer_unreadable")
BY = {"gen": "scorer", "scorer_unreadable": "scorer", "gen_second": "second_scorer"}
INTERVALS = ("ci_low", "ci_high", "delta", "delta_ci_low", "delta_ci_high")
LEGEND = """\
Values are percentages, overall, of n images. In parentheses: the 95 % interval of the difference from base over prompts.
gen: the image matches its prompt according to the benchmark's judge or scorers, and gen_second to its second scorers.
non: the model rejects its own image.
judge_on_base, judge_on_own: the model agrees with the benchmark's judge on the base model's images, and on its own.
und_paper: the win rate over base, on the n images on which the verdicts differ, where a category without any counts as 50.
und_pooled: the same over all categories together. The intervals of both are those of the difference from 50, a draw.
false_acceptance, false_refusal: the model accepts its own image that is wrong, and rejects one that is right.
The intervals hold for this one model and seed; make study measures over several."""
UNDERSTANDING = """\
Understanding benchmarks ask about images that no model drew; stages/understanding/ defines their metrics."""
Row = dict[str, Any]


def summary_rows(metrics: list[Row]) -> list[Row]:
    """Return one row for each benchmark, arm and category: every metric with its interval and its difference from base.

    `<metric>_n` is the number of images or verdicts behind a metric. A metric is empty for benchmarks that do not have it.
    """
    table: dict[tuple[str, str, str], Row] = {}
    for row in metrics:
        identity = {key: row[key] for key in ("benchmark", "arm", "category", "prompts")}
        line = table.setdefault((row["benchmark"], row["arm"], row["category"]), identity | {"judge": None, "scorer": None})
        name = row["metric"]
        if row["judge"]:
            line[BY.get(name, "judge")] = row["judge"]
        line |= {name: row["value"], f"{name}_n": row["denominator"]}
        line |= {f"{name}_{key}": row[key] for key in INTERVALS}
    return list(table.values())


def signed(number: float) -> str:
    """Return a difference with its sign and one decimal place. Zero is +0.0."""
    return f"{round(number, 1) + 0:+.1f}"


def cell(row: Row, metric: str) -> str:
    """Return a metric as text: its value, how many images it counts, and the difference's interval if there is one."""
    value, low, high = (row.get(key) for key in (metric, f"{metric}_delta_ci_low", f"{metric}_delta_ci_high"))
    if value is None:
        return "-"
    change = "" if row["arm"] == "base" or low is None or high is None else f" ({signed(low)} to {signed(high)})"
    return f"{value:.1f} n {row[f'{metric}_n']}{change}"


def table(rows: list[Row]) -> str:
    """Return the overall rows of one benchmark as tables, followed by the shares of verdicts that could not be read."""
    text = []
    for shown in SHOWN:
        if not (metrics := [metric for metric in shown if any(row.get(metric) is not None for row in rows)]):
            continue
        lines = [["", *metrics], *([row["arm"], *(cell(row, metric) for metric in metrics)] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text += [
        f"{row['arm']}: {name} {row[name]:.1f} n {row[f'{name}_n']}" for row in rows for name in UNREADABLE if row.get(name)
    ]
    return "\n".join(text)


def understands(row: Row) -> bool:
    """Return whether a row belongs to an understanding benchmark. Every other benchmark has Non."""
    return "non" not in row


def answers_table(rows: list[Row]) -> str:
    """Return the overall rows of an understanding benchmark as a table with a line for each metric."""
    names = [name.removesuffix("_n") for name in rows[0] if name.endswith("_n")]
    lines = [["", *(row["arm"] for row in rows)], *([name, *(cell(row, name) for row in rows)] for name in names)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def show(rows: list[Row]) -> str:
    """Return one table for each benchmark."""
    parts = []
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        overall = [row for row in rows if row["benchmark"] == benchmark and row["category"] == "overall"]
        if understands(overall[0]):
            parts.append(f"{benchmark} (understanding)\n{answers_table(overall)}")
            continue
        judge, scorer = overall[0]["judge"], overall[0]["scorer"]
        judged = f"judge {judge}" if judge else "no external judge"
        scored = f", gen by {scorer}" if scorer and scorer != judge else ""
        parts.append(f"{benchmark} ({judged}{scored})\n{table(overall)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--metrics", type=Path, nargs="+", required=True, help="metrics manifests of all benchmarks and arms, base first"
    )
    parser.add_argument("--out", type=Path, required=True, help="summary.csv")
    arguments = parser.parse_args()
    rows = summary_rows(manifests.read_rows(arguments.metrics, "metrics"))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    write_csv(arguments.out, columns, rows)
    print(show(rows))
    print(f"\n{LEGEND}")
    if any(map(understands, rows)):
        print(UNDERSTANDING)


if __name__ == "__main__":
    run_stage(main)
