"""The audit: numbers on tables whose truth is known, the forecast against simulated trainings, and what the workflow plans."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from stages.families.toy.family import write_checkpoint

from stages.audit import decide, pick, strata_of
from stages.common import manifests
from stages.common.config import Audit, Pairs, load, validate
from stages.common.errors import UserError
from stages.pairs import select
from stages.suites import open_suite
from stages.tools import forecast
from stages.tools.forecast import Line, Plan, Value
from stages.tools.forecast_check import audited
from stages.tools.kappa import agree, kappa
from tests.helpers import (
    ROOT,
    SMALL,
    TINY,
    completed,
    copy_of_the_project,
    done,
    environment,
    merged,
    refused,
    snakemake,
    stage,
    write_config,
)
from tests.test_science import APPLE, LAPTOP, write_benchmark
from tests.test_toy_workflow import register
from tests.tiny_show_o import write_tiny_show_o
from tests.tiny_vlm import write_tiny_vlm

PAPER = ROOT / "stages/paper/results.csv"
SFT = Plan("sft", candidates=10, accept=0.85, reject=0.5, most=4)
DPO = Plan("dpo", candidates=10, accept=0.85, reject=0.5, most=1)
ASSUMED = (0.1, 0.4, 0.7)


# --- agreement -------------------------------------------------------------------------------------------------------


def test_kappa_of_counts_that_are_worked_out_by_hand():
    # 20 and 15 of 50 agree; chance alone would let 0.5 of them agree: (0.7 - 0.5) / (1 - 0.5).
    assert kappa(np.array([20, 5, 10, 15])) == pytest.approx(0.4)
    assert kappa(np.array([[5, 0, 0, 5], [0, 5, 5, 0]])).tolist() == [1, -1]
    assert np.isnan(kappa(np.array([[8, 0, 0, 0], [0, 0, 0, 0]]))).all()


def test_agreement_has_an_interval_over_prompts_and_none_where_it_would_have_no_width():
    one, other = np.repeat([True, True, False, False], [20, 5, 10, 15]), np.repeat([True, False, True, False], [20, 5, 10, 15])
    equal, found = agree(one, other, np.arange(50), seed=0)
    assert (equal.value, equal.n, found.n) == (0.7, 50, 50)
    assert found.value == pytest.approx(0.4)
    assert 0.05 < found.low < 0.4 < found.high < 0.75
    doubled = agree(np.tile(one, 2), np.tile(other, 2), np.tile(np.arange(50), 2), seed=0)[1]
    assert doubled.high - doubled.low == pytest.approx(found.high - found.low, abs=0.03)  # the same prompts, not more of them
    assert agree(one, one, np.arange(50), seed=0)[1].low is None
    assert agree(np.ones(40, bool), np.ones(40, bool), np.arange(40), seed=0)[1].value is None


# --- the forecast ----------------------------------------------------------------------------------------------------


def p_yes_of(shares: np.ndarray, count: int, generator) -> np.ndarray:
    """Return p_yes `[prompts, count]` where each prompt has its own shares of accepted, undecided and rejected images."""
    cuts = np.cumsum(shares, axis=1)[:, None, :]
    places = (generator.random((len(shares), count))[:, :, None] > cuts).sum(-1)
    return np.array([0.95, 0.7, 0.1])[places]


def dirichlet(generator, prompts: int, correlation: float) -> np.ndarray:
    return generator.dirichlet(np.array([0.5, 0.2, 0.3]) * (1 - correlation) / correlation, size=prompts)


def group_of(p_yes: np.ndarray, plan: Plan) -> forecast.Group:
    prompts = np.repeat(np.arange(len(p_yes)), p_yes.shape[1])
    return forecast.group(p_yes.ravel(), (p_yes.ravel() > 0.5).astype(float), prompts, plan)


def trained(plan: Plan, correlation: float, prompts: int, generator) -> tuple[int, float]:
    """Return rows and pool in percent of a selection by the stage's own rule, for prompts of the same population."""
    settings = Pairs(accept_threshold=plan.accept, reject_threshold=plan.reject, chosen_per_prompt=plan.most)
    rows, waiting = 0, 0
    for number, values in enumerate(p_yes_of(dirichlet(generator, prompts, correlation), plan.candidates, generator)):
        judged = [
            {"candidate_id": f"{number}-{i}", "prompt_id": str(number), "round": 0, "p_yes": p} for i, p in enumerate(values)
        ]
        found, reason = select(judged, plan.objective, settings, 0)
        rows += len(found)
        waiting += reason is not None and reason["reason"] == "no_accepted"
    return rows, 100 * waiting / prompts


def test_without_correlation_prompts_are_alike_and_with_full_correlation_all_or_nothing():
    share = np.array([0.3])
    assert forecast.none_of(share, np.array([0.0]), 10) == pytest.approx(0.7**10, rel=0.1)
    assert forecast.none_of(share, np.array([1.0]), 10) == pytest.approx(0.7, abs=0.01)
    assert forecast.expected(share, np.array([0.0]), 10, 10) == pytest.approx(3, abs=0.01)
    assert forecast.expected(share, np.array([1.0]), 10, 4) == pytest.approx(0.3 * 4, abs=0.03)


@pytest.mark.parametrize("plan", [SFT, DPO], ids=["sft", "dpo"])
def test_the_forecast_covers_what_a_selection_then_finds(plan):
    generator, covered, missed = np.random.default_rng(1), 0, []
    for _ in range(12):
        audited = p_yes_of(dirichlet(generator, 150, 0.3), 3, generator)
        found = forecast.selection({"all": group_of(audited, plan)}, plan, 300, ASSUMED, seed=0)
        rows, pool = trained(plan, 0.3, 300, generator)
        covered += (found["rows"].low <= rows <= found["rows"].high) + (found["pool"].low <= pool <= found["pool"].high)
        missed.append(found["rows"].value / rows - 1)
    assert covered >= 20  # of 24; 95 % would be 22.8
    assert abs(np.mean(missed)) < 0.05
    assert found["correlation"].low < 0.3 < found["correlation"].high


def test_one_image_for_each_prompt_widens_the_forecast_to_the_assumed_range():
    generator = np.random.default_rng(2)
    audited = p_yes_of(dirichlet(generator, 400, 0.3), 4, generator)
    several = forecast.selection({"all": group_of(audited, SFT)}, SFT, 300, ASSUMED, seed=0)
    single = forecast.selection({"all": group_of(audited[:, :1], SFT)}, SFT, 300, ASSUMED, seed=0)
    assert single["correlation"].value == 0.4
    assert single["rows"].high - single["rows"].low > 2 * (several["rows"].high - several["rows"].low)
    for correlation in (0.15, 0.65):
        rows, _ = trained(SFT, correlation, 2000, generator)
        assert single["rows"].low < rows * 300 / 2000 < single["rows"].high


@pytest.mark.parametrize("p_yes", [0.1, 0.9])
def test_prompts_that_all_agree_do_not_make_the_forecast_certain(p_yes):
    few = forecast.group(np.full(40, p_yes), np.ones(40), np.arange(40), SFT)
    found = forecast.selection({"all": few}, SFT, 6000, ASSUMED, seed=0)
    assert found["rows"].low <= found["rows"].value <= found["rows"].high
    assert found["rows"].high - found["rows"].low > 300
    assert found["pool"].high - found["pool"].low > 0.3


def test_precision_weighs_categories_by_their_rows_and_is_exact_without_an_error():
    many = forecast.group(np.full(60, 0.9), np.repeat([1.0, 0.0], [30, 30]), np.arange(60), SFT)
    none = forecast.group(np.full(60, 0.1), np.ones(60), np.arange(60), SFT)
    found = forecast.selection({"many": many, "none": none}, SFT, 100, ASSUMED, seed=0)
    assert found["precision"].value == pytest.approx(50)
    assert found["pool"].value == pytest.approx(50, abs=0.5)
    right = forecast.group(np.full(60, 0.9), np.ones(60), np.arange(60), SFT)
    sure = forecast.selection({"right": right}, SFT, 100, ASSUMED, seed=0)["precision"]
    assert (sure.value, sure.high) == (100, 100)
    assert 93 < sure.low < 95  # Clopper and Pearson's for 60 of 60
    alike = forecast.group(np.full(60, 0.9), np.ones(60), np.arange(60) // 20, SFT)
    unsure = forecast.selection({"alike": alike}, SFT, 100, ASSUMED, seed=0)["precision"]
    assert 29 < unsure.low < 30  # that for 3 of 3, because images of one prompt resemble each other
    unjudged = forecast.group(np.full(60, 0.9), np.full(60, np.nan), np.arange(60), SFT)
    assert forecast.selection({"a": unjudged}, SFT, 100, ASSUMED, seed=0)["precision"] == Value(None)


def test_the_line_of_the_gain_is_a_regression_with_the_papers_correlation():
    from scipy.stats import linregress

    line = forecast.paper_line(PAPER)
    assert len(line.non) == 6
    assert (26.22, pytest.approx(8.08)) in list(zip(line.non, line.gain, strict=True))
    fit = linregress(line.non, line.gain)
    own = Line(line.non, line.gain, correlation=fit.rvalue)
    assert own.slope == pytest.approx(fit.slope)
    assert own.at(10.0) == pytest.approx(fit.intercept + 10 * fit.slope)
    at_mean = own.predicted(Value(float(np.mean(line.non))))
    rest = np.array(line.gain) - fit.intercept - fit.slope * np.array(line.non)
    half = 2.7764 * np.sqrt((rest**2).sum() / 4 * (1 + 1 / 6))  # Student's t with four degrees of freedom
    assert at_mean.high - at_mean.value == pytest.approx(half, rel=1e-3)
    assert line.predicted(Value(26.22)).high - line.predicted(Value(26.22)).low > 20  # wide, as it should be
    surer, vaguer = line.predicted(Value(20.0)), line.predicted(Value(20.0, 0.0, 60.0))
    assert vaguer.high - vaguer.value > surer.high - surer.value


# --- the verdict -----------------------------------------------------------------------------------------------------


def row(measure: str, value: float | None, low=None, high=None, **more) -> dict:
    return {"measure": measure, "value": value, "n": 100, "ci_low": low, "ci_high": high, **more}


def areas(*values: tuple[float, float, float]) -> list[dict]:
    return [
        row("auc", value, low, high, stratum="easy", category=f"subtask-{number}")
        for number, (value, low, high) in enumerate(values)
    ]


GOOD, WEAK = (0.95, 0.9, 1.0), (0.55, 0.45, 0.65)
MANY = [{"quantity": "rows", "value": 3000.0, "ci_low": 2000.0, "ci_high": 4000.0}]


@pytest.mark.parametrize(
    ("rows", "forecasts", "state", "sure", "weak"),
    [
        ([row("non", 40, 35, 45), *areas(GOOD, GOOD)], MANY, "train", True, 0),
        ([row("non", 40, 35, 45), *areas(GOOD, WEAK)], MANY, "train", True, 1),
        ([row("non", 7, 4, 11), *areas(GOOD, GOOD)], MANY, "train", False, 0),
        ([row("non", 40, 35, 45)], MANY, "train", False, 0),
        ([row("non", 1, 0.2, 3), *areas(GOOD)], MANY, "gap", True, 0),
        ([row("non", 4, 2, 7), *areas(GOOD)], MANY, "gap", False, 0),
        ([row("non", 40, 35, 45), *areas(WEAK, WEAK, GOOD)], MANY, "judge", True, 2),
        ([row("non", 40, 35, 45), *areas((0.6, 0.4, 0.8), WEAK, GOOD)], MANY, "judge", False, 2),
        (
            [row("non", 90, 85, 95), *areas(GOOD)],
            [{"quantity": "rows", "value": 40.0, "ci_low": 10.0, "ci_high": 90.0}],
            "rows",
            True,
            0,
        ),
        ([row("non", None)], MANY, "nothing", True, 0),
    ],
)
def test_the_verdict_looks_at_the_gap_then_at_the_judge_then_at_the_rows(rows, forecasts, state, sure, weak):
    found = decide(rows, forecasts, Audit())
    assert (found.state, found.sure, len(found.weak)) == (state, sure, weak)


def test_its_thresholds_are_settings():
    rows = [row("non", 40, 35, 45), *areas((0.75, 0.72, 0.78), GOOD)]
    assert decide(rows, MANY, Audit()).state == "train"
    assert decide(rows, MANY, Audit(least_gap=50)).state == "gap"
    assert decide(rows, MANY, Audit(least_auc=0.8, most_weak=0.4)).state == "judge"
    assert decide(rows, MANY, Audit(least_rows=5000)).state == "rows"


def test_strata_are_the_settings_or_the_benchmarks_difficulties_or_the_benchmarks():
    config = validate(merged(SMALL, {}))
    levels = {("g", "one"): "easy", ("c", "texture"): "medium", ("c", "shape"): None, ("s", "physics"): "hard"}
    found = strata_of(config, levels)
    assert list(found) == ["easy", "medium", "hard", "other"]
    assert (found["medium"], found["other"]) == ([("c", "texture")], [("c", "shape")])
    assert list(strata_of(config, dict.fromkeys(levels))) == ["g", "c", "s"]
    own = validate(merged(SMALL, {"audit": {"strata": {"mine": ["shape", "one"]}}}))
    assert strata_of(own, levels) == {"mine": [("c", "shape"), ("g", "one")]}
    wrong = validate(merged(SMALL, {"audit": {"strata": {"mine": ["shap"]}}}))
    with pytest.raises(UserError, match=r"audit\.strata\.mine: no benchmark has the category 'shap'; there are one, texture"):
        strata_of(wrong, levels)


# --- the stage, on manifests with known truth ---------------------------------------------------------------------------

FIELDS = {
    "run": "known",
    "evaluate": {"bootstrap": 200},
    "benchmarks": {
        name: {"prompts": {"source": "text", "files": ["x.txt"]}, "images_per_prompt": 1, "judge": "external"}
        for name in ("geneval", "others")
    },
    "judges": {name: {"kind": "table", "files": ["x.csv"]} for name in ("external", "people")},
    "audit": {
        "models": {
            "Janus-Pro-7B": {"checkpoint": str(TINY), "sampling": {"guidance_scale": 3.0}},
            "proud": {"checkpoint": str(TINY)},
        },
        "judges": ["people"],
    },
}
# own verdict, external verdict, number of images: 40 of a category.
CASES = [(False, False, 8), (False, True, 2), (True, True, 24), (True, False, 6)]


def write_known(folder: Path) -> tuple[Path, list]:
    """Write all manifests of an audit whose numbers are known, and return the configuration and the stage's arguments."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(FIELDS))
    arguments: list = ["--config", config, "--paper", PAPER, "--out", folder / "audit", "--prompts"]
    arguments += [folder / f"{name}.parquet" for name in FIELDS["benchmarks"]]
    counted: list = []
    for benchmark, (category, difficulty) in {"geneval": ("single_object", "easy"), "others": ("texture", "medium")}.items():
        prompts = [
            {"prompt_id": f"{benchmark}{i}", "prompt": f"x {i}", "category": category, "source": "text", "split": "text"}
            for i in range(40)
        ]
        manifests.write(
            folder / f"{benchmark}.parquet",
            "prompts",
            [p | {"difficulty": difficulty} for p in prompts],
            stage="stages.prompts",
        )
        said = [(own, external) for own, external, count in CASES for _ in range(count)]
        for model in FIELDS["audit"]["models"]:
            scores, verdicts, people = (folder / f"{model}-{benchmark}-{kind}.parquet" for kind in ("s", "v", "p"))
            rows: dict[str, list] = {"scores": [], "external": [], "people": []}
            for place, (own, external) in enumerate(said):
                image = {"candidate_id": f"{model}{benchmark}{place}", "prompt_id": f"{benchmark}{place}"}
                own = own or model == "proud"
                scored = {"p_yes": 0.95 if own else 0.1, "p_neither": 0.0, "verdict": own, "judge": "hash"}
                rows["scores"].append(image | scored)
                rows["external"].append(image | {"verdict": external, "judge": "external"})
                rows["people"].append(image | {"verdict": own if place % 2 else None, "judge": "people"})
            manifests.write(scores, "scores", rows["scores"], stage="stages.score")
            manifests.write(verdicts, "verdicts", rows["external"], stage="stages.judge")
            manifests.write(people, "verdicts", rows["people"], stage="stages.judge")
            metrics = folder / f"{model}-{benchmark}-m.parquet"
            done("evaluate", "--config", config, "--benchmark", benchmark, "--arm", model,
                 "--prompts", folder / f"{benchmark}.parquet", "--scores", scores, "--verdicts", verdicts, "--base-scores",
                 scores, "--base-verdicts", verdicts, "--arm-scores-of-base", scores, "--out", metrics)  # fmt: skip
            counted.append(metrics)
            arguments += ["--scores", benchmark, model, scores, "--verdicts", benchmark, model, verdicts, people]
    return config, [*arguments, "--metrics", *counted]


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    folder = tmp_path_factory.mktemp("known")
    _, arguments = write_known(folder)
    result = done("audit", *arguments)
    return folder, arguments, result.stdout


def values(folder: Path, model: str, measure: str, **where) -> list[dict]:
    rows = manifests.read_rows(folder / "audit/audit.parquet", "audit")
    wanted = {"model": model, "measure": measure, "category": None, **where}
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.parametrize(
    ("measure", "value", "n"),
    [
        ("non", 25.0, 40),
        ("gen", 65.0, 40),
        ("weak_generation", 80.0, 10),
        ("false_acceptance", 100 * 6 / 14, 14),
        ("false_refusal", 100 * 2 / 26, 26),
        ("judge_on_own", 80.0, 40),
        ("own_unreadable", 0.0, 40),
        ("auc", (24 * 8 + (2 * 8 + 24 * 6) / 2) / (26 * 14), 40),
    ],
)
def test_every_measure_is_the_known_one_by_subtask_stratum_and_together(known, measure, value, n):
    folder, _, _ = known
    (subtask,) = values(folder, "Janus-Pro-7B", measure, category="single_object")
    (stratum,) = values(folder, "Janus-Pro-7B", measure, stratum="easy")
    (together,) = values(folder, "Janus-Pro-7B", measure, stratum=None)
    for found in (subtask, stratum, together):
        assert found["value"] == pytest.approx(value)
        assert found["ci_low"] <= found["value"] <= found["ci_high"]
        assert found["ci_low"] < found["ci_high"]
    assert (subtask["n"], stratum["n"], together["n"]) == (n, n, 2 * n)
    assert together["ci_high"] - together["ci_low"] < stratum["ci_high"] - stratum["ci_low"]
    assert subtask["benchmark"] == "geneval" and subtask["stratum"] == "easy"


def test_kappa_is_measured_between_all_judges_on_what_both_have_judged(known):
    folder, _, _ = known
    found = {(row["judge"], row["other"]): row for row in values(folder, "Janus-Pro-7B", "kappa", stratum=None)}
    assert found.keys() == {("own", "external"), ("own", "people"), ("external", "people")}
    assert found["own", "external"]["value"] == pytest.approx((0.8 - 0.575) / 0.425)
    assert found["own", "external"]["n"] == 80
    assert (found["own", "people"]["value"], found["own", "people"]["n"]) == (1, 40)  # people judged every second image
    (by_people,) = values(folder, "Janus-Pro-7B", "weak_generation_by", stratum="easy")
    assert (by_people["value"], by_people["n"], by_people["other"]) == (100, 5, "people")
    assert values(folder, "proud", "kappa", stratum=None)[0]["value"] == 0  # who accepts everything agrees by chance


def test_a_model_that_refuses_nothing_has_no_gap_and_the_other_is_worth_a_training(known):
    folder, _, printed = known
    text = (folder / "audit/verdict.md").read_text()
    assert re.search(r"## Janus-Pro-7B: train", text)
    assert "## proud: gap too small" in text
    assert "The model refuses 25.0 % (" in text
    assert "Of these refusals 80.0 %" in text
    assert "0.53" in text
    assert printed.startswith("Janus-Pro-7B: train")
    forecasts = manifests.read_rows(folder / "audit/forecast.parquet", "forecast")
    own = {(row["selection"], row["quantity"]): row for row in forecasts if row["model"] == "Janus-Pro-7B"}
    assert own["sft", "precision"]["value"] == pytest.approx(80)
    assert own["sft", "rows"]["ci_low"] < own["sft", "rows"]["value"] < own["sft", "rows"]["ci_high"]
    assert own["sft", "rows"]["text"] is None and "assumed" in own["sft", "correlation"]["text"]
    assert own["sft", "gpu_hours"]["value"] > 0 and "estimate" in own["sft", "gpu_hours"]["text"]
    assert own["any", "verdict"]["text"].startswith("train")
    # Who accepts every image has no rejected one for DPO.
    proud = {(row["selection"], row["quantity"]): row for row in forecasts if row["model"] == "proud"}
    assert proud["dpo", "rows"]["value"] == pytest.approx(0, abs=0.01)


def test_the_tables_have_the_papers_number_only_where_it_can_be_compared(known):
    folder, _, _ = known
    with (folder / "audit/non.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["Janus-Pro-7B", "Janus-Pro-7B", "proud"]
    ours, paper, _ = rows
    assert (ours["easy mean"], ours["easy geneval single_object"], ours["easy mean_n"]) == ("25.0", "25.0", "40")
    assert (paper["easy mean"], paper["medium mean"], paper["easy geneval single_object"]) == ("6.24", "", "")
    assert "arXiv 2507.16663" in paper["source"]
    text = (folder / "audit/non.md").read_text()
    assert "| Janus-Pro-7B, paper | - | 6.24 |" in text
    assert "numbers are not known here" in text
    assert "guidance\\_scale 3.0" in text  # how each model has drawn
    for name in ("non", "judge", "agreement", "forecast"):
        latex = (folder / f"audit/{name}.tex").read_text()
        assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 0
    assert (folder / "audit/audit.png").read_bytes().startswith(b"\x89PNG")


def test_a_category_that_two_benchmarks_share_has_the_number_of_each():
    rows = [
        {"measure": "non", "stratum": "easy", "benchmark": name, "category": "color", "value": value}
        for name, value in (("first", 10.0), ("second", 90.0))
    ]
    rows.append({"measure": "non", "stratum": "easy", "benchmark": None, "category": None, "value": 50.0})
    assert [pick(rows, "non", "easy", (name, "color"))["value"] for name in ("first", "second")] == [10.0, 90.0]
    assert pick(rows, "non", "easy")["value"] == 50.0


def test_equal_inputs_give_equal_files_and_missing_ones_are_named(known, tmp_path):
    folder, arguments, _ = known
    again = [tmp_path if part == folder / "audit" else part for part in arguments]
    done("audit", *again)
    for path in (folder / "audit").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    place = arguments.index("--verdicts")
    refused(stage("audit", *arguments[:place], *arguments[place + 5 :]),
            "--verdicts geneval Janus-Pro-7B: the judge external has no row for Janus-Pro-7Bgeneval0")  # fmt: skip
    place = arguments.index("--scores")
    refused(stage("audit", *arguments[:place], *arguments[place + 4 :]), "--scores: none of Janus-Pro-7B on geneval")


# --- the configuration and the plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": {"sft": {"checkpoint": "x"}}}, "audit.models.sft: the run has a folder of this name, of an arm"),
        ({"models": {"tables": {"checkpoint": "x"}}}, "audit.models.tables: the run has a folder of this name"),
        ({"models": {"a": {"family": "jauns", "checkpoint": "x"}}}, "audit.models.a.family: unknown family 'jauns'"),
        (
            {"models": {"a": {"checkpoint": "x", "sampling": {"heat": 1}}}},
            "audit.models.a.sampling.heat: the family janus has no",
        ),
        ({"models": {"a": {"checkpoint": "x", "score": {"mode": "guess"}}}}, "audit.models.a.score.mode: "),
        ({"judges": ["crowd"]}, "audit.judges: no judge 'crowd'"),
        ({"strata": {"a": ["color"], "b": ["shape", "color"]}}, "audit.strata: the category color is listed twice"),
        ({"like": ["geneval"]}, "audit.like: geneval is not in benchmarks, which has validation"),
        ({"correlation": [0.5, 0.2, 0.7]}, "audit.correlation: the lowest, the assumed and the highest correlation must rise"),
    ],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        validate(merged(SMALL, {"audit": changes}))


def test_models_without_a_benchmark_are_refused():
    with pytest.raises(UserError, match=r"audit\.models: there is no benchmark"):
        validate({"audit": {"models": {"a": {"checkpoint": "x"}}}})


def test_an_audited_model_has_the_run_s_settings_but_its_own_model(tmp_path):
    changes = {"models": {"a": {"checkpoint": "x", "sampling": {"temperature": 0.5}, "score": {"mode": "answer"}}, "b": None}}
    config = validate(merged(SMALL, {"audit": changes}))
    assert config.to_audit() == ["a"]
    own = config.audited("a")
    assert (own.model.checkpoint, own.score.mode, own.score.question) == ("x", "answer", SMALL["score"]["question"])
    assert (own.sampling().temperature, own.sampling().guidance_scale) == (0.5, 5.0)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own.model_dump()))
    assert load(tmp_path / "own.yaml") == own
    assert validate(merged(SMALL, {})).to_audit() == ["base"]


def test_genevals_subtasks_are_those_that_are_asked_for(tmp_path):
    path = write_geneval(tmp_path / "evaluation_metadata.jsonl")
    suite = open_suite("geneval-subtasks")
    rows = suite.rows(suite.settings(source="geneval-subtasks", files=[str(path)], categories=["color_attr", "single_object"]))
    assert [row["category"] for row in rows] == ["single_object", "color_attr"]
    assert {row["difficulty"] for row in rows} == {"easy"}
    with pytest.raises(UserError, match=r"no prompt has the tag 'colour' of categories; there are single_object, counting"):
        suite.rows(suite.settings(source="geneval-subtasks", files=[str(path)], categories=["colour"]))


def write_geneval(path: Path) -> Path:
    tags, include = ("single_object", "counting", "two_object", "color_attr"), [{"class": "car", "count": 1}]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"tag": tag, "prompt": f"a photo for {tag}", "include": include}) + "\n" for tag in tags)
    )
    return path


@pytest.fixture
def real(tmp_path):
    """A folder with data/ and checkpoints/, as configs/audit.yaml expects them."""
    write_geneval(tmp_path / "data/geneval/evaluation_metadata.jsonl")
    (tmp_path / "data/t2i_compbench").mkdir()
    for name, prompt in (("texture", "a wooden chair"), ("spatial", "a dog on the left of a car"), ("complex", "a red fox.")):
        (tmp_path / f"data/t2i_compbench/{name}_val.txt").write_text(prompt + "\n")
    (tmp_path / "data/science-t2i").mkdir()
    write_benchmark(tmp_path / "data/science-t2i/test-00000-of-00001.parquet", LAPTOP, APPLE)
    (tmp_path / "checkpoints").mkdir()
    write_tiny_vlm(tmp_path / "checkpoints/Qwen2.5-VL-7B-Instruct")
    (tmp_path / "checkpoints/Janus-Pro-7B").symlink_to(TINY)
    write_tiny_show_o(tmp_path / "checkpoints/show-o-512x512")
    return tmp_path


def audit_plan(folder: Path, *arguments: object, **changes) -> subprocess.CompletedProcess:
    (folder / "config.yaml").write_text(yaml.safe_dump(changes))
    files = ("--configfile", ROOT / "configs/audit.yaml", folder / "config.yaml")
    command = list(map(str, ("snakemake", "audit", "--directory", folder, *arguments, *files)))
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def test_the_audit_with_real_paths_plans_every_model_on_three_benchmarks_and_trains_nothing(real):
    second = {"checkpoint": "checkpoints/Janus-Pro-7B", "sampling": {"guidance_scale": 2.0}}
    result = audit_plan(real, "-n", "--printshellcmds", audit={"models": {"second": second}}, generate={"shards": 1})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    drawn = re.findall(r"python -m stages\.generate --config (\S+) --prompts (\S+) .*--candidates (\d+)", result.stdout)
    assert sorted(drawn) == sorted(
        (f"results/audit/{model}/config.yaml", f"results/audit/prompts/{name}.parquet", "1")
        for model in ("Janus-Pro-7B", "Show-o", "second")
        for name in ("geneval", "t2i-compbench", "science-t2i")
    )
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", result.stdout, re.MULTILINE))
    counts = {
        "generate": "9",
        "score": "9",
        "judge_on_gpu": "9",
        "evaluate": "9",
        "audit_report": "1",
        "audit_judge_report": "1",
    }
    assert jobs == {"audit": "1", "prompts": "3", "total": "42", **counts}
    assert "stages.train" not in result.stdout
    refused(audit_plan(real, "-n", audit={"models": {"second": {"checkpoint": "checkpoints/absent"}}}),
            "audit.models.second: ", "checkpoints/absent")  # fmt: skip


def test_trained_arms_of_two_families_join_the_tiny_audit_once_their_runs_are_finished(tmp_path):
    trained = {}
    for family in ("tiny-janus", "tiny-show-o"):
        shutil.copytree(ROOT / "models" / family, tmp_path / "models" / family)
        for arm in ("sft", "dpo"):
            trained[f"{family}-{arm}"] = f"results/{family}/{arm}/checkpoint"
            shutil.copytree(ROOT / "models" / family, tmp_path / trained[f"{family}-{arm}"])
    files = [yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("tiny-audit", "tiny-audit-arms")]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(merged(*files)))
    plan = completed(tmp_path, "-n", "audit", "--printshellcmds")
    drawn = dict(
        re.findall(r"python -m stages\.generate --config results/tiny-audit-arms/(\S+)/config.yaml .*?--checkpoint (\S+)", plan)
    )
    assert drawn == trained | {name: f"models/{name}" for name in ("tiny-janus", "tiny-show-o")}
    assert "stages.train" not in plan


def test_any_configuration_can_be_audited_before_it_is_trained(tmp_path):
    write_config(tmp_path)
    text = completed(tmp_path, "-n", "audit", "--printshellcmds")
    jobs = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
    once = dict.fromkeys(("audit", "audit_judge_report", "audit_report", "evaluate", "prompt_sets"), "1")
    assert jobs == once | {"prompts": "2", "generate": "2", "score": "2", "judge": "2", "total": "13"}
    assert "--config results/small/run_config.yaml" in text
    assert snakemake(tmp_path, "-n", "precision").returncode == 0


def test_an_audit_depends_on_the_epochs_of_the_arms_and_on_measured_speeds(tmp_path):
    """From both follow its GPU hours."""
    source = copy_of_the_project(tmp_path)
    rules = source / "workflow/rules/audit.smk"  # whose command shall show them
    rules.write_text(
        rules.read_text().replace("python -m stages.audit", "{params.epochs} {input.speeds} python -m stages.audit")
    )
    speed = source / "speed/results/drawing.json"
    speed.parent.mkdir(parents=True)
    speed.write_text("{}")
    write_config(tmp_path / "run", audit={"device": "H100"})
    output = completed(tmp_path / "run", "-n", "--printshellcmds", "audit", source=source)
    assert f"{{'sft': 2, 'dpo': 1, 'c-sft': 2}} {speed} python -m stages.audit" in output


def test_the_forecast_is_held_against_what_a_run_has_selected_and_gained(run, tmp_path):
    _, folder, _ = run
    results = folder / "results/small"
    for shard in ("0000", "0001"):
        done("judge", "--config", results / "run_config.yaml", "--judge", "shapes",
             "--prompts", results / "prompts/train.parquet",
             "--candidates", results / f"base/candidates/train/{shard}.parquet",
             "--out", results / f"base/verdicts/shapes/train/{shard}.parquet")  # fmt: skip
    table, plot = tmp_path / "forecast.csv", tmp_path / "forecast.png"
    printed = done("tools.forecast_check", "--runs", results, "--out", table, "--plot", plot).stdout
    frame = pandas.read_csv(table)
    pairs, discard = (pandas.read_parquet(results / f"sft/{name}.parquet") for name in ("pairs", "discard"))
    verdicts = pandas.concat(map(pandas.read_parquet, sorted((results / "base/verdicts/shapes/train").glob("*.parquet"))))
    found = frame[(frame.arm == "sft") & (frame.images == "first")].set_index("quantity").found
    assert found["rows"] == len(pairs)
    assert found["pool"] == pytest.approx(100 * (discard.reason == "no_accepted").sum() / 18, abs=1e-3)
    assert found["selected"] == pytest.approx(100 * pairs.prompt_id.nunique() / 18, abs=1e-3)
    right = verdicts.set_index("candidate_id").verdict[pairs.chosen]
    assert found["precision"] == pytest.approx(100 * right.mean(), abs=1e-3)
    assert set(frame.arm) == {"sft", "dpo", "c-sft"}  # c-sft has the selection of sft, and a gain of its own
    gain = frame[(frame.arm == "c-sft") & (frame.quantity == "gain") & (frame.category == "overall")].iloc[0]
    summary = pandas.read_csv(results / "summary.csv").set_index(["arm", "category"])
    assert gain.found == pytest.approx(summary.loc[("c-sft", "overall"), "gen_delta"], abs=2e-3)
    assert gain.error == pytest.approx(gain.forecast - gain.found, abs=2e-3)
    assert bool(gain.inside) == (gain.ci_low <= gain.found <= gain.ci_high)
    assert "gain, from all images: mean error" in printed
    assert "correlates with Non. before training at" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_further_judges_of_an_audit_do_not_stand_in_the_way_of_its_forecast(run, tmp_path):
    _, folder, _ = run
    fields = yaml.safe_load((folder / "results/small/run_config.yaml").read_text())
    fields["judges"] = {"people": {"kind": "table", "files": [str(tmp_path / "people.csv")]}}
    fields["audit"]["judges"] = ["people"]
    assert audited(folder / "results/small", validate(fields))["all"]


@pytest.mark.slow
def test_models_of_two_families_stand_side_by_side_without_an_external_judge(tmp_path):
    (tmp_path / "source").mkdir()
    source = copy_of_the_project(tmp_path / "source")
    shutil.copytree(ROOT / "tests/families/toy", source / "stages/families/toy")
    register(source, "families", '"toy": "stages.families.toy:TOY",')
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "animals.txt").write_text("".join(f"a {word}\n" for word in ("cat", "dog", "bird", "horse")))
    fields = {
        "run": "two",
        "audit": {
            "models": {
                "autoregressive": {"checkpoint": str(TINY), "score": {"question": "does this image show {prompt} ?"}},
                "flow": {"family": "toy", "checkpoint": str(checkpoint), "sampling": {"steps": 3}},
            }
        },
        "benchmarks": {
            "animals": {"prompts": {"source": "text", "files": [str(tmp_path / "animals.txt")]}, "images_per_prompt": 2}
        },
        "generate": {"shards": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    completed(tmp_path, "--cores", 1, source=source)
    results = tmp_path / "results/two"
    sizes = {
        m: pandas.read_parquet(results / m / "candidates/animals/0000.parquet").width[0] for m in fields["audit"]["models"]
    }
    assert sizes["autoregressive"] != sizes["flow"]
    rows = manifests.read_rows(results / "audit/audit.parquet", "audit")
    gaps = {row["model"]: row["n"] for row in rows if row["measure"] == "non" and row["category"] == "animals"}
    assert gaps == {"autoregressive": 8, "flow": 8}
    assert {row["stratum"] for row in rows} == {"animals", None}
    text = (results / "audit/verdict.md").read_text()
    assert text.count("How good its own judge is cannot be said") == 2
    assert not (results / "audit/judge_report.parquet").exists()
    assert not (results / "audit/agreement.md").exists()


@pytest.mark.slow
def test_a_tiny_audit_from_prompts_to_the_verdict(tmp_path):
    fields = yaml.safe_load((ROOT / "configs/tiny-audit.yaml").read_text())
    fields["audit"]["models"] = {
        "one": {"checkpoint": str(TINY), "sampling": {"guidance_scale": 1.0}},
        "other": {"checkpoint": str(TINY), "sampling": {"guidance_scale": 1.0, "temperature": 2.0}},
    }
    fields["benchmarks"]["validation"]["prompts"]["count"] = 36
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    text = completed(tmp_path, "--cores", 2)
    assert "one: " in text
    audit = tmp_path / "results/tiny-audit/audit"
    rows = manifests.read_rows(audit / "audit.parquet", "audit")
    assert {row["stratum"] for row in rows} == {"easy", "medium", "hard", None}
    gap = {row["model"]: row["value"] for row in rows if row["measure"] == "non" and row["stratum"] is None}
    assert gap["one"] < gap["other"]  # who draws at a higher temperature draws worse, and the judge sees it
    assert manifests.read_rows(audit / "judge_report.parquet", "judge_report")
    assert "## other: " in (audit / "verdict.md").read_text()
    assert "Nothing to be done" in completed(tmp_path, "-n", "audit")
