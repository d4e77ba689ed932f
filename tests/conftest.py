"""What tests share: the tiny model, a small configuration, and running a stage as a user would."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stages.common import manifests

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "tiny-janus"
BENCHMARKS = ROOT.parent / "shared" / "data"  # T2I-CompBench++ and GenEval prompts, where someone put them

SMALL = {
    "run": "small",
    "model": {"checkpoint": str(TINY)},
    "prompts": {
        "train": {"split": "post-training", "count": 18},
        "evaluation": {"split": "held-out", "count": 12},
    },
    "generate": {"candidates": 6, "batch_size": 20, "shards": 2},
    "score": {"question": "does this image show {prompt} ?", "batch_size": 20},
    # A candidate in five is chosen and some prompts stay without one, so that every stage has work.
    "pairs": {"accept_threshold": 0.9, "reject_threshold": 0.9, "minimum_margin": 0.01, "chosen_per_prompt": 2},
    "train": {"batch_size": 8, "micro_batch_size": 8, "warmup_steps": 0, "fork_epochs": [1], "save_every_steps": 2},
    "arms": {
        "sft": {"objective": "sft", "epochs": 2},
        "dpo": {"objective": "dpo", "epochs": 1},
        "c-sft": {"objective": "sft", "epochs": 2, "replay_epochs": [1]},
    },
    "evaluate": {"images_per_prompt": 2, "bootstrap": 200},
    "report": {"prompts": 3},
}


def merged(base: dict, changes: dict) -> dict:
    """`base` with nested `changes`."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return result


def write_config(folder: Path, **changes) -> Path:
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


def stage(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """`python -m stages.<arguments>`; the first one names the stage."""
    name, *rest = map(str, arguments)
    return subprocess.run(
        [sys.executable, "-m", f"stages.{name}", *rest], cwd=cwd, env=environment(), capture_output=True, text=True
    )


def done(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A stage that must succeed."""
    result = stage(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result


def call(folder: Path, *arguments: object) -> list[str]:
    """The command line of snakemake on the configuration in a folder, with its results there."""
    return ["snakemake", "--directory", str(folder), "--configfile", str(folder / "config.yaml"), *map(str, arguments)]


def snakemake(folder: Path, *arguments: object, source: Path = ROOT) -> subprocess.CompletedProcess:
    """That command, run in a clone of the project."""
    here = environment() | {"PYTHONPATH": str(source)}
    return subprocess.run(call(folder, *arguments), cwd=source, env=here, capture_output=True, text=True)


# Runs a command, then prints what it used. A process of its own, as a child's peak begins at what its parent holds.
_USAGE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
sys.exit(code)
"""


def measured(*command: object) -> tuple[str, float, float]:
    """What a command prints, its processor seconds and peak megabytes."""
    result = subprocess.run(
        [sys.executable, "-c", _USAGE, *map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    seconds, megabytes = result.stdout.splitlines()[-1].split()
    return result.stdout, float(seconds), float(megabytes)


def _train(arguments: list[str], log: Path) -> None:
    """A training in a process that has imported everything already; what it prints goes to `log`."""
    import torch

    from stages.common.runtime import run_stage
    from stages.train import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = ["stages.train", *arguments]
    try:
        run_stage(main)
    finally:
        sys.stdout.flush()


def training(*arguments: object, log: Path) -> multiprocessing.Process:
    """`python -m stages.train <arguments>` as a process of its own, forked where torch and TRL are imported already: it can
    be killed like any other, and costs a second where a fresh interpreter costs five."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conftest", "stages.training.trainer", "stages.families.janus.family"])
    log.unlink(missing_ok=True)
    process = context.Process(target=_train, args=([str(argument) for argument in arguments], log))
    process.start()
    return process


def wait_until(met: Callable[[], bool], process: multiprocessing.Process | subprocess.Popen, seconds: float = 240) -> bool:
    """Wait for it while the process lives; whether it came."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not met():
        if (process.poll() is not None) if isinstance(process, subprocess.Popen) else not process.is_alive():
            return met()
        time.sleep(0.005)
    return met()


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """One clear message, no traceback, and an exit code that is not 0."""
    text = result.stdout + result.stderr
    assert result.returncode != 0, text
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, (word, text)


def prepare(folder: Path, drawn: Path, objective: str, epochs: int, **train) -> tuple:
    """Pairs (with reference) and a schedule for an arm called x; returns the arguments of train."""
    config = write_config(folder, arms={"x": {"objective": objective, "epochs": epochs}}, train=train)
    files = ("--candidates", drawn / "candidates.parquet")
    pairs = folder / "pairs.parquet"
    done("pairs", "--config", config, "--arm", "x", *files, "--scores", drawn / "scores.parquet", "--out", pairs,
         "--discard", folder / "discard.parquet")  # fmt: skip
    if objective == "dpo":
        reference = folder / "reference.parquet"
        done("reference", "--config", config, "--prompts", drawn / "prompts.parquet", "--pairs", pairs, *files,
             "--out", reference)  # fmt: skip
        pairs = reference
    schedule = folder / "schedule.parquet"
    done("schedule", "--config", config, "--arm", "x", "--epochs", epochs, "--pairs", pairs, "--out", schedule)
    common = ("--config", config, "--arm", "x", "--prompts", drawn / "prompts.parquet", *files)
    return (*common, "--schedule", schedule)


def outputs(folder: Path) -> tuple:
    """The arguments of train that say where its outputs go."""
    return ("--work", folder / "work", "--out", folder / "checkpoint", "--metrics", folder / "training.parquet")


def train(arguments, folder: Path, *more) -> subprocess.CompletedProcess:
    """A training in a forked process, and all that it printed."""
    process = training(*arguments, *outputs(folder), *more, log=folder / "log")
    process.join()
    return subprocess.CompletedProcess(arguments, process.exitcode, (folder / "log").read_text(), "")


def trained(arguments, folder: Path, *more) -> str:
    """A training that must succeed; returns what it printed."""
    result = train(arguments, folder, *more)
    assert result.returncode == 0, result.stdout
    return result.stdout


def losses(folder) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for row in manifests.read_rows(folder / "training.parquet", "training"):
        result.setdefault(row["metric"], []).append(row["value"])
    return result


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, opened once."""
    import torch

    from stages.families.janus.family import Janus

    torch.set_num_threads(1)
    return Janus.load(TINY)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with prompts, candidates and scores of the small configuration: one shard, drawn once."""
    folder = tmp_path_factory.mktemp("drawn")
    config = write_config(folder)
    done("prompts", "--config", config, "--set", "train", "--out", folder / "prompts.parquet")
    common = ("--config", config, "--prompts", folder / "prompts.parquet")
    done("generate", *common, "--out", folder / "candidates.parquet", "--images", folder / "candidates.tar")
    done("score", *common, "--candidates", folder / "candidates.parquet", "--out", folder / "scores.parquet")
    return folder
