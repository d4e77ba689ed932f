"""Step 2 of the tiny model: the language model learns to draw and to judge, only on the pretraining split.

    python -m stages.shapes.train_model --codes results/pretraining/codes.safetensors --out models/tiny-janus

Every step trains three tasks: prompt -> image codes (one prompt in ten is replaced by padding, for guidance), image and
question -> 1 or 0, and image -> caption. Captioning teaches the judge colours and textures much sooner. Half of the judged
pairs match. Most of the others are hard negatives, in which one thing of the caption or of the scene is changed; in one of five
the caption belongs to another scene of the same category. The oracle labels every pair.

Each task's loss is averaged separately, because in a common mean over tokens the few answers would have hardly any weight. A
step has more judged pairs than drawings, because an answer teaches one bit and a drawing sixteen codes. The state is saved
every `--save-every` steps, and running the same command again continues from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import nn
from transformers import JanusForConditionalGeneration

from stages.families.janus.family import Janus
from stages.shapes.grammar import (
    Meaning,
    sample_scene,
)
from stages.shapes.measure import measure
from stages.shapes.sampling import Judged, sample_judged, sample_meaning
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import CAPTION, QUESTION, make_config, make_processor

SPLIT = "pretraining"
PEAK_RATE = 1.0e-3


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


def judging_loss(family: Janus, judged: list[Judged], rng: np.random.Generator) -> torch.Tensor:
    images = render(np.stack([pair.grid for pair in judged]))
    noisy = images + rng.normal(0, 6, images.shape)
    images = noisy.round().clip(0, 255).astype(np.uint8)  # because the decoder's images are not exact either
    questions = [QUESTION.format(prompt=pair.meaning.prompt()) for pair in judged]
    inputs, last = family._question_embeddings(images, questions)
    hidden = family.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    logits = family.model.lm_head(hidden[torch.arange(len(last)), last])
    one, zero = (family.tokenizer.convert_tokens_to_ids(token) for token in "10")
    labels = torch.tensor([one if pair.label else zero for pair in judged])
    return F.cross_entropy(logits, labels)


def captioning_loss(family: Janus, meanings: list[Meaning], images: np.ndarray) -> torch.Tensor:
    """Return the cross-entropy of the captions and of the ends of their turns, as answers to the question CAPTION."""
    captions = [meaning.prompt() for meaning in meanings]
    turns = [f"{CAPTION}\n\n<|Assistant|>: {caption}" for caption in captions]
    inputs, last = family._question_embeddings(images, turns)  # its final `<|Assistant|>:` serves as the end of the turn
    hidden = family.model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    end = family.tokenizer.convert_tokens_to_ids("<|Assistant|>")
    rows: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for row, caption in enumerate(captions):
        ids = [*family.tokenizer.encode(caption, add_special_tokens=False), end]
        first = int(last[row]) - len(ids)
        rows += [row] * len(ids)
        places += range(first - 1, first - 1 + len(ids))
        labels += ids
    return F.cross_entropy(family.model.lm_head(hidden[rows, places]), torch.tensor(labels))


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


def train(family: Janus, folder: Path, steps: int, per_step: tuple[int, int, int], seed: int, save_every: int) -> None:
    drawn, judged, captioned = per_step
    model = family.model
    frozen = set(model.model.vqmodel.parameters())
    trained = [parameter for parameter in model.parameters() if parameter not in frozen]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=0.05, anneal_strategy="cos", final_div_factor=20
    )
    state, first = folder / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
        print(f"continuing at step {first}", flush=True)
    batches = Batches(family, drawn)
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        simple = max(0.1, 0.8 - 2.0 * step / steps)  # the fraction of simple prompts falls during training
        ids, starts = batches.draw(rng, simple)
        draw = drawing_loss(model, ids, starts, batches.offset, family.image_length)
        judge = judging_loss(family, [sample_judged(rng, SPLIT, simple=simple) for _ in range(judged)], rng)
        told = [sample_meaning(rng, SPLIT, simple) for _ in range(captioned)]
        scenes = np.stack([sample_scene(meaning, rng) for meaning in told])
        caption = captioning_loss(family, told, render(scenes))
        optimizer.zero_grad()
        (draw + judge + caption).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % 50 == 0:
            print(
                f"step {done} drawing {draw.item():.4f} judging {judge.item():.4f} captioning {caption.item():.4f}", flush=True
            )
        if done % save_every == 0 or done == steps:
            figures = measure(family, "post-training", 384, 1)
            print(f"step {done} post-training split: {json.dumps(figures)}", flush=True)
            temporary = state.with_suffix(".tmp")
            torch.save(
                {
                    "model": {k: v for k, v in model.state_dict().items() if ".vqmodel." not in k},
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": done,
                },
                temporary,
            )
            temporary.replace(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("results/pretraining"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--drawn", type=int, default=24, help="drawings per step")
    parser.add_argument("--judged", type=int, default=160, help="judged pairs per step")
    parser.add_argument("--captioned", type=int, default=48, help="captions per step")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    processor = make_processor()
    model = JanusForConditionalGeneration(make_config(processor))
    initialise(model)
    load_model(model.model.vqmodel, str(arguments.codes))
    family = Janus(model, processor)
    per_step = (arguments.drawn, arguments.judged, arguments.captioned)
    train(family, arguments.work, arguments.steps, per_step, arguments.seed, arguments.save_every)
    family.save(arguments.out)


if __name__ == "__main__":
    main()
