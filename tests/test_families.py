"""The requirements on every model family in each of its roles. A new family adds a case here and must pass all tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from stages.common import manifests, shards
from stages.common.candidates import Candidates, representation, sampling_text
from stages.common.errors import UserError
from stages.common.settings import Model
from stages.families import FAMILIES, checkpoint_hash, describe, open_family, preprocessing_hash
from stages.families.base import Drawn
from tests.helpers import ROOT, TINY, done, losses, outputs, refused, stage, trained, write_config
from tests.tiny_show_o import write_tiny_show_o

PROMPTS = ["a cross", "two red circles", "a striped red circle left of a green square", "a cross and a diamond"] * 2


@dataclass
class Case:
    """A family under test.

    checkpoint: where its weights are, or a function that writes random ones to a folder and returns it. neutral: a sampling
    setting at which guidance changes nothing. changes: settings that make training and selection do something in a few steps.
    quick: sampling settings that save time.
    """

    checkpoint: Path | Callable[[Path], Path]
    neutral: dict = field(default_factory=dict)
    changes: dict = field(default_factory=dict)
    quick: dict = field(default_factory=dict)


def write_toy(folder: Path) -> Path:
    from stages.families.toy.family import write_checkpoint

    return write_checkpoint(folder)


CASES = {
    "janus": Case(TINY, {"guidance_scale": 1.0}),
    "show_o": Case(write_tiny_show_o, {"guidance_scale": 0.0}, {"train": {"learning_rate": 1e-3}}, {"steps": 5}),
    "toy": Case(write_toy, {"guidance_scale": 1.0}, {"train": {"learning_rate": 1e-3}}),
}


def test_every_registered_family_has_a_case():
    assert set(CASES) == set(FAMILIES)


@pytest.fixture(scope="module", params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name, tmp_path_factory) -> Path:
    place = CASES[name].checkpoint
    return place if isinstance(place, Path) else place(tmp_path_factory.mktemp(name) / "checkpoint")


@pytest.fixture(scope="module")
def family(name, checkpoint):
    torch.set_num_threads(1)
    return open_family(Model(family=name, checkpoint=str(checkpoint)), None, "train")


@pytest.fixture(scope="module")
def sampling(name):
    return describe(name).sampling(**CASES[name].quick)


def seeds(count: int) -> np.ndarray:
    return np.arange(1000, 1000 + count)


@pytest.fixture(scope="module")
def drawn(family, sampling) -> Drawn:
    return family.generate(PROMPTS, seeds(len(PROMPTS)), sampling)


def stored(drawn: Drawn, folder: Path, name: str, checkpoint: Path, sampling) -> Candidates:
    """Write drawn candidates as stages.generate does, and read them back."""
    rows = []
    with (folder / "c.tar").open("wb") as tar:
        for place, image in enumerate(drawn.images):
            offset, size = shards.append(tar, f"c{place}", shards.png(image))
            rows.append(
                {"candidate_id": f"c{place}", "prompt_id": "p", "round": 0, "index": place, "seed": place}
                | {"shard": "c.tar", "offset": offset, "nbytes": size, "width": image.shape[1], "height": image.shape[0]}
                | {"checkpoint": checkpoint_hash(name, checkpoint, "draw"), "sampling": sampling_text(sampling)}
                | representation(drawn, place)
            )
        shards.finish(tar)
    manifests.write(folder / "c.parquet", "candidates", rows, stage="stages.generate")
    return Candidates([folder / "c.parquet"], {row["candidate_id"] for row in rows}, describe(name))


def same(first: Drawn, second: Drawn) -> bool:
    """Return whether candidates are equal: representations exactly, pixels up to one of 255 levels."""
    for kind in ("tokens", "latents"):
        one, other = getattr(first, kind), getattr(second, kind)
        if one is not None and not np.array_equal(one, other):
            return False
    return bool(np.abs(first.images.astype(int) - second.images).max() <= 1)


def joined(parts: list[Drawn]) -> Drawn:
    """Return several drawn batches as one."""
    kinds = [kind for kind in ("images", "tokens", "latents") if getattr(parts[0], kind) is not None]
    return Drawn(**{kind: np.concatenate([getattr(part, kind) for part in parts]) for kind in kinds})


def test_a_candidate_depends_on_its_seed_and_not_on_its_batch(family, sampling, drawn):
    alone = [family.generate([prompt], seeds(len(PROMPTS))[i : i + 1], sampling) for i, prompt in enumerate(PROMPTS)]
    assert same(joined(alone), drawn)
    backwards = range(len(PROMPTS))[::-1]
    other_order = family.generate([PROMPTS[i] for i in backwards], seeds(len(PROMPTS))[::-1], sampling)
    assert same(joined([other_order]), joined([drawn_at(drawn, i) for i in backwards]))


def drawn_at(drawn: Drawn, place: int) -> Drawn:
    kinds = [kind for kind in ("images", "tokens", "latents") if getattr(drawn, kind) is not None]
    return Drawn(**{kind: getattr(drawn, kind)[place : place + 1] for kind in kinds})


def test_other_seeds_give_other_candidates(family, sampling, drawn):
    other = family.generate(PROMPTS, seeds(2 * len(PROMPTS))[len(PROMPTS) :], sampling)
    assert not same(other, drawn)


def test_images_are_rgb_bytes(drawn):
    assert drawn.images.dtype == np.uint8
    assert drawn.images.shape[0] == len(PROMPTS)
    assert drawn.images.shape[3] == 3


def test_guidance_changes_nothing_at_its_neutral_value(name, family):
    for key, value in CASES[name].neutral.items():
        exactly, nearly = (describe(name).sampling(**CASES[name].quick | {key: number}) for number in (value, value + 1e-9))
        first, second = (family.generate(PROMPTS, seeds(len(PROMPTS)), chosen) for chosen in (exactly, nearly))
        assert same(first, second)
        strong = family.generate(PROMPTS, seeds(len(PROMPTS)), describe(name).sampling(**CASES[name].quick | {key: value + 4}))
        assert not same(first, strong)


def test_unknown_and_wrong_sampling_settings_are_named(name, checkpoint, tmp_path):
    for sampling, word in (
        ({"no_such_setting": 1}, "no_such_setting"),
        (dict.fromkeys(CASES[name].neutral, "much"), "valid number"),
    ):
        model = {"family": name, "checkpoint": str(checkpoint)}
        config = with_sampling(write_config(tmp_path, model=model), sampling)
        result = stage("prompts", "--config", config, "--set", "train", "--out", tmp_path / "p.parquet")
        refused(result, f"generate.sampling.{next(iter(sampling))}", word)


def test_p_yes_of_a_batch_is_that_of_each_image(family, drawn):
    questions = [f"does this image show {prompt} ?" for prompt in PROMPTS]
    together, neither = family.p_yes(drawn.images, questions)
    alone = [family.p_yes(drawn.images[i : i + 1], [question])[0][0] for i, question in enumerate(questions)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert ((together >= 0) & (together <= 1) & (neither >= 0) & (neither <= 1)).all()


def test_answers_are_texts(family, drawn):
    answers = family.answer(drawn.images[:2], ["does this image show a cross ?"] * 2, 4)
    assert [type(answer) for answer in answers] == [str, str]


def test_the_likelihood_of_stored_candidates_is_that_of_fresh_ones(name, family, drawn, checkpoint, sampling, tmp_path):
    candidates = stored(drawn, tmp_path, name, checkpoint, sampling)
    names = [f"c{place}" for place in range(len(PROMPTS))]
    again = family.log_likelihood(PROMPTS, candidates.pictures(names), seeds(len(PROMPTS)))
    assert again.shape == (len(PROMPTS),)
    one_by_one = [
        family.log_likelihood([prompt], candidates.pictures([names[i]]), seeds(len(PROMPTS))[i : i + 1])[0]
        for i, prompt in enumerate(PROMPTS)
    ]
    np.testing.assert_allclose(again, one_by_one, rtol=1e-5, atol=1e-3)
    if drawn.log_probabilities is not None:
        assert describe(name).likelihood == "exact"
        np.testing.assert_allclose(drawn.log_probabilities, again, rtol=1e-4, atol=1e-3)


def test_an_exact_likelihood_ignores_seeds_and_an_estimate_does_not(name, family, drawn, checkpoint, sampling, tmp_path):
    candidates = stored(drawn, tmp_path, name, checkpoint, sampling)
    pictures = candidates.pictures([f"c{place}" for place in range(len(PROMPTS))])
    first, second = (family.log_likelihood(PROMPTS, pictures, seeds(len(PROMPTS)) + shift) for shift in (0, 77))
    assert np.array_equal(first, second) == (describe(name).likelihood == "exact")


def test_row_losses_are_the_likelihood_for_the_same_draws(name, family, drawn, checkpoint, sampling, tmp_path):
    view = family.training_view()
    assert (view.losses is None) != (view.token_rows is None)
    if view.losses is None:
        return  # TRL computes the loss; tests/test_training.py compares it with the likelihood
    pictures = stored(drawn, tmp_path, name, checkpoint, sampling).pictures([f"c{place}" for place in range(len(PROMPTS))])
    found = view.losses(view.model, PROMPTS, pictures, seeds(len(PROMPTS)))
    np.testing.assert_allclose(
        -found.preference.detach(), family.log_likelihood(PROMPTS, pictures, seeds(len(PROMPTS))), rtol=1e-6
    )
    assert found.sft.requires_grad


def test_a_row_without_a_prompt_is_one_that_no_prompt_changes(name, family, drawn, checkpoint, sampling, tmp_path):
    view = family.training_view()
    pictures = stored(drawn, tmp_path, name, checkpoint, sampling).pictures([f"c{place}" for place in range(len(PROMPTS))])
    if view.token_rows:
        rows = [prompt for prompt, _ in view.token_rows.ids(PROMPTS, pictures)]
        bare = [view.token_rows.unconditional(row) for row in rows]
        assert all(row != prompt for row, prompt in zip(bare, rows, strict=True))
        assert len({tuple(row) for row in bare}) == len({len(row) for row in rows})
    else:
        losses = [
            view.losses(view.model, prompts, pictures, seeds(len(PROMPTS))).sft for prompts in ([""] * len(PROMPTS), PROMPTS)
        ]
        assert losses[0].isfinite().all()
        assert not torch.allclose(*losses)


def test_save_then_load_is_the_same_model(name, family, drawn, sampling, tmp_path):
    family.save(tmp_path / "copy")
    assert (tmp_path / "copy" / describe(name).trained_file).is_file()
    copy = open_family(Model(family=name, checkpoint=str(tmp_path / "copy")), None, "draw")
    assert same(copy.generate(PROMPTS, seeds(len(PROMPTS)), sampling), drawn)


def test_the_identity_of_a_checkpoint_follows_its_weights_and_not_its_place(name, family, tmp_path):
    for folder in ("a", "b"):
        family.save(tmp_path / folder)
    identities = [checkpoint_hash(name, tmp_path / folder, "draw") for folder in ("a", "b")]
    assert identities[0] == identities[1]
    path = tmp_path / "b" / describe(name).trained_file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert checkpoint_hash(name, tmp_path / "b", "draw") != identities[0]


def test_the_hash_of_the_preprocessing_follows_the_tokenizer_and_not_the_weights(name, family, tmp_path):
    family.save(tmp_path)
    before = preprocessing_hash(tmp_path)
    (tmp_path / describe(name).trained_file).write_bytes(b"")
    assert preprocessing_hash(tmp_path) == before
    for path in tmp_path.glob("*token*.json"):
        path.write_text(path.read_text() + " ")
        assert preprocessing_hash(tmp_path) != before


# Training, through the stages


@pytest.fixture(scope="module")
def inputs(name, checkpoint, tmp_path_factory) -> Path:
    """Prompts, candidates and scores that this family has drawn and judged."""
    folder = tmp_path_factory.mktemp("inputs")
    config = small_config(folder, name, checkpoint)
    done("prompts", "--config", config, "--set", "train", "--out", folder / "prompts.parquet")
    common = ("--config", config, "--prompts", folder / "prompts.parquet")
    done("generate", *common, "--out", folder / "candidates.parquet", "--images", folder / "candidates.tar")
    done("score", *common, "--candidates", folder / "candidates.parquet", "--out", folder / "scores.parquet")
    return folder


def small_config(folder: Path, name: str, checkpoint: Path, epochs: int = 2, **changes) -> Path:
    arms = {objective: {"objective": objective, "epochs": epochs} for objective in ("sft", "dpo")}
    # Half of the candidates are accepted and half rejected, regardless of what the randomly initialised judge says.
    settings = {"model": {"family": name, "checkpoint": str(checkpoint)}, "arms": arms}
    settings |= {"pairs": {"accept_threshold": 0.5, "reject_threshold": 0.5, "minimum_margin": 0.0}}
    return with_sampling(
        write_config(folder, **settings, **(CASES[name].changes | changes)), CASES[name].quick | CASES[name].neutral
    )


def with_sampling(config: Path, sampling: dict) -> Path:
    """Give a configuration other sampling settings; they replace those of the small configuration, which are Janus's."""
    fields = yaml.safe_load(config.read_text())
    fields["generate"]["sampling"] = sampling
    config.write_text(yaml.safe_dump(fields, sort_keys=False))
    return config


def scheduled(folder: Path, inputs: Path, name: str, checkpoint: Path, objective: str, epochs: int) -> tuple:
    """Write pairs, reference and schedule, and return the arguments of stages.train."""
    config = small_config(folder, name, checkpoint, epochs)
    files = ("--candidates", inputs / "candidates.parquet")
    pairs, reference, schedule = (folder / f"{step}.parquet" for step in ("pairs", "reference", "schedule"))
    done("pairs", "--config", config, "--arm", objective, *files, "--scores", inputs / "scores.parquet", "--out", pairs,
         "--discard", folder / "discard.parquet")  # fmt: skip
    prompts = ("--prompts", inputs / "prompts.parquet")
    if objective == "dpo":
        done("reference", "--config", config, *prompts, "--pairs", pairs, *files, "--epochs", epochs, "--out", reference)
        pairs = reference
    done("schedule", "--config", config, "--arm", objective, "--epochs", epochs, "--pairs", pairs, "--out", schedule)
    return ("--config", config, "--arm", objective, *prompts, *files, "--schedule", schedule)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_training_lowers_the_loss_moves_only_what_it_may_and_continues_exactly(objective, name, checkpoint, inputs, tmp_path):
    shorter, longer, continued = (tmp_path / folder for folder in ("shorter", "longer", "continued"))
    trained(scheduled(longer, inputs, name, checkpoint, objective, 12), longer)
    metrics = losses(longer)
    half = len(metrics["loss"]) // 2  # a step's loss can be an estimate
    assert np.mean(metrics["loss"][half:]) < np.mean(metrics["loss"][:half])
    if objective == "dpo":
        nll_weight = 1.0
        assert metrics["loss"][0] - nll_weight * metrics["nll"][0] == pytest.approx(np.log(2), abs=1e-4)

    trained(scheduled(shorter, inputs, name, checkpoint, objective, 6), shorter)
    arguments = scheduled(continued, inputs, name, checkpoint, objective, 12)
    assert "from checkpoint-" in trained(arguments, continued, "--continue", shorter / "work")
    weights = describe(name).trained_file
    assert (continued / "checkpoint" / weights).read_bytes() == (longer / "checkpoint" / weights).read_bytes()
    assert (continued / "training.parquet").read_bytes() == (longer / "training.parquet").read_bytes()

    before = open_family(Model(family=name, checkpoint=str(checkpoint)), None, "train").training_view()
    after = open_family(Model(family=name, checkpoint=str(longer / "checkpoint")), None, "train").training_view()
    prefixes = before.groups["llm"]
    pairs = zip(before.model.named_parameters(), after.model.parameters(), strict=True)
    moved = {key for (key, old), new in pairs if not torch.equal(old, new)}
    assert moved
    assert all(key.startswith(prefixes) for key in moved)
    assert outputs(longer)


@pytest.mark.parametrize("word", ["yes", "no"])
@pytest.mark.parametrize(("name", "folder"), [("janus", "tiny-janus"), ("show_o", "tiny-show-o")])
def test_a_tokenizer_without_a_token_for_yes_or_no_is_refused(name, folder, word, monkeypatch):
    """Only where probabilities are read: drawing and answering in words need none."""
    checkpoint = ROOT / "models" / folder
    family = open_family(Model(family=name, checkpoint=str(checkpoint), device="cpu"), checkpoint, "train")
    monkeypatch.setattr(family, word, torch.tensor([]))
    images, questions = np.zeros((1, 64, 64, 3), np.uint8), ["does this image show a red circle ?"]
    with pytest.raises(UserError, match=r"no single token for yes or for no; set score.mode of this model to answer"):
        family.p_yes(images, questions)
    with pytest.raises(UserError, match=r"train.judge_anchor_weight to 0"):
        family.judge_loss(family.model, images, questions, np.array([0.5]))
