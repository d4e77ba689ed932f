"""Log-probabilities of DPO's chosen and rejected images under the reference model, stored in the pairs manifest.

    python -m stages.reference --config config.yaml --prompts prompts.parquet --pairs pairs.parquet \\
        --candidates base/*.parquet --epochs 30 --out pairs-with-reference.parquet

The reference is the untrained model for every round, whichever checkpoint drew the images. Where the family's likelihood is an
estimate that depends on random draws, there is one value for each epoch, computed with the very draws that training uses in
that epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests
from stages.common.batches import kept_batches, planned
from stages.common.candidates import Candidates
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.seeds import draw_seed
from stages.families import checkpoint_hash, describe, model_facts

Row = dict[str, Any]
Image = tuple[str, int]  # a candidate_id and the seed of its random draws; the seed is 0 where the likelihood is exact


def seed_of(row: Row, epoch: int, exact: bool, run_seed: int) -> int:
    """Return the seed of a pair's random draws in an epoch."""
    return 0 if exact else draw_seed(run_seed, row["chosen"], row["rejected"], epoch)


def needed(pairs: list[Row], epoch: int, exact: bool, run_seed: int) -> list[Image]:
    """Return every (image, seed) whose log-probability is needed in an epoch, without repetitions and in a fixed order."""
    return sorted(
        {(row[side], seed_of(row, epoch, exact, run_seed)) for row in pairs for side in ("chosen", "rejected") if row[side]}
    )


def table_of(batch: Sequence[Image], values: Sequence[float]) -> pa.Table:
    """Return the log-probabilities of a batch as a table."""
    names, seeds = zip(*batch, strict=True)
    return pa.table({"candidate_id": names, "seed": pa.array(seeds, pa.int64()), "value": pa.array(values, pa.float64())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs manifest")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests that the pairs refer to")
    parser.add_argument("--checkpoint", type=Path, help="the reference model; default: model.checkpoint")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of training, for families with an estimated likelihood")
    parser.add_argument("--out", type=Path, required=True, help="pairs manifest with reference columns")
    arguments = parser.parse_args()
    config = load(arguments.config)
    name = config.model.family
    exact = describe(name).likelihood == "exact"
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    pairs = manifests.read_rows(arguments.pairs, "pairs")
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(arguments.prompts, "prompts")}
    weights = checkpoint_hash(name, checkpoint, "train")
    uses, parents = [entry("FAMILIES", name)], [arguments.prompts, arguments.pairs, *arguments.candidates]
    epochs = [1] if exact else range(1, 1 + arguments.epochs)
    size = config.generate.batch_size
    # Each epoch has batches of its own, so that more epochs change no value of an earlier one.
    batches = [batch for epoch in epochs for batch in planned(needed(pairs, epoch, exact, config.seed), size)]
    family: Any = None
    if batches:
        from stages.families import open_family

        family = open_family(config.model, checkpoint, "train")
    candidates = Candidates(arguments.candidates, {image for batch in batches for image, _ in batch}, describe(name))

    def work(batch: Sequence[Image]) -> tuple[Sequence[Image], list[float]]:
        names, seeds = zip(*batch, strict=True)
        texts = [prompts[identifier] for identifier in candidates.prompt_ids(names)]
        return batch, family.log_likelihood(texts, candidates.pictures(names), np.array(seeds, dtype=np.int64)).tolist()

    key = ("reference", code("stages.reference", mentioned=uses), weights, model_facts(config.model, checkpoint),
           config.seed, list(epochs), size, *map(manifests.content_hash, parents))  # fmt: skip
    with kept_batches(arguments.out, key, batches, work=work, finish=lambda done: table_of(*done), label="reference") as files:
        found = {(row["candidate_id"], row["seed"]): row["value"] for file in files for row in pq.read_table(file).to_pylist()}
        for row in pairs:
            seeds = [seed_of(row, epoch, exact, config.seed) for epoch in epochs]
            for side in ("chosen", "rejected"):
                row[f"reference_{side}"] = [found[row[side], seed] for seed in seeds] if row[side] else None
            row["reference_checkpoint"] = weights
        manifests.write(arguments.out, "pairs", pairs, stage="stages.reference", parents=parents, uses=uses)
    print(f"{len(found)} log-probabilities under the reference {weights}")


if __name__ == "__main__":
    run_stage(main)
