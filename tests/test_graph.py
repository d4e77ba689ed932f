"""The workflow at scale: a graph of 5,000 jobs, how it is read, and the status that is told from its files."""

import subprocess

import pytest
import yaml

from stages.common.config import load
from stages.tools.status import jobs
from tests.conftest import ROOT, TINY, call, environment, measured, merged, snakemake, stage, write_config


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """6,000 prompts, all arms of the default run, replay."""
    folder = tmp_path_factory.mktemp("large")
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    for name, count in (("train", 6000), ("evaluation", 300)):
        (folder / f"{name}.txt").write_text("".join(f"a {name} prompt of number {number}\n" for number in range(count)))
        config["prompts"][name] = {"source": "text", "files": [str(folder / f"{name}.txt")]}
    changes = {"model": {"checkpoint": str(TINY)}, "generate": {"shards": 200}}
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(config, changes), sort_keys=False))
    return folder


def test_a_dry_run_of_5000_jobs_takes_20_seconds_and_a_gigabyte_at_most(large):
    output, seconds, megabytes = measured(*call(large, "--profile", "slurm", "-n"))
    total = next(line for line in output.splitlines() if line.startswith("total "))
    assert int(total.split()[1]) >= 5000
    print(f"{total}: {seconds:.1f} s, {megabytes:.0f} MB")
    assert seconds <= 20
    assert megabytes <= 1000


def test_the_snakefile_is_read_in_2_seconds(large):
    _, seconds, _ = measured(*call(large, "--list-rules"))
    print(f"{seconds:.1f} s")
    assert seconds <= 2


@pytest.mark.parametrize("files", [["config.yaml"], ["config.yaml", "configs/study.yaml"]], ids=len)
def test_status_knows_every_job_of_the_workflow(files, tmp_path):
    result = subprocess.run(
        ["snakemake", "--configfile", *files, "--summary"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    config: dict = {}
    for file in files:
        config = merged(config, yaml.safe_load((ROOT / file).read_text()))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = [line.split("\t") for line in result.stdout.splitlines()[1:]]
    outputs = {(rule, file.removeprefix(f"results/{config['run']}/")) for file, _, rule, *_ in rows}
    known = {(job.rule, job.out) for job in jobs(load(tmp_path / "config.yaml"))}
    assert known <= outputs
    assert all(file.endswith((".tar", "discard.parquet", "training.parquet", "training.png")) for _, file in outputs - known)


def test_status_names_what_is_done_and_what_failed(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("not JSON\n")
    broken = {"source": "geneval", "files": [str(tmp_path / "prompts.jsonl")], "split": "held-out", "count": None}
    write_config(tmp_path, prompts={"evaluation": broken})
    assert snakemake(tmp_path, "--cores", 1, "--keep-going", "--until", "prompts").returncode
    text = stage("tools.status", tmp_path / "results/small").stdout
    row = next(line for line in text.splitlines() if line.startswith("prompts"))
    assert row.split() == ["prompts", "1", "1"]
    assert "failed: prompts/evaluation.parquet" in text
    assert "prompts.jsonl" in text.split("failed: ")[1]


def test_status_of_a_folder_that_is_no_run(tmp_path):
    result = stage("tools.status", tmp_path)
    assert result.returncode == 1
    assert "run_config.yaml" in result.stderr
