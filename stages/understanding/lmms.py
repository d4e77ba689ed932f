"""Benchmarks of the field, such as POPE, MMBench, SEED-Bench, GQA and MMMU, asked and graded by lmms-eval.

lmms-eval lives in an environment of its own, which `make lmms-env` makes, and runs there as a process for each task, offline
(`stages.understanding.lmms_model`). Its answers and their scores become those of this project, so that every metric has its
interval and its paired difference to the base model. The answers of a finished task are kept when a run is killed.

A task's metrics, by the categories that `categories` names (otherwise a single one, all). Every question counts once, as in
published numbers; the intervals resample images, because the questions about one image are not independent:

<task>_accuracy        mean score of the answers by the task's own metric
<task>_unreadable      share of answers in which the task found nothing to grade: the metric is no number, the task guessed, or
                       the right answer is yes or no and the answer says neither. A guess counts in the accuracy, as upstream
<task>_circular        MMBench: share of questions that are answered rightly with every rotation of their options, which is
                       the task's own number; its accuracy is over single rotations

and, if the right answers of a task are yes and no:

<task>_precision       of the answers yes, the share that is right
<task>_recall          of the questions whose answer is yes, the share that is answered with yes
<task>_f1              the harmonic mean of precision and recall
<task>_yes_ratio       share of the answers yes
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from stages.common.errors import UserError
from stages.common.settings import Model, Positive, Score
from stages.understanding.base import Answer, Measure, UnderstandingKind, UnderstandingSettings, by_question
from stages.understanding.lmms_model import ROTATED, Finished, Request, Sample

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = "stages.understanding.lmms_model"
GUESSED = " (guessed)"  # after the task in the column `part`
PATIENCE = 20  # seconds in which lmms-eval may end before it is killed
# Questions of the tasks' default splits, for time limits. Of SEED-Bench's, 14,233 are about images.
SIZES = {"pope": 9_000, "mmbench_en_dev_static": 4_329, "seedbench": 17_990, "gqa": 12_578, "mmmu_val": 900}
UNKNOWN_SIZE = 10_000
# Here the categories are equally large, so that their unweighted mean is the number that is reported in the field.
CATEGORIES = {"pope": "category", "mmmu_val": "subdomain", "shapes_pope": "half"}


class LmmsEval(UnderstandingSettings):
    kind: Literal["lmms-eval"]
    tasks: Annotated[list[str], Field(min_length=1)] = Field(
        description="Tasks of lmms-eval with generated answers, such as pope, mmbench_en_dev_static, seedbench, gqa and "
        "mmmu_val, or tasks of your own. docs/evaluation.md says what they report."
    )
    include_path: str | None = Field(
        default=None,
        description="A folder with tasks of your own. Relative paths in their YAML files are relative to this folder.",
    )
    metrics: dict[str, str] = Field(
        default={},
        description="For single tasks, the metric that scores an answer. Empty: the first one in the task's file.",
    )
    categories: dict[str, str] = Field(
        default={},
        description="For single tasks, the field of their data by which answers are counted; overall is then the unweighted "
        "mean over its values. pope has category and mmmu_val has subdomain; other tasks are counted as a whole.",
    )
    limit: Positive | None = Field(
        default=None, description="Ask only so many questions of each task, the first ones. Empty: all."
    )
    max_new_tokens: Positive = Field(
        default=128, description="The longest answer in tokens, unless the task itself has a lower limit."
    )
    batch_size: Positive = Field(default=16, description="Questions that are answered together. It changes no result.")
    python: str | None = Field(
        default=None,
        description="The Python interpreter of lmms-eval's environment. Empty: .venv-lmms, which `make lmms-env` makes.",
    )
    cache: str | None = Field(
        default=None,
        description="The folder with the prepared data of the tasks, as HF_HOME. Empty: that of the environment variable.",
    )

    @model_validator(mode="after")
    def _names(self) -> LmmsEval:
        if twice := [task for task in dict.fromkeys(self.tasks) if self.tasks.count(task) > 1]:
            raise ValueError(f"tasks names {twice[0]} twice; remove one")
        for key, names in (("metrics", self.metrics), ("categories", self.categories)):
            if unknown := [task for task in names if task not in self.tasks]:
                raise ValueError(f"{key} has {unknown[0]}, which is not in tasks; correct its name or remove it")
        return self

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(exclude={"include_path", "batch_size", "python", "cache"})


def files(settings: LmmsEval) -> list[str]:
    """Return the files of the user's own tasks. Raises UserError where they or lmms-eval are missing, before a run starts."""
    interpreter(settings)
    if settings.include_path is None:
        return []
    folder = Path(settings.include_path)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    if not any(path.suffix == ".yaml" for path in found):
        raise UserError(
            f"{folder}: no YAML file of a task below this folder; correct include_path in the section understanding"
        )
    return [str(path) for path in found]


def interpreter(settings: LmmsEval) -> Path:
    """Return the interpreter of lmms-eval's environment. Links are kept, because an environment's interpreter is one."""
    path = Path(settings.python).absolute() if settings.python else ROOT / ".venv-lmms/bin/python"
    if not path.is_file():
        raise UserError(
            f"{path}: no such Python interpreter, so lmms-eval cannot run; make its environment with `make lmms-env` in {ROOT}"
            ", or name an interpreter that has it as python in the section understanding"
        )
    return path


def environment(settings: LmmsEval) -> dict[str, str]:
    """Return the environment of lmms-eval's process: this project's code, the cache of the data, and no network.

    Without LMMS_EVAL_DATASETS_CACHE, lmms-eval takes a cache on a node's own disk instead of one on a remote file system.
    """
    home = Path(settings.cache or os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser().absolute()
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    return os.environ | offline | {
        "HF_HOME": str(home),
        "LMMS_EVAL_DATASETS_CACHE": str(home / "datasets"),
        "PYTHONPATH": str(ROOT),
        "TQDM_MININTERVAL": "60",  # a log is no terminal
    }  # fmt: skip


def evaluate(settings: LmmsEval, model: Model, score: Score, checkpoint: Path, task: str) -> list[Answer]:
    """Run a task in lmms-eval's environment and return its answers. Raises UserError if it fails."""
    python, variables = interpreter(settings), environment(settings)
    own = str(Path(settings.include_path).absolute()) if settings.include_path else None
    remedy = f"cd {ROOT} && HF_HOME={variables['HF_HOME']} {python} -m {LAUNCHER} prepare {task}"
    remedy += f" --include-path {own}" if own else ""
    request = Request(
        task=task,
        checkpoint=str(checkpoint.absolute()),
        model=model.model_dump(),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        include_path=own,
        limit=settings.limit,
        metric=settings.metrics.get(task),
        category=settings.categories.get(task, CATEGORIES.get(task)),
    )
    with tempfile.TemporaryDirectory() as name:  # some tasks leave files in their working directory
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asdict(request)))
        names = ["--request", "request.json", "--out", "answers.json"]
        command = [str(python), "-m", LAUNCHER, "run", "--parent", str(os.getpid()), *names]
        with subprocess.Popen(command, cwd=folder, env=variables) as process:
            try:
                process.wait()
            finally:
                stop(process)
        return answers_of(task, read(folder / "answers.json", task, process.returncode, remedy))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process if it still runs, as it does when this one is told to end."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()


def read(path: Path, task: str, code: int, prepare: str) -> Finished:
    """Return what lmms-eval's process has written. Raises UserError with its own message, or if it has written nothing.

    prepare: the command that fetches the task's data.
    """
    if not path.exists():
        raise UserError(
            f"lmms-eval ended with exit code {code} in task {task} and left no answers; what it said is above. The answers of "
            "finished tasks are kept, so correct the cause and run it again"
        )
    fields = json.loads(path.read_text())
    if "error" in fields:
        missing = "cannot be loaded" in fields["error"]
        remedy = f"; if its data are missing, fetch them on a machine that reaches the hub: {prepare}" if missing else ""
        raise UserError(f"lmms-eval: {fields['error']}{remedy}")
    return Finished(**fields | {"samples": [Sample(**sample) for sample in fields["samples"]]})


def answers_of(task: str, finished: Finished) -> list[Answer]:
    """Return the answers with their scores, and print how they compare with the metric that the task itself reports."""
    if not finished.samples:
        raise UserError(
            f"lmms-eval: no answer of task {task} has the metric {finished.metric}; choose another in metrics.{task}"
        )
    answers = [
        Answer(
            sample.question_id,
            sample.image_id,
            task + (GUESSED if sample.guessed else ""),
            sample.category,
            question=sample.question,
            expected=sample.expected,
            answer=sample.answer,
            p_yes=None,
            score=sample.score,
        )
        for sample in finished.samples
    ]
    print(compared(task, answers, finished))
    return answers


def compared(task: str, answers: Sequence[Answer], finished: Finished) -> str:
    """Return a line with the task's own metric, which is the mean score of the answers unless the metric is no mean."""
    scores = [
        answer.score for answer in (rotations_joined(answers) if task in ROTATED else answers) if answer.score is not None
    ]
    mean = sum(scores) / len(scores) if scores else float("nan")
    line = f"{task}: {len(answers)} answers, {finished.metric} {finished.reported} by lmms-eval {finished.version}"
    if finished.reported is None or min(abs(finished.reported - mean), abs(finished.reported - 100 * mean)) > 1e-3:
        line += (
            f"; the mean score of its answers is {mean:.5f}, so this metric is no mean over answers, and {task}_accuracy is "
            f"not comparable with it; another one can be chosen in metrics.{task}"
        )
    return line


def rotations_joined(answers: Sequence[Answer]) -> list[Answer]:
    """Return one answer for each question with rotated options, which is right if all its rotations are."""
    joined: dict[str, Answer] = {}
    for answer in answers:
        question = answer.question_id.rsplit("/", 1)[0]
        if question not in joined or answer.score != 1:
            joined[question] = answer
    return list(joined.values())


def measures(answers: Sequence[Answer]) -> list[Measure]:
    """Return the metrics of all tasks."""
    found: list[Measure] = []
    for task in dict.fromkeys(answer.part.removesuffix(GUESSED) for answer in answers):
        members = [answer for answer in answers if answer.part.removesuffix(GUESSED) == task]
        yes_no = {answer.expected.lower() for answer in members if answer.expected} == {"yes", "no"}
        for category in dict.fromkeys(answer.category for answer in members):
            found += task_measures(task, category, [answer for answer in members if answer.category == category], yes_no)
    return found


def task_measures(task: str, category: str, answers: Sequence[Answer], yes_no: bool) -> list[Measure]:
    """Return a task's metrics in a category. yes_no: whether its right answers are yes and no."""
    from stages.families.tools.asking import parse_answer

    def measure(metric: str, numerators: Sequence[float | bool], denominators: Sequence[float | bool]) -> Measure:
        images = [answer.image_id for answer in answers]
        return by_question(f"{task}_{metric}", category, images, np.array(numerators, float), np.array(denominators, float))

    every, scored = [True] * len(answers), [answer.score is not None for answer in answers]
    unread = [answer.score is None or answer.part.endswith(GUESSED) for answer in answers]
    found = [measure("accuracy", [answer.score or 0.0 for answer in answers], scored)]
    if yes_no:
        verdicts = [parse_answer(answer.answer or "") for answer in answers]
        yes = [verdict is True for verdict in verdicts]
        expected = [(answer.expected or "").lower() == "yes" for answer in answers]
        true_yes = [said and right for said, right in zip(yes, expected, strict=True)]
        unread = [verdict is None or other for verdict, other in zip(verdicts, unread, strict=True)]
        found += [
            measure("precision", true_yes, yes),
            measure("recall", true_yes, expected),
            measure("f1", [2 * value for value in true_yes], [a + b for a, b in zip(yes, expected, strict=True)]),
            measure("yes_ratio", yes, every),
        ]
    if task in ROTATED:
        joined = rotations_joined(answers)
        scores = np.array([answer.score for answer in joined], float)
        images = [answer.image_id for answer in joined]
        found.append(by_question(f"{task}_circular", category, images, scores, np.ones(len(joined))))
    return [*found, measure("unreadable", unread, every)]


def size(settings: LmmsEval) -> int:
    """Return the number of questions as verdicts of equal length: a generated answer takes about as long as two verdicts."""
    return 2 * sum(min(settings.limit or UNKNOWN_SIZE**2, SIZES.get(task, UNKNOWN_SIZE)) for task in settings.tasks)


LMMS_EVAL = UnderstandingKind(
    LmmsEval,
    size=size,
    evaluate=evaluate,
    parts=lambda settings: settings.tasks,
    measures=measures,
    files=files,
)
