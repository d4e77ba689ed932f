"""GenEval's prompts as a suite, from its metadata file.

Which judges suit it: geneval-hf, an object detector with GenEval's rules, or a table with the verdicts of upstream's own
detector. Both are configured in the section judges, because they need files; docs/evaluation.md shows how.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.judges.geneval_rules import read_metadata
from stages.suites.base import PromptRow, PromptSource, Suite
from stages.suites.files import geneval_rows


class GenevalPrompts(PromptSource):
    source: Literal["geneval"]
    files: Annotated[list[str], Field(min_length=1)] = Field(
        description="GenEval's metadata (evaluation_metadata.jsonl), one JSON object with tag and prompt on each line."
    )


def rows(settings: GenevalPrompts) -> list[PromptRow]:
    """Return the prompts of all files, in order. Raises UserError where a prompt does not say what its image must show."""
    found: list[PromptRow] = []
    for name in settings.files:
        for row in geneval_rows(Path(name)):
            try:
                read_metadata(row["metadata"])
            except ValueError as error:
                raise UserError(
                    f"{name}: prompt {row['prompt']!r}: {error}; correct this line, or fetch GenEval's metadata again"
                ) from None
            row["split"] = "geneval"
            found.append(row)
    return found


GENEVAL = Suite(GenevalPrompts, rows, files=lambda settings: settings.files)
