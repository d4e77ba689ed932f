"""Science-T2I as a suite, from the benchmark's Parquet files or from JSON with the same columns.

Each row has three prompts: the implicit one needs knowledge (a laptop without electricity), the explicit one says what it
implies (a dark screen), and the superficial one says what a careless reader would draw (a lit screen). The judge sci-score
scores an image against the implicit prompt, whichever of them it was drawn from. Source: arXiv 2504.13129 and the data sets
Jialuo21/Science-T2I-S and Science-T2I-C.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from stages.common.errors import UserError
from stages.suites.base import PromptRow, PromptSource, Suite
from stages.suites.files import LONGEST, read_text

PROMPTS = ("implicit_prompt", "explicit_prompt", "superficial_prompt")
NEEDED = (*PROMPTS, "category")
# Kept for judges where they are there: the law of nature, and how many points a person gives to scene and reality.
FURTHER = ("law", "scene_scoring", "real_scoring")
DIFFICULTY = "hard"  # of every category, in the audit of arXiv 2507.16663


class SciencePrompts(PromptSource):
    source: Literal["science-t2i"]
    files: Annotated[list[str], Field(min_length=1)] = Field(
        description="The benchmark's files: Parquet, JSON with a list of objects, or JSON Lines, with the columns "
        "implicit_prompt, explicit_prompt, superficial_prompt and category. Columns with images are not read."
    )
    drawn: Literal["implicit", "explicit", "superficial"] = Field(
        default="implicit",
        description="From which prompt the images are drawn. They are scored against the implicit prompt in any case.",
    )


def rows(settings: SciencePrompts) -> list[PromptRow]:
    """Return one prompt for each row of all files, in order. Raises UserError on a missing or broken file or column."""
    return [prompt_row(fields, settings.drawn) for name in settings.files for fields in table_rows(Path(name))]


def prompt_row(fields: dict[str, str], drawn: str) -> PromptRow:
    """Return the prompt that is drawn, with all three prompts and the further columns as metadata."""
    known = {name: fields[name] for name in (*PROMPTS, *FURTHER) if fields.get(name)}
    return {
        "prompt": fields[f"{drawn}_prompt"],
        "category": fields["category"].lower(),
        "difficulty": DIFFICULTY,
        "metadata": json.dumps(known, sort_keys=True, ensure_ascii=False),
    }


def table_rows(path: Path) -> list[dict[str, str]]:
    """Return the wanted columns of a file as text with single spaces. Raises UserError with the file and the row."""
    found = []
    for where, fields in parquet_rows(path) if path.suffix == ".parquet" else json_rows(path):
        for name in NEEDED:
            value = fields.get(name)
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{path}: {where} has no text in the column {name}; fetch the file again, or correct it")
            if len(value) > LONGEST:
                raise UserError(f"{path}: {where} has {len(value)} characters in {name}; at most {LONGEST} are allowed")
        texts = {name: fields.get(name) for name in (*NEEDED, *FURTHER)}
        found.append({name: " ".join(text.split()) for name, text in texts.items() if isinstance(text, str)})
    if not found:
        raise UserError(f"{path}: holds no prompt; give the files of Science-T2I, such as data/test-00000-of-00001.parquet")
    return found


def parquet_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Return the place and the fields of each row. Only the columns of text are read: those of images have a gigabyte."""
    try:
        there = pq.read_schema(path).names
        if missing := [name for name in NEEDED if name not in there]:
            raise UserError(f"{path}: the column {missing[0]} is missing; its columns are {', '.join(there)}")
        table = pq.read_table(path, columns=[name for name in (*NEEDED, *FURTHER) if name in there])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; fetch the files of Science-T2I and set files of these prompts") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason}); fetch it again") from None
    return [(f"row {number}", fields) for number, fields in enumerate(table.to_pylist(), 1)]


def json_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Return the place and the fields of each object of a JSON list, or of each line of JSON Lines."""
    text = read_text(path)
    whole = text.lstrip().startswith("[")
    parts = [("the file", text)] if whole else [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
    found: list[tuple[str, dict[str, Any]]] = []
    for where, part in parts:
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except ValueError as error:
            raise UserError(f"{path}: {where} is not JSON ({error}); give Parquet, a JSON list or JSON Lines") from None
        objects = [(f"object {n}", one) for n, one in enumerate(value, 1)] if whole else [(where, value)]
        for place, fields in objects:
            if not isinstance(fields, dict):
                raise UserError(f"{path}: {place} is not an object with the columns {', '.join(NEEDED)}; correct it")
            found.append((place, fields))
    return found


SCIENCE_T2I = Suite(SciencePrompts, rows, files=lambda settings: settings.files)
