"""Every Parquet file that passes between stages, column by column. Reading and writing validate.

The files are compressed with zstd and open with pandas, DuckDB or anything else. Tables join on `prompt_id` and
`candidate_id`. The key-value metadata under `selfgap` is JSON with the kind, the stage, hashes of its code, its settings and
the content hashes of its parents. Nothing in it differs between two equal runs, so equal runs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.common.errors import UserError
from stages.common.files import whole_file
from stages.common.fingerprints import code

pa.set_memory_pool(pa.system_memory_pool())  # one allocator for the process, so that torch can use what Arrow frees

AGAIN = "if a stage wrote it, delete it and run again; otherwise restore it"
TEXT, INTEGER, REAL, TRUTH = pa.string(), pa.int64(), pa.float64(), pa.bool_()


@dataclass(frozen=True)
class Column:
    """A column's type, whether it may be empty (null), and what it holds."""

    type: pa.DataType
    empty: bool
    description: str


def required(type_: pa.DataType, description: str) -> Column:
    return Column(type_, False, description)


def optional(type_: pa.DataType, description: str) -> Column:
    return Column(type_, True, description)


# kind of manifest -> column name -> column
SCHEMAS: dict[str, dict[str, Column]] = {
    "prompts": {
        "prompt_id": required(TEXT, description="16 hexadecimal digits of the hash of the normalised prompt."),
        "prompt": required(TEXT, description="The prompt."),
        "category": required(TEXT, description="The category (subtask) of its suite."),
        "source": required(TEXT, description="The suite that it comes from."),
        "split": required(TEXT, description="The part of the suite that it comes from, or the suite's name."),
        "difficulty": optional(TEXT, description="easy, medium or hard, where the benchmark defines it."),
        "metadata": optional(TEXT, description="JSON that the suite's judges need."),
    },
    "phrases": {
        "prompt_id": required(TEXT, description="The prompt."),
        "prompt": required(TEXT, description="Its text."),
        "phrases": required(pa.list_(pa.string()), description="Its noun phrases in lower case, at most eight."),
        "made_by": required(TEXT, description="spacy, rules, or who corrected the row."),
    },
    "prompt_sets": {
        "set": required(TEXT, description="The set of prompts: train, or a benchmark's name."),
        "category": required(TEXT, description="The category of its suite."),
        "prompts": required(INTEGER, description="How many prompts the set has in this category."),
    },
    "candidates": {
        "candidate_id": required(
            TEXT, description="Hash of checkpoint, prompt_id, round, index, run seed and sampling settings."
        ),
        "prompt_id": required(TEXT, description="The prompt that it was drawn for."),
        "round": required(INTEGER, description="0, or the epoch after which the discard pool was drawn again."),
        "index": required(INTEGER, description="0 to N - 1 within its prompt and round."),
        "seed": required(INTEGER, description="The candidate's own seed."),
        "tokens": optional(
            pa.list_(pa.uint32()), description="The family's image codes, flattened in C order, where it has them."
        ),
        "latents": optional(
            pa.list_(pa.float32()), description="The family's continuous representation, flattened, where it has one."
        ),
        "shape": optional(pa.list_(pa.int32()), description="The shape of tokens or latents before flattening."),
        "log_probability": optional(
            REAL, description="Natural log of p(candidate | prompt), no guidance, temperature 1, where known."
        ),
        "shard": required(TEXT, description="Name of the tar file beside this manifest that holds the image."),
        "offset": required(INTEGER, description="Where the PNG's bytes begin in the tar file."),
        "nbytes": required(INTEGER, description="How many bytes the PNG has."),
        "width": required(INTEGER, description="The image's width in pixels."),
        "height": required(INTEGER, description="The image's height in pixels."),
        "checkpoint": required(TEXT, description="Hash of the weights that drew it."),
        "sampling": required(TEXT, description="JSON of the family's sampling settings."),
    },
    "scores": {
        "candidate_id": required(TEXT, description="The image."),
        "prompt_id": required(TEXT, description="Its prompt."),
        "p_yes": optional(REAL, description="P(yes) / (P(yes) + P(no)); empty where an answer could not be read."),
        "p_neither": optional(REAL, description="Probability mass on neither answer, in mode p_yes."),
        "verdict": optional(
            TRUTH, description="Whether the model says that the image matches; empty where it could not be read."
        ),
        "answer": optional(TEXT, description="The generated answer, in mode answer."),
        "judge": required(TEXT, description="Hash of the checkpoint that judged."),
    },
    "verdicts": {
        "candidate_id": required(TEXT, description="The image."),
        "prompt_id": required(TEXT, description="Its prompt."),
        "verdict": optional(
            TRUTH, description="Whether the external judge says that the image matches; empty where it could not be read."
        ),
        "score": optional(REAL, description="The judge's graded score in [0, 1], where it has one."),
        "answer": optional(TEXT, description="The judge's own words, where it has any."),
        "reason": optional(TEXT, description="Why the image does not match, as the name of a kind of error, if known."),
        "judge": required(TEXT, description="The external judge's name."),
    },
    "answers": {
        "question_id": required(TEXT, description="The question's name, unique within its benchmark."),
        "image_id": required(TEXT, description="The name of the image that it is about."),
        "part": required(TEXT, description="The part of the benchmark."),
        "category": required(TEXT, description="The category, such as the kind of error or the type of question."),
        "question": required(TEXT, description="The question as it was asked."),
        "expected": optional(TEXT, description="The right answer or, for an open question, an example of one."),
        "answer": optional(TEXT, description="The generated answer, where one was generated."),
        "p_yes": optional(REAL, description="P(yes) / (P(yes) + P(no)), for questions to be answered with yes or no."),
        "score": optional(REAL, description="How right the answer is, from 0 to 1; empty where it could not be read."),
    },
    "pairs": {
        "prompt_id": required(TEXT, description="The prompt."),
        "round": required(INTEGER, description="0, or the epoch after which the discard pool was drawn again."),
        "chosen": required(TEXT, description="candidate_id of the accepted candidate."),
        "rejected": optional(TEXT, description="candidate_id of the rejected candidate; empty in rows for SFT."),
        "chosen_p_yes": optional(REAL, description="The judge's p_yes of the chosen candidate."),
        "rejected_p_yes": optional(REAL, description="The judge's p_yes of the rejected candidate."),
        "margin": optional(REAL, description="chosen_p_yes minus rejected_p_yes."),
        "reference_chosen": optional(
            pa.list_(REAL),
            description="log p(chosen | prompt) under the reference model, for DPO: one value where the likelihood is "
            "exact, and one for each epoch where it is estimated with that epoch's random draws.",
        ),
        "reference_rejected": optional(pa.list_(REAL), description="The same for the rejected candidate."),
        "reference_checkpoint": optional(TEXT, description="Hash of the reference model."),
    },
    "discard": {
        "prompt_id": required(TEXT, description="A prompt without training rows."),
        "round": required(INTEGER, description="0, or the epoch after which the discard pool was drawn again."),
        "best_p_yes": optional(REAL, description="The highest p_yes of its candidates."),
        "reason": required(
            TEXT, description="no_accepted (the prompt waits for replay), no_rejected or small_margin (DPO; these do not wait)."
        ),
    },
    "schedule": {
        "step": required(INTEGER, description="The optimizer step, from 0."),
        "position": required(INTEGER, description="The row's place in the step's global batch."),
        "epoch": required(INTEGER, description="The epoch, from 1."),
        "segment": required(INTEGER, description="How many replays came before."),
        "prompt_id": required(TEXT, description="The prompt."),
        "chosen": required(TEXT, description="candidate_id of the image to learn."),
        "rejected": optional(TEXT, description="candidate_id of the rejected image, for DPO."),
        "reference_chosen": optional(REAL, description="log p(chosen | prompt) under the reference model, for this epoch."),
        "reference_rejected": optional(REAL, description="The same for the rejected image."),
        "reference_checkpoint": optional(TEXT, description="Hash of the reference model."),
    },
    "training": {
        "step": required(INTEGER, description="The optimizer step, from 1."),
        "metric": required(TEXT, description="The metric's name, such as loss or nll."),
        "value": required(REAL, description="Its value."),
    },
    "metrics": {
        "run": required(TEXT, description="The run."),
        "arm": required(TEXT, description="base, or the arm."),
        "benchmark": required(TEXT, description="The benchmark."),
        "category": required(TEXT, description="A category, or overall: the unweighted mean over categories."),
        "metric": required(TEXT, description="The metric; stages/tools/metrics.py defines them."),
        "judge": optional(
            TEXT, description="The external judge or scorer that it is measured with; empty where none is needed."
        ),
        "value": optional(REAL, description="The value in percent; empty where the denominator is 0."),
        "prompts": required(INTEGER, description="How many prompts the category has."),
        "numerator": required(REAL, description="The sum of what was counted, over all images."),
        "denominator": required(INTEGER, description="How many images, verdicts or questions were counted."),
        "ci_low": optional(REAL, description="The 95 % confidence interval's lower end (stages/tools/metrics.py)."),
        "ci_high": optional(REAL, description="Its upper end."),
        "delta": optional(REAL, description="The value minus the base model's; for und, minus 50."),
        "delta_ci_low": optional(REAL, description="The lower end of the 95 % interval of this difference."),
        "delta_ci_high": optional(REAL, description="Its upper end."),
        "seed": required(INTEGER, description="The run's seed."),
    },
    "dynamics_probes": {
        "candidate_id": required(TEXT, description="An image of the base model."),
        "prompt_id": required(TEXT, description="Its prompt."),
        "prompt": required(TEXT, description="The prompt's text."),
        "category": required(TEXT, description="Its category."),
        "right": optional(TRUTH, description="Whether the external judge accepts the image; empty where it is unknown."),
        "p_yes": optional(REAL, description="The base model's own p_yes."),
        "seed": required(INTEGER, description="The seed of the draws of a likelihood that is not exact."),
        "alternatives": required(pa.list_(TEXT), description="Alternative prompts; empty unless all terms are computed."),
    },
    "dynamics_rows": {
        "row_id": required(TEXT, description="chosen, or chosen and rejected joined by a plus sign."),
        "objective": required(TEXT, description="sft or dpo."),
        "arm": required(TEXT, description="The arm that trains on it."),
        "round": required(INTEGER, description="0, or the epoch after which the discard pool was drawn again."),
        "prompt_id": required(TEXT, description="The prompt."),
        "prompt": required(TEXT, description="The prompt's text."),
        "category": required(TEXT, description="Its category."),
        "chosen": required(TEXT, description="candidate_id of the image to learn."),
        "rejected": optional(TEXT, description="candidate_id of the rejected image, for DPO."),
        "right": optional(TRUTH, description="Whether the external judge accepts the chosen image; empty where unknown."),
        "seed": required(INTEGER, description="The seed of the draws of a likelihood that is not exact."),
    },
    "dynamics_terms": {
        "candidate_id": required(TEXT, description="The probe."),
        "row_id": required(TEXT, description="The training row, or for the objective kernel another probe."),
        "objective": required(TEXT, description="sft, dpo, or kernel: then the row's loss is minus its log-likelihood."),
        "subset": required(TEXT, description="The subset of parameters, such as layers.3; all for their sum."),
        "delta_g": required(REAL, description="Change of log p(image | prompt), in nats for learning rate 1."),
        "delta_u": required(REAL, description="Change of log p(prompt | image) over the alternatives, likewise."),
        "delta_j": optional(REAL, description="Change of the log odds of yes; empty where the family has no judge_loss."),
    },
    "dynamics_values": {
        "candidate_id": required(TEXT, description="The probe."),
        "log_likelihood": required(REAL, description="log p(image | prompt) in nats: exact, a bound or an estimate."),
        "posterior": required(REAL, description="log p(prompt | image) over the alternatives."),
        "log_odds": optional(REAL, description="Log odds of yes of the branch that answers questions."),
        "weights": required(pa.list_(REAL), description="p(prompt | image) of the prompt and each of its alternatives."),
    },
    "dynamics_steps": {
        "objective": required(TEXT, description="sft or dpo: whose rows are stepped on."),
        "optimizer": required(TEXT, description="sgd or adamw."),
        "size": required(REAL, description="Multiple of the step that is as long as AdamW's first at its learning rate."),
        "length": required(REAL, description="The Euclidean length of the step in the trained parameters."),
        "candidate_id": required(TEXT, description="The probe."),
        "quantity": required(TEXT, description="g, u or j: log-likelihood, log posterior, or log odds of yes."),
        "predicted": required(REAL, description="The first-order change."),
        "measured": required(REAL, description="The change after the step."),
    },
    "dynamics_path": {
        "arm": required(TEXT, description="The arm whose training was repeated."),
        "epoch": required(INTEGER, description="The epoch after which it is measured."),
        "candidate_id": required(TEXT, description="The probe."),
        "quantity": required(TEXT, description="g, u or j: log-likelihood, log posterior, or log odds of yes."),
        "summed": required(REAL, description="First-order changes, summed over the segments of training so far."),
        "from_base": required(REAL, description="First-order change at the base model along the whole way so far."),
        "measured": required(REAL, description="The change since the base model."),
    },
    "dynamics_logits": {
        "candidate_id": required(TEXT, description="A probe."),
        "other_id": required(TEXT, description="Another probe, or the same."),
        "trace": required(REAL, description="Estimate of the trace of the tangent kernel between their logits."),
        "norm": optional(REAL, description="Estimate of its Frobenius norm, for a probe with itself."),
    },
    "dynamics_embeddings": {
        "candidate_id": required(TEXT, description="The image."),
        "prompt_id": required(TEXT, description="Its prompt."),
        "source": required(TEXT, description="model (its own hidden states), clip, or pixels."),
        "prompt": optional(pa.list_(pa.float32()), description="Embedding of the prompt, of length 1."),
        "image": required(pa.list_(pa.float32()), description="Embedding of the image, of length 1."),
    },
    "dynamics_sketches": {
        "item_id": required(TEXT, description="The probe's candidate_id, or the row_id of a training row."),
        "kind": required(TEXT, description="probe, sft or dpo."),
        "sketch": required(pa.list_(pa.float32()), description="Count sketch of the gradient."),
        "norm": required(REAL, description="The gradient's own length."),
    },
    "dynamics_claims": {
        "run": required(TEXT, description="The run."),
        "seed": required(INTEGER, description="The run's seed."),
        "claim": required(TEXT, description="What is examined; stages/dynamics/claims.py defines all claims."),
        "group": required(TEXT, description="For what it is computed: a checkpoint, an arm, a category or a source."),
        "measure": required(TEXT, description="What is measured."),
        "value": optional(REAL, description="The value; empty where there is nothing to compute it from."),
        "ci_low": optional(REAL, description="Lower end of the 95 % interval; empty where there is none."),
        "ci_high": optional(REAL, description="Its upper end."),
        "n": required(INTEGER, description="How many probes, pairs or rows it is computed from."),
    },
    "judge_report": {
        "run": required(TEXT, description="The run."),
        "set": required(TEXT, description="The benchmark, or train for the candidates of the training prompts."),
        "checkpoint": required(TEXT, description="base, or the arm, whose images and whose own judge are described."),
        "judge": optional(TEXT, description="The external judge; empty where the images have no verdicts of one."),
        "category": required(TEXT, description="A category, or overall: the images of all categories together."),
        "reason": optional(
            TEXT, description="Only wrong images with this reason are counted, beside the right ones; empty where all are."
        ),
        "measure": required(TEXT, description="What is measured; stages/judge_report.py defines all measures."),
        "threshold": optional(REAL, description="The threshold of p_yes that the measure applies, or the lower end of a bin."),
        "upper": optional(REAL, description="The upper end of a bin of p_yes."),
        "value": optional(REAL, description="The value, for shares from 0 to 1; empty where nothing was counted."),
        "numerator": optional(REAL, description="The sum of what was counted, where the value is a share or a mean."),
        "n": required(INTEGER, description="How many images or, for pool, prompts were counted."),
        "ci_low": optional(REAL, description="The 95 % confidence interval's lower end; empty where none is computed."),
        "ci_high": optional(REAL, description="Its upper end."),
        "text": optional(TEXT, description="The finding in words, for the measures finding and warning."),
    },
    "audit": {
        "run": required(TEXT, description="The run."),
        "model": required(TEXT, description="The audited model."),
        "stratum": optional(TEXT, description="The stratum; empty for all strata together."),
        "benchmark": optional(TEXT, description="The benchmark of a category; empty for a mean over categories."),
        "category": optional(TEXT, description="The category (subtask); empty for the mean over those of the stratum."),
        "measure": required(TEXT, description="What is measured; stages/audit.py defines all measures."),
        "judge": optional(TEXT, description="The judge that it is measured with: own is the model itself."),
        "other": optional(TEXT, description="The judge with which it is compared, for agreement and kappa."),
        "value": optional(REAL, description="The value, in percent for shares; empty where nothing was counted."),
        "n": required(INTEGER, description="How many images were counted."),
        "ci_low": optional(REAL, description="The 95 % interval's lower end; empty where none is computed."),
        "ci_high": optional(REAL, description="Its upper end."),
    },
    "forecast": {
        "run": required(TEXT, description="The run."),
        "model": required(TEXT, description="The audited model."),
        "selection": required(TEXT, description="The arm whose selection is forecast, or sft and dpo without arms."),
        "quantity": required(TEXT, description="What is forecast; stages/audit.py defines all quantities."),
        "value": optional(REAL, description="The forecast; empty where nothing can be said."),
        "n": required(INTEGER, description="How many audited images are behind it."),
        "ci_low": optional(REAL, description="The 95 % interval's lower end; empty where there is none."),
        "ci_high": optional(REAL, description="Its upper end."),
        "text": optional(TEXT, description="Where the number comes from or, for the quantity verdict, the verdict."),
    },
}


def schema(kind: str) -> pa.Schema:
    """Return the Arrow schema of a kind of manifest."""
    return pa.schema([pa.field(name, column.type, column.empty) for name, column in SCHEMAS[kind].items()])


def content_hash(path: Path) -> str:
    """Return 16 hexadecimal digits of a hash over the file's bytes."""
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
    uses: Iterable[str] = (),
) -> None:
    """Write a manifest whole or not at all, from rows or from tables that need not fit into memory together.

    Columns that a row leaves out are empty. uses: names of the registered families, judges or suites that the stage used; they
    belong to the code that is recorded. Raises ValueError on a row that does not fit the schema, which is a programming error.
    """
    tables = rows if isinstance(rows, Iterator) else [pa.Table.from_pylist([dict(row) for row in rows], schema=schema(kind))]
    facts = {
        "kind": kind,
        "stage": stage,
        "code": code(stage, mentioned=uses),
        "settings": settings or {},
        "parents": [content_hash(parent) for parent in parents],
    }
    described = schema(kind).with_metadata({"selfgap": json.dumps(facts, sort_keys=True, default=str)})
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, described, compression="zstd") as writer:
        for table in tables:
            table = table.select(described.names).cast(described)
            for name, column in SCHEMAS[kind].items():
                if not column.empty and table[name].null_count:
                    raise ValueError(f"{path}: column {name} of a {kind} manifest has nulls")
            writer.write_table(table)


def read(path: Path, kind: str) -> pa.Table:
    """Read a manifest of that kind. Raises UserError on a missing or broken file and on a missing or mistyped column."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {kind} manifest; run the stage that writes it, or check the path") from None
    except (pa.ArrowException, OSError) as error:
        message = f"{path}: not a readable Parquet file ({error}); {AGAIN}"
        raise UserError(message.replace("\n", " ")) from None
    for name, column in SCHEMAS[kind].items():
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} of a {kind} manifest is missing; {AGAIN}")
        try:
            values = table[name].cast(column.type)
        except pa.ArrowException:
            raise UserError(
                f"{path}: column {name!r} is {table.schema.field(name).type}, a {kind} manifest has {column.type}; {AGAIN}"
            ) from None
        if not column.empty and values.null_count:
            raise UserError(f"{path}: column {name!r} has empty values; {AGAIN}")
    return table.select(list(SCHEMAS[kind])).cast(schema(kind))


def read_rows(
    paths: Path | Iterable[Path], kind: str, *, without: Sequence[str] = (), wanted: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one manifest or of several, in order.

    without: columns to leave out; image tokens as Python numbers take most of a candidate's memory.
    wanted: keep only the rows with these candidate_ids.
    """
    identifiers = None if wanted is None else pa.array(sorted(wanted), TEXT)
    rows: list[dict[str, Any]] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        table = read(path, kind).drop_columns(list(without))
        if identifiers is not None:
            table = table.filter(pc.is_in(table["candidate_id"], identifiers))
        rows += table.to_pylist()
    return rows


def pieces(folder: Path, count: int) -> list[Path]:
    """Return the manifests 0000.parquet, 0001.parquet, ... of a folder that exist, of as many pieces as the configuration says.

    Those with higher numbers are left from a time when there were more pieces, and hold the same rows again.
    """
    return [path for number in range(count) if (path := folder / f"{number:04d}.parquet").exists()]


def prompts_of(path: Path, candidates: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return prompt rows by id. Raises UserError when a candidate's prompt is not among them."""
    prompts = {row["prompt_id"]: row for row in read_rows(path, "prompts")}
    missing = next((row["prompt_id"] for row in candidates if row["prompt_id"] not in prompts), None)
    if missing:
        raise UserError(f"{path}: prompt_id {missing} of the candidates is not there; give the manifest they were drawn for")
    return prompts


def facts(path: Path) -> dict[str, Any]:
    """Return the `selfgap` metadata of a manifest, or an empty dictionary. Raises UserError on a file that is no Parquet."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())}); {AGAIN}") from None
    return json.loads(metadata.get(b"selfgap", b"{}"))
