"""Let an external judge give verdicts on an image shard. It measures; it never makes training data (controls apart).

python -m stages.judge --config config.yaml --prompts prompts.parquet --candidates 0.parquet --out verdicts.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.common import manifests, shards
from stages.common.batches import planned
from stages.common.config import load
from stages.common.runtime import UserError, run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--candidates", type=Path, required=True, help="candidate manifest, its tar beside it")
    parser.add_argument("--out", type=Path, required=True, help="score manifest (Parquet) of the judge")
    arguments = parser.parse_args()
    judge = load(arguments.config).evaluate.judge
    from stages.shapes import oracle
    from stages.shapes.grammar import from_json

    candidates = manifests.read_rows(arguments.candidates, "candidates", without=("tokens",))
    prompts = manifests.prompts_of(arguments.prompts, candidates)
    rows = []
    for batch in planned(candidates, 1024):
        grids = oracle.read(shards.read_images(arguments.candidates, batch))
        for row, grid in zip(batch, grids, strict=True):
            try:
                meaning = from_json(prompts[row["prompt_id"]]["metadata"])
            except ValueError as error:
                raise UserError(f"{arguments.prompts}: {error}; the judge `shapes` needs prompts of source shapes") from None
            matches = oracle.matches(meaning, grid)
            rows.append({"candidate_id": row["candidate_id"], "prompt_id": row["prompt_id"], "judge": judge})
            rows[-1] |= {"verdict": matches, "p_yes": float(matches), "p_neither": 0.0}
    parents = [arguments.prompts, arguments.candidates]
    manifests.write(arguments.out, "scores", rows, stage="stages.judge", settings={"judge": judge}, parents=parents)
    print(f"{len(rows)} judged by {judge}: {sum(row['verdict'] for row in rows)} match")


if __name__ == "__main__":
    run_stage(main)
