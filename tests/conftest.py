"""What tests share: the tiny model, a small configuration, and running a stage as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """One clear message, no traceback, and an exit code that is not 0."""
    text = result.stdout + result.stderr
    assert result.returncode != 0, text
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, (word, text)


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, opened once."""
    import torch

    from stages.families.janus import Janus

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
