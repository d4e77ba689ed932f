"""The gallery's data: for each set of prompts an index with a few characters for each image, and a small file for each prompt.

The index is all that a page needs to filter and sort. A page of the gallery then loads only the files of the prompts that it
shows; each has the prompt, everything that was said about its images, and all their thumbnails in a single picture.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.common import shards
from stages.common.errors import UserError
from stages.pages.render import write_data
from stages.pages.run import TRAIN, ByPrompt, Group, Run, Selection, images, read_columns, selections

Row = dict[str, Any]
PROMPTS = ("prompt_id", "prompt", "category", "split", "difficulty")
SEEN = 160  # images on one page of the gallery, so that it stays below 2 MB
COLUMNS = 16  # thumbnails side by side in a prompt's picture
LONG = 400  # characters of a judge's own words that are kept
SEARCHED = 200  # characters of a prompt in which the search box looks
SELECTED, POOL, RECOVERED, UNPAIRED = 1, 2, 4, 8  # what happened to a training prompt; several may hold, in different arms
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
SAID = {True: "y", False: "n", None: "u"}
ABSENT = "-"


# Pictures


def thumbnails(pictures: Sequence[np.ndarray | None], side: int) -> Row:
    """Return thumbnails of at most `side` pixels as one WebP picture in base64, with its layout.

    Pictures that are no larger are kept pixel by pixel. A picture that is None leaves its place empty.
    """
    known = [Image.fromarray(picture) for picture in pictures if picture is not None]
    small = all(max(picture.size) <= side for picture in known)
    cell = min(side, max((max(picture.size) for picture in known), default=side))
    columns = min(COLUMNS, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGBA", (columns * cell, rows * cell))
    for place, pixels in enumerate(pictures):
        if pixels is not None:
            picture = Image.fromarray(pixels)
            picture.thumbnail((cell, cell), Image.Resampling.LANCZOS)
            left, top = (cell - picture.width) // 2, (cell - picture.height) // 2
            sheet.paste(picture, (place % columns * cell + left, place // columns * cell + top))
    opaque = len(known) == columns * rows and all(picture.width == picture.height for picture in known)
    buffer = io.BytesIO()
    (sheet.convert("RGB") if opaque else sheet).save(buffer, "WEBP", lossless=small, quality=20 if small else 75, method=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"columns": columns, "rows": rows, "side": cell, "pixels": small, "data": f"data:image/webp;base64,{data}"}


def pictures_of(run: Run, group: Group, rows: Sequence[Row]) -> list[np.ndarray | None]:
    """Return the images of rows of a group, None for those that cannot be read any more."""
    folder, found = run.folder / group.name / "candidates" / group.images, dict.fromkeys(row["candidate_id"] for row in rows)
    for shard in dict.fromkeys(row["shard"] for row in rows):
        manifest, inside = (folder / shard).with_suffix(".parquet"), [row for row in rows if row["shard"] == shard]
        for batch in [inside, *([row] for row in inside)]:  # one by one if they cannot be read together
            try:
                found |= dict(zip((row["candidate_id"] for row in batch), shards.read_images(manifest, batch), strict=True))
            except UserError:
                continue
            if batch is inside:
                break
    return list(found.values())


# What is said about an image


def code(group: int, row: Row, judges: Sequence[str]) -> str:
    """Return an image in the index: two digits of its group, two of its p_yes and a letter for each judge.

    Digits have base 36; p_yes is 0 to 1000. The letters are y, n, u (unreadable) and - (not judged), and the first one is
    the model's own verdict.
    """
    p_yes = row["p_yes"]
    certainty = ABSENT * 2 if p_yes is None else two_digits(round(1000 * p_yes))
    return two_digits(group) + certainty + own(row) + "".join(external(row, judge) for judge in judges)


def two_digits(number: int) -> str:
    return DIGITS[number // 36] + DIGITS[number % 36]


def own(row: Row) -> str:
    return SAID[row["own"]] if row["scored"] else ABSENT


def external(row: Row, judge: str) -> str:
    return SAID[row[f"verdict {judge}"]] if row[f"judged {judge}"] else ABSENT


def said(row: Row, judges: Sequence[str]) -> list[Row]:
    """Return what external judges say about an image, without what they leave empty."""
    found = []
    for judge in judges:
        if row[f"judged {judge}"]:
            answer = row[f"answer {judge}"] or ""
            parts = {
                "judge": judge,
                "verdict": SAID[row[f"verdict {judge}"]],
                "score": row[f"score {judge}"],
                "reason": row[f"reason {judge}"],
                "answer": answer[:LONG] + ("…" if len(answer) > LONG else ""),
            }
            found.append({key: value for key, value in parts.items() if value not in (None, "")})
    return found


def marks(chosen: list[Selection], number: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return which selections took an image as chosen and which as rejected, by candidate_id."""
    took: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    for selection in chosen:
        for row in selection.pairs[number]:
            for name, where in ((row["chosen"], took), (row["rejected"], refused)):
                if name and selection.label not in where.setdefault(name, []):
                    where[name].append(selection.label)
    return took, refused


def fate(chosen: list[Selection], number: int) -> tuple[int, list[Row]]:
    """Return what the selections did with a prompt, as bits and in rows for people."""
    bits, found = 0, []
    for selection in chosen:
        later, again = selection.epoch is not None, selection.pool is not None
        pairs = selection.pairs[number]
        left = selection.discard[number]
        if later and not (pairs or (selection.pool and selection.pool[number])):
            continue
        margins = [row["margin"] for row in pairs if row["margin"] is not None]
        facts: Row = {"by": selection.label, "rows": len(pairs), "margin": max(margins, default=None)}
        if left:
            facts |= {"reason": left[0]["reason"], "best": left[0]["best_p_yes"]}
        if pairs:
            bits |= RECOVERED if again else SELECTED
        elif left and not later:
            bits |= POOL if left[0]["reason"] == "no_accepted" else UNPAIRED
        found.append({key: value for key, value in facts.items() if value is not None} | {"replay": again})
    return bits, found


# Writing


def write_set(run: Run, name: str, out: Path, side: int) -> Row:
    """Write the index and the prompts of a set, and return what the page says about it."""
    prompts = read_columns([run.prompts(name)], "prompts", PROMPTS)
    groups, judges = run.groups(name), run.judges(name)
    models = [run.second_opinions(group) for group in groups]
    drawn = [ByPrompt(images(run, g, judges, more), prompts) for g, more in zip(groups, models, strict=True)]
    chosen = selections(run, prompts) if name == TRAIN else []
    categories: dict[str, int] = {}
    index, texts, count, lost = [], [], 0, 0
    for number, prompt in enumerate(prompts.to_pylist()):
        rows = [(place, row) for place, table in enumerate(drawn) for row in table[number]]
        if not rows:
            continue
        bits, history = fate(chosen, number)
        took, refused = marks(chosen, number)
        pictures = [p for place, g in enumerate(groups) for p in pictures_of(run, g, [row for at, row in rows if at == place])]
        lost += sum(picture is None for picture in pictures)
        shown = [image(row, place, groups[place], judges, took, refused) | others(row, models[place]) for place, row in rows]
        facts = {"set": name, **prompt, "history": history, "images": shown, "thumbnails": thumbnails(pictures, side)}
        write_data(out / name / prompt["prompt_id"][:2] / f"{prompt['prompt_id']}.js", "selfgap.prompt", facts)
        category = categories.setdefault(prompt["category"], len(categories))
        codes = "".join(code(place, row, judges) for place, row in rows)
        index.append([prompt["prompt_id"], category, bits, codes])
        texts.append(prompt["prompt"][:SEARCHED])
        count += len(rows)
    known = {"categories": list(categories), "groups": [g.label for g in groups], "judges": judges}
    per_page = max(1, min(24, SEEN * len(index) // max(count, 1)))
    write_data(out / name / "index.js", "selfgap.index", {"set": name, **known, "perPage": per_page, "prompts": index})
    write_data(out / name / "texts.js", "selfgap.texts", {"set": name, "texts": texts})
    return {"name": name, "training": name == TRAIN, "prompts": len(index), "images": count, "lost": lost, **known}


def image(
    row: Row, place: int, group: Group, judges: Sequence[str], took: dict[str, list[str]], refused: dict[str, list[str]]
) -> Row:
    """Return an image with its ids, verdicts and marks."""
    name = row["candidate_id"]
    facts = {
        "id": name,
        "group": place,
        "index": row["index"],
        "round": row["round"],
        "seed": str(row["seed"]),  # JavaScript would round it
        "p": row["p_yes"],
        "own": own(row),
        "chosen": took.get(name, []),
        "rejected": refused.get(name, []),
        "checkpoint": row["checkpoint"],
        "tar": f"{group.name}/candidates/{group.images}/{row['shard']}",
    }
    return {key: value for key, value in facts.items() if value not in (None, [])} | {"said": said(row, judges)}


def others(row: Row, models: Sequence[str]) -> Row:
    """Return what other models' own branches say about an image of base."""
    found = []
    for model in models:
        p_yes, verdict = row[f"p_yes by {model}"], row[f"own by {model}"]
        if p_yes is not None or verdict is not None:
            found.append({"model": model, "verdict": SAID[verdict]} | ({} if p_yes is None else {"p": p_yes}))
    return {"others": found} if found else {}


def write(run: Run, out: Path, side: int) -> list[Row]:
    """Write the data of all sets, and return what the page says about each."""
    return [write_set(run, name, out, side) for name in run.sets()]
