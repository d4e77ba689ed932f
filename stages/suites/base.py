"""The interface of a suite: where prompts come from, and how a benchmark made of them is scored.

A suite is a module in this folder with a `Suite`, registered by name in `stages/suites/__init__.py`. Training prompts and
the prompts of a benchmark are both taken from suites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from pydantic import Field, model_validator

from stages.common.settings import Positive, Section


class PromptSource(Section):
    """The settings that all suites share. A suite adds its own and narrows `source` to its name with Literal."""

    source: str
    exclude: list[str] = Field(
        default=[],
        description="Files whose prompts are dropped from this set, for example the validation prompts of a benchmark. A "
        "file is a text file with one prompt a line, GenEval's metadata (.jsonl), or a prompt manifest (.parquet).",
    )
    count: Positive | None = Field(
        default=None,
        description="How many prompts to take, spread over the categories as evenly as their sizes allow. Empty takes all.",
    )

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, fields: Any) -> Any:
        """Drop keys without a value, so that a file laid over another one can take back a key of another suite."""
        return {key: value for key, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class PromptRow(TypedDict, total=False):
    """One prompt of a suite. `prompt` and `category` are always given.

    metadata: JSON text that the suite's judges need. difficulty: easy, medium or hard, where the benchmark defines it.
    split: the part of the suite that the prompt comes from.
    """

    prompt: str
    category: str
    metadata: str
    difficulty: str
    split: str


@dataclass(frozen=True)
class Suite:
    """settings: the suite's settings, a subclass of PromptSource.
    rows: from an instance of these settings to the prompts, in a fixed order. Raises UserError on bad files.
    files: from the settings to the files that `rows` reads, which the workflow watches.
    scorers: for each category, the name of the judge that measures generation (Gen.) there. Categories that are missing here
        are scored by the benchmark's judge.
    """

    settings: type[PromptSource]
    rows: Callable[[Any], list[PromptRow]]
    files: Callable[[Any], list[str]] = lambda settings: []
    scorers: Mapping[str, str] = field(default_factory=dict)
