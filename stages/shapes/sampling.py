"""Random prompts, scenes and labelled questions about them, on which the tiny model is trained and measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from stages.shapes import oracle
from stages.shapes.grammar import (
    CATEGORIES,
    ERRORS,
    INVERSE,
    RELATIONS,
    Group,
    Meaning,
    category_of,
    changed,
    changes,
    perturb_scene,
    sample_scene,
    split_meanings,
)
from stages.shapes.scenes import COLOR_NAMES, GRID, SHAPES, TEXTURES, decode_kind

# How often questions ask for each kind of error, where it is possible: the harder it is to see, the more often.
HARDNESS = {"shape": 1, "color": 2, "texture": 3, "number": 2, "relation": 4}


@dataclass
class Judged:
    """A scene (int16 `[4, 4]`), a meaning, and whether it describes the scene. `kind`: how it was changed, see `ERRORS`."""

    meaning: Meaning
    grid: np.ndarray
    label: bool
    kind: str = ""


@cache
def simple_meanings(split: str) -> tuple[tuple[Meaning, ...], ...]:
    """Return two pools of simple meanings, from which the model learns the words.

    They are one group of one or two objects, and two shapes in a relation.
    """
    known = [meaning for category in CATEGORIES for meaning in split_meanings(category, split)]
    alone = [meaning for meaning in known if len(meaning.groups) == 1 and meaning.groups[0].count <= 2]
    related = [meaning for meaning in known if meaning.relation and not any(group.color for group in meaning.groups)]
    return tuple(alone), tuple(related)


def sample_meaning(rng: np.random.Generator, split: str, simple: float = 0.0, category: str | None = None) -> Meaning:
    """Return a random meaning of the split: with probability `simple` a simple one, otherwise of the category.

    Without a category, all are equally likely.
    """
    if rng.random() < simple:
        pool = simple_meanings(split)[int(rng.random() < 0.6)]  # most in a relation, which is learned last
    else:
        pool = split_meanings(category or CATEGORIES[rng.integers(len(CATEGORIES))], split)
    return pool[rng.integers(len(pool))]


def minimal_pairs(rng: np.random.Generator, split: str, kind: str, count: int) -> list[tuple[Meaning, Judged]]:
    """Return meanings with a scene each, and a meaning that is false of the scene and differs in one thing of a kind in ERRORS.

    Both meanings belong to the split. They are uniform over the categories in which such a change is possible.
    """
    pools = [[m for m in split_meanings(category, split) if kind in dict(changes(m))] for category in CATEGORIES]
    pools = [pool for pool in pools if pool]
    pairs: list[tuple[Meaning, Judged]] = []
    while len(pairs) < count:
        pool = pools[rng.integers(len(pools))]
        meaning = pool[rng.integers(len(pool))]
        grid = sample_scene(meaning, rng)
        places = [which for name, which in changes(meaning) if name == kind]
        other = changed(meaning, kind, places[rng.integers(len(places))], rng)
        if other.split() == split and not oracle.matches(other, grid):
            pairs.append((meaning, Judged(other, grid, False, kind)))
    return pairs


@cache
def _members(category: str, split: str) -> frozenset[Meaning]:
    return frozenset(split_meanings(category, split))


def describe(grid: np.ndarray, split: str, rng: np.random.Generator) -> Meaning | None:
    """Return a random meaning of the split that is true of a scene, or None if twenty attempts find none."""
    objects = [decode_kind(value) for value in grid[grid > 0]]
    for _ in range(20):
        apart = len(objects) <= 2 and rng.random() < 0.7
        order = rng.permutation(len(objects))
        sorts: dict[int, list[tuple[int, int, int]]] = {}
        for place in order:
            sorts.setdefault(int(place) if apart else objects[place][0], []).append(objects[place])
        described = len(sorts) == len(objects)  # prompts about numbers name shapes only
        groups = []
        for alike in sorts.values():
            shape, color, texture = alike[0]
            colored, textured = described and rng.random() < 0.5, described and rng.random() < 0.4
            groups.append(
                Group(
                    len(alike), SHAPES[shape], COLOR_NAMES[color] if colored else None, TEXTURES[texture] if textured else None
                )
            )
        relation = None
        if len(groups) == 2 and apart and rng.random() < 0.8:
            relation = RELATIONS[rng.integers(len(RELATIONS))]
        meaning = Meaning(category_of(tuple(groups), relation), tuple(groups), relation)
        if meaning in _members(meaning.category, split) and oracle.matches(meaning, grid):
            return meaning
    return None


def sample_places(grid: np.ndarray, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return for each of a scene's two objects a phrase that fits it alone, and where it is from the other.

    "red star": "left above"; "same" on an axis on which both are equal. The list is empty if the scene does not have two
    objects, and an object whose phrase also fits the other is left out.
    """
    flat = grid.ravel()
    cells = rng.permutation(np.flatnonzero(flat))
    if len(cells) != 2:
        return []
    places = []
    for cell, other in (cells, cells[::-1]):
        shape, color, texture = decode_kind(flat[cell])
        named = rng.random(2) < 0.5
        group = Group(1, SHAPES[shape], COLOR_NAMES[color] if named[0] else None, TEXTURES[texture] if named[1] else None)
        if not group.fits(flat[other]):
            (row, column), (y, x) = divmod(int(cell), GRID), divmod(int(other), GRID)
            across = "left" if column < x else "right" if column > x else "same"
            down = "above" if row < y else "below" if row > y else "same"
            places.append((group.phrase().split(" ", 1)[1], f"{across} {down}"))
    return places


def sample_questions(rng: np.random.Generator, split: str, count: int, simple: float = 0.0) -> list[Judged]:
    """Return `count` questions about one scene, with the oracle's answers.

    The scene shows a random meaning of the split, in seven of ten cases with one or two random errors like those of a model
    that draws. The first question asks for that meaning, and a third of all questions ask for other true descriptions. Of the
    rest, six in seven change one thing in one of these meanings, as often as HARDNESS says and half of the relations to their
    opposite. One in seven asks for another meaning.
    """
    meaning = sample_meaning(rng, split, simple)
    grid = sample_scene(meaning, rng)
    for _ in range(rng.choice(3, p=(0.3, 0.4, 0.3))):
        grid = perturb_scene(grid, meaning, rng)
    asked = [Judged(meaning, grid, oracle.matches(meaning, grid))]
    for _ in range(count // 3):
        true = describe(grid, split, rng)
        if true:
            asked.append(Judged(true, grid, True))
    known = [pair.meaning for pair in asked]
    places = {kind: [(m, which) for m in known for name, which in changes(m) if name == kind] for kind in ERRORS}
    kinds = [kind for kind in ERRORS for _ in range(HARDNESS[kind]) if places[kind]]
    pool = split_meanings(meaning.category, split)
    while len(asked) < count:
        if rng.integers(7) == 0:
            other, kind = pool[rng.integers(len(pool))], ""
        else:
            kind = kinds[rng.integers(len(kinds))]
            original, which = places[kind][rng.integers(len(places[kind]))]
            other = changed(original, kind, which, rng)
            if kind == "relation" and original.relation and rng.random() < 0.5:
                other = replace(original, relation=INVERSE[original.relation])
        if other.split() == split:
            asked.append(Judged(other, grid, oracle.matches(other, grid), kind))
    return asked
