"""Training: which parameters change, which do not, and that a continued segment equals an uninterrupted one bit for bit."""

import copy
import math
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import ks_2samp
from transformers import TrainingArguments

from stages import reference
from stages.common import manifests, shards
from stages.common.config import Train, load, validate
from stages.common.errors import UserError
from stages.families import checkpoint_hash
from stages.families.base import Pictures, TokenRows
from stages.families.janus.family import Janus
from stages.families.show_o.family import ShowO
from stages.train import read_inputs
from stages.training.rows import Material, token_rows
from stages.training.trainer import one_gpu, require_equal_starts
from tests.helpers import (
    SMALL,
    TINY,
    done,
    losses,
    merged,
    outputs,
    prepare,
    process_of,
    refused,
    train,
    trained,
    training,
    wait_until,
    write_config,
)
from tests.tiny_show_o import tiny_show_o


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_forked_segment_equals_the_uninterrupted_training_to_the_bit(objective, small_inputs, tmp_path):
    first, whole, forked = (tmp_path / name for name in ("first", "whole", "forked"))
    trained(prepare(first, small_inputs, objective, 1), first)
    trained(prepare(whole, small_inputs, objective, 2), whole)
    assert "from checkpoint-" in trained(prepare(forked, small_inputs, objective, 2), forked, "--continue", first / "work")
    for name in ("checkpoint/model.safetensors", "training.parquet"):
        assert (forked / name).read_bytes() == (whole / name).read_bytes()


def test_without_the_parents_saves_it_starts_over_and_ends_the_same(small_inputs, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    trained(prepare(whole, small_inputs, "sft", 1), whole)
    assert "from the base model" in trained(prepare(again, small_inputs, "sft", 1), again, "--continue", tmp_path / "deleted")
    assert (again / "checkpoint/model.safetensors").read_bytes() == (whole / "checkpoint/model.safetensors").read_bytes()


def test_saves_of_other_settings_are_never_continued(small_inputs, tmp_path):
    trained(prepare(tmp_path, small_inputs, "sft", 1), tmp_path)
    assert "from the base model" in trained(prepare(tmp_path, small_inputs, "sft", 1, learning_rate=1e-5), tmp_path)


def test_saves_of_other_pictures_with_the_same_ids_are_never_continued(small_inputs, tmp_path):
    inputs = shutil.copytree(small_inputs, tmp_path / "inputs")
    trained(prepare(tmp_path, inputs, "sft", 1), tmp_path)
    assert "from checkpoint-" in trained(prepare(tmp_path, inputs, "sft", 1), tmp_path)
    rows = manifests.read_rows(inputs / "candidates.parquet", "candidates")
    for row in rows:
        row["tokens"] = row["tokens"][::-1]
    manifests.write(inputs / "candidates.parquet", "candidates", rows, stage="stages.generate")
    assert "from the base model" in trained(prepare(tmp_path, inputs, "sft", 1), tmp_path)


def test_groups_that_the_loss_does_not_reach_are_refused(small_inputs, tmp_path):
    result = train(prepare(tmp_path, small_inputs, "sft", 1, trainable="vision"), tmp_path)
    refused(result, "train.trainable vision", "judge_anchor_weight")


def test_a_process_that_sees_several_gpus_trains_on_one(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 4
    one_gpu(arguments, torch.device("cpu"))
    assert arguments.n_gpu == 1


def test_a_process_alone_trains_on_the_gpu_of_its_model(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    one_gpu(arguments, torch.device("cuda:1"))
    assert arguments.device == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1")]


def test_the_rows_of_a_training_are_hashed_without_the_model():
    class Weights:
        def __reduce__(self):
            raise AssertionError("the model is pickled")

    material = Material([{}], {}, candidates=None, dpo=False, anchors=0, prompt_dropout=0.0, seed=0)
    rows = TokenRows(tokenizer=Weights(), ids=Weights(), unconditional=Weights())
    assert len(token_rows(rows, material)) == 1


def test_processes_that_would_continue_from_different_saves_are_stopped(monkeypatch):
    seen = [Path("work/checkpoint-4"), None]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda found, _: found.__setitem__(slice(None), seen))
    with pytest.raises(UserError, match=r"different saves \(work/checkpoint-4, no save\).*run it again"):
        require_equal_starts(seen[0])
    seen[1] = seen[0]
    require_equal_starts(seen[0])


def test_a_stopped_reference_continues_and_ends_the_same(small_inputs, tmp_path, monkeypatch):
    prepare(tmp_path, small_inputs, "dpo", 1)
    asked: list[str] = []

    def stopping(after: int):
        family = Janus.load(TINY)
        log_likelihood = family.log_likelihood

        def counted(prompts, pictures, seeds):
            if len(asked) >= after:
                raise KeyboardInterrupt
            asked.append(prompts[0])
            return log_likelihood(prompts, pictures, seeds)

        family.log_likelihood = counted
        return family

    given = {"generate": {"batch_size": 2}}
    config = write_config(tmp_path / "small", **merged(yaml.safe_load((tmp_path / "config.yaml").read_text()), given))

    def run(name: str, after: int) -> bytes:
        files = {"--config": config, "--prompts": small_inputs / "prompts.parquet", "--pairs": tmp_path / "pairs.parquet"}
        files |= {"--candidates": small_inputs / "candidates.parquet", "--out": tmp_path / name}
        monkeypatch.setattr("stages.families.open_family", lambda *_: stopping(after))
        monkeypatch.setattr("sys.argv", ["reference", *(str(part) for pair in files.items() for part in pair)])
        reference.main()
        return (tmp_path / name).read_bytes()

    with pytest.raises(KeyboardInterrupt):
        run("stopped.parquet", 3)
    assert not (tmp_path / "stopped.parquet").exists()
    before, asked[:] = len(asked), []
    continued = run("stopped.parquet", 1000)
    rest, asked[:] = len(asked), []
    assert continued == run("whole.parquet", 1000)
    assert before == 3
    assert len(asked) - before <= rest < len(asked), "at most the batch that was being written is computed again"
    assert not list(tmp_path.glob(".*.partial"))


LLM = ("model.language_model.layers.", "model.language_model.norm.")
TEXT = ("model.language_model.embed_tokens.",)
HEAD, JUDGING = ("lm_head.",), ("model.aligner.", "model.vision_model.")
# Settings, objective, and prefixes of the parameters that must change; no other parameter may change. The image loss does not
# reach parameters that are used only for judging, so these train only with the judge anchor.
TRAINABLE = [
    ({}, "sft", LLM),
    ({"weight_decay": 0.1}, "dpo", LLM),
    ({"trainable": "llm+text"}, "sft", (*LLM, *TEXT)),
    ({"trainable": "llm+projector"}, "sft", (*LLM, "model.generation_aligner.")),
    ({"trainable": "llm+projector+vision"}, "dpo", (*LLM, "model.generation_aligner.")),
    (
        {"trainable": "llm+text+projector+vision", "judge_anchor_weight": 0.5, "weight_decay": 0.1},
        "sft",
        (*LLM, *TEXT, *HEAD, *JUDGING, "model.generation_aligner."),
    ),
    ({"precision": "bfloat16"}, "sft", LLM),
    ({"gradient_checkpointing": True, "micro_batch_size": 4, "judge_anchor_weight": 0.5}, "dpo", LLM),
]


def tensors(checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize(("settings", "objective", "prefixes"), TRAINABLE, ids=[str(row[0]) for row in TRAINABLE])
def test_what_is_trainable_changes_and_nothing_else_does(settings, objective, prefixes, small_inputs, tmp_path):
    trained(prepare(tmp_path, small_inputs, objective, 1, **settings), tmp_path, "--scores", small_inputs / "scores.parquet")
    before, after = tensors(TINY), tensors(tmp_path / "checkpoint")
    assert before.keys() == after.keys()
    if settings.get("precision") == "bfloat16":
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        before = {name: tensor.bfloat16() for name, tensor in before.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {name for name in before if name.startswith(prefixes)}
    if settings.get("precision") == "bfloat16":  # a norm's weight is near 1 and moves by less than bfloat16 resolves
        expected = {name for name in expected if "norm" not in name}
        changed = {name for name in changed if "norm" not in name}
    assert changed == expected
    Janus.load(tmp_path / "checkpoint")


def test_lora_trains_few_numbers_and_leaves_a_plain_checkpoint(small_inputs, tmp_path):
    text = trained(prepare(tmp_path, small_inputs, "dpo", 1, lora_rank=2), tmp_path)
    before, after = tensors(TINY), tensors(tmp_path / "checkpoint")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(LLM[0]) and "_proj." in name}
    sizes = [sum(before[name].shape) * 2 for name in changed]
    assert f"{sum(sizes):,} trainable numbers" in text
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


def test_lora_trains_every_linear_layer_of_show_os_transformer(show_o_inputs, tmp_path):
    text = trained(prepare(tmp_path, show_o_inputs, "sft", 2, lora_rank=2, prompt_dropout=0.3), tmp_path)
    before, after = tensors(show_o_inputs / "model"), tensors(tmp_path / "checkpoint")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    parts = ShowO.load(tmp_path / "checkpoint").model.named_modules()
    assert changed == {f"{name}.weight" for name, part in parts if isinstance(part, torch.nn.Linear)}
    sizes = [sum(before[name].shape) * 2 for name in changed]
    assert f"{sum(sizes):,} trainable numbers" in text
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


@pytest.mark.slow
def test_a_killed_training_of_show_o_ends_with_the_same_bytes(show_o_inputs, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = prepare(whole, show_o_inputs, "sft", 6, prompt_dropout=0.3)
    trained(arguments, whole)
    killed.mkdir()
    process = training(*arguments, *outputs(killed), log=killed / "log")
    assert wait_until(lambda: (killed / "log").exists() and "step 3 of" in (killed / "log").read_text(), process)
    process.kill()
    process.join()
    assert not (killed / "checkpoint").exists()
    assert "from checkpoint-" in trained(arguments, killed)
    for name in ("checkpoint/model.safetensors", "training.parquet"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_killed_shard_of_show_o_ends_with_the_same_bytes(show_o_inputs, tmp_path):
    def arguments(folder):
        folder.mkdir(exist_ok=True)
        places = ("--out", folder / "candidates.parquet", "--images", folder / "candidates.tar", "--candidates", 40)
        return ("--config", show_o_inputs / "config.yaml", "--prompts", show_o_inputs / "prompts.parquet", *places)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done("generate", *arguments(whole))
    logs = {"out": tmp_path / "out", "errors": tmp_path / "errors"}
    process = process_of("stages.generate", *arguments(killed), **logs)
    assert wait_until(lambda: len(list(killed.glob(".*.partial/*.parquet"))) >= 3, process)
    process.kill()
    process.join()
    assert not (killed / "candidates.parquet").exists()
    assert "of 36 batches" not in done("generate", *arguments(killed)).stderr  # it drew fewer than all
    for name in ("candidates.parquet", "candidates.tar"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


# An independent reference: plain transformers with full logits, and the formulas of the papers.


def log_probability(model, prompt: str, codes: list[int], family) -> torch.Tensor:
    """Return log p(codes | prompt), computed from the logits of all positions."""
    ids = torch.tensor([family._prompt_ids(prompt)])
    image = model.prepare_embeddings_for_image_generation(torch.tensor([codes]))
    inputs = torch.cat([model.get_input_embeddings()(ids), image], 1)
    hidden = model.model.language_model(inputs_embeds=inputs).last_hidden_state
    logits = model.model.generation_head(hidden[0, ids.shape[1] - 1 : -1])
    return sum(torch.log_softmax(row.double(), -1)[code] for row, code in zip(logits, codes, strict=True))


@torch.no_grad()
def expected_losses(model, base, family, rows, candidates, prompts, beta: float, nll_weight: float) -> tuple[float, float]:
    """Return the loss of a step's rows: SFT's loss, or DPO's with the negative log-likelihood of the chosen images."""
    sft, dpo = [], []
    for row in rows:
        sides = [(prompts[row["prompt_id"]], candidates[row[side]]["tokens"]) for side in ("chosen", "rejected") if row[side]]
        now = [log_probability(model, *side, family) for side in sides]
        then = [log_probability(base, *side, family) for side in sides]
        sft.append(-now[0] / len(sides[0][1]))
        if len(sides) == 2:
            margin = (now[0] - then[0]) - (now[1] - then[1])
            dpo.append(torch.log(1 + torch.exp(-beta * margin)) + nll_weight * sft[-1])
    return float(sum(sft) / len(sft)), float(sum(dpo) / len(dpo)) if dpo else math.nan


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_losses_equal_an_independent_reference(objective, small_inputs, tmp_path, tiny):
    beta, weight = 0.3, 0.7
    settings = {"save_every_steps": 1, "beta": beta, "nll_weight": weight, "micro_batch_size": 4}
    trained(prepare(tmp_path, small_inputs, objective, 2, **settings), tmp_path)
    candidates = {row["candidate_id"]: row for row in manifests.read_rows(small_inputs / "candidates.parquet", "candidates")}
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(small_inputs / "prompts.parquet", "prompts")}
    schedule = manifests.read_rows(tmp_path / "schedule.parquet", "schedule")
    steps = schedule[-1]["step"] + 1
    assert steps >= 2
    model = copy.deepcopy(tiny.model)
    save = next(tmp_path.glob(f"work/*/checkpoint-{steps - 1}"))  # the weights before the last step
    model.load_state_dict({name.removeprefix("janus."): value for name, value in tensors(save).items()})
    for step, weights in ((0, tiny.model), (steps - 1, model)):
        rows = [row for row in schedule if row["step"] == step]
        sft, dpo = expected_losses(weights, tiny.model, tiny, rows, candidates, prompts, beta, weight)
        assert losses(tmp_path)["loss"][step] == pytest.approx(sft if objective == "sft" else dpo, abs=1e-5)
        assert losses(tmp_path)["nll"][step] == pytest.approx(sft, abs=1e-5)
    if objective == "dpo":
        assert losses(tmp_path)["loss"][0] - weight * losses(tmp_path)["nll"][0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_dropped_prompt_becomes_the_unconditional_row_of_the_drawing(small_inputs, tmp_path, tiny):
    trained(prepare(tmp_path, small_inputs, "sft", 1, prompt_dropout=1.0, micro_batch_size=4), tmp_path)
    candidates = {row["candidate_id"]: row for row in manifests.read_rows(small_inputs / "candidates.parquet", "candidates")}
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(small_inputs / "prompts.parquet", "prompts")}

    class Unconditional:
        def _prompt_ids(self, prompt):
            return [tiny.tokenizer.bos_token_id, *[tiny.pad] * (len(tiny._prompt_ids(prompt)) - 2), tiny.begin]

    rows = [row for row in manifests.read_rows(tmp_path / "schedule.parquet", "schedule") if row["step"] == 0]
    with torch.no_grad():
        expected = [
            -log_probability(tiny.model, prompts[row["prompt_id"]], tokens, Unconditional()) / len(tokens)
            for row in rows
            for tokens in [candidates[row["chosen"]]["tokens"]]
        ]
    assert losses(tmp_path)["loss"][0] == pytest.approx(float(sum(expected) / len(rows)), abs=1e-5)


def test_as_many_prompts_are_dropped_as_the_settings_say():
    schedule = [{"chosen": f"{i:024x}", "rejected": None, "epoch": i % 7} for i in range(2000)]

    def dropped(share, seed=0):
        return Material(schedule, {}, None, False, 0, share, seed).dropped(range(len(schedule)))

    assert np.mean(dropped(0.1)) == pytest.approx(0.1, abs=0.03)
    assert not any(dropped(0.0))
    assert dropped(0.1) == dropped(0.1) != dropped(0.1, seed=1)


def test_a_row_without_a_prompt_has_a_mask_and_a_timestep_like_any_other():
    schedule = [{"chosen": f"{i:024x}", "rejected": None, "epoch": i % 7} for i in range(3000)]
    material = Material(schedule, {}, None, False, 0, 0.3, 0)
    places = range(len(schedule))
    dropped, seeds = np.array(material.dropped(places)), material.seeds(places)
    shares = tiny_show_o().masks(seeds)[:, 0].mean(1)
    times = np.array([np.random.Generator(np.random.Philox(int(seed))).random() for seed in seeds])  # the toy flow's
    for values in (shares, times):
        assert ks_2samp(values[dropped], values[~dropped]).pvalue > 0.01


def test_trls_fused_log_probabilities_are_our_own(small_inputs, tiny):
    from trl.trainer.utils import add_fused_lm_head

    rows = manifests.read_rows(small_inputs / "candidates.parquet", "candidates")[:12]
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(small_inputs / "prompts.parquet", "prompts")}
    texts = [prompts[row["prompt_id"]] for row in rows]
    pictures = Pictures(tokens=np.array([row["tokens"] for row in rows]))
    model = tiny.training_view().model
    add_fused_lm_head(model)
    for (prompt, image), own in zip(tiny.token_ids(texts, pictures), tiny.log_likelihood(texts, pictures), strict=True):
        ids, labels = torch.tensor([prompt + image]), torch.tensor([[-100] * len(prompt) + image])
        with torch.no_grad():
            fused = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        assert fused.double().sum().item() == pytest.approx(own, abs=1e-5)


def test_references_of_another_model_fail_the_first_step(small_inputs, tmp_path):
    arguments = prepare(tmp_path, small_inputs, "dpo", 1)
    rows = manifests.read_rows(tmp_path / "schedule.parquet", "schedule")
    rows = [row | {"reference_chosen": row["reference_chosen"] + 0.5} for row in rows]
    manifests.write(tmp_path / "schedule.parquet", "schedule", rows, stage="stages.schedule")
    refused(train(arguments, tmp_path), "the first sigmoid loss", "0.6931", "ln 2", "not the base model's")
    assert not list(tmp_path.glob("work/*/checkpoint-*"))


@pytest.mark.parametrize(("loss", "first"), [("hinge", 1.0), ("ipo", 6.25)])
def test_other_preference_losses_begin_at_their_own_value(loss, first, small_inputs, tmp_path):
    trained(prepare(tmp_path, small_inputs, "dpo", 1, dpo_loss=loss, beta=0.2, nll_weight=0.0), tmp_path)
    assert losses(tmp_path)["loss"][0] == pytest.approx(first, abs=1e-3)


def test_metrics_of_every_step(small_inputs, tmp_path):
    trained(prepare(tmp_path, small_inputs, "dpo", 1), tmp_path)
    names = {"logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies", "nll", "grad_norm", "learning_rate"}
    found = losses(tmp_path)
    assert names <= found.keys()
    assert len({len(values) for values in found.values()}) == 1
    assert not any("second" in name or "time" in name for name in found)
    assert "rows/s" in (tmp_path / "log").read_text()
    assert Image.open(tmp_path / "training.png").width > 400


def test_the_card_says_what_is_needed_to_train_it_again(small_inputs, tmp_path):
    trained(prepare(tmp_path, small_inputs, "sft", 1), tmp_path)
    text = (tmp_path / "checkpoint/README.md").read_text()
    facts = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert validate(facts["config"]) == load(tmp_path / "config.yaml")
    assert facts["schedule"] == manifests.content_hash(tmp_path / "schedule.parquet")
    assert facts["base model"] == checkpoint_hash("janus", TINY, "train")
    assert facts["versions"]["torch"] == torch.__version__
    assert {name.split("@")[0] for name in facts["code"]} >= {"stages/train.py", "stages/training/trainer.py"}


# The judge anchor


def judged(small_inputs):
    rows = manifests.read_rows(small_inputs / "candidates.parquet", "candidates")
    scores = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(small_inputs / "scores.parquet", "scores")}
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(small_inputs / "prompts.parquet", "prompts")}
    questions = [SMALL["score"]["question"].replace("{prompt}", prompts[row["prompt_id"]]) for row in rows]
    return (
        shards.read_images(small_inputs / "candidates.parquet", rows),
        questions,
        np.array([scores[row["candidate_id"]] for row in rows]),
    )


def test_the_judge_loss_is_the_cross_entropy_of_p_yes(small_inputs, tiny):
    images, questions, _ = judged(small_inputs)
    target = np.linspace(0, 1, len(questions))
    found, _ = tiny.p_yes(images, questions)
    expected = -(target * np.log(found) + (1 - target) * np.log(1 - found)).mean()
    loss = tiny.judge_loss(tiny.training_view().model, images, questions, target)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_an_anchored_judge_forgets_less(small_inputs, tmp_path):
    images, questions, before = judged(small_inputs)
    drift = {}
    for weight in (0.0, 1.0):
        folder = tmp_path / str(weight)
        hard = {"learning_rate": 3e-3, "warmup_steps": 10, "save_every_steps": 1000}  # enough to ruin a judge
        arguments = prepare(folder, small_inputs, "sft", 30, judge_anchor_weight=weight, **hard)
        trained(arguments, folder, "--scores", small_inputs / "scores.parquet")
        after, _ = Janus.load(folder / "checkpoint").p_yes(images, questions)
        drift[weight] = np.abs(after - before).mean()
    assert drift[1.0] < 0.7 * drift[0.0], drift
    assert "judge_anchor" in losses(tmp_path / "1.0")
    assert "judge_anchor" not in losses(tmp_path / "0.0")


def test_training_on_its_own_verdicts_alone_makes_the_judge_more_certain(small_inputs, tmp_path):
    images, questions, before = judged(small_inputs)
    alone = {"image_weight": 0.0, "judge_anchor_weight": 1.0, "judge_anchor_target": "verdict"}
    arguments = prepare(tmp_path, small_inputs, "sft", 30, learning_rate=3e-4, save_every_steps=1000, **alone)
    trained(arguments, tmp_path, "--scores", small_inputs / "scores.parquet")
    after, _ = Janus.load(tmp_path / "checkpoint").p_yes(images, questions)
    assert np.abs(after - (before >= 0.5)).mean() < np.abs(before - (before >= 0.5)).mean()
    assert "nll" not in losses(tmp_path)


def test_saves_with_a_judge_anchor_belong_to_its_question_prompts_and_pictures(small_inputs, tmp_path):
    prepare(tmp_path, small_inputs, "sft", 1, judge_anchor_weight=0.5, judge_anchor_target="verdict")

    def identity(**files):
        inputs = {name: small_inputs / f"{name}.parquet" for name in ("prompts", "candidates", "scores")} | files
        arguments = Namespace(
            arm="x",
            config=inputs.get("config", tmp_path / "config.yaml"),
            schedule=tmp_path / "schedule.parquet",
            prompts=inputs["prompts"],
            candidates=[inputs["candidates"]],
            scores=[inputs["scores"]],
        )
        return read_inputs(arguments).identity()

    def changed(name, column, value):
        rows = manifests.read_rows(small_inputs / f"{name}.parquet", name)
        path = tmp_path / f"{name}.parquet"
        manifests.write(path, name, [row | {column: value(row)} for row in rows], stage="stages.prompts")
        return identity(**{name: path})

    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["score"]["question"] = "is this {prompt} ?"
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(config))
    before = identity()
    assert identity() == before
    assert identity(config=tmp_path / "asked.yaml") != before
    assert changed("prompts", "prompt", lambda row: row["prompt"] + " .") != before
    assert changed("candidates", "tokens", lambda row: row["tokens"][::-1]) != before


def test_an_anchor_without_scores_is_refused(small_inputs, tmp_path):
    refused(train(prepare(tmp_path, small_inputs, "sft", 1, judge_anchor_weight=0.5), tmp_path), "judge_anchor", "--scores")


def test_accumulation_follows_from_batch_micro_batch_and_processes():
    assert Train(batch_size=32, micro_batch_size=2, gpus=4, nodes=2).accumulation() == 2
    for settings, remedy in (({"gpus": 4}, "set micro_batch_size to 8"), ({"gpus": 3}, "set batch_size to a multiple of 3")):
        with pytest.raises(ValueError, match=remedy):
            Train(batch_size=32, micro_batch_size=32, **settings).accumulation()


def test_a_foreign_reference_is_refused(small_inputs, tmp_path):
    arguments = prepare(tmp_path, small_inputs, "dpo", 1)
    rows = manifests.read_rows(tmp_path / "schedule.parquet", "schedule")
    rows = [row | {"reference_checkpoint": "0" * 16} for row in rows]
    manifests.write(tmp_path / "schedule.parquet", "schedule", rows, stage="stages.schedule")
    refused(train(arguments, tmp_path), "reference_checkpoint", "run stages.reference")
    assert not (tmp_path / "checkpoint").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_no_checkpoint(small_inputs, tmp_path):
    arguments = prepare(tmp_path, small_inputs, "sft", 2, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0)
    refused(train(arguments, tmp_path), "not finite", "lower train.learning_rate")
    assert not (tmp_path / "checkpoint").exists()
    assert not (tmp_path / "training.parquet").exists()
