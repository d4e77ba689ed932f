"""Write a set of prompts as a manifest: the training prompts, or those of a benchmark.

python -m stages.prompts --config config.yaml --set train --out results/tiny-janus/prompts/train.parquet
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.registry import entry
from stages.common.seeds import hash_seed
from stages.suites import open_suite
from stages.suites.base import PromptSource
from stages.suites.files import prompts_in

TRAIN = "train"


def normalise(prompt: str) -> str:
    """Return the prompt in Unicode NFC, in lower case, with single spaces and without a full stop at the end.

    Prompts that agree in this form are one prompt.
    """
    return " ".join(unicodedata.normalize("NFC", prompt).split()).lower().rstrip(".").rstrip()


def prompt_id(prompt: str) -> str:
    """Return the identity of a prompt: 16 hexadecimal digits of a hash of its normalised form."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]


def take(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` rows, spread over the categories as evenly as their sizes allow; a function of seed and prompts only."""
    pools: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: hash_seed("prompts", seed, row["prompt_id"])):
        pools.setdefault(row["category"], []).append(row)
    kept: list[dict[str, Any]] = []
    turn = 0
    while len(kept) < min(count, len(rows)):
        kept += [pool[turn] for _, pool in sorted(pools.items()) if turn < len(pool)][: count - len(kept)]
        turn += 1
    return kept


def collect(chosen: PromptSource, seed: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the rows of a set of prompts, and how many were dropped for which reason."""
    excluded = {prompt_id(prompt) for name in chosen.exclude for prompt in prompts_in(Path(name))}
    dropped: Counter[str] = Counter()
    kept: dict[str, dict[str, Any]] = {}
    for row in open_suite(chosen.source).rows(chosen):
        identifier = prompt_id(row["prompt"])
        if identifier in excluded:
            dropped["also in an excluded file"] += 1
        elif identifier in kept:
            dropped["duplicate"] += 1
        else:
            kept[identifier] = {"prompt_id": identifier, "source": chosen.source, "split": chosen.source, **row}
    result = list(kept.values())
    if not result:
        raise UserError("prompts: every prompt was dropped as excluded; check files and exclude of this set")
    if chosen.count is not None:
        if chosen.count > len(result):
            print(f"warning: {chosen.count} prompts are wanted, but there are only {len(result)}", file=sys.stderr)
        result = take(result, chosen.count, seed)
    return result, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="one file, or several laid over each other")
    parser.add_argument("--set", required=True, help="train, or the name of a benchmark")
    parser.add_argument("--out", type=Path, required=True, help="prompt manifest (Parquet)")
    arguments = parser.parse_args()
    config = load(*arguments.config)
    if arguments.set != TRAIN and arguments.set not in config.benchmarks:
        names, files = ", ".join([TRAIN, *config.benchmarks]), " ".join(map(str, arguments.config))
        raise UserError(f"--set {arguments.set}: {files} has no such set of prompts; its sets are {names}")
    training = arguments.set == TRAIN
    chosen: PromptSource = config.prompts if training else config.benchmarks[arguments.set].prompts
    # A benchmark's prompts are the same for every seed, so that runs with different seeds are compared on the same prompts.
    seed = config.seed if training else 0
    rows, dropped = collect(chosen, seed)
    settings = chosen.model_dump() | {"seed": seed, "dropped": dict(dropped)}
    for key in ("files", "exclude"):
        settings[key] = [Path(name).name for name in settings.get(key, [])]
    uses = [entry("SUITES", chosen.source)]
    manifests.write(arguments.out, "prompts", rows, stage="stages.prompts", settings=settings, uses=uses)
    counts = Counter(row["category"] for row in rows)
    print(f"{len(rows)} prompts: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for reason, count in dropped.items():
        print(f"dropped {count}: {reason}")


if __name__ == "__main__":
    run_stage(main)
