"""The whole loop with the real workflow, including DPO and replay, for a family that is not autoregressive and has no codes."""

import re
import shutil
from pathlib import Path

import pandas
import pytest
import yaml
from PIL import Image
from stages.families.toy.family import write_checkpoint

from tests.helpers import ROOT, completed, copy_of_the_project, write_config


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


def test_a_family_without_codes_goes_through_the_whole_loop(source, tmp_path):
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
    results = tmp_path / "results/small"
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
