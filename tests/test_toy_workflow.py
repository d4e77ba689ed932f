"""The whole loop with the real workflow, including DPO and replay, for a family that is not autoregressive and has no codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow.parquet
import pytest
import yaml
from PIL import Image
from stages.families.toy.family import write_checkpoint

from tests.helpers import ROOT, completed, copy_of_the_project, environment, planned_outputs, rerun, restored, write_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project to which a user has added the toy family, and what docs/extending.md shows:
    a judge, a suite and an understanding benchmark.

    Each is a module of its own and the one line in its registry that the page names.
    """
    folder = copy_of_the_project(tmp_path_factory.mktemp("source"))
    shutil.copytree(ROOT / "tests/families/toy", folder / "stages/families/toy")
    register(folder, "families", '"toy": "stages.families.toy:TOY",')
    page = (ROOT / "docs/extending.md").read_text()
    for code in re.findall(r"```python\n(# stages/(?:judges|suites|understanding)/.*?)```", page, re.DOTALL):
        (folder / code.split("\n")[0].removeprefix("# ")).write_text(code)
    for line, package in re.findall(r"one line in `[A-Z]+`: `(\"\w+\": \"stages\.(judges|suites|understanding)\.[^`]*)`", page):
        register(folder, package, line)
    return folder


def register(folder: Path, package: str, line: str) -> None:
    """Add a line at the beginning of the registry of families, judges, suites or understanding benchmarks."""
    path = folder / "stages" / package / "__init__.py"
    path.write_text(path.read_text().replace(f"{package.upper()} = {{\n", f"{package.upper()} = {{\n    {line}\n"))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    """The folder of a finished run of the toy family: three arms, a replay, three benchmarks, one of them without a judge."""
    tmp_path = tmp_path_factory.mktemp("run")
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "light.csv").write_text("prompt,category\na dark cat,light\na bright dog,light\n")
    for name, gray in (("night.png", 20), ("noon.png", 230)):
        Image.new("RGB", (12, 12), (gray,) * 3).save(tmp_path / name)
    lines = ["image,prompt,category,answer", "night.png,a dark sky,light,yes", "noon.png,a dark sky,light,no", ""]
    (tmp_path / "sky.csv").write_text("\n".join(lines))
    words = ["cat", "dog", "boat", "tree", "cup", "key", "lamp", "road", "bird"]
    for name, phrase in (("train", "a {}"), ("val", "two {}s")):
        (tmp_path / f"{name}.txt").write_text("".join(phrase.format(word) + "\n" for word in words))
    config = write_config(tmp_path)
    fields = yaml.safe_load(config.read_text()) | {
        "model": {"family": "toy", "checkpoint": str(checkpoint)},
        "prompts": {"source": "text", "files": [str(tmp_path / "train.txt")]},
        "judges": {"dim": {"kind": "brightness", "threshold": 0.3}},
        "benchmarks": {
            "val": {"prompts": {"source": "text", "files": [str(tmp_path / "val.txt")]}, "images_per_prompt": 2},
            "light": {
                "prompts": {"source": "csv", "files": [str(tmp_path / "light.csv")]},
                "images_per_prompt": 2,
                "judge": "dim",
            },
        },
        "understanding": {"sky": {"kind": "photos", "files": [str(tmp_path / "sky.csv")], "side": 8}},
        "generate": {"candidates": 6, "shards": 1, "sampling": {"steps": 3}},
        "score": {},
        "pairs": {"accept_threshold": 0.6, "reject_threshold": 0.6, "minimum_margin": 0.0},
        "arms": {
            "dpo": {"objective": "dpo", "epochs": 2},
            "c-dpo": {"objective": "dpo", "epochs": 2, "replay_epochs": [1]},
            "sft": {"objective": "sft", "epochs": 2, "train": {"prompt_dropout": 0.5}},
        },
    }
    config.write_text(yaml.safe_dump(fields, sort_keys=False))
    completed(tmp_path, "--cores", 2, source=source)
    return tmp_path


def test_a_family_without_codes_goes_through_the_whole_loop(folder):
    results = folder / "results/small"
    candidates = pandas.read_parquet(results / "base/candidates/train/0000.parquet")
    assert candidates.tokens.isna().all()
    assert candidates.log_probability.isna().all()
    assert set(candidates.sampling) == {'{"steps": 3, "guidance_scale": 1.0}'}
    replayed = list(results.glob("*/replay/pairs.parquet"))
    assert any(len(pandas.read_parquet(path)) for path in replayed), "no prompt was recovered, so replay was not tried"
    reference = pandas.read_parquet(results / "dpo/reference.parquet")
    assert {len(values) for values in reference.reference_chosen} == {2}  # one for each epoch of the longest arm
    for arm in ("dpo", "c-dpo", "sft"):
        assert (results / arm / "checkpoint/flow/weights.safetensors").exists()
        assert (results / arm / "checkpoint/judge/weights.safetensors").exists()
    summary = pandas.read_csv(results / "summary.csv")
    assert set(summary.arm) == {"base", "dpo", "c-dpo", "sft"}
    overall = summary[(summary.arm == "base") & (summary.category == "overall")].set_index("benchmark")
    assert pandas.isna(overall.gen["val"])  # without a judge there is only Non.
    assert 0 < overall.gen["light"] < 100
    for judge in ("dim", "brightness"):  # the benchmark's judge, and the suite's own scorer of the category
        verdicts = pandas.read_parquet(results / f"base/verdicts/{judge}/light/0000.parquet")
        assert len(verdicts) == 2 * 2
        assert verdicts.score.between(0, 1).all()
    answers = pandas.read_parquet(results / "c-dpo/answers/sky.parquet")
    assert list(answers.question) == ["Does this image show a dark sky?"] * 2
    assert set(answers.score) <= {0, 1}
    assert overall.accuracy["sky"] == 100 * pandas.read_parquet(results / "base/answers/sky.parquet").score.mean()


def test_the_tables_have_every_benchmark_of_the_run(folder):
    tables = folder / "results/small/tables"
    generation = pandas.read_csv(tables / "generation.csv").set_index("model")
    assert list(generation.index) == ["base", "dpo", "c-dpo", "sft"]
    assert generation["val gen"].isna().all()  # without a judge
    assert generation["val non"].notna().all()
    summary = pandas.read_csv(folder / "results/small/summary.csv")
    light = summary[(summary.benchmark == "light") & (summary.category == "overall")].set_index("arm")
    assert (generation["light gen"] == light.gen).all()
    assert "Gen. of light by brightness (kind brightness" in generation.recipe["base"]
    assert (pandas.read_csv(tables / "understanding.csv")["sky accuracy"].notna()).all()


WORKS = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from stages.common.config import load
from stages.tools.cost import prompts_of, report, trainings, works_of
config = load(Path(sys.argv[1]))
prompts = prompts_of(config)
works, segments = works_of(config, prompts), trainings(config, len(prompts["train"]))
text = report(config, folder=Path(sys.argv[2]))
print(json.dumps([[asdict(work) for work in works], [asdict(segment) for segment in segments], text]))
"""


def rows_in(folder: Path) -> int:
    return sum(pyarrow.parquet.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


def test_the_cost_that_is_told_before_is_that_of_the_finished_run(source, folder):
    results = folder / "results/small"
    here = environment() | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-c", WORKS, str(folder / "config.yaml"), str(results)]
    output = subprocess.run(command, cwd=source, env=here, capture_output=True, text=True, check=True).stdout
    works, segments, text = json.loads(output)
    told = {}
    for work in works:
        part, _, of_base = work["name"].partition(" of ")
        kinds = {
            "draw": "candidates", "judge": "scores-of-base" if of_base else "scores", "external": f"verdicts/{work['judge']}"
        }  # fmt: skip
        if work["kind"] in kinds:
            told[f"{work['node']}/{kinds[work['kind']]}/{part}"] = (work["count"], work["bound"])
    real = {
        str(path.parent.relative_to(results)): rows_in(path.parent)
        for pattern in ("*/candidates/*/0000.parquet", "*/scores*/*/0000.parquet", "*/verdicts/*/*/0000.parquet")
        for path in results.glob(pattern)
    }
    assert real.keys() == told.keys()
    assert {name for name, (_, bound) in told.items() if bound} == {name for name in told if "replay" in name}
    for name, (count, bound) in told.items():
        assert 0 < real[name] <= count if bound else real[name] == count, name
    assert len(segments) == len(list(results.glob("*/schedule.parquet")))
    for segment in segments:
        schedule = pandas.read_parquet(results / segment["node"] / "schedule.parquet")
        last = schedule[schedule.epoch > schedule.epoch.max() - segment["epochs"]]
        assert last.step.nunique() <= segment["steps"]
        assert last.groupby("epoch").chosen.nunique().max() <= segment["rows"]
    references = [work for work in works if work["kind"] == "reference"]
    for work in references:
        (path,) = {
            *results.glob(f"{work['node']}/reference.parquet"),
            *results.glob(f"{work['node']}/replay/reference.parquet"),
        }
        pairs = pandas.read_parquet(path)
        assert 2 * pairs.reference_chosen.map(len).sum() <= work["count"]
    assert len(references) == len(list(results.rglob("reference.parquet")))
    assert re.search(r"bytes each: measured, \d+ images of", text)


@pytest.fixture
def with_baseline(folder, tmp_path):
    """The run's configuration with a baseline, which has the base model's layout and other weights."""
    other = write_checkpoint(tmp_path / "other", seed=1)
    with restored(folder / "config.yaml") as before:
        fields = yaml.safe_load(before) | {"baselines": {"hermes": str(other)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(fields, sort_keys=False))
        yield folder


def test_a_baseline_is_evaluated_like_an_arm_and_nothing_that_exists_is_made_again(source, with_baseline):
    run, results = (source, with_baseline, ""), with_baseline / "results/small"
    reports = {"summary", "tables", "contact_sheet", "judge_report", "pages"}
    evaluation = {"generate", "score", "judge", "evaluate", "understand", "count_answers"}
    assert rerun(run) == evaluation | reports
    for stage in sorted(evaluation):
        assert {line.split("/")[2] for line in planned_outputs(run, stage).splitlines()} == {"hermes"}
    completed(with_baseline, "--cores", 2, source=source)
    assert rerun(run) == set()
    summary = pandas.read_csv(results / "summary.csv")
    assert list(dict.fromkeys(summary.arm)) == ["base", "hermes", "dpo", "c-dpo", "sft"]
    own = summary[(summary.benchmark == "light") & (summary.category == "overall")].set_index("arm")
    assert own.judge_on_base_n["hermes"] > 0
    drawn, base = (
        pandas.read_parquet(results / f"{node}/candidates/light/0000.parquet").checkpoint for node in ("hermes", "base")
    )
    assert set(drawn).isdisjoint(base)
    assert not (results / "hermes/candidates/train").exists()
    generation = pandas.read_csv(results / "tables/generation.csv")
    assert list(generation.model) == ["base", "hermes", "dpo", "c-dpo", "sft"]
    assert "/other. Sampling" in generation.recipe[0]  # the baseline's checkpoint
    assert "hermes" in set(pandas.read_parquet(results / "judge_report.parquet").checkpoint)
    assert pandas.read_parquet(results / "hermes/understanding/sky.parquet").arm.eq("hermes").all()
