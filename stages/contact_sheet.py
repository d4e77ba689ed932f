"""One picture to look at: candidates as they were judged and chosen, and the base model's drawings beside the trained ones.

    python -m stages.contact_sheet --config config.yaml --prompts train.parquet --candidates base/train/*.parquet \\
        --scores ... --pairs sft/pairs.parquet dpo/pairs.parquet --evaluation evaluation.parquet \\
        --arms base sft --drawn base/0000.parquet sft/0000.parquet --verdicts ... --out contact_sheet.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stages.common import manifests, shards
from stages.common.config import load
from stages.common.runtime import UserError, run_stage, whole_file

Row = dict[str, Any]
PICTURE, GAP, TEXT, LINE = 112, 10, 250, 22  # pixels: a picture's side, between pictures, the prompt's column, a line
INK, QUIET, GOOD, BAD, PAPER = "#1c1c1e", "#8e8e93", "#1a9850", "#d73027", "#ffffff"
VERDICTS = {True: ("matches", GOOD), False: ("does not match", BAD), None: ("not judged", None)}


def spread(rows: list[Row], count: int) -> list[Row]:
    """At most `count` rows, one category after the other."""
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    ordered = [pool[i] for i in range(len(rows)) for pool in by_category.values() if i < len(pool)]
    return ordered[:count]


class Sheet:
    """A page that grows downwards: headings, and rows of a prompt with its pictures."""

    def __init__(self, columns: int) -> None:
        self.width = 3 * GAP + TEXT + columns * (PICTURE + GAP)
        self.image = Image.new("RGB", (self.width, GAP), PAPER)
        self.font, self.bold = ImageFont.load_default(14), ImageFont.load_default(20)

    def _grow(self, height: int) -> tuple[ImageDraw.ImageDraw, int]:
        top = self.image.height
        grown = Image.new("RGB", (self.width, top + height), PAPER)
        grown.paste(self.image)
        self.image = grown
        return ImageDraw.Draw(grown), top

    def heading(self, title: str, columns: list[str]) -> None:
        draw, top = self._grow(40 + LINE)
        draw.text((GAP, top + 8), title, INK, self.bold)
        for i, name in enumerate(columns):
            draw.text((self._left(i), top + 38), name, QUIET, self.font)

    def _left(self, column: int) -> int:
        return 2 * GAP + TEXT + column * (PICTURE + GAP)

    def row(self, text: str, note: str, cells: list[tuple[Image.Image, str, str | None]]) -> None:
        """cells: picture, caption, and the colour of its frame or None."""
        draw, top = self._grow(PICTURE + LINE + GAP)
        for i, line in enumerate(textwrap.wrap(text, 32)[:5]):
            draw.text((GAP, top + i * LINE), line, INK, self.font)
        draw.text((GAP, top + PICTURE), note, QUIET, self.font)
        for i, (picture, caption, frame) in enumerate(cells):
            left = self._left(i)
            self.image.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (left, top))
            draw.rectangle(
                (left - 1, top - 1, left + PICTURE, top + PICTURE), outline=frame or "#d1d1d6", width=4 if frame else 1
            )
            draw.text((left, top + PICTURE + 2), caption, frame or QUIET, self.font)


def picture(manifest: Path, row: Row) -> Image.Image:
    return Image.fromarray(shards.read_images(manifest, [row])[0])


def first_drawn(manifest: Path) -> dict[str, Row]:
    """Each prompt's first image."""
    return {row["prompt_id"]: row for row in reversed(manifests.read_rows(manifest, "candidates", without=("tokens",)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="training prompts")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="the base model's candidate manifests")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="their scores")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[], help="pairs manifests whose choices are marked")
    parser.add_argument("--evaluation", type=Path, required=True, help="held-out prompts")
    parser.add_argument("--arms", nargs="+", required=True, help="names, base first")
    parser.add_argument("--drawn", type=Path, nargs="+", required=True, help="one evaluation shard for each arm")
    parser.add_argument("--verdicts", type=Path, nargs="+", required=True, help="the external judge's, one for each arm")
    parser.add_argument("--out", type=Path, required=True, help="PNG")
    arguments = parser.parse_args()
    if not len(arguments.arms) == len(arguments.drawn) == len(arguments.verdicts):
        raise UserError("--arms, --drawn and --verdicts: give one shard's manifests for each arm")
    config = load(arguments.config)
    count, shown = config.report.prompts, min(config.generate.candidates, config.report.candidates)
    p_yes = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(arguments.scores, "scores")}
    pairs = manifests.read_rows(arguments.pairs, "pairs")
    chosen, rejected = ({row[side] for row in pairs} for side in ("chosen", "rejected"))
    drawn: dict[str, list[tuple[Path, Row]]] = {}
    for path in arguments.candidates:
        for row in manifests.read_rows(path, "candidates", without=("tokens",)):
            drawn.setdefault(row["prompt_id"], []).append((path, row))

    sheet = Sheet(max(shown, len(arguments.arms)))
    sheet.heading("Training prompts: candidates, the model's own p(yes), green chosen, red rejected", [])
    for prompt in spread(manifests.read_rows(arguments.prompts, "prompts"), count):
        cells = []
        for path, row in drawn[prompt["prompt_id"]][:shown]:
            identifier = row["candidate_id"]
            mark = " chosen" if identifier in chosen else " rejected" if identifier in rejected else ""
            certainty = "unread" if p_yes[identifier] is None else f"{p_yes[identifier]:.2f}"
            frame = GOOD if identifier in chosen else BAD if identifier in rejected else None
            cells.append((picture(path, row), certainty + mark, frame))
        kept = any(row["candidate_id"] in chosen for _, row in drawn[prompt["prompt_id"]])
        sheet.row(prompt["prompt"], prompt["category"] + ("" if kept else ", discard pool"), cells)

    judge = config.evaluate.judge
    green = "" if judge == "none" else f", green where {judge} says it matches"
    sheet.heading(f"Held-out prompts: base beside trained{green}", arguments.arms)
    firsts = [first_drawn(path) for path in arguments.drawn]
    true = {row["candidate_id"]: row["verdict"] for row in manifests.read_rows(arguments.verdicts, "scores")}
    held_out = [row for row in manifests.read_rows(arguments.evaluation, "prompts") if row["prompt_id"] in firsts[0]]
    for prompt in spread(held_out, count):
        rows = [first[prompt["prompt_id"]] for first in firsts]
        verdicts = [true[row["candidate_id"]] for row in rows]
        sheet.row(
            prompt["prompt"],
            prompt["category"],
            [
                (picture(path, row), *VERDICTS[verdict])
                for path, row, verdict in zip(arguments.drawn, rows, verdicts, strict=True)
            ],
        )
    with whole_file(arguments.out) as temporary:
        sheet.image.save(temporary, "PNG")
    print(f"{arguments.out}: {sheet.image.width} x {sheet.image.height}")


if __name__ == "__main__":
    run_stage(main)
