"""Prompts from the shapes grammar, from plain text files or from GenEval's metadata, as one prompt manifest.

python -m stages.prompts --config config.yaml --set train --out results/tiny-janus/prompts/train.parquet
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import PromptSet, load
from stages.common.runtime import UserError, run_stage
from stages.common.seeds import hash_seed

LONGEST = 4096  # characters of a prompt
GENEVAL_DIFFICULTY = {"single_object": "easy", "two_object": "easy", "color_attr": "easy"}


def normalise(prompt: str) -> str:
    """Unicode NFC, single spaces, lower case, no full stop at the end: prompts that agree in this are one prompt."""
    return " ".join(unicodedata.normalize("NFC", prompt).split()).lower().rstrip(".").rstrip()


def prompt_id(prompt: str) -> str:
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark; UserError on anything else."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; prompts.*.files takes text files") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check prompts.*.files") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 (byte {error.start}); convert it, for example with iconv -f UTF-16 -t UTF-8"
        raise UserError(message) from None
    if "\0" in text:
        raise UserError(f"{path}: has NUL characters, so it is not UTF-8 text; convert it with iconv -f UTF-16 -t UTF-8")
    if not text.strip():
        raise UserError(f"{path}: holds no prompt; give a file with one prompt a line")
    return text


def text_lines(path: Path) -> list[str]:
    """One prompt a line; CRLF or not, with or without a final newline; empty lines are skipped."""
    lines = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if len(line) > LONGEST:
            raise UserError(f"{path}:{number}: a line of {len(line)} characters; a prompt has at most {LONGEST}")
        if prompt := " ".join(line.split()):
            lines.append(prompt)
    return lines


def category_of(path: Path) -> str:
    """T2I-CompBench's layout: `color_train.txt` is category color."""
    stem = path.stem
    for suffix in ("_train", "_val"):
        stem = stem.removesuffix(suffix)
    return stem


def geneval_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            row = {"prompt": fields["prompt"], "category": fields["tag"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a GenEval line (JSON with tag and prompt)") from None
        row |= {"metadata": json.dumps(fields, sort_keys=True), "difficulty": GENEVAL_DIFFICULTY.get(fields["tag"])}
        rows.append(row)
    return rows


def shapes_rows(chosen: PromptSet) -> list[dict[str, Any]]:
    from stages.shapes.grammar import CATEGORIES, split_meanings

    unknown = [name for name in chosen.categories if name not in CATEGORIES]
    if unknown:
        raise UserError(f"prompts.*.categories: {unknown[0]!r} is no category of shapes; known: {', '.join(CATEGORIES)}")
    rows = []
    for category in chosen.categories or CATEGORIES:
        for meaning in split_meanings(category, chosen.split):
            rows.append({"prompt": meaning.prompt(), "category": category, "metadata": meaning.to_json()})
    return rows


def take(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows, spread over the categories as evenly as their sizes allow; a function of seed and prompts alone."""
    pools: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: hash_seed("prompts", seed, row["prompt_id"])):
        pools.setdefault(row["category"], []).append(row)
    kept: list[dict[str, Any]] = []
    turn = 0
    while len(kept) < min(count, len(rows)):
        kept += [pool[turn] for _, pool in sorted(pools.items()) if turn < len(pool)][: count - len(kept)]
        turn += 1
    return kept


def collect(chosen: PromptSet, seed: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows of a prompt set, and how many were dropped for which reason."""
    excluded = {prompt_id(line) for name in chosen.exclude for line in text_lines(Path(name))}
    if chosen.source == "shapes":
        rows = shapes_rows(chosen)
    elif chosen.source == "geneval":
        rows = [row for name in chosen.files for row in geneval_rows(Path(name))]
    else:
        rows = [
            {"prompt": prompt, "category": category_of(Path(name))}
            for name in chosen.files
            for prompt in text_lines(Path(name))
        ]
    dropped: Counter[str] = Counter()
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        identifier = prompt_id(row["prompt"])
        if identifier in excluded:
            dropped["also in an excluded file"] += 1
        elif identifier in kept:
            dropped["duplicate"] += 1
        else:
            split = chosen.split if chosen.source == "shapes" else chosen.source
            kept[identifier] = {"prompt_id": identifier, "source": chosen.source, "split": split, **row}
    result = list(kept.values())
    if not result:
        raise UserError("prompts: every prompt was dropped as excluded; check prompts.*.files and prompts.*.exclude")
    if chosen.count is not None:
        if chosen.count > len(result):
            print(f"warning: {chosen.count} prompts wanted, {len(result)} there are", file=sys.stderr)
        result = take(result, chosen.count, seed)
    return result, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", choices=("train", "evaluation"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="prompt manifest (Parquet)")
    arguments = parser.parse_args()
    config = load(arguments.config)
    chosen: PromptSet = getattr(config.prompts, arguments.set)
    # The evaluation prompts are the same for every seed: runs of other seeds are compared on them.
    rows, dropped = collect(chosen, config.seed if arguments.set == "train" else 0)
    settings = chosen.model_dump() | {"seed": config.seed, "dropped": dict(dropped)}
    settings["files"] = [Path(name).name for name in chosen.files]
    settings["exclude"] = [Path(name).name for name in chosen.exclude]
    manifests.write(arguments.out, "prompts", rows, stage="stages.prompts", settings=settings)
    counts = Counter(row["category"] for row in rows)
    print(f"{len(rows)} prompts: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for reason, count in dropped.items():
        print(f"dropped {count}: {reason}")


if __name__ == "__main__":
    run_stage(main)
