"""Helpers of several test files: a small configuration, and functions that run stages and the workflow as a user would."""

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import yaml

import stages.families
from stages.common import manifests

# The toy family of tests/families is registered as a user would register one; see docs/extending.md.
stages.families.__path__.append(str(Path(__file__).parent / "families"))
stages.families.FAMILIES["toy"] = "stages.families.toy:TOY"

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "tiny-janus"
LMMS_PYTHON = ROOT / ".venv-lmms/bin/python"
BENCHMARKS = ROOT.parent / "shared" / "data"  # T2I-CompBench++ and GenEval prompts, if they are available

SMALL = {
    "run": "small",
    "model": {"checkpoint": str(TINY)},
    "prompts": {"source": "shapes", "split": "post-training", "count": 18},
    "benchmarks": {
        "validation": {
            "prompts": {"source": "shapes", "split": "validation", "count": 12},
            "images_per_prompt": 2,
            "judge": "shapes",
        }
    },
    "generate": {"candidates": 6, "batch_size": 20, "shards": 2, "sampling": {"guidance_scale": 5.0}},
    "score": {"question": "does this image show {prompt} ?", "batch_size": 20},
    # One candidate in five is chosen and some prompts have none, so that every stage has work.
    "pairs": {"accept_threshold": 0.9, "reject_threshold": 0.9, "minimum_margin": 0.01, "chosen_per_prompt": 2},
    "train": {
        "learning_rate": 2e-4,
        "batch_size": 8,
        "micro_batch_size": 8,
        "warmup_steps": 0,
        "fork_epochs": [1],
        "save_every_steps": 2,
    },
    "arms": {
        "sft": {"objective": "sft", "epochs": 2},
        "dpo": {"objective": "dpo", "epochs": 1},
        "c-sft": {"objective": "sft", "epochs": 2, "replay_epochs": [1]},
    },
    "evaluate": {"bootstrap": 200},
    "report": {"prompts": 3},
}


def merged(base: dict, changes: dict) -> dict:
    """Return `base` with nested `changes`. A set of prompts with another source is replaced, not merged."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        replaced = nested and "source" in value and value["source"] != base[key].get("source")
        result[key] = merged(base[key], value) if nested and not replaced else value
    return result


def write_config(folder: Path, **changes) -> Path:
    """Write the small configuration with changes to a folder, and return its path."""
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(merged(SMALL, changes), sort_keys=False))
    return path


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


# --- stages ----------------------------------------------------------------------------------------------------------


def _run_module(name: str, arguments: list[str], folder: Path, out: Path, errors: Path) -> None:
    import torch

    for number, path in ((1, out), (2, errors)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(descriptor, number)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()


def process_of(name: str, *arguments: object, out: Path, errors: Path, cwd: Path = ROOT) -> multiprocessing.Process:
    """Start `python -m <name> <arguments>` in a process forked from one that has already imported torch and TRL.

    It can be killed like any other process. It starts in a tenth of a second, and a new interpreter in four seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers", "stages.training.trainer", "stages.families.janus.family", "pandas"])
    process = context.Process(target=_run_module, args=(name, [str(part) for part in arguments], cwd, out, errors))
    process.start()
    return process


def stage(name: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `python -m stages.<name> <arguments>`."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        process = process_of(f"stages.{name}", *arguments, out=out, errors=errors, cwd=cwd)
        process.join()
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), errors.read_text())


def done(name: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a stage that must succeed."""
    result = stage(name, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def fresh_stage(name: str, *arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run a stage in a new interpreter, as a user does. Use it to test processes, imports and environments."""
    command = [sys.executable, "-m", f"stages.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment() | variables, capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Assert that a command ended with one clear message, no traceback, and an exit code that is not 0."""
    text = result.stdout + result.stderr
    assert result.returncode != 0, text
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, (word, text)


def wait_until(met: Callable[[], bool], process: multiprocessing.Process | subprocess.Popen, seconds: float = 240) -> bool:
    """Wait until `met()` is true or the process ends, and return whether it is true."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not met():
        if (process.poll() is not None) if isinstance(process, subprocess.Popen) else not process.is_alive():
            return met()
        time.sleep(0.005)
    return met()


# --- the workflow ----------------------------------------------------------------------------------------------------


def call(folder: Path, *arguments: object) -> list[str]:
    """Return a snakemake command line that runs the configuration in a folder and writes the results to that folder."""
    return ["snakemake", "--directory", str(folder), "--configfile", str(folder / "config.yaml"), *map(str, arguments)]


def snakemake(folder: Path, *arguments: object, source: Path = ROOT) -> subprocess.CompletedProcess:
    """Run the command line of `call` in a copy of the project."""
    here = environment() | {"PYTHONPATH": str(source)}
    return subprocess.run(call(folder, *arguments), cwd=source, env=here, capture_output=True, text=True)


def completed(folder: Path, *arguments: object, source: Path = ROOT) -> str:
    """Run a snakemake command that must succeed, and return its output."""
    result = snakemake(folder, *arguments, source=source)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


SOURCES = ("Snakefile", "workflow", "stages", "profiles", "envs", "README.md")


def copy_of_the_project(folder: Path) -> Path:
    """Copy the files that the workflow needs to a folder, so that a test may edit them."""
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def rerun(run, *arguments: object) -> set[str]:
    """Return the rules that `snakemake -n` would run, without `all`. run: see the fixture of that name."""
    source, folder, _ = run
    output = completed(folder, "-n", *arguments, source=source)
    table = re.search(r"Job stats:\njob .*\n-.*\n((?:\S+ +\d+\n)+)", output)
    if not table:
        assert "Nothing to be done" in output, output
        return set()
    return {line.split()[0] for line in table.group(1).splitlines()} - {"all", "total"}


def planned_outputs(run, stage: str) -> str:
    """Return the --out arguments of all commands of a stage that `snakemake -n` would run, one per line."""
    source, folder, _ = run
    text = completed(folder, "-n", "--printshellcmds", source=source)
    return "\n".join(re.findall(rf"python -m stages\.{stage} .*?--out (\S+)", text))


@contextmanager
def restored(path: Path):
    """Restore the file's content at the end of the context."""
    before = path.read_text()
    try:
        yield before
    finally:
        path.write_text(before)


@contextmanager
def edited(path: Path, old: str = "", new: str = "\nassert True\n"):
    """Replace `old` by `new` in a file while the context is open; if `old` is empty, append `new`."""
    with restored(path) as before:
        assert before.count(old) == 1 or not old, f"{path}: {old!r} occurs {before.count(old)} times"
        path.write_text(before.replace(old, new) if old else before + new)
        yield


# Runs a command, then prints its resource usage. A separate process, because a child's peak memory starts at its parent's.
_USAGE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
sys.exit(code)
"""


def measured(*command: object) -> tuple[str, float, float]:
    """Return a command's output, its CPU time in seconds and its peak memory in megabytes."""
    result = subprocess.run(
        [sys.executable, "-c", _USAGE, *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    seconds, megabytes = result.stdout.splitlines()[-1].split()
    return result.stdout, float(seconds), float(megabytes)


# --- training --------------------------------------------------------------------------------------------------------


def prepare(folder: Path, inputs: Path, objective: str, epochs: int, **train) -> tuple:
    """Write pairs (for DPO with reference) and a schedule for an arm called x, and return the arguments of stages.train.

    inputs: a folder with a configuration, prompts, candidates and scores, such as the fixture `small_inputs`. The arm has that
    configuration, and the settings of `train`.
    """
    given = yaml.safe_load((inputs / "config.yaml").read_text())
    config = write_config(folder, **merged(given, {"arms": {"x": {"objective": objective, "epochs": epochs, "train": train}}}))
    files = ("--candidates", inputs / "candidates.parquet")
    pairs = folder / "pairs.parquet"
    done("pairs", "--config", config, "--arm", "x", *files, "--scores", inputs / "scores.parquet", "--out", pairs,
         "--discard", folder / "discard.parquet")  # fmt: skip
    if objective == "dpo":
        reference = folder / "reference.parquet"
        done("reference", "--config", config, "--prompts", inputs / "prompts.parquet", "--pairs", pairs, *files,
             "--out", reference)  # fmt: skip
        pairs = reference
    schedule = folder / "schedule.parquet"
    done("schedule", "--config", config, "--arm", "x", "--epochs", epochs, "--pairs", pairs, "--out", schedule)
    common = ("--config", config, "--arm", "x", "--prompts", inputs / "prompts.parquet", *files)
    return (*common, "--schedule", schedule)


def outputs(folder: Path) -> tuple:
    """Return the arguments of stages.train for its outputs in a folder."""
    return ("--work", folder / "work", "--out", folder / "checkpoint", "--metrics", folder / "training.parquet")


def training(*arguments: object, log: Path) -> multiprocessing.Process:
    """Start a training that writes all its output to the file `log`."""
    log.unlink(missing_ok=True)
    return process_of("stages.train", *arguments, out=log, errors=log)


def train(arguments, folder: Path, *more) -> subprocess.CompletedProcess:
    """Run a training. The result's stdout contains all its output."""
    process = training(*arguments, *outputs(folder), *more, log=folder / "log")
    process.join()
    return subprocess.CompletedProcess(arguments, process.exitcode, (folder / "log").read_text(), "")


def trained(arguments, folder: Path, *more) -> str:
    """Run a training that must succeed, and return its output."""
    result = train(arguments, folder, *more)
    assert result.returncode == 0, result.stdout
    return result.stdout


def losses(folder: Path) -> dict[str, list[float]]:
    """Return the metrics of a training, step by step."""
    result: dict[str, list[float]] = {}
    for row in manifests.read_rows(folder / "training.parquet", "training"):
        result.setdefault(row["metric"], []).append(row["value"])
    return result
