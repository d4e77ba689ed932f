"""The measures, on verdicts written by hand."""

import numpy as np
import pytest

from stages.tools import metrics
from stages.tools.metrics import Images

PROMPTS = [{"prompt_id": "p", "category": "color"}, {"prompt_id": "q", "category": "shape"}]
WHERE = {"p1": "p", "p2": "p", "p3": "p", "q1": "q", "q2": "q"}


def images(judge: str, und: str) -> Images:
    """Verdicts of p1, p2, p3, q1, q2 as five characters: 1, 0, or ? for unreadable."""
    read = {"1": True, "0": False, "?": None}
    return Images(
        WHERE,
        {name: read[mark] for name, mark in zip(WHERE, judge, strict=True)},
        {name: read[mark] for name, mark in zip(WHERE, und, strict=True)},
    )


def overall(metric: str, own: Images, base: Images, after: dict) -> tuple[int, int]:
    numerator, denominator = metrics.count(PROMPTS, own, base, after)[metric].sum((1, 2))
    return int(numerator), int(denominator)


def test_generation_and_non_unification_are_over_own_images():
    own = images("11010", "1100?")
    assert overall("gen", own, own, own.und) == (3, 5)
    assert overall("non", own, own, own.und) == (2, 4)
    assert overall("weak_generation", own, own, own.und) == (1, 2)
    assert overall("judge_on_own", own, own, own.und) == (3, 4)


def test_win_rate_counts_only_where_base_and_trained_differ():
    base = images("10101", "11001")
    after = images("10101", "10111").und  # p2 and p3 are put right, q1 is put wrong
    assert overall("und", base, base, after) == (2, 3)
    assert overall("false_positive_fixed", base, base, after) == (1, 5)
    assert overall("true_positive_broken", base, base, after) == (0, 5)
    assert overall("judge_on_base", base, base, after) == (4, 5)


def test_a_broken_true_positive_is_counted():
    base = images("11000", "11000")
    assert overall("true_positive_broken", base, base, images("11000", "10000").und) == (1, 5)


def test_an_unreadable_verdict_is_no_disagreement():
    base = images("11111", "1?111")
    assert overall("und", base, base, images("11111", "11?00").und) == (0, 2)


def test_no_disagreement_is_50_with_n_0():
    base = images("10101", "11001")
    counts = metrics.count(PROMPTS, base, base, base.und)["und"]
    groups = metrics.groups_of(PROMPTS)["overall"]
    row = metrics.summarise("und", counts, counts, groups, 100, 0)
    assert (row["value"], row["denominator"], row["ci_low"]) == (50.0, 0, None)


def test_without_an_external_judge_there_is_only_non():
    own = images("?????", "1100?")
    counts = metrics.count(PROMPTS, own, own, own.und)
    assert {name: found.sum((1, 2)).tolist() for name, found in counts.items()} == {"non": [2, 4]}


def test_overall_is_the_unweighted_mean_over_categories():
    own = images("11010", "11111")
    counts = metrics.count(PROMPTS, own, own, own.und)["gen"]
    groups = metrics.groups_of(PROMPTS)
    assert metrics.share("gen", counts, groups["color"]) == pytest.approx(200 / 3)
    assert metrics.share("gen", counts, groups["overall"]) == pytest.approx((200 / 3 + 50) / 2)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """400 draws of 60 prompts with 4 images that share a prompt's difficulty: 95 % intervals cover 92 to 98 %."""
    generator = np.random.default_rng(0)
    covered = 0
    groups = [np.arange(60)]
    for trial in range(400):
        ease = generator.beta(1, 1, size=60)
        numerator = generator.binomial(4, ease)
        counts = np.stack([numerator, np.full(60, 4)])[:, None, :]
        low, high = metrics.interval(metrics.resample(counts, groups, 400, trial))
        covered += low <= 50 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_differences_to_base_are_paired():
    generator = np.random.default_rng(1)
    base = np.stack([generator.binomial(4, generator.beta(1, 1, size=60)), np.full(60, 4)])[:, None, :]
    better = base.copy()
    better[0, 0, ::6] = np.minimum(better[0, 0, ::6] + 1, 4)
    row = metrics.summarise("gen", better, base, [np.arange(60)], 1000, 0)
    assert row["delta_ci_low"] >= 0
    assert row["delta_ci_high"] - row["delta_ci_low"] < (row["ci_high"] - row["ci_low"]) / 2
