"""Ask the model's own understanding branch about each candidate: does this image show the prompt?

python -m stages.score --config config.yaml --prompts prompts.parquet --candidates 0.parquet --out scores.parquet
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests, shards
from stages.common.batches import kept_batches, planned
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.settings import Score
from stages.families import checkpoint_hash, describe, model_facts

Row = dict[str, Any]


def judge(
    family: Any, name: str, score: Score, weights: str, prompts: dict[str, Row], seen: tuple[Sequence[Row], Any]
) -> list[Row]:
    """Judge one batch of candidates and return rows of the scores manifest.

    name: the family's name. weights: the checkpoint's hash. prompts: by prompt_id. seen: the batch and its images.
    """
    from stages.families.tools.asking import ask

    batch, images = seen
    answers = ask(family, describe(name), score, images, [prompts[row["prompt_id"]]["prompt"] for row in batch])
    return [
        {
            "candidate_id": row["candidate_id"],
            "prompt_id": row["prompt_id"],
            "p_yes": answer.p_yes,
            "p_neither": answer.p_neither,
            "verdict": answer.verdict,
            "answer": answer.text,
            "judge": weights,
        }
        for row, answer in zip(batch, answers, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--candidates", type=Path, required=True, help="candidate manifest, with its tar file beside it")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of the model that judges; default: model.checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="score manifest (Parquet)")
    arguments = parser.parse_args()
    config = load(arguments.config)
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    name = config.model.family
    weights = checkpoint_hash(name, checkpoint, "judge")
    candidates = manifests.read_rows(arguments.candidates, "candidates", without=("tokens", "latents"))
    prompts = manifests.prompts_of(arguments.prompts, candidates)
    family, processes = None, 1
    if candidates:
        from stages.families import open_family, workers

        family, processes = open_family(config.model, checkpoint, "judge"), workers(config.model)

    settings = config.score.model_dump(exclude={"batch_size"})
    parents = [arguments.prompts, arguments.candidates]
    uses = [entry("FAMILIES", name)]
    key = ("score", code("stages.score", mentioned=uses), weights, model_facts(config.model, checkpoint),
           settings, config.score.batch_size, *map(manifests.content_hash, parents))  # fmt: skip
    with kept_batches(
        arguments.out,
        key,
        planned(candidates, config.score.batch_size),
        prepare=lambda batch: (batch, shards.read_images(arguments.candidates, batch)),
        work=lambda seen: judge(family, name, config.score, weights, prompts, seen),
        finish=lambda rows: pa.Table.from_pylist(rows, schema=manifests.schema("scores")),
        label="score",
        workers=processes,
    ) as files:
        tables = [pq.read_table(file) for file in files]
        verdicts = [verdict for table in tables for verdict in table["verdict"].to_pylist()]
        manifests.write(
            arguments.out, "scores", iter(tables), stage="stages.score", settings=settings, parents=parents, uses=uses
        )
    unread = sum(verdict is None for verdict in verdicts)
    print(f"{len(verdicts)} judged: {verdicts.count(True)} yes, {verdicts.count(False)} no, {unread} could not be read")


if __name__ == "__main__":
    run_stage(main)
