"""The remains of a killed Snakemake: its lock, its jobs in SLURM's queue, and the list of its planned jobs.

The process that owns a run is recorded in `.snakemake/` in Snakemake's working folder, so that the next call can check whether
that process is still alive.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.common.files import process_lives, whole_file


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its rule, its first output and its log, as paths below Snakemake's working folder."""

    rule: str
    out: str
    log: str


def write_owner(folder: Path) -> None:
    """Record that this process runs the workflow in the folder."""
    path = folder / ".snakemake" / "selfgap-owner.json"
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))


def owner_is_dead(folder: Path) -> bool:
    """Return whether the last run in the folder was started on this machine by a process that no longer exists."""
    path = folder / ".snakemake" / "selfgap-owner.json"
    if not path.exists():
        return False
    owner = json.loads(path.read_text())
    return owner["host"] == socket.gethostname() and not process_lives(owner["process"])


def release_stale_lock(folder: Path) -> None:
    """Remove the lock of a dead process that ran on this machine. Any other lock requires `snakemake --unlock`."""
    locks = list((folder / ".snakemake" / "locks").glob("*.lock"))
    if locks and owner_is_dead(folder):
        for lock in locks:
            lock.unlink(missing_ok=True)


def cancel_orphans(folder: Path) -> list[str]:
    """Cancel the SLURM jobs that a killed Snakemake left in the queue, and return their job ids.

    Their successors continue from the batches that these jobs have kept. The jobs are recognised by their log files in the
    folder's .snakemake, and Snakemake's lock guarantees that no other run uses this folder.
    """
    if not shutil.which("squeue"):
        return []
    query = ["squeue", "--me", "--noheader", "--Format=JobArrayID:32,STDOUT:4096"]
    queue = subprocess.run(query, capture_output=True, text=True).stdout
    logs = str((folder / ".snakemake" / "slurm_logs").resolve()) + "/"
    left = [job for job, _, log in (line.partition(" ") for line in queue.splitlines()) if log.strip().startswith(logs)]
    if left:
        subprocess.run(["scancel", *left])
    return left


def write_jobs(run: Path, jobs: Iterable[Job], anew: bool) -> None:
    """Write the workflow's jobs to the run's folder. Jobs planned by earlier calls are kept unless `anew` is true."""
    planned = {} if anew else {job.out: job for job in read_jobs(run)}
    planned |= {job.out: job for job in jobs}
    with whole_file(run / "jobs.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(asdict(job)) + "\n" for job in planned.values()))


def read_jobs(run: Path) -> list[Job]:
    """Return the planned jobs of a run, in the workflow's order."""
    path = run / "jobs.jsonl"
    return [Job(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
