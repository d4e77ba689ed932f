"""Write the order of training: one row for each position in each optimizer step.

    python -m stages.schedule --config config.yaml --arm c-sft --epochs 20 --pairs pairs.parquet \\
        --replayed 10 recovered.parquet --out schedule.parquet

Each epoch is a new permutation of the rows available by then; replayed rows join in the epoch after their replay. The last
batch of an epoch is filled by repeating the epoch's first rows. The order depends only on seed, epoch and data, so a longer
schedule begins with exactly the rows of a shorter one, and continuing a training on it is exact.
"""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.seeds import hash_seed

Row = dict[str, Any]
REFERENCES = ("reference_chosen", "reference_rejected")


def plan(data: list[tuple[int, list[Row]]], epochs: int, batch_size: int, seed: int) -> list[Row]:
    """Return the rows of the schedule.

    data: pairs (epoch after which the rows join, rows). The epoch is 0 for data that exists from the start. A row's reference
    log-probabilities are lists with one value for all epochs or one for each epoch; the schedule takes the epoch's value.
    batch_size: rows in each optimizer step.
    """
    schedule: list[Row] = []
    for epoch in range(1, epochs + 1):
        rows = [row for joined, part in data if joined < epoch for row in part]
        order = sorted(rows, key=lambda row: hash_seed("schedule", seed, epoch, row["chosen"], row["rejected"]))
        whole = -(-len(order) // batch_size) * batch_size
        segment = sum(0 < joined < epoch for joined, _ in data)
        for row in islice(cycle(order), whole):
            step, position = divmod(len(schedule), batch_size)
            place = {"step": step, "position": position, "epoch": epoch, "segment": segment}
            schedule.append({**row, **place, **{side: of_epoch(row.get(side), epoch) for side in REFERENCES}})
    return schedule


def of_epoch(values: list[float] | None, epoch: int) -> float | None:
    """Return the reference log-probability for an epoch, counted from 1."""
    if not values:
        return None
    return values[0] if len(values) == 1 else values[epoch - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="the arm whose training settings are used")
    parser.add_argument("--epochs", type=int, required=True, help="number of training epochs, counted from the base model")
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
