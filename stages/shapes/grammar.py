"""The prompts of the shapes world: their grammar, their meanings, and the split that each belongs to.

A meaning (`Meaning`) is one or more groups of objects and, for two groups, possibly a spatial relation. An attribute that the
prompt does not mention is free; the number of objects is exact. The six categories follow T2I-CompBench in miniature. Prompts
that differ only in order ("a star and a circle", "a circle and a star") have the same canonical form, and the split is a
function of its hash. A prompt of another split is therefore never trained on in another wording.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache

import numpy as np

from stages.shapes.scenes import COLOR_NAMES, GRID, SHAPES, TEXTURES, decode_kind, encode_kind

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex")
SPLITS = ("pretraining", "post-training", "validation", "test")
# A prompt belongs to the first split whose bound exceeds its hash, a number from 0 to 255. The test split lies within what was
# the pretraining split in version 0.1, so no earlier version has measured any of its prompts.
BOUNDS = {"test": 52, "pretraining": 161, "post-training": 225, "validation": 256}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(INVERSE)
ERRORS = ("shape", "color", "texture", "number", "relation")


@dataclass(frozen=True, order=True)
class Group:
    """`count` objects with the same description. An attribute that is None is free; a prompt always names the shape."""

    count: int
    shape: str | None
    color: str | None = None
    texture: str | None = None

    def phrase(self) -> str:
        words = [NUMBERS[self.count], self.texture, self.color, self.shape]
        phrase = " ".join(word for word in words if word)
        if self.count > 1:
            return phrase + ("es" if self.shape == "cross" else "s")
        return phrase.replace("a o", "an o", 1) if phrase.startswith("a o") else phrase

    def fits(self, value: int) -> bool:
        shape, color, texture = decode_kind(value)
        return (
            self.shape in (None, SHAPES[shape])
            and self.color in (None, COLOR_NAMES[color])
            and self.texture in (None, TEXTURES[texture])
        )


@dataclass(frozen=True)
class Meaning:
    """The meaning of a prompt. `relation` holds between the first and the second group and requires exactly two groups."""

    category: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def prompt(self) -> str:
        phrases = [group.phrase() for group in self.groups]
        if self.relation:
            return f"{phrases[0]} {self.relation} {phrases[1]}"
        return " and ".join(phrases)

    def canonical(self) -> str:
        """Return a text that is the same for every prompt with this meaning."""
        groups, relation = self.groups, self.relation
        if relation in ("right of", "below"):
            groups, relation = groups[::-1], INVERSE[relation]
        phrases = [group.phrase() for group in groups]
        return f"{relation}:{phrases}" if relation else f"and:{sorted(phrases)}"

    def split(self) -> str:
        bucket = hashlib.sha256(self.canonical().encode()).digest()[0]
        return next(split for split, bound in BOUNDS.items() if bucket < bound)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def from_json(text: str) -> Meaning:
    """Return the meaning that `Meaning.to_json` wrote. Raises ValueError on any other text."""
    try:
        fields = json.loads(text)
        return Meaning(fields["category"], tuple(Group(**group) for group in fields["groups"]), fields["relation"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"metadata is not a shapes meaning: {text!r}") from error


def parse_prompt(text: str) -> Meaning:
    """Return the meaning of a prompt, the inverse of `Meaning.prompt`. Raises ValueError on a text that is no prompt.

    The meaning need not be one of `meanings`: any number of groups in the wording of the grammar has one. Upper and lower case
    and the amount of white space do not matter.
    """
    prompt = " ".join(text.lower().split())
    relation = next((name for name in RELATIONS if f" {name} " in prompt), None)
    groups = tuple(_parse_phrase(phrase) for phrase in prompt.split(f" {relation or 'and'} "))
    meaning = Meaning(category_of(groups, relation), groups, relation)
    if meaning.prompt() != prompt or (relation and len(groups) != 2):
        raise ValueError(f"not in the wording of the grammar: {text!r}")
    return meaning


def _parse_phrase(phrase: str) -> Group:
    number, *words = phrase.split() or [""]
    count = next((count for count, name in NUMBERS.items() if name == number), 1)
    texture = words.pop(0) if words and words[0] in TEXTURES else None
    color = words.pop(0) if words and words[0] in COLOR_NAMES else None
    shape = next((shape for shape in SHAPES if words in ([shape], [shape + "s"], [shape + "es"])), None)
    if shape is None:
        raise ValueError(f"not a phrase of the grammar: {phrase!r}")
    return Group(count, shape, color, texture)


def category_of(groups: tuple[Group, ...], relation: str | None) -> str:
    """Return the category of the meanings with such groups."""
    if relation:
        return "complex" if any(group.texture for group in groups) else "spatial"
    if any(group.count > 1 for group in groups):
        return "numeracy"
    if len(groups) > 1 and any(group.texture and group.color for group in groups):
        return "complex"
    return next((name for name in ("texture", "color") if any(getattr(group, name) for group in groups)), "shape")


def _singles(colors: bool, textures: bool) -> list[Group]:
    return [
        Group(1, shape, color, texture)
        for shape in SHAPES
        for color in (COLOR_NAMES if colors else (None,))
        for texture in (TEXTURES if textures else (None,))
    ]


@cache
def meanings(category: str) -> tuple[Meaning, ...]:
    """Return every meaning of a category, in a fixed order. Raises KeyError on an unknown category."""
    bare, colored, textured = _singles(False, False), _singles(True, False), _singles(False, True)
    full = _singles(True, True)
    related = [(a, b) for a, b in itertools.permutations(bare + colored, 2)]
    builders: dict[str, Callable[[], list[tuple[Group, ...]]]] = {
        "color": lambda: [(g,) for g in colored] + list(itertools.permutations(colored, 2)),
        "texture": lambda: [
            *((g,) for g in textured + full),
            *itertools.permutations(textured, 2),
            *(pair for a in textured for b in bare for pair in ((a, b), (b, a)) if a.shape != b.shape),
        ],
        "shape": lambda: [groups for n in (1, 2, 3, 4) for groups in itertools.permutations(bare, n)],
        "spatial": list,
        "numeracy": lambda: [
            *((Group(n, group.shape),) for n in (2, 3, 4, 5) for group in bare),
            *(
                tuple(Group(n, group.shape) for n, group in zip(counts, groups, strict=True))
                for size in (2, 3)
                for groups in itertools.permutations(bare, size)
                for counts in itertools.product((1, 2, 3, 4), repeat=size)
                if size < sum(counts) <= 6
            ),
        ],
        "complex": lambda: [(a, b) for a in full for b in colored if a.shape != b.shape or a.color != b.color],
    }
    plain = [Meaning(category, groups) for groups in builders[category]()]
    if category == "spatial":
        plain = [Meaning(category, pair, relation) for pair in related for relation in RELATIONS]
    elif category == "complex":
        plain += [Meaning(category, m.groups, relation) for m in plain for relation in RELATIONS]
    return tuple(plain)


@cache
def split_meanings(category: str, split: str) -> tuple[Meaning, ...]:
    return tuple(meaning for meaning in meanings(category) if meaning.split() == split)


def _pick(names: tuple[str, ...], name: str | None, rng: np.random.Generator) -> int:
    return int(rng.integers(len(names))) if name is None else names.index(name)


def sample_scene(meaning: Meaning, rng: np.random.Generator) -> np.ndarray:
    """Return a random scene that the prompt describes, int16 `[4, 4]`. Free attributes and positions are drawn uniformly."""
    values = [
        encode_kind(SHAPES.index(group.shape), _pick(COLOR_NAMES, group.color, rng), _pick(TEXTURES, group.texture, rng))
        for group in meaning.groups
        for _ in range(group.count)
    ]
    while True:
        cells = rng.permutation(GRID * GRID)[: len(values)]
        if meaning.relation is None or holds(meaning.relation, int(cells[0]), int(cells[1])):
            break
    grid = np.zeros(GRID * GRID, dtype=np.int16)
    grid[cells] = values
    return grid.reshape(GRID, GRID)


def holds(relation: str, first: int, second: int) -> bool:
    """Return whether cell `first` is in that relation to cell `second`.

    Both are row-major indices. The relation is strict and concerns only its own axis.
    """
    if relation in ("left of", "right of"):
        a, b = first % GRID, second % GRID
    else:
        a, b = first // GRID, second // GRID
    return a < b if relation in ("left of", "above") else a > b


def changes(meaning: Meaning) -> list[tuple[str, int]]:
    """Return the changes that `changed` can make to a meaning: the kind of error, and the index of the group it concerns."""
    return [
        *[
            (kind, i)
            for i, group in enumerate(meaning.groups)
            for kind in ("shape", "color", "texture")
            if getattr(group, kind)
        ],
        *[("number", i) for i in range(len(meaning.groups)) if meaning.category == "numeracy"],
        *([("relation", 0)] if meaning.relation else []),
    ]


def changed(meaning: Meaning, kind: str, which: int, rng: np.random.Generator) -> Meaning:
    """Return the meaning with one random change of a kind in ERRORS, as the caption of a hard negative.

    The result may still describe a scene of the original meaning (free attributes, symmetric pairs, relations on two axes) and
    may belong to another split; the caller checks both.
    """
    if kind == "relation":
        others = [relation for relation in RELATIONS if relation != meaning.relation]
        return replace(meaning, relation=others[rng.integers(len(others))])
    groups, group = list(meaning.groups), meaning.groups[which]
    name = "count" if kind == "number" else kind
    options: dict[str, tuple] = {
        "shape": SHAPES,
        "color": COLOR_NAMES,
        "texture": TEXTURES,
        "count": tuple(n for n in NUMBERS if abs(n - group.count) == 1),
    }
    choices = [value for value in options[name] if value != getattr(group, name)]
    groups[which] = replace(group, **{name: choices[rng.integers(len(choices))]})
    return replace(meaning, groups=tuple(groups))


def perturb_scene(grid: np.ndarray, meaning: Meaning, rng: np.random.Generator) -> np.ndarray:
    """Return a scene of a meaning with one random change, like the errors of an image generator.

    In two of three cases an attribute that the meaning mentions changes: one object gets another value, or two objects exchange
    theirs. Otherwise an object is removed, duplicated or moved.
    """
    flat = grid.flatten()
    full, empty = rng.permutation(np.flatnonzero(flat)), np.flatnonzero(flat == 0)
    one, other = full[0], full[-1]
    slip = int(rng.integers(9))
    if slip < 6:
        mentioned = [i for i, name in enumerate(("shape", "color", "texture")) if any(getattr(g, name) for g in meaning.groups)]
        attribute = mentioned[rng.integers(len(mentioned))]
        first, second = list(decode_kind(flat[one])), list(decode_kind(flat[other]))
        if slip < 3 and first[attribute] != second[attribute]:
            first[attribute], second[attribute] = second[attribute], first[attribute]
            flat[other] = encode_kind(*second)
        else:
            size = (len(SHAPES), len(COLOR_NAMES), len(TEXTURES))[attribute]
            first[attribute] = int(first[attribute] + rng.integers(1, size)) % size
        flat[one] = encode_kind(*first)
    elif slip == 6 and len(full) > 1:
        flat[one] = 0
    else:
        flat[empty[rng.integers(len(empty))]] = flat[one]
        if slip == 8:
            flat[one] = 0
    return flat.reshape(grid.shape)
