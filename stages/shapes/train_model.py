"""Step 3 of the tiny model: the language model learns to draw and to judge, only on the pretraining split.

    python -m stages.shapes.train_model --work results/pretraining/seed-0 --out models/tiny-janus

The work folder holds the image tokenizer and the vision encoder (steps 1 and 2). stages/shapes/pretraining.py describes the
lessons. Without its prompt, a drawing has padding in the place of the prompt, as in drawing under guidance.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import nn
from transformers import JanusForConditionalGeneration

from stages.families.janus import JanusSampling
from stages.families.janus.family import Janus
from stages.families.janus.training import looked_at
from stages.families.tools.allocation import keep_freed_memory
from stages.shapes.grammar import sample_scene
from stages.shapes.measure import measure
from stages.shapes.pretraining import (
    SPLIT,
    Losses,
    Pretraining,
    Words,
    answer_losses,
    answer_rows,
    parser,
    pretrain,
    simple_share,
)
from stages.shapes.sampling import Judged, sample_meaning, sample_questions
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import CAPTION, QUESTION, make_config, make_processor
from stages.shapes.train_encoder import noisy


class Batches:
    """Batches as id tensors over a joint vocabulary: text ids first, then image codes at `len(tokenizer) + code`."""

    def __init__(self, family: Janus, batch: int) -> None:
        self.family, self.batch = family, batch
        self.offset = len(family.tokenizer)
        self.prompt_ids: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        if prompt not in self.prompt_ids:
            self.prompt_ids[prompt] = self.family._prompt_ids(prompt)
        return self.prompt_ids[prompt]

    def draw(self, rng: np.random.Generator, simple: float) -> tuple[torch.Tensor, torch.Tensor]:
        meanings = [sample_meaning(rng, SPLIT, simple) for _ in range(self.batch)]
        image = [sample_scene(meaning, rng).ravel() for meaning in meanings]  # code k represents tile k
        rows, starts = [], []
        for meaning, code in zip(meanings, image, strict=True):
            ids = list(self.ids(meaning.prompt()))
            if rng.random() < 0.1:
                ids[1:-1] = [self.family.pad] * (len(ids) - 2)
            starts.append(len(ids) - 1)
            rows.append(ids + [self.offset + int(c) for c in code])
        width = max(map(len, rows))
        padded = torch.tensor([row + [self.family.pad] * (width - len(row)) for row in rows])
        return padded, torch.tensor(starts)


def drawing_loss(model: JanusForConditionalGeneration, ids: torch.Tensor, starts: torch.Tensor, offset: int, length: int):
    codes = torch.arange(model.config.vq_config.num_embeddings)
    table = torch.cat([model.get_input_embeddings().weight[:offset], model.prepare_embeddings_for_image_generation(codes)])
    hidden = model.model.language_model(inputs_embeds=table[ids], use_cache=False).last_hidden_state
    places = starts[:, None] + torch.arange(length)
    logits = model.model.generation_head(hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1])))
    labels = ids.gather(1, places + 1) - offset
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def looking_losses(family: Janus, scenes: list[list[Judged]], rng: np.random.Generator) -> Losses:
    """Return the losses of judging, of captioning and of telling where an object is.

    scenes: for each scene the questions about it, the same number for all. Each image is read once, and its questions continue
    from the cached keys and values.
    """
    model, tokenizer = family.model, family.tokenizer
    ask, describe = family._question_ids(QUESTION), family._question_ids(CAPTION)
    shared = next(i for i, (one, other) in enumerate(zip(ask, describe, strict=False)) if one != other)  # up to the image's end
    words = Words(
        question=lambda text: family._question_ids(text)[shared:],
        text=lambda text: tokenizer.encode(text, add_special_tokens=False),
        yes=tokenizer.convert_tokens_to_ids("1"),
        no=tokenizer.convert_tokens_to_ids("0"),
        end=tokenizer.eos_token_id,
    )
    rows, known = answer_rows(scenes, rng, words)
    pixels = family._pixels(noisy(render(np.stack([asked[0].grid for asked in scenes])), rng))
    seen = looked_at(model, pixels, torch.tensor([ask[:shared]] * len(scenes)))
    cache = model.model.language_model(inputs_embeds=seen, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows) // len(scenes))
    width = max(map(len, rows))
    padded = torch.tensor([row + [family.pad] * (width - len(row)) for row in rows])
    inputs = model.get_input_embeddings()(padded[:, :-1])
    hidden = model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return answer_losses(rows, known, padded, hidden, model.lm_head, words, len(scenes[0]), len(scenes))


def initialise(model: JanusForConditionalGeneration) -> None:
    """Initialise the weights so that they preserve variance.

    The default standard deviation of 0.02 is meant for widths in the thousands. At width 128 the loss would stay on a plateau
    for a thousand steps.
    """
    janus = model.model
    for part in (janus.language_model, janus.vision_model, janus.aligner, janus.generation_aligner):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                inner = name.endswith(("o_proj", "down_proj", "projection_layer", "fc2"))
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.35 if inner else 1.0))
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
    nn.init.normal_(janus.generation_embeddings.weight)
    for head in (janus.generation_head.proj_out, janus.generation_head.vision_head, model.lm_head):
        nn.init.normal_(head.weight, std=0.5 * head.in_features**-0.5)


def lessons(family: Janus, drawn: int, scenes: int, questions: int) -> Pretraining:
    """Return what the loop needs. drawn, scenes, questions: see the options of the command."""
    model, batches = family.model, Batches(family, drawn)
    frozen = set(model.model.vqmodel.parameters())

    def losses(rng: np.random.Generator, done: float) -> Losses:
        simple = simple_share(done)
        ids, starts = batches.draw(rng, simple)
        looked = [sample_questions(rng, SPLIT, questions, simple) for _ in range(scenes)]
        with torch.autocast("cpu", torch.bfloat16):
            draw = drawing_loss(model, ids, starts, batches.offset, family.image_length)
            return {"drawing": draw, **looking_losses(family, looked, rng)}

    return Pretraining(
        model,
        [parameter for parameter in model.parameters() if parameter not in frozen],
        lambda name: ".vqmodel." not in name,
        losses,
        lambda: measure(family, "validation", 480, 1, JanusSampling(guidance_scale=1.0)),
    )


def main() -> None:
    options = parser(__doc__, "folder of the tokenizer and the encoder, and of saves")
    arguments = options.parse_args()
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    processor = make_processor()
    model = JanusForConditionalGeneration(make_config(processor))
    model.set_attn_implementation("eager")  # at these lengths its backward is several times faster than the fused kernel's
    initialise(model)
    load_model(model.model.vqmodel, str(arguments.work / "codes.safetensors"))
    load_model(model.model.vision_model, str(arguments.work / "encoder.safetensors"))
    family = Janus(model, processor)
    job = lessons(family, arguments.drawn, arguments.scenes, arguments.questions)
    pretrain(job, arguments.work, arguments.steps, arguments.seed, arguments.save_every, arguments.rate)
    family.model.to(getattr(torch, arguments.store_as))
    family.save(arguments.out)


if __name__ == "__main__":
    main()
