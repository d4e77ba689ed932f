"""What the tiny model can do, and the labelled pairs that it learns to judge from and is measured on.

    python -m stages.shapes.measure --checkpoint models/tiny-janus

prints a line of JSON for each split and seed: the figures of the model card.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stages.families.base import Sampling
from stages.families.janus import Janus
from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, Meaning, perturb_meaning, perturb_scene, sample_scene, split_meanings
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import QUESTION


@dataclass
class Judged:
    meaning: Meaning
    grid: np.ndarray
    label: bool


@cache
def simple_meanings(split: str) -> tuple[Meaning, ...]:
    """One group of one or two objects: few of all prompts, but words and pictures are tied together on them."""
    return tuple(
        meaning
        for category in CATEGORIES
        for meaning in split_meanings(category, split)
        if len(meaning.groups) == 1 and meaning.groups[0].count <= 2
    )


def sample_meaning(rng: np.random.Generator, split: str, simple: float = 0.0) -> Meaning:
    """A prompt of the split, categories evenly; with probability `simple` one of the simple prompts."""
    if rng.random() < simple:
        pool = simple_meanings(split)
    else:
        pool = split_meanings(CATEGORIES[rng.integers(len(CATEGORIES))], split)
    return pool[rng.integers(len(pool))]


def sample_judged(rng: np.random.Generator, split: str, hard: float = 0.8, simple: float = 0.0) -> Judged:
    """One labelled pair, matching with probability one half; every caption is of the given split."""
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
        elif rng.random() < 0.25:  # a changed scene that still matches: a change alone must not mean "no"
            grid = perturb_scene(grid, rng)
        if oracle.matches(meaning, grid) == wanted:
            return Judged(meaning, grid, wanted)


def measure(family: Janus, split: str, prompts: int, seed: int, guidance_scale: float = 1.0) -> dict[str, float]:
    """gen: right drawings by the oracle; non: own drawings refused; judge accuracy on balanced hard negatives and on the
    model's own drawings. Percent, of prompts drawn evenly over the categories."""
    rng = np.random.default_rng(seed)
    meanings = [sample_meaning(rng, split) for _ in range(prompts)]
    images, truth = [], []
    for start in range(0, prompts, 128):
        part = meanings[start : start + 128]
        seeds = rng.integers(1 << 62, size=len(part))
        drawn = family.generate([m.prompt() for m in part], seeds, Sampling(guidance_scale)).images
        images.append(drawn)
        truth += [oracle.matches(m, g) for m, g in zip(part, oracle.read(drawn), strict=True)]
    judged = [sample_judged(rng, split, hard=1.0) for _ in range(prompts)]

    def say(pictures: np.ndarray, about: list[Meaning]) -> np.ndarray:
        return np.concatenate(
            [
                family.p_yes(pictures[i : i + 128], [QUESTION.format(prompt=m.prompt()) for m in about[i : i + 128]])[0]
                for i in range(0, len(about), 128)
            ]
        )

    hard = say(render(np.stack([pair.grid for pair in judged])), [pair.meaning for pair in judged]) > 0.5
    own = say(np.concatenate(images), meanings) > 0.5
    return {
        "gen": 100 * float(np.mean(truth)),
        "non": 100 * float(np.mean(~own)),
        "judge_hard": 100 * float(np.mean(hard == [pair.label for pair in judged])),
        "judge_own": 100 * float(np.mean(own == truth)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("models/tiny-janus"))
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    arguments = parser.parse_args()
    family = Janus.load(arguments.checkpoint)
    for split in ("post-training", "held-out"):
        for seed in range(arguments.seeds):
            figures = measure(family, split, arguments.prompts, seed, arguments.guidance_scale)
            rounded = {name: round(value, 1) for name, value in figures.items()}
            print(json.dumps({"split": split, "seed": seed, **rounded}), flush=True)


if __name__ == "__main__":
    main()
