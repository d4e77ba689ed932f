"""Choose what learning dynamics are computed for: probes, which are images of the base model, and training rows.

    python -m stages.dynamics.select --config config.yaml --prompts prompts/validation.parquet \\
        --candidates base/candidates/validation/*.parquet --scores base/scores/validation/*.parquet \\
        --verdicts base/verdicts/shapes/validation/*.parquet --training-prompts prompts/train.parquet \\
        --pairs sft sft/pairs.parquet --pairs c-sft sft-epoch3/replay/pairs.parquet \\
        --training-verdicts base/verdicts/shapes/train/*.parquet --probes probes.parquet --rows rows.parquet

Probes are drawn evenly from all categories, one image for each prompt before a second one for any. Because they are drawn
without regard to verdicts, they are a fair sample of what the model draws. Training rows are drawn by group: rows that the
external judge rejects, replayed rows, and the others. No model is loaded.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.seeds import draw_seed, hash_seed
from stages.dynamics.items import similarity

Row = dict[str, Any]


def evenly(groups: Iterable[Sequence[Row]], count: int) -> list[Row]:
    """Return `count` rows, or all there are: the first of every group, then the second of every group, and so on."""
    waiting = [list(group) for group in groups]
    found: list[Row] = []
    while len(found) < count and any(waiting):
        found += [group.pop(0) for group in waiting if group]
    return found[:count]


def alternatives(prompt: str, others: Sequence[str], count: int, seed: int) -> list[str]:
    """Return the `count` other prompts that share the most words with a prompt; ties are broken by a hash."""
    wanted = [other for other in dict.fromkeys(others) if other != prompt]
    return sorted(wanted, key=lambda other: (-similarity(prompt, other), hash_seed("alternative", seed, other)))[:count]


def choose_probes(candidates: list[Row], prompts: dict[str, Row], images: int, seed: int) -> list[Row]:
    """Return candidates as probes: evenly from the categories, and within these each prompt's first image before its second."""
    by_category = defaultdict(list)
    for row in sorted(candidates, key=lambda row: (row["index"], hash_seed("probe", seed, row["candidate_id"]))):
        by_category[prompts[row["prompt_id"]]["category"]].append(row)
    return evenly([by_category[category] for category in sorted(by_category)], images)


def choose_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return training rows of one objective: up to a quarter wrong ones, up to a quarter replayed ones, and right ones.

    They are in random order, so the first of them are a sample of all.
    """
    rows = sorted(rows, key=lambda row: hash_seed("row", seed, row["row_id"]))
    wrong = [row for row in rows if row["right"] is False and not row["round"]][: count // 4]
    replayed = [row for row in rows if row["round"]][: count // 4]
    taken = {row["row_id"] for row in (*wrong, *replayed)}
    by_category = defaultdict(list)
    for row in rows:
        if row["row_id"] not in taken and not row["round"] and row["right"] is not False:
            by_category[row["category"]].append(row)
    right = evenly([by_category[name] for name in sorted(by_category)], count - len(taken))
    return sorted([*wrong, *replayed, *right], key=lambda row: hash_seed("order", seed, row["row_id"]))


def known_verdicts(paths: Sequence[Path]) -> dict[str, bool | None]:
    return {row["candidate_id"]: row["verdict"] for row in manifests.read_rows(paths, "verdicts")}


def training_rows(pairs: list[tuple[str, Path]], prompts: dict[str, Row], right: dict[str, Any], seed: int) -> list[Row]:
    """Return all rows of the pairs manifests of arms, without repetitions."""
    found: dict[str, Row] = {}
    for arm, path in pairs:
        for row in manifests.read_rows(path, "pairs"):
            chosen, rejected = row["chosen"], row["rejected"]
            name = f"{chosen}+{rejected}" if rejected else chosen
            found.setdefault(
                name,
                {
                    "row_id": name,
                    "objective": "dpo" if rejected else "sft",
                    "arm": arm,
                    **{key: row[key] for key in ("round", "prompt_id", "chosen", "rejected")},
                    **{key: prompts[row["prompt_id"]][key] for key in ("prompt", "category")},
                    "right": right.get(chosen),
                    "seed": draw_seed(seed, chosen, rejected, 1),
                },
            )
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="prompts of the benchmark")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="the base model's images of them")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="its own verdicts on these images")
    parser.add_argument("--verdicts", type=Path, nargs="*", default=[], help="an external judge's verdicts on them")
    parser.add_argument("--training-prompts", type=Path, required=True, help="the training prompts")
    parser.add_argument("--pairs", nargs=2, action="append", default=[], metavar=("ARM", "PAIRS"), help="training data")
    parser.add_argument("--training-verdicts", type=Path, nargs="*", default=[], help="verdicts on training candidates")
    parser.add_argument("--probes", type=Path, required=True, help="where the probes are written")
    parser.add_argument("--rows", type=Path, required=True, help="where the training rows are written")
    arguments = parser.parse_args()
    config = load(arguments.config)
    chosen = config.dynamics
    candidates = manifests.read_rows(arguments.candidates, "candidates", without=("tokens", "latents"))
    prompts = manifests.prompts_of(arguments.prompts, candidates)
    scores = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(arguments.scores, "scores")}
    right = known_verdicts([*arguments.verdicts, *arguments.training_verdicts])
    texts = [row["prompt"] for row in prompts.values()]
    probes = [
        {
            "candidate_id": row["candidate_id"],
            "prompt_id": row["prompt_id"],
            **{key: prompts[row["prompt_id"]][key] for key in ("prompt", "category")},
            "right": right.get(row["candidate_id"]),
            "p_yes": scores.get(row["candidate_id"]),
            "seed": draw_seed(config.seed, row["candidate_id"], None, 0),
            "alternatives": alternatives(prompts[row["prompt_id"]]["prompt"], texts, chosen.alternatives, config.seed)
            if place < chosen.probes
            else [],
        }
        for place, row in enumerate(choose_probes(candidates, prompts, chosen.images, config.seed))
    ]
    trained = {row["prompt_id"]: row for row in manifests.read_rows(arguments.training_prompts, "prompts")}
    rows = training_rows([(arm, Path(path)) for arm, path in arguments.pairs], trained, right, config.seed)
    if not rows:
        raise UserError("--pairs: no training rows in these manifests; lower pairs.accept_threshold, or name other arms")
    examined = [
        row
        for objective in ("sft", "dpo")
        for row in choose_rows([r for r in rows if r["objective"] == objective], chosen.rows, config.seed)
    ]
    facts = chosen.model_dump(include={"images", "probes", "alternatives", "rows"}) | {"seed": config.seed}
    parents = [arguments.prompts, *arguments.candidates, *arguments.scores, *arguments.verdicts, arguments.training_prompts,
               *(Path(path) for _, path in arguments.pairs), *arguments.training_verdicts]  # fmt: skip
    stage = "stages.dynamics.select"
    manifests.write(arguments.rows, "dynamics_rows", examined, stage=stage, settings=facts, parents=parents)
    manifests.write(arguments.probes, "dynamics_probes", probes, stage=stage, settings=facts, parents=parents)
    wrong, replayed = sum(row["right"] is False for row in examined), sum(row["round"] > 0 for row in examined)
    print(f"{len(probes)} probes, {len(examined)} training rows; {wrong} of them wrong and {replayed} replayed")


if __name__ == "__main__":
    run_stage(main)
