"""Text files as a suite: one prompt on each line, and the file's name is the category (the layout of T2I-CompBench++)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.suites.base import PromptRow, PromptSource, Suite
from stages.suites.files import text_lines


class TextPrompts(PromptSource):
    source: Literal["text"]
    files: Annotated[list[str], Field(min_length=1)] = Field(
        description="Text files with one prompt on each line. color_train.txt and color_val.txt are of category color."
    )


def category_of(path: Path) -> str:
    """Return the file's name without its ending and without _train or _val."""
    stem = path.stem
    for suffix in ("_train", "_val"):
        stem = stem.removesuffix(suffix)
    return stem


def rows(settings: TextPrompts) -> list[PromptRow]:
    """Return the prompts of all files, in order."""
    return [
        {"prompt": prompt, "category": category_of(Path(name)), "split": "text"}
        for name in settings.files
        for prompt in text_lines(Path(name))
    ]


TEXT = Suite(TextPrompts, rows, files=lambda settings: settings.files)
