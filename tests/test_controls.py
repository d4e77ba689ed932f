"""Controls: the same training data but for who has judged, and the same replay but for who has drawn and judged."""

from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest

from stages import controls
from stages.common import manifests
from stages.common.config import Pairs, validate
from stages.common.errors import UserError
from stages.controls import Candidate, choices, further_rows, match_selection
from stages.tools.arms import nodes, replays, selection_owner
from tests.helpers import SMALL, completed, edited, merged, planned_outputs, refused, rerun, restored, stage, write_config

CONTROLS = {
    "sft-nobody": {"objective": "sft", "epochs": 2, "pairs": {"matched": True, "filter": "everything"}},
    "sft-truth": {"objective": "sft", "epochs": 2, "pairs": {"matched": True, "filter": "oracle", "oracle": "shapes"}},
    "dpo-nobody": {"objective": "dpo", "epochs": 1, "pairs": {"matched": True, "filter": "everything"}},
    "dpo-truth": {"objective": "dpo", "epochs": 1, "pairs": {"matched": True, "filter": "oracle", "oracle": "shapes"}},
    "c-sft-base": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "base"},
    "c-sft-more": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "nobody"},
    "c-sft-drawing": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "drawing"},
    "c-sft-judging": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "judging"},
}


def candidates(prompt: str, right: str, p_yes: list[float] | None = None) -> list[Candidate]:
    """Return candidates of a prompt: 1 is right, 0 is wrong, and ? is unknown."""
    truth = {"1": True, "0": False, "?": None}
    certain = p_yes or [0.5] * len(right)
    return [
        Candidate(f"{prompt}{i}", prompt, 0, p, truth[mark]) for i, (mark, p) in enumerate(zip(right, certain, strict=True))
    ]


def options(objective: str, filter_: str, seed: int = 0, **prompts: str):
    return {name: choices(candidates(name, right), objective, filter_, seed) for name, right in prompts.items()}


def counts(found) -> dict[str, int]:
    return {prompt: len(part) for prompt, part in found.items()}


def test_nobody_takes_any_candidate_of_the_same_prompts_at_random():
    wanted = {"p": 2, "q": 1}
    taken = set()
    for seed in range(60):
        found = match_selection(wanted, options("sft", "everything", seed, p="1000", q="00"), {}, seed)
        assert counts(found) == wanted
        taken |= {chosen.candidate_id for part in found.values() for chosen, _ in part}
    assert taken == {"p0", "p1", "p2", "p3", "q0", "q1"}


def test_the_truth_takes_right_candidates_and_repeats_them_only_when_they_are_too_few():
    found = match_selection({"p": 3, "q": 2}, options("sft", "oracle", p="10?1", q="0111"), {}, 0)
    assert sorted(chosen.candidate_id for chosen, _ in found["p"]) in (["p0", "p0", "p3"], ["p0", "p3", "p3"])
    assert len({chosen.candidate_id for chosen, _ in found["q"]}) == 2
    assert all(chosen.right for part in found.values() for chosen, _ in part)


def test_a_prompt_without_a_right_candidate_hands_its_rows_on_within_its_category():
    category_of = {"p": "color", "q": "color", "r": "color", "s": "shape"}
    wanted = {"p": 3, "q": 1, "r": 1, "s": 2}
    received = Counter()
    for seed in range(20):
        found = match_selection(wanted, options("sft", "oracle", seed, p="000", q="1110", r="1111", s="11"), category_of, seed)
        assert "p" not in found
        assert sum(counts(found).values()) == sum(wanted.values())
        assert counts(found)["s"] == 2, "the mix of categories stays"
        assert all(len(set(part)) == len(part) for part in found.values()), "no repetition while there are unused ones"
        received.update(counts(found))
    assert received["q"] > 20 and received["r"] > 20


def test_rows_leave_a_category_only_when_nothing_in_it_is_right():
    found = match_selection({"p": 2, "q": 1}, options("sft", "oracle", p="00", q="10"), {"p": "color", "q": "shape"}, 0)
    assert counts(found) == {"q": 3}


@pytest.mark.parametrize("filter_", ["everything", "oracle"])
def test_pairs_are_matched_in_number_and_never_hold_one_candidate_twice(filter_):
    category_of = dict.fromkeys("pqr", "color")
    found = match_selection(dict.fromkeys("pqr", 1), options("dpo", filter_, p="11", q="10", r="110"), category_of, 0)
    pairs = [pair for part in found.values() for pair in part]
    assert len(pairs) == 3
    assert all(chosen is not rejected for chosen, rejected in pairs)
    if filter_ == "oracle":
        assert "p" not in found, "it has no wrong candidate"
        assert all(chosen.right and not rejected.right for chosen, rejected in pairs)


def test_equal_seeds_choose_equally():
    assert options("dpo", "everything", 3, p="1010") == options("dpo", "everything", 3, p="1010")
    assert options("dpo", "everything", 3, p="1010") != options("dpo", "everything", 4, p="1010")


def row(chosen: str, rejected: str | None = None) -> dict:
    return {"prompt_id": chosen[0], "chosen": chosen, "rejected": rejected}


def test_further_rows_are_the_next_best_of_prompts_that_have_rows():
    by_prompt = {"p": candidates("p", "????", [0.95, 0.9, 0.8, 0.1]), "q": candidates("q", "???", [0.99, 0.7, 0.75])}
    selected, settings = [row("p0"), row("q0")], Pairs(accept_threshold=0.7)
    rows, repeated = further_rows(by_prompt, selected, 3, "sft", settings, 0)
    assert {r["chosen"] for r in rows[:2]} == {"p1", "q2"}, "every prompt has a turn before one has a second"
    assert rows[2]["chosen"] in ("p2", "q1")
    assert repeated == 0
    rows, repeated = further_rows(by_prompt, selected, 7, "sft", settings, 0)
    assert (len(rows), repeated) == (7, 3)
    assert {r["chosen"] for r in rows[4:]} == {"p0", "q0"}
    assert further_rows(by_prompt, selected, 0, "sft", settings, 0) == ([], 0)


def test_further_pairs_take_the_next_best_and_the_next_lowest():
    by_prompt = {"p": candidates("p", "?????", [0.95, 0.9, 0.3, 0.1, 0.2])}
    rows, repeated = further_rows(by_prompt, [row("p0", "p3")], 1, "dpo", Pairs(), 0)
    assert [(r["chosen"], r["rejected"], repeated) for r in rows] == [("p1", "p4", 0)]
    assert rows[0]["margin"] == pytest.approx(0.7)
    _, repeated = further_rows(by_prompt, [row("p0", "p3")], 1, "dpo", Pairs(minimum_margin=0.8), 0)
    assert repeated == 1


# The configuration


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"x": {"objective": "sft", "pairs": {"matched": True}}}, r"arms.x.pairs: matched is for controls"),
        (
            {"x": CONTROLS["sft-nobody"] | {"pairs": CONTROLS["sft-nobody"]["pairs"] | {"accept_threshold": 0.95}}},
            r"arms.x.pairs.matched: no arm has the selection .* objective sft",
        ),
        ({"x": CONTROLS["sft-nobody"] | {"candidates": 3}}, "arms.x.pairs.matched: no arm has the selection"),
        ({"x": CONTROLS["sft-nobody"] | {"replay_epochs": [1]}}, "arms.x.replay_epochs: a matched control has no discard pool"),
        ({"x": {"objective": "sft", "replay_by": "base"}}, "arms.x.replay_by: nothing is replayed"),
        ({"x": CONTROLS["c-sft-more"] | {"train": {"learning_rate": 1e-5}}}, "arms.x.replay_by: nobody adds .* replay_by self"),
        ({"sft-epoch1-by-base": {"objective": "sft", "epochs": 3}}, "this is the name of sft's checkpoint"),
    ],
)
def test_a_control_without_what_it_controls_is_refused(arms, words):
    with pytest.raises(UserError, match=words):
        validate(merged(SMALL, {"arms": arms}))


def test_a_file_laid_over_a_preset_removes_what_it_leaves_empty():
    config = validate(merged(SMALL, {"arms": {"dpo": None}, "benchmarks": {"validation": None}}))
    assert list(config.arms) == ["sft", "c-sft"]
    assert config.benchmarks == {}


def test_controls_share_what_does_not_differ_and_change_no_other_arm():
    before, config = validate(SMALL), validate(merged(SMALL, {"arms": CONTROLS}))
    tree, found = nodes(config), replays(config)
    assert {name: tree[name] for name in nodes(before)} == nodes(before)
    assert selection_owner(config, "sft-nobody") == "sft-nobody"
    assert config.counterpart("sft-truth") == "sft"
    assert tree["c-sft-base"].parent == tree["c-sft-more"].parent == "sft-epoch1"
    assert {name.removeprefix("sft-epoch1"): (replay.draws, replay.judges) for name, replay in found.items()} == {
        "": ("sft-epoch1", "sft-epoch1"),
        "-by-base": ("base", "base"),
        "-by-nobody": (None, None),
        "-by-drawing": ("sft-epoch1", "base"),
        "-by-judging": ("base", "sft-epoch1"),
    }
    assert found["sft-epoch1-by-nobody"].like == "sft-epoch1"


def test_a_second_replay_of_a_control_follows_its_own_first_one():
    twice = {"objective": "sft", "epochs": 3, "replay_epochs": [1, 2]}
    arms = {"c": twice, "c-more": twice | {"replay_by": "nobody"}, "c-base": twice | {"replay_by": "base"}}
    found = replays(validate(merged(SMALL, {"arms": arms})))
    assert found["c-more-epoch2-by-nobody"].before == ("sft-epoch1-by-nobody",)
    assert found["c-more-epoch2-by-nobody"].like == "c-epoch2"
    assert found["c-base-epoch2-by-base"].before == ("sft-epoch1-by-base",)


# The workflow


@pytest.fixture
def controlled(run):
    """The finished run, to whose configuration controls have been added."""
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, arms=CONTROLS)
        yield run


def test_controls_that_are_added_to_a_finished_run_run_nothing_else_again(controlled):
    assert "pairs" not in rerun(controlled)
    for name in ("generate", "score", "train", "reference", "controls match", "controls more", "evaluate"):
        planned = planned_outputs(controlled, name).splitlines()
        assert planned
        done = ("/sft/", "/dpo/", "/c-sft/", "/sft-epoch1/", "/base/")
        assert not [path for path in planned if any(part in path for part in done)], name


def read(results: Path, name: str, kind: str) -> list[dict]:
    return manifests.read_rows(sorted(results.glob(name)), kind)


@pytest.mark.parametrize(
    ("action", "more"), [("match", ["--like", "l", "--prompts", "p"]), ("more", ["--selected", "s", "--recovered", "r"])]
)
def test_a_control_of_the_truth_without_verdicts_is_refused(action, more, tmp_path):
    """Without them, every candidate would pass for one that nobody has judged."""
    arguments = ["--config", write_config(tmp_path, arms=CONTROLS), "--arm", "sft-truth", "--out", tmp_path / "pairs.parquet"]
    result = stage("controls", action, *arguments, "--candidates", "c", "--scores", "s", *more)
    refused(result, "--verdicts: missing; arm sft-truth has filter oracle")


def test_a_control_by_nobody_without_a_choice_is_refused_by_the_candidates(tmp_path, monkeypatch):
    """One candidate of a prompt makes no pair. There are no verdicts whose file the message could name."""
    config = validate(merged(SMALL, {"arms": CONTROLS}))
    monkeypatch.setattr(manifests, "read_rows", lambda path, kind: [{"prompt_id": "a", "category": "all"}])
    monkeypatch.setattr(controls, "candidates_of", lambda *arguments: {"a": candidates("a", "1")})
    files = {"like": "like", "prompts": "prompts", "candidates": ["drawn.parquet"], "verdicts": []}
    with pytest.raises(UserError, match=r"drawn.parquet: for no prompt of like is there a candidate"):
        controls.match(Namespace(arm="dpo-nobody", **files), config)


@pytest.mark.slow
def test_controls_have_the_rows_of_what_they_control(controlled):
    source, folder, _ = controlled
    arms = ("sft-nobody", "sft-truth", "dpo-nobody", "dpo-truth")
    replayed = [f"sft-epoch1-by-{who}" for who in ("base", "nobody", "drawing", "judging")]
    wanted = [f"results/small/{name}/pairs.parquet" for name in arms]
    wanted += [f"results/small/{name}/replay/pairs.parquet" for name in replayed]
    completed(folder, "--cores", 1, *wanted, source=source)
    results = folder / "results/small"
    right = {row["candidate_id"]: row["verdict"] for row in read(results, "base/verdicts/shapes/train/*.parquet", "verdicts")}
    category_of = {row["prompt_id"]: row["category"] for row in read(results, "prompts/train.parquet", "prompts")}
    for arm in arms:
        like = read(results, f"{arm.split('-')[0]}/pairs.parquet", "pairs")
        rows = read(results, f"{arm}/pairs.parquet", "pairs")
        assert len(rows) == len(like)
        if arm.endswith("nobody"):
            assert Counter(row["prompt_id"] for row in rows) == Counter(row["prompt_id"] for row in like)
            assert {row["chosen"] for row in rows} != {row["chosen"] for row in like}
        else:
            assert all(right[row["chosen"]] for row in rows)
            assert not any(right[row["rejected"]] for row in rows if row["rejected"])
            mixes = [Counter(category_of[row["prompt_id"]] for row in part) for part in (rows, like)]
            possible = {category_of[row["prompt_id"]] for row in rows}
            assert all(mixes[0][name] >= count for name, count in mixes[1].items() if name in possible)

    recovered = read(results, "sft-epoch1/replay/pairs.parquet", "pairs")
    more = read(results, "sft-epoch1-by-nobody/replay/pairs.parquet", "pairs")
    assert len(more) == len(recovered)
    assert {row["prompt_id"] for row in more} <= {row["prompt_id"] for row in read(results, "sft/pairs.parquet", "pairs")}
    drawn = [
        read(results, f"{name}/candidates/replay/*.parquet", "candidates") for name in ("sft-epoch1", "sft-epoch1-by-base")
    ]
    same = [[(row["prompt_id"], row["round"], row["seed"]) for row in part] for part in drawn]
    assert same[0] == same[1], "the same cost, round and seeds"
    assert {row["checkpoint"] for row in drawn[1]} == {
        row["checkpoint"] for row in read(results, "base/candidates/train/*.parquet", "candidates")
    }
    # One improved branch: the same images as with both or none, and another judge.
    for one, images in (("drawing", ""), ("judging", "-by-base")):
        mine, theirs = (f"sft-epoch1{who}" for who in (f"-by-{one}", images))
        tokens, scores = (
            [[row[column] for row in read(results, f"{name}/{kind}/replay/*.parquet", kind)] for name in (mine, theirs)]
            for kind, column in (("candidates", "tokens"), ("scores", "p_yes"))
        )
        assert tokens[0] == tokens[1]
        assert scores[0] != scores[1]


def test_an_edit_of_the_controls_runs_only_them(run):
    source, *_ = run
    with edited(source / "stages/controls.py"):
        assert rerun(run) == set()
