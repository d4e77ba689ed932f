"""The decoding engine: the same logits as transformers without a cache, whatever the batch, and a batch that fits."""

import numpy as np
import pytest
import torch

from stages.families.base import Sampling
from stages.families.janus.family import Janus
from stages.families.tools.linears import packed_linears
from stages.families.tools.memory import Memory
from tests.conftest import TINY
from tests.test_janus import head_outputs, seeds

MIXED = ["a cross", "two red circles", "a striped red circle left of a green square", "a cross", "a diamond and a cross"]


def uncached(model, ids: list[int], codes: np.ndarray) -> torch.Tensor:
    """Logits `[t, codes]` of one row from transformers' own modules, in one forward over prompt and image."""
    embeddings = torch.cat(
        [
            model.get_input_embeddings()(torch.tensor(ids)),
            model.prepare_embeddings_for_image_generation(torch.from_numpy(codes[:-1])),
        ]
    )
    with torch.no_grad():
        hidden = model.model.language_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]
        return model.model.generation_head(hidden[len(ids) - 1 :])


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_logits_equal_an_uncached_forward_for_mixed_prompt_lengths(guidance_scale, dtype, tolerance):
    family = Janus.load(TINY, dtype=dtype)
    assert len({family.bucket(prompt) for prompt in MIXED}) > 2
    drawn = None

    def draw():
        nonlocal drawn
        drawn = family.generate(MIXED, seeds(len(MIXED)), Sampling(guidance_scale))

    steps = torch.stack(head_outputs(family.model, draw), 1)  # [rows, t, codes]
    rows = 1 if guidance_scale == 1.0 else 2
    assert len(steps) == rows * len(MIXED)
    for i, prompt in enumerate(MIXED):
        ids = family._prompt_ids(prompt)
        wanted = [ids, [ids[0], *[family.pad] * (len(ids) - 2), ids[-1]]][:rows]
        for side, row in enumerate(wanted):
            reference = uncached(family.model, row, drawn.tokens[i])
            scale = reference.float().abs().max().item() if dtype == "bfloat16" else 1.0
            difference = (steps[rows * i + side].float() - reference.float()).abs().max().item()
            assert difference < tolerance * max(1.0, scale / 10)


def test_each_prompt_runs_once_and_the_unconditional_one_once_a_length(tiny):
    prefixes = []
    hook = tiny.model.model.language_model.register_forward_hook(
        lambda module, arguments, keywords, out: prefixes.append(keywords["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    try:
        tiny.generate(MIXED * 4, seeds(4 * len(MIXED)), Sampling(5.0))
    finally:
        hook.remove()
    lengths = [tiny.bucket(prompt) for prompt in set(MIXED)]
    assert sorted(prefixes) == sorted((lengths.count(length) + 1, length) for length in set(lengths))


class Small(Memory):
    """A device on which at most `most_images` fit, as torch would say it."""

    def __init__(self, most_images: int) -> None:
        super().__init__(torch.device("cpu"))
        self.most_images = most_images
        self.tried: list[int] = []

    def pieces(self, count, bytes_each, work):
        def limited(part: slice):
            size = part.stop - part.start
            self.tried.append(size)
            if size > self.most_images:
                raise torch.OutOfMemoryError("out of memory")
            return work(part)

        return super().pieces(count, bytes_each, limited)


def test_a_batch_that_does_not_fit_is_split_and_draws_the_same(tiny, monkeypatch, capsys):
    texts, many = MIXED * 4, seeds(4 * len(MIXED))
    whole = tiny.generate(texts, many, Sampling(5.0))
    memory = Small(6)
    monkeypatch.setattr(tiny, "memory", memory)
    split = tiny.generate(texts, many, Sampling(5.0))
    assert (split.tokens == whole.tokens).all()
    assert memory.tried == [20, 10, 5, 5, 5, 5]
    assert "20 images at once did not fit on cpu; going on with 10" in capsys.readouterr().err
    memory.tried.clear()
    tiny.generate(texts, many, Sampling(5.0))
    assert memory.tried == [5, 5, 5, 5]


def test_one_image_that_does_not_fit_is_an_error_with_a_remedy(tiny, monkeypatch):
    from stages.common.runtime import UserError

    monkeypatch.setattr(tiny, "memory", Small(0))
    with pytest.raises(UserError, match="out of memory with one image"):
        tiny.generate(MIXED, seeds(len(MIXED)), Sampling(5.0))


def test_pixels_on_the_device_are_the_processors(tiny):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    reference = tiny.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(tiny._pixels(images), reference, rtol=0, atol=1e-6)


def test_pictures_of_another_size_go_through_the_processor(tiny):
    images = np.full((2, 48, 80, 3), 200, dtype=np.uint8)
    assert tiny._pixels(images).shape == (2, 3, 64, 64)


def test_packed_linears_compute_the_same_and_only_inside():
    layers = torch.nn.Sequential(torch.nn.Linear(48, 33), torch.nn.Linear(33, 5, bias=False))
    inputs = torch.randn(2, 7, 96)[..., ::2]
    with torch.no_grad():
        expected = layers(inputs)
        with packed_linears(layers):
            if torch.backends.mkldnn.is_available():
                assert all("forward" in vars(layer) for layer in layers)
            torch.testing.assert_close(layers(inputs), expected, rtol=0, atol=1e-6)
    assert not any("forward" in vars(layer) for layer in layers)
