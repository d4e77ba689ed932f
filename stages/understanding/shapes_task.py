"""A task of lmms-eval about fresh scenes of the shapes world: the yes-no questions of `stages.understanding.shapes`.

    python -m stages.understanding.shapes_task --out data/shapes-task

writes a folder with the questions (questions.parquet) and the task (shapes_pope.yaml), which is the `include_path` of an
understanding benchmark of kind lmms-eval. It is the small world's POPE: existence, attribute, count and relation, each with
random and with adversarial wrong prompts, and as many questions with the answer yes as with the answer no.

The other functions are named in the task's file, so lmms-eval calls them in its own environment.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import run_stage
from stages.common.files import whole_file
from stages.understanding.base import Question
from stages.understanding.shapes import ShapesUnderstanding, yes_no_questions

TASK = """\
# Written by python -m stages.understanding.shapes_task. The path is relative to this folder.
task: shapes_pope
dataset_path: parquet
dataset_kwargs: {data_files: {test: questions.parquet}}
test_split: test
output_type: generate_until
generation_kwargs: {max_new_tokens: 4, until: [" ", "."]}
doc_to_visual: !function stages.understanding.shapes_task.pictures
doc_to_text: !function stages.understanding.shapes_task.text
doc_to_target: expected
process_results: !function stages.understanding.shapes_task.graded
metric_list:
  - {metric: shapes_accuracy, aggregation: mean, higher_is_better: true}
"""


def pictures(document: dict[str, Any]) -> list[Any]:
    return [document["image"].convert("RGB")]


def text(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return document["question"]


def graded(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for a right answer. An answer that says neither yes nor no is wrong; the tiny model says 1 or 0."""
    from stages.families.tools.asking import parse_answer

    return {"shapes_accuracy": float(parse_answer(results[0]) is (document["expected"] == "yes"))}


def write(folder: Path, settings: ShapesUnderstanding, template: str) -> int:
    """Write the task's folder and return the number of questions. template: the question, with {prompt} in it."""
    from datasets import Dataset, Features, Image, Value

    rng = np.random.default_rng([settings.seed, 1])  # the questions are those that the kind shapes asks with this seed
    asked = list(yes_no_questions(settings, rng))
    features = {name: Value("string") for name in ("question_id", "half", "type", "question", "expected")}
    rows = [row(question, template) for question in asked]
    with whole_file(folder / "questions.parquet") as temporary:
        Dataset.from_list(rows, features=Features(features | {"image": Image()})).to_parquet(str(temporary))
    with whole_file(folder / "shapes_pope.yaml") as temporary:
        temporary.write_text(TASK)
    return len(asked)


def row(question: Question, template: str) -> dict[str, Any]:
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(question.image()).save(file, "PNG")
        png = file.getvalue()
    return {
        "question_id": question.question_id,
        "half": question.part,
        "type": question.category,
        "question": template.replace("{prompt}", question.text),
        "expected": question.expected,
        "image": {"bytes": png, "path": None},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the task")
    parser.add_argument("--count", type=int, default=400, help="scenes, at least 8; each is asked about in both halves")
    parser.add_argument("--split", default="validation", choices=["post-training", "validation", "test"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", help="the question, with {prompt} in it; default: the one that the tiny model knows")
    arguments = parser.parse_args()
    if arguments.count < 8:
        parser.error("--count must be at least 8, because there are four types of questions with the answers yes and no")
    if arguments.question is None:
        from stages.shapes.tiny_janus import QUESTION

        arguments.question = QUESTION
    if "{prompt}" not in arguments.question:
        parser.error("--question must contain {prompt}")
    settings = ShapesUnderstanding(kind="shapes", split=arguments.split, count=arguments.count, seed=arguments.seed)
    print(f"{arguments.out}: {write(arguments.out, settings, arguments.question)} questions")


if __name__ == "__main__":
    run_stage(main)
