"""Collect a checkpoint's answers to an understanding benchmark: questions about images that no model drew.

    python -m stages.understand --config config.yaml --name scenes --checkpoint results/tiny-janus/sft/checkpoint \\
        --out answers.parquet

The name is one of the section `understanding`. `python -m stages.count_answers` computes the metrics. Finished batches (for a
kind that runs another project's harness: finished parts) are kept, so a killed stage continues where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests
from stages.common.batches import kept_batches, planned
from stages.common.config import Config, load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.settings import Score
from stages.families import checkpoint_hash, describe, model_facts, workers
from stages.understanding import understanding_kind
from stages.understanding.base import Answer, Question, UnderstandingKind

Row = dict[str, Any]


def verdicts(family: Any, name: str, score: Score, questions: Sequence[Question], images: np.ndarray) -> list[Answer]:
    """Return the answers to questions whether images show prompts, asked as in the section score."""
    from stages.families.tools.asking import ask, question_and_prefix

    description = describe(name)
    template, _ = question_and_prefix(description, score)
    return [
        Answer(
            *(question.question_id, question.image_id, question.part, question.category),
            question=template.replace("{prompt}", question.text),
            expected=question.expected,
            answer=answer.text,
            p_yes=answer.p_yes,
            score=None if answer.verdict is None else float(answer.verdict == (question.expected == "yes")),
        )
        for question, answer in zip(
            questions, ask(family, description, score, images, [question.text for question in questions]), strict=True
        )
    ]


def texts(family: Any, questions: Sequence[Question], images: np.ndarray) -> list[Answer]:
    """Return the generated answers to open questions, with their grades."""
    answers = family.answer(images, [question.text for question in questions], questions[0].max_new_tokens)
    return [
        Answer(
            *(question.question_id, question.image_id, question.part, question.category),
            question=question.text,
            expected=question.expected,
            answer=text,
            p_yes=None,
            score=question.grade(text) if question.grade else None,
        )
        for question, text in zip(questions, answers, strict=True)
    ]


def ask_batch(family: Any, name: str, score: Score, questions: Sequence[Question]) -> list[Answer]:
    """Return the answers to a batch of questions, see `batches`."""
    images = np.stack([question.image() for question in questions])
    if questions[0].grade:
        return texts(family, questions, images)
    return verdicts(family, name, score, questions, images)


def batches(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    """Return the questions in batches, in which either all are about prompts or all are open with equal lengths of answers."""
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.max_new_tokens if question.grade else 0, []).append(question)
    return [batch for group in groups.values() for batch in planned(group, size)]


def planned_work(
    kind: UnderstandingKind, settings: Any, config: Config, checkpoint: Path
) -> tuple[list[Any], Callable[[Any], list[Answer]]]:
    """Return the pieces of a benchmark, each of which is kept when it is done, and the function that answers one of them."""
    if kind.evaluate:
        return kind.parts(settings), partial(kind.evaluate, settings, config.model, config.score, checkpoint)
    assert kind.questions  # a kind has one or the other
    from stages.families import open_family

    family = open_family(config.model, checkpoint, "judge")
    ask_one = partial(ask_batch, family, config.model.family, config.score)
    return batches(kind.questions(settings), config.score.batch_size), ask_one


def table(answers: Sequence[Answer]) -> pa.Table:
    return pa.Table.from_pylist([asdict(answer) for answer in answers], schema=manifests.schema("answers"))


def parse() -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--name", required=True, help="name of the benchmark, from the section understanding")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of the model that is asked; default: model.checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="manifest of the answers (Parquet)")
    arguments = parser.parse_args()
    return arguments, load(arguments.config)


def main() -> None:
    arguments, config = parse()
    settings = config.understanding_benchmark(arguments.name)
    kind = understanding_kind(settings.kind)
    name, checkpoint = config.model.family, arguments.checkpoint or Path(config.model.checkpoint)
    uses = [entry("FAMILIES", name), entry("UNDERSTANDING", settings.kind), *kind.uses(settings)]
    facts = {
        "settings": settings.outcome(),
        "files": [manifests.content_hash(Path(file)) for file in kind.files(settings)],
        "score": config.score.model_dump(exclude={"batch_size"}),
        "checkpoint": checkpoint_hash(name, checkpoint, "judge"),
    }

    def write(tables: list[pa.Table]) -> None:
        manifests.write(arguments.out, "answers", iter(tables), stage="stages.understand", settings=facts, uses=uses)
        scores = [score for part in tables for score in part["score"].to_pylist()]
        known = [score for score in scores if score is not None]
        mean = f", mean score {100 * sum(known) / len(known):.1f} %" if known else ""
        print(f"{arguments.name}: {len(scores)} answers, {len(scores) - len(known)} could not be read{mean}")

    pieces, work = planned_work(kind, settings, config, checkpoint)
    with kept_batches(
        arguments.out,
        (
            "understand",
            code("stages.understand", mentioned=uses),
            facts,
            model_facts(config.model, checkpoint),
            config.score.batch_size,
        ),
        pieces,
        work=work,
        finish=table,
        label=f"understanding {arguments.name}",
        workers=workers(config.model),
    ) as files:
        write([pq.read_table(file) for file in files])


if __name__ == "__main__":
    run_stage(main)
