"""Pairs, discard pool, replay and schedule: from verdicts to training data."""

import numpy as np
import pytest

from stages.common import manifests
from stages.common.config import Pairs
from stages.common.settings import Score
from stages.families import describe
from stages.families.tools.asking import Answer, ask, parse_answer
from stages.pairs import select
from stages.schedule import plan
from tests.helpers import done, write_config


def candidates(*p_yes: float | None) -> list[dict]:
    return [{"candidate_id": f"c{i}", "prompt_id": "p", "round": 0, "p_yes": p} for i, p in enumerate(p_yes)]


def chosen(rows: list[dict]) -> list[str]:
    return [row["chosen"] for row in rows]


def test_sft_takes_the_most_certain_of_the_accepted():
    rows, discarded = select(candidates(0.2, 0.8, 0.95, 0.7, 0.75), "sft", Pairs(accept_threshold=0.7, chosen_per_prompt=3), 0)
    assert chosen(rows) == ["c2", "c1", "c4"]
    assert discarded is None


def test_every_accepted_one_without_a_limit():
    rows, _ = select(candidates(0.8, 0.1, 0.7), "sft", Pairs(accept_threshold=0.7, chosen_per_prompt=None), 0)
    assert sorted(chosen(rows)) == ["c0", "c2"]


def test_the_random_rule_depends_on_the_seed_and_takes_accepted_ones_only():
    settings = Pairs(accept_threshold=0.5, chosen_per_prompt=1, rule="random")
    picks = {chosen(select(candidates(0.9, 0.6, 0.7, 0.1), "sft", settings, seed)[0])[0] for seed in range(40)}
    assert picks == {"c0", "c1", "c2"}


def test_ties_do_not_lean_on_the_order_of_drawing():
    rows = candidates(0.9, 0.9, 0.9)
    settings = Pairs(accept_threshold=0.5, chosen_per_prompt=1)
    assert select(rows, "sft", settings, 3) == select(rows[::-1], "sft", settings, 3)


def test_dpo_pairs_the_most_positive_with_the_most_negative():
    rows, _ = select(candidates(0.3, 0.9, 0.05, 0.8), "dpo", Pairs(), 0)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("c1", "c2")]
    assert rows[0]["margin"] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("p_yes", "objective", "reason", "best"),
    [
        ((0.1, 0.6), "sft", "no_accepted", 0.6),
        ((None, None), "sft", "no_accepted", None),
        ((0.9, 0.8), "dpo", "no_rejected", 0.9),
        ((0.7, 0.45), "dpo", "small_margin", 0.7),
    ],
)
def test_a_prompt_without_data_says_why(p_yes, objective, reason, best):
    settings = Pairs(accept_threshold=0.7, reject_threshold=0.5, minimum_margin=0.3)
    rows, discarded = select(candidates(*p_yes), objective, settings, 0)
    assert rows == []
    assert discarded == {"prompt_id": "p", "round": 0, "best_p_yes": best, "reason": reason}


def test_an_unreadable_answer_is_neither_accepted_nor_rejected():
    rows, _ = select(candidates(None, 0.9, 0.2), "dpo", Pairs(), 0)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("c1", "c2")]


def test_the_control_without_a_filter_ignores_the_verdicts():
    settings = Pairs(filter="everything", chosen_per_prompt=2)
    rows, discarded = select(candidates(0.0, 0.1, 0.05), "sft", settings, 0)
    assert len(rows) == 2
    assert discarded is None


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("The image shows a cat. The score is 1.", True),
        ("The score is 0", False),
        ("the score is: **1**", True),
        ("The score is {0}.", False),
        ("Yes, it does.", True),
        ("No. The square is red.", False),
        ("1", True),
        ("The score is 1. On second thoughts the score is 0.", None),
        ("The score is 10.", None),
        ("A lovely picture.", None),
        ("", None),
    ],
)
def test_answers_are_read_or_counted_but_never_guessed(answer, verdict):
    assert parse_answer(answer) is verdict


def test_a_p_yes_that_is_no_number_is_unreadable_and_no_refusal():
    """It is 0 / 0 where the first token is certainly something else than yes or no."""

    class Family:
        def p_yes(self, images, questions, prefix):
            return np.array([0.9, np.nan, 0.1]), np.array([0.0, 1.0, np.nan])

    answers = ask(Family(), describe("janus"), Score(), np.zeros((3, 8, 8, 3), np.uint8), ["a", "b", "c"])
    assert answers[:2] == [Answer(True, 0.9, 0.0), Answer(None, None, 1.0)]
    assert (answers[2].verdict, answers[2].p_yes) == (False, 0.1)


def data(names: str) -> list[dict]:
    return [{"chosen": name, "rejected": None, "prompt_id": name} for name in names]


def test_a_longer_schedule_begins_with_the_shorter_one():
    short = plan([(0, data("abcdefg"))], 2, 4, 0)
    longer = plan([(0, data("abcdefg")), (2, data("xy"))], 4, 4, 0)
    assert longer[: len(short)] == short
    assert {row["chosen"] for row in longer[len(short) :]} == set("abcdefgxy")


def test_each_epoch_is_whole_steps_and_holds_every_row():
    rows = plan([(0, data("abcdefg"))], 3, 4, 0)
    assert [row["position"] for row in rows] == [0, 1, 2, 3] * 6
    for epoch in (1, 2, 3):
        order = [row["chosen"] for row in rows if row["epoch"] == epoch]
        assert sorted(order[:7]) == list("abcdefg")
        assert order[7] == order[0]
    assert len({tuple(row["chosen"] for row in rows if row["epoch"] == epoch) for epoch in (1, 2, 3)}) > 1


def test_the_order_depends_on_the_seed():
    assert plan([(0, data("abcdefg"))], 1, 7, 0) != plan([(0, data("abcdefg"))], 1, 7, 1)


def write_discard(path, reasons: dict[str, str]):
    rows = [{"prompt_id": p, "round": 0, "best_p_yes": 0.1, "reason": reason} for p, reason in reasons.items()]
    manifests.write(path, "discard", rows, stage="stages.pairs")


def test_replay_draws_waiting_prompts_and_recovered_ones_leave(tmp_path):
    config = write_config(tmp_path)
    done("prompts", "--config", config, "--set", "train", "--out", tmp_path / "prompts.parquet")
    one, two, three, *_ = (row["prompt_id"] for row in manifests.read_rows(tmp_path / "prompts.parquet", "prompts"))
    write_discard(tmp_path / "discard.parquet", {one: "no_accepted", two: "no_accepted", three: "small_margin"})
    files = ("--prompts", tmp_path / "prompts.parquet", "--discard", tmp_path / "discard.parquet")
    done("replay", "pool", *files, "--out", tmp_path / "pool.parquet")
    assert [row["prompt_id"] for row in manifests.read_rows(tmp_path / "pool.parquet", "prompts")] == [one, two]
    recovered = [{"prompt_id": one, "round": 1, "chosen": "c", "chosen_p_yes": 0.9}]
    manifests.write(tmp_path / "recovered.parquet", "pairs", recovered, stage="stages.pairs")
    again = [{"prompt_id": two, "round": 1, "best_p_yes": 0.5, "reason": "no_accepted"}]
    manifests.write(tmp_path / "again.parquet", "discard", again, stage="stages.pairs")
    files = ("--discard", tmp_path / "discard.parquet", "--recovered", tmp_path / "recovered.parquet")
    done("replay", "merge", *files, "--again", tmp_path / "again.parquet", "--out", tmp_path / "waiting.parquet")
    still = {row["prompt_id"]: row["best_p_yes"] for row in manifests.read_rows(tmp_path / "waiting.parquet", "discard")}
    assert still == {two: 0.5, three: 0.1}


def test_an_empty_pool_passes_through_every_stage(tmp_path):
    config = write_config(tmp_path)
    manifests.write(tmp_path / "pool.parquet", "prompts", [], stage="stages.replay")
    common = ("--config", config, "--prompts", tmp_path / "pool.parquet")
    files = {name: tmp_path / f"{name}.parquet" for name in ("candidates", "scores", "pairs", "discard")}
    done("generate", *common, "--shard", "1/2", "--out", files["candidates"], "--images", tmp_path / "candidates.tar")
    done("score", *common, "--candidates", files["candidates"], "--out", files["scores"])
    selection = ("--candidates", files["candidates"], "--scores", files["scores"], "--out", files["pairs"])
    done("pairs", "--config", config, "--arm", "c-sft", *selection, "--discard", files["discard"])
    assert manifests.read_rows(files["pairs"], "pairs") == []
    assert manifests.read_rows(files["discard"], "discard") == []
