"""Draw N candidates for each prompt of a shard, with a checkpoint.

    python -m stages.generate --config config.yaml --prompts prompts.parquet --shard 0/2 --out 0.parquet --images 0.tar

A candidate depends on its own seed (run seed, prompt, round, index), never on batch or shard. Finished batches are kept,
so a killed shard goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests, shards
from stages.common.batches import kept_batches, planned
from stages.common.config import load
from stages.common.runtime import UserError, run_stage, whole_file
from stages.common.seeds import candidate_seed
from stages.families.tools.checkpoints import checkpoint_hash

PNG_THREADS = 4


def shard_of(rows: list[Any], shard: str) -> list[Any]:
    """Piece k of n of the rows, for `k/n` counted from 0; the pieces are consecutive, disjoint and complete."""
    try:
        number, count = (int(part) for part in shard.split("/"))
    except ValueError:
        raise UserError(f"--shard {shard}: must look like 0/2 (counted from 0)") from None
    if not 0 <= number < count:
        raise UserError(f"--shard {shard}: the number must lie between 0 and {count - 1}")
    return rows[len(rows) * number // count : len(rows) * (number + 1) // count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--shard", default="0/1", help="piece k of n, as k/n, counted from 0")
    parser.add_argument("--checkpoint", type=Path, help="default: model.checkpoint")
    parser.add_argument("--candidates", type=int, help="images a prompt; default: generate.candidates")
    parser.add_argument("--round", type=int, default=0, help="0, or the epoch of a replay")
    parser.add_argument("--out", type=Path, required=True, help="candidate manifest (Parquet)")
    parser.add_argument("--images", type=Path, required=True, help="image shard (tar), in the folder of --out")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.generate
    count = settings.candidates if arguments.candidates is None else arguments.candidates
    if count < 1:
        raise UserError(f"--candidates {count}: at least 1 image a prompt")
    if arguments.images.parent.resolve() != arguments.out.parent.resolve():
        raise UserError(f"{arguments.images}: the image shard must lie beside {arguments.out}")
    prompts = shard_of(manifests.read_rows(arguments.prompts, "prompts"), arguments.shard)
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    weights = checkpoint_hash(checkpoint)

    def plan_row(prompt: dict[str, Any], index: int) -> dict[str, Any]:
        identity = (weights, prompt["prompt_id"], arguments.round, index, config.seed)
        sampling = (settings.guidance_scale, settings.temperature)
        return {
            "candidate_id": hashlib.sha256(repr((identity, sampling)).encode()).hexdigest()[:16],
            "prompt_id": prompt["prompt_id"],
            "round": arguments.round,
            "index": index,
            "seed": candidate_seed(config.seed, prompt["prompt_id"], arguments.round, index),
            "shard": arguments.images.name,
            "checkpoint": weights,
            "guidance_scale": settings.guidance_scale,
            "temperature": settings.temperature,
        }

    drawn_columns = pa.schema([field for field in manifests.schema("candidates") if field.name not in ("offset", "nbytes")])
    batches: list[Any] = []
    family, shares = None, 1
    if prompts:
        from stages.families import open_family, workers
        from stages.families.base import Sampling

        family, shares = open_family(config.model, checkpoint), workers(config.model)
        prompts.sort(key=lambda prompt: family.bucket(prompt["prompt"]))  # prompts of one length run together
        batches = planned([(prompt, index) for prompt in prompts for index in range(count)], settings.batch_size)

    def draw(batch: Any) -> tuple[list[dict[str, Any]], Any]:
        import numpy as np

        assert family is not None
        rows = [plan_row(prompt, index) for prompt, index in batch]
        seeds = np.array([row["seed"] for row in rows])
        sampling = Sampling(settings.guidance_scale, settings.temperature)
        return rows, family.generate([prompt["prompt"] for prompt, _ in batch], seeds, sampling)

    def compress(result: tuple[list[dict[str, Any]], Any]) -> pa.Table:
        rows, drawn = result
        with ThreadPoolExecutor(PNG_THREADS) as threads:
            pictures = list(threads.map(shards.png, drawn.images))
        for i, (row, image) in enumerate(zip(rows, drawn.images, strict=True)):
            row["tokens"] = None if drawn.tokens is None else drawn.tokens[i].astype("uint16")
            row["log_probability"] = float(drawn.log_probabilities[i])
            row["height"], row["width"] = image.shape[:2]
        return pa.Table.from_pylist(rows, schema=drawn_columns).append_column("png", pa.array(pictures, pa.binary()))

    prompts_hash = manifests.content_hash(arguments.prompts)
    key = ("generate", weights, repr(settings), count, arguments.round, config.seed, arguments.shard, prompts_hash)
    with kept_batches(arguments.out, key, batches, work=draw, finish=compress, label="generate", workers=shares) as files:
        places = []
        with whole_file(arguments.images) as temporary, temporary.open("wb") as tar:
            for file in files:
                table = pq.read_table(file, columns=["candidate_id", "png"])
                names, pictures = table["candidate_id"].to_pylist(), table["png"].to_pylist()
                places.append([shards.append(tar, name, png) for name, png in zip(names, pictures, strict=True)])
            shards.finish(tar)

        def placed() -> Iterator[pa.Table]:
            for file, found in zip(files, places, strict=True):
                table = pq.read_table(file, columns=[field.name for field in drawn_columns])
                for column, values in zip(("offset", "nbytes"), zip(*found, strict=True), strict=True):
                    table = table.append_column(column, pa.array(values, pa.int64()))
                yield table

        facts = settings.model_dump(exclude={"shards", "batch_size"})
        parents = [arguments.prompts]
        manifests.write(arguments.out, "candidates", placed(), stage="stages.generate", settings=facts, parents=parents)
    print(f"{len(prompts) * count} candidates of {len(prompts)} prompts")


if __name__ == "__main__":
    run_stage(main)
