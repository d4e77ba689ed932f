"""Count: from manifests of images, verdicts and scores to the metrics, with 95 % intervals clustered by prompt.

    python -m stages.evaluate --config config.yaml --arm sft --prompts heldout.parquet --verdicts ... --scores ... \\
        --base-verdicts ... --base-scores ... --arm-scores-of-base ... --out metrics.parquet

No model is loaded. Definitions (arXiv 2507.16663, sections 2 and 4), und being the model's own verdict and judge the external
one:

gen                    share of images that the judge says match
non                    share of the model's own images with und = 0
weak_generation        P(judge = 0 | und = 0): where the model refuses its own image, how often the judge agrees
und                    win rate on the base model's images: of the verdicts on which base and trained model differ, the share
                       where the trained one agrees with the judge; 50 with n = 0 where none differ, as the paper has it
false_positive_fixed   share of base images with (judge, before, after) = (0, 1, 0)
true_positive_broken   share of base images with (judge, before, after) = (1, 1, 0)
judge_on_base          share of base images on which und agrees with the judge
judge_on_own           the same on the model's own images
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stages.common import manifests
from stages.common.config import load
from stages.common.runtime import UserError, run_stage
from stages.common.seeds import hash_seed

Verdicts = dict[str, bool | None]  # by candidate_id
Counts = tuple[np.ndarray, np.ndarray]  # numerator and denominator by prompt


def verdicts_of(paths: list[Path], threshold: float) -> tuple[Verdicts, dict[str, str]]:
    """Verdict (None: unreadable) and prompt_id by candidate_id."""
    rows = manifests.read_rows(paths, "scores")
    found = {row["candidate_id"]: None if row["p_yes"] is None else row["p_yes"] >= threshold for row in rows}
    return found, {row["candidate_id"]: row["prompt_id"] for row in rows}


def bootstrap(counts: Counts, groups: list[np.ndarray], rounds: int, seed: int) -> tuple[float | None, float | None]:
    """Percentile interval of 100 x the mean over groups of numerator / denominator, resampling prompts within groups.

    Resamples in which a group's denominator is 0 leave that group out; None where every resample is empty.
    """
    generator = np.random.default_rng(seed)
    total = np.zeros(rounds)
    used = np.zeros(rounds)
    for group in groups:
        picks = generator.integers(len(group), size=(rounds, len(group)))
        numerator, denominator = (part[group][picks].sum(1) for part in counts)
        some = denominator > 0
        total[some] += numerator[some] / denominator[some]
        used += some
    values = 100 * total[used > 0] / used[used > 0]
    return (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) if len(values) else (None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="base, or the arm's name")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest of the evaluation")
    parser.add_argument("--verdicts", type=Path, nargs="+", required=True, help="the judge on the arm's images")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="the arm on its own images")
    parser.add_argument("--base-verdicts", type=Path, nargs="+", required=True, help="the judge on the base model's images")
    parser.add_argument("--base-scores", type=Path, nargs="+", required=True, help="the base model on its own images")
    parser.add_argument("--arm-scores-of-base", type=Path, nargs="+", required=True, help="the arm on the base's images")
    parser.add_argument("--out", type=Path, required=True, help="metrics manifest")
    arguments = parser.parse_args()
    config = load(arguments.config)
    settings = config.evaluate
    own_judge, own_prompts = verdicts_of(arguments.verdicts, 0.5)
    own_und, _ = verdicts_of(arguments.scores, settings.verdict_threshold)
    judge, base_prompts = verdicts_of(arguments.base_verdicts, 0.5)
    before, _ = verdicts_of(arguments.base_scores, settings.verdict_threshold)
    after, _ = verdicts_of(arguments.arm_scores_of_base, settings.verdict_threshold)
    for one, other, path in (
        (own_judge, own_und, arguments.scores),
        (judge, before, arguments.base_scores),
        (judge, after, arguments.arm_scores_of_base),
    ):
        if one.keys() != other.keys():
            raise UserError(f"{path[0]}: scores other images than the verdicts; give the manifests of one image set")
    prompts = manifests.read_rows(arguments.prompts, "prompts")
    place = {row["prompt_id"]: i for i, row in enumerate(prompts)}

    def count(where: dict[str, str], counted: Callable[[str], bool], among: Callable[[str], bool]) -> Counts:
        numerator, denominator = np.zeros(len(prompts), dtype=np.int64), np.zeros(len(prompts), dtype=np.int64)
        for candidate, prompt in where.items():
            if among(candidate):
                denominator[place[prompt]] += 1
                numerator[place[prompt]] += counted(candidate)
        return numerator, denominator

    def readable(*verdicts: Verdicts) -> Callable[[str], bool]:
        return lambda c: all(v[c] is not None for v in verdicts)

    both = readable(before, after)
    metrics: dict[str, Counts] = {
        "gen": count(own_prompts, lambda c: own_judge[c] is True, lambda c: True),
        "non": count(own_prompts, lambda c: own_und[c] is False, readable(own_und)),
        "weak_generation": count(own_prompts, lambda c: own_judge[c] is False, lambda c: own_und[c] is False),
        "und": count(base_prompts, lambda c: after[c] == judge[c], lambda c: both(c) and before[c] != after[c]),
        "false_positive_fixed": count(base_prompts, lambda c: (judge[c], before[c], after[c]) == (False, True, False), both),
        "true_positive_broken": count(base_prompts, lambda c: (judge[c], before[c], after[c]) == (True, True, False), both),
        "judge_on_base": count(base_prompts, lambda c: after[c] == judge[c], readable(after)),
        "judge_on_own": count(own_prompts, lambda c: own_und[c] == own_judge[c], readable(own_und)),
    }
    categories = sorted({row["category"] for row in prompts})
    members = {name: np.array([i for i, row in enumerate(prompts) if row["category"] == name]) for name in categories}
    rows = []
    for metric, counts in metrics.items():
        for category in [*categories, "overall"]:
            groups = list(members.values()) if category == "overall" else [members[category]]
            parts = [(int(counts[0][group].sum()), int(counts[1][group].sum())) for group in groups]
            shares = [numerator / denominator for numerator, denominator in parts if denominator]
            value = 100 * sum(shares) / len(shares) if shares else (50.0 if metric == "und" else None)
            low, high = bootstrap(counts, groups, settings.bootstrap, hash_seed("bootstrap", metric, category))
            rows.append(
                {
                    "run": config.run, "arm": arguments.arm, "benchmark": settings.judge, "category": category,
                    "metric": metric, "value": value, "n": sum(len(group) for group in groups),
                    "numerator": sum(part[0] for part in parts), "denominator": sum(part[1] for part in parts),
                    "ci_low": low, "ci_high": high, "seed": config.seed,
                }
            )  # fmt: skip
    parents = [arguments.prompts, *arguments.verdicts, *arguments.scores, *arguments.base_verdicts]
    parents += [*arguments.base_scores, *arguments.arm_scores_of_base]
    manifests.write(arguments.out, "metrics", rows, stage="stages.evaluate", settings=settings.model_dump(), parents=parents)
    overall = {row["metric"]: row for row in rows if row["category"] == "overall"}
    print(
        f"{arguments.arm}: "
        + ", ".join(f"{name} {row['value']:.1f}" for name, row in overall.items() if row["value"] is not None)
    )


if __name__ == "__main__":
    run_stage(main)
