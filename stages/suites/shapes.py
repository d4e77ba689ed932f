"""The shapes world as a suite: prompts of a split of its grammar (stages/shapes/grammar.py)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.suites.base import PromptRow, PromptSource, Suite


class ShapesPrompts(PromptSource):
    source: Literal["shapes"]
    split: Literal["post-training", "validation", "test"] = Field(
        default="post-training",
        description="The split of the grammar. Training prompts come from post-training. Settings are chosen on validation, "
        "and test is measured with final settings only.",
    )
    categories: list[str] = Field(default=[], description="Take only these categories. Empty takes all.")


def rows(settings: ShapesPrompts) -> list[PromptRow]:
    """Return every prompt of the split, category by category."""
    from stages.shapes.grammar import CATEGORIES, split_meanings

    unknown = [name for name in settings.categories if name not in CATEGORIES]
    if unknown:
        raise UserError(f"categories: {unknown[0]!r} is no category of the shapes world; known: {', '.join(CATEGORIES)}")
    return [
        {
            "prompt": meaning.prompt(),
            "category": category,
            "split": settings.split,
            "metadata": meaning.to_json(),
        }
        for category in settings.categories or CATEGORIES
        for meaning in split_meanings(category, settings.split)
    ]


SHAPES = Suite(ShapesPrompts, rows)
