"""The workflow as users run it: the contents of one real run, and its continuation after being killed."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from base64 import urlsafe_b64decode as b64decode
from pathlib import Path

import duckdb
import pandas
import pytest
from PIL import Image

from stages.common.manifests import SCHEMAS, content_hash
from tests.helpers import ROOT, call, completed, environment, write_config


def manifests_of(folder: Path) -> dict[str, str]:
    """Return content hashes of all results of a run: manifests, image shards, checkpoints, summary and contact sheet."""
    results = folder / "results" / "small"
    paths = [path for path in results.rglob("*") if path.suffix in (".parquet", ".tar", ".safetensors", ".csv", ".png")]
    return {
        str(path.relative_to(results)): content_hash(path)
        for path in paths
        if "work" not in path.relative_to(results).parts and "logs" not in path.parts
    }


def test_a_run_ends_with_the_table(run):
    _, folder, output = run
    with (folder / "results/small/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["arm"] for row in rows)) == ["base", "sft", "dpo", "c-sft"]
    assert {"arm", "category", "gen", "und", "und_n", "non", "gen_ci_low", "gen_ci_high", "gen_delta"} <= set(rows[0])
    assert {"overall", "color", "complex"} <= {row["category"] for row in rows}
    base = next(row for row in rows if row["arm"] == "base" and row["category"] == "overall")
    assert 0 < float(base["gen"]) < 100
    assert (base["und"], base["und_n"], float(base["und_paper"])) == ("", "0", 50)
    assert re.search(r"^base +\d+\.\d", output, re.MULTILINE)
    assert Image.open(folder / "results/small/contact_sheet.png").width > 500
    assert Image.open(folder / "results/small/judge_report.png").width > 500
    assert "Judge report of " in output
    assert "accept_threshold: 0.9" in (folder / "results/small/run_config.yaml").read_text()


def test_on_a_machine_with_gpus_one_job_with_a_model_runs_at_a_time(tmp_path):
    config, inside = write_config(tmp_path), tmp_path / "results/small/base/candidates/train"
    shards = [inside.relative_to(tmp_path) / f"{number:04d}.parquet" for number in range(2)]
    with_a_gpu = (
        "import sys; from pathlib import Path; from stages.tools import gpus; gpus.DEVICES = (Path('/dev/null'),); "
        "from snakemake.cli import main; main(sys.argv[1:])"
    )
    command = (sys.executable, "-c", with_a_gpu, "--cores", "2", "--directory", tmp_path, "--configfile", config, "--", *shards)
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    events = re.findall(r"Drawing: base|Finished jobid: \d+ \(Rule: generate\)", result.stdout + result.stderr)
    assert [event.split(":")[0] for event in events] == ["Drawing", "Finished jobid"] * 2


@pytest.mark.parametrize(("options", "limited"), [(("--cores", "2"), True), (("--executor", "slurm", "--jobs", "2"), False)])
def test_a_login_node_with_a_gpu_does_not_limit_the_cluster(tmp_path, options, limited):
    shown = (
        "import sys; from pathlib import Path; from stages.tools import gpus; gpus.DEVICES = (Path('/dev/null'),); "
        "from snakemake.cli import main; from snakemake.workflow import Workflow; "
        "Workflow.execute = lambda self, *_, **__: print('limited:', 'gpu' in self.global_resources) or True; "
        "main(sys.argv[1:])"
    )
    command = (sys.executable, "-c", shown, *options, "--directory", tmp_path, "--configfile", write_config(tmp_path))
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert f"limited: {limited}\n" in result.stdout, result.stderr


def test_arms_share_what_they_have_in_common(run):
    _, folder, _ = run
    results = folder / "results/small"
    assert (results / "sft-epoch1/checkpoint/model.safetensors").exists()
    assert not (results / "c-sft-epoch1").exists()
    assert not (results / "c-sft/pairs.parquet").exists()
    pool = pandas.read_parquet(results / "sft-epoch1/replay/pool.parquet")
    discarded = pandas.read_parquet(results / "sft/discard.parquet")
    assert set(pool.prompt_id) == set(discarded[discarded.reason == "no_accepted"].prompt_id)
    assert len(pool)


def test_every_manifest_opens_with_pandas_and_duckdb_and_they_join(run):
    _, folder, _ = run
    results = folder / "results/small"
    for path in results.rglob("*.parquet"):
        if "work" in path.relative_to(results).parts:
            continue
        frame = pandas.read_parquet(path)
        assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(len(frame),)]
        assert any(list(frame.columns) == list(columns) for columns in SCHEMAS.values())


def test_the_query_of_the_readme_finds_wrongly_accepted_images(run, monkeypatch):
    _, folder, _ = run
    monkeypatch.chdir(folder)
    query = re.search(r'duckdb.sql\("""(.*?)"""\)', (ROOT / "README.md").read_text(), re.DOTALL)
    assert query, "README shows no query"
    found = duckdb.sql(query.group(1).replace("tiny-janus", "small"))
    assert found.columns == ["prompt", "p_yes"]
    assert all(p_yes >= 0.5 for _, p_yes in found.fetchall())


def test_the_report_carries_table_and_sheet(run, tmp_path):
    source, folder, _ = run
    completed(folder, "--report", tmp_path / "report.html", source=source)
    page = (tmp_path / "report.html").read_text()
    assert "summary.csv" in page
    assert "contact_sheet.png" in page
    assert "judge_report.png" in page
    assert "results/small/report.html" in page
    completed(folder, "--report", tmp_path / "report.zip", source=source)
    with zipfile.ZipFile(tmp_path / "report.zip") as file:
        names = {name.split("/", 4)[-1] for name in file.namelist()}
    assert {"gallery.html", "review.html", "assets/gallery.js", "gallery/train/index.js", "review/sample.js"} <= names


def test_a_run_ends_with_its_pages(run):
    _, folder, _ = run
    results = folder / "results/small"
    report = (results / "report.html").read_text()
    assert "do not exist yet" not in report
    for part in ("Generation, overall", "by subtask", "The model&#39;s own judge", "What was selected", "Time and memory"):
        assert part in report, part
    assert "do not exist yet" not in (results / "pages/index.html").read_text()
    assert len(list(results.glob("pages/gallery/train/*/*.js"))) == 18


# A job of every stage: its rule, the message with which Snakemake starts it, and the seconds within which it is killed. These
# are fewer than the job takes; a light stage ends soon after its start.
KILLS = [
    ("prompts", "Prompts", 0.3),
    ("generate", "Drawing: base, train", 4.0),
    ("score", "Judging: base, scores", 4.0),
    ("judge", "External judge", 0.3),
    ("pairs", "Pairs", 0.3),
    ("reference", "Reference", 3.0),
    ("schedule", "Schedule", 0.3),
    ("train", "Training", 6.0),
    ("replay_pool", "Discard pool at", 0.3),
    ("replay_pairs", "Recovered", 0.3),
    ("evaluate", "Evaluation", 0.3),
    ("summary", "Summary", 0.3),
    ("judge_report", "Judge report", 0.3),
    ("pages", "Pages", 0.3),
]


def kill_at(folder: Path, rule: str, message: str, delay: float) -> bool:
    """Run the workflow up to this rule on one core until its job starts, then `kill -9` the whole process group.

    Returns False if the run ended before it was killed.
    """
    process = subprocess.Popen(
        call(folder, "--cores", 1, "--until", rule), cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(rf"Job \d+: {message}", line):
            time.sleep(delay)
            break
    reached = process.poll() is None
    if reached:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return reached


def ended(folder: Path) -> list[Path]:
    """Return the candidate manifests of jobs that Snakemake saw end. It repeats all others, even if they are complete."""
    unseen = {b64decode(path.name).decode() for path in folder.glob(".snakemake/incomplete/*")}
    found = folder.glob("results/small/*/candidates/*/*.parquet")
    return [path for path in found if str(path.relative_to(folder)) not in unseen]


@pytest.mark.slow
def test_killed_at_any_moment_one_core_ends_with_the_files_of_two_and_repeats_no_finished_shard(run, tmp_path):
    _, folder, _ = run
    write_config(tmp_path)
    generator = random.Random(0)
    finished: dict[Path, int] = {}
    kills = 0
    for rule, message, longest in KILLS:
        kills += kill_at(tmp_path, rule, message, generator.uniform(0, longest))
        for path in ended(tmp_path):
            written = path.stat().st_mtime_ns
            assert finished.setdefault(path, written) == written, f"{path} was drawn again"
    assert kills >= 10
    completed(tmp_path, "--cores", 1)
    assert manifests_of(tmp_path) == manifests_of(folder)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert not list(tmp_path.glob("results/**/*.tmp"))
    assert not list(tmp_path.glob("results/**/*.partial"))


@pytest.mark.slow
def test_learning_dynamics_of_a_finished_run(run, tmp_path):
    source, finished, _ = run
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    few = {"images": 8, "probes": 4, "alternatives": 2, "rows": 4, "logit_probes": 2, "logit_draws": 2, "step_probes": 2}
    few |= {"step_sizes": [1.0, 0.5], "segments": 1, "sketch": 64}
    completed(folder, "--cores", 2, "--config", f"dynamics={json.dumps(few)}", "--", "dynamics", source=source)
    page = (folder / "results/small/dynamics/page.md").read_text()
    assert all(kind in page for kind in ("| sft |", "| dpo |"))
    assert pandas.read_parquet(folder / "results/small/dynamics/claims.parquet").value.notna().any()
