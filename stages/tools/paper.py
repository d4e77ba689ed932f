"""The numbers of arXiv 2507.16663 (stages/paper/results.csv), and to which of a run's benchmarks they belong."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from stages.common.config import Config

Row = dict[str, Any]


def read_results(path: Path) -> list[Row]:
    """Return all rows of the paper's results, as stages/paper/results.csv has them, with the value as a number."""
    with path.open(newline="", encoding="utf-8") as file:
        return [row | {"value": float(row["value"])} for row in csv.DictReader(file)]


def read_paper(path: Path | None, model: str | None) -> list[Row]:
    """Return the paper's numbers for a model; none without a file or a model."""
    return [row for row in read_results(path) if row["model"] == model] if path and model else []


def same_benchmark(config: Config, name: str, paper: str) -> bool:
    """Return whether a benchmark of the paper is that of the run: they have the same name, or the run's suite has it."""
    return paper in (name.lower(), config.benchmarks[name].prompts.source if name in config.benchmarks else None)
