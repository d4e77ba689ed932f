"""`snakemake --profile slurm` on a real SLURM that this module starts, and everything that a cluster does to a job.

One run meets every fault once and must end by itself with the files of an undisturbed local run. `make test-slurm` runs it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from tests import slurm_cluster as cluster
from tests.helpers import (
    ROOT,
    SMALL,
    call,
    completed,
    copy_of_the_project,
    edited,
    environment,
    losses,
    merged,
    rerun,
    stage,
)
from tests.test_presets import assert_the_tables_are_whole, needs_benchmarks, place, with_phrases  # noqa: F401
from tests.test_workflow import ended, manifests_of

pytestmark = pytest.mark.slurm
ON_GPUS = ("generate", "score", "reference", "train")
# Small batches leave time to disturb a shard between two of them. They change no candidate.
CONFIG = merged(SMALL, {"generate": {"batch_size": 3}, "score": {"batch_size": 5}}) | {
    "arms": {"c-sft": {"objective": "sft", "epochs": 2, "replay_epochs": [1]}}
}
BATCHES = 18 * 6 // 2 // 3  # of a shard of the training prompts


@pytest.fixture(scope="module", autouse=True)
def slurm():
    cluster.install()
    if reason := cluster.missing():
        pytest.fail(f"these tests need a SLURM of their own: {reason}")
    cluster.start(accounting=True)
    yield
    cluster.stop()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository whose profile polls its jobs more often."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("source"))
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    edit_profile(folder, {"slurm-init-seconds-before-status-checks": 12})
    return folder


def edit_profile(source: Path, changes: dict) -> None:
    path = source / "slurm" / "profile.v9+.yaml"
    path.write_text(yaml.safe_dump(merged(yaml.safe_load(path.read_text()), changes)))


def prepared(folder: Path, changes: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, changes or {})))
    return folder


def start(source: Path, folder: Path, *more: object) -> subprocess.Popen:
    """Run snakemake in the background with its output in a file, so that a plugin that waits forever cannot block the tests."""
    command = ["timeout", "-k", "10", "900", *call(folder, "--profile", "slurm", *more)]
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            command, cwd=source, env=environment() | {"PYTHONPATH": str(source)}, start_new_session=True,
            stdout=output, stderr=output,
        )  # fmt: skip


def snakemake(source: Path, folder: Path, *more: object) -> tuple[int, str]:
    before = len((folder / "output").read_text()) if (folder / "output").exists() else 0
    code = start(source, folder, *more).wait()
    return code, (folder / "output").read_text()[before:]


@dataclass(frozen=True)
class Payload:
    """A stage's process in a SLURM job."""

    process: int
    stage: str
    out: str
    job: str
    node: str
    gpus: str

    def kept(self, folder: Path) -> int:
        """Return the number of finished batches."""
        path = folder / self.out
        return len(list(path.parent.glob(f".{path.name}.*.partial/*.parquet")))


def payloads(folder: Path) -> list[Payload]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:2] != ["-m"] or not line[2].startswith("stages."):
            continue
        try:
            variables = process.environ()
            if Path(process.cwd()) != folder or "SLURM_JOB_ID" not in variables:
                continue
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        known = (variables["SLURM_JOB_ID"], variables.get("SLURMD_NODENAME", ""), variables.get("CUDA_VISIBLE_DEVICES", ""))
        out = line[line.index("--out") + 1]
        found.append(Payload(process.pid, line[2].removeprefix("stages."), out, *known))
    return found


class Saboteur:
    """Watches a run and applies each fault once, to the first process that it is intended for."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.seen: dict[int, Payload] = {}
        self.finished: dict[Path, int] = {}
        self.kept: dict[str, int] = {}
        self.stopped: Payload | None = None
        self.faults: list[tuple[str, str, int, Callable[[Payload], None]]] = [  # stage, part of its output, batches kept
            ("generate", "base/candidates/train/0000", 3, self.cancel),
            ("generate", "base/candidates/train/0001", 3, self.kill),
            ("judge", "base/verdicts/shapes/validation/0000", 0, self.out_of_time),
            ("score", "base/scores/train/0000", 2, self.requeue),
            ("score", "base/scores/train/0001", 2, self.run_a_second_snakemake),
            ("schedule", "c-sft-epoch1/schedule", 0, self.restart_controller),
            ("generate", "c-sft-epoch1/candidates/replay/0000", 2, self.lose_node),
            ("score", "c-sft/scores-of-base/validation/0000", 0, self.kill_snakemake),
        ]

    def cancel(self, payload: Payload) -> None:
        cluster.run("scancel", payload.job)

    def kill(self, payload: Payload) -> None:
        os.kill(payload.process, signal.SIGKILL)

    def out_of_time(self, payload: Payload) -> None:
        os.kill(payload.process, signal.SIGSTOP)

    def requeue(self, payload: Payload) -> None:
        cluster.run("scontrol", "requeue", payload.job)

    def run_a_second_snakemake(self, payload: Payload) -> None:
        with (self.folder / "second").open("w") as output:
            self.second = subprocess.Popen(
                call(self.folder, "--profile", "slurm"), cwd=self.source, env=environment(), stdout=output, stderr=output
            )

    def restart_controller(self, payload: Payload) -> None:
        cluster.end("slurmctld")
        time.sleep(8)
        cluster.start_controller()

    def lose_node(self, payload: Payload) -> None:
        """SLURM loses the node while the job's process is still alive there, and the process continues beside its successor."""
        os.kill(payload.process, signal.SIGSTOP)
        cluster.end(payload.node, signal.SIGKILL)
        self.stopped = payload
        self.faults.append(("generate", payload.out, payload.kept(self.folder) + 1, self.find_node))

    def find_node(self, payload: Payload) -> None:
        assert self.stopped is not None
        os.kill(payload.process, signal.SIGSTOP)
        os.kill(self.stopped.process, signal.SIGCONT)
        cluster.wait_for("the orphan to give way", lambda: not psutil.pid_exists(self.stopped.process), 60)
        os.kill(payload.process, signal.SIGCONT)
        cluster.start_node(self.stopped.node)

    def kill_snakemake(self, payload: Payload) -> None:
        os.killpg(self.snakemake.pid, signal.SIGKILL)
        self.snakemake.wait()
        self.snakemake = start(self.source, self.folder)

    def meant_for(self, payload: Payload, fault: tuple) -> bool:
        stage, part, batches, _ = fault
        fresh = self.stopped is None or payload.process != self.stopped.process
        return fresh and payload.stage == stage and part in payload.out and payload.kept(self.folder) >= batches

    def run(self, *targets: str) -> None:
        self.snakemake = start(self.source, self.folder, *targets)
        while self.snakemake.poll() is None:
            running = payloads(self.folder)
            self.seen |= {payload.process: payload for payload in running}
            due = ((fault, payload) for payload in running for fault in self.faults if self.meant_for(payload, fault))
            if found := next(due, None):
                fault, payload = found
                act = fault[-1]
                self.kept[act.__name__] = payload.kept(self.folder)
                with suppress(ProcessLookupError, psutil.NoSuchProcess):  # the process has just ended, so try the next one
                    act(payload)
                    self.faults.remove(fault)
            for path in ended(self.folder):
                file = path.stat().st_ino  # Snakemake touches the outputs of finished jobs, so only the inode identifies a file
                assert self.finished.setdefault(path, file) == file, f"{path} was drawn again"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def disturbed(source, tmp_path_factory):
    """The run that meets every fault. Training first requests too little memory, and the judge only one minute."""
    edit_profile(source, {"set-resources": {
        "train": {"mem_mb": "400 if attempt == 1 else 4000"}, "judge": {"runtime": "1 if attempt == 1 else 30"},
    }})  # fmt: skip
    saboteur = Saboteur(source, prepared(tmp_path_factory.mktemp("disturbed")))
    saboteur.run()
    output = (saboteur.folder / "output").read_text()
    assert saboteur.snakemake.returncode == 0, output[-5000:]
    return saboteur, output


@pytest.fixture(scope="module")
def local(source, tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("local"))
    completed(folder, "--cores", 2, source=source)
    return folder


def job(number: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S*)", cluster.run("scontrol", "show", "job", "--details", number)))


def jobs_of(folder: Path, rule: str) -> list[dict[str, str]]:
    """Return all SLURM jobs of a rule, in order."""
    text = cluster.run("scontrol", "show", "jobs", "--oneliner")
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]
    return [entry for entry in found if f"{folder}/.snakemake/slurm_logs/rule_{rule}/" in entry["StdOut"]]


@pytest.mark.faults
def test_every_fault_was_met_and_the_run_ended_by_itself(disturbed):
    saboteur, output = disturbed
    assert not saboteur.faults
    states = {entry["JobState"] for rule in ("generate", "judge", "train") for entry in jobs_of(saboteur.folder, rule)}
    assert {"CANCELLED", "FAILED", "TIMEOUT", "COMPLETED"} <= states
    assert any(int(entry["Restarts"]) for entry in jobs_of(saboteur.folder, "score"))
    assert "Cancelling SLURM jobs of a former run" in output


@pytest.mark.faults
def test_the_disturbed_run_ends_with_the_files_of_a_local_run(disturbed, local):
    saboteur, _ = disturbed
    assert manifests_of(saboteur.folder) == manifests_of(local)
    assert not list(saboteur.folder.glob("results/**/*.partial"))


@pytest.mark.faults
def test_no_finished_shard_was_drawn_again(disturbed):
    saboteur, _ = disturbed
    assert saboteur.finished
    assert all(path.stat().st_ino == file for path, file in saboteur.finished.items())


@pytest.mark.faults
@pytest.mark.parametrize(("fault", "shard"), [("cancel", "0000"), ("kill", "0001")])
def test_a_shard_goes_on_where_it_was(disturbed, fault, shard):
    saboteur, _ = disturbed
    log = (saboteur.folder / f"results/small/logs/generate/base.train.{shard}.log").read_text()
    assert int(re.findall(r"of (\d+) batches", log)[-1]) <= BATCHES - saboteur.kept[fault]


@pytest.mark.faults
def test_jobs_ran_where_they_belong_and_saw_the_gpus_they_asked_for(disturbed):
    saboteur, _ = disturbed
    assert {payload.stage for payload in saboteur.seen.values()} >= {"generate", "score", "train", "judge"}
    for payload in saboteur.seen.values():
        if payload.stage in ON_GPUS:
            assert payload.node in ("node2", "node3")
            assert payload.gpus in ("0", "1")
        else:
            assert (payload.node, payload.gpus) == ("node1", "")
    for entry in jobs_of(saboteur.folder, "generate") + jobs_of(saboteur.folder, "train"):
        assert entry["TresPerJob"] == "gres:gpu:1"


@pytest.mark.faults
def test_a_second_attempt_asks_for_more(disturbed):
    saboteur, _ = disturbed
    first, *_, second = [entry for entry in jobs_of(saboteur.folder, "generate") if "/base_train_0000/" in entry["StdOut"]]
    assert (first["TimeLimit"], second["TimeLimit"]) == ("00:30:00", "01:00:00")
    assert int(second["MinMemoryNode"].rstrip("M")) == 2 * int(first["MinMemoryNode"].rstrip("M"))


@pytest.mark.faults
def test_a_second_run_in_one_folder_is_refused(disturbed):
    saboteur, _ = disturbed
    assert saboteur.second.wait() == 1
    text = (saboteur.folder / "second").read_text()
    assert "locked" in text
    assert "Traceback" not in text


def test_the_profile_runs_what_an_edit_touches_and_what_is_asked_for(source, local, tmp_path):
    run = (source, local, "")
    profile = ("--profile", "slurm")
    assert rerun(run, *profile) == set()
    with edited(source / "stages/score.py"):
        assert rerun(run, *profile, "--until", "pairs") == {"score", "pairs"}
    after = {"replay_pool", "replay_pairs", "replay_merge", "schedule", "train", "contact_sheet", "evaluate", "summary"}
    assert after | {"pairs", "score", "judge_report"} <= rerun(run, *profile, "--forcerun", "pairs")
    fresh = (source, prepared(tmp_path / "run"), "")
    assert "evaluate" not in rerun(fresh, *profile, "--until", "score")
    assert "train" not in rerun(fresh, *profile, "--omit-from", "train")


def test_a_shard_that_fails_for_good_stops_only_what_depends_on_it(source, local, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(local, folder)
    results = folder / "results/small"
    shard = results / "base/candidates/validation/0001.tar"
    times = shard.stat()
    shard.write_bytes(shard.read_bytes()[:5000])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    for path in [*(results / "c-sft/scores-of-base/validation").iterdir(), results / "c-sft/metrics/validation.parquet"]:
        path.unlink()
    for name in ("contact_sheet.png", "summary.csv"):
        (results / name).unlink()
    code, output = snakemake(source, folder, "--retries", 0)
    assert code
    assert (results / "c-sft/scores-of-base/validation/0000.parquet").exists()
    assert not (results / "c-sft/scores-of-base/validation/0001.parquet").exists()
    assert not (results / "c-sft/metrics/validation.parquet").exists()
    assert (results / "contact_sheet.png").exists()
    end = output[output.rindex("Exiting because a job execution failed") :]
    assert re.search(r"failed: c-sft/scores-of-base/validation/0001.parquet.*cut short or broken", end)
    assert "failed: c-sft/scores-of-base/validation/0001.parquet" in stage("tools.status", results).stdout


def test_training_on_two_nodes_follows_one_process(source, local, tmp_path):
    folder, trained = prepared(tmp_path / "run", {"train": {"nodes": 2, "micro_batch_size": 4}}), "results/small/c-sft-epoch1"
    code, output = snakemake(source, folder, f"{trained}/checkpoint/model.safetensors")
    assert code == 0, output
    entry = jobs_of(folder, "train")[-1]
    assert (entry["JobState"], entry["NumNodes"], entry["TresPerJob"]) == ("COMPLETED", "2", "gres:gpu:2")
    assert losses(folder / trained)["loss"] == pytest.approx(losses(local / trained)["loss"], abs=1e-4)


@needs_benchmarks
@pytest.mark.faults
def test_a_preset_ends_with_its_tables(source, place):  # noqa: F811
    """All suites, judges and scorers of configs/janus-pro-7b.yaml with small weights, on the nodes that the preset asks for."""
    preset = yaml.safe_load((ROOT / "configs/janus-pro-7b.yaml").read_text())
    (place / "config.yaml").write_text(yaml.safe_dump(merged(preset, with_phrases(place))))
    code, output = snakemake(source, place)
    assert code == 0, output[-5000:]
    assert_the_tables_are_whole(place / "results/janus-pro-7b")
    assert {entry["JobState"] for entry in jobs_of(place, "judge_on_gpu")} == {"COMPLETED"}


ONE_SHARD = "results/small/base/candidates/validation/0000.parquet"


def test_a_model_on_the_cpu_asks_for_no_gpu(source, tmp_path):
    code, output = snakemake(source, prepared(tmp_path / "run", {"model": {"device": "cpu"}}), ONE_SHARD)
    assert code == 0, output
    (entry,) = jobs_of(tmp_path / "run", "generate")
    assert "TresPerJob" not in entry


def failed_log(output: str) -> str:
    """Return the content of the SLURM log that the message names."""
    return Path(re.findall(r"(/\S+/slurm_logs/\S+?\.log)", output)[-1]).read_text()


def test_a_node_without_the_environment(source, tmp_path):
    cluster.end("node1")
    cluster.start_node("node1", without=Path(sys.prefix))
    try:
        cluster.wait_for("nodes", cluster.nodes_up)
        code, output = snakemake(source, prepared(tmp_path / "run"), "--retries", 0, "results/small/prompts/train.parquet")
    finally:
        cluster.end("node1")
        cluster.start_node("node1")
        cluster.wait_for("nodes", cluster.nodes_up)
    assert code
    assert re.search(rf"{sys.prefix}/bin/python\d?: not found", failed_log(output))


def test_a_node_that_does_not_see_the_checkpoint(source, tmp_path):
    shutil.copytree(ROOT / "models/tiny-janus", tmp_path / "mounted/checkpoint")
    folder = prepared(tmp_path / "run", {"model": {"checkpoint": str(tmp_path / "mounted/checkpoint")}})
    for node in ("node2", "node3"):
        cluster.end(node)
        cluster.start_node(node, without=tmp_path / "mounted")
    try:
        cluster.wait_for("nodes", cluster.nodes_up)
        code, output = snakemake(source, folder, "--retries", 0, ONE_SHARD)
    finally:
        for node in ("node2", "node3"):
            cluster.end(node)
            cluster.start_node(node)
        cluster.wait_for("nodes", cluster.nodes_up)
    assert code
    assert f"{tmp_path}/mounted/checkpoint: no such checkpoint folder on {socket.gethostname()}" in failed_log(output)


def test_without_accounting_a_cancelled_job_comes_again_and_a_shard_gets_the_gpus_it_asks_for(source, tmp_path):
    cluster.start(accounting=False)
    saboteur = Saboteur(source, prepared(tmp_path / "run", {"model": {"workers": 2}}))
    saboteur.faults = [("generate", ONE_SHARD, 1, saboteur.cancel)]
    saboteur.run(ONE_SHARD)
    assert saboteur.snakemake.returncode == 0, (saboteur.folder / "output").read_text()
    assert [entry["JobState"] for entry in jobs_of(saboteur.folder, "generate")] == ["CANCELLED", "COMPLETED"]
    drawing = {payload.gpus for payload in saboteur.seen.values() if payload.stage == "generate"}
    assert drawing == {"0,1", "1"}  # the job's two GPUs, and the second of them for the process that helps
