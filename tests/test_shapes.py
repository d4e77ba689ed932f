"""The shapes world: scenes survive rendering and reading, prompts describe their scenes, and the splits are disjoint."""

import hashlib
import itertools
from dataclasses import asdict

import numpy as np
import pytest

from stages.shapes import oracle
from stages.shapes.grammar import (
    CATEGORIES,
    ERRORS,
    RELATIONS,
    SPLITS,
    Group,
    Meaning,
    changed,
    changes,
    from_json,
    meanings,
    perturb_scene,
    sample_scene,
    split_meanings,
)
from stages.shapes.measure import tables
from stages.shapes.sampling import minimal_pairs, sample_meaning
from stages.shapes.scenes import KINDS, decode_kind, encode_kind, render


def test_oracle_reads_every_tile_in_every_cell():
    grids = np.stack([np.roll(np.arange(16), shift).reshape(4, 4) for shift in range(16)])
    grids = np.concatenate([(grids + 16 * block) % (KINDS + 1) for block in range(7)])
    assert set(grids.ravel()) == set(range(KINDS + 1))
    assert (oracle.read(render(grids)) == grids).all()


def test_oracle_refuses_what_is_no_tile():
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    assert (oracle.read(picture) == oracle.UNREADABLE).all()
    assert not oracle.matches(meanings("color")[0], oracle.read(picture)[0])
    with pytest.raises(ValueError, match="64 x 64"):
        oracle.read(picture[:, :32])


@pytest.mark.parametrize("category", CATEGORIES)
def test_sampled_scenes_match_their_prompt(category):
    rng = np.random.default_rng(1)
    pool = meanings(category)
    for i in rng.integers(len(pool), size=200):
        assert oracle.matches(pool[i], sample_scene(pool[i], rng)), pool[i].prompt()


def test_oracle_counts_binds_and_places():
    red_circle, blue_square = encode_kind(0, 0, 0), encode_kind(1, 2, 0)
    grid = np.zeros((4, 4), dtype=np.int16)
    grid[1, 0], grid[2, 3] = red_circle, blue_square
    pair = (Group(1, "circle", "red"), Group(1, "square", "blue"))
    swapped = (Group(1, "circle", "blue"), Group(1, "square", "red"))
    assert oracle.matches(Meaning("color", pair), grid)
    assert not oracle.matches(Meaning("color", swapped), grid)
    assert not oracle.matches(Meaning("color", pair[:1]), grid)
    assert [r for r in RELATIONS if oracle.matches(Meaning("spatial", pair, r), grid)] == ["left of", "above"]


def test_grid_values_round_trip():
    assert [encode_kind(*decode_kind(value)) for value in range(1, KINDS + 1)] == list(range(1, KINDS + 1))


def test_there_are_enough_distinct_prompts():
    prompts = [meaning.prompt() for category in CATEGORIES for meaning in meanings(category)]
    assert len(set(prompts)) == len(prompts) >= 2000
    for category in CATEGORIES:
        assert all(len(split_meanings(category, split)) >= 40 for split in SPLITS), category


def test_splits_share_no_meaning_in_any_wording():
    canonical = {split: {m.canonical() for category in CATEGORIES for m in split_meanings(category, split)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not canonical[one] & canonical[other]
    star, circle = Group(1, "star"), Group(1, "circle", "red")
    assert Meaning("spatial", (star, circle), "left of").split() == Meaning("spatial", (circle, star), "right of").split()


def test_the_test_split_was_pretraining_in_earlier_versions():
    # In version 0.1, hashes below 154 were the pretraining split, and benchmarks measured hashes from 205 on.
    for category in CATEGORIES:
        for meaning in split_meanings(category, "test"):
            assert hashlib.sha256(meaning.canonical().encode()).digest()[0] < 154


def test_pretraining_questions_and_captions_stay_in_their_split():
    from stages.shapes.sampling import describe, sample_meaning, sample_questions
    from stages.shapes.train_model import SPLIT

    rng = np.random.default_rng(2)
    scenes = [sample_questions(rng, SPLIT, 8) for _ in range(600)]
    asked = [question for scene in scenes for question in scene]
    assert {len(scene) for scene in scenes} == {8}
    assert {question.meaning.split() for question in asked} == {"pretraining"}
    assert all(oracle.matches(question.meaning, question.grid) == question.label for question in asked)
    assert {question.kind for question in asked} == {"", *ERRORS}
    assert 0.2 < np.mean([question.label for question in asked]) < 0.5
    assert {sample_meaning(rng, SPLIT).split() for _ in range(2000)} == {"pretraining"}
    told = [describe(scene[0].grid, SPLIT, rng) for scene in scenes]
    assert {meaning.split() for meaning in told if meaning} == {"pretraining"}


def test_changed_meanings_differ_in_one_thing():
    rng = np.random.default_rng(3)
    for category in CATEGORIES:
        pool = meanings(category)
        for i in rng.integers(len(pool), size=100):
            for kind, which in changes(pool[i]):
                other = changed(pool[i], kind, which, rng)
                fields = [(asdict(a), asdict(b)) for a, b in zip(pool[i].groups, other.groups, strict=True)]
                different = {name for a, b in fields for name in a if a[name] != b[name]}
                different |= {"relation"} if other.relation != pool[i].relation else set()
                assert different == {"count" if kind == "number" else kind}


def test_an_error_of_drawing_is_one_change_and_often_makes_the_prompt_false():
    rng, wrong = np.random.default_rng(5), []
    for _ in range(1000):
        meaning = sample_meaning(rng, "validation", category="numeracy")
        before = sample_scene(meaning, rng)
        after = perturb_scene(before, meaning, rng)
        assert 1 <= (before != after).sum() <= 2
        wrong.append(not oracle.matches(meaning, after))
    assert np.mean(wrong) > 0.6


@pytest.mark.parametrize("kind", ERRORS)
def test_minimal_pairs_are_right_and_wrong(kind):
    for meaning, pair in minimal_pairs(np.random.default_rng(4), "validation", kind, 100):
        assert oracle.matches(meaning, pair.grid)
        assert not oracle.matches(pair.meaning, pair.grid)
        assert meaning.split() == pair.meaning.split() == "validation"


def test_meanings_survive_json():
    for category in CATEGORIES:
        assert all(from_json(meaning.to_json()) == meaning for meaning in meanings(category)[:50])
    with pytest.raises(ValueError, match="not a shapes meaning"):
        from_json("{}")


def test_the_tables_of_the_card_have_mean_and_range_of_every_figure():
    names = [*(f"{rate} {category}".strip() for rate in ("gen", "non", "own") for category in ("", *CATEGORIES))]
    names += ["calibration", *(f"auc {kind}" for kind in ERRORS)]
    found = [{name: place + shift for place, name in enumerate(names)} for shift in (0.0, 0.5)]
    lines = tables(found).split("\n")
    assert "| all | 0.2 (0.0 to 0.5) | 7.2 (7.0 to 7.5) | 14.2 (14.0 to 14.5) |" in lines
    assert "| relation | 26.250 (26.000 to 26.500) |" in lines
    assert sum(line.startswith("| ") for line in lines) == 2 + 1 + len(CATEGORIES) + len(ERRORS)
    assert "| relation | 26.000 |" in tables(found[:1]).split("\n")
