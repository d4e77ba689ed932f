"""Log-probabilities of DPO's chosen and rejected images under the reference model, stored in the pairs manifest.

    python -m stages.reference --config config.yaml --prompts prompts.parquet --pairs pairs.parquet \\
        --candidates base/*.parquet --out pairs-with-reference.parquet

The reference is the untrained model for every round, whoever drew the images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.common import manifests
from stages.common.batches import planned
from stages.common.config import load
from stages.common.runtime import UserError, run_stage
from stages.families.tools.checkpoints import checkpoint_hash


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs manifest")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests the pairs refer to")
    parser.add_argument("--checkpoint", type=Path, help="the reference model; default: model.checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="pairs manifest with reference columns")
    arguments = parser.parse_args()
    config = load(arguments.config)
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    pairs = manifests.read_rows(arguments.pairs, "pairs")
    wanted = sorted({row[side] for row in pairs for side in ("chosen", "rejected") if row[side]})
    known = {row["candidate_id"]: row for row in manifests.read_rows(arguments.candidates, "candidates", wanted=wanted)}
    missing = next((identifier for identifier in wanted if identifier not in known), None)
    if missing:
        raise UserError(f"{arguments.pairs}: candidate {missing} is in none of the candidate manifests; give them all")
    found: dict[str, float] = {}
    if wanted:
        import numpy as np

        from stages.families import open_family

        family = open_family(config.model, checkpoint)
        prompts = manifests.prompts_of(arguments.prompts, list(known.values()))
        for batch in planned(wanted, config.generate.batch_size):
            rows = [known[identifier] for identifier in batch]
            tokens = np.array([row["tokens"] for row in rows])
            texts = [prompts[row["prompt_id"]]["prompt"] for row in rows]
            found |= dict(zip(batch, family.image_log_likelihood(texts, tokens).tolist(), strict=True))
    weights = checkpoint_hash(checkpoint)
    for row in pairs:
        row["reference_chosen"], row["reference_rejected"] = found[row["chosen"]], found.get(row["rejected"])
        row["reference_checkpoint"] = weights
    parents = [arguments.prompts, arguments.pairs, *arguments.candidates]
    manifests.write(arguments.out, "pairs", pairs, stage="stages.reference", parents=parents)
    print(f"{len(found)} images under the reference {weights}")


if __name__ == "__main__":
    run_stage(main)
