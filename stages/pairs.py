"""Turn verdicts into training data: SFT rows, DPO pairs, and the discard pool with its reasons.

    python -m stages.pairs --config config.yaml --arm dpo --candidates base/*.parquet --scores scores/*.parquet \\
        --out pairs.parquet --discard discard.parquet

`select` is the whole rule, a pure function.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import Pairs, load
from stages.common.runtime import UserError, run_stage
from stages.common.seeds import hash_seed

Row = dict[str, Any]


def select(candidates: list[Row], objective: str, settings: Pairs, seed: int) -> tuple[list[Row], Row | None]:
    """The training rows of one prompt, or why there are none.

    candidates: rows with candidate_id, prompt_id, round, p_yes (None: the answer could not be read; neither accepted nor
        rejected) of one prompt and round.
    Returns pairs rows and None, or no rows and a discard row. Candidates of equal p_yes are ordered by a hash of seed and
    id, so that the choice does not lean on the order in which they were drawn.
    """

    def order(row: Row) -> tuple[float, int]:
        certainty = -row["p_yes"] if settings.rule == "highest" and settings.filter == "judge" else 0.0
        return certainty, hash_seed("pairs", seed, row["candidate_id"])

    readable = [row for row in candidates if row["p_yes"] is not None]
    if settings.filter == "everything":
        accepted = sorted(candidates, key=order)
    else:
        accepted = sorted((row for row in readable if row["p_yes"] >= settings.accept_threshold), key=order)
    common = {"prompt_id": candidates[0]["prompt_id"], "round": candidates[0]["round"]}
    best = max((row["p_yes"] for row in readable), default=None)

    def discard(reason: str) -> tuple[list[Row], Row]:
        return [], {**common, "best_p_yes": best, "reason": reason}

    if not accepted:
        return discard("no_accepted")
    if objective == "sft":
        chosen = accepted[: settings.chosen_per_prompt]
        return [{**common, "chosen": row["candidate_id"], "chosen_p_yes": row["p_yes"]} for row in chosen], None
    rejected = [row for row in readable if row["p_yes"] < settings.reject_threshold and row is not accepted[0]]
    if not rejected:
        return discard("no_rejected")
    top = accepted[0]
    low = min(rejected, key=lambda row: (row["p_yes"], hash_seed("pairs", seed, row["candidate_id"])))
    margin = top["p_yes"] - low["p_yes"]
    if margin < settings.minimum_margin:
        return discard("small_margin")
    row = {**common, "chosen": top["candidate_id"], "rejected": low["candidate_id"]}
    return [{**row, "chosen_p_yes": top["p_yes"], "rejected_p_yes": low["p_yes"], "margin": margin}], None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="whose objective and settings")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the judge's manifests, one for each")
    parser.add_argument("--out", type=Path, required=True, help="pairs manifest")
    parser.add_argument("--discard", type=Path, required=True, help="discard manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    if arguments.arm not in config.arms:
        raise UserError(f"--arm {arguments.arm}: not in {arguments.config}; arms there: {', '.join(config.arms)}")
    arm, settings = config.arms[arguments.arm], config.arm_pairs(arguments.arm)
    judged = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(arguments.scores, "scores")}
    by_prompt: dict[str, list[Row]] = {}
    for row in manifests.read_rows(arguments.candidates, "candidates", without=("tokens",)):
        if row["candidate_id"] not in judged:
            raise UserError(f"{arguments.scores[0]}: candidate {row['candidate_id']} has no score; score that manifest again")
        if arm.candidates is None or row["index"] < arm.candidates:
            row["p_yes"] = judged[row["candidate_id"]]
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    pairs: list[Row] = []
    discarded: list[Row] = []
    for rows in by_prompt.values():
        found, reason = select(rows, arm.objective, settings, config.seed)
        pairs += found
        discarded += [reason] if reason else []
    facts = {"objective": arm.objective, "candidates": arm.candidates, **settings.model_dump()}
    parents = [*arguments.candidates, *arguments.scores]
    manifests.write(arguments.discard, "discard", discarded, stage="stages.pairs", settings=facts, parents=parents)
    manifests.write(arguments.out, "pairs", pairs, stage="stages.pairs", settings=facts, parents=parents)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(r["reason"] for r in discarded).items()))
    print(f"{len(pairs)} rows from {len(by_prompt) - len(discarded)} of {len(by_prompt)} prompts; without: {reasons or 'none'}")


if __name__ == "__main__":
    run_stage(main)
