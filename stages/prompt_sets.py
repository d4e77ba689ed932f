"""Check that no training prompt is in a benchmark and that no scorer lacks prompts of its category, and count the prompts.

    python -m stages.prompt_sets --config config.yaml --train prompts/train.parquet \\
        --benchmarks prompts/validation.parquet --out prompts/sets.parquet
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True, help="prompt manifest of the training prompts")
    parser.add_argument("--benchmarks", type=Path, nargs="*", default=[], help="prompt manifests, named by their benchmark")
    parser.add_argument("--out", type=Path, required=True, help="table of the sets (Parquet)")
    arguments = parser.parse_args()
    config = load(arguments.config)
    training = manifests.read_rows(arguments.train, "prompts")
    known = {row["prompt_id"] for row in training}
    sets = {"train": training} | {path.stem: manifests.read_rows(path, "prompts") for path in arguments.benchmarks}
    for path in arguments.benchmarks:
        shared = [row["prompt"] for row in sets[path.stem] if row["prompt_id"] in known]
        if shared:
            raise UserError(
                f"{path}: {len(shared)} prompts of the benchmark {path.stem} are also training prompts, for example "
                f"{shared[0]!r}; list the benchmark's files in prompts.exclude, or the training files in "
                f"benchmarks.{path.stem}.prompts.exclude"
            )
        config.require_scored(path.stem, {row["category"] for row in sets[path.stem]})
    counts = {name: Counter(row["category"] for row in rows) for name, rows in sets.items()}
    table = [
        {"set": name, "category": category, "prompts": count}
        for name, found in counts.items()
        for category, count in sorted(found.items())
    ]
    parents = [arguments.train, *arguments.benchmarks]
    manifests.write(arguments.out, "prompt_sets", table, stage="stages.prompt_sets", parents=parents)
    print(
        ", ".join(f"{name} {sum(found.values())}" for name, found in counts.items()) + " prompts; no benchmark overlaps train"
    )


if __name__ == "__main__":
    run_stage(main)
