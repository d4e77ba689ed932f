"""Write the result tables as CSV, Markdown and LaTeX, with the paper's numbers beside ours where it has the row.

    python -m stages.tables --config config.yaml --metrics base/metrics/validation.parquet sft/metrics/validation.parquet \\
        --prompts prompts/validation.parquet --paper stages/paper/results.csv --out results/tiny-janus/tables

generation      base, baselines and arms; Gen., Und. and Non. on each benchmark, overall
by_subtask      the same by category, with the category's difficulty where the benchmark defines one
understanding   the same models on each understanding benchmark

No model is loaded. Below each table stands how the images were drawn and judged; in CSV it is the column `recipe`. Und. is
`und_paper` (stages/tools/metrics.py), which counts a category in which no verdict differs as 50, as the paper does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.tools import recipe
from stages.tools.paper import read_paper, same_benchmark
from stages.tools.result_table import Cell, Group, Line, Table, write

Row = dict[str, Any]
METRICS = {"gen": "Gen.", "und_paper": "Und.", "non": "Non."}
WITH_SECOND = {"gen": "Gen.", "gen_second": "second Gen.", "und_paper": "Und.", "non": "Non."}  # of a category
OVERALL = "overall"
LEGEND = (
    "Percentages with 95 % intervals; n counts images or, for Und., the verdicts that differ from base's. Gen.: the "
    "benchmark's judge or scorers say that the image matches. Und.: the win rate against base on base's images, where a "
    "category in which no verdict differs counts as 50. Non.: the model rejects its own image. Overall is the unweighted mean "
    "over categories."
)
CAUTION = "It has its own judge (Qwen2.5-VL-72B) and does not state how it sampled, so compare with care."
FIRST = "Of an understanding benchmark the paper gives one number without its metric; it stands in the first column."


# Reading


def difficulties(prompts: Sequence[Path]) -> dict[tuple[str, str], str]:
    """Return the difficulty by benchmark and category. A manifest's name is that of its benchmark."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for path in prompts:
        for row in manifests.read_rows(path, "prompts"):
            if row["difficulty"]:
                found.setdefault((path.stem, row["category"]), {})[row["difficulty"]] = None
    return {place: ", ".join(names) for place, names in found.items()}


# Building


def lines(config: Config, groups: list[Group], rows: list[Row], paper: list[Row], place: Callable[[Row], str]) -> list[Line]:
    """Return a line for each model, each followed by the paper's where it has one.

    rows: of metrics manifests. paper: the paper's rows that belong to this table. place: from a row to its group's name.
    """
    known = {(group.name, metric) for group in groups for metric in group.metrics}
    found: list[Line] = []
    for model in dict.fromkeys(row["arm"] for row in rows):
        own = {
            (place(row), row["metric"]): Cell(row["value"], row["ci_low"], row["ci_high"], row["denominator"])
            for row in rows
            if row["arm"] == model and (place(row), row["metric"]) in known
        }
        found.append(Line(model, config.run, own))
        theirs = [row for row in paper if row["row"] == model.lower() and (place(row), row["metric"]) in known]
        if theirs:
            sources = "; ".join(dict.fromkeys(row["source"] for row in theirs))
            cells = {(place(row), row["metric"]): Cell(row["value"]) for row in theirs}
            found.append(Line(model, sources, cells, from_paper=True))
    return found


def shown(rows: list[Row], category: str) -> dict[str, str]:
    """Return the metrics that have a column in a category; the second Gen. only where a second scorer measures it."""
    second = (row["value"] for row in rows if row["metric"] == "gen_second" and row["category"] == category)
    return WITH_SECOND if any(value is not None for value in second) else METRICS


def as_ours(config: Config, names: Sequence[str], paper: list[Row]) -> list[Row]:
    """Return the paper's rows under the names that the run gives to their benchmarks."""
    return [row | {"benchmark": name} for name in names for row in paper if same_benchmark(config, name, row["benchmark"])]


def paper_notes(config: Config, table: list[Line]) -> list[str]:
    """Return what must be said about the paper's numbers, if the table has any."""
    sources = dict.fromkeys(line.source for line in table if line.from_paper)
    return [f"Paper: {config.report.paper_model} in {'; '.join(sources)}. {CAUTION}"] if sources else []


def generation(config: Config, rows: list[Row], paper: list[Row]) -> list[Table]:
    """Return the table of all benchmarks, overall."""
    names = [name for name in config.benchmarks if any(row["benchmark"] == name for row in rows)]
    if not names:
        return []
    groups = [Group(name, METRICS) for name in names]
    wanted = [row for row in rows if row["category"] == OVERALL and row["benchmark"] in names]
    theirs = [row for row in as_ours(config, names, paper) if row["category"] == OVERALL]
    table = lines(config, groups, wanted, theirs, lambda row: row["benchmark"])
    recipes = [recipe.benchmark(config, name) for name in names]
    notes = [LEGEND, *paper_notes(config, table), recipe.drawing(config), *recipes, recipe.asking(config)]
    return [Table(f"Generation, run {config.run}", "", groups, table, notes)]


def by_subtask(config: Config, rows: list[Row], paper: list[Row], difficulty: dict[tuple[str, str], str]) -> list[Table]:
    """Return a table for each benchmark, by category."""
    tables = []
    for name in config.benchmarks:
        wanted = [row for row in rows if row["benchmark"] == name and row["category"] != OVERALL]
        if not wanted:
            continue
        categories = dict.fromkeys(row["category"] for row in wanted)
        groups = [Group(category, shown(wanted, category), difficulty.get((name, category), "")) for category in categories]
        table = lines(config, groups, wanted, as_ours(config, [name], paper), lambda row: row["category"])
        notes = [LEGEND, *paper_notes(config, table), recipe.drawing(config), recipe.benchmark(config, name)]
        tables.append(Table(f"{name} by subtask, run {config.run}", name, groups, table, [*notes, recipe.asking(config)]))
    return tables


def understanding(config: Config, rows: list[Row], paper: list[Row]) -> list[Table]:
    """Return the table of the understanding benchmarks, overall. The paper's number stands in a benchmark's first metric."""
    wanted = [row for row in rows if row["category"] == OVERALL and row["benchmark"] in config.understanding]
    if not wanted:
        return []
    groups = []
    for name in config.understanding:
        metrics = dict.fromkeys(row["metric"] for row in wanted if row["benchmark"] == name)
        groups.append(Group(name, {metric: metric for metric in metrics}))
    first = {group.name: next(iter(group.metrics)) for group in groups if group.metrics}
    theirs = [row | {"metric": first[row["benchmark"]]} for row in as_ours(config, list(first), paper)]
    table = lines(config, groups, wanted, theirs, lambda row: row["benchmark"])
    recipes = [recipe.understanding(config, name) for name in config.understanding]
    legend = "Percentages with 95 % intervals, overall; n counts images. stages/understanding/ defines the metrics."
    of_paper = [*paper_notes(config, table), FIRST] if any(line.from_paper for line in table) else []
    notes = [legend, *of_paper, recipe.drawing(config), *recipes, recipe.asking(config)]
    return [Table(f"Understanding, run {config.run}", "", groups, table, notes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--metrics", type=Path, nargs="+", required=True, help="metrics manifests of all models, base first")
    parser.add_argument(
        "--prompts", type=Path, nargs="*", default=[], help="the benchmarks' prompt manifests, <benchmark>.parquet"
    )
    parser.add_argument("--paper", type=Path, help="the paper's results (CSV), of which report.paper_model names the rows")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    arguments = parser.parse_args()
    config = load(arguments.config)
    rows = manifests.read_rows(arguments.metrics, "metrics")
    if unknown := {row["benchmark"] for row in rows} - config.benchmarks.keys() - config.understanding.keys():
        raise UserError(f"--metrics: {min(unknown)} is no benchmark of {arguments.config}; give that run's own configuration")
    paper = read_paper(arguments.paper, config.report.paper_model)
    write(arguments.out, "generation", generation(config, rows, paper))
    write(arguments.out, "by_subtask", by_subtask(config, rows, paper, difficulties(arguments.prompts)), by_group=True)
    write(arguments.out, "understanding", understanding(config, rows, paper))
    print(f"{arguments.out}: {len(dict.fromkeys(row['arm'] for row in rows))} models")


if __name__ == "__main__":
    run_stage(main)
