"""Consistency of the repository: dependency pins, the generated schema, light imports, and fingerprints."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from pydantic import BaseModel

from stages.common.config import Config
from stages.common.fingerprints import code
from stages.families import FAMILIES, describe
from stages.judges import JUDGES, judge_kind
from stages.suites import SUITES, open_suite
from stages.understanding import UNDERSTANDING, understanding_kind
from tests.helpers import ROOT, environment


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.strip().lower().split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda path: path.name)
def test_conda_environments_are_in_step_with_the_pins(path):
    packages = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
    for package in packages:
        name, version = package.lower().split("==")
        assert pins()[name] == version


def test_the_profile_sends_every_rule_that_asks_for_a_gpu_to_its_partition():
    rules = (path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    named = set()
    for text in rules:
        for part in re.split(r"^ *(?=rule \w+:|use rule )", text, flags=re.MULTILINE):
            if re.search(r"^ +gpu=", part, re.MULTILINE):
                named.add(re.match(r"(?:use rule \w+ as|rule) (\w+)", part)[1])
    resources = yaml.safe_load((ROOT / "slurm/profile.v9+.yaml").read_text())["set-resources"]
    assert {"train", "understand"} < named
    assert {rule for rule, asked in resources.items() if asked["slurm_partition"] == "gpu"} == named


def test_torch_is_pinned():
    assert pins()["torch"] == "2.13.0"


def test_generated_files_are_in_step_with_the_configuration():
    script = "import json; from stages.tools.schema import json_schema, page; print(json.dumps([json_schema(), page()]))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    schema, page = json.loads(result.stdout)
    for path, text in (("workflow/schemas/config.schema.json", schema), ("docs/configuration.md", page)):
        assert (ROOT / path).read_text() == text, f"{path} is out of step: run python -m stages.tools.schema"


def sections(section: type[BaseModel]) -> list[type[BaseModel]]:
    """Return a section of the configuration and all sections below it."""
    found = [section]
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += sections(kind)
    return found


def test_every_key_of_the_configuration_has_a_description_in_a_sentence():
    others = [*(open_suite(name).settings for name in SUITES), *(judge_kind(name).settings for name in JUDGES)]
    others += [understanding_kind(name).settings for name in UNDERSTANDING]
    others += [describe(name).sampling for name in FAMILIES]
    for section in [*sections(Config), *(found for other in others for found in sections(other))]:
        for name, field in section.model_fields.items():
            if name not in ("source", "kind"):
                assert field.description and field.description[-1] == ".", f"{section.__name__}.{name}"


def test_the_page_on_evaluation_lists_every_suite_and_judge():
    tables = (ROOT / "docs/evaluation.md").read_text().split("\n## ")[0]
    listed = set(re.findall(r"^\| \[?`([a-z0-9-]+)`", tables, re.MULTILINE))
    assert listed == {*SUITES, *JUDGES}


LIGHT = (
    *("prompts", "pairs", "controls", "schedule", "replay"),
    *("evaluate", "rescore", "report", "tables", "judge_report", "count_answers", "learning_curves", "audit", "browse"),
    *("dynamics.select", "dynamics.claims", "dynamics.page"),
)


@pytest.mark.parametrize(
    ("stage", "modules"),
    [(name, ("torch", "transformers", "trl", "pandas")) for name in LIGHT]
    + [
        (name, ("torch", "transformers", "trl"))
        for name in (
            *("generate", "score", "train", "reference", "contact_sheet", "understand"),
            *(f"dynamics.{name}" for name in ("terms", "steps", "follow", "logits", "embed", "sketch")),
        )
    ],
)
def test_help_and_light_stages_do_not_import_the_heavy_packages(stage, modules):
    script = f"import sys, stages.{stage}; print([m for m in {modules!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def names(files: list[str]) -> set[str]:
    return {name.split("@")[0] for name in files}


def test_code_is_what_a_stage_imports():
    assert "stages/score.py" not in names(code("stages.generate", mentioned=["FAMILIES[janus]"]))
    assert {"stages/train.py", "stages/common/manifests.py"} <= names(code("stages.train"))
    assert "stages/families/janus/training.py" in names(code("stages.train", mentioned=["FAMILIES[janus]"]))
    assert not any("families" in name for name in names(code("stages.pairs")))
    with pytest.raises(FileNotFoundError):
        code("stages.nothing")
