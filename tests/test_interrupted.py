"""What a killed Snakemake leaves: its lock is removed at the start of the next run, and by nothing else."""

import json
import os
import subprocess

import pytest

from stages.tools.interrupted import (
    Job,
    cancel_orphans,
    may_be_executed,
    read_jobs,
    release_stale_locks,
    write_jobs,
    write_owner,
)
from tests.helpers import completed, write_config


def owned(folder, run: str = "x", process: int | None = None, host: str = "") -> None:
    """Record that a run is executed by this process, or by another one, on this machine or on another one."""
    write_owner(folder, run)
    (path,) = (folder / ".snakemake/selfgap-owners").glob(f"*-{os.getpid()}.json")
    text = path.read_text()
    if process is not None or host:
        path.unlink()
        record = json.loads(text)
        record |= {"process": process or record["process"], "host": host or record["host"]}
        path.with_name(f"{record['host']}-{record['process']}.json").write_text(json.dumps(record))


def locked(folder, **owner):
    """A folder with a lock and the record of an owner."""
    (folder / ".snakemake/locks").mkdir(parents=True)
    lock = folder / ".snakemake/locks/0.input.lock"
    lock.write_text("results/x\n")
    owned(folder, **owner)
    return lock


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_owner_is_removed(tmp_path):
    lock = locked(tmp_path, process=dead_process())
    assert not may_be_executed(tmp_path, "x")
    release_stale_locks(tmp_path)
    assert not lock.exists()


def test_the_lock_of_a_living_owner_stays(tmp_path):
    lock = locked(tmp_path)
    assert may_be_executed(tmp_path, "x")
    assert not may_be_executed(tmp_path, "another")
    release_stale_locks(tmp_path)
    assert lock.exists()


def test_the_lock_of_another_machine_stays(tmp_path):
    lock = locked(tmp_path, process=dead_process(), host="another")
    release_stale_locks(tmp_path)
    assert lock.exists()


def test_a_second_run_in_the_folder_leaves_the_lock_and_the_record_of_the_first(tmp_path):
    lock = locked(tmp_path, run="first", process=os.getppid())
    owned(tmp_path, run="second", process=dead_process())
    release_stale_locks(tmp_path)
    assert lock.exists()
    assert may_be_executed(tmp_path, "first")
    assert not may_be_executed(tmp_path, "second")


def test_a_second_process_of_a_run_leaves_the_record_of_the_first(tmp_path):
    """Snakemake locks only what it is going to write, so `snakemake precision` starts beside a training of the same run."""
    owned(tmp_path, process=os.getppid())
    write_owner(tmp_path, "x").unlink()
    assert may_be_executed(tmp_path, "x")


def test_unlocking_forgets_processes_of_other_machines_and_leaves_living_ones(tmp_path):
    owned(tmp_path, run="living", process=os.getppid())
    owned(tmp_path, run="elsewhere", process=7, host="another")
    write_config(tmp_path)
    completed(tmp_path, "--unlock")
    assert not may_be_executed(tmp_path, "elsewhere")
    assert may_be_executed(tmp_path, "living")


def test_reading_the_workflow_leaves_a_lock_and_a_run_removes_it(tmp_path):
    write_config(tmp_path)
    lock = locked(tmp_path, process=dead_process())
    completed(tmp_path, "--list-rules")
    completed(tmp_path, "-n", "results/small/prompts/train.parquet")
    assert lock.exists()
    completed(tmp_path, "--cores", 1, "results/small/prompts/train.parquet")
    assert not lock.exists()
    assert not list((tmp_path / ".snakemake/selfgap-owners").iterdir()), "a run that has ended is no longer recorded"


def test_only_jobs_of_this_folder_are_cancelled(tmp_path, monkeypatch):
    mine, other = tmp_path / "mine", tmp_path / "other"
    queue = [f"11   {mine.resolve()}/.snakemake/slurm_logs/a.log", f"12   {other}/.snakemake/slurm_logs/b.log"]
    for name, text in {
        "squeue": "#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in queue),
        "scancel": f'#!/bin/sh\necho "$@" > {tmp_path}/cancelled\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    owned(mine)
    assert cancel_orphans(mine) == ["11"]
    assert (tmp_path / "cancelled").read_text() == "11\n"


@pytest.mark.parametrize("first", ["first", "second"])
def test_no_job_is_cancelled_while_another_run_or_process_may_be_alive(tmp_path, monkeypatch, first):
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '11   {tmp_path.resolve()}/.snakemake/slurm_logs/a.log'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    owned(tmp_path, run=first, process=os.getppid())
    owned(tmp_path, run="second")
    assert cancel_orphans(tmp_path) == []


def test_planned_jobs_are_kept_until_the_configuration_changes(tmp_path):
    first, second = (Job(f"rule{i}", f"results/x/{i}", f"log{i}") for i in range(2))
    write_jobs(tmp_path, [first], anew=True)
    write_jobs(tmp_path, [second], anew=False)
    assert read_jobs(tmp_path) == [first, second]
    write_jobs(tmp_path, [second], anew=True)
    assert read_jobs(tmp_path) == [second]
