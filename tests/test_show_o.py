"""Show-o: its vocabulary and sequences, what sees what, drawing, judging, losses, and the conversion from upstream's files."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from stages.common.errors import UserError
from stages.common.seeds import uniforms
from stages.families.base import Pictures
from stages.families.show_o import SHOW_O, ShowOSampling, decode
from stages.families.show_o import convert as show_o_convert
from stages.families.show_o.family import ShowO
from stages.families.show_o.layout import SYSTEM, Layout, add_special_tokens
from stages.families.show_o.magvit import Geometry, Magvit
from stages.families.show_o.model import ShowOConfig, ShowOModel, seen_asking, seen_drawing
from stages.families.tools.pictures import square
from stages.shapes.tiny_show_o import VQ, text_tokenizer
from tests.tiny_show_o import tiny_show_o

PROMPTS = ["a cross", "two red circles", "a striped red circle left of a green square", ""]
QUESTION = "does this image show a cross ?"


@pytest.fixture(scope="module")
def family() -> ShowO:
    torch.set_num_threads(1)
    return tiny_show_o()


@pytest.fixture(scope="module")
def seeing() -> ShowO:
    """One that sees pictures through a CLIP tower."""
    return tiny_show_o(vision=True)


def seeds(count: int) -> np.ndarray:
    return np.arange(100, 100 + count)


# --- vocabulary and sequences ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi() -> Layout:
    """The layout of a tokenizer with the ids of microsoft/phi-1_5: 50,257 of text, then 38 of white space."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([f"Yes No yes no {SYSTEM} USER: ASSISTANT:"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(f"filler {i}") for i in range(50256 - tokenizer.get_vocab_size())])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    tokenizer.add_tokens([AddedToken(" " * width, normalized=False) for width in range(31, 1, -1)])
    tokenizer.add_tokens([AddedToken("\t" * width, normalized=False) for width in range(9, 1, -1)])
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)
    add_special_tokens(fast)
    return Layout(fast, 8192, 128)


def test_ids_are_upstreams_with_the_pad_first(phi):
    assert (phi.text_end, phi.pad, phi.begin, phi.end) == (50256, 50295, 50296, 50297)
    names = ("<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
    assert phi.tokenizer.convert_tokens_to_ids(list(names)) == list(range(50298, 50305))
    assert (phi.offset, phi.mask, phi.vocabulary) == (50305, 58497, 58498)


def test_a_prompt_is_task_start_text_end(phi):
    text = phi.text("a red circle")
    assert phi.drawing("a red circle") == [50300, 50256, *text, 50256]
    assert phi.drawing("") == [50300, 50256, 50256]
    assert phi.drawing("<|endoftext|>a red circle") == phi.drawing("a red circle")


def test_a_long_prompt_is_cut_and_still_ends(phi):
    words = " ".join(["red"] * 300)
    whole = [50300, 50256, *phi.text(words)]
    assert phi.drawing(words) == [*whole[:128], 50256]
    longest = phi.tokenizer.decode(phi.text(words)[:126])
    assert len(phi.text(longest)) == 126
    assert phi.drawing(longest) == [50300, 50256, *phi.text(longest), 50256]  # 129 fit, with the task token


def test_questions_are_upstreams(phi):
    asked = phi.asking([0, 8191], "is it red?")
    assert asked == [50301, 50296, 50305, 58496, 50297, 50256, *phi.text("USER: \nis it red? ASSISTANT:")]
    asked, at = phi.asking_tower("is it red?", " Yes")
    system = phi.text(SYSTEM)
    assert asked == [50301, *system, 50296, 50297, *phi.text("USER: is it red? ASSISTANT: Yes")]
    assert at == 2 + len(system)


def test_another_models_tokenizer_is_refused(family):
    with pytest.raises(UserError, match="does not end with"):
        Layout(text_tokenizer(), 128, 32)
    shuffled = text_tokenizer()
    shuffled.add_tokens(["<|soi|>"])
    add_special_tokens(shuffled)  # the pad is no longer the first
    with pytest.raises(UserError, match="upstream's order"):
        Layout(shuffled, 128, 32)
    with pytest.raises(UserError, match="image codes and the mask make"):
        ShowO(family.model, Magvit(Geometry(**vars(VQ) | {"bits": 8})), family.tokenizer)


def test_the_default_question_is_the_papers_and_verdicts_are_first_tokens(family):
    assert "Does this original image describe {prompt}?" in SHOW_O.question
    assert SHOW_O.answer_prefix == ""
    tokens = family.tokenizer.convert_ids_to_tokens
    assert set(tokens(family.yes.tolist())) == {"1", "yes"}
    assert set(tokens(family.no.tolist())) == {"0", "no"}


# --- what sees what --------------------------------------------------------------------------------------------------


def test_text_never_sees_the_picture_and_pads_are_seen_by_nothing():
    seen = seen_drawing(torch.tensor([0, 2]), 7, 3)  # four places of text, three of the picture
    assert seen[0].int().tolist() == [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0],
                                      [1, 1, 1, 1, 0, 0, 0], *[[1] * 7] * 3]  # fmt: skip
    assert seen[1].int().tolist() == [[1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0],
                                      [0, 0, 1, 1, 0, 0, 0], *[[0, 0, 1, 1, 1, 1, 1]] * 3]  # fmt: skip


def test_a_picture_never_sees_its_question():
    assert seen_asking(5, 1, 3, torch.device("cpu")).int().tolist() == [
        [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]  # fmt: skip


@pytest.mark.parametrize("through", ["codes", "tower"])
def test_what_is_asked_does_not_change_how_the_picture_is_read(through, family, seeing):
    model = {"codes": family, "tower": seeing}[through]
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    states = []
    for question in (QUESTION, "does this image show two red circles ?"):
        asked = model._asked(images, [question])
        column = torch.tensor([asked["columns"].item() - len(model.layout.text(f"USER: {question} ASSISTANT:"))])
        states.append(model._hidden(asked | {"columns": column}))  # the last token before the question
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("through", ["codes", "tower"])
def test_the_layers_of_drawing_compute_what_transformers_does(implementation, through, family, seeing):
    """Phi's eager attention adds its mask to the scores, so that a boolean one would be wrong without an error."""
    model = {"codes": family, "tower": seeing}[through]
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    asked = model._asked(images, [QUESTION, "where is the star ?"])
    model.model.llm.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            logits = model.model(**asked)
    finally:
        model.model.llm.set_attn_implementation("sdpa")
    torch.testing.assert_close(model.model.llm.lm_head(model._hidden(asked)), logits, rtol=0, atol=1e-4)


# --- codes -----------------------------------------------------------------------------------------------------------


def test_the_first_channel_is_the_highest_bit_and_zero_is_not_set():
    vq = Magvit(Geometry(**vars(VQ) | {"bits": 13}))
    latents = torch.full((1, 13, 1, 2), -0.5)
    latents[0, 0, 0, 0], latents[0, 12, 0, 0], latents[0, 5, 0, 1] = 2.0, 0.1, 0.0
    assert vq.quantise(latents).tolist() == [[[4097, 0]]]
    assert vq.latents(torch.tensor([[4097]])).flatten().tolist() == [1, *[-1] * 11, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_exact_in_every_precision(dtype):
    vq = Magvit(Geometry(**vars(VQ) | {"bits": 13}))
    codes = torch.arange(8192 - 4096, 8192).view(1, -1)
    assert torch.equal(vq.quantise(vq.latents(codes).to(dtype)).flatten(1), codes)


def test_the_tokenizer_halves_with_zeros_on_the_right_and_below_only():
    down = Magvit(VQ).encoder.down[0].downsample
    torch.nn.init.ones_(down.conv.weight)
    torch.nn.init.zeros_(down.conv.bias)
    found = down(torch.ones(1, 32, 4, 4))[0, 0] / 32
    assert found.tolist() == [[9, 6], [6, 4]]


def test_pixels_are_truncated_as_upstream_does(family, monkeypatch):
    levels = torch.tensor([-1.2, -1.0, 0.0, 0.0031, 0.998, 1.0, 1.2])  # 0.998 is level 254.745
    monkeypatch.setattr(family.vq, "decode", lambda codes: levels.expand(1, 3, 2, 7))
    pictures = family._decode(torch.zeros(1, 16, dtype=torch.long))
    assert pictures[0, 0, :, 0].tolist() == [0, 0, 127, 127, 254, 255, 255]


def test_pictures_of_another_size_are_resized_and_cut(family):
    images = np.full((2, 48, 80, 3), 200, dtype=np.uint8)
    assert family.encode(images).shape == (2, 16)
    assert torch.equal(family.encode(images)[0], family.encode(np.full((1, 64, 64, 3), 200, dtype=np.uint8))[0])


@pytest.mark.parametrize(("height", "width"), [(48, 81), (81, 48), (96, 131), (131, 96)])
def test_the_short_side_is_resized_bicubically_and_the_centre_is_cut_out(height, width, family):
    """Against torch's own resampling: at most a level apart, where a shift by a pixel or another kernel makes many."""
    image = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    short = min(height, width)
    size = tuple(64 if edge == short else 64 * edge // short for edge in (height, width))
    top, left = (round((edge - 64) / 2) for edge in size)

    def resized(mode: str) -> np.ndarray:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        return torch.nn.functional.interpolate(pixels, size, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy()

    def cut(whole: np.ndarray, down: int = 0, right: int = 0) -> np.ndarray:
        return whole[top + down : top + down + 64, left + right : left + right + 64]

    found = square(image[None], 64)[0].astype(float)
    assert np.abs(found - cut(resized("bicubic"))).max() <= 1
    shifted = cut(resized("bicubic"), 1, 0) if height > width else cut(resized("bicubic"), 0, 1)
    for other in (cut(resized("bilinear")), shifted):
        assert np.abs(found - other).max() > 10
    assert torch.equal(family.encode(image[None]), family.encode(found[None].astype(np.uint8)))


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_the_schedule_is_computed_in_float32():
    """At two thirds of the steps the cosine is a little less than one half there; in float64 it is a little more."""
    assert [decode.masked_after(step, 8, 256) for step in range(7)] == [251, 236, 212, 181, 142, 97, 49]
    assert decode.masked_after(11, 18, 256) == 127


def by_the_book(family: ShowO, prompts: list[str], draws: torch.Tensor, guidance: float, temperature: float) -> torch.Tensor:
    """Draw as upstream's code does it: everything is computed anew in each step, texts are padded on the left."""
    model, layout, count = family.model, family.layout, len(prompts)
    texts = [layout.drawing(prompt) for prompt in [*prompts, *[""] * count]]
    width = layout.max_text + 1
    pads = [width - len(text) for text in texts]
    before = torch.tensor([[layout.pad] * pad + text + [layout.begin] for pad, text in zip(pads, texts, strict=True)])
    ids = torch.full((count, family.places), layout.mask)
    seen = seen_drawing(torch.tensor(pads), width + family.places + 2, family.places + 2)
    steps = draws.shape[1]
    for step in range(steps):
        whole = torch.cat([before, ids.repeat(2, 1), torch.full((2 * count, 1), layout.end)], 1)
        rows = torch.arange(2 * count)[:, None]
        places = width + 1 + torch.arange(family.places)[None]
        with torch.no_grad():
            logits = model(whole, seen, rows, places)
        logits = (1 + guidance) * logits[:count] - guidance * logits[count:] if guidance else logits[:count]
        probabilities = logits[:, :, layout.offset : layout.mask].softmax(-1)
        unknown = ids == layout.mask
        codes = torch.where(unknown, decode.sample(probabilities, draws[:, step, 0]), ids - layout.offset)
        if step == steps - 1:
            return codes
        ratio = (step + 1) / steps
        temperature = temperature * (1 - ratio)
        chosen = probabilities.gather(2, codes[:, :, None]).squeeze(2)
        exponential = -torch.log(draws[:, step, 1].float().clamp(min=1e-20))
        noise = -torch.log(exponential.clamp(min=1e-20))
        sure = torch.where(unknown, chosen.clamp(min=1e-20), torch.finfo(torch.float32).max).log() + temperature * noise
        count_masked = (family.places * torch.cos(torch.tensor(ratio) * torch.pi * 0.5)).floor()
        most = torch.max(torch.tensor([1]), torch.min(unknown.sum(1, keepdim=True) - 1, count_masked)).long()
        again = sure < sure.sort(1).values.gather(1, most)
        ids = torch.where(again, layout.mask, codes + layout.offset)
    raise AssertionError


@pytest.mark.parametrize(("guidance", "steps", "temperature"), [(5.0, 8, 1.0), (0.0, 3, 1.0), (1.75, 20, 0.5), (5.0, 1, 1.0)])
def test_drawing_is_upstreams(guidance, steps, temperature, family):
    sampling = ShowOSampling(guidance_scale=guidance, steps=steps, temperature=temperature)
    draws = torch.from_numpy(uniforms(seeds(4), 2 * steps * 16)).view(4, steps, 2, 16)
    found = family.generate(PROMPTS, seeds(4), sampling)
    assert torch.equal(torch.from_numpy(found.tokens), by_the_book(family, PROMPTS, draws, guidance, temperature))
    assert found.log_probabilities is None


def test_the_temperature_falls_cumulatively_and_scales_only_the_noise(family, monkeypatch):
    given = []

    def confidence(probability, draws, temperature, right=decode.confidence):
        given.append(temperature)
        return right(probability, draws, temperature)

    monkeypatch.setattr(decode, "confidence", confidence)
    family.generate(PROMPTS[:1], seeds(1), ShowOSampling(steps=8))
    np.testing.assert_allclose(given, [0.875, 0.65625, 0.41015625, 0.205078, 0.0769043, 0.0192261, 0.00240326], rtol=1e-5)
    once = [family.generate(PROMPTS, seeds(4), ShowOSampling(steps=1, temperature=t)).tokens for t in (0.0, 3.0)]
    assert np.array_equal(*once)


def test_places_that_tie_with_the_next_one_stay_known():
    unknown = decode.Unknown(torch.arange(6)[None], torch.tensor([[True, True, True, True, True, False]]))
    confidences = torch.tensor([[0.5, 0.1, 0.2, 0.2, 0.9, 0.0]])
    again = decode.remasked(unknown, confidences, 2)
    assert again.slots[again.real].tolist() == [1]  # 2 and 3 tie
    last = decode.Unknown(torch.tensor([[4]]), torch.tensor([[True]]))
    again = decode.remasked(last, torch.tensor([[0.3]]), 0)
    assert again.slots[again.real].tolist() == [4]  # at least one is masked until the last step


def test_texts_run_once_and_only_masked_places_have_logits(family, monkeypatch):
    texts, shapes = [], []
    hook = family.model.llm.model.register_forward_hook(
        lambda module, arguments, keywords, out: texts.append(tuple(keywords["input_ids"].shape)), with_kwargs=True
    )
    head = family.code_head()
    head.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(family, "code_head", lambda: head)
    family.generate(["a cross"] * 3 + ["a star", "two red circles"], seeds(5), ShowOSampling(steps=4))
    hook.remove()
    assert sorted(texts) == [(1, 3), (1, 6), (2, 5)]  # without a prompt, and two of one length
    assert shapes == [(10, 16, 128), (10, 14, 128), (10, 11, 128), (10, 6, 128)]


def test_a_batch_that_does_not_fit_is_split_and_draws_the_same(family, monkeypatch):
    whole = family.generate(PROMPTS, seeds(4), ShowOSampling(steps=4))
    monkeypatch.setattr(family.memory, "room", 1)
    split = family.generate(PROMPTS, seeds(4), ShowOSampling(steps=4))
    assert np.array_equal(split.tokens, whole.tokens)


# --- answers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(model: ShowO, image: np.ndarray, question: str, count: int) -> tuple[list[int], list[float]]:
    """Answer with `count` tokens, computing the whole sequence anew for each. Returns them and by how many nats each was
    likelier than the end of the text."""
    asked = model._asked(image[None], [question])
    ids, margins = [], []
    for _ in range(count):
        logits = model.model(**asked)[0]
        ids.append(int(logits.argmax()))
        margins.append(float(logits.max() - logits[model.layout.text_end]))
        length = asked["seen"].shape[1]
        seen = torch.ones(1, length + 1, length + 1, dtype=torch.bool)  # the new token sees everything
        seen[:, :length, :length], seen[:, :length, length] = asked["seen"], False
        asked |= {"ids": torch.cat([asked["ids"], torch.tensor([ids[-1:]])], 1), "seen": seen, "columns": asked["columns"] + 1}
    return ids, margins


@pytest.mark.parametrize("through", ["codes", "tower"])
def test_answers_with_cached_keys_are_those_of_recomputing_everything_and_stop_at_the_end(through, family, seeing, monkeypatch):
    model = {"codes": family, "tower": seeing}[through]
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids, skip_special_tokens: ids)
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    questions = [QUESTION, "where is the star ?", "does this image show two red circles left of a striped blue square ?"]
    wanted = [recomputed(model, image, question, 10) for image, question in zip(images, questions, strict=True)]
    found = model.answer(images, questions, 10)
    assert found == [ids for ids, _ in wanted]
    assert len({token for ids in found for token in ids}) > 2  # they are not one token over and over

    bias, stopped = model.model.llm.lm_head.bias, []
    before = bias.detach().clone()
    for image, question, (ids, margins) in zip(images, questions, wanted, strict=True):
        last = int(np.argmin(margins))
        with torch.no_grad():
            bias[model.layout.text_end] += margins[last] + 1e-3  # now the text ends in the place of this token
        try:
            assert model.answer(image[None], [question], 10) == [ids[:last]]
        finally:
            bias.data.copy_(before)
        stopped.append(last)
    assert max(stopped) > 0


# --- losses ----------------------------------------------------------------------------------------------------------


def test_masks_follow_upstreams_ratio_and_the_seed(family):
    masks = family.masks(np.arange(4000))[:, 0]
    share = masks.mean(1)
    assert share.min() == 1 / 16
    assert share.mean() == pytest.approx(2 / np.pi, abs=0.02)  # the mean of cos(pi u / 2)
    assert masks.mean(0).std() < 0.02  # every place alike
    assert np.array_equal(masks[7:8], family.masks(np.array([7]))[:, 0])


def test_the_loss_is_upstreams_and_the_preference_leaves_out_the_ends(family):
    """Unshifted cross-entropy over the whole vocabulary at the masked places, and begin and end that predict themselves."""
    layout, codes = family.layout, np.random.default_rng(0).integers(0, 128, (3, 16))
    masks = family.masks(seeds(3))[:, 0]
    found = family.masked_losses(family.model, PROMPTS[:3], codes, masks)
    for i, prompt in enumerate(PROMPTS[:3]):
        text = layout.drawing(prompt)
        labels = [layout.begin, *(codes[i] + layout.offset), layout.end]
        shown = [layout.begin, *np.where(masks[i], layout.mask, codes[i] + layout.offset), layout.end]
        ids, seen = torch.tensor([[*text, *shown]]), seen_drawing(torch.tensor([0]), len(text) + 18, 18)
        with torch.no_grad():
            logits = family.model(ids, seen, torch.zeros(18, dtype=torch.long), len(text) + torch.arange(18))
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
        counted = torch.tensor([True, *masks[i], True])
        torch.testing.assert_close(found.sft[i], each[counted].mean(), rtol=1e-5, atol=0)
        torch.testing.assert_close(found.preference[i], each[1:-1][counted[1:-1]].sum(), rtol=1e-5, atol=0)


def test_chosen_and_rejected_share_their_mask_and_more_masks_are_averaged(family, monkeypatch):
    pictures = Pictures(tokens=np.random.default_rng(0).integers(0, 128, (2, 16)))
    shown = []
    hook = family.model.register_forward_hook(
        lambda module, arguments, keywords, out: shown.append(keywords["ids"] == family.layout.mask), with_kwargs=True
    )
    one = family._losses(family.model, ["a cross"] * 2, pictures, np.array([3, 3]))
    hook.remove()
    assert torch.equal(shown[0][0], shown[0][1])
    monkeypatch.setattr(family, "masks_per_row", 3)
    three = family._losses(family.model, ["a cross"] * 2, pictures, np.array([3, 3]))
    masks = family.masks(np.array([3, 3]))
    parts = [
        family.masked_losses(family.model, ["a cross"] * 2, pictures.tokens, masks[:, number]).preference for number in range(3)
    ]
    torch.testing.assert_close(three.preference, torch.stack(parts).mean(0))
    assert not torch.equal(one.preference, three.preference)


def test_many_masks_estimate_the_likelihood_with_less_variance(family, monkeypatch):
    pictures = Pictures(tokens=np.tile(np.arange(16), (24, 1)))
    spread = []
    for count in (1, 16):
        monkeypatch.setattr(family, "masks_per_row", count)
        spread.append(family.log_likelihood(["a cross"] * 24, pictures, seeds(24)).std())
    assert spread[1] < 0.6 * spread[0]


@pytest.mark.parametrize(("variant", "moved"), [("codes", {"llm"}), ("tower", {"llm", "projector", "vision"})])
def test_the_judges_loss_is_that_of_p_yes_and_reaches_what_it_may(variant, moved, family, seeing):
    model = {"codes": family, "tower": seeing}[variant]
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    questions = [QUESTION, "does this image show two red circles ?"]
    p_yes, _ = model.p_yes(images, questions)
    target = np.array([0.2, 1.0])
    view = model.training_view()
    loss = model.judge_loss(view.model, images, questions, target)
    wanted = -(target * np.log(p_yes) + (1 - target) * np.log(1 - p_yes)).mean()
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    loss.backward()
    found = {
        group
        for group, prefixes in view.groups.items()
        for name, parameter in view.model.named_parameters()
        if name.startswith(prefixes) and parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    view.model.zero_grad()
    assert found == moved


def test_pretraining_asks_what_the_judge_is_asked(family):
    """The loss over cached pictures is that of whole sequences, laid out and seen as in `p_yes`."""
    from stages.shapes.sampling import sample_questions
    from stages.shapes.tiny_janus import QUESTION as TEMPLATE
    from stages.shapes.train_encoder import HEADS
    from stages.shapes.train_show_o import looking_losses

    width = family.model.get_input_embeddings().embedding_dim
    rng = np.random.default_rng(0)
    scenes = [sample_questions(rng, "pretraining", 4, 0.8) for _ in range(2)]
    asked = [question for scene in scenes for question in scene]
    with torch.no_grad():
        found = looking_losses(family, scenes, rng, torch.nn.ModuleList(torch.nn.Linear(width, size) for size in HEADS))[
            "judging"
        ]
    losses: dict[bool, list[float]] = {True: [], False: []}
    layout = family.layout
    for question in asked:
        ids = layout.asking(question.grid.ravel().tolist(), TEMPLATE.format(prompt=question.meaning.prompt()))
        seen = seen_asking(len(ids), 0, 19, torch.device("cpu"))[None]
        with torch.no_grad():
            logits = family.model(torch.tensor([ids]), seen, torch.tensor([0]), torch.tensor([len(ids) - 1]))
        word = layout.text("yes" if question.label else "no")[0]
        losses[question.label].append(-logits[0].log_softmax(0)[word].item())
    assert found.item() == pytest.approx((np.mean(losses[True]) + np.mean(losses[False])) / 2, rel=1e-4)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_number_of_masks_concerns_training_alone(family, tmp_path):
    family.save(tmp_path / "a")
    assert ShowO.load(tmp_path / "a").masks_per_row == 1
    (tmp_path / "a" / "training.json").write_text('{"masks_per_row": 4}')
    assert ShowO.load(tmp_path / "a").masks_per_row == 4
    for role in ("draw", "judge"):
        assert tmp_path / "a" / "training.json" not in SHOW_O.files(tmp_path / "a", role)
    assert tmp_path / "a" / "training.json" in SHOW_O.files(tmp_path / "a", "train")
    for text in ("", "{}", '{"masks_per_row": 0}', '{"masks_per_row": true}'):
        (tmp_path / "a" / "training.json").write_text(text)
        with pytest.raises(UserError, match=r"training\.json: must hold"):
            ShowO.load(tmp_path / "a")


def test_a_broken_checkpoint_is_refused(family, tmp_path):
    family.save(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    del weights["llm.model.layers.1.mlp.fc1.weight"]
    save_file(weights, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not load \(its weights and config\.json differ in .*fc1\.weight"):
        ShowO.load(tmp_path / "a")
    (tmp_path / "a" / "vq.safetensors").unlink()
    with pytest.raises(UserError, match=r"vq\.safetensors: not found"):
        SHOW_O.files(tmp_path / "a", "draw")


# --- conversion ------------------------------------------------------------------------------------------------------


def write_upstream(folder: Path, family: ShowO, dtype: torch.dtype = torch.float32, **fields) -> dict[str, Path]:
    """Write a model in upstream's layout, as the keyword arguments of `convert`."""
    config, tower = family.model.config, family.model.config.vision_config
    weights = {}
    for name, tensor in family.model.state_dict().items():
        if not name.startswith("vision."):
            named = name.replace("llm.", "showo.", 1).replace("projector.", "mm_projector.", 1)
            weights[named] = tensor.to(dtype).contiguous()
    codes, bits = family.layout.codes, family.vq.geometry.bits
    vq = dict(family.vq.state_dict())
    vq |= {"quantize.embedding": torch.ones(codes, bits), "quantize.power_vals": torch.ones(bits)}
    for name, tensors in (("show-o", weights), ("vq", vq)):
        (folder / name).mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name / "pytorch_model.safetensors")
    text = len(family.tokenizer) - 10
    known = {"_class_name": "Showo", "_diffusers_version": "0.30.1", "codebook_size": codes, "llm_vocab_size": text}
    known |= {"num_vq_tokens": 16, "vocab_size": config.text_config.vocab_size, "w_clip_vit": tower is not None}
    known |= {"mask_token_id": config.text_config.vocab_size - 1, "llm_model_path": "microsoft/phi-1_5"}
    (folder / "show-o" / "config.json").write_text(json.dumps(known | fields))
    text_tokenizer().save_pretrained(folder / "llm")
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    phi = {name: getattr(config.text_config, name) for name in names}
    phi |= {name: config.text_config.rope_parameters[name] for name in ("partial_rotary_factor", "rope_theta")}
    phi |= {"model_type": "phi", "vocab_size": 51200, "qk_layernorm": False}
    phi |= {"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16"}
    (folder / "llm" / "config.json").write_text(json.dumps(phi))
    if tower is not None:
        own = CLIPVisionModel(tower)
        own.load_state_dict(family.model.vision.state_dict())
        own.save_pretrained(folder / "clip")
    places = {"folder": "show-o", "vq_folder": "vq", "llm": "llm"} | ({"clip": "clip"} if tower is not None else {})
    return {name: folder / place for name, place in places.items()}


@pytest.mark.parametrize("variant", ["codes", "tower"])
def test_a_converted_checkpoint_computes_what_upstream_does(variant, family, seeing, tmp_path):
    model = {"codes": family, "tower": seeing}[variant]
    files = write_upstream(tmp_path, model)
    found = show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ)
    assert set(found) == {"drawing logits", "answer logits", "latents", "pixels"}
    assert max(found.values()) < 1e-5
    copy = ShowO.load(tmp_path / "out")
    drawn = [one.generate(PROMPTS, seeds(4), ShowOSampling(steps=4)) for one in (model, copy)]
    assert np.array_equal(drawn[0].tokens, drawn[1].tokens)
    answers = [one.p_yes(drawn[0].images, [QUESTION] * 4)[0] for one in (model, copy)]
    np.testing.assert_allclose(*answers, rtol=0, atol=1e-6)


def changed(family: ShowO, geometry: Geometry = VQ, **rope: float) -> ShowO:
    """Return a Show-o with another image tokenizer or other rotary embeddings, with random weights."""
    torch.manual_seed(1)
    fields = family.model.config.to_dict()
    fields["text_config"] |= {"vocab_size": len(family.tokenizer) + 2**geometry.bits + 1}
    fields["text_config"]["rope_parameters"] |= rope
    model = ShowOModel(ShowOConfig.from_dict(fields | {"vq_config": asdict(geometry)}))
    vq = Magvit(geometry)
    for parameter in (*model.parameters(), *vq.parameters()):
        if parameter.dim() == 1:  # norms that all are the identity could be confused
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    return ShowO(model, vq, family.tokenizer)


def test_the_image_tokenizer_has_upstreams_levels_and_size():
    """As read off upstream's models/modeling_magvitv2.py: channels and residual blocks of each level, the finest first."""
    with torch.device("meta"):
        vq = Magvit(Geometry())
    levels = [
        [(level.block[-1].conv2.out_channels, len(level.block)) for level in part] for part in (vq.encoder.down, vq.decoder.up)
    ]
    assert levels == [[(128, 4), (256, 3), (256, 4), (512, 3), (512, 4)], [(128, 4), (128, 4), (256, 3), (256, 4), (512, 3)]]
    shortcuts = {name.removesuffix(".weight") for name in vq.state_dict() if name.endswith("nin_shortcut.weight")}
    places = ("encoder.down.1", "encoder.down.3", "decoder.up.3", "decoder.up.1")
    assert shortcuts == {f"{place}.block.0.nin_shortcut" for place in places}
    kept = 8192 * 13 + 13  # numbers that upstream's file has beside the parameters: the codes' latents, and powers of two
    assert 4 * (sum(parameter.numel() for parameter in vq.parameters()) + kept) == pytest.approx(382e6, abs=5e5)  # its bytes


def test_an_image_tokenizer_of_upstreams_structure_converts(family, tmp_path):
    """Narrower, but with all levels, blocks and shortcuts, and with 8,192 codes."""
    geometry = Geometry(channels=32)
    model = changed(family, geometry)
    files = write_upstream(tmp_path, model)
    found = show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=geometry)
    assert max(found.values()) < 1e-5
    copy = ShowO.load(tmp_path / "out")
    drawn = [one.generate(PROMPTS[:2], seeds(2), ShowOSampling(steps=2)) for one in (model, copy)]
    assert np.array_equal(drawn[0].tokens, drawn[1].tokens)
    assert drawn[0].tokens.max() > 128
    assert np.array_equal(drawn[0].images, drawn[1].images)
    assert torch.equal(model.encode(drawn[0].images), copy.encode(drawn[0].images))

    path = files["vq_folder"] / "pytorch_model.safetensors"
    weights = load_file(path)
    shallow = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.up.4.block.2")}
    save_file(shallow, path)
    with pytest.raises(UserError, match=r"no tensor decoder\.up\.4\.block\.2"):
        show_o_convert.convert(**files, out=tmp_path / "again", max_text=32, geometry=geometry)


def test_rotary_embeddings_that_are_not_the_default_survive_a_conversion(family, tmp_path):
    model = changed(family, rope_theta=500.0, partial_rotary_factor=0.25)
    usual = changed(family)
    usual.model.load_state_dict(model.model.state_dict())
    files = write_upstream(tmp_path, model)
    assert max(show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ).values()) < 1e-5
    copy = ShowO.load(tmp_path / "out")
    rope = copy.model.config.text_config.rope_parameters
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (500.0, 0.25)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    states = [one._hidden(one._asked(images, [QUESTION, QUESTION])) for one in (model, copy, usual)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-6)
    assert (states[2] - states[0]).abs().max() > 1e-3  # what is lost would be seen


def test_a_conversion_in_bfloat16_keeps_its_type_and_is_checked_as_exactly(family, tmp_path):
    files = write_upstream(tmp_path, family, torch.bfloat16)
    assert max(show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ).values()) < 1e-5
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "vq.safetensors").values()} == {torch.float32}


def test_a_conversion_that_computes_something_else_writes_nothing(family, tmp_path, monkeypatch):
    files = write_upstream(tmp_path, family)
    right = show_o_convert.load

    def wrong(module, weights, folder):
        q, k = "llm.model.layers.0.self_attn.q_layernorm.weight", "llm.model.layers.1.self_attn.k_layernorm.weight"
        right(module, weights | ({q: 2 * weights[q], k: weights[q]} if q in weights else {}), folder)

    monkeypatch.setattr(show_o_convert, "load", wrong)
    with pytest.raises(UserError, match="does not compute what upstream does"):
        show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


WRONG = {
    "another class": ({"_class_name": "Emu3"}, "_class_name is 'Emu3'"),
    "another vocabulary": ({"vocab_size": 58498}, "vocab_size is 58498"),
    "another mask": ({"mask_token_id": 5}, "mask_token_id is 5"),
    "places in words": ({"num_vq_tokens": "256"}, "num_vq_tokens is '256'"),
    "no square": ({"num_vq_tokens": 15}, "num_vq_tokens is 15"),
    "no tower": ({"w_clip_vit": True}, "give openai/clip-vit-large-patch14-336 as --clip"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_show_o_is_refused_in_a_sentence(wrong, family, tmp_path):
    fields, words = WRONG[wrong]
    files = write_upstream(tmp_path, family, **fields)
    with pytest.raises(UserError) as error:
        show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ)
    assert words in str(error.value)


def test_tensors_that_do_not_fit_are_named(family, tmp_path):
    files = write_upstream(tmp_path, family)
    path = files["folder"] / "pytorch_model.safetensors"
    weights = load_file(path)
    for change, words in (
        (lambda w: w.pop("showo.lm_head.bias"), "no tensor llm.lm_head.bias"),
        (lambda w: w.update({"showo.lm_head.bias": torch.zeros(3)}), r"lm_head.bias is float32 \[3\]"),
        (lambda w: w.update({"showo.more": torch.zeros(3)}), "has no tensor llm.more"),
    ):
        changed = dict(weights)
        change(changed)
        save_file(changed, path)
        with pytest.raises(UserError, match=words):
            show_o_convert.convert(**files, out=tmp_path / "out", max_text=32, geometry=VQ)
