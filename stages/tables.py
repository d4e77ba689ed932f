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
import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file, write_csv
from stages.tools import recipe

Row = dict[str, Any]
METRICS = {"gen": "Gen.", "und_paper": "Und.", "non": "Non."}
WITH_SECOND = {"gen": "Gen.", "gen_second": "second Gen.", "und_paper": "Und.", "non": "Non."}  # of a category
OVERALL = "overall"
WIDTH = 6  # columns of numbers side by side in LaTeX
LEGEND = (
    "Percentages with 95 % intervals; n counts images or, for Und., the verdicts that differ from base's. Gen.: the "
    "benchmark's judge or scorers say that the image matches. Und.: the win rate against base on base's images, where a "
    "category in which no verdict differs counts as 50. Non.: the model rejects its own image. Overall is the unweighted mean "
    "over categories."
)
CAUTION = "It has its own judge (Qwen2.5-VL-72B) and does not state how it sampled, so compare with care."
FIRST = "Of an understanding benchmark the paper gives one number without its metric; it stands in the first column."


@dataclass(frozen=True)
class Cell:
    """A value in percent with its 95 % interval and the number of images behind it; each is None where there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Group:
    """Columns that belong together: a benchmark or a category, with its difficulty, and the metrics by name."""

    name: str
    metrics: dict[str, str]
    difficulty: str = ""

    def heading(self) -> str:
        return f"{self.name} ({self.difficulty})" if self.difficulty else self.name


@dataclass(frozen=True)
class Line:
    """A row of a table: the model, where the numbers come from, and the cells by group and metric."""

    model: str
    source: str
    cells: dict[tuple[str, str], Cell]
    from_paper: bool = False

    def label(self) -> str:
        return f"{self.model}, paper" if self.from_paper else self.model


@dataclass(frozen=True)
class Table:
    title: str
    benchmark: str
    groups: list[Group]
    lines: list[Line]
    notes: list[str]


# Reading


def read_paper(path: Path | None, model: str | None) -> list[Row]:
    """Return the paper's numbers for a model. The columns are those of stages/paper/results.csv."""
    if path is None or model is None:
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row | {"value": float(row["value"])} for row in csv.DictReader(file) if row["model"] == model]


def same_benchmark(config: Config, name: str, paper: str) -> bool:
    """Return whether a benchmark of the paper is that of the run: they have the same name, or the run's suite has it."""
    return paper in (name.lower(), config.benchmarks[name].prompts.source if name in config.benchmarks else None)


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


# Writing


def csv_cells(cells: dict[tuple[str, str], Cell], group: Group, prefix: str = "") -> Row:
    """Return the columns of a group's cells: each metric with its interval and count."""
    found: Row = {}
    for metric in group.metrics:
        cell, name = cells.get((group.name, metric), Cell()), f"{prefix}{metric}"
        found |= {name: cell.value, f"{name}_ci_low": cell.low, f"{name}_ci_high": cell.high, f"{name}_n": cell.n}
    return found


def csv_rows(tables: list[Table], by_group: bool) -> list[Row]:
    """Return the rows of a CSV file: one for each line or, by group, one for each line and category."""
    found = []
    for table in tables:
        notes = {"recipe": " ".join(table.notes)}
        for line in table.lines:
            known: Row = {"model": line.model, "source": line.source}
            if not by_group:
                parts = [csv_cells(line.cells, group, f"{group.name} ") for group in table.groups]
                found.append(known | {key: value for part in parts for key, value in part.items()} | notes)
                continue
            for group in table.groups:
                if any(name == group.name for name, _ in line.cells):
                    where = {"benchmark": table.benchmark, "category": group.name, "difficulty": group.difficulty or None}
                    found.append(where | known | csv_cells(line.cells, group) | notes)
    return found


def escaped(text: str, characters: dict[str, str]) -> str:
    return "".join(characters.get(character, character) for character in text)


MARKDOWN = {character: f"\\{character}" for character in "\\`*_[]<>|#~"} | {"\n": " "}
LATEX = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "\n": " ",
}  # fmt: skip


def in_words(cell: Cell) -> str:
    """Return a cell as text: the value, its interval and its count, as far as they are known."""
    if cell.value is None:
        return "-"
    range_ = "" if cell.low is None or cell.high is None else f" ({cell.low:.1f} to {cell.high:.1f})"
    return f"{cell.value:.1f}{range_}, n {cell.n}" if cell.n is not None else f"{cell.value:.2f}"


def markdown(table: Table) -> str:
    """Return a table in Markdown, with its notes as a list below it."""
    columns = [(group, metric) for group in table.groups for metric in group.metrics]
    heads = ["", *(f"{group.heading()} {group.metrics[metric]}" for group, metric in columns)]
    body = [
        [line.label(), *(in_words(line.cells.get((group.name, metric), Cell())) for group, metric in columns)]
        for line in table.lines
    ]
    written = ["| " + " | ".join(escaped(text, MARKDOWN) for text in row) + " |" for row in [heads, *body]]
    written.insert(1, "|" + "---|" * len(heads))
    notes = [f"- {escaped(note, MARKDOWN)}" for note in table.notes]
    return "\n".join([f"## {escaped(table.title, MARKDOWN)}", "", *written, "", *notes, ""])


def side_by_side(groups: list[Group]) -> list[list[Group]]:
    """Return the groups in blocks of at most WIDTH columns. A group with more metrics is cut."""
    parts = []
    for group in groups:
        names = list(group.metrics)
        for start in range(0, len(names), WIDTH):
            few = {name: group.metrics[name] for name in names[start : start + WIDTH]}
            parts.append(Group(group.name, few, group.difficulty))
    blocks: list[list[Group]] = [[]]
    for part in parts:
        if blocks[-1] and sum(len(group.metrics) for group in [*blocks[-1], part]) > WIDTH:
            blocks.append([])
        blocks[-1].append(part)
    return blocks


def small(cell: Cell) -> str:
    """Return a cell's interval and count in LaTeX, as they stand below its value."""
    range_ = "" if cell.low is None or cell.high is None else f"{cell.low:.1f}--{cell.high:.1f}"
    count = "" if cell.n is None else f"$n={cell.n}$"
    text = ", ".join(part for part in (range_, count) if part)
    return rf"{{\scriptsize {text}}}" if text else ""


def tabular(groups: list[Group], lines: list[Line]) -> str:
    """Return a block of columns as LaTeX's tabular, with booktabs' rules. A line has its intervals in a second row."""
    columns = [(group, metric) for group in groups for metric in group.metrics]
    heads, rules, start = [], [], 2
    for group in groups:
        heads.append(rf"\multicolumn{{{len(group.metrics)}}}{{c}}{{{escaped(group.heading(), LATEX)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(group.metrics) - 1}}}")
        start += len(group.metrics)
    names = [escaped(group.metrics[metric], LATEX) for group, metric in columns]
    body = []
    for line in lines:
        cells = [line.cells.get((group.name, metric), Cell()) for group, metric in columns]
        values = ["--" if cell.value is None else f"{cell.value:.{1 if cell.n is not None else 2}f}" for cell in cells]
        body.append(" & ".join([escaped(line.label(), LATEX), *values]) + r" \\")
        if any(below := [small(cell) for cell in cells]):
            body.append(" & ".join(["", *below]) + r" \\")
    top = [" & ".join(["", *heads]) + r" \\", " ".join(rules), " & ".join(["", *names]) + r" \\"]
    parts = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", *top, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}"])


def latex(table: Table) -> str:
    """Return a table as a float for a document with booktabs, with its notes below it."""
    blocks = "\n\n\\medskip\n".join(tabular(groups, table.lines) for groups in side_by_side(table.groups))
    notes = "\n\n".join(escaped(note, LATEX) for note in table.notes)
    return "\n".join(
        [
            r"\begin{table}[p]",
            r"\centering\small",
            rf"\caption{{{escaped(table.title, LATEX)}}}",
            blocks,
            "",
            rf"\medskip\parbox{{\linewidth}}{{\footnotesize\raggedright {notes}}}",
            r"\end{table}",
            "",
        ]
    )


def write(out: Path, name: str, tables: list[Table], by_group: bool = False) -> None:
    """Write tables as <name>.csv, <name>.md and <name>.tex; no file if there are none."""
    if not tables:
        return
    rows = csv_rows(tables, by_group)
    columns = [column for row in rows for column in row if column != "recipe"]
    write_csv(out / f"{name}.csv", list(dict.fromkeys([*columns, "recipe"])), rows)
    head = "% needs \\usepackage{booktabs}\n"
    texts = {"md": "\n".join(map(markdown, tables)), "tex": head + "\n".join(map(latex, tables))}
    for ending, text in texts.items():
        with whole_file(out / f"{name}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")


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
