"""Many prompts: memory that does not grow, several processes that share a shard, and real prompts of every kind."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

from stages.common import manifests
from tests.helpers import BENCHMARKS, ROOT, done, environment, fresh_stage, measured, write_config


@pytest.mark.slow
def test_memory_of_generate_does_not_grow_with_the_number_of_prompts(tmp_path):
    exact = ("env", "MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_ARENA_MAX=1")  # return freed memory at once
    peaks = {}
    for count in (100, 1000):
        folder = tmp_path / str(count)
        config = write_config(folder, prompts={"count": count}, generate={"candidates": 4, "batch_size": 50})
        done("prompts", "--config", config, "--set", "train", "--out", folder / "p.parquet")
        command = (*exact, sys.executable, "-m", "stages.generate", "--config", config, "--prompts", folder / "p.parquet")
        _, _, peaks[count] = measured(*command, "--out", folder / "c.parquet", "--images", folder / "c.tar")
        assert len(manifests.read_rows(folder / "c.parquet", "candidates")) == 4 * count
    print(peaks)
    assert peaks[1000] < 1.05 * peaks[100]  # keeping just the images would add 8 %


def test_two_processes_share_a_shard_and_write_the_same_files(small_inputs, tmp_path):
    config = write_config(tmp_path, model={"workers": 2})
    common = ("--config", config, "--prompts", small_inputs / "prompts.parquet")
    result = fresh_stage("generate", *common, "--out", tmp_path / "candidates.parquet", "--images", tmp_path / "candidates.tar")
    fresh_stage("score", *common, "--candidates", tmp_path / "candidates.parquet", "--out", tmp_path / "scores.parquet")
    for name in ("candidates.parquet", "candidates.tar", "scores.parquet"):
        assert (tmp_path / name).read_bytes() == (small_inputs / name).read_bytes()
    assert result.stderr.count("generate: 1 of 3 batches") == 2  # 18 prompts x 6 in batches of 20, three for each process
    assert not list(tmp_path.glob(".*.partial"))


def test_a_process_that_dies_fails_the_stage_and_what_is_done_is_kept(small_inputs, tmp_path):
    config = write_config(tmp_path, model={"workers": 2})
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SELFGAP_PROCESS') == '1/2':\n    os._exit(3)\n")
    command = [sys.executable, "-m", "stages.generate", "--config", config, "--prompts", small_inputs / "prompts.parquet",
               "--out", tmp_path / "c.parquet", "--images", tmp_path / "c.tar"]  # fmt: skip
    broken = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=broken, capture_output=True, text=True)
    assert result.returncode != 0
    assert "1 of 2 processes failed" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "c.parquet").exists()
    (partial,) = tmp_path.glob(".c.parquet.*.partial")
    assert len(list(partial.glob("*.parquet"))) == 3


@pytest.mark.slow
@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="needs T2I-CompBench++'s prompt files")
def test_every_real_training_prompt_is_drawn_and_judged(tmp_path):
    files = sorted(map(str, BENCHMARKS.rglob("*_train.txt")))
    assert len(files) == 8
    source = {"source": "text", "files": files}
    config = write_config(tmp_path, prompts=source, generate={"batch_size": 256}, score={"batch_size": 256})
    done("prompts", "--config", config, "--set", "train", "--out", tmp_path / "p.parquet")
    common = ("--config", config, "--prompts", tmp_path / "p.parquet")
    done("generate", *common, "--candidates", 1, "--out", tmp_path / "c.parquet", "--images", tmp_path / "c.tar")
    done("score", *common, "--candidates", tmp_path / "c.parquet", "--out", tmp_path / "s.parquet")
    rows = manifests.read_rows(tmp_path / "s.parquet", "scores")
    assert len(rows) == 5559
    assert np.isfinite([row["p_yes"] for row in rows]).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has these settings")
def test_a_process_on_a_cpu_does_not_ask_the_kernel_for_the_same_memory_again():
    def faults(setup: str) -> int:
        lines = ("import resource, numpy", "from stages.families.tools.allocation import keep_freed_memory", setup,
                 "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt", "before = used()",
                 "for _ in range(20): [numpy.ones(1 << 18) for _ in range(40)]", "print(used() - before)")  # fmt: skip
        command = [sys.executable, "-c", "\n".join(lines)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment()).stdout)

    assert faults("keep_freed_memory()") < faults("pass") / 5
