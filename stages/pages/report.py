"""The report: one page for print with what a paper's appendix needs, from the files that a run has so far."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from stages.common import manifests
from stages.common.errors import UserError
from stages.pages import plots
from stages.pages.render import package_version, page
from stages.pages.run import BASE, Run, read_columns, selection_folders
from stages.tools import arms

Row = dict[str, Any]
METRICS = {"gen": "Gen.", "und_paper": "Und.", "non": "Non."}
OVERALL = "overall"
JUDGING = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "false_acceptance": "false acceptance",
    "false_refusal": "false refusal",
    "ece": "ECE",
    "accepted": "accepted",
    "pool": "pool",
}
FINDINGS = ("finding", "threshold_finding", "warning")
AUDIT = {  # tables of stages.audit
    "non": "non-unification",
    "judge": "the model's own judge",
    "agreement": "agreement of judges",
    "forecast": "what a training would get",
}
PACKAGES = ("selfgap", "torch", "transformers", "trl", "deepspeed", "peft", "numpy", "pillow", "pyarrow", "snakemake")
POINTS = 200  # of a curve
WIDEST = 1600  # pixels of an embedded picture


@dataclass(frozen=True)
class Cell:
    """A number as text, with its interval and count below it."""

    text: str
    small: str = ""


@dataclass(frozen=True)
class Grid:
    """A table. Each row has a text for each label and a cell for each head."""

    title: str
    labels: list[str]
    heads: list[str]
    rows: list[tuple[list[str], list[Cell]]]
    notes: list[str] = field(default_factory=list)


# Tables


def cell(value: float | None, low: float | None, high: float | None, n: int | None, digits: int = 1) -> Cell:
    """Return a value with its interval and count. The digits are those after the point."""
    if value is None:
        return Cell("-")
    parts = [] if low is None or high is None else [f"{low:.{digits}f} to {high:.{digits}f}"]
    return Cell(f"{value:.{digits}f}", ", ".join([*parts, *([f"n {n}"] if n is not None else [])]))


def cell_of(row: Row, count: str, digits: int = 1) -> Cell:
    """Return the cell of a row with the columns value, ci_low, ci_high and a count. An empty row has none."""
    return cell(row.get("value"), row.get("ci_low"), row.get("ci_high"), row.get(count), digits)


def read_table(path: Path, labels: Sequence[str], title: str) -> list[Grid]:
    """Return a table of results/<run>/tables, one for each benchmark where there is a column for it; none without the file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    heads = [name for name in (rows[0] if rows else ()) if f"{name}_n" in rows[0]]
    grids: dict[str, Grid] = {}
    for row in rows:

        def number(name: str, row: Row = row) -> float | None:
            return float(row[name]) if row.get(name) else None

        where = row.get("benchmark") or ""
        if where not in grids:
            notes = [row["recipe"]] if row.get("recipe") else []
            names = [" ".join([*name.split(" ")[:-1], METRICS.get(name.split(" ")[-1], name.split(" ")[-1])]) for name in heads]
            grids[where] = Grid(f"{where}: {title}" if where else title, list(labels), names, [], notes)
        cells = []
        for name in heads:
            n = number(f"{name}_n")
            cells.append(cell(number(name), number(f"{name}_ci_low"), number(f"{name}_ci_high"), None if n is None else int(n)))
        grids[where].rows.append(([row.get(name) or "" for name in labels], cells))
    return list(grids.values())


def metrics_of(run: Run) -> list[Row]:
    """Return the metrics of base, baselines, arms and audited models that exist."""
    models = run.compared()
    places = [("metrics", name) for name in run.config.benchmarks]
    places += [("understanding", name) for name in run.config.understanding]
    paths = [run.folder / model / kind / f"{name}.parquet" for kind, name in places for model in models]
    return manifests.read_rows([path for path in paths if path.exists()], "metrics")


def so_far(rows: list[Row]) -> list[Grid]:
    """Return a table of the metrics that exist, for a run whose tables have not been made."""
    overall = [row for row in rows if row["category"] == OVERALL]
    columns = list(dict.fromkeys((row["benchmark"], row["metric"]) for row in overall if row["metric"] in METRICS))
    if not columns:
        return []
    found = {(row["arm"], row["benchmark"], row["metric"]): row for row in overall}
    lines = []
    for model in dict.fromkeys(row["arm"] for row in overall):
        known = [found.get((model, *column), {}) for column in columns]
        lines.append(([model], [cell_of(row, "denominator") for row in known]))
    heads = [f"{benchmark} {METRICS[metric]}" for benchmark, metric in columns]
    note = "The run is not complete, so this table has only the models that have been measured so far."
    return [Grid("Generation, so far", ["model"], heads, lines, [note])]


def tables(run: Run, rows: list[Row]) -> list[Grid]:
    """Return the result tables and those of an audit, or what has been measured so far."""
    folder = run.folder / "tables"
    found = read_table(folder / "generation.csv", ["model", "source"], "Generation, overall")
    found += read_table(folder / "by_subtask.csv", ["category", "difficulty", "model", "source"], "by subtask")
    found += read_table(folder / "understanding.csv", ["model", "source"], "Understanding, overall")
    for name, title in AUDIT.items():
        found += read_table(run.folder / "audit" / f"{name}.csv", ["model", "source"], f"Audit: {title}")
    return found or so_far(rows)


def selection(run: Run) -> Grid | None:
    """Return what each selection took, and what each replay recovered."""
    lines = []
    for place in selection_folders(run):
        folder = place.folder
        if not (folder / "pairs.parquet").exists():
            continue
        pairs = read_columns([folder / "pairs.parquet"], "pairs", ("prompt_id",))["prompt_id"]
        discarded = [folder / "discard.parquet"] if (folder / "discard.parquet").exists() else []
        reasons = read_columns(discarded, "discard", ("reason",))["reason"].to_pylist()
        waiting = reasons.count("no_accepted")
        numbers = [len(pairs), len(pairs.unique()), waiting, len(reasons) - waiting]
        lines.append(([place.label], [Cell(f"{number:,}") for number in numbers]))
    heads = ["training rows", "prompts", "discard pool", "accepted, but no pair"]
    notes = ["Of a replay: the rows and prompts that it recovered, and those that still have no accepted candidate."]
    return Grid("What was selected", ["arms"], heads, lines, notes) if lines else None


def judging(run: Run) -> tuple[Grid | None, list[str]]:
    """Return the judge report's numbers overall, and its findings in words."""
    path = run.folder / "judge_report.parquet"
    if not path.exists():
        return None, []
    rows = manifests.read_rows(path, "judge_report")
    texts = [row["text"] for row in rows if row["measure"] in FINDINGS and row["text"]]
    found: dict[tuple[str, str], dict[str, Row]] = {}
    thresholds = set(run.config.accept_thresholds()[:1])
    for row in rows:
        at = row["measure"] not in ("accepted", "pool") or row["threshold"] in thresholds
        if row["category"] == OVERALL and row["reason"] is None and row["measure"] in JUDGING and at:
            found.setdefault((row["set"], row["checkpoint"]), {}).setdefault(row["measure"], row)
    lines = [(list(place), [cell_of(known.get(name, {}), "n", digits=3) for name in JUDGING]) for place, known in found.items()]
    text = ", ".join(f"{threshold:g}" for threshold in sorted(thresholds))
    notes = [f"Shares with 95 % intervals; accepted and pool are those at {text}. stages/judge_report.py defines all of them."]
    return Grid("The model's own judge", ["set", "model"], list(JUDGING.values()), lines, notes), list(dict.fromkeys(texts))


def numbers(jobs: list[Row], key: str) -> list[float]:
    """Return a measure of those jobs for which Snakemake could take it."""
    return [float(job[key]) for job in jobs if job.get(key) not in (None, "NA")]


def cost(run: Run) -> Grid | None:
    """Return the time and memory of the jobs that Snakemake has measured, by stage."""
    totals: dict[str, list[Row]] = {}
    folder = run.folder / "benchmarks"
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            totals.setdefault(path.relative_to(folder).parts[0], []).append(json.loads(line))
    lines = []
    for stage, jobs in totals.items():
        seconds, busy, memory = (numbers(jobs, key) for key in ("s", "cpu_time", "max_rss"))
        hours = [f"{sum(part) / 3600:.2f}" for part in (seconds, busy)]
        lines.append(([stage], [Cell(text) for text in (f"{len(jobs):,}", *hours, f"{max(memory, default=0) / 1000:.2f}")]))
    notes = [
        "Of the last run of each job that draws, judges, asks or trains. Hours are those of the job, however many GPUs it had. "
        "python -m stages.tools.cost estimates a run beforehand."
    ]
    heads = ["jobs", "hours", "CPU hours", "largest memory, GB"]
    return Grid("Time and memory", ["stage"], heads, lines, notes) if lines else None


# Plots


@dataclass(frozen=True)
class Figure:
    """A picture with its caption: SVG, or the address of an embedded picture."""

    caption: str
    svg: Any = None
    source: str | None = None


def points(rows: list[Row], row_of: str, value: str, low: str, high: str) -> list[plots.Point]:
    return [plots.Point(r[row_of], r["arm"], r[value], r[low], r[high]) for r in rows if r[value] is not None]


def nothing(run: Run, row: Row, value: str) -> bool:
    """Return whether a row says nothing: no model differs from itself, so base and audited models have no such numbers."""
    alone = row["arm"] == BASE or row["arm"] in run.config.audit.models
    return alone and (value == "delta" or row["metric"] == "und_paper")


def interval_plots(run: Run, rows: list[Row]) -> list[Figure]:
    """Return for each benchmark the metrics overall, by subtask, and the differences from base."""
    found = []
    order = list(dict.fromkeys(row["arm"] for row in rows))
    for name in run.config.benchmarks:
        mine = [row for row in rows if row["benchmark"] == name]
        by_metric = {label: [row for row in mine if row["metric"] == metric] for metric, label in METRICS.items()}
        plain, change = ("value", "ci_low", "ci_high"), ("delta", "delta_ci_low", "delta_ci_high")

        def panels(overall: bool, keys: Sequence[str], parts: dict[str, list[Row]] = by_metric) -> dict[str, list[plots.Point]]:
            found = {}
            for label, part in parts.items():
                shown = [r for r in part if (r["category"] == OVERALL) is overall and not nothing(run, r, keys[0])]
                found[label] = points(shown, "arm" if overall else "category", *keys)
            return found

        wanted = [
            (f"{name}, overall", panels(True, plain), "percent", False),
            (f"{name}, overall, difference from base (for Und. from 50)", panels(True, change), "percentage points", True),
            (f"{name}, by subtask", panels(False, plain), "percent", False),
        ]
        for title, parts, label, zero in wanted:
            if svg := plots.intervals(title, parts, order, label, zero):
                found.append(Figure(f"{title}, with 95 % intervals.", svg))
    return found


def training_losses(run: Run) -> list[Figure]:
    """Return the training loss of each checkpoint by step."""
    curves = {}
    for node in arms.nodes(run.config):
        path = run.folder / node / "training.parquet"
        if path.exists():
            rows = [row for row in manifests.read_rows(path, "training") if row["metric"] == "loss"]
            width = -(-len(rows) // POINTS)
            pieces = [rows[start : start + width] for start in range(0, len(rows), width or 1)]
            if pieces:
                curves[node] = (
                    [sum(row["step"] for row in piece) / len(piece) for piece in pieces],
                    [sum(row["value"] for row in piece) / len(piece) for piece in pieces],
                )
    svg = plots.losses("Training loss by optimizer step", curves)
    return [Figure("Training loss by optimizer step, for each checkpoint that was trained.", svg)] if svg else []


def embedded(path: Path, caption: str) -> list[Figure]:
    """Return a picture of the run inside the page, none if it does not exist."""
    if not path.exists():
        return []
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDEST, 100_000), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80, method=4)
    return [Figure(caption, source=f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}")]


# Origin


def code_of_stages(run: Run) -> list[tuple[str, str]]:
    """Return each stage with a hash of the code that wrote its first file."""
    found = {}
    for path in sorted(run.folder.glob("**/*.parquet")):
        if "work" in path.relative_to(run.folder).parts or path.parent.name.startswith("."):
            continue
        try:
            facts = manifests.facts(path)
        except UserError:  # the pages of a run that has failed are made as well as possible
            continue
        if facts and facts["stage"] not in found:
            found[facts["stage"]] = hashlib.sha256(" ".join(facts["code"]).encode()).hexdigest()[:12]
    return sorted(found.items())


def versions() -> list[tuple[str, str]]:
    known = [("Python", platform.python_version()), *((name, package_version(name)) for name in PACKAGES)]
    return [(name, version) for name, version in known if version]


def facts_of(run: Run) -> Row:
    """Return everything that the report says."""
    rows = metrics_of(run)
    numbers, findings = judging(run)
    config = run.config
    curves = embedded(run.folder / "learning_curves.png", "Metrics by epoch of training, with 95 % intervals as bands.")
    caption = "The judge report: ROC curves, calibration and distribution of p(yes), and what each threshold would accept."
    return {
        "run": config.run,
        "seed": config.seed,
        "model": run.subject(),
        "missing": run.missing(),
        "tables": tables(run, rows),
        "plots": interval_plots(run, rows),
        "curves": curves + training_losses(run),
        "judge_grids": [numbers] if numbers else [],
        "findings": findings,
        "judge_plots": embedded(run.folder / "judge_report.png", caption),
        "selection": [grid for grid in [selection(run)] if grid],
        "cost": [grid for grid in [cost(run)] if grid],
        "configuration": (run.folder / "run_config.yaml").read_text(encoding="utf-8"),
        "versions": versions(),
        "code": code_of_stages(run),
    }


def page_of(facts: Row, alone: bool) -> str:
    """Return the report as a page. alone: a single file without links to other pages."""
    return page("report.html", name="report", title="Report", alone=alone, **facts)
