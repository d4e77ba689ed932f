"""Training: what changes, what does not, and that a continued segment is the uninterrupted one to the bit."""

import math

import pytest
import torch
from safetensors.torch import load_file

from stages.common import manifests
from stages.families.janus import Janus
from tests.conftest import TINY, losses, prepare, refused, stage, train


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_forked_segment_equals_the_uninterrupted_training_to_the_bit(objective, drawn, tmp_path):
    first, whole, forked = (tmp_path / name for name in ("first", "whole", "forked"))
    train(prepare(first, drawn, objective, 1), first)
    train(prepare(whole, drawn, objective, 2), whole)
    result = train(prepare(forked, drawn, objective, 2), forked, "--continue", first / "work")
    assert "from checkpoint-" in result.stdout
    for name in ("checkpoint/model.safetensors", "training.parquet"):
        assert (forked / name).read_bytes() == (whole / name).read_bytes()


def test_without_the_parents_saves_it_starts_over_and_ends_the_same(drawn, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(prepare(whole, drawn, "sft", 1), whole)
    result = train(prepare(again, drawn, "sft", 1), again, "--continue", tmp_path / "deleted")
    assert "from the base model" in result.stdout
    assert (again / "checkpoint/model.safetensors").read_bytes() == (whole / "checkpoint/model.safetensors").read_bytes()


def test_saves_of_other_settings_are_never_continued(drawn, tmp_path):
    train(prepare(tmp_path, drawn, "sft", 1), tmp_path)
    result = train(prepare(tmp_path, drawn, "sft", 1, learning_rate=1e-5), tmp_path)
    assert "from the base model" in result.stdout


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_only_the_llm_layers_change(objective, drawn, tmp_path):
    train(prepare(tmp_path, drawn, objective, 1), tmp_path)
    before, after = load_file(TINY / "model.safetensors"), load_file(tmp_path / "checkpoint/model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name in before if name.startswith(("model.language_model.layers.", "model.language_model.norm."))}
    assert changed == trained
    Janus.load(tmp_path / "checkpoint")


def test_the_first_dpo_loss_is_ln_2_and_the_nll_is_our_own(drawn, tmp_path, tiny):
    arguments = prepare(tmp_path, drawn, "dpo", 1)
    train(arguments, tmp_path)
    schedule = manifests.read_rows(tmp_path / "schedule.parquet", "schedule")
    known = {row["candidate_id"]: row for row in manifests.read_rows(drawn / "candidates.parquet", "candidates")}
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(drawn / "prompts.parquet", "prompts")}
    first = [row for row in schedule if row["step"] == 0]
    import numpy as np

    tokens = np.array([known[row["chosen"]]["tokens"] for row in first])
    own = -tiny.image_log_likelihood([prompts[row["prompt_id"]] for row in first], tokens) / tiny.image_length
    assert losses(tmp_path)["loss"][0] == pytest.approx(math.log(2) + own.mean(), abs=2e-3)
    assert losses(tmp_path)["rewards/margins"][0] == pytest.approx(0, abs=1e-3)


def test_the_first_sft_loss_is_our_own_negative_log_likelihood(drawn, tmp_path, tiny):
    import numpy as np

    arguments = prepare(tmp_path, drawn, "sft", 1)
    train(arguments, tmp_path)
    known = {row["candidate_id"]: row for row in manifests.read_rows(drawn / "candidates.parquet", "candidates")}
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(drawn / "prompts.parquet", "prompts")}
    first = [row for row in manifests.read_rows(tmp_path / "schedule.parquet", "schedule") if row["step"] == 0]
    tokens = np.array([known[row["chosen"]]["tokens"] for row in first])
    own = -tiny.image_log_likelihood([prompts[row["prompt_id"]] for row in first], tokens) / tiny.image_length
    assert losses(tmp_path)["loss"][0] == pytest.approx(own.mean(), abs=1e-3)


def test_a_foreign_reference_is_refused(drawn, tmp_path):
    arguments = prepare(tmp_path, drawn, "dpo", 1)
    rows = manifests.read_rows(tmp_path / "schedule.parquet", "schedule")
    rows = [row | {"reference_checkpoint": "0" * 16} for row in rows]
    manifests.write(tmp_path / "schedule.parquet", "schedule", rows, stage="stages.schedule")
    refused(train(arguments, tmp_path, run=stage), "reference_checkpoint", "run stages.reference")
    assert not (tmp_path / "checkpoint").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_no_checkpoint(drawn, tmp_path):
    arguments = prepare(tmp_path, drawn, "sft", 2, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0)
    refused(train(arguments, tmp_path, run=stage), "not finite", "lower train.learning_rate")
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "training.parquet").exists()
