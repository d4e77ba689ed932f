"""Let an external judge give verdicts on an image shard. It measures; it never makes training data (controls apart).

python -m stages.judge --config config.yaml --prompts prompts.parquet --candidates 0.parquet --out verdicts.parquet
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from stages.common import manifests, shards
from stages.common.batches import planned
from stages.common.config import load
from stages.common.runtime import UserError, run_stage

Row = dict[str, Any]


def shapes_verdicts(path: Path, candidates: list[Row], prompts: dict[str, Row], manifest: Path) -> list[Row]:
    """The oracle of the shapes world; UserError where a prompt is not of that world."""
    from stages.shapes import oracle
    from stages.shapes.grammar import from_json

    rows: list[Row] = []
    for batch in planned(candidates, 1024):
        grids = oracle.read(shards.read_images(path, batch))
        for row, grid in zip(batch, grids, strict=True):
            try:
                meaning = from_json(prompts[row["prompt_id"]]["metadata"])
            except ValueError as error:
                raise UserError(f"{manifest}: {error}; the judge `shapes` needs prompts of source shapes") from None
            matches = oracle.matches(meaning, grid)
            rows.append({"candidate_id": row["candidate_id"], "prompt_id": row["prompt_id"], "judge": "shapes"})
            rows[-1] |= {"verdict": matches, "p_yes": float(matches), "p_neither": 0.0}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--candidates", type=Path, required=True, help="candidate manifest, its tar beside it")
    parser.add_argument("--out", type=Path, required=True, help="score manifest (Parquet) of the judge")
    arguments = parser.parse_args()
    judge = load(arguments.config).evaluate.judge
    candidates = manifests.read_rows(arguments.candidates, "candidates", without=("tokens",))
    prompts = manifests.prompts_of(arguments.prompts, candidates)
    if judge == "none":
        rows = [{"candidate_id": row["candidate_id"], "prompt_id": row["prompt_id"], "judge": judge} for row in candidates]
    else:
        rows = shapes_verdicts(arguments.candidates, candidates, prompts, arguments.prompts)
    parents = [arguments.prompts, arguments.candidates]
    manifests.write(arguments.out, "scores", rows, stage="stages.judge", settings={"judge": judge}, parents=parents)
    matching = sum(row.get("verdict") is True for row in rows)
    print(f"{len(rows)} images, judge {judge}" + ("" if judge == "none" else f": {matching} match"))


if __name__ == "__main__":
    run_stage(main)
