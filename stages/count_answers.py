"""Compute a checkpoint's metrics on an understanding benchmark from its answers, with 95 % intervals.

    python -m stages.count_answers --config config.yaml --name scenes --arm sft --answers answers.parquet \\
        --base-answers base/answers.parquet --out metrics.parquet

No model is loaded. The benchmark's kind defines the metrics (stages/understanding/). `overall` is the unweighted mean over the
categories of a metric. The intervals are those of stages/tools/metrics.py, with images in place of prompts: images are
resampled within their categories, and both checkpoints have the same images in each resample. Where there are few images, or
where all agree, the interval is exact, and images are its trials, however many questions there are about each; AUC and F1 are
then treated as shares of the images from which they are computed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.registry import entry
from stages.tools import metrics
from stages.understanding import understanding_kind
from stages.understanding.base import Answer, Measure, UnderstandingKind

Row = dict[str, Any]


def read_answers(path: Path) -> list[Answer]:
    return [Answer(**row) for row in manifests.read_rows(path, "answers")]


def require_equal_questions(answers: Sequence[Answer], base: Sequence[Answer], path: Path) -> None:
    """Raise UserError unless both checkpoints have answered the same questions."""
    asked, asked_of_base = (
        {(answer.question_id, answer.question, answer.expected) for answer in each} for each in (answers, base)
    )
    if different := asked ^ asked_of_base:
        raise UserError(
            f"--base-answers {path}: {len(different)} questions are not those of --answers, for example "
            f"{min(name for name, *_ in different)}; ask both checkpoints with the same settings"
        )


def by_metric(measures: Sequence[Measure]) -> dict[str, list[Measure]]:
    """Return the measures of each metric, one for each of its categories."""
    found: dict[str, list[Measure]] = {}
    for measure in measures:
        found.setdefault(measure.metric, []).append(measure)
    return found


def counts_of(measures: Sequence[Measure]) -> metrics.Counts:
    """Return a metric's numerators and denominators in all categories, one after another."""
    return np.concatenate([np.stack([measure.numerators, measure.denominators])[:, None] for measure in measures], axis=2)


def categories_of(measures: Sequence[Measure]) -> dict[str, list[np.ndarray]]:
    """Return, by category, groups of places in `counts_of`; `overall` has one group for each category."""
    ends = np.cumsum([len(measure.numerators) for measure in measures])
    places = [np.arange(end - len(measure.numerators), end) for measure, end in zip(measures, ends, strict=True)]
    return {measure.category: [place] for measure, place in zip(measures, places, strict=True)} | {"overall": places}


def metric_rows(kind: UnderstandingKind, answers: Sequence[Answer], base: Sequence[Answer], rounds: int) -> list[Row]:
    """Return one row for each metric and category, including overall, with the computed columns of the metrics manifest."""
    of_base = by_metric(kind.measures(base))
    rows = []
    for name, measures in by_metric(kind.measures(answers)).items():
        counts, base_counts = counts_of(measures), counts_of(of_base[name])
        for category, members in categories_of(measures).items():
            seed = metrics.resampling_seed("understanding", name, category)
            found = metrics.summarise(name, counts, base_counts, members, rounds, seed)
            if found["ci_low"] is not None and found["ci_high"] is not None:  # resampled areas can leave the range
                found |= {"ci_low": max(found["ci_low"], 0.0), "ci_high": min(found["ci_high"], 100.0)}
            rows.append({"category": category, "metric": name, "judge": None, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True, help="name of the benchmark, from the section understanding")
    parser.add_argument("--arm", required=True, help="base, or the arm's name")
    parser.add_argument("--answers", type=Path, required=True, help="the checkpoint's answers")
    parser.add_argument("--base-answers", type=Path, required=True, help="the base model's answers")
    parser.add_argument("--out", type=Path, required=True, help="metrics manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.understanding_benchmark(arguments.name)
    answers, base = read_answers(arguments.answers), read_answers(arguments.base_answers)
    require_equal_questions(answers, base, arguments.base_answers)

    found = metric_rows(understanding_kind(settings.kind), answers, base, config.evaluate.bootstrap)
    common = {"run": config.run, "arm": arguments.arm, "benchmark": arguments.name, "seed": config.seed}
    rows = [common | row for row in found]
    manifests.write(
        arguments.out,
        "metrics",
        rows,
        stage="stages.count_answers",
        settings={"kind": settings.kind, "bootstrap": config.evaluate.bootstrap},
        parents=[arguments.answers, arguments.base_answers],
        uses=[entry("UNDERSTANDING", settings.kind)],
    )
    overall = [row for row in rows if row["category"] == "overall" and row["value"] is not None]
    print(f"{arguments.arm} on {arguments.name}: " + ", ".join(f"{row['metric']} {row['value']:.1f}" for row in overall))


if __name__ == "__main__":
    run_stage(main)
