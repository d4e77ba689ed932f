"""Some of GenEval's subtasks as a suite, from its metadata file, such as the three in the audit of arXiv 2507.16663.

The suite `geneval` takes all six. The judges are the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.suites.base import PromptRow, PromptSource, Suite
from stages.suites.geneval import GENEVAL


class GenevalSubtasks(PromptSource):
    source: Literal["geneval-subtasks"]
    files: Annotated[list[str], Field(min_length=1)] = Field(
        description="GenEval's metadata (evaluation_metadata.jsonl), one JSON object with tag and prompt on each line."
    )
    categories: Annotated[list[str], Field(min_length=1)] = Field(
        description="The tags of the subtasks to take: single_object, two_object, counting, colors, position, color_attr."
    )


def rows(settings: GenevalSubtasks) -> list[PromptRow]:
    """Return the prompts of the wanted subtasks, in the order of the files. Raises UserError on one without prompts."""
    found = GENEVAL.rows(settings)
    known = dict.fromkeys(row["category"] for row in found)
    if absent := [name for name in settings.categories if name not in known]:
        raise UserError(f"{settings.files[0]}: no prompt has the tag {absent[0]!r} of categories; there are {', '.join(known)}")
    return [row for row in found if row["category"] in settings.categories]


GENEVAL_SUBTASKS = Suite(GenevalSubtasks, rows, files=lambda settings: settings.files)
