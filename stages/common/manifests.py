"""Every Parquet file that passes between stages, column by column; reading and writing validate.

Files are zstd-compressed and open with pandas, DuckDB or anything else; tables join on `prompt_id` and `candidate_id`.
The key-value metadata under `selfgap` is JSON: kind, stage, code hashes, settings, parents (kind and content hash).
Nothing in it differs between two equal runs, so equal runs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.common.fingerprints import code
from stages.common.runtime import UserError, whole_file

pa.set_memory_pool(pa.system_memory_pool())  # one allocator a process: what Arrow frees, torch can use

TEXT, INTEGER, REAL, TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()

# kind -> column -> (type, whether it may be null)
SCHEMAS: dict[str, dict[str, tuple[pa.DataType, bool]]] = {
    "prompts": {
        "prompt_id": (TEXT, False),  # 16 hex digits of the hash of the normalised prompt
        "prompt": (TEXT, False),
        "category": (TEXT, False),
        "source": (TEXT, False),  # shapes, text or geneval
        "split": (TEXT, False),
        "difficulty": (TEXT, True),  # easy, medium or hard, where the benchmark says
        "metadata": (TEXT, True),  # JSON: what the benchmark's judge needs
    },
    "candidates": {
        "candidate_id": (TEXT, False),  # hash of checkpoint, prompt_id, round, index, seed and sampling
        "prompt_id": (TEXT, False),
        "round": (INTEGER, False),  # 0, or the epoch at which the discard pool was drawn again
        "index": (INTEGER, False),  # 0 to N - 1 within its prompt and round
        "seed": (INTEGER, False),
        "tokens": (pa.list_(pa.uint16()), True),  # image token ids, where the family has them
        "log_probability": (REAL, True),  # natural log, given the prompt, no guidance, temperature 1
        "shard": (TEXT, False),  # name of the tar beside this file
        "offset": (INTEGER, False),  # of the PNG's bytes in the tar
        "nbytes": (INTEGER, False),
        "width": (INTEGER, False),
        "height": (INTEGER, False),
        "checkpoint": (TEXT, False),  # hash of the weights that drew it
        "guidance_scale": (REAL, False),
        "temperature": (REAL, False),
    },
    "scores": {
        "candidate_id": (TEXT, False),
        "prompt_id": (TEXT, False),
        "p_yes": (REAL, True),  # P(yes) / (P(yes) + P(no)); null where an answer could not be read
        "p_neither": (REAL, True),  # probability mass on neither answer
        "verdict": (TRUTH, True),  # whether the judge says that the image matches; null: the answer could not be read
        "answer": (TEXT, True),  # the generated answer, in mode `answer`
        "judge": (TEXT, False),  # the checkpoint's hash, or the external judge's name
    },
    "pairs": {
        "prompt_id": (TEXT, False),
        "round": (INTEGER, False),
        "chosen": (TEXT, False),  # candidate_id
        "rejected": (TEXT, True),  # candidate_id; null for SFT rows
        "chosen_p_yes": (REAL, True),
        "rejected_p_yes": (REAL, True),
        "margin": (REAL, True),
        "reference_chosen": (REAL, True),  # log-probabilities under the reference model, where DPO needs them
        "reference_rejected": (REAL, True),
        "reference_checkpoint": (TEXT, True),
    },
    "discard": {
        "prompt_id": (TEXT, False),
        "round": (INTEGER, False),
        "best_p_yes": (REAL, True),
        "reason": (TEXT, False),  # no_accepted (waits for replay), no_rejected or small_margin (DPO; do not wait)
    },
    "schedule": {
        "step": (INTEGER, False),  # optimizer step, from 0
        "position": (INTEGER, False),  # place in the step's global batch
        "epoch": (INTEGER, False),  # from 1
        "segment": (INTEGER, False),  # how many replays came before
        "prompt_id": (TEXT, False),
        "chosen": (TEXT, False),
        "rejected": (TEXT, True),
        "reference_chosen": (REAL, True),
        "reference_rejected": (REAL, True),
        "reference_checkpoint": (TEXT, True),
    },
    "training": {"step": (INTEGER, False), "metric": (TEXT, False), "value": (REAL, False)},
    "metrics": {
        "run": (TEXT, False),
        "arm": (TEXT, False),
        "benchmark": (TEXT, False),
        "category": (TEXT, False),  # a category, or overall: the unweighted mean over categories
        "metric": (TEXT, False),
        "value": (REAL, True),  # percent; null where the denominator is 0
        "n": (INTEGER, False),  # prompts
        "numerator": (INTEGER, False),
        "denominator": (INTEGER, False),
        "ci_low": (REAL, True),
        "ci_high": (REAL, True),
        "delta": (REAL, True),  # value minus the base model's; for und, minus 50
        "delta_ci_low": (REAL, True),
        "delta_ci_high": (REAL, True),
        "seed": (INTEGER, False),
    },
}


def schema(kind: str) -> pa.Schema:
    return pa.schema([pa.field(name, type_, null) for name, (type_, null) in SCHEMAS[kind].items()])


def content_hash(path: Path) -> str:
    """16 hex digits over the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def write(
    path: Path,
    kind: str,
    rows: Sequence[Mapping[str, Any]] | Iterator[pa.Table],
    *,
    stage: str,
    settings: Mapping[str, Any] | None = None,
    parents: Iterable[Path] = (),
) -> None:
    """Write a manifest whole or not at all: rows, or tables one after the other, which need not fit into memory together.

    Columns that a row leaves out are null; raises ValueError on a row that does not fit the schema (a programming error,
    not the user's)."""
    tables = rows if isinstance(rows, Iterator) else [pa.Table.from_pylist([dict(row) for row in rows], schema=schema(kind))]
    facts = {
        "kind": kind,
        "stage": stage,
        "code": code(stage),
        "settings": settings or {},
        "parents": [content_hash(parent) for parent in parents],
    }
    described = schema(kind).with_metadata({"selfgap": json.dumps(facts, sort_keys=True, default=str)})
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, described, compression="zstd") as writer:
        for table in tables:
            table = table.select(described.names).cast(described)
            for name, (_, null) in SCHEMAS[kind].items():
                if not null and table[name].null_count:
                    raise ValueError(f"{path}: column {name} of a {kind} manifest has nulls")
            writer.write_table(table)


def read(path: Path, kind: str) -> pa.Table:
    """Read a manifest of that kind. Raises UserError on a missing or broken file, or a column missing or mistyped."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} manifest; run the stage that writes it, or check the path") from None
    except (pa.ArrowException, OSError) as error:
        message = f"{path}: not a readable Parquet file ({error}); delete it and run again"
        raise UserError(message.replace("\n", " ")) from None
    for name, (type_, null) in SCHEMAS[kind].items():
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} of a {kind} manifest is missing; delete the file and run again")
        try:
            column = table[name].cast(type_)
        except pa.ArrowException:
            raise UserError(
                f"{path}: column {name!r} is {table.schema.field(name).type}, a {kind} manifest has {type_}; "
                "delete the file and run again"
            ) from None
        if not null and column.null_count:
            raise UserError(f"{path}: column {name!r} has empty values; delete the file and run again")
    return table.select(list(SCHEMAS[kind])).cast(schema(kind))


def read_rows(
    paths: Path | Iterable[Path], kind: str, *, without: Sequence[str] = (), wanted: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of one manifest or of several, in order.

    without: columns to leave out; image tokens, as Python numbers, are most of a candidate's memory.
    wanted: of these candidate_ids alone.
    """
    identifiers = None if wanted is None else pa.array(sorted(wanted), TEXT)
    rows: list[dict[str, Any]] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        table = read(path, kind).drop_columns(list(without))
        if identifiers is not None:
            table = table.filter(pc.is_in(table["candidate_id"], identifiers))
        rows += table.to_pylist()
    return rows


def prompts_of(path: Path, candidates: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Prompt rows by id; UserError where a candidate's prompt is not among them."""
    prompts = {row["prompt_id"]: row for row in read_rows(path, "prompts")}
    missing = next((row["prompt_id"] for row in candidates if row["prompt_id"] not in prompts), None)
    if missing:
        raise UserError(f"{path}: prompt_id {missing} of the candidates is not there; give the manifest they were drawn for")
    return prompts


def facts(path: Path) -> dict[str, Any]:
    """The `selfgap` metadata of a manifest, or an empty dictionary."""
    metadata = pq.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"selfgap", b"{}"))
