"""The Janus family against transformers and against itself."""

import numpy as np
import pytest
import torch
from transformers import JanusForConditionalGeneration, JanusProcessor

from stages.common.seeds import candidate_seed
from stages.families.base import Pictures
from stages.families.janus import JANUS, JanusSampling
from stages.shapes.grammar import CATEGORIES, split_meanings
from tests.helpers import TINY

GREEDY = 1e-4  # temperature


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [meaning.prompt() for name in CATEGORIES for meaning in split_meanings(name, "post-training")[:40:10]]


def seeds(count: int) -> np.ndarray:
    return np.array([candidate_seed(0, "test", 0, index) for index in range(count)])


def sampling(guidance_scale: float, temperature: float = 1.0) -> JanusSampling:
    return JanusSampling(guidance_scale=guidance_scale, temperature=temperature)


def head_outputs(model, run) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    hook = model.model.generation_head.register_forward_hook(lambda module, given, out: found.append(out.detach().clone()))
    try:
        run()
    finally:
        hook.remove()
    return found


def test_plain_transformers_loads_the_checkpoint():
    model = JanusForConditionalGeneration.from_pretrained(TINY)
    processor = JanusProcessor.from_pretrained(TINY)
    assert model.model.vqmodel.config.num_patches**2 == processor.num_image_tokens
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 12 * 2**20
    assert not [path for path in TINY.iterdir() if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


def test_logits_equal_those_of_transformers_generate(tiny, prompts):
    """Both decode greedily with guidance 5; conditional and unconditional logits agree at every step."""
    for prompt in prompts[:6]:
        ids = torch.tensor([tiny._prompt_ids(prompt)])
        reference = head_outputs(
            tiny.model,
            lambda ids=ids: tiny.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=False, guidance_scale=5
            ),
        )
        own = head_outputs(tiny.model, lambda p=prompt: tiny.generate([p], seeds(1), sampling(5.0, GREEDY)))
        assert len(own) == len(reference) == tiny.image_length
        for mine, theirs in zip(own, reference, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_guidance_scale_1_runs_without_the_doubled_batch(tiny, prompts):
    plain = head_outputs(tiny.model, lambda: tiny.generate(prompts[:1] * 3, seeds(3), sampling(1.0)))
    guided = head_outputs(tiny.model, lambda: tiny.generate(prompts[:1] * 3, seeds(3), sampling(5.0)))
    assert {len(step) for step in plain} == {3}
    assert {len(step) for step in guided} == {6}


def test_a_candidate_depends_on_its_seed_and_not_on_its_batch(tiny, prompts):
    """At least 999 of 1,000 candidates have the same tokens in batches of 250 and of 7; a difference begins at a near tie."""
    count = 1000
    texts = [prompts[i % len(prompts)] for i in range(count)]
    many = seeds(count)

    def draw(batch: int) -> np.ndarray:
        parts = [slice(i, i + batch) for i in range(0, count, batch)]
        return np.concatenate([tiny.generate(texts[p], many[p], sampling(5.0)).tokens for p in parts])

    large, small = draw(250), draw(7)
    differing = np.flatnonzero((large != small).any(1))
    assert len(differing) <= count // 1000
    for i in differing:  # the uniform draw was at the boundary between two neighbouring codes
        first = np.flatnonzero(large[i] != small[i])[0]
        assert near_tie(tiny, texts[i], many[i], large[i], first)


def near_tie(tiny, prompt: str, seed: int, tokens: np.ndarray, place: int) -> bool:
    from stages.common.seeds import uniforms

    logits = head_outputs(tiny.model, lambda: tiny.generate([prompt], np.array([seed]), sampling(5.0)))[place]
    cumulative = (logits[1:] + 5.0 * (logits[:1] - logits[1:])).softmax(-1).double().cumsum(-1)[0]
    draw = uniforms(np.array([seed]), tiny.image_length)[0, place] * cumulative[-1].item()
    return bool((cumulative - draw).abs().min() < 1e-5)


def test_equal_seeds_give_equal_pictures_and_other_seeds_others(tiny, prompts):
    first = tiny.generate(prompts[:8], seeds(8), sampling(1.0))
    again = tiny.generate(prompts[:8], seeds(8), sampling(1.0))
    other = tiny.generate(prompts[:8], seeds(16)[8:], sampling(1.0))
    assert (first.images == again.images).all()
    assert (first.tokens != other.tokens).any(1).sum() >= 6  # a few images may repeat, most must differ
    assert first.images.shape == (8, 64, 64, 3)
    assert first.images.dtype == np.uint8


def test_log_probability_of_sampling_is_that_of_teacher_forcing(tiny, prompts):
    drawn = tiny.generate(prompts, seeds(len(prompts)), sampling(3.0))
    forced = tiny.log_likelihood(prompts, Pictures(tokens=drawn.tokens))
    np.testing.assert_allclose(drawn.log_probabilities, forced, rtol=1e-4, atol=1e-3)


def test_p_yes_is_that_of_transformers_forward(tiny, prompts):
    images = tiny.generate(prompts[:4], seeds(4), sampling(5.0)).images
    questions = [f"does this image show {prompt} ?" for prompt in prompts[:4]]
    p_yes, p_neither = tiny.p_yes(images, questions)
    for image, question, own, neither in zip(images, questions, p_yes, p_neither, strict=True):
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = tiny.processor.apply_chat_template(turn, add_generation_prompt=True)
        inputs = tiny.processor(text=text, images=[image], return_tensors="pt")
        with torch.no_grad():
            probabilities = tiny.model(**inputs).logits[0, -1].double().softmax(-1)
        yes = sum(probabilities[tiny.tokenizer.convert_tokens_to_ids(t)].item() for t in ("1", "yes"))
        no = sum(probabilities[tiny.tokenizer.convert_tokens_to_ids(t)].item() for t in ("0", "no"))
        assert own == pytest.approx(yes / (yes + no), abs=1e-5)
        assert neither == pytest.approx(1 - yes - no, abs=1e-5)


def test_the_answer_starts_with_the_likelier_verdict(tiny, prompts):
    images = tiny.generate(prompts[:6], seeds(6), sampling(5.0)).images
    questions = [f"does this image show {prompt} ?" for prompt in prompts[:6]]
    p_yes, _ = tiny.p_yes(images, questions)
    answers = tiny.answer(images, questions, 2)
    assert [answer.split()[0] in ("1", "yes") for answer in answers] == [p > 0.5 for p in p_yes]


def test_the_default_question_is_the_papers():
    question = JANUS.question.replace("{prompt}", "a red circle")
    assert "Does this original image describe a red circle?" in question
    assert question.endswith("The score is {your score}.")


def test_saving_and_loading_keeps_every_weight_and_answer(tiny, prompts, tmp_path):
    tiny.save(tmp_path / "copy")
    copy = type(tiny).load(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors")) == ["model.safetensors"]
    before, after = (family.generate(prompts[:4], seeds(4), sampling(5.0)) for family in (tiny, copy))
    assert (before.images == after.images).all()
