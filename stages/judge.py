"""Collect an external judge's verdicts on the images of a candidate manifest.

    python -m stages.judge --config config.yaml --judge shapes --prompts prompts.parquet --candidates 0.parquet \\
        --out verdicts.parquet

With --categories color shape, the judge sees only images whose prompts belong to these categories. Judges only measure and
never select training data, except for a control arm with `pairs.filter: oracle`. Finished batches are kept, so a killed stage
continues where it stopped.
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests, shards
from stages.common.batches import kept_batches, planned
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.settings import Model
from stages.families import resolved, workers
from stages.judges import judge_kind
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict

Row = dict[str, Any]


def of_categories(candidates: list[Row], prompts: dict[str, Row], categories: list[str] | None) -> list[Row]:
    """Return the candidates whose prompt belongs to one of the categories; all candidates if categories is None."""
    if categories is None:
        return candidates
    return [row for row in candidates if prompts[row["prompt_id"]]["category"] in categories]


def judge_batch(judge: Judge, name: str, prompts: dict[str, Row], batch: Sequence[Row], images: np.ndarray) -> list[Row]:
    """Judge the images of a batch of candidates and return rows of the verdicts manifest."""
    items = [Item(row["candidate_id"], prompts[row["prompt_id"]], image) for row, image in zip(batch, images, strict=True)]
    return [
        {
            "candidate_id": item.candidate_id,
            "prompt_id": item.prompt["prompt_id"],
            "verdict": verdict.matches,
            "score": verdict.score,
            "answer": verdict.answer,
            "reason": verdict.reason,
            "judge": name,
        }
        for item, verdict in zip(items, judge(items), strict=True)
    ]


def opened(name: str, kind: JudgeKind, settings: JudgeSettings) -> tuple[Judge, Model | None]:
    """Open a judge, and return it with where it runs if it is a model.

    Both opening and judging raise UserError where the memory of the GPU does not suffice.
    """
    if kind.runs_on is None:
        return kind.open(settings), None
    import torch

    place = resolved(kind.runs_on(settings), f"judges.{name}: device")
    try:
        judge = kind.open(settings)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"judges.{name}: its weights do not fit into the free memory of the GPU on {socket.gethostname()} ({error}); end "
            "what else uses this GPU, or take a larger one"
        ) from None

    def judge_in_memory(items: Sequence[Item]) -> list[Verdict]:
        try:
            return judge(items)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"judges.{name}: out of memory while judging on {socket.gethostname()} ({error}); lower its batch_size"
            ) from None

    return judge_in_memory, place


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument(
        "--judge", required=True, help="a name from the section judges, or a kind of judge that needs no settings"
    )
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--candidates", type=Path, required=True, help="candidate manifest, with its tar file beside it")
    parser.add_argument(
        "--categories", nargs="+", help="judge only images whose prompts belong to these categories; default: all"
    )
    parser.add_argument("--out", type=Path, required=True, help="verdict manifest (Parquet)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    name = arguments.judge
    try:
        settings = load(arguments.config).judge(name)
    except ValueError as error:
        raise UserError(f"--judge {name}: {error}") from None
    kind = judge_kind(settings.kind)
    drawn = manifests.read_rows(arguments.candidates, "candidates", without=("tokens", "latents"))
    prompts = manifests.prompts_of(arguments.prompts, drawn)
    candidates = of_categories(drawn, prompts, arguments.categories)
    judge, place = opened(name, kind, settings) if candidates else (lambda items: [], None)
    dtype = place.dtype if place else None

    uses = [entry("JUDGES", settings.kind), *kind.uses(settings)]
    facts = {
        "judge": name,
        "settings": settings.outcome(),
        "files": [manifests.content_hash(Path(file)) for file in kind.files(settings)],
        "categories": sorted(set(arguments.categories)) if arguments.categories else None,
    }
    parents = [arguments.prompts, arguments.candidates]
    with kept_batches(
        arguments.out,
        ("judge", code("stages.judge", mentioned=uses), facts, dtype, kind.batch_size, *map(manifests.content_hash, parents)),
        planned(candidates, kind.batch_size),
        prepare=lambda batch: (batch, shards.read_images(arguments.candidates, batch)),
        work=lambda seen: judge_batch(judge, name, prompts, *seen),
        finish=lambda rows: pa.Table.from_pylist(rows, schema=manifests.schema("verdicts")),
        label=f"judge {name}",
        workers=workers(place) if place else 1,
    ) as files:
        tables = [pq.read_table(file) for file in files]
        verdicts = [verdict for table in tables for verdict in table["verdict"].to_pylist()]
        manifests.write(
            arguments.out, "verdicts", iter(tables), stage="stages.judge", settings=facts, parents=parents, uses=uses
        )
    if missing := sorted(set(arguments.categories or ()) - {row["category"] for row in prompts.values()}):
        print(f"{arguments.prompts}: no prompt is of category {', '.join(missing)}")
    read = f"{verdicts.count(True)} match, {verdicts.count(False)} do not, {verdicts.count(None)} without a verdict"
    print(f"{name}: {len(verdicts)} of {len(drawn)} images judged: {read}")


if __name__ == "__main__":
    run_stage(main)
