"""The workflow as users run it: one real run, then what an edit re-runs, what a kill costs, and what one finds inside."""

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import time
from base64 import urlsafe_b64decode as b64decode
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pandas
import pytest
from PIL import Image

from stages.common.manifests import SCHEMAS, content_hash
from tests.conftest import ROOT, call, environment, snakemake, write_config

SOURCES = ("Snakefile", "workflow", "stages", "profiles", "envs", "README.md")


def completed(folder: Path, *arguments: object, source: Path = ROOT) -> str:
    """A snakemake call that must succeed; returns what it printed."""
    result = snakemake(folder, *arguments, source=source)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def manifests_of(folder: Path) -> dict[str, str]:
    """Content hashes of everything that a run leaves: manifests, image shards, checkpoints, summary, contact sheet."""
    results = folder / "results" / "small"
    paths = [path for path in results.rglob("*") if path.suffix in (".parquet", ".tar", ".safetensors", ".csv", ".png")]
    return {
        str(path.relative_to(results)): content_hash(path)
        for path in paths
        if "work" not in path.relative_to(results).parts and "logs" not in path.parts
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The small configuration, run from nothing in a copy of the repository that tests may edit."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("run")
    write_config(folder)
    output = completed(folder, "--cores", 2, source=source)
    return source, folder, output


def test_a_run_ends_with_the_table(run):
    _, folder, output = run
    with (folder / "results/small/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["arm"] for row in rows)) == ["base", "sft", "dpo", "c-sft"]
    assert {"arm", "category", "gen", "und", "und_n", "non", "gen_ci_low", "gen_ci_high", "gen_delta"} <= set(rows[0])
    assert {"overall", "color", "complex"} <= {row["category"] for row in rows}
    base = next(row for row in rows if row["arm"] == "base" and row["category"] == "overall")
    assert 0 < float(base["gen"]) < 100
    assert float(base["und"]) == 50
    assert base["und_n"] == "0"
    assert re.search(r"^base +\d+\.\d", output, re.MULTILINE)
    assert Image.open(folder / "results/small/contact_sheet.png").width > 500
    assert "accept_threshold: 0.9" in (folder / "results/small/run_config.yaml").read_text()


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


def rerun(run, *arguments: object) -> set[str]:
    """The rules that `snakemake -n` would run, without `all`."""
    source, folder, _ = run
    output = completed(folder, "-n", *arguments, source=source)
    table = re.search(r"Job stats:\njob .*\n-.*\n((?:\S+ +\d+\n)+)", output)
    if not table:
        assert "Nothing to be done" in output, output
        return set()
    return {line.split()[0] for line in table.group(1).splitlines()} - {"all", "total"}


def outputs(run, stage: str) -> str:
    """The --out of every command of that stage that `snakemake -n` would run, one a line."""
    source, folder, _ = run
    text = completed(folder, "-n", "--printshellcmds", source=source)
    return "\n".join(re.findall(rf"python -m stages\.{stage} .*?--out (\S+)", text))


@contextmanager
def restored(path: Path):
    """What a test does to the file is undone afterwards."""
    before = path.read_text()
    try:
        yield before
    finally:
        path.write_text(before)


@contextmanager
def edited(path: Path):
    """A changed statement at the end of a module."""
    with restored(path) as before:
        path.write_text(before + ("\nEDITED = 1\n" if path.suffix == ".py" else "\nedited\n"))
        yield


def test_nothing_runs_when_nothing_changed(run):
    assert rerun(run) == set()


def test_touching_score_runs_scoring_and_what_follows_but_draws_nothing_for_training(run):
    source, *_ = run
    with edited(source / "stages/score.py"):
        rules = rerun(run, "--until", "pairs")
        assert rules == {"score", "pairs"}
        assert {"score", "pairs", "schedule", "train", "evaluate", "summary"} <= rerun(run)
        assert "results/small/sft/candidates/" in outputs(run, "generate")
        assert "base/candidates" not in outputs(run, "generate")


def test_a_comment_in_a_stage_runs_nothing(run):
    source, *_ = run
    path = source / "stages/score.py"
    with restored(path) as before:
        path.write_text(before + "\n# a remark\n")
        assert rerun(run) == set()


def test_the_readme_runs_nothing(run):
    source, *_ = run
    with edited(source / "README.md"):
        assert rerun(run) == set()


def test_the_learning_rate_runs_training_and_what_follows(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, train={"learning_rate": 1e-4})
        rules = rerun(run)
        assert "train" in rules
        assert not rules & {"prompts", "pairs", "reference"}
        assert "base/" not in outputs(run, "generate") + outputs(run, "judge")
        assert "small/base/" not in outputs(run, "score")


def test_speed_settings_and_the_sheets_size_draw_nothing(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, generate={"batch_size": 10}, score={"batch_size": 5}, report={"prompts": 2})
        assert rerun(run) == {"contact_sheet"}


def test_adding_an_arm_runs_only_that_arm(run):
    _, folder, _ = run
    with restored(folder / "config.yaml"):
        write_config(folder, arms={"sft-slow": {"objective": "sft", "epochs": 2, "train": {"learning_rate": 1e-5}}})
        rules = rerun(run)
        assert "pairs" not in rules
        for stage in ("generate", "score", "train", "judge", "evaluate"):
            nodes = set(re.findall(r"results/small/([^/]+)/", outputs(run, stage)))
            assert nodes <= {"sft-slow", "sft-slow-epoch1"}
            assert nodes


def test_the_report_carries_table_and_sheet(run, tmp_path):
    source, folder, _ = run
    completed(folder, "--report", tmp_path / "report.html", source=source)
    page = (tmp_path / "report.html").read_text()
    assert "summary.csv" in page
    assert "contact_sheet.png" in page


# A job of every stage: its rule, the message with which Snakemake starts it, and within how many seconds it is killed (less
# than it takes: a light stage is over soon after it has started).
KILLS = [
    ("prompts", "Prompts", 0.3),
    ("generate", "Drawing: base, train", 4.0),
    ("score", "Judging: base", 4.0),
    ("judge", "External judge", 0.3),
    ("pairs", "Pairs", 0.3),
    ("reference", "Reference", 3.0),
    ("schedule", "Schedule", 0.3),
    ("train", "Training", 6.0),
    ("replay_pool", "Discard pool at", 0.3),
    ("replay_pairs", "Recovered", 0.3),
    ("evaluate", "Evaluation", 0.3),
    ("summary", "Summary", 0.3),
]


def kill_at(folder: Path, rule: str, message: str, delay: float) -> bool:
    """On one core, run what ends in this rule until such a job starts, then `kill -9` the whole process group; False if the
    run ended before."""
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
    """Candidate manifests whose jobs Snakemake saw end. One that it did not see end, though all was written, is done again."""
    unseen = {b64decode(path.name).decode() for path in folder.glob(".snakemake/incomplete/*")}
    found = folder.glob("results/small/*/candidates/*/*.parquet")
    return [path for path in found if str(path.relative_to(folder)) not in unseen]


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
