"""The review's sample: which images people judge, so that the share of right ones is known to a wanted interval.

Strata are the subtasks of each model. As many images are taken from each as the wanted interval needs if half of the images
were right, which is the worst case; a stratum that is smaller is taken whole. Within a stratum, all prompts are drawn
before any of them is repeated, because images of one prompt are alike.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import shards
from stages.common.errors import UserError
from stages.common.seeds import hash_seed
from stages.pages.render import write_data, write_text
from stages.pages.run import TRAIN, Group, Run, read_columns
from stages.tools.intervals import Z

Row = dict[str, Any]
DRAWN = ("candidate_id", "prompt_id", "shard", "offset", "nbytes")
PIXELS = 112  # smaller pictures are shown enlarged without smoothing


@dataclass(frozen=True)
class Plan:
    """What people are asked about.

    set: the set of prompts, or None for the first benchmark. models: or None for base, baselines, arms and audited models.
    half_width: of the 95 % interval, as a share. by: whether the interval is wanted for each model over its subtasks, or for
    each subtask.
    """

    set: str | None = None
    models: list[str] | None = None
    half_width: float = 0.1
    by: str = "model"


def needed(sizes: Sequence[int], half_width: float) -> int:
    """Return the least number of images for each stratum with which the mean share over the strata is known well enough.

    sizes: how many images each stratum has. half_width: of the normal 95 % interval, for a share of one half and with the
    correction for finite populations.
    """
    for count in range(1, max(sizes) + 1):
        taken = [min(count, size) for size in sizes]
        variance = sum(
            0.25 / some * (size - some) / max(size - 1, 1) for some, size in zip(taken, sizes, strict=True)
        ) / len(sizes) ** 2  # fmt: skip
        if Z * math.sqrt(variance) <= half_width:
            return count
    return max(sizes)


def drawn(rows: list[Row], count: int, *seed: object) -> list[Row]:
    """Return `count` random rows. Prompts repeat only where there are fewer of them than rows."""
    generator = np.random.default_rng(hash_seed(*seed))
    shuffled = [rows[place] for place in generator.permutation(len(rows))]
    seen: dict[str, int] = {}
    turns = []
    for place, row in enumerate(shuffled):
        seen[row["prompt_id"]] = turn = seen.get(row["prompt_id"], -1) + 1
        turns.append((turn, place))
    return [shuffled[place] for _, place in sorted(turns)[:count]]


def choose(run: Run, plan: Plan) -> tuple[str, list[Group]] | None:
    """Return the set and the groups of a plan, None if nothing has been drawn. Raises UserError on unknown names."""
    sets = run.sets()
    benchmarks = [name for name in sets if name != TRAIN]
    name = plan.set or next(iter(benchmarks), None)
    if name is None:
        return None
    if name not in sets:
        raise UserError(f"--review-set {name}: nothing has been drawn for a set of this name; there is {', '.join(sets)}")
    groups = run.groups(name)
    wanted = plan.models or [group.name for group in groups if group.name in run.compared()]
    if unknown := sorted(set(wanted) - {group.name for group in groups}):
        known = ", ".join(group.name for group in groups)
        raise UserError(f"--review-models {unknown[0]}: has drawn nothing for {name}; the models are {known}")
    return name, [group for group in groups if group.name in wanted]


def sample(run: Run, name: str, groups: list[Group], plan: Plan) -> tuple[list[Row], list[str]]:
    """Return the images that are judged, each with model, subtask, prompt and size of its stratum, and the design in words."""
    prompts = read_columns([run.prompts(name)], "prompts", ("prompt_id", "prompt", "category"))
    known = {row["prompt_id"]: row for row in prompts.to_pylist()}
    found: list[Row] = []
    sizes = []
    for group in groups:
        strata: dict[str, list[Row]] = {}
        for row in read_columns(run.shards(group, "candidates"), "candidates", DRAWN).to_pylist():
            if row["prompt_id"] in known:
                strata.setdefault(known[row["prompt_id"]]["category"], []).append(row)
        together = needed([len(rows) for rows in strata.values()], plan.half_width) if strata else 0
        for category, rows in strata.items():
            count = together if plan.by == "model" else needed([len(rows)], plan.half_width)
            chosen = drawn(rows, count, run.config.seed, "review", name, group.name, category)
            place = {"model": group.name, "subtask": category, "images_of_stratum": len(rows), "group": group}
            found += [{**row, **place, "prompt": known[row["prompt_id"]]["prompt"]} for row in chosen]
            sizes.append(len(rows))
    wanted = "over its subtasks" if plan.by == "model" else "in each subtask"
    lines = [
        f"The share of right images of each model, {wanted}, will have a 95 % interval of at most ± {100 * plan.half_width:g} "
        "percentage points. The number is computed for a share of one half, where the interval is widest, and takes images as "
        "independent.",
        f"There are {len(sizes)} strata, the subtasks of each model, and {len(found)} of their {sum(sizes)} images are shown.",
        "Within a stratum, images are random, and a prompt is repeated only after all prompts. The sample depends on the run's "
        "seed.",
    ]
    return found, lines


def write(run: Run, out: Path, plan: Plan) -> Row | None:
    """Write the sample and its images, and return what the page says about it; None if nothing has been drawn.

    The page knows ids, prompts and images only. review/sample.csv, which it does not load, says where each image comes from.
    """
    chosen = choose(run, plan)
    if chosen is None:
        return None
    name, groups = chosen
    rows, lines = sample(run, name, groups, plan)
    shown, kept = [], []
    for row in sorted({row["candidate_id"]: row for row in rows}.values(), key=lambda row: row["candidate_id"]):
        folder = run.folder / row["group"].name / "candidates" / row["group"].images
        manifest = (folder / row["shard"]).with_suffix(".parquet")
        try:
            picture = shards.read_images(manifest, [row])[0]
        except UserError:  # its shard is gone or broken
            continue
        path = out / "images" / f"{row['candidate_id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(shards.png(picture))
        shown.append([row["candidate_id"], row["prompt"], int(max(picture.shape[:2]) <= PIXELS)])
        kept.append(row)
    if not shown:
        return None
    columns = ["candidate_id", "prompt_id", "model", "subtask", "images_of_stratum"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(out / "sample.csv", text.getvalue())
    write_data(out / "sample.js", "selfgap.sample", shown)
    identity = f"{hash_seed(*(name for name, *_ in shown)):016x}"
    return {"set": name, "count": len(shown), "sample": identity, "design": lines}
