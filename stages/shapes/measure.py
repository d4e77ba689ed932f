"""Measure how well a tiny model draws and judges in the shapes world.

    python -m stages.shapes.measure --checkpoint models/tiny-janus
    python -m stages.shapes.measure --family show_o --checkpoint models/tiny-show-o --guidance-scale 0 --sampling '{"steps": 8}'

The command prints a line of JSON for each seed and, with --tables, the tables of the model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.settings import Model
from stages.families import FAMILIES, describe, open_family
from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, ERRORS, SPLITS, Meaning
from stages.shapes.sampling import minimal_pairs, sample_meaning
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import QUESTION
from stages.tools.rates import placements


def measure(family: Any, split: str, prompts: int, seed: int, sampling: Any) -> dict[str, float]:
    """Return how well the model draws and judges on random prompts of a split, the same number in each category.

    family: a loaded family. sampling: its sampling settings.

    gen: images that match their prompt according to the oracle, in percent. non: images that the model itself rejects.
    own: accuracy of the model's judgements of its own images. These three also by category, as in "gen color".
    auc <kind>: area under the ROC curve of p_yes on minimal pairs: scenes with their prompt, and with the prompt changed in one
    thing of that kind. calibration: expected calibration error of p_yes on its own images, in ten bins, from 0 to 1.
    """
    rng = np.random.default_rng(seed)
    meanings = [
        sample_meaning(rng, split, category=category) for category in CATEGORIES for _ in range(prompts // len(CATEGORIES))
    ]
    images = []
    for start in range(0, len(meanings), 128):
        part = meanings[start : start + 128]
        seeds = rng.integers(1 << 62, size=len(part))
        drawn = family.generate([m.prompt() for m in part], seeds, sampling).images
        images.append(drawn)
    pictures = np.concatenate(images)
    truth = np.array([oracle.matches(m, g) for m, g in zip(meanings, oracle.read(pictures), strict=True)])
    p_yes = ask(family, pictures, meanings)
    own = p_yes > 0.5
    category = np.array([meaning.category for meaning in meanings])
    figures: dict[str, float] = {}
    for name, rows in [("", category != ""), *((" " + name, category == name) for name in CATEGORIES)]:
        figures["gen" + name] = 100 * float(truth[rows].mean())
        figures["non" + name] = 100 * float((~own[rows]).mean())
        figures["own" + name] = 100 * float((own == truth)[rows].mean())
    bins = np.minimum((10 * p_yes).astype(int), 9)
    figures["calibration"] = float(sum(abs((p_yes - truth)[bins == k].sum()) for k in range(10)) / len(truth))
    for kind in ERRORS:
        pairs = minimal_pairs(rng, split, kind, prompts // len(CATEGORIES))
        scenes = render(np.stack([pair.grid for _, pair in pairs]))
        right = ask(family, scenes, [right for right, _ in pairs])
        wrong = ask(family, scenes, [pair.meaning for _, pair in pairs])
        figures["auc " + kind] = float(placements(right, wrong)[0].mean())
    return figures


def ask(family: Any, images: np.ndarray, meanings: list[Meaning]) -> np.ndarray:
    """Return p_yes of the images, uint8 `[n, 64, 64, 3]`, with the prompts of the meanings, float64 `[n]`."""
    questions = [QUESTION.format(prompt=meaning.prompt()) for meaning in meanings]
    places = range(0, len(questions), 128)
    return np.concatenate([family.p_yes(images[i : i + 128], questions[i : i + 128])[0] for i in places])


def spread(found: list[dict[str, float]], name: str, digits: int) -> str:
    """Return the mean and, with several seeds, the range of a figure: "43.6 (40.8 to 45.3)"."""
    values = [figures[name] for figures in found]
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def tables(found: list[dict[str, float]]) -> str:
    """Return the tables of the model card in Markdown: rates in percent by category, and areas by kind of error."""
    lines = ["| category | draws right | refuses its own drawings | judges its own drawings right |", "|---|---|---|---|"]
    for category in ("", *CATEGORIES):
        rates = " | ".join(spread(found, f"{name} {category}".strip(), 1) for name in ("gen", "non", "own"))
        lines.append(f"| {category or 'all'} | {rates} |")
    lines += ["", f"Calibration error: {spread(found, 'calibration', 3)}", ""]
    lines += ["| kind of error in minimal pairs | area under the ROC curve of p(yes) |", "|---|---|"]
    lines += [f"| {kind} | {spread(found, f'auc {kind}', 3)} |" for kind in ERRORS]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="janus")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/tiny-janus"))
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--sampling", type=json.loads, default={}, help="other sampling settings of the family, as JSON")
    parser.add_argument("--tables", action="store_true", help="also print tables of the mean and the range over the seeds")
    arguments = parser.parse_args()
    model = Model(family=arguments.family, checkpoint=str(arguments.checkpoint), device="cpu", dtype="float32")
    family = open_family(model, None, "draw")
    sampling = describe(arguments.family).sampling(guidance_scale=arguments.guidance_scale, **arguments.sampling)
    found = []
    for seed in range(arguments.seeds):
        figures = measure(family, arguments.split, arguments.prompts, seed, sampling)
        found.append(figures)
        settings = {"split": arguments.split, "guidance_scale": arguments.guidance_scale, **arguments.sampling, "seed": seed}
        print(json.dumps(settings | {name: round(value, 3) for name, value in figures.items()}), flush=True)
    if arguments.tables:
        print(tables(found))


if __name__ == "__main__":
    main()
