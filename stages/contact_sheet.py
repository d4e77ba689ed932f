"""Draw the contact sheet: candidates with their judgements and the selection, and a benchmark's images by base and all arms.

    python -m stages.contact_sheet --config config.yaml --prompts train.parquet --candidates base/candidates/train/*.parquet \\
        --scores base/scores/train/*.parquet --pairs sft/pairs.parquet dpo/pairs.parquet \\
        --benchmark validation --evaluation validation.parquet --arms base sft --drawn base/0000.parquet sft/0000.parquet \\
        --verdicts ... --own-scores ... --out contact_sheet.png

Without --benchmark, the sheet shows only the training prompts.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from stages.common import manifests, shards
from stages.common.config import Config, load
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file

Row = dict[str, Any]
PICTURE, GAP, TEXT, LINE = 112, 10, 250, 22  # in pixels: image side, gap, width of the prompt column, line height
INK, QUIET, GOOD, BAD, PAPER = "#1c1c1e", "#8e8e93", "#1a9850", "#d73027", "#ffffff"
UNUSED = ("tokens", "latents")  # large columns of the candidates that are not shown


class Cell(NamedTuple):
    """An image with its caption and the colour of its frame, which is None for a thin grey one."""

    picture: Image.Image
    caption: str
    frame: str | None


class Sheet:
    """A page that grows downwards. It has headings, and rows with a prompt and its images."""

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

    def _left(self, column: int) -> int:
        return 2 * GAP + TEXT + column * (PICTURE + GAP)

    def heading(self, title: str, columns: Sequence[str] = ()) -> None:
        draw, top = self._grow(40 + LINE)
        draw.text((GAP, top + 8), title, INK, self.bold)
        for i, name in enumerate(columns):
            draw.text((self._left(i), top + 38), name, QUIET, self.font)

    def row(self, text: str, note: str, cells: list[Cell]) -> None:
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


def spread(rows: list[Row], count: int) -> list[Row]:
    """Return at most `count` rows, taken from the categories in turn."""
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(row["category"], []).append(row)
    ordered = [pool[i] for i in range(len(rows)) for pool in by_category.values() if i < len(pool)]
    return ordered[:count]


def picture(manifest: Path, row: Row) -> Image.Image:
    """Return the image of a candidate in this manifest."""
    return Image.fromarray(shards.read_images(manifest, [row])[0])


def certainties(scores: list[Path]) -> dict[str, str]:
    """Return the model's p(yes) for each image as text, by candidate_id; "unreadable" if its answer could not be parsed."""
    rows = manifests.read_rows(scores, "scores")
    return {row["candidate_id"]: "unreadable" if row["p_yes"] is None else f"{row['p_yes']:.2f}" for row in rows}


def training_part(sheet: Sheet, arguments: argparse.Namespace, config: Config) -> None:
    """Show training prompts with their candidates, the model's p(yes), and the chosen and rejected ones."""
    certainty = certainties(arguments.scores)
    pairs = manifests.read_rows(arguments.pairs, "pairs")
    chosen, rejected = ({row[side] for row in pairs} for side in ("chosen", "rejected"))
    drawn: dict[str, list[tuple[Path, Row]]] = {}
    for path in arguments.candidates:
        for row in manifests.read_rows(path, "candidates", without=UNUSED):
            drawn.setdefault(row["prompt_id"], []).append((path, row))

    def cell(path: Path, row: Row) -> Cell:
        name = row["candidate_id"]
        mark, frame = (" chosen", GOOD) if name in chosen else (" rejected", BAD) if name in rejected else ("", None)
        return Cell(picture(path, row), certainty[name] + mark, frame)

    sheet.heading("Training prompts: candidates, the model's own p(yes), green chosen, red rejected")
    prompts = [row for row in manifests.read_rows(arguments.prompts, "prompts") if row["prompt_id"] in drawn]
    for prompt in spread(prompts, config.report.prompts):
        candidates = drawn[prompt["prompt_id"]]
        kept = any(row["candidate_id"] in chosen for _, row in candidates)
        note = prompt["category"] + ("" if kept else ", no training row")
        sheet.row(prompt["prompt"], note, [cell(path, row) for path, row in candidates[: config.report.candidates]])


def benchmark_part(sheet: Sheet, arguments: argparse.Namespace, config: Config) -> None:
    """Show prompts of a benchmark, each with its first image by base and by every arm, and the verdict on it."""
    judge = config.benchmarks[arguments.benchmark].judge
    verdicts = {
        row["candidate_id"]: row for row in manifests.read_rows(arguments.verdicts, "verdicts") if row["judge"] == judge
    }
    certainty = certainties(arguments.own_scores)

    def cell(path: Path, row: Row) -> Cell:
        name = row["candidate_id"]
        if name in verdicts:
            matches = verdicts[name]["verdict"]
            caption, frame = {True: ("matches", GOOD), False: ("does not match", BAD), None: ("unreadable", None)}[matches]
            return Cell(picture(path, row), caption, frame)
        return Cell(picture(path, row), f"own {certainty[name]}" if name in certainty else "", None)

    firsts = [
        {row["prompt_id"]: row for row in reversed(manifests.read_rows(path, "candidates", without=UNUSED))}
        for path in arguments.drawn
    ]
    said = f", green where {judge} says that it matches" if verdicts else ", the model's own p(yes)" if certainty else ""
    sheet.heading(f"{arguments.benchmark}: base beside trained{said}", arguments.arms)
    prompts = manifests.read_rows(arguments.evaluation, "prompts")
    shown = [row for row in prompts if all(row["prompt_id"] in first for first in firsts)]
    for prompt in spread(shown, config.report.prompts):
        cells = [cell(path, first[prompt["prompt_id"]]) for path, first in zip(arguments.drawn, firsts, strict=True)]
        sheet.row(prompt["prompt"], prompt["category"], cells)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="training prompts")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="the base model's candidate manifests")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the base model's scores of these candidates")
    parser.add_argument(
        "--pairs", type=Path, nargs="*", default=[], help="pairs manifests whose chosen and rejected images are marked"
    )
    parser.add_argument("--benchmark", help="name of the benchmark to show, from the section benchmarks")
    parser.add_argument("--evaluation", type=Path, help="prompt manifest of the benchmark")
    parser.add_argument("--arms", nargs="*", default=[], help="names of the arms, base first")
    parser.add_argument(
        "--drawn", type=Path, nargs="*", default=[], help="one candidate manifest of the benchmark for each arm"
    )
    parser.add_argument(
        "--verdicts",
        type=Path,
        nargs="*",
        default=[],
        help="manifests with the external judge's verdicts on these images, if there is a judge",
    )
    parser.add_argument(
        "--own-scores",
        type=Path,
        nargs="*",
        default=[],
        help="each arm's own scores of these images, shown if there are no verdicts",
    )
    parser.add_argument("--out", type=Path, required=True, help="contact sheet (PNG)")
    return parser.parse_args()


def check(arguments: argparse.Namespace, config: Config) -> None:
    """Raise UserError when the options about the benchmark are incomplete or inconsistent."""
    if arguments.benchmark is None:
        return
    if arguments.benchmark not in config.benchmarks:
        raise UserError(
            f"--benchmark {arguments.benchmark}: not in the section benchmarks, which has {', '.join(config.benchmarks)}"
        )
    if arguments.evaluation is None or not arguments.arms or len(arguments.arms) != len(arguments.drawn):
        raise UserError("--benchmark needs --evaluation, and --arms and --drawn with one candidate manifest for each arm")


def main() -> None:
    arguments = parse()
    config = load(arguments.config)
    check(arguments, config)
    shown = min(config.generate.candidates, config.report.candidates)
    sheet = Sheet(max(shown, len(arguments.arms)))
    training_part(sheet, arguments, config)
    if arguments.benchmark:
        benchmark_part(sheet, arguments, config)
    with whole_file(arguments.out) as temporary:
        sheet.image.save(temporary, "PNG")
    print(f"{arguments.out}: {sheet.image.width} x {sheet.image.height}")


if __name__ == "__main__":
    run_stage(main)
