"""Understanding benchmarks: the questions about scenes of the shapes world, what is counted from the answers, the stages."""

import dataclasses
from collections import Counter

import numpy as np
import pandas
import pytest

from stages.common.config import load, validate
from stages.common.errors import UserError
from stages.count_answers import metric_rows, require_equal_questions
from stages.families import describe
from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, ERRORS, meanings, parse_prompt
from stages.understanding import understanding_kind
from stages.understanding.base import Answer, mean_scores
from stages.understanding.shapes import (
    SHAPES,
    ShapesUnderstanding,
    caption_score,
    concordance,
    measures,
    questions,
)
from tests.helpers import TINY, done, refused, stage, write_config

SCENES = {"kind": "shapes", "count": 16, "captions": 6}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_prompt_is_parsed_into_its_meaning(category):
    for meaning in meanings(category):
        assert parse_prompt(meaning.prompt()) == meaning
    assert parse_prompt(f" {meaning.prompt().upper()}\n") == meaning


@pytest.mark.parametrize(
    "text",
    ["", "a", "star", "two star", "a stars", "an star", "a orange star", "a red blue star", "a star and", "a star left of",
     "a star left of a circle above a cross", "a star left of a circle and a cross", "0 star", "a star ?"],
)  # fmt: skip
def test_what_is_no_prompt_is_not_parsed(text):
    with pytest.raises(ValueError, match="grammar"):
        parse_prompt(text)


def scene_of(question) -> np.ndarray:
    return oracle.read(question.image()[None])[0]


def test_questions_are_balanced_and_their_answers_are_the_oracles():
    asked = questions(ShapesUnderstanding(**SCENES | {"count": 40}))
    assert len({question.question_id for question in asked}) == len(asked)
    counts = Counter((question.part, question.category, question.expected) for question in asked if not question.grade)
    for kind in ERRORS:
        assert counts["pairs", kind, "yes"] == counts["pairs", kind, "no"] == 8
    for half in ("random", "adversarial"):
        for name in ("existence", "attribute", "count", "relation"):
            assert counts[half, name, "yes"] == counts[half, name, "no"] == 5
    assert Counter(question.category for question in asked if question.grade) == dict.fromkeys(CATEGORIES, 1)
    for question in asked:
        meaning = parse_prompt(question.expected if question.grade else question.text)
        assert meaning.split() == "validation"
        assert oracle.matches(meaning, scene_of(question)) == (question.expected != "no"), question.question_id


def test_wrong_prompts_are_minimal_changes_or_other_prompts_of_the_category():
    asked = {question.question_id: question for question in questions(ShapesUnderstanding(**SCENES | {"count": 80}))}
    for name, question in asked.items():
        if question.part == "pairs" and question.expected == "no":
            right, wrong = (parse_prompt(each.text) for each in (asked[name.removesuffix("no") + "yes"], question))
            assert right != wrong
            assert (right.relation == wrong.relation) == (question.category != "relation")
            assert sum(a != b for a, b in zip(right.groups, wrong.groups, strict=True)) == (question.category != "relation")
        if question.part == "random":
            adversarial = asked[name.replace("random", "adversarial")]
            assert (adversarial.image() == question.image()).all()
            assert question.expected == "no" or adversarial.text == question.text


def test_equal_seeds_ask_equal_questions_and_parts_do_not_depend_on_each_other():
    def asked(**changes):
        found = questions(ShapesUnderstanding(**SCENES | changes))
        return [(each.question_id, each.text, each.expected, each.image().tobytes()) for each in found]

    assert asked() == asked()
    assert asked() != asked(seed=1)
    assert asked(captions=0) == [row for row in asked() if not row[0].startswith("captions")]


def answer(number: int, expected: str, p_yes: float | None, part: str, category: str, image: str = "") -> Answer:
    score = None if p_yes is None else float((p_yes >= 0.5) == (expected == "yes"))
    return Answer(
        f"{part}/{category}/{number}", image or f"{part}/{category}/{number}", part, category, "?", expected, None, p_yes, score
    )


def value(found, metric: str, category: str) -> tuple[float, float]:
    """Return a metric's value and its number of images."""
    measure = next(each for each in found if (each.metric, each.category) == (metric, category))
    return measure.numerators.sum() / measure.denominators.sum(), measure.denominators.sum()


def test_yes_no_metrics_are_those_of_the_confusion_matrix():
    verdicts = [("yes", 0.9)] * 6 + [("yes", 0.1)] * 2 + [("no", 0.8)] * 3 + [("no", 0.2)] * 5 + [("no", None)]
    found = measures([answer(i, expected, p, "random", "count") for i, (expected, p) in enumerate(verdicts)])
    assert value(found, "random_accuracy", "count") == (11 / 16, 16)
    assert value(found, "random_precision", "count") == (6 / 9, 9)
    assert value(found, "random_recall", "count") == (6 / 8, 8)
    assert value(found, "random_f1", "count")[0] == pytest.approx(2 * 6 / (9 + 8))
    assert value(found, "random_yes_ratio", "count") == (9 / 16, 16)
    assert value(found, "unreadable", "random") == (1 / 17, 17)


def test_the_area_under_the_curve_compares_all_right_with_all_wrong_prompts():
    generator = np.random.default_rng(0)
    right, wrong = generator.random(30).round(1), 0.8 * generator.random(30).round(1)
    wins = [float(a > b) + 0.5 * float(a == b) for a in right for b in wrong]
    assert concordance(right, wrong).mean() == pytest.approx(np.mean(wins))
    answers = [
        answer(2 * i + side, expected, p, "pairs", "color", f"scene {i}")
        for i, pair in enumerate(zip(right, wrong, strict=True))
        for side, (expected, p) in enumerate(zip(("yes", "no"), pair, strict=True))
    ]
    found = measures(answers)
    assert value(found, "pair_auc", "color") == (pytest.approx(np.mean(wins)), 30)
    accuracy = (np.sum(right >= 0.5) + np.sum(wrong < 0.5)) / 60
    assert value(found, "pair_accuracy", "color") == (pytest.approx(accuracy), 30)


def test_intervals_of_the_area_cover_it():
    """The resampled pairs give the variance of the area, not the smaller one of the mean over one side."""
    generator = np.random.default_rng(1)
    areas = []
    for _ in range(300):
        values = concordance(generator.normal(0.7, 1, 60), generator.normal(0, 1, 60))
        areas.append((values.mean(), values.std(ddof=1) / np.sqrt(60)))
    estimated, actual = np.mean([error for _, error in areas]), np.std([area for area, _ in areas])
    assert estimated == pytest.approx(actual, rel=0.15)


def test_captions_count_when_they_are_true_and_are_counted_apart_when_they_cannot_be_parsed():
    asked = [question for question in questions(ShapesUnderstanding(**SCENES)) if question.grade]
    grid = scene_of(asked[0])
    assert caption_score(grid, asked[0].expected) == 1
    assert caption_score(grid, asked[0].expected + " <|Assistant|> a star") == 1  # the tiny model's end of a turn
    assert caption_score(grid, "five dotted green diamonds") == 0
    assert caption_score(grid, "a lovely picture") == 0
    texts = [asked[0].expected, "five dotted green diamonds", "a lovely picture", "a"]
    found = measures(
        [
            Answer(str(i), str(i), "captions", "color", "?", None, text, None, caption_score(grid, text))
            for i, text in enumerate(texts)
        ]
    )
    assert value(found, "caption_true", "color") == (1 / 4, 4)
    assert value(found, "caption_unparsed", "color") == (2 / 4, 4)


def test_differences_from_base_are_paired():
    base = [answer(i, "yes", 0.9 if i % 2 else 0.1, "random", "count") for i in range(40)]
    better = [dataclasses.replace(each, p_yes=0.9, score=1.0) if i < 8 else each for i, each in enumerate(base)]
    rows = {(row["metric"], row["category"]): row for row in metric_rows(SHAPES, better, base, 500)}
    row = rows["random_accuracy", "count"]
    assert (row["value"], row["delta"], row["denominator"], row["prompts"]) == (60, 10, 40, 40)
    assert 0 < row["delta_ci_low"] < 10 < row["delta_ci_high"] < 25  # unpaired, it would contain 0
    assert 40 < row["ci_low"] < 50 < 60 < row["ci_high"] < 80
    assert rows["random_accuracy", "overall"]["value"] == 60
    same = metric_rows(SHAPES, base, base, 500)
    assert {(row["delta"], row["delta_ci_low"]) for row in same} == {(0, None)}  # not an interval of width 0
    with pytest.raises(UserError, match="1 questions are not those"):
        require_equal_questions(base, base[:-1], "base.parquet")


def test_without_metrics_of_its_own_a_kind_has_the_mean_score_of_images():
    answers = [
        Answer(str(i), f"image {i // 2}", "all", "cats", "?", None, "", None, score) for i, score in enumerate([1, 0, 1, 1])
    ]
    answers.append(Answer("4", "image 2", "all", "cats", "?", None, "", None, None))
    assert value(mean_scores(answers), "accuracy", "cats") == (0.75, 2)
    assert value(mean_scores(answers), "unreadable", "cats") == (pytest.approx(1 / 3), 3)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A folder with the tiny model's answers about few scenes and the metrics of them."""
    folder = tmp_path_factory.mktemp("understanding")
    config = write_config(folder, understanding={"scenes": SCENES})
    common = ("--config", config, "--name", "scenes")
    done("understand", *common, "--checkpoint", TINY, "--out", folder / "answers.parquet")
    done("count_answers", *common, "--arm", "base", "--answers", folder / "answers.parquet", "--base-answers",
         folder / "answers.parquet", "--out", folder / "metrics.parquet")  # fmt: skip
    return folder


def test_the_tiny_model_understands_fresh_scenes(asked):
    answers = pandas.read_parquet(asked / "answers.parquet")
    assert len(answers) == len(questions(ShapesUnderstanding(**SCENES)))
    assert set(answers[answers.part != "captions"].question.str.slice(0, 21)) == {"does this image show "}
    assert (answers.p_yes.isna() == (answers.part == "captions")).all()
    metrics = pandas.read_parquet(asked / "metrics.parquet").set_index(["category", "metric"])
    assert metrics.value["overall", "random_accuracy"] > 80
    assert metrics.value["overall", "caption_true"] > 50
    assert metrics.denominator["shape", "pair_accuracy"] == 3
    assert set(metrics.benchmark) == {"scenes"}
    table = done("report", "--metrics", asked / "metrics.parquet", "--out", asked / "summary.csv").stdout
    assert "scenes (understanding)" in table
    assert "random_f1" in table


def test_answers_do_not_depend_on_the_batch_and_are_the_same_again(asked, tmp_path):
    config = write_config(tmp_path, understanding={"scenes": SCENES}, score={"batch_size": 7})
    done("understand", "--config", config, "--name", "scenes", "--out", tmp_path / "answers.parquet")
    first, second = (pandas.read_parquet(folder / "answers.parquet") for folder in (asked, tmp_path))
    second = second.set_index("question_id").loc[first.question_id].reset_index()
    assert np.allclose(first.p_yes, second.p_yes, atol=1e-6, equal_nan=True)
    assert first.drop(columns="p_yes").equals(second.drop(columns="p_yes"))
    done("understand", "--config", asked / "config.yaml", "--name", "scenes", "--out", tmp_path / "again.parquet")
    assert (asked / "answers.parquet").read_bytes() == (tmp_path / "again.parquet").read_bytes()


def test_a_name_that_is_not_configured(tmp_path):
    config = write_config(tmp_path, understanding={"scenes": SCENES})
    result = stage("understand", "--config", config, "--name", "scene", "--out", tmp_path / "answers.parquet")
    refused(result, "--name scene", "section understanding", "scenes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"understanding": {"scenes": SCENES | {"capshions": 3}}}, ["understanding.scenes.capshions", "'captions'"]),
        ({"understanding": {"scenes": SCENES | {"count": 3}}}, ["understanding.scenes.count", "greater than or equal to 8"]),
        ({"understanding": {"scenes": {"kind": "pope"}}}, ["understanding.scenes", "pope"]),
        ({"understanding": {"same": SCENES}, "benchmarks": {"same": {"prompts": {"source": "shapes"}}}}, ["same name"]),
    ],
    ids=["a key", "a number", "a kind", "a name"],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(UserError) as error:
        validate(changes)
    for word in words:
        assert word in str(error.value)


def test_a_family_that_cannot_judge_is_refused(tmp_path, monkeypatch):
    config = write_config(tmp_path, understanding={"scenes": SCENES})
    monkeypatch.setattr(
        "stages.common.config.describe", lambda name: dataclasses.replace(describe(name), roles={"draw", "train"})
    )
    with pytest.raises(UserError, match="understanding: the family janus only draws"):
        load(config)


def test_a_kind_is_registered_by_name():
    assert understanding_kind("shapes") is SHAPES
    assert SHAPES.size(ShapesUnderstanding(**SCENES)) > 0
