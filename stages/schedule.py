"""Write the order of training down: one row for each place in each optimizer step.

    python -m stages.schedule --config config.yaml --arm c-sft --epochs 20 --pairs pairs.parquet \\
        --replayed 10 recovered.parquet --out schedule.parquet

Each epoch is a fresh permutation of the rows there are by then (replayed rows from the epoch after their replay), topped
up from its own beginning to whole steps. An epoch's rows depend on seed, epoch and data alone, so a longer schedule begins
with the shorter one to the bit, and continuing training on it is exact.
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.runtime import UserError, run_stage
from stages.common.seeds import hash_seed

Row = dict[str, Any]


def plan(data: list[tuple[int, list[Row]]], epochs: int, batch_size: int, seed: int) -> list[Row]:
    """Schedule rows. `data`: (epoch after which the rows join, rows), 0 for the data there is from the start."""
    schedule: list[Row] = []
    for epoch in range(1, epochs + 1):
        rows = [row for joined, part in data if joined < epoch for row in part]
        order = sorted(rows, key=lambda row: hash_seed("schedule", seed, epoch, row["chosen"], row["rejected"]))
        whole = -(-len(order) // batch_size) * batch_size
        segment = sum(0 < joined < epoch for joined, _ in data)
        for row in islice(cycle(order), whole):
            step, position = divmod(len(schedule), batch_size)
            schedule.append({**row, "step": step, "position": position, "epoch": epoch, "segment": segment})
    return schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="whose training settings")
    parser.add_argument("--epochs", type=int, required=True, help="epochs from the very beginning")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs manifest of round 0")
    parser.add_argument("--replayed", nargs=2, action="append", default=[], metavar=("EPOCH", "PAIRS"))
    parser.add_argument("--out", type=Path, required=True, help="schedule manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.arm_train(arguments.arm)
    files = [(0, arguments.pairs), *((int(epoch), Path(path)) for epoch, path in arguments.replayed)]
    columns = set(manifests.SCHEMAS["schedule"])
    data = [
        (epoch, [{k: v for k, v in row.items() if k in columns} for row in manifests.read_rows(path, "pairs")])
        for epoch, path in files
    ]
    if not data[0][1]:
        raise UserError(
            f"{arguments.pairs}: no training rows, every prompt was discarded (the discard manifest says why); "
            "lower pairs.accept_threshold, raise pairs.reject_threshold (DPO) or raise generate.candidates"
        )
    rows = plan(data, arguments.epochs, settings.batch_size, config.seed)
    facts = {"epochs": arguments.epochs, "batch_size": settings.batch_size, "joined": [epoch for epoch, _ in files]}
    parents = [path for _, path in files]
    manifests.write(arguments.out, "schedule", rows, stage="stages.schedule", settings=facts, parents=parents)
    print(f"{rows[-1]['step'] + 1} steps of {settings.batch_size} rows, {arguments.epochs} epochs")


if __name__ == "__main__":
    run_stage(main)
