"""What of a run is done, running, queued, failed and waiting, stage by stage.

    python -m stages.tools.status results/tiny-janus

From the files alone, whatever runs them: outputs, Snakemake's marks of jobs that have begun, logs and kept batches. A job
has failed if it left a log and no output; `snakemake -n` says what an edit would run again.
"""

from __future__ import annotations

import argparse
import json
import socket
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.arms import nodes, selection_owner
from stages.common.config import Config, load
from stages.common.runtime import UserError, process_lives, run_stage

STATES = ("done", "running", "queued", "failed", "waiting")


@dataclass(frozen=True)
class Job:
    """One job of the workflow: its rule, its first output and its log, both relative to the run's folder."""

    rule: str
    out: str
    log: str


def jobs(config: Config) -> Iterator[Job]:
    """Every job that the workflow's target needs, in the loop's order."""
    tree = nodes(config)
    shards = [f"{number:04d}" for number in range(config.generate.shards)]
    replays = dict.fromkeys(replay for arm in config.arms for replay in tree[arm].replays)
    owners = dict.fromkeys(selection_owner(config, arm) for arm in config.arms)
    oracles = {arm for arm in config.arms if config.arm_pairs(arm).filter == "oracle"}
    dpo = {arm for arm in config.arms if config.arms[arm].objective == "dpo"}
    drawn = [("base", "train"), *((node, "evaluation") for node in ["base", *config.arms])]
    drawn += [(replay, "replay") for replay in replays]
    selecting_scores = [pair for pair in drawn if pair[1] != "replay" or tree[pair[0]].arm not in oracles]
    scored = selecting_scores + [(arm, "base-evaluation") for arm in config.arms]
    judged = [pair for pair in drawn if pair[1] == "evaluation" or (pair[1] == "train" and oracles)]
    judged += [(replay, "replay") for replay in replays if tree[replay].arm in oracles]
    referenced = [owner for owner in owners if owner in dpo]
    referenced += [f"{replay}/replay" for replay in replays if tree[replay].arm in dpo]
    for name in ("train", "evaluation"):
        yield Job("prompts", f"prompts/{name}.parquet", f"prompts/{name}.log")
    for rule, kind, pairs in (("generate", "candidates", drawn), ("score", "scores", scored), ("judge", "verdicts", judged)):
        for node, images in pairs:
            for shard in shards:
                yield Job(rule, f"{node}/{kind}/{images}/{shard}.parquet", f"{rule}/{node}.{images}.{shard}.log")
    for owner in owners:
        yield Job("pairs", f"{owner}/pairs.parquet", f"pairs/{owner}.log")
    for owner in referenced:
        yield Job("reference", f"{owner}/reference.parquet", f"reference/{owner}.log")
    for node in tree:
        yield Job("schedule", f"{node}/schedule.parquet", f"schedule/{node}.log")
    for node in tree:
        yield Job("train", f"{node}/checkpoint/model.safetensors", f"train/{node}.log")
    for rule, out in (("pool", "pool"), ("pairs", "pairs"), ("merge", "waiting")):
        for node in replays:
            yield Job(f"replay_{rule}", f"{node}/replay/{out}.parquet", f"replay/{node}.{rule}.log")
    for node in ["base", *config.arms]:
        yield Job("evaluate", f"{node}/metrics.parquet", f"evaluate/{node}.log")
    yield Job("contact_sheet", "contact_sheet.png", "contact_sheet.log")
    yield Job("summary", "summary.csv", "summary.log")


def begun(folder: Path) -> dict[Path, str]:
    """Outputs of jobs that have begun and not ended, and whether they run or wait in a queue."""
    marks = folder / ".snakemake" / "incomplete"
    owner = folder / ".snakemake" / "selfgap-owner.json"
    last: dict[str, Any] = json.loads(owner.read_text()) if owner.exists() else {"host": None}
    if last["host"] == socket.gethostname() and not process_lives(last["process"]):
        return {}  # left by a Snakemake that was killed
    found = {}
    for mark in marks.glob("*"):
        if mark.is_file():
            text = mark.read_text()
            queued = bool(text and json.loads(text).get("external_jobid"))  # the job itself takes the number away
            found[folder / urlsafe_b64decode(mark.name).decode()] = "queued" if queued else "running"
    return found


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "(empty)")


def report(run: Path) -> str:
    """The table of a run's folder, and a line for each job that has failed or runs."""
    active = begun(run.parent.parent)
    table: dict[str, Counter[str]] = {}
    remarks = []
    for job in jobs(load(run / "run_config.yaml")):
        out, log = run / job.out, run / "logs" / job.log
        missing = "failed" if log.exists() else "waiting"
        state = active.get(out) or ("done" if out.exists() else missing)
        table.setdefault(job.rule, Counter())[state] += 1
        kept = len(list(out.parent.glob(f".{out.name}.*.partial/*.parquet")))
        if state == "failed":
            remarks.append(f"failed: {job.out}, {kept} batches kept, {log}: {last_line(log)}")
        elif state == "running":
            remarks.append(f"running: {job.out}, {kept} batches kept")
    lines = [f"{'':<14}" + "".join(f"{state:>9}" for state in STATES)]
    lines += [f"{rule:<14}" + "".join(f"{count[state] or '':>9}" for state in STATES) for rule, count in table.items()]
    return "\n".join([*lines, *remarks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, results/<run>")
    run = parser.parse_args().run.resolve()
    if not (run / "run_config.yaml").exists():
        raise UserError(f"{run}: holds no run_config.yaml; give the folder of a run that has been started, results/<run>")
    print(report(run))


if __name__ == "__main__":
    run_stage(main)
