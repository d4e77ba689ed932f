"""Fixtures that several test files use."""

import os
import shutil

import pytest
from filelock import FileLock

from tests.helpers import TINY, completed, copy_of_the_project, done, write_config


@pytest.fixture(scope="session")
def tiny():
    """The tiny model, loaded once."""
    import torch

    from stages.families.janus.family import Janus

    torch.set_num_threads(1)
    return Janus.load(TINY)


@pytest.fixture(scope="session")
def small_inputs(tmp_path_factory):
    """A folder with prompts, candidates and scores of the small configuration. There is one shard, which is drawn once."""
    folder = tmp_path_factory.mktemp("inputs")
    config = write_config(folder)
    done("prompts", "--config", config, "--set", "train", "--out", folder / "prompts.parquet")
    common = ("--config", config, "--prompts", folder / "prompts.parquet")
    done("generate", *common, "--out", folder / "candidates.parquet", "--images", folder / "candidates.tar")
    done("score", *common, "--candidates", folder / "candidates.parquet", "--out", folder / "scores.parquet")
    return folder


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
