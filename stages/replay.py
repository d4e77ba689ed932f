"""Curriculum replay: select the prompts of the discard pool that are drawn again, and update the pool afterwards.

    python -m stages.replay pool  --prompts prompts.parquet --discard discard.parquet --out pool.parquet
    python -m stages.replay merge --discard discard.parquet --recovered pairs.parquet --again again.parquet --out still.parquet

`pool` writes the prompts that had no accepted candidate (reason no_accepted) as a prompt manifest. stages.generate and
stages.score read it like any other, with the checkpoint of the replay epoch. `merge` writes the discard pool after the replay,
without the recovered prompts. Both accept an empty pool.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.common import manifests
from stages.common.errors import run_stage

WAITS = "no_accepted"


def pool(arguments: argparse.Namespace) -> None:
    waiting = {row["prompt_id"] for row in manifests.read_rows(arguments.discard, "discard") if row["reason"] == WAITS}
    prompts = [row for row in manifests.read_rows(arguments.prompts, "prompts") if row["prompt_id"] in waiting]
    parents = [arguments.prompts, arguments.discard]
    manifests.write(arguments.out, "prompts", prompts, stage="stages.replay", parents=parents)
    print(f"{len(prompts)} prompts of the discard pool are to be drawn again")


def merge(arguments: argparse.Namespace) -> None:
    recovered = {row["prompt_id"] for row in manifests.read_rows(arguments.recovered, "pairs")}
    again = {row["prompt_id"]: row for row in manifests.read_rows(arguments.again, "discard")}
    rows = manifests.read_rows(arguments.discard, "discard")
    still = [again.get(row["prompt_id"], row) for row in rows if row["prompt_id"] not in recovered]
    parents = [arguments.discard, arguments.recovered, arguments.again]
    manifests.write(arguments.out, "discard", still, stage="stages.replay", parents=parents)
    print(f"{len(recovered)} prompts recovered, {len(still)} remain in the discard pool")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    first = actions.add_parser("pool", help="write the prompts to draw again")
    first.add_argument("--prompts", type=Path, required=True, help="manifest of the training prompts")
    first.add_argument("--discard", type=Path, required=True, help="discard manifest")
    first.add_argument("--out", type=Path, required=True, help="prompt manifest of the pool")
    first.set_defaults(action=pool)
    second = actions.add_parser("merge", help="write the discard pool after the replay")
    second.add_argument("--discard", type=Path, required=True, help="discard manifest before the replay")
    second.add_argument("--recovered", type=Path, required=True, help="pairs manifest of the replay")
    second.add_argument("--again", type=Path, required=True, help="discard manifest of the replay")
    second.add_argument("--out", type=Path, required=True, help="discard manifest after the replay")
    second.set_defaults(action=merge)
    arguments = parser.parse_args()
    arguments.action(arguments)


if __name__ == "__main__":
    run_stage(main)
