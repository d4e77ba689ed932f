"""What the benchmarks run on: prompts, questions and training rows, in the form that the model family takes them."""

from __future__ import annotations

import numpy as np

from stages.families.base import Pictures
from stages.families.janus import JANUS, JanusSampling
from stages.families.janus.family import Janus
from stages.shapes.grammar import CATEGORIES, split_meanings

GUIDANCE = 5.0
SAMPLING = JanusSampling(guidance_scale=GUIDANCE)
Rows = list[tuple[list[int], list[int]]]  # prompt ids, image ids


def sample_prompts(count: int) -> list[str]:
    """Prompts of all categories and so of many lengths."""
    pools = [split_meanings(category, "post-training") for category in CATEGORIES]
    return [pools[i % len(pools)][7 * (i // len(pools))].prompt() for i in range(count)]


def question(prompt: str) -> str:
    """What the judge is asked by default."""
    return JANUS.question.replace("{prompt}", prompt)


def samples(family: Janus, prompts: int, count: int) -> Rows:
    """`count` samples: random codes after prompts of many lengths."""
    texts = sample_prompts(prompts)
    codes = np.random.default_rng(0).integers(0, family.model.config.vq_config.num_embeddings, (count, family.image_length))
    return family.token_ids([texts[i % prompts] for i in range(count)], Pictures(tokens=codes))


def preferences(family: Janus, count: int) -> tuple[Rows, np.ndarray]:
    """`count` pairs of samples of one prompt, all the chosen before all the rejected, and each sample's log-probability
    under the model as it is now, which is DPO's reference."""
    texts = sample_prompts(count) * 2
    codes = np.random.default_rng(0).integers(0, family.model.config.vq_config.num_embeddings, (2 * count, family.image_length))
    pictures = Pictures(tokens=codes)
    return family.token_ids(texts, pictures), family.log_likelihood(texts, pictures)


def mean_length(rows: Rows) -> float:
    return sum(len(prompt) + len(image) for prompt, image in rows) / len(rows)
