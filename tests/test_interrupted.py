"""What a killed Snakemake leaves: its lock is removed at the start of the next run, and by nothing else."""

import os
import subprocess

from stages.tools.interrupted import (
    Job,
    cancel_orphans,
    owner_is_dead,
    read_jobs,
    release_stale_lock,
    write_jobs,
    write_owner,
)
from tests.helpers import completed, write_config


def locked(folder, process: int | None = None):
    """A folder with a lock whose owner is this process or another one of this machine."""
    (folder / ".snakemake/locks").mkdir(parents=True)
    lock = folder / ".snakemake/locks/0.input.lock"
    lock.write_text("results/x\n")
    write_owner(folder)
    if process is not None:
        path = folder / ".snakemake/selfgap-owner.json"
        path.write_text(path.read_text().replace(str(os.getpid()), str(process)))
    return lock


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_lock_of_a_dead_owner_is_removed(tmp_path):
    lock = locked(tmp_path, dead_process())
    assert owner_is_dead(tmp_path)
    release_stale_lock(tmp_path)
    assert not lock.exists()


def test_the_lock_of_a_living_owner_stays(tmp_path):
    lock = locked(tmp_path)
    assert not owner_is_dead(tmp_path)
    release_stale_lock(tmp_path)
    assert lock.exists()


def test_the_lock_of_another_machine_stays(tmp_path):
    lock = locked(tmp_path, dead_process())
    path = tmp_path / ".snakemake/selfgap-owner.json"
    path.write_text(path.read_text().replace('"host": "', '"host": "other-'))
    release_stale_lock(tmp_path)
    assert lock.exists()


def test_reading_the_workflow_leaves_a_lock_and_a_run_removes_it(tmp_path):
    write_config(tmp_path)
    lock = locked(tmp_path, dead_process())
    completed(tmp_path, "--list-rules")
    completed(tmp_path, "-n", "results/small/prompts/train.parquet")
    assert lock.exists()
    completed(tmp_path, "--cores", 1, "results/small/prompts/train.parquet")
    assert not lock.exists()


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
    assert cancel_orphans(mine) == ["11"]
    assert (tmp_path / "cancelled").read_text() == "11\n"


def test_planned_jobs_are_kept_until_the_configuration_changes(tmp_path):
    first, second = (Job(f"rule{i}", f"results/x/{i}", f"log{i}") for i in range(2))
    write_jobs(tmp_path, [first], anew=True)
    write_jobs(tmp_path, [second], anew=False)
    assert read_jobs(tmp_path) == [first, second]
    write_jobs(tmp_path, [second], anew=True)
    assert read_jobs(tmp_path) == [second]
