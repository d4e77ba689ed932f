"""Count: from manifests of images, verdicts and scores to the metrics, with 95 % intervals clustered by prompt.

    python -m stages.evaluate --config config.yaml --arm sft --prompts heldout.parquet --verdicts ... --scores ... \\
        --base-verdicts ... --base-scores ... --arm-scores-of-base ... --out metrics.parquet

No model is loaded. stages/tools/metrics.py defines every metric.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.common import manifests
from stages.common.config import load
from stages.common.runtime import run_stage
from stages.common.seeds import hash_seed
from stages.tools import metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="base, or the arm's name")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest of the evaluation")
    parser.add_argument("--verdicts", type=Path, nargs="+", required=True, help="the judge on the arm's images")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the arm on its own images")
    parser.add_argument("--base-verdicts", type=Path, nargs="+", required=True, help="the judge on the base model's images")
    parser.add_argument("--base-scores", type=Path, nargs="+", required=True, help="the base model on its own images")
    parser.add_argument("--arm-scores-of-base", type=Path, nargs="+", required=True, help="the arm on the base's images")
    parser.add_argument("--out", type=Path, required=True, help="metrics manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.evaluate
    threshold = settings.verdict_threshold
    prompts = manifests.read_rows(arguments.prompts, "prompts")
    own = metrics.read_images(arguments.verdicts, arguments.scores, threshold)
    base = metrics.read_images(arguments.base_verdicts, arguments.base_scores, threshold)
    counted = metrics.count(prompts, own, base, metrics.verdicts(arguments.arm_scores_of_base, threshold))
    reference = metrics.count(prompts, base, base, base.und)
    rows = [
        {"run": config.run, "arm": arguments.arm, "benchmark": settings.judge, "category": category, "metric": name}
        | {"seed": config.seed}
        | metrics.summarise(name, counts, reference[name], groups, settings.bootstrap, hash_seed("bootstrap", name, category))
        for name, counts in counted.items()
        for category, groups in metrics.groups_of(prompts).items()
    ]
    parents = [arguments.prompts, *arguments.verdicts, *arguments.scores, *arguments.base_verdicts]
    parents += [*arguments.base_scores, *arguments.arm_scores_of_base]
    manifests.write(arguments.out, "metrics", rows, stage="stages.evaluate", settings=settings.model_dump(), parents=parents)
    overall = [row for row in rows if row["category"] == "overall" and row["value"] is not None]
    print(f"{arguments.arm}: " + ", ".join(f"{row['metric']} {row['value']:.1f}" for row in overall))


if __name__ == "__main__":
    run_stage(main)
