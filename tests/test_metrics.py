"""The metrics, computed from hand-written verdicts."""

import numpy as np
import pytest

from stages import evaluate, report
from stages.common import manifests
from stages.common.errors import UserError
from stages.judges.base import Verdict
from stages.tools import metrics
from stages.tools.intervals import exact_interval, t_quantile, wilson
from stages.tools.metrics import Images, Judges

PROMPTS = [{"prompt_id": "p", "category": "color"}, {"prompt_id": "q", "category": "shape"}]
WHERE = {"p1": "p", "p2": "p", "p3": "p", "q1": "q", "q2": "q"}
READ = {"1": True, "0": False, "?": None}
JUDGE = Judges("judge")


def own(marks: str) -> dict[str, bool | None]:
    """Return verdicts on p1, p2, p3, q1 and q2, given as five characters: 1, 0, or ? for unreadable."""
    return {name: READ[mark] for name, mark in zip(WHERE, marks, strict=True)}


def external(marks: str, scores: list[float | None] | None = None) -> dict[str, Verdict]:
    """Return an external judge's verdicts in the same notation, with optional graded scores. A dot leaves an image out."""
    graded = zip(WHERE, marks, scores or [None] * 5, strict=True)
    return {name: Verdict(READ[mark], score) for name, mark, score in graded if mark != "."}


def images(judge: str, verdicts: str, scores: list[float | None] | None = None, **scorers: dict[str, Verdict]) -> Images:
    neither = dict.fromkeys(WHERE, None)
    return Images(WHERE, own(verdicts), neither, {"judge": external(judge, scores), **scorers})


def counted(metric: str, seen: Images, base: Images, trained: dict, judges: Judges = JUDGE) -> tuple[float, int]:
    numerator, denominator = metrics.count(PROMPTS, judges, seen, base, trained)[metric].sum((1, 2))
    return numerator, int(denominator)


# judge on the model's images, the model on its own | judge on the base model's images, the base model, the trained model
@pytest.mark.parametrize(
    ("metric", "case", "expected"),
    [
        ("gen", "11010 11111 | 11111 11111 11111", (3, 5)),
        ("gen", "110?? 11111 | 11111 11111 11111", (2, 3)),
        ("non", "11010 11000 | 11111 11111 11111", (3, 5)),
        ("non", "11010 1100? | 11111 11111 11111", (2, 4)),
        ("non", "????? 1100? | 11111 11111 11111", (2, 4)),
        ("weak_generation", "11010 1100? | 11111 11111 11111", (1, 2)),
        ("weak_generation", "11?10 1100? | 11111 11111 11111", (0, 1)),
        ("judge_on_own", "11010 1100? | 11111 11111 11111", (3, 4)),
        ("judge_on_own", "?1010 1100? | 11111 11111 11111", (2, 3)),
        ("false_acceptance", "11010 1100? | 11111 11111 11111", (0, 1)),
        ("false_acceptance", "00?01 11?01 | 11111 11111 11111", (2, 3)),
        ("false_refusal", "11010 1100? | 11111 11111 11111", (1, 3)),
        ("false_refusal", "1??11 00?1? | 11111 11111 11111", (1, 2)),
        ("own_unreadable", "11111 1?0?1 | 11111 11111 11111", (2, 5)),
        ("own_unreadable", "11111 11111 | 11111 ????? ?????", (0, 5)),
        ("judge_unreadable", "1?0?1 11111 | 11111 11111 11111", (2, 5)),
        ("judge_unreadable", "11111 ????? | ????? 11111 11111", (0, 5)),
        # the trained model corrects p2 and p3 and makes an error on q1
        ("und", "11111 11111 | 10101 11001 10111", (2, 3)),
        ("und_paper", "11111 11111 | 10101 11001 10111", (2, 3)),
        ("und_pooled", "11111 11111 | 10101 11001 10111", (2, 3)),
        ("false_positive_fixed", "11111 11111 | 10101 11001 10111", (1, 5)),
        ("true_positive_broken", "11111 11111 | 10101 11001 10111", (0, 5)),
        ("true_positive_broken", "11111 11111 | 11000 11000 10000", (1, 5)),
        ("judge_on_base", "11111 11111 | 10101 11001 10111", (4, 5)),
        # p1: judge unreadable, p2: base unreadable, p3: trained unreadable
        ("und", "11111 11111 | ?1111 1?101 01?11", (1, 1)),
        ("false_positive_fixed", "11111 11111 | ?0000 1?111 00?01", (1, 2)),
        ("true_positive_broken", "11111 11111 | ?1111 1?111 00?01", (1, 2)),
        ("judge_on_base", "11111 11111 | ?1111 1?101 01?11", (3, 3)),
    ],
)
def test_every_metric_counts_what_it_says_and_nothing_unreadable(metric, case, expected):
    judge, verdicts, _, judge_of_base, base, trained = case.split()
    found = counted(metric, images(judge, verdicts), images(judge_of_base, base), own(trained))
    assert found == expected


def test_a_graded_score_is_averaged_and_the_verdict_where_there_is_none():
    graded = images("11?0?", "11111", [0.9, None, 0.25, 0.0, None])
    assert counted("gen", graded, graded, graded.own) == (pytest.approx(2.15), 4)
    assert counted("judge_unreadable", graded, graded, graded.own) == (1, 5)
    assert counted("judge_on_own", graded, graded, graded.own) == (2, 3), "p3 has a score but no verdict"


def test_scores_outside_0_and_1_are_refused():
    for score in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Verdict(True, score)


def test_gen_uses_the_categorys_scorer_and_everything_else_the_judge():
    judges = Judges("judge", {"shape": "scorer"})
    seen = images("11111", "11111", scorer=external("...0?"))
    counts = metrics.count(PROMPTS, judges, seen, seen, seen.own)
    assert counts["gen"][:, 0].tolist() == [[3, 0], [3, 1]]
    assert counts["scorer_unreadable"][:, 0].tolist() == [[0, 1], [3, 2]]
    assert counts["judge_unreadable"][:, 0].tolist() == [[0, 0], [3, 2]]
    assert counts["judge_on_own"][:, 0].tolist() == [[3, 2], [3, 2]]
    names = {category: judges.of("gen", category, ["color", "shape"]) for category in ("color", "shape", "overall")}
    assert names == {"color": "judge", "shape": "scorer", "overall": "judge, scorer"}
    assert judges.of("und", "shape", ["color", "shape"]) == "judge"
    assert judges.of("non", "shape", ["color", "shape"]) is None


def test_without_an_external_judge_there_are_only_the_models_own_measures():
    seen = Images(WHERE, own("1100?"), dict.fromkeys(WHERE, 0.25) | {"p1": None})
    counts = metrics.count(PROMPTS, Judges(), seen, seen, seen.own)
    found = {name: part.sum((1, 2)).tolist() for name, part in counts.items()}
    assert found == {"non": [2, 4], "own_unreadable": [1, 5], "neither": [1, 4]}


def test_without_an_external_judge_the_scorers_still_measure_gen():
    judges = Judges(None, {"color": "scorer"})
    seen = Images(WHERE, own("11000"), dict.fromkeys(WHERE, None), {"scorer": external("110..")})
    counts = metrics.count(PROMPTS, judges, seen, seen, seen.own)
    assert set(counts) == {"gen", "non", "own_unreadable", "scorer_unreadable", "neither"}
    assert counts["gen"][:, 0].tolist() == [[2, 0], [3, 0]]
    assert metrics.share("gen", counts["gen"], metrics.groups_of(PROMPTS)["overall"]) == pytest.approx(200 / 3)


def test_a_second_scorer_measures_gen_once_more_in_its_categories_alone():
    judges = Judges("judge", {"color": "scorer"}, {"color": "upstream"})
    scored = {"scorer": external("110.."), "upstream": external("111..", [0.5, 0.25, 0.0, None, None])}
    seen = images("00011", "11111", **scored)
    counts = metrics.count(PROMPTS, judges, seen, seen, seen.own)
    assert counts["gen"][:, 0].tolist() == [[2, 2], [3, 2]]
    assert counts["gen_second"][:, 0].tolist() == [[0.75, 0], [3, 0]]
    assert metrics.share("gen_second", counts["gen_second"], metrics.groups_of(PROMPTS)["overall"]) == pytest.approx(25)
    assert judges.of("gen_second", "overall", ["color", "shape"]) == "upstream"
    assert judges.of("gen_second", "shape", ["color", "shape"]) is None
    del seen.external["upstream"]["p3"]
    with pytest.raises(UserError, match="the judge upstream has no row for 1 of the 3"):
        metrics.count(PROMPTS, judges, seen, seen, seen.own)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda seen: seen.external["judge"].pop("q2"), "the judge judge has no row for 1 of the 5 the arm's images"),
        (lambda seen: seen.external.clear(), "the judge judge has no row for 5 of the 5"),
        (lambda seen: seen.external["judge"].update(x=Verdict(True)), "verdicts on 1 images that are not in the scores"),
        (lambda seen: seen.prompt.update(p1="elsewhere"), "prompt_id elsewhere"),
    ],
)
def test_verdicts_on_other_images_are_refused(change, words):
    base, seen = images("11111", "11111"), images("11111", "11111")
    seen.prompt = dict(seen.prompt)
    change(seen)
    with pytest.raises(UserError, match=words):
        metrics.count(PROMPTS, JUDGE, seen, base, base.own)


def test_scores_of_other_base_images_are_refused():
    base = images("11111", "11111")
    with pytest.raises(UserError, match="--arm-scores-of-base"):
        metrics.count(PROMPTS, JUDGE, base, base, {"p1": True})


def test_no_disagreement_is_no_win_rate_and_50_as_the_paper_counts():
    base = images("10101", "11001")
    counts = metrics.count(PROMPTS, JUDGE, base, base, base.own)
    for metric, value in [("und", None), ("und_paper", 50.0), ("und_pooled", None)]:
        groups = metrics.groups_of(PROMPTS)["overall"]
        row = metrics.summarise(metric, counts[metric], counts[metric], groups, 100, 0)
        assert (row["value"], row["denominator"], row["ci_low"], row["delta_ci_low"]) == (value, 0, None, None)


def test_the_overall_win_rate_leaves_out_categories_that_the_paper_counts_as_50():
    prompts = [{"prompt_id": str(i), "category": f"category {i}"} for i in range(6)]
    seen = Images({str(i): str(i) for i in range(6)}, dict.fromkeys("012345", True), dict.fromkeys("012345", None))
    seen.external["judge"] = dict.fromkeys("012345", Verdict(True))
    counts = metrics.count(prompts, JUDGE, seen, seen, seen.own | {"0": False})
    groups = metrics.groups_of(prompts)["overall"]
    assert metrics.share("und", counts["und"], groups) == 0
    assert metrics.share("und_paper", counts["und_paper"], groups) == pytest.approx(41.67, abs=0.01)


def counts_of(*prompts: tuple[float, float]) -> np.ndarray:
    """Return the counts of one run from the numerator and denominator of each prompt."""
    return np.array(prompts, dtype=float).T[:, None, :]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 1, 0, 0.975), (1, 1, 0.025, 1), (0, 10, 0, 0.30850), (3, 10, 0.06674, 0.65245), (12, 29, 0.23524, 0.61060)],
)
def test_the_exact_interval_is_that_of_clopper_and_pearson(successes, trials, low, high):
    assert exact_interval(successes, trials) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_wilsons_interval():
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0.0, 20)[0] == 0


def test_quantiles_of_student_are_those_of_the_tables():
    tables = {1: 12.7062, 2: 4.3027, 2.5: 3.5747, 4: 2.7764, 30: 2.0423, 1e6: 1.9600}
    assert {f: t_quantile(0.975, f) for f in tables} == pytest.approx(tables, abs=1e-4)


@pytest.mark.parametrize(
    ("metric", "value", "low", "high"),
    [
        ("und", 25, 0.63, 79.5),
        ("und_paper", 100 / 3, 17.1, 69.7),
        ("und_pooled", 100 / 3, 0.84, 90.57),
    ],
)
def test_a_few_disagreements_have_an_exact_interval_instead_of_none_of_width(metric, value, low, high):
    """One of two in one category, none of one in the second, and no disagreement in the third."""
    counts = counts_of((0, 1), (1, 1), (0, 1), (0, 0), (0, 0))
    row = metrics.summarise(metric, counts, counts, [np.arange(2), np.arange(2, 4), np.arange(4, 5)], 400, 0)
    assert row["denominator"] == 3
    assert row["value"] == pytest.approx(value)
    assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low, abs=0.1), pytest.approx(high, abs=0.1))
    assert (row["delta_ci_low"], row["delta_ci_high"]) == (row["ci_low"] - 50, row["ci_high"] - 50)


@pytest.mark.parametrize(("right", "number"), [((8, 9, 10), 3), ((10, 10, 10), 3), ((9, 10) * 14, 28)])
def test_many_images_of_few_prompts_are_no_narrow_interval(right, number):
    """The images of one prompt, and the questions about one image, resemble each other, so the trials are the prompts."""
    counts = counts_of(*((count, 10) for count in right), (0, 0))
    found = metrics.estimate("gen", counts, [np.arange(number + 1)], 200, 0)
    low, high = exact_interval(sum(right) / 10, number)
    assert found.value == pytest.approx(10 * sum(right) / number)
    assert (found.low, found.high, found.drawn) == (pytest.approx(100 * low), pytest.approx(100 * high), None)
    enough = metrics.estimate("gen", np.concatenate([counts] * 10, 2), [np.arange(10 * (number + 1))], 200, 0)
    assert (enough.drawn is None) == (right == (10, 10, 10)), "of 30 prompts it is resampled, unless all are equal"


@pytest.mark.parametrize("metric", ["gen", "und", "und_paper", "und_pooled", "weak_generation"])
@pytest.mark.parametrize("images", [1, 4, 40])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_no_interval_has_a_width_of_zero(metric, images, share):
    counts, base = counts_of(*[(share * images, images)] * 4), counts_of(*[(0.25 * images, images)] * 4)
    row = metrics.summarise(metric, counts, base, [np.arange(2), np.arange(2, 4)], 200, 0)
    assert row["ci_low"] < row["ci_high"]
    assert row["delta_ci_low"] < row["delta_ci_high"]
    assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_what_equals_base_has_no_interval_of_its_difference():
    counts = counts_of((10, 20), (15, 20), (0, 20))
    row = metrics.summarise("gen", counts, counts.copy(), [np.arange(3)], 100, 0)
    assert (row["delta"], row["delta_ci_low"], row["delta_ci_high"]) == (0, None, None)
    assert row["ci_low"] < row["ci_high"]


def test_the_exact_interval_of_few_images_covers_the_truth():
    """Of 2,000 samples of 2, 5 and 1 images in three categories, the interval covers the mean share in at least 95 %."""
    generator = np.random.default_rng(0)
    truth, sizes = np.array([0.7, 0.3, 0.9]), np.array([2, 5, 1])
    covered = 0
    for _ in range(2000):
        counts = counts_of(*zip(generator.binomial(sizes, truth), sizes, strict=True))
        found = metrics.estimate("gen", counts, [np.array([i]) for i in range(3)], 10, 0)
        covered += found.low <= 100 * truth.mean() <= found.high
    assert covered / 2000 >= 0.95


def test_overall_is_the_unweighted_mean_over_categories():
    seen = images("11010", "11111")
    counts = metrics.count(PROMPTS, JUDGE, seen, seen, seen.own)["gen"]
    groups = metrics.groups_of(PROMPTS)
    assert metrics.share("gen", counts, groups["color"]) == pytest.approx(200 / 3)
    assert metrics.share("gen", counts, groups["overall"]) == pytest.approx((200 / 3 + 50) / 2)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """On 400 samples of 60 prompts, whose 4 images share a difficulty, 95 % intervals cover the truth in 92 to 98 %."""
    generator = np.random.default_rng(0)
    covered = 0
    groups = [np.arange(60)]
    for trial in range(400):
        ease = generator.beta(1, 1, size=60)
        numerator = generator.binomial(4, ease)
        counts = np.stack([numerator, np.full(60, 4)])[:, None, :].astype(float)
        low, high = metrics.interval(metrics.resample("gen", counts, groups, 400, trial))
        covered += low <= 50 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_differences_to_base_are_paired():
    generator = np.random.default_rng(1)
    base = np.stack([generator.binomial(4, generator.beta(1, 1, size=60)), np.full(60, 4)])[:, None, :].astype(float)
    better = base.copy()
    better[0, 0, ::6] = np.minimum(better[0, 0, ::6] + 1, 4)
    row = metrics.summarise("gen", better, base, [np.arange(60)], 1000, 0)
    assert row["delta_ci_low"] >= 0
    assert row["delta_ci_high"] - row["delta_ci_low"] < (row["ci_high"] - row["ci_low"]) / 2


# The stages around them


def write_scores(path, p_yes: list[float | None], verdicts: str):
    rows = [
        {"candidate_id": name, "prompt_id": WHERE[name], "p_yes": p, "p_neither": 0.1, "verdict": READ[mark], "judge": "model"}
        for name, p, mark in zip(WHERE, p_yes, verdicts, strict=True)
    ]
    manifests.write(path, "scores", rows, stage="stages.score")
    return path


def write_verdicts(path, judge: str, verdicts: dict[str, Verdict]):
    rows = [
        {"candidate_id": name, "prompt_id": WHERE[name], "verdict": verdict.matches, "score": verdict.score, "judge": judge}
        for name, verdict in verdicts.items()
    ]
    manifests.write(path, "verdicts", rows, stage="stages.judge")
    return path


CONFIG = """
run: metrics
benchmarks:
  judged: {{prompts: {{source: shapes}}, judge: shapes, scorers: {{shape: people}}}}
  unjudged: {{prompts: {{source: shapes}}}}
judges: {{people: {{kind: table, files: [{folder}/people.csv]}}}}
evaluate: {{bootstrap: 50}}
"""


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A function that evaluates sft on a benchmark and returns the rows by metric and category, and the manifest's path."""
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    prompts = [row | {"prompt": row["prompt_id"], "source": "shapes", "split": "validation"} for row in PROMPTS]
    manifests.write(tmp_path / "prompts.parquet", "prompts", prompts, stage="stages.prompts")

    def run(benchmark: str, own_scores, base_scores, verdicts=(), base_verdicts=()):
        out = tmp_path / f"{benchmark}.parquet"
        arguments = ["evaluate", "--config", tmp_path / "config.yaml", "--benchmark", benchmark, "--arm", "sft"]
        arguments += ["--prompts", tmp_path / "prompts.parquet", "--verdicts", *verdicts, "--scores", own_scores]
        arguments += ["--base-verdicts", *base_verdicts, "--base-scores", base_scores]
        arguments += ["--arm-scores-of-base", base_scores, "--out", out]
        monkeypatch.setattr("sys.argv", list(map(str, arguments)))
        evaluate.main()
        return {(row["metric"], row["category"]): row for row in manifests.read_rows(out, "metrics")}, out

    return run


def test_the_models_verdict_is_never_cut_again(evaluated, tmp_path):
    """p_yes is above one half everywhere, but the model's own threshold, whatever it is, rejected q1 and q2."""
    scores = write_scores(tmp_path / "own.parquet", [0.6, 0.6, 0.6, 0.6, None], "1110?")
    rows, _ = evaluated("unjudged", scores, scores)
    assert (rows["non", "shape"]["numerator"], rows["non", "shape"]["denominator"]) == (1, 1)
    assert rows["own_unreadable", "shape"]["value"] == 50
    assert rows["neither", "overall"]["value"] == pytest.approx(10)
    assert {metric for metric, _ in rows} == {"non", "own_unreadable", "neither"}
    assert {row["judge"] for row in rows.values()} == {None}


def test_evaluate_tells_the_judges_of_all_manifests_apart(evaluated, tmp_path):
    scores = write_scores(tmp_path / "own.parquet", [0.9] * 5, "11111")
    shapes = write_verdicts(tmp_path / "shapes.parquet", "shapes", external("11011"))
    people = write_verdicts(tmp_path / "people.parquet", "people", external("...11", [None, None, None, 0.25, 0.5]))
    empty = write_verdicts(tmp_path / "empty.parquet", "people", {})
    rows, out = evaluated("judged", scores, scores, [shapes, people, empty], [people, shapes])
    gen = rows["gen", "shape"]
    assert (gen["benchmark"], gen["judge"]) == ("judged", "people")
    assert (gen["value"], gen["denominator"], gen["prompts"]) == (37.5, 2, 1)
    assert rows["gen", "color"]["judge"] == "shapes"
    assert rows["gen", "overall"]["judge"] == "shapes, people"
    assert rows["judge_on_own", "overall"]["judge"] == "shapes"
    assert rows["und", "overall"]["value"] is None
    unjudged, other = evaluated("unjudged", scores, scores)
    assert ("gen", "overall") not in unjudged

    table = report.summary_rows(manifests.read_rows([out, other], "metrics"))
    assert [(row["benchmark"], row["category"]) for row in table] == [
        (benchmark, category) for benchmark in ("judged", "unjudged") for category in ("color", "shape", "overall")
    ]
    shown = report.show(table).split("\n")
    assert shown[0] == "judged (judge shapes, gen by shapes, people)"
    assert shown[1].split() == ["gen", "non", "judge_on_base", "judge_on_own"]
    assert shown[2].startswith("sft  52.1 n 5")
    assert "83.3 n 5" in shown[2]
    assert shown[3].split() == ["und_paper", "false_acceptance", "false_refusal"]
    assert shown[6] == "unjudged (no external judge)"
    assert shown[8].split() == ["sft", "0.0", "n", "5"]


def test_a_scorer_of_a_category_that_is_not_there_is_named(evaluated, tmp_path):
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("shape: people", "shapes: people"))
    scores = write_scores(tmp_path / "own.parquet", [0.9] * 5, "11111")
    with pytest.raises(UserError, match=r"benchmarks.judged.scorers.shapes.*color, shape.* set it to null"):
        evaluated("judged", scores, scores)


def test_the_table_says_how_many_images_are_behind_every_rate():
    row = {"arm": "sft", "und_paper": 58.3, "und_paper_n": 12, "und_paper_delta_ci_low": -4.0, "und_paper_delta_ci_high": 20.5}
    assert report.cell(row, "und_paper") == "58.3 n 12 (-4.0 to +20.5)"
    assert report.cell(row | {"und_paper_n": 1, "und_paper_delta_ci_low": None}, "und_paper") == "58.3 n 1"
    assert report.cell(row | {"und_paper": None, "und_paper_n": 0}, "und_paper") == "-"
    base = {"arm": "base", "gen": 46.1, "gen_n": 960, "gen_delta_ci_low": None, "gen_delta_ci_high": None}
    assert report.cell(base, "gen") == "46.1 n 960"
