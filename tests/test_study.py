"""The study: intervals that hold for the recipe, and the tables of several checkpoints and seeds."""

import csv
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.common import manifests
from stages.common.config import Config, validate
from stages.common.errors import UserError
from stages.tools import study
from stages.tools.intervals import t_quantile
from stages.understanding.base import Answer
from stages.understanding.shapes import SHAPES
from tests.helpers import ROOT, SMALL, done, merged, refused, stage

TRUTH = 3.0  # points by which the simulated arm is better, over all checkpoints, seeds and prompts


def simulated(trials: int, checkpoints: int, seeds: int, of_checkpoints: float, of_seeds: float, seed: int) -> np.ndarray:
    """Return differences of two arms in points, float `[trials, checkpoints, prompts]`, each the mean over its seeds.

    480 prompts with 4 images of each arm. A prompt's difference has a standard deviation of 10 points over prompts and of 5
    more over checkpoints; of_checkpoints and of_seeds are those of the effects that all prompts share.
    """
    generator = np.random.default_rng(seed)
    shape, prompts, images = (trials, checkpoints, seeds, 480), (trials, 1, 1, 480), 4
    ease = np.broadcast_to(generator.uniform(0.3, 0.7, prompts), shape)
    effect = TRUTH + generator.normal(0, 10, prompts) + generator.normal(0, 5, (trials, checkpoints, 1, 480))
    effect = effect + of_checkpoints * generator.normal(size=(trials, checkpoints, 1, 1))
    effect = effect + of_seeds * generator.normal(size=(trials, checkpoints, seeds, 1))
    better = generator.binomial(images, np.clip(ease + effect / 100, 0, 1))
    return 100 * (better - generator.binomial(images, ease)).mean(2) / images


@pytest.mark.parametrize(
    ("checkpoints", "seeds", "of_checkpoints", "of_seeds"),
    [(3, 2, 1, 1), (4, 2, 1, 1), (5, 2, 1, 1), (3, 2, 2, 1), (3, 2, 0.5, 1), (3, 1, 1, 1)],
)
def test_the_interval_covers_the_recipe_in_93_to_97_percent(checkpoints, seeds, of_checkpoints, of_seeds):
    groups = [np.arange(start, start + 80) for start in range(0, 480, 80)]
    grid = np.concatenate([np.arange(1, 10, 0.1), np.arange(10, 100, 2.0), [200, 500, 10_000]])
    quantiles = np.array([t_quantile(0.975, float(freedom)) for freedom in grid])
    covered = []
    for part in range(4):
        values = simulated(500, checkpoints, seeds, of_checkpoints, of_seeds, part)
        mean, variance, freedom = study.mean_variance_freedom(values, groups)
        quantile = np.interp(-1 / freedom, -1 / grid, quantiles)
        covered += list(abs(mean - TRUTH) <= quantile * variance**0.5)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_interval_of_one_case_is_the_one_that_the_simulation_measures():
    groups = [np.arange(240), np.arange(240, 480)]
    values = simulated(1, 3, 2, 1, 1, 0)[0]
    mean, variance, freedom = study.mean_variance_freedom(values, groups)
    assert mean == pytest.approx(values.mean())
    assert study.half_width(values, groups) == pytest.approx(t_quantile(0.975, float(freedom)) * variance**0.5)
    assert study.half_width(np.ones((3, 480)), groups) == 0, "what does not vary says nothing about its spread"
    assert study.half_width(values, [np.arange(1)]) == 0


def test_by_prompt_means_the_share_of_each_group():
    generator = np.random.default_rng(0)
    denominator = generator.integers(0, 5, (2, 60)).astype(float)
    counts = np.stack([generator.binomial(denominator.astype(int), 0.4), denominator])
    groups = [np.arange(30), np.arange(30, 60)]
    values = study.by_prompt("false_acceptance", counts, groups)
    for group in groups:
        numerator, total = counts[:, :, group].sum((1, 2))
        assert values[:, group].mean() == pytest.approx(100 * numerator / total)
    assert study.by_prompt("und", counts[:, :, :4], [np.arange(4)]) is None, "fewer than 30 images"


# The tables

MODELS = ("models/a", "models/b", "models/c")
ARMS = {
    "dpo": None,
    "sft-nobody": {"objective": "sft", "epochs": 2, "pairs": {"matched": True, "filter": "everything"}},
    "c-sft-more": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "nobody"},
    "c-sft-base": {"objective": "sft", "epochs": 2, "replay_epochs": [1], "replay_by": "base"},
}
SCENES = {"kind": "shapes", "count": 40, "captions": 12}
RIGHT = {"base": 0.4, "sft": 0.6, "sft-nobody": 0.4, "c-sft": 0.6, "c-sft-more": 0.6, "c-sft-base": 0.6}


def write_run(folder: Path, model: str, seed: int) -> Path:
    """Write what the study reads of a run of made-up verdicts: the judge never errs on the base model's images."""
    own = {"run": folder.name, "seed": seed, "model": {"checkpoint": model}}
    config = validate(merged(SMALL, own | {"arms": ARMS, "understanding": {"scenes": SCENES}}))
    folder.mkdir(parents=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
    generator = np.random.default_rng([seed, MODELS.index(model) if model in MODELS else len(MODELS)])

    def write(place: str, kind: str, rows: list[dict]) -> None:
        manifests.write(folder / place, kind, rows, stage="stages.tools.study")

    def prompts(name: str, count: int) -> list[dict]:
        common = {"source": "shapes", "split": "test"}
        rows = [{"prompt_id": f"{name}{i}", "prompt": f"{i}", "category": "color" if i % 2 else "shape"} for i in range(count)]
        return [row | common for row in rows]

    def judged(place: tuple[str, str], names: list[tuple[str, str]], share: float) -> None:
        truth = generator.random(len(names)) < share
        common = [{"candidate_id": name, "prompt_id": prompt} for name, prompt in names]
        verdicts = [row | {"verdict": bool(right), "judge": "shapes"} for row, right in zip(common, truth, strict=True)]
        write(f"{place[0]}/verdicts/shapes/{place[1]}/0000.parquet", "verdicts", verdicts)
        accepted = truth | (generator.random(len(names)) < 0.2)
        scores = [row | {"p_yes": 0.9, "verdict": bool(yes), "judge": "m"} for row, yes in zip(common, accepted, strict=True)]
        write(f"{place[0]}/scores/{place[1]}/0000.parquet", "scores", scores)
        if place[0] == "base" and place[1] == "validation":
            for arm in config.arms:
                write(f"{arm}/scores-of-base/validation/0000.parquet", "scores", scores)

    write("prompts/validation.parquet", "prompts", prompts("v", 60))
    write("prompts/train.parquet", "prompts", prompts(f"t{seed}-", 20))
    for arm, share in RIGHT.items():
        judged((arm, "validation"), [(f"{arm}-v{i}-{k}", f"v{i}") for i in range(60) for k in range(4)], share)
    judged(("base", "train"), [(f"t{i}", f"t{seed}-{i}") for i in range(20)], 0.5)
    pairs = [{"prompt_id": f"t{seed}-{i}", "round": 0, "chosen": f"t{i}"} for i in range(12)]
    waits = [{"prompt_id": f"t{seed}-{i}", "round": 0, "reason": "no_accepted"} for i in range(12, 20)]
    write("sft/pairs.parquet", "pairs", pairs)
    write("sft/discard.parquet", "discard", waits)
    write("sft-nobody/pairs.parquet", "pairs", pairs)
    for replay, count in (("sft-epoch1", 4), ("sft-epoch1-by-base", 3)):
        judged((replay, "replay"), [(f"{replay}-{i}", f"t{seed}-{i}") for i in range(12, 20)], 0.5)
        pool = [row for row in prompts(f"t{seed}-", 20) if row["prompt_id"] in {row["prompt_id"] for row in waits}]
        write(f"{replay}/replay/pool.parquet", "prompts", pool)
        drawn = [{"prompt_id": f"t{seed}-{i}", "round": 1, "chosen": f"{replay}-{i}"} for i in range(12, 12 + count)]
        write(f"{replay}/replay/pairs.parquet", "pairs", drawn)
    write("sft-epoch1-by-nobody/replay/pairs.parquet", "pairs", pairs[:4])
    for arm in ("base", *config.arms):
        write(f"{arm}/answers/scenes.parquet", "answers", answers(config, generator, 0.95 if arm == "sft" else 0.8))
    return folder


def answers(config: Config, generator: np.random.Generator, share: float) -> list[dict]:
    """Return answers to the questions about scenes of which this share is right."""
    rows = []
    for question in SHAPES.questions(config.understanding["scenes"]):
        right = bool(generator.random() < share)
        answer = Answer(
            **{name: getattr(question, name) for name in ("question_id", "image_id", "part", "category", "expected")},
            question=question.text,
            answer="a red circle" if question.grade else None,
            p_yes=None if question.grade else float((question.expected == "yes") == right),
            score=float(right),
        )
        rows.append(asdict(answer))
    return rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return [write_run(folder / f"{Path(m).name}-{s}", m, 10 * i + s) for i, m in enumerate(MODELS) for s in range(2)]


def study_of(monkeypatch, folder: Path, runs: list[Path]) -> dict[str, list[dict]]:
    """Run the command and return its tables."""
    files = {name: folder / f"{name}.csv" for name in ("out", "by-run", "contrasts")}
    arguments = ["study", "--runs", *runs, *(part for name, path in files.items() for part in (f"--{name}", path))]
    monkeypatch.setattr("sys.argv", list(map(str, [*arguments, "--plot", folder / "plot.png"])))
    study.main()
    return {name: list(csv.DictReader(path.open())) for name, path in files.items()}


def row_of(rows: list[dict], **wanted: str) -> dict:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


def test_a_study_of_several_checkpoints_and_seeds(runs, tmp_path, monkeypatch, capsys):
    tables = study_of(monkeypatch, tmp_path, runs)
    gen = row_of(tables["out"], arm="sft", category="overall", metric="gen")
    assert (gen["seeds"], gen["models"], gen["n"]) == ("6", "3", str(6 * 240))
    assert float(gen["delta_ci_low"]) < float(gen["delta"]) < float(gen["delta_ci_high"])
    assert float(gen["delta_ci_low"]) > 10
    assert gen["interval"] == "checkpoints"
    base = row_of(tables["out"], arm="base", category="overall", metric="gen")
    assert (base["delta"], base["delta_ci_low"]) == ("0.0", "")
    assert row_of(tables["out"], arm="sft", category="overall", metric="judge_on_base")["delta_ci_low"] == ""

    by_run = [row for row in tables["by-run"] if (row["arm"], row["category"], row["metric"]) == ("sft", "overall", "gen")]
    assert {(row["model"], row["seed"], row["n"]) for row in by_run} == {
        (model, str(10 * i + s), "240") for i, model in enumerate(MODELS) for s in range(2)
    }
    assert np.mean([float(row["value"]) for row in by_run]) == pytest.approx(float(gen["value"]), abs=0.01)

    selection = row_of(tables["contrasts"], arm="sft", against="sft-nobody", metric="gen", category="overall")
    assert selection["claim"] == "selection by the model's judge helps"
    assert float(selection["ci_low"]) > 0
    assert row_of(tables["contrasts"], arm="c-sft", against="c-sft-more", metric="gen", category="color")
    widths = [float(row["ci_high"]) - float(row["ci_low"]) for row in tables["contrasts"] if row["ci_low"]]
    assert min(widths) > 0
    assert "selection by the model's judge helps: sft against sft-nobody" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_study_says_what_was_trained_on(runs, tmp_path, monkeypatch):
    tables = study_of(monkeypatch, tmp_path, runs)
    for arm, recovered in (("c-sft", 50), ("c-sft-base", 37.5)):
        row = row_of(tables["out"], benchmark="train", arm=arm, metric="recovered_prompts")
        assert (float(row["value"]), row["n"]) == (recovered, "48")
    assert row_of(tables["out"], benchmark="train", arm="sft-nobody", metric="discarded_prompts")["value"] == "40.0"
    assert row_of(tables["out"], benchmark="train", arm="c-sft-more", metric="trained_precision")["n"] == str(6 * 16)
    redrawn = row_of(tables["contrasts"], arm="c-sft", against="c-sft-base", metric="joined_precision")
    assert float(redrawn["ci_low"]) < float(redrawn["difference"]) < float(redrawn["ci_high"])
    constant = row_of(tables["contrasts"], arm="c-sft", against="c-sft-base", metric="recovered_prompts")
    assert (constant["difference"], constant["ci_low"]) == ("12.5", ""), "no interval of width zero"


def test_a_precision_is_not_known_before_the_judge_has_seen_all_rows(runs, tmp_path, monkeypatch):
    again = shutil.copytree(runs[0], tmp_path / "again")
    shutil.rmtree(again / "sft-epoch1/verdicts/shapes/replay")
    tables = study_of(monkeypatch, tmp_path, [again])
    values = {
        (arm, metric): row_of(tables["out"], benchmark="train", arm=arm, metric=metric)["value"]
        for arm in ("sft", "c-sft")
        for metric in ("chosen_precision", "trained_precision")
    }
    assert values["c-sft", "trained_precision"] == "", "without the replayed rows, it would be that of sft"
    assert values["c-sft", "chosen_precision"] == values["sft", "chosen_precision"] == values["sft", "trained_precision"] != ""
    together = study_of(monkeypatch, tmp_path, [again, *runs[1:]])
    pooled = row_of(together["out"], benchmark="train", arm="c-sft", metric="trained_precision")
    assert (pooled["value"], pooled["n"]) == ("", "0"), "it is not known of one of the runs"


def test_pieces_that_an_earlier_configuration_has_left_are_not_counted(runs, tmp_path, monkeypatch):
    again = shutil.copytree(runs[0], tmp_path / "again")
    for path in again.glob("*/scores/validation/0000.parquet"):
        shutil.copy(path, path.with_name("0007.parquet"))
    for path in again.glob("*/verdicts/shapes/validation/0000.parquet"):
        shutil.copy(path, path.with_name("0007.parquet"))
    assert study_of(monkeypatch, tmp_path, [again])["out"] == study_of(monkeypatch, tmp_path, [runs[0]])["out"]


def test_the_study_says_whether_judging_of_scenes_improves(runs, tmp_path, monkeypatch):
    tables = study_of(monkeypatch, tmp_path, runs)
    for metric in ("adversarial_accuracy", "pair_accuracy", "pair_auc", "caption_true"):
        better = row_of(tables["contrasts"], benchmark="scenes", arm="sft", against="base", metric=metric, category="overall")
        assert 0 < float(better["ci_low"]) < float(better["difference"]) < float(better["ci_high"])
    assert row_of(tables["contrasts"], benchmark="scenes", arm="c-sft", against="sft", metric="pair_auc", category="relation")
    counted = row_of(tables["out"], benchmark="scenes", arm="sft", metric="adversarial_accuracy", category="overall")
    assert (counted["n"], counted["models"]) == (str(6 * 40), "3")
    assert len({row["seed"] for row in tables["by-run"] if row["benchmark"] == "scenes"}) == 6


def test_runs_with_other_questions_are_refused(runs, tmp_path):
    again = shutil.copytree(runs[1], tmp_path / "again")
    rows = manifests.read_rows(again / "sft/answers/scenes.parquet", "answers")
    manifests.write(again / "sft/answers/scenes.parquet", "answers", rows[:-1], stage="stages.tools.study")
    found, config = study.open_runs([runs[0], again])
    with pytest.raises(UserError, match=r"again/sft/answers/scenes.parquet: not the questions of"):
        study.understanding_rows(found, config, "scenes")


def test_an_interval_says_what_it_is_over(runs, tmp_path, monkeypatch, capsys):
    third = write_run(tmp_path / "a-2", MODELS[0], 2)
    cases = [
        (runs[:1], "prompts", "1"),
        (runs[:2], "prompts", "1"),
        ([*runs[:2], third], "seeds", "1"),
        (runs[:4], "prompts", "2"),
    ]
    for number, (part, over, models) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        tables = study_of(monkeypatch, tmp_path / str(number), part)
        row = row_of(tables["out"], arm="sft", category="overall", metric="gen")
        assert float(row["delta_ci_low"]) < float(row["delta"]) < float(row["delta_ci_high"])
        assert (row["seeds"], row["models"], row["interval"]) == (str(len(part)), models, over)
        redrawn = row_of(tables["contrasts"], arm="c-sft", against="c-sft-base", metric="joined_precision")
        assert redrawn["interval"] == ("" if over == "prompts" else over), "what has no prompts in common needs three runs"
        assert f", over {over})" in capsys.readouterr().out


def test_rounds_that_go_on_from_a_trained_checkpoint_count_as_the_checkpoint_that_they_began_from(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"first-{seed}", MODELS[0], seed)
        write_run(tmp_path / f"second-{seed}", f"{tmp_path}/first-{seed}/sft/checkpoint", seed)
    found, _ = study.open_runs([tmp_path / f"second-{seed}" for seed in (0, 1)])
    assert {run.model for run in found} == {MODELS[0]}


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    again = shutil.copytree(runs[0], tmp_path / "again")
    with pytest.raises(UserError, match=r"again/run_config.yaml: has the seed of .*, 0, so both train on the same prompts"):
        study.open_runs([runs[0], again])
    with pytest.raises(UserError, match="different numbers of runs: models/a has 2, models/b has 1; give as many runs of each"):
        study.open_runs(runs[:3])
    text = (again / "run_config.yaml").read_text()
    (again / "run_config.yaml").write_text(text.replace("accept_threshold: 0.9", "accept_threshold: 0.95"))
    with pytest.raises(UserError, match=r"differs from that of .* in more than run, seed and model.checkpoint"):
        study.open_runs([runs[0], again])


def test_the_claims_are_about_the_arms_of_the_study_and_of_the_ablations():
    default = yaml.safe_load((ROOT / "config.yaml").read_text())
    overlays = [yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text()) for name in ("study", "ablations")]
    measured, ablated = (validate(merged(default, overlay)) for overlay in overlays)
    assert list(measured.benchmarks) == ["test"]
    assert list(ablated.benchmarks) == ["validation"]
    arms = {arm for _, arm, against, _ in study.CLAIMS for arm in (arm, against)}
    assert arms == {"base", "c-sft-stall", *measured.arms, *ablated.arms}  # make ablations adds c-sft-stall


def test_the_epoch_at_which_an_arm_stalls_is_read_from_its_curves(tmp_path):
    points = {0: 40, 1: 44, 2: 46, 3: 46.2, 4: 49}
    for run, shift in (("a", -1), ("b", 1)):
        rows = [f"validation,sft,{epoch},overall,gen,{gen + shift}" for epoch, gen in points.items()]
        rows += [f"validation,sft,{epoch},overall,non,{gen}" for epoch, gen in points.items()]
        (tmp_path / f"{run}.csv").write_text("\n".join(["benchmark,arm,epoch,category,metric,value", *rows]))
    curves = [tmp_path / "a.csv", tmp_path / "b.csv"]
    assert done("tools.stall", "--curves", *curves, "--arm", "sft").stdout.strip() == "2"
    assert done("tools.stall", "--curves", *curves, "--arm", "sft", "--least", 0.1).stdout.strip() == "3"
    refused(stage("tools.stall", "--curves", *curves, "--arm", "dpo"), "a.csv", "no curve of Gen.", "evaluate.every_checkpoint")
