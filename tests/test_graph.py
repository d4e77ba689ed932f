"""The workflow as a graph: at scale, with presets and bad input, and the status that is read from its files."""

import re
import shutil
import subprocess

import pytest
import yaml

from stages.common import manifests
from stages.tools.interrupted import read_jobs
from tests.helpers import (
    ROOT,
    TINY,
    call,
    completed,
    copy_of_the_project,
    done,
    environment,
    measured,
    merged,
    refused,
    snakemake,
    stage,
    write_config,
)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """6,000 prompts, all arms of the default run, replay."""
    folder = tmp_path_factory.mktemp("large")
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    for name, count in (("train", 6000), ("evaluation", 300)):
        (folder / f"{name}.txt").write_text("".join(f"a {name} prompt of number {number}\n" for number in range(count)))
    config["prompts"] = {"source": "text", "files": [str(folder / "train.txt")]}
    config["benchmarks"]["validation"]["prompts"] = {"source": "text", "files": [str(folder / "evaluation.txt")]}
    changes = {"model": {"checkpoint": str(TINY)}, "generate": {"shards": 200}}
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(config, changes), sort_keys=False))
    return folder


@pytest.mark.slow
def test_a_dry_run_of_5000_jobs_holds_less_than_a_gigabyte(large):
    output, _, megabytes = measured(*call(large, "--profile", "slurm", "-n"))  # `python -m speed.workflow` measures the time
    total = next(line for line in output.splitlines() if line.startswith("total "))
    assert int(total.split()[1]) >= 5000
    assert megabytes <= 1000


def test_status_names_what_is_done_and_what_failed(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("not JSON\n")
    (tmp_path / "large disk").mkdir()
    (tmp_path / "results").symlink_to("large disk")
    config = write_config(tmp_path)
    broken = {"source": "geneval", "files": [str(tmp_path / "prompts.jsonl")]}
    fields = yaml.safe_load(config.read_text())
    fields["benchmarks"]["validation"]["prompts"] = broken
    config.write_text(yaml.safe_dump(fields))
    assert snakemake(tmp_path, "--cores", 1, "--keep-going", "--until", "prompts").returncode
    text = stage("tools.status", tmp_path / "results/small").stdout
    row = next(line for line in text.splitlines() if line.startswith("prompts"))
    assert row.split() == ["prompts", "1", "1"]
    assert "failed: prompts/validation.parquet" in text
    assert "prompts.jsonl" in text.split("failed: ")[1]


def test_status_knows_every_job_of_a_finished_run(run):
    source, folder, _ = run
    summary = completed(folder, "--summary", source=source)
    outputs = {line.split("\t")[0] for line in summary.splitlines() if line.startswith("results/")}
    known = {job.out for job in read_jobs(folder / "results/small")}
    assert known <= outputs
    others = (
        ".tar",
        ".md",
        ".tex",
        "by_subtask.csv",
        "discard.parquet",
        "training.parquet",
        "training.png",
        "judge_report.png",
        "small/pages",
    )  # further outputs of the same jobs
    assert all(file.endswith(others) for file in outputs - known)
    table = stage("tools.status", folder / "results/small").stdout
    assert sum(int(line.split()[1]) for line in table.splitlines()[1:]) == len(known)  # all of them are done


def test_status_of_a_folder_that_is_no_run(tmp_path):
    result = stage("tools.status", tmp_path)
    assert result.returncode == 1
    assert "jobs.jsonl" in result.stderr


def test_a_configuration_without_arms_says_so_and_names_the_presets(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": "mine", "model": {"checkpoint": str(TINY)}}))
    refused(snakemake(tmp_path, "-n"), "arms is empty", "configs/janus-pro-7b.yaml")


def test_a_file_of_ones_own_is_laid_over_a_preset(tmp_path):
    files = ["configs/janus-pro-7b.yaml", str(tmp_path / "mine.yaml")]
    command = ["snakemake", "--directory", str(tmp_path), "--configfile", *files, "-n", "--printshellcmds"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"run": "mine", "train": {"learning_rate": 3.0e-6}}))
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    refused(result, "checkpoints/Janus-Pro-7B: no such checkpoint folder")  # the preset's
    prompts = yaml.safe_load((ROOT / "configs/janus-pro-7b.yaml").read_text())["prompts"]
    (tmp_path / prompts["folder"]).mkdir(parents=True)
    for number, name in enumerate(prompts["exclude"]):
        (tmp_path / name).write_text(f"a thing of number {number}\n")
        (tmp_path / name.replace("_val", "_train")).write_text(f"a training thing of number {number}\n")
    benchmarks = {"t2i-compbench": None, "geneval": None, "science-t2i": None}
    benchmarks["own"] = {"prompts": {"source": "text", "files": prompts["exclude"]}}
    mine = {"run": "mine", "model": {"checkpoint": str(TINY)}, "generate": {"shards": 2}, "benchmarks": benchmarks}
    mine["understanding"] = dict.fromkeys(("pope", "mmb", "gqa", "mmmu", "seed"))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "results/mine/c-dpo/checkpoint" in result.stdout
    assert "results/mine/c-dpo/metrics/own.parquet" in result.stdout
    assert "geneval" not in result.stdout


def test_a_benchmark_has_as_many_pieces_as_it_says(tmp_path):
    jobs = {}
    for shards in (None, 1):
        write_config(tmp_path, benchmarks={"validation": {"shards": shards}})
        jobs[shards] = int(re.search(r"^generate +(\d+)$", completed(tmp_path, "-n"), re.MULTILINE)[1])
    assert jobs == {None: 2 * 2 + 4 * 2, 1: 2 * 2 + 4}  # training and replay, then four models on the benchmark


def test_a_judge_asks_for_what_its_own_settings_and_weights_need(tmp_path):
    source = copy_of_the_project(tmp_path)
    rules = source / "workflow/rules/scores.smk"
    rules.write_text(re.sub(r"( +)message:\n +\".*\"\n", "", rules.read_text()))  # a dry run prints the resources then
    large = shutil.copytree(TINY, tmp_path / "large")
    with (large / "further.safetensors").open("wb") as file:
        file.truncate(10**9)  # a sparse file
    family = {"kind": "family", "model": {"checkpoint": str(TINY)}}
    places = {"four": {"workers": 4}, "one": {}, "none": {"device": "cpu", "workers": 2}, "large": {"checkpoint": str(large)}}
    judges = {name: family | {"model": family["model"] | place} for name, place in places.items()}
    write_config(tmp_path / "run", model={"workers": 2}, judges=judges, audit={"judges": list(judges)})
    files = [f"results/small/base/verdicts/{name}/validation/0000.parquet" for name in judges]
    output = completed(tmp_path / "run", "-n", *files, source=source)
    asked = dict(re.findall(r"rule judge_on_gpu:\n(?: .*\n)* +output: \S+verdicts/(\w+)/(?:.*\n)*? +resources: (.*)", output))
    gpus, memory = (
        {name: int(re.search(rf"\b{key}=(\d+)", text)[1]) for name, text in asked.items()} for key in ("gpu", "mem_mb")
    )
    assert gpus == {"four": 4, "one": 1, "none": 0, "large": 1}
    assert memory["four"] > 3.9 * memory["one"], "each process loads the weights"
    assert memory["none"] > 1.9 * memory["one"], "on a CPU as well"
    assert memory["large"] > memory["one"] + 1900


def test_a_scorer_that_an_audit_compares_with_other_judges_judges_all_images(tmp_path):
    (tmp_path / "table.csv").write_text("candidate_id,verdict\n")
    judges = {name: {"kind": "table", "files": [str(tmp_path / "table.csv")]} for name in ("people", "color")}
    scorers = {"color": "people", "shape": "color"}
    write_config(tmp_path, judges=judges, benchmarks={"validation": {"scorers": scorers}}, audit={"judges": ["people"]})
    files = [f"results/small/base/verdicts/{name}/validation/0000.parquet" for name in judges]
    output = completed(tmp_path, "-n", "--printshellcmds", *files)
    commands = dict(re.findall(r"stages\.judge .*--judge (\w+)(.*)", output))
    assert "--categories" not in commands["people"]
    assert "--categories shape" in commands["color"]


def test_a_category_may_have_a_name_that_a_shell_would_read_otherwise(tmp_path):
    prompts, table = tmp_path / "left (of) right.txt", tmp_path / "table.csv"
    prompts.write_text("a red dog\n")
    table.write_text("candidate_id,verdict\n")
    config = write_config(tmp_path, judges={name: {"kind": "table", "files": [str(table)]} for name in ("people", "scorer")})
    fields = yaml.safe_load(config.read_text())
    source = {"source": "text", "files": [str(prompts)]}
    fields["benchmarks"] = {"val": {"prompts": source, "judge": "people", "scorers": {prompts.stem: "scorer"}}}
    config.write_text(yaml.safe_dump(fields))
    output = completed(tmp_path, "-n", "--printshellcmds", "results/small/base/verdicts/scorer/val/0000.parquet")
    assert "--categories 'left (of) right' --out" in output


def test_overlapping_prompts_are_refused_before_anything_is_drawn(tmp_path):
    (tmp_path / "train.txt").write_text("a red dog\na blue cat\n")
    (tmp_path / "val.txt").write_text("A blue cat.\n")
    config = write_config(tmp_path, prompts={"source": "text", "files": [str(tmp_path / "train.txt")]})
    fields = yaml.safe_load(config.read_text())
    fields["benchmarks"] = {"val": {"prompts": {"source": "text", "files": [str(tmp_path / "val.txt")]}}}
    config.write_text(yaml.safe_dump(fields))
    refused(snakemake(tmp_path, "--cores", 2), "1 prompts of the benchmark val", "blue cat", "exclude")
    assert not list(tmp_path.glob("results/small/base/candidates/*/*.parquet"))
    fields["prompts"]["exclude"] = [str(tmp_path / "val.txt")]
    config.write_text(yaml.safe_dump(fields))
    assert snakemake(tmp_path, "--cores", 2, "results/small/prompts/sets.parquet").returncode == 0


def test_a_scorer_of_a_category_without_prompts_is_refused_before_anything_is_drawn(tmp_path):
    rows = {
        name: [{"prompt_id": name, "prompt": name, "category": "color", "source": "text", "split": "text"}] for name in "ab"
    }
    for name in rows:
        manifests.write(tmp_path / f"{name}.parquet", "prompts", rows[name], stage="stages.prompts")
    files = ("--train", tmp_path / "a.parquet", "--benchmarks", tmp_path / "b.parquet", "--out", tmp_path / "sets.parquet")
    fields = {"prompts": {"source": "shapes"}, "scorers": {"color": "shapes", "colour": "shapes"}}
    config = write_config(tmp_path, benchmarks={"b": fields})
    refused(stage("prompt_sets", "--config", config, *files), "benchmarks.b.scorers.colour", "categories are color", "null")
    config = write_config(tmp_path, benchmarks={"b": merged(fields, {"scorers": {"colour": None}})})
    done("prompt_sets", "--config", config, *files)
