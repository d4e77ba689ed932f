"""The shapes world: scenes survive rendering and reading, prompts describe their scenes, and the splits are disjoint."""

import numpy as np
import pytest

from stages.shapes import oracle
from stages.shapes.grammar import (
    CATEGORIES,
    RELATIONS,
    SPLITS,
    Group,
    Meaning,
    from_json,
    meanings,
    perturb_meaning,
    sample_scene,
    split_meanings,
)
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
    assert not canonical["pretraining"] & canonical["post-training"]
    assert not canonical["pretraining"] & canonical["held-out"]
    assert not canonical["post-training"] & canonical["held-out"]
    star, circle = Group(1, "star"), Group(1, "circle", "red")
    assert Meaning("spatial", (star, circle), "left of").split() == Meaning("spatial", (circle, star), "right of").split()


def test_pretraining_captions_and_negatives_stay_in_their_split():
    from stages.shapes.sampling import sample_judged, sample_meaning
    from stages.shapes.train_model import SPLIT

    rng = np.random.default_rng(2)
    pairs = [sample_judged(rng, SPLIT) for _ in range(5000)]
    assert {pair.meaning.split() for pair in pairs} == {"pretraining"}
    assert {sample_meaning(rng, SPLIT).split() for _ in range(2000)} == {"pretraining"}
    assert all(oracle.matches(pair.meaning, pair.grid) == pair.label for pair in pairs)
    assert 0.45 < np.mean([pair.label for pair in pairs]) < 0.55


def test_perturbed_meanings_differ_in_one_thing():
    rng = np.random.default_rng(3)
    for category in CATEGORIES:
        pool = meanings(category)
        for i in rng.integers(len(pool), size=100):
            assert perturb_meaning(pool[i], rng) != pool[i]


def test_meanings_survive_json():
    for category in CATEGORIES:
        assert all(from_json(meaning.to_json()) == meaning for meaning in meanings(category)[:50])
    with pytest.raises(ValueError, match="not a shapes meaning"):
        from_json("{}")
