"""Run one task of lmms-eval with a model family. This module runs in the environment of lmms-eval, which `make lmms-env` makes.

    HF_HOME=/shared/hf .venv-lmms/bin/python -m stages.understanding.lmms_model prepare pope gqa
    .venv-lmms/bin/python -m stages.understanding.lmms_model run --request request.json --parent 123 --out answers.json

`prepare` loads tasks on a machine that reaches the hub, so that their data are in the cache and jobs need no network. `run` is
what `stages.understanding.lmms` starts for each task. It reads a `Request` and writes what `Finished` describes, as JSON.

lmms-eval is called as a library, not by its command, which ends with exit code 0 also when it has failed. The model is a
subclass of its `lmms` that hands every picture and question to `Family.answer`, so nothing has to be registered or installed in
its environment. Only tasks with generated answers can be run (`output_type: generate_until`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import inspect
import io
import json
import math
import numbers
import os
import random
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file
from stages.common.settings import Model
from stages.families import open_family

WAITING = 16  # batches of questions that wait for others with pictures of their size
GAP = 8  # white pixels between pictures that are shown side by side
NEXT_TURN = "<|"  # a model that goes on with the next turn of the conversation has finished its answer
ROTATED = {"mmbench_en_dev_static": 1_000_000}  # the rotations of a question's options are this far apart in `index`


@dataclass(frozen=True)
class Request:
    """What is asked of lmms-eval.

    task: the name of a single task. include_path: a folder with further tasks; relative paths in their YAML files are relative
    to this folder. limit: ask only so many questions, the first ones. metric: the metric that scores an answer, or None for the
    task's first. category: the field of the task's data by which answers are counted, or None for a single category.
    max_new_tokens: the longest answer where the task allows longer ones. model: the configuration's section of that name.
    """

    task: str
    checkpoint: str
    model: dict[str, Any]
    max_new_tokens: int
    batch_size: int
    include_path: str | None = None
    limit: int | None = None
    metric: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Sample:
    """An answer to a question of a task.

    image_id: a hash of the pictures. expected: the right answer in the task's words. score: from 0 to 1, or None where the
    metric is no number. guessed: the task found no answer in the text and drew one at random, which the score counts.
    """

    question_id: str
    image_id: str
    category: str
    question: str
    expected: str
    answer: str
    score: float | None
    guessed: bool


@dataclass(frozen=True)
class Finished:
    """version: that of lmms-eval. reported: the value of the task's own metric over all answers."""

    version: str
    metric: str
    reported: float | None
    samples: list[Sample]


# The model


@dataclass(frozen=True)
class Asked:
    """A question about one picture, uint8 `[height, width, 3]`. place: its number among the task's requests."""

    place: int
    picture: np.ndarray
    question: str
    max_new_tokens: int
    until: tuple[str, ...]


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Return pictures as one, from left to right on white, because families answer about a single picture."""
    if len(pictures) == 1:
        return pictures[0]
    height = max(len(picture) for picture in pictures)
    width = sum(picture.shape[1] + GAP for picture in pictures) - GAP
    canvas, left = np.full((height, width, 3), 255, np.uint8), 0
    for picture in pictures:
        canvas[: len(picture), left : left + picture.shape[1]] = picture
        left += picture.shape[1] + GAP
    return canvas


def picture_hash(picture: np.ndarray) -> str:
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()[:16]


def in_batches(questions: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    """Yield questions in batches whose pictures have one size and whose answers have one limit, as `Family.answer` needs it.

    Pictures come in many sizes, so questions wait for others like them. Few wait, because their pictures are in memory.
    """
    waiting: dict[tuple[Any, ...], list[Asked]] = {}
    for question in questions:
        key = (question.picture.shape, question.max_new_tokens)
        waiting.setdefault(key, []).append(question)
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif sum(map(len, waiting.values())) > WAITING * size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


def cleaned(text: str, until: Sequence[str] = ()) -> str:
    """Return a generated text up to the first stop string or the next turn; a single word loses its final full stop.

    Several tasks compare the answer with a word, and to them "Yes." is wrong.
    """
    text = text.strip()
    for stop in (*until, NEXT_TURN):
        if stop:
            text = text.split(stop)[0]
    text = text.strip()
    return text if len(text.split()) > 1 else text.rstrip(".,;:!")


def open_model(family: Any, request: Request) -> Any:
    """Return a family as a model of lmms-eval. Its `image_ids` has the hash of each document's pictures."""
    from lmms_eval.api.model import lmms

    class FamilyModel(lmms):
        is_simple = True

        def __init__(self) -> None:
            super().__init__()
            self.image_ids: dict[int, str] = {}

        def asked(self, requests: Sequence[Any]) -> Iterator[Asked]:
            for place, instance in enumerate(requests):
                context, settings, pictures_of, doc_id, task, split = instance.args
                pictures = [np.asarray(each.convert("RGB")) for each in pictures_of(self.task_dict[task][split][doc_id])]
                if not pictures:
                    raise UserError(
                        f"task {task}: question {doc_id} has no picture, and families answer about one; leave it out"
                    )
                if len(pictures) > 1:
                    print(f"{task}: question {doc_id} has {len(pictures)} pictures, which are shown side by side")
                picture = side_by_side(pictures)
                self.image_ids[doc_id] = picture_hash(picture)
                until = settings.get("until") or ()
                yield Asked(
                    place,
                    picture,
                    context,
                    min(request.max_new_tokens, int(settings.get("max_new_tokens") or request.max_new_tokens)),
                    (until,) if isinstance(until, str) else tuple(until),
                )

        def generate_until(self, requests: list[Any]) -> list[str]:
            texts, done, since = [""] * len(requests), 0, time.monotonic()
            for batch in in_batches(self.asked(requests), request.batch_size):
                images = np.stack([question.picture for question in batch])
                answers = family.answer(images, [question.question for question in batch], batch[0].max_new_tokens)
                for question, answer in zip(batch, answers, strict=True):
                    texts[question.place] = cleaned(answer, question.until)
                done += len(batch)
                if time.monotonic() > since + 60:
                    print(f"{request.task}: {done} of {len(requests)} questions", flush=True)
                    since = time.monotonic()
            return texts

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    return FamilyModel()


# The task


def load_task(name: str, include_path: str | None) -> tuple[Any, Any]:
    """Return a task with its data, and the manager that knows all tasks. Raises UserError if it is unknown or has no data."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    manager = TaskManager("ERROR", include_path=include_path)
    if name not in manager.all_tasks:
        raise UserError(
            f"lmms-eval has no task {name}; `lmms-eval tasks` of its environment lists them, and include_path adds more"
        )
    if name not in manager.all_subtasks:
        members = manager.task_index[name]["task"]
        more = ": " + ", ".join(members) if isinstance(members, list) else ""
        raise UserError(f"{name} is a group of tasks{more}; name single tasks")
    with contextlib.chdir(include_path or "."):
        try:
            task = get_task_dict([name], manager, "simple")[name]
        except Exception as error:  # the data's loader, the task's own code and the hub raise all kinds
            last = getattr(error, "last_attempt", None)  # lmms-eval tries several times
            cause = last.exception() if last else error
            raise UserError(f"task {name} cannot be loaded: {type(cause).__name__}: {cause}") from error
    if task.OUTPUT_TYPE != "generate_until":
        raise UserError(f"task {name} is of type {task.OUTPUT_TYPE}, and only generate_until can be run; choose another task")
    return task, manager


def chosen_metric(task: Any, name: str, metric: str | None) -> str:
    known = list(task.aggregation())
    if metric is not None and metric not in known:
        raise UserError(f"task {name} has no metric {metric}, but {', '.join(known)}; correct metrics.{name}")
    return metric or known[0]


def aggregate(task: Any, metric: str, values: list[Any]) -> float | None:
    """Return the task's metric over values of single answers. What the task prints meanwhile is dropped."""
    function = task.aggregation()[metric]
    more = {"args": None} if "args" in inspect.signature(function).parameters else {}
    with contextlib.redirect_stdout(io.StringIO()):
        return as_number(function(values, **more))


def as_number(value: Any) -> float | None:
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return None


def score_of(task: Any, name: str, metric: str, value: Any) -> float | None:
    """Return how right a single answer is by a metric's value of it: a number, a `score`, or else the metric of it alone."""
    if name in ROTATED:  # the metric would count the question only with all its rotations
        from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
        from pandas import DataFrame

        return float(mmbench_evaluator.eval_sub_data(DataFrame([value]), {value["index"]: value["answer"]}, static_only=True))
    if isinstance(value, numbers.Real):
        return as_number(value)
    if isinstance(value, dict) and isinstance(value.get("score"), numbers.Real):
        return as_number(value["score"])
    return aggregate(task, metric, [value])


def question_id(name: str, doc_id: int, value: Any) -> str:
    """Return the name of a question: the task and a number; for rotated options also the number of the rotation."""
    if name in ROTATED:
        number, rotation = int(value["index"]) % ROTATED[name], int(value["index"]) // ROTATED[name]
        return f"{name}/{number:06d}/{rotation}"
    return f"{name}/{doc_id:06d}"


def category_of(document: dict[str, Any], value: Any, field: str | None, name: str) -> str:
    if field is None:
        return "all"
    fields = {**document, **(value if isinstance(value, dict) else {})}
    if field not in fields:
        raise UserError(f"task {name}: its data have no field {field}, but {', '.join(fields)}; correct categories.{name}")
    return str(fields[field])


def watch_guesses(task: Any) -> list[bool]:
    """Return a list that gets an entry for each answer that the task reads: whether it drew a random number for it.

    The generator is seeded by the answer's place, so the guess about a question is the same for every checkpoint.
    """
    guessed: list[bool] = []
    read = task.process_results

    def watched(*arguments: Any, **options: Any) -> Any:
        random.seed(len(guessed))
        before = random.getstate()
        found = read(*arguments, **options)
        guessed.append(random.getstate() != before)
        return found

    task.process_results = watched
    return guessed


def run(request: Request) -> Finished:
    from lmms_eval.evaluator import simple_evaluate

    name = request.task
    task, manager = load_task(name, request.include_path)
    metric = chosen_metric(task, name, request.metric)
    guessed = watch_guesses(task)
    model = open_model(open_family(Model(**request.model), Path(request.checkpoint), "judge"), request)
    results = simple_evaluate(
        model, tasks=[task], task_manager=manager, limit=request.limit, bootstrap_iters=0, process_docs_parallel=1
    )
    samples = [
        Sample(
            question_id(name, sample["doc_id"], sample[metric]),
            model.image_ids[sample["doc_id"]],
            category_of(sample["doc"], sample[metric], request.category, name),
            str(sample["arguments"][0]),
            str(sample["target"]),
            str(sample["filtered_resps"][0]),
            score_of(task, name, metric, sample[metric]),
            guess,
        )
        for sample, guess in zip(results["samples"][name], guessed, strict=True)
        if metric in sample  # some metrics leave out a part of the questions, such as those about videos
    ]
    reported = next((value for key, value in results["results"][name].items() if key.split(",")[0] == metric), None)
    return Finished(version("lmms_eval"), metric, as_number(reported), samples)


# The command


def require_lmms_eval() -> None:
    if find_spec("lmms_eval") is None:
        raise UserError(f"{sys.executable} has no lmms-eval; make an environment that has it with `make lmms-env`")


def end_with(parent: int) -> None:
    """End this process soon after its parent has been killed, so that it does not keep a GPU."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="load tasks, so that their data are in the cache of HF_HOME")
    prepare.add_argument("tasks", nargs="+")
    prepare.add_argument("--include-path", help="a folder with tasks of your own")
    running = commands.add_parser("run", help="run one task")
    running.add_argument("--request", type=Path, required=True)
    running.add_argument("--parent", type=int, required=True, help="the process without which this one ends")
    running.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.command == "prepare":
        require_lmms_eval()
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(home / "datasets")  # where `stages.understanding.lmms` looks
        for name in arguments.tasks:
            task, _ = load_task(name, arguments.include_path and str(Path(arguments.include_path).absolute()))
            print(f"{name}: {len(task.eval_docs)} questions are in the cache; metrics: {', '.join(task.aggregation())}")
        return
    end_with(arguments.parent)
    try:
        require_lmms_eval()
        finished: dict[str, Any] = asdict(run(Request(**json.loads(arguments.request.read_text()))))
    except UserError as error:
        finished = {"error": str(error)}
    with whole_file(arguments.out) as temporary:
        temporary.write_text(json.dumps(finished))
    if "error" in finished:
        sys.exit(1)


if __name__ == "__main__":
    run_stage(main)
