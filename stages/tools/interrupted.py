"""The remains of a killed Snakemake: its lock, its jobs in SLURM's queue, and the list of its planned jobs.

Every Snakemake that executes records its process and its run in `.snakemake/selfgap-owners/` below its working folder, so that
the next one can check which of them are still alive. Several runs may be executed in one folder at the same time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stages.common.files import process_lives, whole_file

RECORDS = Path(".snakemake/selfgap-owners")


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its rule, its first output and its log, as paths below Snakemake's working folder."""

    rule: str
    out: str
    log: str


@dataclass(frozen=True)
class Owner:
    """A process that executes, or has executed, a run."""

    host: str
    process: int
    run: str

    def is_dead(self) -> bool:
        """Return whether the process ran on this machine and no longer exists. Nothing is known of other machines."""
        return self.host == socket.gethostname() and not process_lives(self.process)


def owners(folder: Path) -> dict[Path, Owner]:
    """Return the recorded processes of a working folder, by the file of the record."""
    found = {}
    for path in (folder / RECORDS).glob("*.json"):
        with suppress(FileNotFoundError):  # its process has just ended
            found[path] = Owner(**json.loads(path.read_text()))
    return found


def write_owner(folder: Path, run: str) -> Path:
    """Record that this process executes a run, and return the file of the record, which should go when the process ends."""
    owner = Owner(socket.gethostname(), os.getpid(), run)
    record = folder / RECORDS / f"{owner.host}-{owner.process}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(asdict(owner)))
    return record


def forget_owners(folder: Path) -> None:
    """Remove all records but those of living processes of this machine. `snakemake --unlock` says that no others live."""
    for path, owner in owners(folder).items():
        if owner.is_dead() or owner.host != socket.gethostname():
            path.unlink(missing_ok=True)


def may_be_executed(folder: Path, run: str) -> bool:
    """Return whether a process that executes the run in the folder may be alive."""
    return any(owner.run == run and not owner.is_dead() for owner in owners(folder).values())


def release_stale_locks(folder: Path) -> None:
    """Remove the locks and records of dead processes that ran on this machine. Other locks require `snakemake --unlock`.

    A lock does not tell whose it is, so none is removed as long as any process may be alive.
    """
    found = owners(folder)
    if found and all(owner.is_dead() for owner in found.values()):
        for file in (*(folder / ".snakemake" / "locks").glob("*.lock"), *found):
            file.unlink(missing_ok=True)


def cancel_orphans(folder: Path) -> list[str]:
    """Cancel the SLURM jobs that a killed Snakemake left in the queue, and return their job ids.

    Their successors continue from the batches that these jobs have kept. The jobs are recognised by their log files in the
    folder's .snakemake, where all runs of this folder have theirs. So nothing is cancelled while another run may be executed.
    """
    if not shutil.which("squeue") or sum(not owner.is_dead() for owner in owners(folder).values()) > 1:
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
