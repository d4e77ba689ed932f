"""The decoding engine: the same logits as transformers without a cache, whatever the batch, and a batch that fits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.common.errors import UserError
from stages.families.janus.family import Janus
from stages.families.tools.linears import packed_linears
from stages.families.tools.memory import Memory
from tests.helpers import TINY
from tests.test_janus import head_outputs, sampling, seeds

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
        drawn = family.generate(MIXED, seeds(len(MIXED)), sampling(guidance_scale))

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
        tiny.generate(MIXED * 4, seeds(4 * len(MIXED)), sampling(5.0))
    finally:
        hook.remove()
    lengths = [tiny.bucket(prompt) for prompt in set(MIXED)]
    assert sorted(prefixes) == sorted((lengths.count(length) + 1, length) for length in set(lengths))


class Small(Memory):
    """A device on which at most `most_images` fit when they are drawn, as torch would say it."""

    def __init__(self, most_images: int) -> None:
        super().__init__(torch.device("cpu"), weights=0)
        self.most_images = most_images
        self.tried: list[int] = []

    def pieces(self, task, count, at_once, work):
        def limited(part: slice):
            size = part.stop - part.start
            if task == "drawing":
                self.tried.append(size)
                if size > self.most_images:
                    raise torch.OutOfMemoryError("out of memory")
            return work(part)

        return super().pieces(task, count, at_once, limited)


def test_a_batch_that_does_not_fit_is_split_and_draws_the_same(tiny, monkeypatch, capsys):
    texts, many = MIXED * 4, seeds(4 * len(MIXED))
    whole = tiny.generate(texts, many, sampling(5.0))
    memory = Small(6)
    monkeypatch.setattr(tiny, "memory", memory)
    split = tiny.generate(texts, many, sampling(5.0))
    assert (split.tokens == whole.tokens).all()
    assert memory.tried == [20, 10, 5, 5, 5, 5]
    assert "drawing 20 images at once did not fit on cpu; going on with at most 10" in capsys.readouterr().err
    memory.tried.clear()
    tiny.generate(texts, many, sampling(5.0))
    assert memory.tried == [5, 5, 5, 5]


def test_one_image_that_does_not_fit_is_an_error_with_a_remedy(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "memory", Small(0))
    with pytest.raises(UserError, match="out of memory while drawing one image"):
        tiny.generate(MIXED, seeds(len(MIXED)), sampling(5.0))


@pytest.mark.parametrize(("count", "at_once", "sizes"), [(200, 92, [67, 67, 66]), (7, 3, [3, 2, 2]), (5, 9, [5]), (0, 9, [])])
def test_pieces_are_few_and_even(count, at_once, sizes):
    found = Memory(torch.device("cpu"), weights=0).pieces("drawing", count, at_once, lambda part: range(count)[part])
    assert [len(part) for part in found] == sizes
    assert [i for part in found for i in part] == list(range(count))


def test_pieces_follow_the_class_of_a_gpu_and_not_its_free_memory(monkeypatch):
    """Janus-Pro-7B in bfloat16 on two cards of 80 GB, one of them half full: 200 guided images are three even pieces."""

    def fit(total: float, free: float) -> int:
        device = SimpleNamespace(total_memory=int(total * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free * 2**30), device.total_memory))
        return Memory(torch.device("cuda"), weights=14_800_000_000).fit(597_000_000)

    assert fit(79.1, 78) == fit(79.6, 40) == 89
    assert fit(140, 140) > 89
    assert fit(12, 12) == 1


def test_a_decoder_that_runs_out_of_memory_costs_no_sampling(tiny, monkeypatch, capsys):
    whole = tiny.generate(MIXED, seeds(len(MIXED)), sampling(5.0))
    decoded, sampled = [], []

    def decode(tokens, right=tiny.model.decode_image_tokens):
        decoded.append(len(tokens))
        if len(tokens) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return right(tokens)

    def sample(ids, *arguments, right=tiny._sample):
        sampled.append(len(ids))
        return right(ids, *arguments)

    monkeypatch.setattr(tiny.model, "decode_image_tokens", decode)
    monkeypatch.setattr(tiny, "_sample", sample)
    monkeypatch.setattr(tiny, "memory", Memory(tiny.device, weights=0))
    split = tiny.generate(MIXED, seeds(len(MIXED)), sampling(5.0))
    assert (sampled, decoded) == ([5], [5, 2, 2, 1])
    assert (split.tokens == whole.tokens).all()
    assert np.abs(split.images.astype(int) - whole.images).max() <= 1  # convolutions round by the size of a piece, too
    assert "decoding 5 images at once did not fit" in capsys.readouterr().err


def test_pixels_are_truncated_as_upstream_does(tiny, monkeypatch):
    levels = torch.tensor([-1.2, -1.0, 0.0, 0.0031, 0.998, 1.0, 1.2])  # 0.998 is level 254.745
    monkeypatch.setattr(tiny.model, "decode_image_tokens", lambda tokens: levels.expand(1, 2, 7)[..., None].expand(1, 2, 7, 3))
    pictures = tiny._decode(torch.zeros(1, tiny.image_length, dtype=torch.long))
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 127, 127, 254, 255, 255]


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


@pytest.mark.parametrize("name", ["_linear_pointwise", "_reorder_linear_weight"])
@pytest.mark.parametrize("changed", [None, lambda: None], ids=["missing", "changed"])
def test_linears_stay_plain_where_torch_lacks_or_changed_an_operator(name, changed, monkeypatch):
    operators = SimpleNamespace(
        _linear_pointwise=torch.ops.mkldnn._linear_pointwise, _reorder_linear_weight=torch.ops.mkldnn._reorder_linear_weight
    )
    if changed is None:
        delattr(operators, name)
    else:
        setattr(operators, name, changed)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    layer, inputs = torch.nn.Linear(48, 33), torch.randn(7, 48)
    with torch.no_grad():
        expected = layer(inputs)
        with packed_linears(layer):
            assert "forward" not in vars(layer)
            assert torch.equal(layer(inputs), expected)
