"""Ask the model's own understanding branch about each candidate: does this image show the prompt?

python -m stages.score --config config.yaml --prompts prompts.parquet --candidates 0.parquet --out scores.parquet
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests, shards
from stages.common.batches import kept_batches, planned
from stages.common.config import load
from stages.common.runtime import run_stage
from stages.families.tools.checkpoints import checkpoint_hash

VERDICT_THRESHOLD = 0.5


def parse_answer(answer: str) -> bool | None:
    """`The score is 1.` or `Yes, ...` as a verdict; None where neither can be read: counted, never guessed."""
    scores = set(re.findall(r"score\s+is\s*:?\s*\**\{?([01])\b", answer, re.IGNORECASE))
    if scores:
        return scores == {"1"} if len(scores) == 1 else None
    first = re.match(r"\W*(yes|no|1|0)\b", answer, re.IGNORECASE)
    return first.group(1).lower() in ("yes", "1") if first else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--candidates", type=Path, required=True, help="candidate manifest, its tar beside it")
    parser.add_argument("--checkpoint", type=Path, help="the judge; default: model.checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="score manifest (Parquet)")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.score
    candidates = manifests.read_rows(arguments.candidates, "candidates", without=("tokens",))
    prompts = manifests.prompts_of(arguments.prompts, candidates)
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    weights = checkpoint_hash(checkpoint)
    family, shares = None, 1
    if candidates:
        from stages.families import open_family, workers

        family, shares = open_family(config.model, checkpoint), workers(config.model)

    def look(batch: Any) -> tuple[Any, Any]:
        return batch, shards.read_images(arguments.candidates, batch)

    def judge(seen: tuple[Any, Any]) -> list[dict[str, Any]]:
        assert family is not None
        batch, images = seen
        template, prefix = settings.asked(family)
        questions = [template.replace("{prompt}", prompts[row["prompt_id"]]["prompt"]) for row in batch]
        rows = [{"candidate_id": row["candidate_id"], "prompt_id": row["prompt_id"], "judge": weights} for row in batch]
        if settings.mode == "p_yes":
            for row, p_yes, p_neither in zip(rows, *family.p_yes(images, questions, prefix), strict=True):
                row |= {"p_yes": p_yes, "p_neither": p_neither, "verdict": bool(p_yes >= VERDICT_THRESHOLD)}
        else:
            for row, answer in zip(rows, family.answer(images, questions, settings.max_new_tokens), strict=True):
                verdict = parse_answer(answer)
                row |= {"answer": answer, "verdict": verdict, "p_yes": None if verdict is None else float(verdict)}
        return rows

    def table_of(rows: list[dict[str, Any]]) -> pa.Table:
        return pa.Table.from_pylist(rows, schema=manifests.schema("scores"))

    key = ("score", weights, repr(settings), manifests.content_hash(arguments.candidates))
    batches = planned(candidates, settings.batch_size)
    with kept_batches(
        arguments.out, key, batches, prepare=look, work=judge, finish=table_of, label="score", workers=shares
    ) as files:
        tables = [pq.read_table(file) for file in files]
        verdicts = [verdict for table in tables for verdict in table["verdict"].to_pylist()]
        facts = settings.model_dump(exclude={"batch_size"})
        parents = [arguments.prompts, arguments.candidates]
        manifests.write(arguments.out, "scores", iter(tables), stage="stages.score", settings=facts, parents=parents)
    unread = sum(verdict is None for verdict in verdicts)
    print(f"{len(verdicts)} judged: {verdicts.count(True)} yes, {verdicts.count(False)} no, {unread} could not be read")


if __name__ == "__main__":
    run_stage(main)
