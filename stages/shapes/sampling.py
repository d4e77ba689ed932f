"""Random prompts and labelled pairs of prompt and scene, on which the tiny model is trained and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, Meaning, perturb_meaning, perturb_scene, sample_scene, split_meanings


@dataclass
class Judged:
    """A prompt's meaning, a scene (int16 `[4, 4]`), and whether the prompt describes the scene."""

    meaning: Meaning
    grid: np.ndarray
    label: bool


@cache
def simple_meanings(split: str) -> tuple[Meaning, ...]:
    """Return the meanings of one group of one or two objects. They are few, but the model learns the words from them."""
    return tuple(
        meaning
        for category in CATEGORIES
        for meaning in split_meanings(category, split)
        if len(meaning.groups) == 1 and meaning.groups[0].count <= 2
    )


def sample_meaning(rng: np.random.Generator, split: str, simple: float = 0.0) -> Meaning:
    """Return a random meaning of the split: with probability `simple` a simple one, otherwise uniform over the categories."""
    if rng.random() < simple:
        pool = simple_meanings(split)
    else:
        pool = split_meanings(CATEGORIES[rng.integers(len(CATEGORIES))], split)
    return pool[rng.integers(len(pool))]


def sample_judged(rng: np.random.Generator, split: str, hard: float = 0.8, simple: float = 0.0) -> Judged:
    """Return a random labelled pair, which matches with probability one half. Its prompt belongs to the split.

    hard: the fraction of non-matching pairs that differ from a matching pair in one thing. simple: see `sample_meaning`.
    """
    wanted = bool(rng.random() < 0.5)
    while True:
        meaning = sample_meaning(rng, split, simple)
        grid = sample_scene(meaning, rng)
        if not wanted:
            kind = rng.random()
            if kind < hard / 2:
                grid = perturb_scene(grid, rng)
            elif kind < hard:
                meaning = perturb_meaning(meaning, rng)
                if meaning.split() != split:
                    continue
            else:
                pool = split_meanings(meaning.category, split)
                meaning = pool[rng.integers(len(pool))]
        elif rng.random() < 0.25:  # a changed scene that still matches, or every change would mean no
            grid = perturb_scene(grid, rng)
        if oracle.matches(meaning, grid) == wanted:
            return Judged(meaning, grid, wanted)
