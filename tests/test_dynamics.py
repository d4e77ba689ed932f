"""Learning dynamics: terms against an explicit Jacobian and finite differences, and the commands on a small run."""

import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stages.common import manifests
from stages.common.config import Train, load
from stages.common.errors import UserError
from stages.common.seeds import hash_seed
from stages.common.settings import Score
from stages.dynamics import embed, gradients, likelihood
from stages.dynamics.claims import Pairs, interval, step_claims
from stages.dynamics.command import training_facts
from stages.dynamics.follow import Training
from stages.dynamics.items import similarity
from stages.dynamics.material import Material
from stages.dynamics.precision import double
from stages.dynamics.steps import adamw_step
from stages.dynamics.terms import Terms, blocks
from stages.families import describe, model_facts
from stages.families.base import Pictures
from tests.helpers import (
    TINY,
    completed,
    copy_of_the_project,
    done,
    merged,
    process_of,
    refused,
    snakemake,
    stage,
    trained,
    wait_until,
    write_config,
)
from tests.tiny_judges import write_tiny_clip
from tests.tiny_show_o import tiny_show_o

PROMPTS = ["a red circle", "a blue circle", "two squares", "a red square above a blue cross"]
CODES = 8


@pytest.fixture(scope="module")
def built():
    """A Janus of 6,700 trainable parameters that draws 16 tokens of 8 codes, with its parameters."""
    from transformers import JanusForConditionalGeneration

    from stages.families.janus.family import Janus
    from stages.shapes.tiny_janus import make_config, make_processor

    torch.manual_seed(0)
    processor = make_processor()
    config = make_config(processor, hidden=16, layers=2)
    config.vq_config.num_embeddings = CODES
    family = Janus(JanusForConditionalGeneration(config), processor)
    view = family.training_view()
    parameters = gradients.chosen_parameters(view.model, view.groups["llm"])
    for tensor in parameters.tensors.values():  # far from the initial weights, where attention is uniform
        tensor.data.mul_(3)
    return likelihood.Model(family, describe("janus"), view, Score(question="does this image show {prompt} ?")), parameters


@pytest.fixture
def small(built):
    """The same in float64. The mode that keeps it so ends with each test, because no checkpoint loads while it is active."""
    with double(built[0].view.model):
        yield built


def picture(number: int) -> Pictures:
    return Pictures(tokens=np.random.default_rng(number).integers(0, CODES, (1, 16)))


def image(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def log_p(model, prompt: str, number: int) -> torch.Tensor:
    return likelihood.under_prompts(model, [prompt], picture(number), 0)[0]


def jacobian(model, parameters, prompt: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the Jacobian of an image's logits `[m k, size]`, entry by entry, and the logit errors one-hot minus p `[m k]`."""
    logits, targets = likelihood.image_logits(model, [prompt], picture(number))
    rows = [gradients.gradient(logit, parameters, keep_graph=True) for logit in logits.flatten()]
    errors = torch.nn.functional.one_hot(targets, CODES).double() - logits.softmax(-1)
    return torch.stack(rows), errors.detach().flatten()


@pytest.fixture(scope="module")
def explicit(built):
    """Jacobian and logit errors of probe 0 under every prompt, and of training image 1 under its own."""
    with double(built[0].view.model):
        probes = [jacobian(*built, prompt, 0) for prompt in PROMPTS]
        return probes, jacobian(*built, "a red square", 1)


def near(found, expected) -> bool:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return bool((found - expected).abs().max() <= 1e-8 * max(1.0, float(expected.abs().max())))


def test_the_kernel_is_that_of_the_explicit_jacobian(small, explicit):
    model, parameters = small
    (left, _), (right, _) = explicit[0][0], explicit[1]
    vector = torch.randn(1, 16, CODES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of = [lambda: likelihood.image_logits(model, [PROMPTS[0]], picture(0))[0]]
    of.append(lambda: likelihood.image_logits(model, ["a red square"], picture(1))[0])
    found = gradients.kernel_times(model.view.model, parameters, of[0], of[1], vector)
    assert near(found.flatten(), left @ (right.T @ vector.flatten()))


def test_delta_g_is_the_papers_double_sum_over_tokens(small, explicit):
    """dG = -eta sum_k sum_r (e - p)_k K_kr (p - e)_r, here for eta = 1 and the loss -log p; also layer by layer."""
    model, parameters = small
    (left, error), (right, training_error) = explicit[0][0], explicit[1]
    kernel = left @ right.T
    blocks = kernel.view(16, CODES, 16, CODES)
    errors, training_errors = error.view(16, CODES), training_error.view(16, CODES)
    paper = -sum(
        errors[k] @ blocks[k, :, r] @ -training_errors[r] for k in range(16) for r in range(16)
    )  # the paper's error of the training sample is p - e
    probe = gradients.gradient(log_p(model, PROMPTS[0], 0), parameters)[None]
    row = gradients.gradient(log_p(model, "a red square", 1), parameters)[None]
    terms = gradients.products(probe, row, parameters)
    assert list(terms) == ["layers.0", "layers.1", "norm"]
    assert near(sum(terms.values())[0, 0], paper)
    for name, part in parameters.subsets.items():
        assert near(terms[name][0, 0], error @ left[:, part] @ right[:, part].T @ training_error)


def test_delta_u_is_the_papers_sum_over_alternatives(small, explicit):
    model, parameters = small
    likelihoods = likelihood.under_prompts(model, PROMPTS, picture(0), 0)
    weights = likelihoods.detach().softmax(0)
    right, training_error = explicit[1]
    terms = [error @ left @ right.T @ training_error for left, error in explicit[0]]
    paper = sum(weights[i] * (terms[0] - terms[i]) for i in range(1, len(PROMPTS)))
    probe = gradients.gradient(likelihood.posterior(likelihoods), parameters)
    row = gradients.gradient(log_p(model, "a red square", 1), parameters)
    assert near(probe @ row, paper)


def shifted(model, parameters, function, direction, size: float) -> float:
    gradients.move(parameters, size * direction)
    value = float(function().detach())
    gradients.move(parameters, -size * direction)
    return value


def losses(model):
    """Return functions of the model that return a scalar with gradient, by name."""
    seeds, settings = np.zeros(1, dtype=np.int64), Train(beta=0.3, nll_weight=0.5)
    pair = (["a red circle"], picture(2), picture(3), seeds)
    return {
        "log-likelihood": lambda: log_p(model, PROMPTS[0], 0),
        "posterior": lambda: likelihood.posterior(likelihood.under_prompts(model, PROMPTS, picture(0), 0)),
        "log odds": lambda: likelihood.log_odds(model, "a red circle", image(0)),
        "sft": lambda: likelihood.sft_losses(model, ["a red circle"], picture(2), seeds)[0],
        "dpo": lambda: likelihood.dpo_losses(model, *pair, torch.zeros(1), settings)[0],
    }


@pytest.mark.parametrize("name", ["log-likelihood", "posterior", "log odds", "sft", "dpo"])
def test_gradients_are_finite_differences(small, name):
    model, parameters = small
    function = losses(model)[name]
    vector = gradients.gradient(function(), parameters)
    direction = torch.randn(parameters.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-5
    difference = shifted(model, parameters, function, direction, step) - shifted(model, parameters, function, direction, -step)
    assert float(vector @ direction) == pytest.approx(difference / (2 * step), rel=1e-6, abs=1e-6)
    value, derivative = gradients.directional(model.view.model, parameters, function, direction)
    assert float(derivative) == pytest.approx(float(vector @ direction), rel=1e-8)
    assert float(value) == pytest.approx(float(function().detach()), rel=1e-12)


def test_the_loss_of_a_row_is_the_one_that_its_arm_trains(small):
    """TRL's ipo compares means over the image's 16 tokens, and image_weight scales the loss of every image."""
    model, parameters = small
    arm = Train(beta=0.2, dpo_loss="ipo", nll_weight=0.5, image_weight=0.25)
    pictures = SimpleNamespace(pictures=lambda names: picture(int(names[0])))
    material = Material(model, parameters, pictures, [], SimpleNamespace(arm_train=lambda name: arm))
    row = {"arm": "mine", "prompt": PROMPTS[0], "seed": 0, "chosen": "2", "rejected": None}
    chosen, rejected = (log_p(model, PROMPTS[0], number).detach() for number in (2, 3))
    assert near(material.losses([row])[0].detach(), -0.25 * chosen / 16)
    ipo = ((chosen - rejected - 1.5) / 16 - 1 / (2 * 0.2)) ** 2
    found = material.losses([row | {"rejected": "3", "reference": 1.5}])[0].detach()
    assert near(found, 0.25 * (ipo - 0.5 * chosen / 16))


@pytest.mark.parametrize("place", ["a step", "a followed training"])
def test_weights_decay_where_the_trainer_lets_them_and_norms_do_not(place, small):
    """Without a gradient AdamW only lets weights decay, here to nine tenths."""
    model, parameters = small
    settings = Train(learning_rate=0.2, weight_decay=0.5, warmup_steps=0)
    config = SimpleNamespace(arm_train=lambda name: settings, model=SimpleNamespace(dtype="float32"))
    none = torch.zeros(parameters.size, dtype=torch.float64)
    material = SimpleNamespace(model=model, parameters=parameters, config=config, mean_gradient=lambda rows, size: none)
    before = gradients.flat(parameters)
    if place == "a step":
        step = adamw_step(material, none, settings, 1.0)
    else:
        Training(material, "mine", {}, []).train([[]])
        step = gradients.flat(parameters) - before
        gradients.place(parameters, before)
    for name, piece in gradients.split(step, parameters).items():
        assert near(piece, torch.zeros_like(piece) if "norm" in name else -0.1 * parameters.tensors[name]), name


def test_an_arm_that_trains_on_no_image_has_no_learning_dynamics(tmp_path):
    judging = {"objective": "sft", "epochs": 1, "train": {"image_weight": 0.0, "judge_anchor_weight": 1.0}}
    config = write_config(tmp_path, arms={"judging": judging}, dynamics={"arms": ["judging"]})
    with pytest.raises(UserError, match=r"dynamics.arms: judging has train.image_weight 0, .* name other arms"):
        load(config)


# --- the commands ------------------------------------------------------------------------------------------------------

DYNAMICS = {
    "images": 12,
    "probes": 5,
    "alternatives": 2,
    "rows": 6,
    "step_probes": 2,
    "step_sizes": [1.0, 0.5, 0.25],
    "logit_probes": 2,
    "logit_draws": 2,
    "segments": 50,  # one for each optimizer step
}


@pytest.fixture(scope="module")
def chosen(small_inputs, tmp_path_factory):
    """A folder with a configuration, verdicts, pairs of two arms, probes and rows, and the arguments that name them."""
    folder = tmp_path_factory.mktemp("dynamics")
    arms = {"sft": {"objective": "sft", "epochs": 1}, "dpo": {"objective": "dpo", "epochs": 1}}
    config = write_config(folder, arms=arms, dynamics=DYNAMICS, train={"learning_rate": 1e-5})
    common = ("--config", config)
    images = ("--candidates", small_inputs / "candidates.parquet")
    prompts = ("--prompts", small_inputs / "prompts.parquet")
    scores = ("--scores", small_inputs / "scores.parquet")
    done("judge", *common, "--judge", "shapes", *prompts, *images, "--out", folder / "verdicts.parquet")
    pairs = []
    for arm in arms:
        done("pairs", *common, "--arm", arm, *images, *scores, "--out", folder / f"{arm}.parquet",
             "--discard", folder / "discard.parquet")  # fmt: skip
        pairs += ["--pairs", arm, folder / f"{arm}.parquet"]
    done("dynamics.select", *common, *prompts, *images, *scores, "--verdicts", folder / "verdicts.parquet",
         "--training-prompts", small_inputs / "prompts.parquet", *pairs,
         "--probes", folder / "probes.parquet", "--rows", folder / "rows.parquet")  # fmt: skip
    return folder, (*common, "--probes", folder / "probes.parquet", "--rows", folder / "rows.parquet", *images)


def test_probes_are_a_fair_sample_and_alternatives_resemble_their_prompts(chosen):
    folder, _ = chosen
    probes = manifests.read_rows(folder / "probes.parquet", "dynamics_probes")
    assert len(probes) == DYNAMICS["images"]
    assert len({row["category"] for row in probes[:6]}) == 6
    assert len({row["prompt_id"] for row in probes}) == len(probes)
    assert [len(row["alternatives"]) for row in probes] == [2] * 5 + [0] * 7
    for row in probes[:5]:
        others = {other["prompt"] for other in probes} - {row["prompt"], *row["alternatives"]}
        least = min(similarity(row["prompt"], other) for other in row["alternatives"])
        assert least >= max(similarity(row["prompt"], other) for other in others)
    rows = manifests.read_rows(folder / "rows.parquet", "dynamics_rows")
    assert {row["objective"] for row in rows} == {"sft", "dpo"}
    assert all((row["rejected"] is None) == (row["objective"] == "sft") for row in rows)


def terms_command(chosen, folder, shard="0/1"):
    outputs = ("--out", folder / "terms.parquet", "--values", folder / "values.parquet")
    return (*chosen[1], "--checkpoint", TINY, "--shard", shard, *outputs)


def test_terms_of_shards_are_those_of_the_whole_and_a_killed_stage_continues(chosen, tmp_path):
    first, second, whole, killed = (tmp_path / name for name in ("first", "second", "whole", "killed"))
    done("dynamics.terms", *terms_command(chosen, whole))
    done("dynamics.terms", *terms_command(chosen, first, "0/2"))
    done("dynamics.terms", *terms_command(chosen, second, "1/2"))
    tables = {folder: pandas.read_parquet(folder / "terms.parquet") for folder in (first, second, whole)}
    order = ["candidate_id", "row_id", "objective", "subset"]
    together = pandas.concat([tables[first], tables[second]]).sort_values(order, ignore_index=True)
    pandas.testing.assert_frame_equal(together, tables[whole].sort_values(order, ignore_index=True), rtol=1e-9)
    sums = tables[whole].groupby(["candidate_id", "row_id", "objective", tables[whole].subset == "all"])[["delta_g", "delta_u"]]
    found = sums.sum().unstack()
    for name in ("delta_g", "delta_u"):
        assert np.allclose(found[name][True], found[name][False])
    kernel = tables[whole][(tables[whole].objective == "kernel") & (tables[whole].subset == "all")]
    square = kernel.pivot(index="candidate_id", columns="row_id", values="delta_g")
    assert np.allclose(square, square.loc[square.columns].T.loc[square.index, square.columns])
    assert np.linalg.eigvalsh(square.loc[square.columns].to_numpy()).min() > 0

    process = process_of("stages.dynamics.terms", *terms_command(chosen, killed), out=tmp_path / "out", errors=tmp_path / "err")
    assert wait_until(lambda: bool(list(killed.glob(".terms.parquet.*.partial/*.parquet"))), process)
    process.kill()
    process.join()
    done("dynamics.terms", *terms_command(chosen, killed))
    for name in ("terms.parquet", "values.parquet"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_memory_does_not_grow_with_the_number_of_probes(small):
    """At any time there are the gradients of one probe and of one block of rows."""
    model, parameters = small
    alive: list = []

    class Counted:
        def __init__(self):
            self.model, self.parameters, self.judges = model, parameters, True

        def probe_gradients(self, probe):
            assert sum(reference() is not None for reference in alive) == 0
            found = torch.zeros(3, parameters.size, dtype=torch.float64)
            alive.append(weakref.ref(found))
            return found

        def descent(self, row):
            return torch.zeros(parameters.size, dtype=torch.float64)

    rows = [{"row_id": str(number), "objective": "sft"} for number in range(40)]
    held = blocks(rows, parameters.size, memory=1)
    assert [len(block) for block in held[:-1]] == [10**6 // (8 * parameters.size)] * (len(held) - 1)
    terms, probes = Terms(Counted()), [{"candidate_id": str(number)} for number in range(50)]
    sizes = set()
    for block in held:
        found = terms.of_batch((block, probes))
        assert len(found) == len(block) * len(probes) * 4
        sizes.add(terms.vectors.nbytes)
    assert max(sizes) <= 10**6
    assert len(alive) == len(held) * len(probes)


# --- whole commands: steps, followed training, proxies, claims, page -----------------------------------------------------


@pytest.fixture(scope="module")
def examined(chosen, small_inputs, tmp_path_factory):
    """The folder of a run's dynamics with everything that claims are made of; one arm was trained by the trainer itself."""
    folder, common = tmp_path_factory.mktemp("examined") / "dynamics", chosen[1]
    config, images = common[:2], common[-2:]
    for name in ("probes.parquet", "rows.parquet"):
        folder.mkdir(exist_ok=True)
        shutil.copy(chosen[0] / name, folder / name)
    done("dynamics.terms", *common, "--checkpoint", TINY, "--out", folder / "base/terms/0000.parquet",
         "--values", folder / "base/values/0000.parquet")  # fmt: skip
    done("dynamics.steps", *common, "--checkpoint", TINY, "--out", folder / "steps.parquet")
    probed = (*config, "--probes", folder / "probes.parquet", *images, "--checkpoint", TINY)
    done("dynamics.logits", *probed, "--out", folder / "logits.parquet")
    prompts = ("--prompts", small_inputs / "prompts.parquet")
    done("dynamics.embed", *config, *prompts, *images, "--checkpoint", TINY, "--out", folder / "embeddings/0000.parquet")
    done("dynamics.sketch", *common, "--checkpoint", TINY, "--out", folder / "sketches/0000.parquet")
    schedule = folder.parent / "schedule.parquet"
    done("schedule", *config, "--arm", "sft", "--epochs", 1, "--pairs", chosen[0] / "sft.parquet", "--out", schedule)
    training = (*config, "--arm", "sft", *prompts, *images, "--schedule", schedule)
    trained(training, folder.parent)
    done("dynamics.follow", *training, "--probes", folder / "probes.parquet", "--checkpoint", TINY,
         "--trained", folder.parent / "checkpoint", "--out", folder / "path/sft.parquet")  # fmt: skip
    done("dynamics.claims", *config, "--dynamics", folder, "--followed", "sft", *judged(chosen, small_inputs),
         "--out", folder / "claims.parquet")  # fmt: skip
    return folder


def judged(chosen, small_inputs) -> tuple:
    """Return the arguments of claims that are about verdicts and training data."""
    scores = small_inputs / "scores.parquet"
    return ("--scores", scores, "--verdicts", chosen[0] / "verdicts.parquet", "--scores-of-base", "sft", scores,
            "--pairs", "sft", chosen[0] / "sft.parquet")  # fmt: skip


def test_the_error_of_a_step_falls_as_its_square(examined):
    claims = pandas.read_parquet(examined / "claims.parquet")
    steps = claims[claims.claim == "step"]
    orders = steps[steps.measure == "order"].set_index("group").value
    assert set(orders.index) == {f"{o}, {k}, {q}" for o in ("dpo", "sft") for k in ("adamw", "sgd") for q in "guj"}
    assert orders.between(1.9, 2.1).all(), orders
    small = steps[(steps.measure == "slope") & steps.group.str.endswith("size 0.25")]
    assert (small.value - 1).abs().max() < 0.1


def test_a_followed_training_is_the_trainers(examined):
    facts = manifests.facts(examined / "path/sft.parquet")["settings"]
    assert facts["distance"] < 1e-3
    path = pandas.read_parquet(examined / "path/sft.parquet")
    assert path.groupby("quantity").size().to_dict() == {"g": 12, "u": 5, "j": 5}
    for quantity, part in path.groupby("quantity"):
        assert np.corrcoef(part.summed, part.measured)[0, 1] > 0.9, quantity
    likelihoods = path[path.quantity == "g"]
    assert likelihoods.measured.mean() == pytest.approx(likelihoods.summed.mean(), rel=0.2)


def changed(chosen, folder, **changes) -> Path:
    """Write the configuration of `chosen` with changes to another folder, and return its path."""
    return write_config(folder, **merged(yaml.safe_load((chosen[0] / "config.yaml").read_text()), changes))


@pytest.mark.slow
def test_a_followed_training_with_another_preference_loss_and_weight_decay_is_the_trainers(chosen, small_inputs, tmp_path):
    train = {"dpo_loss": "ipo", "image_weight": 0.5, "weight_decay": 0.5}
    config, images = ("--config", changed(chosen, tmp_path, train=train, dynamics={"segments": 1})), chosen[1][-2:]
    prompts = ("--prompts", small_inputs / "prompts.parquet")
    pairs, schedule = tmp_path / "reference.parquet", tmp_path / "schedule.parquet"
    done("reference", *config, *prompts, *images, "--pairs", chosen[0] / "dpo.parquet", "--out", pairs)
    done("schedule", *config, "--arm", "dpo", "--epochs", 1, "--pairs", pairs, "--out", schedule)
    training = (*config, "--arm", "dpo", *prompts, *images, "--schedule", schedule)
    trained(training, tmp_path)
    done("dynamics.follow", *training, "--probes", chosen[0] / "probes.parquet", "--checkpoint", TINY,
         "--trained", tmp_path / "checkpoint", "--out", tmp_path / "path.parquet")  # fmt: skip
    assert manifests.facts(tmp_path / "path.parquet")["settings"]["distance"] < 1e-3


def test_a_training_in_bfloat16_is_followed_in_float32_as_the_trainer_does(chosen, small_inputs, tmp_path):
    """In bfloat16 a step at this rate is lost for nineteen weights of twenty, and the rest jump."""
    config = ("--config", changed(chosen, tmp_path, model={"dtype": "bfloat16"}, dynamics={"segments": 1}))
    prompts, images = ("--prompts", small_inputs / "prompts.parquet"), chosen[1][-2:]
    schedule = tmp_path / "schedule.parquet"
    done("schedule", *config, "--arm", "sft", "--epochs", 1, "--pairs", chosen[0] / "sft.parquet", "--out", schedule)
    training = (*config, "--arm", "sft", *prompts, *images, "--schedule", schedule)
    trained(training, tmp_path)
    result = done("dynamics.follow", *training, "--probes", chosen[0] / "probes.parquet", "--checkpoint", TINY,
                  "--trained", tmp_path / "checkpoint", "--out", tmp_path / "path.parquet")  # fmt: skip
    assert manifests.facts(tmp_path / "path.parquet")["settings"]["distance"] < 0.2, result.stdout
    likelihoods = pandas.read_parquet(tmp_path / "path.parquet").query("quantity == 'g'")
    assert np.corrcoef(likelihoods.summed, likelihoods.measured)[0, 1] > 0.99


def test_sketches_give_nearly_the_exact_terms(examined):
    claims = pandas.read_parquet(examined / "claims.parquet")
    found = claims[(claims.claim == "sketch") & (claims.measure == "correlation")]
    assert len(found) == 2
    assert found.value.min() > 0.9


def test_the_page_has_all_claims_and_keeps_what_stands_around_them(examined, tmp_path):
    out = tmp_path / "page.md"
    done("dynamics.page", "--dynamics", examined, "--out", out, "--csv", tmp_path / "page.csv")
    for name in ("steps", "path", "terms", "proxies"):
        assert (tmp_path / f"page-{name}.png").stat().st_size > 10_000
    text = out.read_text()
    claims = set(pandas.read_parquet(examined / "claims.parquet").claim)
    assert claims >= {"step", "path", "gain", "judging", "signs", "category", "judges", "rows", "corrections", "proxies",
                      "kernel", "density", "sketch"}  # fmt: skip
    assert all(f"| {claim} |" in text for claim in claims - {"pair"})
    out.write_text(text.replace("# Learning dynamics", "# Mine\n\nMy own words."))
    done("dynamics.page", "--dynamics", examined, examined, "--facts", "two runs", "--out", out)
    assert out.read_text().startswith("# Mine\n\nMy own words.")
    assert out.read_text().count("### One step") == 1
    assert "two runs" in out.read_text()


def test_what_more_pieces_and_other_arms_have_left_is_not_read(examined, chosen, small_inputs, tmp_path):
    """A run had more pieces, checkpoints and followed arms before its configuration was changed."""
    folder = tmp_path / "run/dynamics"
    shutil.copytree(examined, folder)
    for kind in ("base/terms", "base/values", "embeddings", "sketches"):
        shutil.copy(folder / kind / "0000.parquet", folder / kind / "0002.parquet")
    shutil.copytree(folder / "base", folder / "sft-epoch1")
    shutil.copy(folder / "path/sft.parquet", folder / "path/gone.parquet")
    shutil.copy(folder / "claims.parquet", tmp_path / "claims.parquet")
    done("dynamics.claims", *chosen[1][:2], "--dynamics", folder, "--followed", "sft", *judged(chosen, small_inputs),
         "--out", folder / "claims.parquet")  # fmt: skip
    assert (folder / "claims.parquet").read_bytes() == (tmp_path / "claims.parquet").read_bytes()

    done("dynamics.page", "--dynamics", folder, "--out", folder / "page.md")
    done("dynamics.page", "--dynamics", examined, "--out", tmp_path / "page.md")
    assert "gone" not in (folder / "page.md").read_text()
    for name in ("path", "terms", "proxies"):
        assert (folder / f"page-{name}.png").read_bytes() == (tmp_path / f"page-{name}.png").read_bytes()


def test_without_exact_terms_there_are_similarities_and_densities(examined, chosen, small_inputs, tmp_path):
    """The page of a model that is too large for anything else, and the claims of a folder that has nothing else."""
    folder, arguments = tmp_path / "dynamics", (*chosen[1][:2], *judged(chosen, small_inputs))
    for kind in ("embeddings", "sketches"):
        shutil.copytree(examined / kind, folder / kind)
    for name in ("probes.parquet", "rows.parquet"):
        shutil.copy(examined / name, folder / name)
    done("dynamics.claims", *arguments, "--dynamics", folder, "--proxies", "--out", folder / "proxies.parquet")
    claims = pandas.read_parquet(folder / "proxies.parquet")
    assert set(claims.claim) == {"density", "category", "pair", "rows", "proxies", "corrections"}
    found, exact = (
        {(row.claim, row.group, row.measure): row.value for row in table.itertuples()}
        for table in (claims, pandas.read_parquet(examined / "claims.parquet"))
    )
    sketches = pandas.read_parquet(folder / "sketches").groupby("kind").sketch
    vectors = {kind: np.array(part.to_list(), dtype=float) for kind, part in sketches}
    for objective in ("sft", "dpo"):
        products, group = vectors["probe"] @ vectors[objective].T, f"compressed, {objective}"
        assert found["density", group, "above zero"] == pytest.approx((products > 0).mean())
        assert found["density", group, "quantile 0.5"] == pytest.approx(np.median(products))
        assert 0 <= found["density", group, "beyond_noise"] <= 1
    medians = [of["density", f"{group}, sft", "quantile 0.5"] for of, group in ((found, "compressed"), (exact, "base"))]
    assert medians[0] == pytest.approx(medians[1], rel=0.5)
    place = ("corrections", "sft, model, random", "prompt")
    assert found[place] == pytest.approx(exact[place])

    done("dynamics.page", "--dynamics", folder, "--proxies", "--out", folder / "proxies.md")
    text = (folder / "proxies.md").read_text()
    assert "predicted against measured steps; followed trainings; exact terms" in text
    assert "### Similarity to the nearest training pair" in text
    assert "### One step" not in text
    assert (folder / "proxies-proxies.png").stat().st_size > 10_000
    assert len(list(folder.glob("*.png"))) == 1
    done("dynamics.claims", *arguments, "--dynamics", folder, "--out", folder / "claims.parquet")
    assert set(pandas.read_parquet(folder / "claims.parquet").claim) == {"density", "corrections"}


def test_intervals_over_pairs_of_two_probes_contain_the_truth_as_often_as_they_say():
    """A pair's value is the sum of what its two probes bring, so a probe that is drawn twice counts on both sides."""
    generator, count, trials = np.random.default_rng(0), 60, 300
    probes = [{"candidate_id": f"image {number}", "prompt_id": f"prompt {number}"} for number in range(count)]
    pairs, others, covered = Pairs(probes, probes), ~np.eye(count, dtype=bool), 0
    for _ in range(trials):
        brought = generator.normal(size=count)
        found = interval("category", "kernel", "mean", pairs.mean(brought[:, None] + brought, others), count)
        covered += found.ci_low <= 0 <= found.ci_high
    assert 0.91 <= covered / trials <= 0.98


def test_several_probes_of_a_prompt_do_not_narrow_an_interval(tmp_path):
    """Four probes of each prompt that say the same are as good as one, and the interval is as wide."""
    generator, widths = np.random.default_rng(0), []
    predicted = generator.normal(size=40)
    measured = predicted + generator.normal(size=40)
    step = {"objective": "sft", "optimizer": "sgd", "size": 1.0, "length": 1.0, "quantity": "g"}
    for copies in (1, 4):
        table, probes = [], {}
        for prompt, copy in np.ndindex(40, copies):
            name = f"{prompt}-{copy}"
            probes[name] = {"prompt_id": str(prompt)}
            values = {"predicted": float(predicted[prompt]), "measured": float(measured[prompt])}
            table.append({**step, **values, "candidate_id": name})
        manifests.write(
            tmp_path / "steps.parquet", "dynamics_steps", table, stage="stages.dynamics.steps", settings={}, parents=[]
        )
        found = next(claim for claim in step_claims(tmp_path / "steps.parquet", probes) if claim.measure == "slope")
        widths.append(found.ci_high - found.ci_low)
    assert widths[1] == pytest.approx(widths[0], rel=0.15)  # it was half as wide when probes were resampled


def test_judging_is_counted_by_category(examined):
    claims = pandas.read_parquet(examined / "claims.parquet")
    probes = pandas.read_parquet(examined / "probes.parquet")[: DYNAMICS["probes"]]
    table = claims[claims.claim == "judging"].pivot(index="group", columns="measure", values="value")
    assert set(table.index) == {f"sft, {name}" for name in ["overall", *probes.category]}
    each = table.drop("sft, overall")
    assert np.allclose(table.loc["sft, overall"], each.mean())
    right = probes.assign(agrees=(probes.p_yes > 0.5) == probes.right).groupby("category").agrees.mean()
    assert np.allclose(each.before, 100 * right[[group.split(", ")[1] for group in each.index]])


@pytest.mark.parametrize("target", ["dynamics", "dynamics_proxies"])
def test_a_dry_run_plans_it_and_every_job_can_say_what_it_needs(target, tmp_path):
    """Snakemake evaluates the functions of resources in a dry run only where it prints them: for jobs without a message."""
    source = copy_of_the_project(tmp_path)
    rules = source / "workflow/rules/dynamics.smk"
    rules.write_text(re.sub(r"( +)message:\n +\".*\"\n", "", rules.read_text()))
    write_config(tmp_path / "run")
    output = completed(tmp_path / "run", "-n", "--printshellcmds", target, source=source)
    jobs = re.findall(r"^rule (dynamics_\w+):\n((?: .*\n|\n(?= ))*)", output, re.MULTILINE)
    planned = {name for name, _ in jobs} - {target}
    common = {"dynamics_select", "dynamics_embed", "dynamics_sketch"}
    exact = {f"dynamics_{name}" for name in ("terms", "steps", "follow", "logits", "claims", "page")}
    proxies = {"dynamics_proxy_claims", "dynamics_proxies_page"}
    assert planned == common | (exact if target == "dynamics" else proxies)
    light = {"dynamics_select", "dynamics_claims", "dynamics_page", *proxies}
    for name, text in jobs:
        if name != target:
            wanted = ["mem_mb"] if name in light else ["mem_mb", "runtime"]
            assert all(re.search(rf"resources:.*\b{key}=\d+", text) for key in wanted), text


def test_rules_and_kept_batches_depend_on_how_the_examined_arms_train(tmp_path):
    """Otherwise a page would mix terms of two losses after a change of the configuration."""
    source = copy_of_the_project(tmp_path)
    rules = source / "workflow/rules/dynamics.smk"  # whose commands shall show the parameter
    rules.write_text(
        re.sub(r'("python -m stages\.dynamics\.(terms|steps|sketch|logits))"', r'\1 \"{params.train}\""', rules.read_text())
    )
    shared, arms = {"nll_weight": 0.125, "lora_rank": 3, "lora_alpha": 5}, {"dpo": {"train": {"beta": 0.375}}}
    config = write_config(tmp_path / "run", train=shared, arms=arms)
    output = completed(tmp_path / "run", "-n", "--printshellcmds", "dynamics", source=source)
    commands = dict(re.findall(r"python -m stages\.dynamics\.(terms|steps|sketch|logits) (.*) --config", output))
    trained, minimised = ["'lora_rank': 3", "'lora_alpha': 5", "'trainable': 'llm'"], ["'beta': 0.375", "'nll_weight': 0.125"]
    for name, command in commands.items():
        assert all(text in command for text in trained + (minimised if name != "logits" else [])), (name, command)
    assert set(commands) == {"terms", "steps", "sketch", "logits"}

    loaded, checkpoint = load(config), Path(TINY)
    other = loaded.model_copy(update={"model": loaded.model.model_copy(update={"dtype": "bfloat16"})})
    assert model_facts(other.model, checkpoint) != model_facts(loaded.model, checkpoint)
    assert [of["beta"] for of in training_facts(loaded, [{"arm": "dpo"}])] == [0.1, 0.375]


def test_kept_embeddings_are_known_by_the_files_of_clip(chosen, small_inputs, tmp_path, monkeypatch):
    """Batches that other weights under the same name have embedded are not taken."""
    folder = write_tiny_clip(tmp_path / "clip")
    config, keys = changed(chosen, tmp_path, dynamics={"clip": str(folder)}), []
    monkeypatch.setattr(embed, "write_batches", lambda out, kind, key, *_, **__: keys.append(hash_seed(*key)))
    monkeypatch.setattr(embed, "own_states", lambda *_: None)
    arguments = ("--config", config, "--prompts", small_inputs / "prompts.parquet", *chosen[1][-2:], "--checkpoint", TINY,
                 "--out", tmp_path / "embeddings.parquet")  # fmt: skip
    monkeypatch.setattr("sys.argv", ["embed", *map(str, arguments)])
    embed.main()
    embed.main()
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    embed.main()
    assert keys[0] == keys[1] != keys[2]


def test_the_files_of_clip_are_inputs_of_the_embeddings(tmp_path):
    """So Snakemake notices other weights under the same name, and a wrong folder is named before anything runs."""
    source, folder = copy_of_the_project(tmp_path), write_tiny_clip(tmp_path / "clip")
    rules = source / "workflow/rules/dynamics.smk"  # of a job with a message, a dry run does not show the inputs
    rules.write_text(re.sub(r"( +)message:\n +\".*\"\n", "", rules.read_text()))
    write_config(tmp_path / "run", dynamics={"clip": str(folder)})
    planned = completed(tmp_path / "run", "-n", "dynamics_proxies", source=source)
    inputs = re.findall(r"^rule dynamics_embed:\n +input: (.*)", planned, re.MULTILINE)
    assert len(inputs) == 2
    assert all(f"{folder}/{name}" in line for line in inputs for name in ("model.safetensors", "tokenizer.json"))
    (folder / "model.safetensors").unlink()
    result = snakemake(tmp_path / "run", "-n", "dynamics_proxies", source=source)
    assert result.returncode != 0
    assert f"dynamics.clip: {folder}: no weights" in result.stdout + result.stderr


def test_the_cost_of_sketches_is_said_beforehand(chosen, tmp_path):
    result = done("dynamics.sketch", *chosen[1], "--checkpoint", TINY, "--cost", "--out", tmp_path / "sketch.parquet")
    assert re.search(r"\d+ gradients of \d+ images, at most .* floating-point operations; 853,120 parameters", result.stdout)
    assert not (tmp_path / "sketch.parquet").exists()


def test_an_estimated_likelihood_has_the_terms_of_its_fixed_draws(tmp_path):
    """The toy family is a flow: its likelihood is an estimate that depends on a time and noise drawn from a seed."""
    from stages.families.toy.family import Toy, write_checkpoint

    toy = Toy.load(write_checkpoint(tmp_path))
    view = toy.training_view()
    model = likelihood.Model(toy, describe("toy"), view, Score())
    parameters = gradients.chosen_parameters(view.model, view.groups["llm"])
    assert list(parameters.subsets) == ["first", "last"]
    pixels = [Pictures(images=np.random.default_rng(n).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)) for n in (0, 1)]

    def value(seed: int = 5) -> torch.Tensor:
        return likelihood.under_prompts(model, ["a cat"], pixels[0], seed)[0]

    row = gradients.gradient(-likelihood.sft_losses(model, ["a dog"], pixels[1], np.array([7]))[0], parameters)
    term = float(gradients.gradient(value(), parameters) @ row)
    assert float(gradients.directional(view.model, parameters, value, row)[1]) == pytest.approx(term, rel=1e-9)
    assert float(gradients.gradient(value(6), parameters) @ row) != pytest.approx(term, rel=1e-3)
    errors = []
    for rate in (1e-2, 5e-3):
        before = value().item()
        errors.append(abs(shifted(model, parameters, value, row, rate) - before - rate * term))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[0] < 0.1 * abs(1e-2 * term)


def test_a_subset_that_the_model_does_not_have_is_refused(chosen, tmp_path):
    text = (chosen[0] / "config.yaml").read_text().replace("images: 12", "images: 12\n  parameters: [layers.9]")
    (tmp_path / "config.yaml").write_text(text)
    arguments = ["--config", tmp_path / "config.yaml", *terms_command(chosen, tmp_path)[2:]]
    refused(stage("dynamics.terms", *arguments), "dynamics.parameters", "layers.9", "layers.3")


# --- Show-o: a likelihood that is an estimate under masks --------------------------------------------------------------


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A small random Show-o's folder with a configuration and candidates, two probes and three rows, and their manifests."""
    folder = tmp_path_factory.mktemp("masked")
    checkpoint = folder / "checkpoint"
    tiny_show_o().save(checkpoint)
    arms = {"sft": {"objective": "sft", "epochs": 1}, "dpo": {"objective": "dpo", "epochs": 1}}
    config = write_config(
        folder,
        model={"family": "show_o", "checkpoint": str(checkpoint)},
        prompts={"count": 6},
        generate={"candidates": 2, "sampling": {"guidance_scale": 0.0}},
        train={"learning_rate": 1e-4},
        arms=arms,
        dynamics={"step_sizes": [0.5, 0.25, 0.125]},
    )
    done("prompts", "--config", config, "--set", "train", "--out", folder / "prompts.parquet")
    done("generate", "--config", config, "--prompts", folder / "prompts.parquet",
         "--out", folder / "candidates.parquet", "--images", folder / "candidates.tar")  # fmt: skip
    prompts = {row["prompt_id"]: row for row in manifests.read_rows(folder / "prompts.parquet", "prompts")}
    drawn = manifests.read_rows(folder / "candidates.parquet", "candidates")
    texts = [row["prompt"] for row in prompts.values()]

    def common(row: dict, number: int) -> dict:
        prompt = prompts[row["prompt_id"]]
        return {"prompt_id": row["prompt_id"], "prompt": prompt["prompt"], "category": prompt["category"], "seed": number}

    probes = [
        {"candidate_id": row["candidate_id"], "right": None, "p_yes": None, **common(row, number)}
        for number, row in enumerate(drawn[:2])
    ]
    probes = [probe | {"alternatives": [text for text in texts if text != probe["prompt"]][:2]} for probe in probes]
    pairs = [(drawn[4], None, "sft"), (drawn[6], None, "sft"), (drawn[8], drawn[9], "dpo")]
    rows = [
        {"row_id": str(number), "objective": kind, "arm": kind, "round": 0, "chosen": one["candidate_id"], "right": None,
         "rejected": two and two["candidate_id"], **common(one, 10 + number)}
        for number, (one, two, kind) in enumerate(pairs)
    ]  # fmt: skip
    for kind, items in (("probes", probes), ("rows", rows)):
        manifests.write(folder / f"{kind}.parquet", f"dynamics_{kind}", items, stage="stages.dynamics.select")
    arguments = ("--config", config, "--probes", folder / "probes.parquet", "--rows", folder / "rows.parquet",
                 "--candidates", folder / "candidates.parquet", "--checkpoint", checkpoint)  # fmt: skip
    return folder, arguments, probes, rows


def test_terms_of_a_masked_model_are_finite_differences_under_the_same_masks(masked):
    from stages.common.config import load
    from stages.dynamics.material import open_material

    folder, arguments, probes, rows = masked
    done("dynamics.terms", *arguments, "--out", folder / "terms.parquet", "--values", folder / "values.parquet")
    assert manifests.facts(folder / "terms.parquet")["settings"]["likelihood"] == "estimate"
    terms = pandas.read_parquet(folder / "terms.parquet")
    terms = terms[terms.subset == "all"].set_index(["candidate_id", "row_id"])[["delta_g", "delta_u", "delta_j"]]
    material = open_material(load(folder / "config.yaml"), folder / "checkpoint", probes, rows, [folder / "candidates.parquet"])
    with double(material.model.view.model):
        for row in (rows[0], rows[2]):
            direction = material.descent(row)
            step = 1e-4 / float(direction.norm())
            measured = []
            for size in (step, -step):
                gradients.move(material.parameters, size * direction)
                with torch.no_grad():
                    measured.append(material.values(probes[0]).numpy())
                gradients.move(material.parameters, -size * direction)
            difference = (measured[0] - measured[1]) / (2 * step)
            assert difference == pytest.approx(terms.loc[probes[0]["candidate_id"], row["row_id"]].to_numpy(), rel=1e-4)
            assert np.abs(difference).min() > 0


def test_a_step_of_a_masked_model_does_what_is_predicted(masked):
    folder, arguments, _, _ = masked
    done("dynamics.steps", *arguments, "--out", folder / "steps.parquet")
    steps = pandas.read_parquet(folder / "steps.parquet")
    assert len(steps) == 2 * 2 * 3 * 2 * 3  # objectives, optimizers, sizes, probes, quantities
    squares = steps.assign(square=(steps.measured - steps.predicted) ** 2)
    errors = squares.groupby(["objective", "optimizer", "quantity", "size"]).square.sum().unstack() ** 0.5
    assert ((errors[0.25] / errors[0.125]).between(3, 5)).all(), errors
    small = steps[steps["size"] == 0.125]
    lengths = small.assign(square=small.predicted**2).groupby(["objective", "optimizer", "quantity"]).square.sum() ** 0.5
    assert (errors[0.125] < 0.2 * lengths).all(), errors[0.125] / lengths


def test_a_masked_model_embeds_prompts_and_pictures(masked):
    from stages.common.settings import Model
    from stages.families import open_family

    folder, arguments, _, _ = masked
    prompts = ("--prompts", folder / "prompts.parquet")
    done("dynamics.embed", *arguments[:2], *prompts, *arguments[-4:], "--out", folder / "embeddings.parquet")
    found = pandas.read_parquet(folder / "embeddings.parquet")
    mine = found[found.source == "model"]
    assert len(mine) == 12
    assert mine.groupby("prompt_id").prompt.apply(lambda of: np.ptp(np.stack(of), axis=0).max() < 1e-5).all()
    assert np.allclose([np.linalg.norm(vector) for vector in (*mine.prompt, *mine.image)], 1, atol=1e-5)
    images = np.stack(mine.image.to_list())
    assert (images @ images.T)[np.triu_indices(12, 1)].max() < 1 - 1e-6  # pictures differ

    family = open_family(Model(family="show_o", checkpoint=str(folder / "checkpoint")), None, "train")
    codes, seeds = np.random.default_rng(0).integers(0, 128, (3, 16)), np.array([3, 4, 5])
    texts = ["a red circle", "two squares", "a red square above a blue cross"]
    read, drawn = family.mean_states(texts, Pictures(tokens=codes), seeds)
    # The reference: one row at a time, without pads and without a batch. A prompt is read without any picture.
    for place, text in enumerate(texts):
        ids = family.layout.drawing(text)
        states = family.model.llm.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]  # causal, as text is
        assert np.allclose(read[place], states.detach().mean(0), atol=1e-5)
        arguments, _ = family.masked([""], codes[place : place + 1], family.masks(seeds[place : place + 1])[:, 0])
        seen = family.model.attention_mask(arguments["seen"], torch.float32)
        inputs = family.model.embedded(arguments["ids"])
        states = family.model.llm.model(inputs_embeds=inputs, attention_mask=seen, use_cache=False).last_hidden_state[0]
        first = len(family.layout.drawing("")) + 1  # after the token of the picture's begin
        assert np.allclose(drawn[place], states[first : first + 16].detach().mean(0), atol=1e-5)
    assert np.array_equal(family.mean_states(["another"] * 3, Pictures(tokens=codes), seeds)[1], drawn)
    assert not np.allclose(family.mean_states(texts, Pictures(tokens=codes), seeds + 7)[1], drawn)
