"""Test a judge on Science-T2I's own pairs of images: does it grade the explicit image above the superficial one?

    python -m stages.tools.science_choice --config mine.yaml --judge science --files data/science-t2i/*.parquet

Both images of a row are judged for its implicit prompt; a judge of kind sci-score then repeats what eval/eval_vlm.py of
Jialuo-Li/Science-T2I (at 024e5dd) measures, so its accuracy says whether the checkpoint is the right one. Equal grades count as
wrong. Pairs without a readable grade are counted apart.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.judges import judge_kind
from stages.judges.base import Item, Judge

IMAGES = ("explicit_image", "superficial_image")
COLUMNS = ("implicit_prompt", "category", "law", *IMAGES)
PAIRS = 8  # that are in memory at a time; images of the benchmark have about a megabyte each


def read_pairs(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of a Parquet file of the benchmark, a few at a time. Raises UserError on another file."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if missing := [name for name in COLUMNS if name not in names]:
                raise UserError(f"{path}: the column {missing[0]} is missing; its columns are {', '.join(names)}")
            for batch in file.iter_batches(PAIRS, columns=list(COLUMNS)):
                yield batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason}); fetch it again, or check --files") from None


def picture(path: Path, images: list[dict[str, Any]] | None) -> np.ndarray:
    """Return the first image of a cell, uint8 `[height, width, 3]`. Raises UserError where there is none."""
    try:
        return np.asarray(Image.open(io.BytesIO((images or [])[0]["bytes"])).convert("RGB"))
    except (IndexError, KeyError, TypeError, OSError, SyntaxError) as error:
        raise UserError(f"{path}: an image is missing or broken ({error!r}); fetch the file again") from None


def choices(judge: Judge, path: Path, rows: list[dict[str, Any]]) -> list[bool | None]:
    """Return for each row whether the explicit image has the higher grade, or None where a grade is unreadable."""
    items = []
    for row in rows:
        metadata = json.dumps({"implicit_prompt": row["implicit_prompt"]})
        prompt = {"prompt": row["implicit_prompt"], "category": row["category"], "metadata": metadata}
        items += [Item(name, prompt, picture(path, row[name])) for name in IMAGES]
    grades = [verdict.grade for verdict in judge(items)]
    return [
        None if first is None or second is None else first > second
        for first, second in zip(grades[::2], grades[1::2], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="one file, or several laid over each other")
    parser.add_argument("--judge", required=True, help="a name from the section judges")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="Parquet files of Science-T2I-S or -C")
    arguments = parser.parse_args()
    try:
        settings = load(*arguments.config).judge(arguments.judge)
    except ValueError as error:
        raise UserError(f"--judge {arguments.judge}: {error}") from None
    judge = judge_kind(settings.kind).open(settings)
    found: dict[str, list[bool | None]] = defaultdict(list)
    for path in arguments.files:
        for rows in read_pairs(path):
            for row, right in zip(rows, choices(judge, path, rows), strict=True):
                for group in ("overall", f"category {row['category']}", f"law {row['law']}"):
                    found[group].append(right)
    for group, rights in found.items():
        read = [right for right in rights if right is not None]
        accuracy = f"{100 * sum(read) / len(read):.2f} %" if read else "none"
        unread = f", {len(rights) - len(read)} unreadable" if len(read) < len(rights) else ""
        print(f"{group}: {accuracy} of {len(read)} pairs right{unread}")


if __name__ == "__main__":
    run_stage(main)
