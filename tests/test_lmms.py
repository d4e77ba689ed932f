"""Understanding benchmarks through lmms-eval: settings, messages, what is counted, and tasks that run in its environment."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value, load_dataset
from datasets.naming import camelcase_to_snakecase

from stages.common.config import validate
from stages.common.errors import UserError
from stages.common.settings import Model, Score
from stages.count_answers import metric_rows
from stages.shapes import oracle
from stages.shapes.grammar import parse_prompt
from stages.tools.intervals import exact_interval
from stages.understanding import understanding_kind
from stages.understanding.lmms import (
    LAUNCHER,
    LMMS_EVAL,
    LmmsEval,
    answers_of,
    compared,
    environment,
    evaluate,
    files,
    measures,
    read,
)
from stages.understanding.lmms_model import Asked, Finished, Sample, cleaned, in_batches, picture_hash, side_by_side
from stages.understanding.shapes import ShapesUnderstanding, yes_no_questions
from stages.understanding.shapes_task import graded, write
from tests.helpers import LMMS_PYTHON, ROOT, completed, done, refused, stage, write_config
from tests.helpers import environment as shell
from tests.test_understanding import value

QUESTION = "does this image show {prompt} ?"


def settings(**changes) -> LmmsEval:
    return LmmsEval(**{"kind": "lmms-eval", "tasks": ["pope"]} | changes)


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    return dict(line.strip().lower().split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_the_environment_has_the_projects_pins_and_no_torchvision():
    own, project = pins(ROOT / "envs/lmms-eval.txt"), pins(ROOT / "constraints.txt")
    assert {name for name in own.keys() & project.keys() if own[name] != project[name]} == set()
    assert {"lmms_eval", "torch", "transformers", "datasets", "pydantic", "psutil", "pyarrow"} <= own.keys()
    assert "torchvision" not in own


# --- settings and messages ---------------------------------------------------------------------------------------------


def test_a_missing_environment_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make lmms-env") as error:
        files(settings(python=str(tmp_path / "none/bin/python")))
    assert str(tmp_path / "none/bin/python") in str(error.value)


def test_an_interpreter_without_lmms_eval_is_named_with_the_command_that_makes_one(tmp_path):
    config = write_config(tmp_path, understanding={"field": {"kind": "lmms-eval", "tasks": ["pope"], "python": sys.executable}})
    result = stage("understand", "--config", config, "--name", "field", "--out", tmp_path / "answers.parquet")
    refused(result, "has no lmms-eval", "make lmms-env", sys.executable)
    assert not (tmp_path / "answers.parquet").exists()


def test_the_files_of_own_tasks_are_watched_and_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(UserError, match="include_path"):
        files(settings(python=sys.executable, include_path=str(tmp_path)))
    for name in ("tasks/mine.yaml", "tasks/utils.py", "tasks/__pycache__/utils.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    found = files(settings(python=sys.executable, include_path=str(tmp_path)))
    assert found == [str(tmp_path / "tasks/mine.yaml"), str(tmp_path / "tasks/utils.py")]


def test_where_things_are_and_how_fast_it_runs_is_no_part_of_the_outcome(tmp_path):
    elsewhere = settings(include_path="tasks", python="python", cache="hf", batch_size=1)
    assert elsewhere.outcome() == settings().outcome()
    assert settings(limit=5).outcome() != settings().outcome()
    assert LMMS_EVAL.size(settings(tasks=["pope", "gqa"], limit=100)) == LMMS_EVAL.size(settings(limit=200)) == 400
    assert LMMS_EVAL.size(settings()) > 9_000


def test_lmms_eval_runs_offline_on_the_configured_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert environment(settings())["HF_HOME"] == "/elsewhere"
    variables = environment(settings(cache=str(tmp_path)))
    assert variables["HF_HOME"] == str(tmp_path)
    assert variables["LMMS_EVAL_DATASETS_CACHE"] == str(tmp_path / "datasets")
    assert variables["HF_HUB_OFFLINE"] == variables["HF_DATASETS_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": []}, ["understanding.field.tasks", "at least 1"]),
        ({"limits": 3}, ["understanding.field.limits", "'limit'"]),
        ({"limit": 0}, ["understanding.field.limit", "greater than or equal to 1"]),
        ({"tasks": ["gqa", "gqa"]}, ["understanding.field", "tasks names gqa twice"]),
        ({"metrics": {"pop": "pope_accuracy"}}, ["understanding.field", "metrics has pop, which is not in tasks"]),
    ],
    ids=["no tasks", "a key", "a number", "a task twice", "a metric of another task"],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(UserError) as error:
        validate({"understanding": {"field": {"kind": "lmms-eval", "tasks": ["pope"]} | changes}})
    for word in words:
        assert word in str(error.value)


def test_a_kind_is_registered_by_name():
    assert understanding_kind("lmms-eval") is LMMS_EVAL


# --- what lmms-eval's process has written ------------------------------------------------------------------------------


def sample(number: int, answer: str, score: float | None, expected: str = "yes", **changes) -> Sample:
    fields = {"question_id": f"pope/{number:06d}", "image_id": str(number), "category": "random", "guessed": False}
    return Sample(**fields | {"question": "?", "expected": expected, "answer": answer, "score": score} | changes)


def test_what_lmms_eval_has_written_becomes_answers(tmp_path, capsys):
    path = tmp_path / "answers.json"
    samples = [sample(0, "Yes", 1.0).__dict__, sample(1, "maybe", 0.0, guessed=True).__dict__]
    path.write_text(json.dumps({"version": "0.7.3", "metric": "pope_accuracy", "reported": 0.5, "samples": samples}))
    answers = answers_of("pope", read(path, "pope", 0, "fetch pope"))
    assert [(answer.part, answer.answer, answer.score) for answer in answers] == [
        ("pope", "Yes", 1.0),
        ("pope (guessed)", "maybe", 0.0),
    ]
    assert capsys.readouterr().out == "pope: 2 answers, pope_accuracy 0.5 by lmms-eval 0.7.3\n"


def test_a_failure_of_lmms_eval_is_one_message_with_the_remedy(tmp_path):
    path = tmp_path / "answers.json"
    with pytest.raises(UserError, match="exit code 0 in task pope and left no answers"):  # as its own command ends
        read(path, "pope", 0, "fetch pope")
    path.write_text(json.dumps({"error": "task pope cannot be loaded: ConnectionError: offline"}))
    with pytest.raises(UserError, match=r"ConnectionError: offline; .* on a machine that reaches the hub: fetch pope"):
        read(path, "pope", 1, "fetch pope")
    path.write_text(json.dumps({"error": "task pope has no metric f1"}))
    with pytest.raises(UserError, match=r"has no metric f1$"):
        read(path, "pope", 1, "fetch pope")
    with pytest.raises(UserError, match=r"metrics\.pope"):
        answers_of("pope", Finished("0.7.3", "pope_f1", 0.0, []))


@pytest.mark.parametrize("include_path", [None, "tasks"])
def test_the_command_that_fetches_missing_data_finds_tasks_of_ones_own(include_path, tmp_path):
    python = tmp_path / "python"  # in the place of lmms-eval's
    python.write_text('#!/bin/sh\necho \'{"error": "task mine cannot be loaded: offline"}\' > answers.json\n')
    python.chmod(0o755)
    asked = settings(tasks=["mine"], python=str(python), cache="hf", include_path=include_path)
    with pytest.raises(UserError) as error:
        evaluate(asked, Model(), Score(), tmp_path, "mine")
    own = f" --include-path {Path('tasks').absolute()}" if include_path else ""
    assert str(error.value).endswith(f"HF_HOME={Path('hf').absolute()} {python} -m {LAUNCHER} prepare mine{own}")


def test_a_metric_that_is_no_mean_over_answers_is_said(capsys):
    answers = answers_of("pope", Finished("0.7.3", "pope_f1_score", 0.8, [sample(0, "yes", 1.0), sample(1, "no", 0.0)]))
    assert "this metric is no mean over answers" in capsys.readouterr().out
    percent = compared("pope", answers, Finished("0.7.3", "pope_accuracy", 50.0, []))
    assert "no mean" not in percent


# --- metrics -----------------------------------------------------------------------------------------------------------


def test_yes_no_metrics_are_those_of_the_confusion_matrix():
    cases = [("Yes", "yes")] * 6 + [("no", "yes")] * 2 + [("yes", "no")] * 3 + [("No", "no")] * 5 + [("a dog", "no")]
    samples = [
        sample(i, said, float(said.lower() == expected), expected) for i, (said, expected) in enumerate(cases)
    ]  # fmt: skip
    found = measures(answers_of("pope", Finished("0.7.3", "pope_accuracy", 11 / 17, samples)))
    assert value(found, "pope_accuracy", "random") == (pytest.approx(11 / 17), 17)
    assert value(found, "pope_precision", "random") == (6 / 9, 9)
    assert value(found, "pope_recall", "random") == (6 / 8, 8)
    assert value(found, "pope_f1", "random")[0] == pytest.approx(2 * 6 / (9 + 8))
    assert value(found, "pope_yes_ratio", "random") == (pytest.approx(9 / 17), 17)
    assert value(found, "pope_unreadable", "random") == (pytest.approx(1 / 17), 17)


def test_a_guess_counts_as_upstream_and_is_counted_apart():
    samples = [
        sample(0, "A", 1.0, "A"),
        sample(1, "well", 1.0, "B", guessed=True),
        sample(2, "well", 0.0, "C", guessed=True),
        sample(3, "D", None, "D"),
    ]
    found = measures(answers_of("mmmu_val", Finished("0.7.3", "mmmu_acc", 2 / 3, samples)))
    assert value(found, "mmmu_val_accuracy", "random") == (pytest.approx(2 / 3), 3)
    assert value(found, "mmmu_val_unreadable", "random") == (3 / 4, 4)
    assert {measure.metric for measure in found} == {"mmmu_val_accuracy", "mmmu_val_unreadable"}


def test_a_question_with_rotated_options_is_right_if_all_rotations_are(capsys):
    task = "mmbench_en_dev_static"
    scores = {1: [1, 1], 2: [1, 0, 1], 3: [0, 1], 4: [1]}
    samples = [
        sample(0, "A", float(score), "A", question_id=f"{task}/{number:06d}/{rotation}", image_id=str(number), category="all")
        for number, each in scores.items()
        for rotation, score in enumerate(each)
    ]
    found = measures(answers_of(task, Finished("0.7.3", "gpt_eval_score", 50.0, samples)))
    assert "no mean" not in capsys.readouterr().out  # the task reports 100 x the share of questions
    assert value(found, f"{task}_circular", "all") == (0.5, 4)
    assert value(found, f"{task}_accuracy", "all") == (6 / 8, 8)


def test_every_question_counts_once_however_many_its_image_has():
    samples = [sample(i, "A", float(i < 3), "A", image_id="three" if i < 3 else "one", category="all") for i in range(4)]
    answers = answers_of("gqa", Finished("0.7.3", "exact_match", 0.75, samples))
    row = metric_rows(LMMS_EVAL, answers, answers, 100)[0]
    assert (row["metric"], row["value"], row["denominator"]) == ("gqa_accuracy", 75.0, 4)


def test_many_questions_about_few_images_have_the_interval_of_few_images():
    """Of thirty questions about three images 27 are answered rightly: resampled, three images would say 80 to 100 %."""
    samples = [sample(i, "A", float(i % 10 >= i // 10), "A", image_id=str(i // 10), category="all") for i in range(30)]
    answers = answers_of("gqa", Finished("0.7.3", "exact_match", 0.9, samples))
    row = metric_rows(LMMS_EVAL, answers, answers, 100)[0]
    low, high = exact_interval(2.7, 3)
    assert (row["value"], row["denominator"]) == (90.0, 30)
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(100 * low), pytest.approx(100 * high))
    assert low < 0.3


def test_both_checkpoints_have_the_same_metrics_whatever_they_answer():
    cases = [("yes", 1.0, False), ("?", 0.0, False), ("yes", None, True)]
    metrics = set()
    for said, score, guessed in cases:
        samples = [sample(i, said, score, expected, guessed=guessed) for i, expected in enumerate(("yes", "no"))]
        metrics.add(tuple(measure.metric for measure in measures(answers_of("pope", Finished("0", "m", None, samples)))))
    assert len(metrics) == 1


# --- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        (" Yes.", (), "Yes"),
        ("1 <|User|>: what", (), "1"),
        ("B.", (), "B"),
        ("Yes, it does.", (), "Yes, it does."),
        ("-5", (), "-5"),
        (" 0 0 0 0", (" ", "."), "0"),
        ("red ASSISTANT: more", ("ASSISTANT:",), "red"),
        ("", ("",), ""),
    ],
)
def test_a_generated_text_ends_where_the_answer_does(text, until, expected):
    assert cleaned(text, until) == expected


def test_pictures_of_one_size_share_a_batch_and_none_is_lost():
    asked = [Asked(i, np.zeros((4 + i % 2, 4, 3), np.uint8), "?", 8 if i < 6 else 9, ()) for i in range(9)]
    batches = list(in_batches(asked, 2))
    assert sorted(question.place for batch in batches for question in batch) == list(range(9))
    for batch in batches:
        assert len({(question.picture.shape, question.max_new_tokens) for question in batch}) == 1
        assert len(batch) <= 2
    assert [question.place for question in batches[0]] == [0, 2]


def test_few_pictures_are_in_memory_at_once_however_many_sizes_there_are():
    read = []

    def questions():
        for place in range(400):
            read.append(place)
            side = 3 if place % 5 == 0 else 10 + place  # one size in five comes again, all others once
            yield Asked(place, np.zeros((1, side, 3), np.uint8), "?", 8, ())

    answered = []
    for batch in in_batches(questions(), 4):
        answered += [question.place for question in batch]
        assert len(batch) <= 4
        assert len(read) - len(answered) <= 16 * 4
    assert sorted(answered) == read == list(range(400))


def test_several_pictures_are_shown_side_by_side():
    left, right = np.full((2, 3, 3), 10, np.uint8), np.full((4, 5, 3), 20, np.uint8)
    both = side_by_side([left, right])
    assert both.shape == (4, 3 + 8 + 5, 3)
    assert (both[:2, :3] == 10).all() and (both[2:, :3] == 255).all() and (both[:, -5:] == 20).all()
    assert side_by_side([left]) is left
    assert picture_hash(left) == picture_hash(left.copy()) != picture_hash(left.reshape(3, 2, 3))


# --- the task of the shapes world --------------------------------------------------------------------------------------


def test_the_task_asks_the_yes_no_questions_of_the_kind_shapes(tmp_path):
    chosen = ShapesUnderstanding(kind="shapes", count=16)
    assert write(tmp_path, chosen, QUESTION) == 32
    table = load_dataset(
        "parquet", data_files=str(tmp_path / "questions.parquet"), split="train", cache_dir=str(tmp_path / "c")
    )
    own = list(yes_no_questions(chosen, np.random.default_rng([0, 1])))
    assert table["question"] == [QUESTION.replace("{prompt}", question.text) for question in own]
    assert table["question_id"] == [question.question_id for question in own]
    assert sorted(table["expected"]) == ["no"] * 16 + ["yes"] * 16
    for row, question in zip(table, own, strict=True):
        assert (np.asarray(row["image"].convert("RGB")) == question.image()).all()
        meaning = parse_prompt(row["question"].removeprefix("does this image show ").removesuffix(" ?"))
        scene = oracle.read(np.asarray(row["image"].convert("RGB"))[None])[0]
        assert oracle.matches(meaning, scene) == (row["expected"] == "yes")
    assert {"random", "adversarial"} == set(table["half"])
    assert (tmp_path / "shapes_pope.yaml").read_text().count("!function stages.understanding.shapes_task.") == 3


def test_the_task_counts_what_is_neither_yes_nor_no_as_wrong():
    for said, expected, score in (("1", "yes", 1), ("No", "no", 1), ("0", "yes", 0), ("star", "no", 0), ("star", "yes", 0)):
        assert graded({"expected": expected}, [said]) == {"shapes_accuracy": score}


# --- in the environment of lmms-eval -----------------------------------------------------------------------------------


def photograph(number: int, height: int = 40) -> dict:
    import io

    from PIL import Image as Pillow

    with io.BytesIO() as file:
        noise = np.random.default_rng(number).integers(0, 255, (height, 60, 3), dtype=np.uint8)
        Pillow.fromarray(noise).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}


def prepared(home: Path, name: str, config: str, split: str, rows: list[dict]) -> None:
    """Write a dataset into the cache of `datasets` as `prepare` leaves it there, so that its task runs without a network."""

    def feature(cell: object) -> object:
        if isinstance(cell, dict):
            return Image()
        if isinstance(cell, list):
            return List(Image())
        return Value("int64" if isinstance(cell, int) else "string")

    work, (owner, short) = home / "work", name.split("/")
    Dataset.from_list(rows, features=Features({key: feature(cell) for key, cell in rows[0].items()})).to_parquet(
        str(home / "rows.parquet")
    )
    load_dataset("parquet", data_files={split: str(home / "rows.parquet")}, cache_dir=str(work))
    [arrow] = work.glob("**/*.arrow")
    fields = json.loads((arrow.parent / "dataset_info.json").read_text())
    snake = camelcase_to_snakecase(short)
    folder = home / "datasets" / f"{owner}___{snake}" / config / "0.0.0" / ("a" * 40)
    folder.mkdir(parents=True)
    shutil.copy(arrow, folder / f"{snake}-{split}.arrow")
    splits = {split: fields["splits"][split] | {"dataset_name": snake}}
    (folder / "dataset_info.json").write_text(
        json.dumps(fields | {"dataset_name": snake, "config_name": config, "splits": splits})
    )
    shutil.rmtree(work)


def prepare_pope(home: Path) -> None:
    rows = [
        {
            "question_id": str(i),
            "question": "Is there a dog in the image?",
            "answer": "yes" if i % 2 else "no",
            "image": photograph(i // 2),
            "category": ("random", "popular", "adversarial")[i % 3],
        }
        for i in range(12)
    ]
    prepared(home, "lmms-lab-encoder/POPE", "default", "test", rows)


def benchmark(folder: Path, tasks: list[str], **changes) -> Path:
    own = {"kind": "lmms-eval", "tasks": tasks, "include_path": str(folder / "tasks"), "cache": str(folder / "hf")}
    return write_config(folder, understanding={"field": own | changes}, model={"device": "cpu"})


@pytest.mark.slow
@pytest.mark.lmms
def test_finished_tasks_are_kept_and_missing_data_are_named_with_the_command_that_fetches_them(lmms_python, tmp_path):
    write(tmp_path / "tasks", ShapesUnderstanding(kind="shapes", count=40), QUESTION)
    (tmp_path / "hf").mkdir()
    config = benchmark(tmp_path, ["shapes_pope", "pope"], max_new_tokens=8)
    arguments = ("--config", config, "--name", "field", "--out", tmp_path / "answers.parquet")
    result = stage("understand", *arguments)
    refused(result, "task pope cannot be loaded", f"HF_HOME={tmp_path / 'hf'}", "prepare pope")
    assert "shapes_pope: 80 answers" in result.stdout

    prepare_pope(tmp_path / "hf")
    finished = done("understand", *arguments)
    assert "shapes_pope: 80 answers" not in finished.stdout  # it is not asked again
    assert "pope: 12 answers, pope_accuracy 0.0 by lmms-eval" in finished.stdout  # the tiny model knows no dogs
    answers = pandas.read_parquet(tmp_path / "answers.parquet")
    assert answers.part.value_counts().to_dict() == {"shapes_pope": 80, "pope": 12}
    assert answers.image_id.nunique() == 40 + 6
    assert set(answers[answers.part == "shapes_pope"].answer) <= {"0", "1"}

    common = ("--config", config, "--name", "field", "--answers", tmp_path / "answers.parquet")
    done("count_answers", *common, "--arm", "base", "--base-answers", tmp_path / "answers.parquet", "--out",
         tmp_path / "metrics.parquet")  # fmt: skip
    metrics = pandas.read_parquet(tmp_path / "metrics.parquet").set_index(["category", "metric"])
    assert metrics.value["random", "shapes_pope_accuracy"] > 80
    assert metrics.denominator["adversarial", "shapes_pope_accuracy"] == 40
    assert metrics.ci_low["overall", "shapes_pope_accuracy"] < metrics.value["overall", "shapes_pope_accuracy"]
    assert metrics.value["overall", "pope_unreadable"] == 100
    assert {"random", "popular", "adversarial", "overall"} == {c for c, m in metrics.index if m == "pope_f1"}


@pytest.mark.slow
@pytest.mark.lmms
def test_the_workflow_runs_lmms_eval_as_any_understanding_benchmark(lmms_python, tmp_path):
    write(tmp_path / "tasks", ShapesUnderstanding(kind="shapes", count=16), QUESTION)
    benchmark(tmp_path, ["shapes_pope"])
    target = "results/small/base/understanding/field.parquet"
    completed(tmp_path, "--cores", 1, target)
    metrics = pandas.read_parquet(tmp_path / target)
    assert {"shapes_pope_accuracy", "shapes_pope_f1", "shapes_pope_unreadable"} <= set(metrics.metric)
    log = (tmp_path / "results/small/logs/understand/base.field.log").read_text()
    assert "shapes_pope: 32 answers, shapes_accuracy" in log
    assert "Postprocessing" in log  # what lmms-eval itself says
    assert "Nothing to be done" in completed(tmp_path, "-n", target)
    fields = yaml.safe_load((tmp_path / "config.yaml").read_text())
    fields["understanding"]["field"]["python"] = str(tmp_path / "none")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    result = subprocess.run(
        ["snakemake", "--directory", tmp_path, "--configfile", tmp_path / "config.yaml", "-n"],
        cwd=ROOT, env=shell(), capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode and "make lmms-env" in result.stdout + result.stderr  # before anything is drawn


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        return [child for child in psutil.Process(process.pid).children(recursive=True) if LMMS_PYTHON.name in child.name()]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
@pytest.mark.lmms
@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_lmms_eval_ends_with_the_stage_that_has_started_it(lmms_python, tmp_path, kill):
    write(tmp_path / "tasks", ShapesUnderstanding(kind="shapes", count=16), QUESTION)
    config = benchmark(tmp_path, ["shapes_pope"])
    command = [
        sys.executable,
        "-m",
        "stages.understand",
        "--config",
        config,
        "--name",
        "field",
        "--out",
        tmp_path / "a.parquet",
    ]
    started = subprocess.Popen(command, cwd=ROOT, env=shell(), stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while not (children := descendants(started)) and started.poll() is None and time.monotonic() < ends:
        time.sleep(0.1)
    assert children
    os.kill(started.pid, kill)
    started.wait(60)
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children) and time.monotonic() < ends:
        time.sleep(0.5)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not (tmp_path / "a.parquet").exists()


# For each task, the scores of three answers to its first question, and the pictures of the questions that it asks.
SCORES = """
import json, sys
from stages.understanding.lmms_model import chosen_metric, load_task, score_of, watch_guesses, aggregate
for name, texts in json.loads(sys.argv[1]).items():
    task, _ = load_task(name, None)
    metric, guessed = chosen_metric(task, name, None), watch_guesses(task)
    document = task.eval_docs_no_media[0]
    values = [task.process_results(document, [text])[metric] for text in texts]
    pictures = [len(task.doc_to_visual(each)) for each in task.eval_docs]
    print("FOUND", json.dumps([name, metric, [score_of(task, name, metric, v) for v in values], guessed, pictures]))
"""


@pytest.mark.slow
@pytest.mark.lmms
def test_the_named_tasks_score_single_answers(lmms_python, tmp_path):
    """The tasks' own rules: exact words for POPE and GQA, letters for SEED-Bench, guesses for MMMU, text for MMBench."""
    prepare_pope(tmp_path)
    mmbench = [
        {"index": number + 1_000_000 * rotation, "question": "What is it?", "hint": "nan", "answer": "AB"[rotation],
         "A": ("cat", "dog")[rotation], "B": ("dog", "cat")[rotation], "C": "nan", "D": "nan", "category": "c",
         "image": photograph(number), "source": "s", "L2-category": "l", "comment": "nan", "split": "dev"}
        for number in (1, 2) for rotation in (0, 1)
    ]  # fmt: skip
    prepared(tmp_path, "lmms-lab-encoder/MMBench", "en", "dev", mmbench)
    seed = [
        {"answer": "B", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d", "data_id": str(i),
         "data_type": kind, "question": "Which?", "question_id": str(i), "question_type_id": i,
         "image": [photograph(i)] * count}
        for i, (kind, count) in enumerate((("image", 1), ("video", 3)))
    ]  # fmt: skip
    prepared(tmp_path, "lmms-lab-encoder/SEED-Bench", "default", "test", seed)
    gqa = [{"id": str(i), "imageId": "7", "question": "What color?", "answer": "red"} for i in range(2)]
    prepared(tmp_path, "lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev", gqa)
    prepared(tmp_path, "lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev", [{"id": "7", "image": photograph(7)}])
    mmmu = [
        {"id": f"validation_Art_{i}", "question": "See <image 1>" + " and <image 2>?" * i, "options": "['cat', 'dog', 'cow']",
         "image_1": photograph(i), "image_2": photograph(9, 30), "answer": "B", "question_type": "multiple-choice"}
        for i in range(2)
    ]  # fmt: skip
    prepared(tmp_path, "lmms-lab-encoder/MMMU", "default", "validation", mmmu)

    texts = {
        "pope": ["no", "yes", "no."],
        "mmbench_en_dev_static": ["A", "B", "the cat"],
        "seedbench": ["B", "C", "B. b"],
        "gqa": ["Red.", "crimson", "red car"],
        "mmmu_val": ["B", "(A)", "no idea"],
    }
    variables = shell() | environment(settings(cache=str(tmp_path)))
    command = [lmms_python, "-c", textwrap.dedent(SCORES), json.dumps(texts)]
    result = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    lines = [json.loads(line[6:]) for line in result.stdout.splitlines() if line.startswith("FOUND ")]
    found = {name: rest for name, *rest in lines}
    assert found.keys() == texts.keys(), result.stderr[-3000:]
    assert found["pope"] == ["pope_accuracy", [1, 0, 0], [False] * 3, [1] * 12]  # "no." is wrong, so answers are cleaned
    assert found["mmbench_en_dev_static"] == ["gpt_eval_score", [1, 0, 1], [False] * 3, [1] * 4]
    assert found["seedbench"] == ["seed_image", [1, 0, 1], [False] * 3, [1, 3]]
    assert found["gqa"] == ["exact_match", [1, 0, 0], [False] * 3, [1, 1]]
    metric, scores, guessed, pictures = found["mmmu_val"]
    assert (metric, scores[:2], guessed, pictures) == ("mmmu_acc", [1, 0], [False, False, True], [1, 2])
    assert scores[2] in (0, 1)

    prepare = [lmms_python, "-m", "stages.understanding.lmms_model", "prepare", "pope", "gqa"]
    result = subprocess.run(prepare, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert "pope: 12 questions are in the cache; metrics: pope_accuracy, pope_precision" in result.stdout, result.stderr
    assert "gqa: 2 questions" in result.stdout
