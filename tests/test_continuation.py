"""A training continues where it was after being killed, stopped, out of disk space, or given a longer schedule."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.helpers import ROOT, environment, losses, merged, outputs, prepare, refused, stage, trained, training, wait_until

STEPS = 24


def step(log) -> int:
    """Return the last step that a training has logged."""
    found = re.findall(r"^step (\d+) of", log.read_text() if log.exists() else "", re.MULTILINE)
    return int(found[-1]) if found else 0


def stopped(arguments, folder, at: int, with_signal: signal.Signals, delay: float = 0.0) -> int:
    """Send the signal once the training has logged that step, and return the exit code."""
    process = training(*arguments, *outputs(folder), log=folder / "log")
    assert wait_until(lambda: step(folder / "log") >= at, process), (folder / "log").read_text()
    time.sleep(delay)
    os.kill(process.pid, with_signal)
    process.join()
    return process.exitcode


def equal(folder, other) -> None:
    for name in ("checkpoint/model.safetensors", "training.parquet", "training.png", "checkpoint/README.md"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def uninterrupted(small_inputs, tmp_path_factory):
    """An uninterrupted training of 24 steps, and its arguments."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = prepare(folder, small_inputs, "sft", STEPS // 3, save_every_steps=3)
    assert f"{STEPS} steps" in trained(arguments, folder)
    return arguments, folder


@pytest.mark.slow
def test_killed_at_ten_random_steps_it_ends_with_the_same_bytes(uninterrupted, tmp_path):
    arguments, folder = uninterrupted
    generator = random.Random(0)
    for at in sorted(generator.sample(range(1, STEPS), 10)):
        assert stopped(arguments, tmp_path, at, signal.SIGKILL, generator.uniform(0, 0.1)) == -signal.SIGKILL
    assert "from checkpoint-" in trained(arguments, tmp_path)
    equal(tmp_path, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_after_the_step_and_exits_with_75(number, uninterrupted, tmp_path):
    arguments, folder = uninterrupted
    assert stopped(arguments, tmp_path, 4, number) == 75
    text = (tmp_path / "log").read_text()
    reached = step(tmp_path / "log")
    assert f"stopped by a signal after step {reached}, saved" in text
    assert 4 <= reached < STEPS
    assert f"from checkpoint-{reached}\n" in trained(arguments, tmp_path)
    equal(tmp_path, folder)


def test_a_stop_signal_to_the_rules_whole_process_group_reaches_the_save(uninterrupted, tmp_path):
    arguments, folder = uninterrupted
    command = " ".join(map(str, (sys.executable, "-m", "stages.train", *arguments, *outputs(tmp_path))))
    rule = re.search(r'"(trap [^"]*; )"', (ROOT / "workflow/rules/training.smk").read_text()).group(1)
    log = tmp_path / "log"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", f"{rule} {command} 2>&1 | tee {log}"],
        cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert wait_until(lambda: step(log) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 75
    assert "stopped by a signal" in log.read_text()
    trained(arguments, tmp_path)
    equal(tmp_path, folder)


def test_a_longer_schedule_goes_on_from_the_shorter_ones_end(uninterrupted, small_inputs, tmp_path):
    shorter = prepare(tmp_path / "shorter", small_inputs, "sft", STEPS // 6, save_every_steps=3)
    arguments, folder = uninterrupted
    trained(shorter, tmp_path)
    assert f"from checkpoint-{STEPS // 2}\n" in trained(arguments, tmp_path)
    equal(tmp_path, folder)


def test_another_global_batch_starts_at_the_base_model(uninterrupted, small_inputs, tmp_path):
    arguments, _ = uninterrupted
    stopped(arguments, tmp_path, 4, signal.SIGTERM)
    other = prepare(tmp_path / "other", small_inputs, "sft", 1, batch_size=4, micro_batch_size=4)
    assert "from the base model" in trained(other, tmp_path)


def test_another_micro_batch_goes_on(uninterrupted, small_inputs, tmp_path):
    arguments, folder = uninterrupted
    stopped(arguments, tmp_path, 4, signal.SIGTERM)
    config = tmp_path / "config.yaml"
    config.write_text((folder / "config.yaml").read_text().replace("micro_batch_size: 8", "micro_batch_size: 2"))
    assert "from checkpoint-" in trained(("--config", config, *arguments[2:]), tmp_path)
    assert losses(tmp_path)["loss"] == pytest.approx(losses(folder)["loss"], abs=1e-4)


def test_saves_at_a_time_interval(uninterrupted, tmp_path):
    arguments, folder = uninterrupted
    changes = {"save_every_steps": 1000, "save_every_minutes": 1e-5}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(merged(yaml.safe_load((folder / "config.yaml").read_text()), {"train": changes})))
    often = ("--config", config, *arguments[2:])
    assert stopped(often, tmp_path, 4, signal.SIGKILL) == -signal.SIGKILL
    assert "from checkpoint-" in trained(often, tmp_path)
    for name in ("checkpoint/model.safetensors", "training.parquet"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_only_the_last_two_saves_are_kept(uninterrupted):
    _, folder = uninterrupted
    (saved,) = (folder / "work").iterdir()
    assert sorted(path.name for path in saved.glob("checkpoint-*")) == ["checkpoint-21", "checkpoint-24"]


def test_a_full_disk_is_named_and_the_last_save_stays_whole(uninterrupted, tmp_path):
    arguments, folder = uninterrupted
    disk = tmp_path / "work"
    disk.mkdir()
    one = sum(path.stat().st_size for path in next((folder / "work").glob("*/checkpoint-24")).iterdir())
    options = f"size={int(1.5 * one)}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        result = stage("train", *arguments, *outputs(tmp_path))
        refused(result, str(disk), "step 6", "are free there", "make room and run again")
        assert not (tmp_path / "checkpoint").exists()
        subprocess.run(["mount", "-o", f"remount,size={4 * one}", disk], check=True)
        assert "from checkpoint-3\n" in trained(arguments, tmp_path)
        equal(tmp_path, folder)
    finally:
        subprocess.run(["umount", disk], check=True)
