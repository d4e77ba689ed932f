"""Measure how much the random masks blur Show-o's preference margins, for several numbers of masks a row.

    python -m stages.families.show_o.variance --config run_config.yaml --prompts prompts/train.parquet \\
        --pairs dpo/pairs.parquet --candidates base/candidates/train/*.parquet

A pair's margin is its estimated log-likelihood of the chosen picture minus that of the rejected one, under the same masks. For
each number of masks, one line of JSON tells: `spread`, the standard deviation of a pair's margin over draws of its masks, and
`between`, that of the pairs' mean margins. Where the spread is much larger than what lies between pairs, more masks help.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from stages.common import manifests
from stages.common.candidates import Candidates
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.seeds import hash_seed
from stages.families import describe, open_family


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--pairs", type=Path, required=True, help="pairs manifest of a DPO arm")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--masks", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of masks a row")
    parser.add_argument("--draws", type=int, default=16, help="draws of the masks of each pair")
    parser.add_argument("--count", type=int, default=64, help="pairs")
    arguments = parser.parse_args()
    config = load(arguments.config)
    if config.model.family != "show_o":
        raise UserError(f"{arguments.config}: model.family is {config.model.family}; only show_o has masks")
    pairs = [row for row in manifests.read_rows(arguments.pairs, "pairs") if row["rejected"]][: arguments.count]
    if not pairs:
        raise UserError(f"{arguments.pairs}: no pair with a rejected picture; give the pairs of a DPO arm")
    texts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(arguments.prompts, "prompts")}
    names = [[row[side] for row in pairs] for side in ("chosen", "rejected")]
    candidates = Candidates(arguments.candidates, {name for side in names for name in side}, describe("show_o"))
    family = open_family(config.model, None, "train")
    prompts = [texts[row["prompt_id"]] for row in pairs]
    pictures = [candidates.pictures(side) for side in names]
    for masks in arguments.masks:
        family.masks_per_row = masks  # type: ignore[attr-defined]
        margins = []
        for draw in range(arguments.draws):
            seeds = np.array([hash_seed("variance", masks, draw, row["chosen"], row["rejected"]) for row in pairs])
            chosen, rejected = (family.log_likelihood(prompts, side, seeds) for side in pictures)
            margins.append(chosen - rejected)
        found = np.array(margins)
        figures = {"spread": float(np.sqrt(found.var(0, ddof=1).mean())), "between": float(found.mean(0).std())}
        print(json.dumps({"masks": masks, "pairs": len(pairs), "draws": arguments.draws, **figures}), flush=True)


if __name__ == "__main__":
    run_stage(main)
