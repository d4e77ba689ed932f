"""How fast candidates are drawn, beside transformers' `generate` and upstream's loop on the same weights in the same run.

    python -m speed.generation --config janus-100m --prompts 4 --candidates 10 --out speed/results/generation-100m.json

engine                     this project's
transformers-one-prompt    `generate(generation_mode="image")`, one prompt a call with its N candidates
transformers-batch         the same, all prompts in one call, left-padded
upstream-loop              the procedure of deepseek-ai/Janus generation_inference.py: one prompt a call, growing cache
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from speed import cost
from speed.bench import compare, parser, report
from speed.data import GUIDANCE, SAMPLING, sample_prompts
from speed.models import open_model
from stages.common.seeds import candidate_seed
from stages.families.janus.family import Janus


def engine(family: Janus, prompts: list[str], candidates: int) -> None:
    texts = sorted((prompt for prompt in prompts for _ in range(candidates)), key=family.bucket)
    seeds = np.array([candidate_seed(0, text, 0, i) for i, text in enumerate(texts)])
    family.generate(texts, seeds, SAMPLING)


def padded(family: Janus, prompts: list[str]) -> dict[str, torch.Tensor]:
    ids = [family._prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, ids))
    rows = [[family.pad] * (width - len(row)) + row for row in ids]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in ids]
    tensors = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    return {name: tensor.to(family.device) for name, tensor in tensors.items()}


def transformers(family: Janus, prompts: list[str], candidates: int) -> None:
    tokens = family.model.generate(
        **padded(family, prompts),
        generation_mode="image",
        do_sample=True,
        top_k=0,
        guidance_scale=GUIDANCE,
        num_return_sequences=candidates,
    )
    family._decode(tokens)


def one_prompt(family: Janus, prompts: list[str], candidates: int) -> None:
    for prompt in prompts:
        transformers(family, [prompt], candidates)


@torch.no_grad()
def upstream(family: Janus, prompts: list[str], candidates: int) -> None:
    model = family.model
    for prompt in prompts:
        ids = torch.tensor([family._prompt_ids(prompt)] * (2 * candidates), device=family.device)
        ids[1::2, 1:-1] = family.pad
        inputs, cache, drawn = model.get_input_embeddings()(ids), None, []
        for _ in range(family.image_length):
            out = model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits = model.model.generation_head(out.last_hidden_state[:, -1])
            logits = logits[1::2] + GUIDANCE * (logits[0::2] - logits[1::2])
            token = torch.multinomial(logits.softmax(-1), 1).squeeze(1)
            drawn.append(token)
            inputs = model.prepare_embeddings_for_image_generation(token.repeat_interleave(2))[:, None]
        family._decode(torch.stack(drawn, 1))


WAYS = {"engine": engine, "transformers-one-prompt": one_prompt, "transformers-batch": transformers, "upstream-loop": upstream}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    family = open_model(arguments.config, arguments.device, arguments.dtype)
    prompts = sample_prompts(arguments.prompts)
    images = arguments.prompts * arguments.candidates
    length = round(sum(map(family.bucket, prompts)) / len(prompts))
    itemsize = family.model.dtype.itemsize
    least = cost.generation(family.model.config, length, family.image_length, images, True, itemsize)
    ways = {name: partial(way, family, prompts, arguments.candidates) for name, way in WAYS.items()}
    report("generation", arguments, compare(arguments, ways, images, least))


if __name__ == "__main__":
    main()
