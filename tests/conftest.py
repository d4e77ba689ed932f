"""Fixtures that several test files use."""

import os
import shutil

import pytest
from filelock import FileLock

from tests.helpers import LMMS_PYTHON, TINY, completed, copy_of_the_project, done, write_config
from tests.tiny_show_o import write_tiny_show_o


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, loaded once."""
    import torch

    from stages.families.janus.family import Janus

    torch.set_num_threads(1)
    return Janus.load(TINY)


@pytest.fixture(scope="session")
def lmms_python():
    """The interpreter of lmms-eval's own environment."""
    if not LMMS_PYTHON.exists():
        pytest.skip("needs the environment of lmms-eval: run `make lmms-env`")
    return LMMS_PYTHON


def drawn_and_judged(folder, **changes):
    """Write a configuration, prompts, candidates and scores to a folder, and return it. There is one shard."""
    config = write_config(folder, **changes)
    done("prompts", "--config", config, "--set", "train", "--out", folder / "prompts.parquet")
    common = ("--config", config, "--prompts", folder / "prompts.parquet")
    done("generate", *common, "--out", folder / "candidates.parquet", "--images", folder / "candidates.tar")
    done("score", *common, "--candidates", folder / "candidates.parquet", "--out", folder / "scores.parquet")
    return folder


@pytest.fixture(scope="session")
def small_inputs(tmp_path_factory):
    """A folder with prompts, candidates and scores of the small configuration, drawn once."""
    return drawn_and_judged(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def show_o_inputs(tmp_path_factory):
    """The same of a small Show-o with random weights, whose checkpoint is in the folder `model`."""
    folder = tmp_path_factory.mktemp("show-o")
    return drawn_and_judged(
        folder,
        model={"family": "show_o", "checkpoint": str(write_tiny_show_o(folder / "model"))},
        generate={"sampling": {"guidance_scale": 0.0, "steps": 4}},
        pairs={"accept_threshold": 0.5, "reject_threshold": 0.5, "minimum_margin": 0.0},
    )


@pytest.fixture(scope="session")
def shared_run(tmp_path_factory):
    """The small configuration, run from scratch once for all test processes. Returns its folder and Snakemake's output."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "shared-run"
    with FileLock(root / "shared-run.lock"):
        if not (folder / "output").exists():
            write_config(folder)
            (folder / "output").write_text(completed(folder, "--cores", 2))
    return folder, (folder / "output").read_text()


@pytest.fixture(scope="module")
def run(shared_run, tmp_path_factory):
    """A copy of the project and of the shared run, which a module's tests may edit, and the run's Snakemake output."""
    folder, output = shared_run
    source = copy_of_the_project(tmp_path_factory.mktemp("source"))
    mine = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(folder, mine)
    return source, mine, output
