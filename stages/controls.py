"""Select the training data of controls, which differ from another arm only in who has judged.

    python -m stages.controls match --config config.yaml --arm sft-truth --like sft/pairs.parquet --prompts train.parquet \\
        --candidates base/*.parquet --scores scores/*.parquet --verdicts verdicts/*.parquet --out pairs.parquet
    python -m stages.controls more --config config.yaml --arm c-sft-more --selected sft/pairs.parquet \\
        --recovered sft-epoch3/replay/pairs.parquet --candidates base/*.parquet --scores scores/*.parquet --out more.parquet

`match` takes the prompts and numbers of rows of another selection, and chooses the candidates at random: among all candidates
if nobody judges, or according to an external judge. `more` adds as many rows as a replay has recovered, without drawing
anything. `match_selection` and `further_rows` are the whole rules, and pure functions.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import Config, Pairs, load
from stages.common.errors import UserError, run_stage
from stages.common.seeds import hash_seed

Row = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A candidate with the model's own p_yes and an external judge's verdict, None where they are unknown."""

    candidate_id: str
    prompt_id: str
    round: int
    p_yes: float | None
    right: bool | None = None


Choice = tuple[Candidate, Candidate | None]  # the chosen candidate and, for DPO, the rejected one


def row_of(choice: Choice) -> Row:
    """Return a choice as a row of the pairs manifest."""
    chosen, rejected = choice
    row = {"prompt_id": chosen.prompt_id, "round": chosen.round}
    row |= {"chosen": chosen.candidate_id, "chosen_p_yes": chosen.p_yes}
    if rejected is None:
        return row
    margin = None if chosen.p_yes is None or rejected.p_yes is None else chosen.p_yes - rejected.p_yes
    return row | {"rejected": rejected.candidate_id, "rejected_p_yes": rejected.p_yes, "margin": margin}


# Matched controls


def choices(candidates: Sequence[Candidate], objective: str, filter_: str, seed: int) -> list[Choice]:
    """Return every row that a control could make of one prompt's candidates, in random order.

    With filter everything, any candidate may be chosen and, for DPO, any other rejected. With filter oracle, right candidates
    are chosen and wrong ones rejected.
    """
    chosen = [c for c in candidates if filter_ == "everything" or c.right is True]
    rejected = [c for c in candidates if filter_ == "everything" or c.right is False]
    found: list[Choice] = [(c, None) for c in chosen]
    if objective == "dpo":
        found = [(c, r) for c in chosen for r in rejected if c is not r]
    return sorted(found, key=lambda pair: hash_seed("control", seed, *(c.candidate_id for c in pair if c)))


def match_selection(
    wanted: Mapping[str, int], options: Mapping[str, Sequence[Choice]], category_of: Mapping[str, str], seed: int
) -> dict[str, list[Choice]]:
    """Return each prompt's choices, as many in all and in each category as are wanted.

    wanted: the number of rows of each prompt. options: the choices that each prompt has. A prompt without any hands its rows
    on, each to a random prompt of its category that has an unused choice, or else to any of the category, or else, if the
    category has no choice at all, to any prompt. A prompt with fewer choices than rows repeats them in turn.
    """
    rows = {prompt: number for prompt, number in wanted.items() if options[prompt]}
    for prompt, number in wanted.items():
        for place in range(0 if prompt in rows else number):
            category = [other for other in rows if category_of[other] == category_of[prompt]]
            receivers = category or list(rows)
            unused = [other for other in receivers if rows[other] < len(options[other])]
            draws = {other: hash_seed("handed on", seed, prompt, place, other) for other in unused or receivers}
            rows[min(draws, key=draws.__getitem__)] += 1
    return {prompt: list(islice(cycle(options[prompt]), number)) for prompt, number in rows.items()}


def match(arguments: argparse.Namespace, config: Config) -> None:
    arm, settings = config.arms[arguments.arm], config.arm_pairs(arguments.arm)
    wanted = Counter(row["prompt_id"] for row in manifests.read_rows(arguments.like, "pairs"))
    category_of = {row["prompt_id"]: row["category"] for row in manifests.read_rows(arguments.prompts, "prompts")}
    by_prompt = candidates_of(arguments, arm.candidates, wanted)
    options = {prompt: choices(by_prompt[prompt], arm.objective, settings.filter, config.seed) for prompt in wanted}
    without = [prompt for prompt in wanted if not options[prompt]]
    if wanted and len(without) == len(wanted):
        first = [*arguments.verdicts, *arguments.candidates][0]  # without filter oracle there are no verdicts
        raise UserError(
            f"{first}: for no prompt of {arguments.like} is there a candidate that the control could choose; "
            "raise generate.candidates, or leave this control out"
        )
    found = match_selection(wanted, options, category_of, config.seed)
    rows = [row_of(choice) for part in found.values() for choice in part]
    parents = [arguments.like, arguments.prompts, *arguments.candidates, *arguments.scores, *arguments.verdicts]
    write(arguments, config, rows, parents)
    handed_on = sum(wanted[prompt] for prompt in without)
    repeated = len(rows) - len({(row["chosen"], row.get("rejected")) for row in rows})
    print(f"{len(rows)} rows of {len(found)} prompts, as many rows as in {arguments.like}; {repeated} rows are repetitions")
    print(f"{len(without)} of its {len(wanted)} prompts had nothing to choose and handed {handed_on} rows on to others")


# More rows instead of a replay


def further_choices(candidates: Sequence[Candidate], used: set[str], objective: str, settings: Pairs, seed: int) -> list[Row]:
    """Return the rows that stages.pairs would have taken next from one prompt's candidates, the best first.

    used: candidates that are in a row already. For DPO, the next accepted candidate goes with the next rejected one.
    """
    left = [(c.p_yes, c) for c in candidates if c.candidate_id not in used and c.p_yes is not None]
    left.sort(key=lambda pair: hash_seed("pairs", seed, pair[1].candidate_id))  # the random order of stages.pairs
    accepted = [pair for pair in left if pair[0] >= settings.accept_threshold]
    rejected = sorted((pair for pair in left if pair[0] < settings.reject_threshold), key=lambda pair: pair[0])
    if settings.rule == "highest" and settings.filter == "judge":
        accepted.sort(key=lambda pair: pair[0], reverse=True)
    if objective == "sft":
        return [row_of((candidate, None)) for _, candidate in accepted]
    pairs = zip(accepted, rejected, strict=False)
    return [row_of((top, low)) for (most, top), (least, low) in pairs if most - least >= settings.minimum_margin]


def further_rows(
    by_prompt: Mapping[str, Sequence[Candidate]],
    selected: Sequence[Row],
    count: int,
    objective: str,
    settings: Pairs,
    seed: int,
) -> tuple[list[Row], int]:
    """Return `count` further rows of prompts that have rows already, and how many of them are repetitions.

    by_prompt: the candidates of these prompts, with the p_yes that selected. selected: the rows so far. The prompts take turns
    in random order, and each gives its next row. When no prompt has another one, rows so far are repeated in random order.
    """
    used = {row[side] for row in selected for side in ("chosen", "rejected") if row[side]}
    prompts = sorted({row["prompt_id"] for row in selected}, key=lambda prompt: hash_seed("more rows", seed, prompt))
    queues = [further_choices(by_prompt[prompt], used, objective, settings, seed) for prompt in prompts]
    rows = [row for turn in zip_longest(*queues) for row in turn if row][:count]
    again = sorted(selected, key=lambda row: hash_seed("repeated", seed, row["chosen"], row["rejected"]))
    repeated = list(islice(cycle(again), count - len(rows)))
    return rows + repeated, len(repeated)


def more(arguments: argparse.Namespace, config: Config) -> None:
    arm, settings = config.arms[arguments.arm], config.arm_pairs(arguments.arm)
    count = len(manifests.read_rows(arguments.recovered, "pairs"))
    selected = manifests.read_rows(arguments.selected, "pairs")
    by_prompt = candidates_of(arguments, arm.candidates, {row["prompt_id"] for row in selected})
    if settings.filter == "oracle":
        by_prompt = {prompt: [as_judged(candidate) for candidate in part] for prompt, part in by_prompt.items()}
    rows, repeated = further_rows(by_prompt, selected, count, arm.objective, settings, config.seed)
    parents = [arguments.recovered, *arguments.selected, *arguments.candidates, *arguments.scores, *arguments.verdicts]
    write(arguments, config, rows, parents)
    print(f"{len(rows)} further rows, as many as in {arguments.recovered}; {repeated} of them are repetitions")


def as_judged(candidate: Candidate) -> Candidate:
    """Return the candidate with an external judge's verdict as its p_yes, as stages.pairs selects with filter oracle."""
    p_yes = None if candidate.right is None else float(candidate.right)
    return Candidate(candidate.candidate_id, candidate.prompt_id, candidate.round, p_yes, candidate.right)


# Reading and writing


def candidates_of(arguments: argparse.Namespace, most: int | None, prompts: Collection[str]) -> dict[str, list[Candidate]]:
    """Return the candidates of these prompts with their judgements, the first `most` of each prompt."""
    p_yes = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(arguments.scores, "scores")}
    right = {row["candidate_id"]: row["verdict"] for row in manifests.read_rows(arguments.verdicts, "verdicts")}
    found: dict[str, list[Candidate]] = {prompt: [] for prompt in prompts}
    for row in manifests.read_rows(arguments.candidates, "candidates", without=("tokens", "latents")):
        name, prompt = row["candidate_id"], row["prompt_id"]
        if prompt not in found or (most is not None and row["index"] >= most):
            continue
        for known, files in ((p_yes, arguments.scores), (right, arguments.verdicts)):
            if files and name not in known:
                raise UserError(f"{files[0]}: candidate {name} is not judged; judge that candidate manifest again")
        found[prompt].append(Candidate(name, prompt, row["round"], p_yes[name], right.get(name)))
    return found


def write(arguments: argparse.Namespace, config: Config, rows: list[Row], parents: list[Path]) -> None:
    arm = config.arms[arguments.arm]
    facts = {"objective": arm.objective, "candidates": arm.candidates, **config.arm_pairs(arguments.arm).model_dump()}
    manifests.write(arguments.out, "pairs", rows, stage="stages.controls", settings=facts, parents=parents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    first = actions.add_parser("match", help="the prompts and numbers of rows of another selection, other candidates")
    first.add_argument("--like", type=Path, required=True, help="pairs manifest of the selection that is matched")
    first.add_argument("--prompts", type=Path, required=True, help="manifest of the training prompts")
    first.set_defaults(action=match)
    second = actions.add_parser("more", help="as many further rows as a replay has recovered")
    second.add_argument("--selected", type=Path, nargs="+", required=True, help="pairs manifests of the rows so far")
    second.add_argument("--recovered", type=Path, required=True, help="pairs manifest of the replay")
    second.set_defaults(action=more)
    for action in (first, second):
        action.add_argument("--config", type=Path, required=True)
        action.add_argument("--arm", required=True, help="the arm whose objective and settings apply")
        action.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests of the base model")
        action.add_argument("--scores", type=Path, nargs="+", required=True, help="the model's own scores of the candidates")
        action.add_argument("--verdicts", type=Path, nargs="*", default=[], help="with filter oracle: that judge's verdicts")
        action.add_argument("--out", type=Path, required=True, help="pairs manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    if arguments.arm not in config.arms:
        raise UserError(f"--arm {arguments.arm}: not in {arguments.config}; arms there: {', '.join(config.arms)}")
    if config.arm_pairs(arguments.arm).filter == "oracle" and not arguments.verdicts:
        raise UserError(
            f"--verdicts: missing; arm {arguments.arm} has filter oracle, so give the verdicts of its judge on the candidates"
        )
    arguments.action(arguments, config)


if __name__ == "__main__":
    run_stage(main)
