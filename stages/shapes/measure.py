"""Measure how well the tiny model draws and judges in the shapes world.

    python -m stages.shapes.measure --checkpoint models/tiny-janus

The command prints a line of JSON for each split and seed. These are the figures of the model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from stages.families.janus import JanusSampling
from stages.families.janus.family import Janus
from stages.shapes import oracle
from stages.shapes.grammar import Meaning
from stages.shapes.sampling import sample_judged, sample_meaning
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import QUESTION


def measure(family: Janus, split: str, prompts: int, seed: int, guidance_scale: float = 1.0) -> dict[str, float]:
    """Return the model's metrics in percent, on random prompts that are uniform over the categories.

    gen: images that match their prompt according to the oracle. non: images that the model itself rejects.
    judge_hard, judge_own: accuracy of the model's judgements, on matching pairs and hard negatives and on its own images.
    """
    rng = np.random.default_rng(seed)
    meanings = [sample_meaning(rng, split) for _ in range(prompts)]
    images, truth = [], []
    for start in range(0, prompts, 128):
        part = meanings[start : start + 128]
        seeds = rng.integers(1 << 62, size=len(part))
        drawn = family.generate([m.prompt() for m in part], seeds, JanusSampling(guidance_scale=guidance_scale)).images
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
