"""Compute an arm's metrics on a benchmark from scores and verdicts, with 95 % intervals clustered by prompt.

    python -m stages.evaluate --config config.yaml --benchmark validation --arm sft --prompts validation.parquet \\
        --scores ... --verdicts ... --base-scores ... --base-verdicts ... --arm-scores-of-base ... --out metrics.parquet

No model is loaded. stages/tools/metrics.py defines every metric. --verdicts and --base-verdicts take the manifests of all
external judges of the benchmark; the column `judge` of a manifest names its judge.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.tools import metrics

Row = dict[str, Any]


def judges_of(config: Config, benchmark: str, categories: set[str]) -> metrics.Judges:
    """Return the judges of a benchmark. Raises UserError on a scorer of a category that the benchmark does not have."""
    if benchmark not in config.benchmarks:
        raise UserError(f"--benchmark {benchmark}: not in the section benchmarks, which has {', '.join(config.benchmarks)}")
    chosen = config.benchmarks[benchmark]
    config.require_scored(benchmark, categories)
    return metrics.Judges(chosen.judge, config.scorers(benchmark), chosen.second_scorers)


def metric_rows(
    prompts: Sequence[Row],
    judges: metrics.Judges,
    counts: dict[str, metrics.Counts],
    base: dict[str, metrics.Counts],
    rounds: int,
) -> list[Row]:
    """Return one row for each metric and category, including overall, with the computed columns of the metrics manifest."""
    groups = metrics.groups_of(prompts)
    categories = [name for name in groups if name != "overall"]
    return [
        {"category": category, "metric": name, "judge": judges.of(name, category, categories)}
        | metrics.summarise(
            name, counts[name], base[name], places, rounds, metrics.resampling_seed("bootstrap", name, category)
        )
        for name in counts
        for category, places in groups.items()
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--benchmark", required=True, help="name of the benchmark, from the section benchmarks")
    parser.add_argument("--arm", required=True, help="base, or the arm's name")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest of the benchmark")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the arm's scores of its own images")
    parser.add_argument("--verdicts", type=Path, nargs="*", default=[], help="verdicts of all external judges on these images")
    parser.add_argument("--base-scores", type=Path, nargs="+", required=True, help="the base model's scores of its own images")
    parser.add_argument(
        "--base-verdicts", type=Path, nargs="*", default=[], help="verdicts of all external judges on these images of base"
    )
    parser.add_argument(
        "--arm-scores-of-base", type=Path, nargs="+", required=True, help="the arm's scores of the base model's images"
    )
    parser.add_argument("--out", type=Path, required=True, help="metrics manifest")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load(arguments.config)
    prompts = manifests.read_rows(arguments.prompts, "prompts")
    judges = judges_of(config, arguments.benchmark, {row["category"] for row in prompts})

    own = metrics.read_images(arguments.scores, arguments.verdicts)
    base = metrics.read_images(arguments.base_scores, arguments.base_verdicts)
    counts = metrics.count(prompts, judges, own, base, metrics.own_verdicts(arguments.arm_scores_of_base))
    of_base = metrics.count(prompts, judges, base, base, base.own)

    found = metric_rows(prompts, judges, counts, of_base, config.evaluate.bootstrap)
    common = {"run": config.run, "arm": arguments.arm, "benchmark": arguments.benchmark, "seed": config.seed}
    facts = {"judge": judges.judge, "scorers": judges.scorers, "second_scorers": judges.second}
    facts |= config.evaluate.model_dump()
    parents = [arguments.prompts, *arguments.scores, *arguments.verdicts, *arguments.base_scores, *arguments.base_verdicts]
    parents += arguments.arm_scores_of_base
    rows = [common | row for row in found]
    manifests.write(arguments.out, "metrics", rows, stage="stages.evaluate", settings=facts, parents=parents)
    overall = [row for row in rows if row["category"] == "overall" and row["value"] is not None]
    values = ", ".join(f"{row['metric']} {row['value']:.1f} (n {row['denominator']})" for row in overall)
    print(f"{arguments.arm} on {arguments.benchmark}: {values}")


if __name__ == "__main__":
    run_stage(main)
