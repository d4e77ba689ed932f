"""Show how many jobs of a run are done, running, queued, failed and waiting, stage by stage.

    python -m stages.tools.status results/tiny-janus

It works with any executor, because it reads only files: the list of planned jobs, their outputs and logs, kept batches, and
Snakemake's markers of jobs that have started. A job counts as failed if it left a log but no output. `snakemake -n` shows which
jobs an edit would re-run.
"""

from __future__ import annotations

import argparse
import json
from base64 import urlsafe_b64decode
from collections import Counter
from pathlib import Path

from stages.common.errors import UserError, run_stage
from stages.tools.interrupted import may_be_executed, read_jobs

STATES = ("done", "running", "queued", "failed", "waiting")


def begun(folder: Path, run: str) -> dict[Path, str]:
    """Return the outputs of a run's jobs that have started and not ended, each with its state, "running" or "queued"."""
    if not may_be_executed(folder, run):
        return {}  # a killed Snakemake left the markers
    found = {}
    for mark in (folder / ".snakemake" / "incomplete").glob("*"):
        if mark.is_file():
            text = mark.read_text()
            queued = bool(text and json.loads(text).get("external_jobid"))  # the number disappears when the job starts
            found[folder / urlsafe_b64decode(mark.name).decode()] = "queued" if queued else "running"
    return found


def last_line(path: Path) -> str:
    """Return the last non-empty line of a log."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "(empty)")


def report(run: Path) -> str:
    """Return the table of a run, and a line for each job that is running or has failed."""
    folder = run.parent.parent
    active = begun(folder, run.name)
    table: dict[str, Counter[str]] = {}
    remarks = []
    for job in read_jobs(run):
        out, log = folder / job.out, folder / job.log
        missing = "failed" if log.exists() else "waiting"
        state = active.get(out) or ("done" if out.exists() else missing)
        table.setdefault(job.rule, Counter())[state] += 1
        kept = len(list(out.parent.glob(f".{out.name}.*.partial/*.parquet")))
        name = out.relative_to(run)
        if state == "failed":
            remarks.append(f"failed: {name}, {kept} batches kept, {log}: {last_line(log)}")
        elif state == "running":
            remarks.append(f"running: {name}, {kept} batches kept")
    width = max(map(len, table), default=0)
    lines = [" " * width + "".join(f"{state:>9}" for state in STATES)]
    lines += [f"{rule:<{width}}" + "".join(f"{count[state] or '':>9}" for state in STATES) for rule, count in table.items()]
    return "\n".join([*lines, *remarks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, results/<run>")
    run = parser.parse_args().run.absolute()  # results/ may be a link to a larger disk
    if not read_jobs(run):
        raise UserError(f"{run}: contains no jobs.jsonl; give the folder of a run that has been started, results/<run>")
    print(report(run))


if __name__ == "__main__":
    run_stage(main)
