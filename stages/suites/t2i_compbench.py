"""T2I-CompBench++ as a suite, from the folder of its prompt files. Its scores are judges: see docs/evaluation.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.judges.compbench_rules import complex_kind, counted_nouns, spatial_claim
from stages.suites.base import PromptRow, PromptSource, Suite
from stages.suites.files import text_lines
from stages.suites.phrases import complex_claim

Category = Literal["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
CATEGORIES: list[Category] = ["color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"]
# The audit's strata of arXiv 2507.16663, which leaves the other categories out.
DIFFICULTY = {"texture": "medium", "spatial": "medium", "complex": "medium"}


class CompbenchPrompts(PromptSource):
    source: Literal["t2i-compbench"]
    folder: str = Field(description="The folder with the benchmark's prompt files, such as color_val.txt (examples/dataset).")
    split: Literal["val", "train"] = Field(default="val", description="Which files are read: 300 or 700 prompts a category.")
    categories: Annotated[list[Category], Field(min_length=1)] = Field(
        default=CATEGORIES, description="The categories to read, in this order."
    )


def files(settings: CompbenchPrompts) -> list[str]:
    """Return the prompt files of the categories, in order."""
    return [str(Path(settings.folder) / f"{category}_{settings.split}.txt") for category in settings.categories]


def metadata(category: str, prompt: str) -> dict[str, object]:
    """Return what a prompt's judge needs: first, relation and second; counts as [[number, singular]]; the kind of complex.

    It is empty where the prompt does not follow its category's template; its images then cannot be judged by detections.
    """
    if category in ("spatial", "3d_spatial"):
        claim = spatial_claim(prompt)
        return asdict(claim) if claim else {}
    if category == "numeracy":
        return {"counts": counted_nouns(prompt)}
    if category == "complex":
        kind = complex_kind(prompt)
        claim = None if kind == "action" else complex_claim(prompt)
        return {"kind": kind} | (asdict(claim) if claim else {})
    return {}


def rows(settings: CompbenchPrompts) -> list[PromptRow]:
    """Return the prompts of all categories, in order. Raises UserError on a missing or broken file."""
    if not Path(settings.folder).is_dir():
        raise UserError(f"{settings.folder}: no such folder; set folder to examples/dataset of T2I-CompBench")
    found: list[PromptRow] = []
    for category, name in zip(settings.categories, files(settings), strict=True):
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file; copy it from examples/dataset of T2I-CompBench, or change categories")
        for prompt in text_lines(Path(name)):
            row: PromptRow = {"prompt": prompt, "category": category, "split": settings.split}
            if known := metadata(category, prompt):
                row["metadata"] = json.dumps(known, sort_keys=True)
            if category in DIFFICULTY:
                row["difficulty"] = DIFFICULTY[category]
            found.append(row)
    return found


T2I_COMPBENCH = Suite(CompbenchPrompts, rows, files=files)
