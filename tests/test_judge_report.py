"""The judge report: rates and their intervals by hand, what is said about a threshold, and the kinds of error of the oracle."""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from stages import judge_report
from stages.common import manifests
from stages.common.errors import UserError
from stages.judge_report import STEPS, Images, Judged, pick, report, threshold_finding
from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, ERRORS, Group, Meaning, meanings, sample_scene
from stages.shapes.scenes import COLOR_NAMES, SHAPES, TEXTURES, encode_kind
from stages.tools import rates
from stages.tools.intervals import exact_interval
from stages.tools.kappa import agree
from tests.helpers import SMALL, write_config

BENCHMARK = next(iter(SMALL["benchmarks"]))

# Rates and intervals


def test_images_of_one_prompt_count_as_much_as_they_tell():
    alone = np.arange(100)
    hits = alone % 2 == 0
    assert rates.effective_count(hits, alone) == pytest.approx(99, abs=1)
    assert rates.effective_count(np.repeat(hits[:20], 5), np.repeat(alone[:20], 5)) == pytest.approx(19, abs=1)
    assert rates.effective_count(np.ones(100, bool), np.repeat(alone[:20], 5)) == 20
    independent, together = rates.share(hits, alone), rates.share(np.repeat(hits[:20], 5), np.repeat(alone[:20], 5))
    assert (independent.value, independent.n, independent.numerator) == (0.5, 100, 50) == (0.5, together.n, together.numerator)
    assert together.high - together.low > 2 * (independent.high - independent.low)


def covered(prompts: int, images: int, rounds: int = 300) -> dict[str, float]:
    """Return how often the intervals contain the truth, by measure, when the images of a prompt resemble each other."""
    generator = np.random.default_rng(prompts)
    names, nothing = np.repeat(np.arange(prompts), images), np.zeros(prompts * images)
    hit: dict[str, list[bool]] = {"share": [], "auc": [], "difference": [], "kappa": []}

    def drawn() -> np.ndarray:
        """Return standard normal values, of which those of one prompt correlate by 0.6."""
        shared = np.repeat(generator.standard_normal(prompts), images)
        return 0.6**0.5 * shared + 0.4**0.5 * generator.standard_normal(prompts * images)

    for _ in range(rounds):
        right, values, above, other = (drawn() for _ in range(4))
        found = {
            "share": (rates.share(right > 0, names), 0.5),
            "auc": (rates.auc(values, right > 0, names, nothing), 0.5),
            "difference": (rates.difference(right > 0, above > 0, names, nothing), 0.0),
            "kappa": (agree(right > 0, other > 0, names, 0)[1], 0.0),
        }
        for measure, (rate, truth) in found.items():
            if rate.low is not None and rate.high is not None:
                hit[measure].append(rate.low <= truth <= rate.high)
    return {measure: float(np.mean(each)) for measure, each in hit.items() if each}


@pytest.mark.parametrize(("prompts", "images"), [(3, 9), (4, 20), (6, 12)])
def test_intervals_of_few_prompts_cover_the_truth_however_many_images_they_have(prompts, images):
    found = covered(prompts, images)
    assert set(found) == {"share", "auc", "difference"}, "resampling a few prompts is no interval of kappa"
    assert min(found.values()) >= 0.94


def test_intervals_of_many_prompts_are_not_wider_than_they_say():
    found = covered(60, 4, rounds=200)
    assert len(found) == 4
    assert all(0.90 <= each <= 0.985 for each in found.values())


def test_one_prompt_says_as_much_as_one_image():
    one = rates.share(np.repeat([True, False], 50), np.zeros(100))
    assert (one.value, one.low, one.high) == (0.5, pytest.approx(0, abs=0.02), pytest.approx(1, abs=0.02))


@pytest.mark.parametrize("n", [1, 5, 29, 30, 200])
@pytest.mark.parametrize("value", [False, True])
def test_no_interval_has_a_width_of_zero(n, value):
    hits, prompts = np.full(n, value), np.arange(n) // 4
    found = rates.share(hits, prompts)
    assert found.low < found.high
    gain = rates.difference(
        np.array([True] * n + [False] * n), np.array([True] * n + [False] * n), np.arange(2 * n), np.zeros(2 * n)
    )
    assert gain.value == 1 and gain.low < gain.high
    curve = rates.auc(np.array([0.9] * n + [0.1] * n), np.array([True] * n + [False] * n), np.arange(2 * n), np.zeros(2 * n))
    assert curve.value == 1 and curve.low < curve.high


def test_nothing_counted_has_no_value():
    nothing = np.array([])
    assert rates.share(nothing.astype(bool), nothing) == rates.Rate(None, 0, 0)
    assert rates.auc(nothing, nothing.astype(bool), nothing, nothing) == rates.Rate(None, 0)
    assert rates.difference(nothing.astype(bool), nothing.astype(bool), nothing, nothing) == rates.Rate(None, 0)
    ones = np.ones(5, bool)
    assert rates.auc(np.arange(5), ones, np.arange(5), np.zeros(5)).value is None, "there is no wrong image"


def test_auc_by_hand():
    values, right = np.array([0.9, 0.6, 0.6, 0.2, 0.1]), np.array([True, True, False, True, False])
    # pairs of a right and a wrong image: 0.9 beats both, 0.6 ties with 0.6 and beats 0.1, 0.2 loses to 0.6 and beats 0.1
    found = rates.auc(values, right, np.arange(5), np.zeros(5))
    assert (found.value, found.n) == (pytest.approx((2 + 1.5 + 1) / 6), 5)
    # two categories with other levels of p_yes: within each, chance; all together, a difference between categories
    values, right = np.array([0.9, 0.9, 0.9, 0.1, 0.1, 0.1]), np.array([True, True, False, True, False, False])
    strata = np.array(["easy"] * 3 + ["hard"] * 3)
    assert rates.auc(values, right, np.arange(6), np.zeros(6)).value == pytest.approx((2 * 0.5 + 4 + 0.5 * 2) / 9)
    assert rates.auc(values, right, np.arange(6), strata).value == 0.5


def test_a_difference_is_taken_within_strata():
    # In either category, half of the images are right on both sides. The easy one has more images above, and more right ones.
    hits = np.array([1, 1, 1, 0] + [1, 0] + [1, 0, 0, 0] * 2, bool)
    above = np.array([1, 1, 0, 0] + [1, 1] + [0, 0, 0, 1] + [0] * 4, bool)
    strata = np.array(["a"] * 6 + ["b"] * 8)
    found = rates.difference(hits, above, np.arange(14), strata)
    # a: 3/4 above, 1/2 below, weight 4 * 2 / 6; b: 0 above, 2/7 below, weight 7 / 8
    assert found.value == pytest.approx((8 / 6 * (3 / 4 - 1 / 2) + 7 / 8 * (0 - 2 / 7)) / (8 / 6 + 7 / 8))
    assert found.n == 14
    alone = rates.difference(np.append(hits, True), np.append(above, True), np.arange(15), np.append(strata, "c"))
    assert (alone.value, alone.n) == (found.value, 14), "a category with images on one side only tells nothing"


# The report


def images(p_yes, right, category="color", prompt=None, own=None, reason="", neither=0.0) -> Images:
    """Return images with one value for each, or one value for all."""
    p_yes, n = np.array(p_yes, float), len(p_yes)
    own = np.where(np.isnan(p_yes), np.nan, p_yes >= 0.5) if own is None else np.array(own, float)
    category, reason = (np.array(given if isinstance(given, list) else [given] * n, str) for given in (category, reason))
    prompt = np.arange(n) if prompt is None else np.array(prompt)
    return Images(prompt, category, p_yes, np.full(n, neither), own, np.array(right, float), reason)


def rows_of(seen: Images, accept=(0.85,), judge="shapes") -> list[dict]:
    return report(Judged(BENCHMARK, "base", judge, seen), accept)


def one(rows, measure, category="overall", reason=None, threshold=None) -> dict:
    (line,) = [line for line in pick(rows, measure, category, reason) if threshold is None or line["threshold"] == threshold]
    return line


UNREAD = float("nan")


def test_rates_of_the_own_verdict_by_hand():
    seen = images(
        [0.9, 0.8, 0.3, 0.7, 0.2, 0.1, UNREAD, 0.9],
        [1, 1, 1, 0, 0, 0, 1, UNREAD],
        reason=["", "", "", "color", "color", "number", "", ""],
    )
    rows = rows_of(seen)
    counted = {
        measure: (one(rows, measure)["numerator"], one(rows, measure)["n"])
        for measure in ("right", "accuracy", "false_acceptance", "false_refusal", "own_unreadable", "external_unreadable")
    }
    assert counted == {
        "right": (3, 6),
        "accuracy": (4, 6),
        "false_acceptance": (1, 3),
        "false_refusal": (1, 3),
        "own_unreadable": (1, 8),
        "external_unreadable": (1, 8),
    }
    assert (one(rows, "false_acceptance", reason="color")["value"], one(rows, "false_acceptance", reason="color")["n"]) == (
        0.5,
        2,
    )
    assert one(rows, "auc", reason="number")["value"] == 1
    assert one(rows, "auc", reason="color")["value"] == pytest.approx(5 / 6)
    assert one(rows, "auc", reason="color")["n"] == 5
    assert one(rows, "false_refusal")["ci_low"] == pytest.approx(exact_interval(1, 3)[0])


def test_calibration_and_histogram_by_hand():
    rows = rows_of(images([0.05, 0.05, 0.95, 1.0, 0.3], [0, 1, 1, 1, 0]))
    # bins: 0.05 with 1/2 right, 0.3 with 0/1 right, 0.975 with 2/2 right
    assert one(rows, "ece")["value"] == pytest.approx((2 * 0.45 + 1 * 0.3 + 2 * 0.025) / 5)
    bins = {round(line["threshold"], 2): (line["value"], line["n"]) for line in pick(rows, "calibration") if line["n"]}
    assert bins == {0.0: (0.5, 2), 0.3: (0, 1), 0.9: (1, 2)}
    assert one(rows, "calibration_p_yes", threshold=0.9)["value"] == pytest.approx(0.975)
    counts = {round(line["threshold"], 2): line["numerator"] for line in pick(rows, "histogram_right") if line["numerator"]}
    assert counts == {0.05: 1, 0.95: 2}
    assert {line["n"] for line in pick(rows, "histogram_wrong")} == {2}


def test_the_table_of_thresholds_by_hand():
    seen = images([0.9, 0.4, 0.6, UNREAD, 0.1, 0.2], [1, 1, 0, 1, 0, UNREAD], prompt=[0, 0, 1, 1, 2, 2])
    rows = rows_of(seen, accept=(0.33,))
    assert sorted(line["threshold"] for line in pick(rows, "pool")) == sorted([*STEPS, 0.33])
    found = {
        threshold: [one(rows, measure, threshold=threshold)["numerator"] for measure in ("precision", "accepted", "pool")]
        for threshold in (0.1, 0.15, 0.33, 0.65, 0.95)
    }
    # 0.1 accepts five images, of which the external judge has read four. The unreadable p_yes is never accepted.
    assert found == {0.1: [2, 5, 0], 0.15: [2, 4, 0], 0.33: [2, 3, 1], 0.65: [1, 1, 2], 0.95: [0, 0, 3]}
    assert [one(rows, name, threshold=0.15)["n"] for name in ("precision", "accepted", "pool")] == [3, 6, 3]
    assert one(rows, "precision", threshold=0.95)["value"] is None
    assert "accepts 50 % of 6 images, of which 67 % are right, and leaves 33 % of 3 prompts" in text(rows)


def text(rows) -> str:
    return "\n".join(line["text"] for line in rows if line.get("text"))


def test_roc_points_end_with_everything_accepted():
    rows = rows_of(images(np.linspace(0, 1, 500), np.arange(500) % 2))
    for measure in ("roc_right", "roc_wrong"):
        points = pick(rows, measure)
        assert len(points) <= judge_report.ROC_POINTS
        assert points[0]["value"] == pytest.approx(1, abs=0.01)
        assert [line["value"] for line in points] == sorted((line["value"] for line in points), reverse=True)


def test_a_judge_of_noise_gets_the_warning():
    generator = np.random.default_rng(0)
    seen = images(generator.uniform(size=900), generator.integers(2, size=900), prompt=np.arange(900) // 4)
    rows = rows_of(seen)
    assert threshold_finding(seen, 0.85).state == "uninformative"
    warnings = [line["text"] for line in rows if line["measure"] == "warning"]
    assert "cuts where a higher p_yes is not seen to mean more right images" in warnings[0]
    assert "hardly tells right images from wrong ones for all images together" in warnings[1]
    gain = one(rows, "right_gain")
    assert gain["ci_low"] < 0 < gain["ci_high"]


def test_a_judge_that_knows_something_at_the_threshold_gets_none():
    generator = np.random.default_rng(1)
    p_yes = generator.uniform(0.7, 1, size=900)
    rows = rows_of(images(p_yes, p_yes + generator.normal(0, 0.05, size=900) > 0.85))
    assert "cuts where p_yes carries information" in text(rows)
    assert not [line for line in rows if line["measure"] == "warning"]


def test_a_sharp_judge_may_have_its_threshold_anywhere():
    generator = np.random.default_rng(2)
    right = generator.integers(2, size=400)
    rows = rows_of(images(np.where(right, 0.99, 0.02), right))
    assert "only 0 of 400 images have a p_yes within 0.1 of it" in text(rows)
    assert not [line for line in rows if line["measure"] == "warning"]
    assert one(rows, "auc")["value"] == 1


def test_a_difference_between_categories_is_no_information():
    generator = np.random.default_rng(3)
    # Easy images are right more often and have a higher p_yes. Within either category, p_yes is noise.
    easy = generator.integers(2, size=4000) == 1
    p_yes = np.where(easy, generator.uniform(0.8, 0.95, 4000), generator.uniform(0.75, 0.9, 4000))
    right = generator.uniform(size=4000) < np.where(easy, 0.9, 0.4)
    seen = images(p_yes, right, category=np.where(easy, "easy", "hard").tolist())
    finding = threshold_finding(seen, 0.85)
    assert finding.above.value - finding.below.value > 0.1
    assert finding.state == "uninformative"
    assert "easy and hard show no clear difference" in text(rows_of(seen))


def test_few_images_are_said_to_be_too_few():
    seen = images([0.9] * 20 + [0.8] * 20, [1] * 20 + [0] * 20)
    assert threshold_finding(seen, 0.85).state == "too few"
    assert "20 images have a p_yes up to 0.1 above it and 20 up to 0.1 below it, which is too few" in text(rows_of(seen))
    seen = images([0.9, 0.8] * 40, [1, 0] * 40, prompt=np.arange(80) // 8)
    assert threshold_finding(seen, 0.85).state == "too few"
    assert "above it and 40 up to 0.1 below it, which are of too few prompts to compare" in text(rows_of(seen))


@pytest.mark.parametrize("p_yes", [[1.0, 0.0] * 40, [1.0, UNREAD] * 40])
def test_verdicts_without_a_probability_are_recognised(p_yes):
    rows = rows_of(images(p_yes, [1, 1, 0, 0] * 20))
    assert "p_yes is only 0 or 1, as always in score.mode answer" in text(rows)
    assert one(rows, "auc")["value"] == pytest.approx(0.5)


def test_p_yes_or_verdicts_that_are_never_readable():
    for p_yes, right in (([UNREAD] * 4, [1, 0, 1, 0]), ([0.5] * 4, [UNREAD] * 4)):
        rows = rows_of(images(p_yes, right))
        assert "cannot be examined, because no image has both" in text(rows)
        assert [one(rows, measure)["value"] for measure in ("auc", "ece", "right")] == [None] * 3


def test_a_category_without_right_or_wrong_images_has_no_auc():
    rows = rows_of(images([0.9, 0.2, 0.7], [1, 0, 1], category=["color", "color", "shape"]))
    assert one(rows, "auc", "color")["value"] == 1
    assert (one(rows, "auc", "shape")["value"], one(rows, "false_acceptance", "shape")["n"]) == (None, 0)


def test_an_answer_that_is_neither_yes_nor_no_is_warned_about():
    assert "The most probable answer about 100 % of 4 images is neither" in text(
        rows_of(images([0.5] * 4, [1] * 4, neither=0.8))
    )


def test_without_an_external_judge_there_are_only_acceptance_and_pool():
    rows = rows_of(images([0.9, 0.2], [UNREAD] * 2), judge=None)
    assert {line["measure"] for line in rows} == {"accepted", "pool"}


# The stage


def write_inputs(folder: Path, p_yes: list[float | None], right: list[bool | None]) -> None:
    names = [f"c{i}" for i in range(len(p_yes))]
    prompts = [{"prompt_id": p, "prompt": p, "category": "color", "source": "s", "split": "s"} for p in ("p", "q")]
    scores = [
        {"candidate_id": name, "prompt_id": "pq"[i % 2], "p_yes": p, "p_neither": 0.0, "judge": "hash"}
        | {"verdict": None if p is None else p >= 0.5}
        for i, (name, p) in enumerate(zip(names, p_yes, strict=True))
    ]
    verdicts = [
        {"candidate_id": name, "prompt_id": "pq"[i % 2], "verdict": r, "judge": "shapes", "reason": None if r else "color"}
        for i, (name, r) in enumerate(zip(names, right, strict=True))
    ]
    for kind, rows in (("prompts", prompts), ("scores", scores), ("verdicts", verdicts)):
        manifests.write(folder / f"{kind}.parquet", kind, rows, stage="stages.judge")


def run(folder: Path, monkeypatch, *more: str, sets=(BENCHMARK,), verdicts=True) -> pandas.DataFrame:
    """Run the stage in this process, and return its table."""
    words = ["--config", str(write_config(folder)), "--out", str(folder / "out.parquet"), "--plot", str(folder / "out.png")]
    for name in sets:
        words += ["--prompts", name, str(folder / "prompts.parquet"), "--scores", name, "base", str(folder / "scores.parquet")]
        words += ["--verdicts", name, "base", str(folder / "verdicts.parquet")] if verdicts else []
    monkeypatch.setattr("sys.argv", ["stage", *words, *more])
    judge_report.main()
    return pandas.read_parquet(folder / "out.parquet")


def test_the_stage_writes_table_and_picture_and_repeats_them(tmp_path, monkeypatch, capsys):
    write_inputs(tmp_path, [0.9, 0.2, None, 0.7], [True, False, True, None])
    table = run(tmp_path, monkeypatch, sets=(BENCHMARK, "train"))
    assert set(table["set"]) == {BENCHMARK, "train"}
    assert list(table.columns) == list(manifests.SCHEMAS["judge_report"])
    assert f"Judge report of {BENCHMARK}: the model's own judge against shapes" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").width > 500
    before = [(tmp_path / name).read_bytes() for name in ("out.parquet", "out.png")]
    run(tmp_path, monkeypatch, sets=(BENCHMARK, "train"))
    assert [(tmp_path / name).read_bytes() for name in ("out.parquet", "out.png")] == before


@pytest.mark.parametrize("p_yes", [[None] * 4, [1.0, 0.0, None, 1.0]])
def test_the_stage_takes_answers_without_probabilities(p_yes, tmp_path, monkeypatch):
    write_inputs(tmp_path, p_yes, [True, False, True, False])
    assert len(run(tmp_path, monkeypatch))


@pytest.mark.parametrize("right", [[True, True], [False, False], [None, None]])
def test_a_checkpoint_may_have_only_images_of_one_kind(right, tmp_path, monkeypatch):
    write_inputs(tmp_path, [0.9, 0.2], [True, False])
    files = [tmp_path / f"{kind}.parquet" for kind in ("scores", "verdicts")]
    other = [file.rename(tmp_path / f"base-{file.name}") for file in files]
    write_inputs(tmp_path, [0.9, 0.2], right)
    more = ["--scores", BENCHMARK, "sft", str(other[0]), "--verdicts", BENCHMARK, "sft", str(other[1])]
    assert set(run(tmp_path, monkeypatch, *more).checkpoint) == {"base", "sft"}
    for file, before in zip(files, other, strict=True):
        file.replace(tmp_path / "kept.parquet")
        before.replace(file)
        (tmp_path / "kept.parquet").replace(before)
    assert set(run(tmp_path, monkeypatch, *more).checkpoint) == {"base", "sft"}


def test_missing_inputs_are_named(tmp_path, monkeypatch):
    write_inputs(tmp_path, [0.9, 0.2], [True, False])
    with pytest.raises(UserError, match="--verdicts: none is of a judge"):
        run(tmp_path, monkeypatch, verdicts=False)
    with pytest.raises(UserError, match=f"--scores other: not train, and not in the section benchmarks: {BENCHMARK}"):
        run(tmp_path, monkeypatch, sets=("other",))
    with pytest.raises(UserError, match=f"--verdicts {BENCHMARK} sft: there is no --scores"):
        run(tmp_path, monkeypatch, "--verdicts", BENCHMARK, "sft", str(tmp_path / "verdicts.parquet"))
    with pytest.raises(UserError, match=f"--scores {BENCHMARK} sft: give a set, a checkpoint and files"):
        run(tmp_path, monkeypatch, "--scores", BENCHMARK, "sft")
    short = manifests.read_rows(tmp_path / "verdicts.parquet", "verdicts")[:1]
    manifests.write(tmp_path / "verdicts.parquet", "verdicts", short, stage="stages.judge")
    with pytest.raises(UserError, match=rf"--verdicts {BENCHMARK} base: the judge shapes has no row for 1 of the 2 images"):
        run(tmp_path, monkeypatch)
    assert not (tmp_path / "out.parquet").exists()


def test_a_run_ends_with_the_report(shared_run):
    folder, output = shared_run
    table = pandas.read_parquet(folder / "results/small/judge_report.parquet")
    assert set(table.checkpoint) == {"base", "sft", "dpo", "c-sft"}
    assert set(table["set"]) == {BENCHMARK, "train"}
    assert set(table[table["set"] == "train"].measure) == {"accepted", "pool"}
    counted = table[(table["set"] == BENCHMARK) & (table.category == "overall") & (table.measure == "accepted")]
    assert set(counted.n) == {24}
    assert 0.9 in set(counted.threshold)
    verdicts = pandas.concat(
        map(pandas.read_parquet, (folder / "results/small/base/verdicts/shapes" / BENCHMARK).glob("*.parquet"))
    )
    assert verdicts.reason.isna().tolist() == verdicts.verdict.tolist()
    assert set(verdicts.reason.dropna()) <= {*ERRORS, "several", "unreadable"}
    assert re.search(rf"^Judge report of {BENCHMARK}", output, re.MULTILINE)
    assert "A selection at 0.9 accepts" in " ".join(output.split())


# The kinds of error of the oracle


def scene(**objects: str) -> np.ndarray:
    """Return a scene. Each argument is a cell, such as r1c3, and an object, such as "red striped star"."""
    grid = np.zeros((4, 4), dtype=np.int16)
    for cell, words in objects.items():
        color, texture, shape = words.split()
        value = encode_kind(SHAPES.index(shape), COLOR_NAMES.index(color), TEXTURES.index(texture))
        grid[int(cell[1]), int(cell[3])] = value
    return grid


STAR, CIRCLE = Group(1, "star", "red"), Group(1, "circle", None, "striped")
PAIR = Meaning("complex", (STAR, CIRCLE), "left of")
THREE = Meaning("numeracy", (Group(2, "star"), Group(1, "circle")))
RIGHT = {"r0c0": "red solid star", "r2c3": "blue striped circle"}


@pytest.mark.parametrize(
    ("meaning", "objects", "expected"),
    [
        (PAIR, RIGHT, None),
        (PAIR, {"r0c3": RIGHT["r0c0"], "r2c0": RIGHT["r2c3"]}, "relation"),
        (PAIR, RIGHT | {"r0c0": "red solid cross"}, "shape"),
        (PAIR, RIGHT | {"r0c0": "green solid star"}, "color"),
        (PAIR, RIGHT | {"r2c3": "blue dotted circle"}, "texture"),
        (PAIR, RIGHT | {"r0c0": "green solid cross"}, "several"),
        (PAIR, {"r0c3": "green solid star", "r2c0": RIGHT["r2c3"]}, "several"),  # colour and relation
        (PAIR, {"r0c0": RIGHT["r0c0"]}, "number"),
        (PAIR, {}, "number"),
        (PAIR, RIGHT | {"r3c3": "green dotted cross"}, "number"),
        (PAIR, {"r0c0": "green solid star"}, "several"),  # the one object is wrong and the other is missing
        (PAIR, {"r0c3": RIGHT["r0c0"], "r2c0": RIGHT["r2c3"], "r3c3": "blue solid cross"}, "several"),
        (THREE, {"r0c0": "red solid star", "r0c1": "blue solid star", "r3c3": "red solid circle"}, None),
        (THREE, {"r0c0": "red solid star", "r3c3": "red solid circle"}, "number"),
        (THREE, {"r0c0": "red solid star", "r3c3": "red solid circle", "r0c1": "red solid cross"}, "shape"),
        (THREE, {"r0c0": "red solid star", "r3c3": "red solid circle", "r0c1": "red solid circle"}, "shape"),
        # both another colour and another texture explain it: which of the two objects is the red one cannot be told
        (
            Meaning("texture", (Group(1, "star", "red"), Group(1, "star", None, "striped"))),
            {"r0c0": "red striped star", "r1c1": "blue solid star"},
            "several",
        ),
    ],
)
def test_the_oracle_names_the_error(meaning, objects, expected):
    assert oracle.error(meaning, scene(**objects)) == expected
    assert oracle.matches(meaning, scene(**objects)) == (expected is None)


def test_an_unreadable_picture_is_an_error_of_its_own():
    grid = scene(**RIGHT)
    grid[3, 3] = oracle.UNREADABLE
    assert oracle.error(PAIR, grid) == "unreadable"
    assert not oracle.matches(PAIR, grid)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_scene_of_a_meaning_has_no_error_and_a_crowded_one_is_decided_quickly(category):
    rng = np.random.default_rng(4)
    pool = meanings(category)
    for i in rng.integers(len(pool), size=100):
        assert oracle.error(pool[i], sample_scene(pool[i], rng)) is None
        crowd = rng.integers(1, 109, size=(4, 4)).astype(np.int16)
        assert oracle.error(pool[i], crowd) in ("number", "several")
