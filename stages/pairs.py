"""Turn verdicts into training data: SFT rows, DPO pairs, and the discard pool with its reasons.

    python -m stages.pairs --config config.yaml --arm dpo --candidates base/*.parquet --scores scores/*.parquet \\
        --out pairs.parquet --discard discard.parquet

`select` is the whole rule, a pure function.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from stages.common import manifests
from stages.common.config import Pairs, load
from stages.common.errors import UserError, run_stage
from stages.common.seeds import hash_seed

Row = dict[str, Any]


class Judged(TypedDict):
    """A candidate and how much its judge says that it matches: p_yes, or 1 and 0 from an oracle; None where unreadable."""

    candidate_id: str
    prompt_id: str
    round: int
    p_yes: float | None


def select(candidates: list[Judged], objective: str, settings: Pairs, seed: int) -> tuple[list[Row], Row | None]:
    """Return the training rows of one prompt and None, or no rows and a row of the discard manifest that says why.

    candidates: those of one prompt and round. A candidate with an unreadable verdict is neither accepted nor rejected, except
    with filter everything, which ignores verdicts. Candidates of equal p_yes are ordered by a hash of seed and id, so the
    choice does not depend on the order in which they were drawn.
    """

    def chance(row: Judged) -> int:
        return hash_seed("pairs", seed, row["candidate_id"])

    def certainty(row: Judged) -> float:
        return -1.0 if row["p_yes"] is None else row["p_yes"]

    readable = [row for row in candidates if row["p_yes"] is not None]
    if settings.filter == "everything":
        accepted = sorted(candidates, key=chance)
        rejected = accepted[1:]  # a random pair: the control for pairs that a judge has ordered
    else:
        accepted = sorted((row for row in readable if certainty(row) >= settings.accept_threshold), key=chance)
        rejected = [row for row in readable if certainty(row) < settings.reject_threshold]
        rejected.sort(key=lambda row: (certainty(row), chance(row)))
        if settings.rule == "highest" and settings.filter == "judge":
            accepted.sort(key=certainty, reverse=True)  # a stable sort: ties stay in their random order
    common = {"prompt_id": candidates[0]["prompt_id"], "round": candidates[0]["round"]}
    best = max((row["p_yes"] for row in readable if row["p_yes"] is not None), default=None)

    def discard(reason: str) -> tuple[list[Row], Row]:
        return [], {**common, "best_p_yes": best, "reason": reason}

    if not accepted:
        return discard("no_accepted")
    if objective == "sft":
        chosen = accepted[: settings.chosen_per_prompt]
        return [{**common, "chosen": row["candidate_id"], "chosen_p_yes": row["p_yes"]} for row in chosen], None
    if not rejected:
        return discard("no_rejected")
    top, low = accepted[0], rejected[0]
    margin = None if top["p_yes"] is None or low["p_yes"] is None else top["p_yes"] - low["p_yes"]
    if settings.filter != "everything" and margin is not None and margin < settings.minimum_margin:
        return discard("small_margin")
    row = {**common, "chosen": top["candidate_id"], "rejected": low["candidate_id"]}
    return [{**row, "chosen_p_yes": top["p_yes"], "rejected_p_yes": low["p_yes"], "margin": margin}], None


def judged_candidates(candidates: list[Path], scores: list[Path], settings: Pairs, most: int | None) -> dict[str, list[Judged]]:
    """Return each prompt's candidates with their judgements, the first `most` of them."""
    if settings.filter == "oracle":
        verdicts = manifests.read_rows(scores, "verdicts")
        known = {row["candidate_id"]: None if row["verdict"] is None else float(row["verdict"]) for row in verdicts}
    else:
        known = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(scores, "scores")}
    by_prompt: dict[str, list[Judged]] = {}
    for row in manifests.read_rows(candidates, "candidates", without=("tokens", "latents")):
        name = row["candidate_id"]
        if name not in known:
            raise UserError(f"{scores[0]}: candidate {name} has no score; score that manifest again")
        if most is None or row["index"] < most:
            judged: Judged = {"candidate_id": name, "prompt_id": row["prompt_id"], "round": row["round"], "p_yes": known[name]}
            by_prompt.setdefault(row["prompt_id"], []).append(judged)
    return by_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="the arm whose objective and settings apply")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument(
        "--scores", type=Path, nargs="+", required=True, help="their score manifests, or with filter oracle verdict manifests"
    )
    parser.add_argument("--out", type=Path, required=True, help="pairs manifest")
    parser.add_argument("--discard", type=Path, required=True, help="discard manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    if arguments.arm not in config.arms:
        raise UserError(f"--arm {arguments.arm}: not in {arguments.config}; arms there: {', '.join(config.arms)}")
    arm, settings = config.arms[arguments.arm], config.arm_pairs(arguments.arm)
    by_prompt = judged_candidates(arguments.candidates, arguments.scores, settings, arm.candidates)
    pairs: list[Row] = []
    discarded: list[Row] = []
    for judged in by_prompt.values():
        found, reason = select(judged, arm.objective, settings, config.seed)
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
