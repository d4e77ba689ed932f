"""The house's own promises: pins in step, the schema up to date, light stages light, code hashes exact."""

import json
import subprocess
import sys

import pytest
import yaml

from stages.common.config import Config
from stages.common.fingerprints import code
from tests.conftest import ROOT, environment


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.strip().lower().split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda path: path.name)
def test_conda_environments_are_in_step_with_the_pins(path):
    packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
    for package in packages:
        name, version = package.lower().split("==")
        assert pins()[name] == version


def test_torch_is_pinned():
    assert pins()["torch"] == "2.13.0"


def test_the_schema_is_the_models():
    path = ROOT / "workflow" / "schemas" / "config.schema.json"
    assert json.loads(path.read_text()) == Config.model_json_schema(), (
        f"python -m stages.common.config > {path.relative_to(ROOT)}"
    )


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        (name, ("torch", "transformers", "trl", "pandas"))
        for name in ("prompts", "pairs", "schedule", "replay", "evaluate", "report")
    ]
    + [(name, ("torch", "transformers", "trl")) for name in ("generate", "score", "train", "reference", "contact_sheet")],
)
def test_help_and_light_stages_do_not_import_the_heavy_packages(stage, modules):
    script = f"import sys, stages.{stage}; print([m for m in {modules!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def names(files: list[str]) -> set[str]:
    return {name.split("@")[0] for name in files}


def test_code_is_what_a_stage_imports():
    assert "stages/score.py" not in names(code("stages.generate", "stages.families.janus.family"))
    assert {"stages/train.py", "stages/common/manifests.py"} <= names(code("stages.train"))
    assert "stages/families/janus/training.py" in names(code("stages.families.janus.family"))
    assert not any("families" in name for name in names(code("stages.pairs")))
    with pytest.raises(FileNotFoundError):
        code("stages.nothing")
