"""The benchmarks run: on a CPU and a small model, and on a small workflow. What they find is not judged here."""

import json
import subprocess
import sys

import pytest

from speed.records import ROOT
from speed.workflow import environment

pytestmark = pytest.mark.slow


def benchmark(name, *arguments):
    command = [sys.executable, "-m", f"speed.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


def told(name, out, *arguments):
    """The JSON and the table of a benchmark that must succeed."""
    result = benchmark(name, *arguments, "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(out.read_text()), result.stdout


def test_every_kind_of_measurement_of_a_gpu_runs_on_a_cpu(tmp_path):
    facts, table = told("gpu", tmp_path / "gpu.json", "--device", "cpu", "--geometry", "tiny")
    assert facts["left_out"] == []
    found = [(row["work"], row["way"].split(",")[-1].strip(), row["batch"]) for row in facts["results"]]
    assert found == [
        ("pixels", "codes to pictures", 10),
        *[("draw", way, batch) for batch in (4, 10) for way in ("12 of 16 steps", "whole images")],
        ("draw", "two lengths", 10),
        *[("judge", "p_yes", batch) for batch in (4, 10)],
        *[row for lora in ("the whole LLM", "LoRA 4") for row in [("sft", lora, 8)] * 2 + [("dpo", lora, 4)] * 2],
    ]
    for row in facts["results"]:
        assert row["images_per_second"] > 0
        assert row["seconds_per_1000_images"] == pytest.approx(1000 / row["images_per_second"])
        assert row["name"] in table
    assert {"device", "dtype", "versions", "commit", "minutes", "geometries"} <= facts.keys()


def test_a_measurement_for_which_there_is_no_time_is_left_out_with_the_reason(tmp_path):
    facts, table = told("gpu", tmp_path / "gpu.json", "--device", "cpu", "--geometry", "tiny", "--minutes", 0.01)
    assert facts["results"] == []
    assert facts["left_out"]
    assert all("0.01 minutes were over" in row["why"] and row["name"] in table for row in facts["left_out"])


@pytest.mark.parametrize(
    ("arguments", "word"), [([], "no CUDA device"), (["--device", "cpu"], "--geometry tiny")], ids=["no GPU", "large on a CPU"]
)
def test_what_cannot_be_measured_is_refused(arguments, word, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = benchmark("gpu", *arguments, "--out", tmp_path / "gpu.json")
    assert result.returncode == 1
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_the_workflow_is_measured_beside_its_baselines(tmp_path):
    facts, table = told("workflow", tmp_path / "workflow.json", "--shards", 1, "--repeats", 1)
    assert facts["jobs"] > 30
    names = [row["name"] for row in facts["results"]]
    for row in facts["results"]:
        assert row["cpu_seconds"] > 0
        assert row["peak_megabytes"] > 0
        assert row["name"] in table
        if "baseline" in row:
            assert names.index(row["baseline"]) < names.index(row["name"])
            assert row["cpu_seconds_ratio"] > 0
    assert sum("baseline" in row for row in facts["results"]) == 3
