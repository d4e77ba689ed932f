"""Draw N candidates for each prompt of a shard, with a checkpoint.

    python -m stages.generate --config config.yaml --prompts prompts.parquet --shard 0/2 --out 0.parquet --images 0.tar

A candidate is drawn from its own seed (run seed, prompt, round, index), whatever its batch and shard. On a GPU in bfloat16
another batch_size may still flip a code through rounding; the family's `generate` says what it promises. Finished batches are
kept, so a killed shard continues where it was.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests, shards
from stages.common.batches import kept_batches, planned
from stages.common.candidates import CandidateRow, representation, sampling_text
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.seeds import candidate_seed
from stages.families import checkpoint_hash, describe, model_facts

PNG_THREADS = 4
PLACED = ("offset", "nbytes")  # columns that are known once the image is in the tar file

Wanted = tuple[dict[str, Any], int]  # a prompt's row, and the candidate's index


@dataclass(frozen=True)
class Round:
    """What all candidates of a shard have in common, besides the model."""

    seed: int
    number: int
    checkpoint: str
    sampling: Any
    shard: str

    def row(self, prompt: dict[str, Any], index: int) -> CandidateRow:
        """Return what is known about a candidate before it is drawn."""
        identity = (self.checkpoint, prompt["prompt_id"], self.number, index, self.seed)
        settings = tuple(self.sampling.model_dump().values())
        return {
            "candidate_id": hashlib.sha256(repr((identity, settings)).encode()).hexdigest()[:16],
            "prompt_id": prompt["prompt_id"],
            "round": self.number,
            "index": index,
            "seed": candidate_seed(self.seed, prompt["prompt_id"], self.number, index),
            "shard": self.shard,
            "checkpoint": self.checkpoint,
            "sampling": sampling_text(self.sampling),
        }


def shard_of(rows: list[Any], shard: str) -> list[Any]:
    """Return piece k of n of the rows, for `k/n` counted from 0. The pieces are consecutive, disjoint and complete."""
    try:
        number, count = (int(part) for part in shard.split("/"))
    except ValueError:
        raise UserError(f"--shard {shard}: must look like 0/2 (counted from 0)") from None
    if not 0 <= number < count:
        raise UserError(f"--shard {shard}: the number must lie between 0 and {count - 1}")
    return rows[len(rows) * number // count : len(rows) * (number + 1) // count]


def draw(family: Any, drawing: Round, batch: Sequence[Wanted]) -> tuple[list[CandidateRow], Any]:
    """Draw one batch; returns its rows and what the family drew."""
    import numpy as np

    rows = [drawing.row(prompt, index) for prompt, index in batch]
    seeds = np.array([row["seed"] for row in rows])
    return rows, family.generate([prompt["prompt"] for prompt, _ in batch], seeds, drawing.sampling)


def drawn_columns() -> pa.Schema:
    return pa.schema([field for field in manifests.schema("candidates") if field.name not in PLACED])


def table_of(result: tuple[list[CandidateRow], Any]) -> pa.Table:
    """Return a drawn batch as a table: the manifest's columns, and the images as PNG."""
    rows, drawn = result
    with ThreadPoolExecutor(PNG_THREADS) as threads:
        pictures = list(threads.map(shards.png, drawn.images))
    complete = []
    for place, (row, image) in enumerate(zip(rows, drawn.images, strict=True)):
        known = drawn.log_probabilities is not None
        complete.append(
            row
            | representation(drawn, place)
            | {"log_probability": float(drawn.log_probabilities[place]) if known else None}
            | {"height": image.shape[0], "width": image.shape[1]}
        )
    table = pa.Table.from_pylist(complete, schema=drawn_columns())
    return table.append_column("png", pa.array(pictures, pa.binary()))


def write_images(files: list[Path], out: Path) -> list[list[tuple[int, int]]]:
    """Write the images of all batches into one tar file; returns offset and length of each, batch by batch."""
    places = []
    with whole_file(out) as temporary, temporary.open("wb") as tar:
        for file in files:
            table = pq.read_table(file, columns=["candidate_id", "png"])
            names, pictures = table["candidate_id"].to_pylist(), table["png"].to_pylist()
            places.append([shards.append(tar, name, png) for name, png in zip(names, pictures, strict=True)])
        shards.finish(tar)
    return places


def placed_tables(files: list[Path], places: list[list[tuple[int, int]]]) -> Iterator[pa.Table]:
    """Yield the batches' tables with the places of their images, one after the other."""
    for file, found in zip(files, places, strict=True):
        table = pq.read_table(file, columns=drawn_columns().names)
        for column, values in zip(PLACED, zip(*found, strict=True), strict=True):
            table = table.append_column(column, pa.array(values, pa.int64()))
        yield table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--shard", default="0/1", help="piece k of n, as k/n, counted from 0")
    parser.add_argument("--checkpoint", type=Path, help="default: model.checkpoint")
    parser.add_argument("--candidates", type=int, help="images for each prompt; default: generate.candidates")
    parser.add_argument("--round", type=int, default=0, help="0, or the epoch of a replay")
    parser.add_argument("--out", type=Path, required=True, help="candidate manifest (Parquet)")
    parser.add_argument("--images", type=Path, required=True, help="image shard (tar), in the folder of --out")
    arguments = parser.parse_args()
    if arguments.candidates is not None and arguments.candidates < 1:
        raise UserError(f"--candidates {arguments.candidates}: at least 1 image for each prompt")
    if arguments.images.parent.resolve() != arguments.out.parent.resolve():
        raise UserError(f"{arguments.images}: the image shard must be in the same folder as {arguments.out}")
    return arguments


def open_model(config: Config, checkpoint: Path) -> tuple[Any, int]:
    """Return the loaded family and the number of processes that share the shard."""
    from stages.families import open_family, workers

    return open_family(config.model, checkpoint, "draw"), workers(config.model)


def main() -> None:
    arguments = parse_arguments()
    config = load(arguments.config)
    checkpoint = arguments.checkpoint or Path(config.model.checkpoint)
    count = arguments.candidates or config.generate.candidates
    prompts = shard_of(manifests.read_rows(arguments.prompts, "prompts"), arguments.shard)
    family_name = describe(config.model.family).name
    weights = checkpoint_hash(family_name, checkpoint, "draw")
    drawing = Round(config.seed, arguments.round, weights, config.sampling(), arguments.images.name)

    family, processes = open_model(config, checkpoint) if prompts else (None, 1)
    if family:
        prompts.sort(key=lambda prompt: family.bucket(prompt["prompt"]))  # prompts of one length run together
    wanted = [(prompt, index) for prompt in prompts for index in range(count)]
    batches = planned(wanted, config.generate.batch_size)

    uses = [entry("FAMILIES", family_name)]
    key = ("generate", code("stages.generate", mentioned=uses), drawing, model_facts(config.model, checkpoint),
           count, config.generate.batch_size, arguments.shard, manifests.content_hash(arguments.prompts))  # fmt: skip
    with kept_batches(
        arguments.out,
        key,
        batches,
        work=lambda batch: draw(family, drawing, batch),
        finish=table_of,
        label="generate",
        workers=processes,
    ) as files:
        places = write_images(files, arguments.images)
        manifests.write(
            arguments.out,
            "candidates",
            placed_tables(files, places),
            stage="stages.generate",
            settings={"candidates": count, "sampling": drawing.sampling.model_dump()},
            parents=[arguments.prompts],
            uses=uses,
        )
    print(f"{len(wanted)} candidates of {len(prompts)} prompts")


if __name__ == "__main__":
    run_stage(main)
