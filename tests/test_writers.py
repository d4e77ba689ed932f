"""What a cluster may do to a stage's process: send a signal at the time limit, or start a second writer beside the first."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.common.files import claim, whole_file
from stages.common.manifests import read_rows
from tests.helpers import ROOT, done, environment, write_config


def drawing(small_inputs: Path, folder: Path) -> list[str]:
    """Return a command that draws the candidates of `small_inputs` in batches of two."""
    config = write_config(folder, generate={"batch_size": 2})
    options = {"config": config, "prompts": small_inputs / "prompts.parquet"}
    options |= {"out": folder / "candidates.parquet", "images": folder / "candidates.tar"}
    return ["generate", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def tokens(folder: Path) -> list:
    return [(row["candidate_id"], row["tokens"]) for row in read_rows(folder / "candidates.parquet", "candidates")]


def begun(command: list[str], folder: Path) -> subprocess.Popen:
    """Start the command and return its process as soon as it has kept a batch."""
    stage, *arguments = command
    line = [sys.executable, "-m", f"stages.{stage}", *arguments]
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    while not list(folder.glob(".*.partial/*.parquet")):
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_a_stage_ended_by_sigterm_says_so_and_goes_on_where_it_was(small_inputs, tmp_path):
    command = drawing(small_inputs, tmp_path)
    process = begun(command, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ended by SIGTERM" in message
    assert "Traceback" not in message
    assert not list(tmp_path.rglob("*.tmp"))
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".*.partial/*.parquet")}
    assert kept
    result = done(*command)
    assert f"of {18 * 6 // 2 - len(kept)} batches" in result.stderr
    assert tokens(tmp_path) == tokens(small_inputs)


def test_the_later_of_two_writers_takes_over_and_the_earlier_one_overwrites_nothing(small_inputs, tmp_path):
    command = drawing(small_inputs, tmp_path)
    first = begun(command, tmp_path)
    first.send_signal(signal.SIGSTOP)
    (writer,) = tmp_path.glob(".*.partial/writer")
    before = writer.read_text()
    second = begun(command, tmp_path)
    while writer.read_text() == before:
        time.sleep(0.02)
    second.send_signal(signal.SIGSTOP)
    first.send_signal(signal.SIGCONT)
    _, message = first.communicate(timeout=60)
    assert first.returncode == 1
    assert f"taken over by {writer.read_text()}" in message
    assert not (tmp_path / "candidates.parquet").exists()
    second.send_signal(signal.SIGCONT)
    _, message = second.communicate(timeout=120)
    assert second.returncode == 0, message
    assert tokens(tmp_path) == tokens(small_inputs)
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_writer_left_is_removed_unless_another_machine_may_still_write_it(tmp_path):
    path = tmp_path / "out.parquet"
    dead = subprocess.Popen(["true"])
    dead.wait()
    with whole_file(path) as temporary:
        machine = temporary.name.removeprefix(".out.parquet.").rpartition(f".{temporary.name.split('.')[-2]}.tmp")[0]
        (tmp_path / f".out.parquet.{machine}.{dead.pid}.tmp").touch()
        (tmp_path / ".out.parquet.other-node.1.tmp").touch()
    with whole_file(path):
        names = {left.name for left in tmp_path.glob("*.tmp")}
    assert f".out.parquet.{machine}.{dead.pid}.tmp" not in names
    assert ".out.parquet.other-node.1.tmp" in names


def test_a_claim_is_lost_to_the_next_one(tmp_path):
    held = claim(tmp_path / "writer")
    held()
    claim(tmp_path / "writer")
    with pytest.raises(Exception, match="taken over"):
        held()
