"""Training as two processes: it agrees with one process, stops, continues, and its checkpoint loads like any other."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from stages.families.show_o.family import ShowO
from tests.helpers import ROOT, environment, losses, outputs, prepare, refused, train, trained, wait_until

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launchers(arguments, folder, count: int) -> list[subprocess.Popen]:
    """Start the rule's command once on each of `count` nodes, which are all this machine."""
    command = [sys.executable, "-m", "stages.train", *map(str, (*arguments, *outputs(folder)))]
    nodes = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if count > 1 else {}
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=environment() | nodes | ({"NODE_RANK": str(number)} if count > 1 else {}),
            stdout=(folder / f"log{number}").open("w"), stderr=subprocess.STDOUT,
        )
        for number in range(count)
    ]  # fmt: skip


def text(folder) -> str:
    return (folder / "log0").read_text()


def ended(arguments, folder, count: int) -> str:
    for process in launchers(arguments, folder, count):
        process.wait()
    assert (folder / "checkpoint/model.safetensors").exists(), text(folder)
    return text(folder)


# What all keys share cancels in the softmax where they are not rotated, so this gradient is zero up to rounding there, and
# AdamW takes steps of full size from rounding errors.
UNDETERMINED = "k_layernorm.bias"

# Two nodes with one process each, and one node with two processes; one case for each objective, and one for a family that
# computes its own losses.
CASES = {
    "zero2-two-nodes-sft": ("small_inputs", "sft", 2, {"nodes": 2}),
    "zero3-one-node-dpo": ("small_inputs", "dpo", 3, {"gpus": 2}),
    "zero2-one-node-sft-show-o": ("show_o_inputs", "sft", 2, {"gpus": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_follow_one_and_go_on_after_a_stop(case, request, tmp_path):
    name, objective, zero_stage, where = CASES[case]
    inputs = request.getfixturevalue(name)
    alone, whole, halted = (tmp_path / name for name in ("alone", "whole", "halted"))
    epochs = 3 if objective == "sft" else 5
    trained(prepare(alone, inputs, objective, epochs), alone)
    settings = {"zero_stage": zero_stage, "micro_batch_size": 2, **where}
    arguments, count = prepare(whole, inputs, objective, epochs, **settings), where.get("nodes", 1)
    ended(arguments, whole, count)
    assert losses(whole)["loss"] == pytest.approx(losses(alone)["loss"], abs=1e-4)
    assert losses(whole).keys() == losses(alone).keys()

    halted.mkdir()
    started = launchers(arguments, halted, count)
    assert wait_until(lambda: re.search("^step 3 of", text(halted), re.MULTILINE) is not None, started[0])
    for process in started:
        process.send_signal(signal.SIGTERM)
    assert [process.wait() for process in started] == [75] * count, text(halted)
    assert not (halted / "checkpoint").exists()
    one = ("--config", alone / "config.yaml", *arguments[2:])
    refused(train(one, halted), "saved by 2 processes", f"ZeRO stage {zero_stage}", "set train.gpus")
    assert "from checkpoint-" in ended(arguments, halted, count)

    first, second, single = (load_file(folder / "checkpoint/model.safetensors") for folder in (whole, halted, alone))
    assert first.keys() == second.keys() == single.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=0, atol=1e-6), name
        if not name.endswith(UNDETERMINED):
            assert torch.allclose(tensor, single[name], rtol=0, atol=1e-4), name
    assert losses(halted)["loss"] == pytest.approx(losses(whole)["loss"], abs=1e-6)
    if inputs.name.startswith("show-o"):
        ShowO.load(halted / "checkpoint")  # refuses missing and unknown weights
    else:
        _, report = JanusForConditionalGeneration.from_pretrained(halted / "checkpoint", output_loading_info=True)
        assert not any(report.values())


def test_several_nodes_without_a_meeting_point_are_refused(small_inputs, tmp_path):
    arguments = prepare(tmp_path, small_inputs, "sft", 1, nodes=2, micro_batch_size=4)
    left = {name for name in os.environ if name.startswith(("SLURM_", "MASTER_"))}
    assert not left, "this test needs a shell outside of any allocation"
    refused(train(arguments, tmp_path), "train.nodes is 2", "SLURM allocation", "MASTER_ADDR")
