"""What the workflow itself costs: processor seconds and memory of reading it and of planning 5,000 jobs.

    python -m speed.workflow                               writes speed/results/workflow.json
    python -m speed.workflow --shards 4                    the same within a minute, for tests

dry run           `snakemake --profile slurm -n`, nothing is done yet
up to date        the same where every output exists and is recorded as made by the present workflow
list rules        `snakemake --list-rules`: the Snakefile and the configuration are read, no job is planned

Seconds mean little on another machine, so each stands beside a baseline of the same call: planning beside a Snakefile of one
rule with as many jobs, reading beside the import of Snakemake. Of several repeats the fastest counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from speed.records import ROOT, commit, processor, write

PROMPTS, SHARDS = {"train": 6000, "evaluation": 300}, 200
START = "import of Snakemake"
ONE_RULE = """
rule all:
    input:
        [f"{{number}}.txt" for number in range({jobs})],

rule one:
    output:
        "{{number}}.txt",
    shell:
        "touch {{output}}"
"""
# Runs a command, then prints what it used. A process of its own, as a child's peak begins at what its parent holds.
USAGE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
sys.exit(code)
"""
# `snakemake --touch` without its pause of a tenth of a second before each job, which is minutes for 5,000.
TOUCH = """
import sys
from snakemake.cli import main
from snakemake.executors.touch import Executor
Executor.SLEEPING_TIME = 0
main(sys.argv[1:])
"""


def environment() -> dict[str, str]:
    """That of a shell in which the project's environment is active and this clone is found first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def measured(*command: object) -> tuple[str, float, float]:
    """What a command prints, its processor seconds and peak megabytes. RuntimeError where it fails."""
    call = [sys.executable, "-c", USAGE, *map(str, command)]
    result = subprocess.run(call, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    *printed, usage = result.stdout.splitlines()
    seconds, megabytes = usage.split()
    return "\n".join(printed), float(seconds), float(megabytes)


def call(folder: Path, *arguments: object) -> list[str]:
    """The command line of snakemake on the configuration in a folder, with its results there."""
    return ["snakemake", "--directory", str(folder), "--configfile", str(folder / "config.yaml"), *map(str, arguments)]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested `changes`."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return result


def large(folder: Path, shards: int = SHARDS) -> Path:
    """The folder with the configuration of a large run: 6,000 prompts, all arms of the default run, replay. It has 5,000 jobs
    at 200 shards."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in PROMPTS.items():
        (folder / f"{name}.txt").write_text("".join(f"a {name} prompt of number {number}\n" for number in range(count)))
    config["prompts"] = {"source": "text", "files": [str(folder / "train.txt")]}
    config["benchmarks"]["validation"]["prompts"] = {"source": "text", "files": [str(folder / "evaluation.txt")]}
    changes = {"model": {"checkpoint": str(ROOT / "models" / "tiny-janus")}, "generate": {"shards": shards}}
    (folder / "config.yaml").write_text(yaml.safe_dump(merged(config, changes), sort_keys=False))
    return folder


def planned(output: str) -> int:
    """The number of jobs in what a dry run prints."""
    return next(int(line.split()[1]) for line in output.splitlines() if line.startswith("total "))


def make_up_to_date(folder: Path, snakemake: list[str]) -> None:
    """Make every output of the workflow as an empty file, and let Snakemake record it as its own."""
    summary, _, _ = measured(*snakemake, "--summary")
    for line in summary.splitlines():
        file, *rest = line.split("\t")
        if rest and file != "output_file":
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
    touch = ("--touch", "--forceall", "--quiet", "all", "--cores", "1000", "--scheduler", "greedy")
    measured(sys.executable, "-c", TOUCH, *snakemake[1:], *touch)


class Table:
    """Measurements as they come, printed."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, *command: object, baseline: str | None = None) -> str:
        """Measure the command; returns what it prints."""
        runs = [measured(*command) for _ in range(self.repeats)]
        seconds, megabytes = min(run[1] for run in runs), min(run[2] for run in runs)
        row: dict[str, Any] = {"name": name, "cpu_seconds": seconds, "peak_megabytes": megabytes}
        shown = ""
        if baseline:
            least = next(other for other in self.rows if other["name"] == baseline)
            ratios = {f"{key}_ratio": row[key] / least[key] for key in ("cpu_seconds", "peak_megabytes")}
            row |= {"baseline": baseline, **ratios}
            shown = f"   {row['cpu_seconds_ratio']:.2f} x and {row['peak_megabytes_ratio']:.2f} x {baseline}"
        self.rows.append(row)
        print(f"{name:<24} {seconds:7.2f} s {megabytes:7.0f} MB{shown}", flush=True)
        return runs[0][0]


def measure(shards: int, repeats: int, folder: Path) -> dict[str, Any]:
    """All measurements, made in an empty folder."""
    table, project, one_rule = Table(repeats), large(folder / "project", shards), folder / "one-rule"
    jobs = planned(measured(*call(project, "--profile", "slurm", "-n"))[0])
    one_rule.mkdir()
    (one_rule / "Snakefile").write_text(ONE_RULE.format(jobs=jobs - 1))  # and the rule all
    plain = ["snakemake", "--snakefile", str(one_rule / "Snakefile"), "--directory", str(one_rule)]
    table.add(START, sys.executable, "-c", "import snakemake.cli")
    table.add("list rules", *call(project, "--list-rules"), baseline=START)
    table.add("dry run, one rule", *plain, "-n")
    table.add("dry run", *call(project, "--profile", "slurm", "-n"), baseline="dry run, one rule")
    make_up_to_date(one_rule, plain)
    make_up_to_date(project, call(project))
    for name, snakemake, baseline in (
        ("up to date, one rule", plain, None),
        ("up to date", call(project, "--profile", "slurm"), "up to date, one rule"),
    ):
        printed = table.add(name, *snakemake, "-n", baseline=baseline)
        if "Nothing to be done" not in printed or "missing provenance" in printed:
            raise RuntimeError(f"{name}: Snakemake would do something again\n{printed[-3000:]}")
    return {
        "benchmark": "workflow",
        "processor": processor(),
        "jobs": jobs,
        "shards": shards,
        "repeats": repeats,
        "versions": {"snakemake": version("snakemake")},
        "commit": commit(),
        "results": table.rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=SHARDS, help="of each prompt set; 200 make 5,000 jobs")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts")
    parser.add_argument("--out", type=Path, default=ROOT / "speed" / "results" / "workflow.json", help="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(arguments.shards, arguments.repeats, Path(folder))
    write(arguments.out, facts)
    print(f"{facts['jobs']} jobs, {facts['processor']}; {arguments.out}")


if __name__ == "__main__":
    main()
