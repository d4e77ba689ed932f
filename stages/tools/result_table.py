"""A table of results: models in lines, metrics in groups of columns, and how it is written as CSV, Markdown and LaTeX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.files import whole_file, write_csv

Row = dict[str, Any]
WIDTH = 6  # columns of numbers side by side in LaTeX


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
