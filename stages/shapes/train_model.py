"""Step 3 of the tiny model: the language model learns to draw and to judge, only on the pretraining split.

    python -m stages.shapes.train_model --work results/pretraining/seed-0 --out models/tiny-janus

The work folder holds the image tokenizer and the vision encoder (steps 1 and 2). Every step trains four tasks:

- drawing: prompt -> image codes. One prompt in ten is replaced by padding, for guidance.
- judging: image and question -> 1 or 0. Several questions concern the same scene: its prompt, other true descriptions, and
  prompts in which one thing is changed (see `sample_questions`). The oracle labels them.
- captioning: image -> a true prompt. The judge then learns colours and textures much sooner.
- telling: image and question -> where each of two objects is from the other. The judge learns relations from it.

Each task's loss is averaged separately, because in a common mean over tokens the few answers would have hardly any weight. A
step has more judged pairs than drawings, because an answer teaches one bit and a drawing sixteen codes: this mixture, and the
length of training, make the gap between drawing and judging. The state is saved every `--save-every` steps, and running the
same command again continues from it.
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
from stages.families.janus.training import looked_at
from stages.shapes.grammar import sample_scene
from stages.shapes.measure import measure
from stages.shapes.sampling import Judged, sample_meaning, sample_places, sample_questions
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import CAPTION, PLACE, QUESTION, make_config, make_processor
from stages.shapes.train_encoder import noisy

SPLIT = "pretraining"
PEAK_RATE = 5.0e-4  # At 1e-3, the model learns much later where objects are, and with that to judge relations.


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


def looking_losses(family: Janus, scenes: list[list[Judged]], rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Return the losses of judging, of captioning and of telling where an object is.

    scenes: for each scene the questions about it, the same number for all. Each image is read once, and its questions continue
    from the cached keys and values. Right and wrong prompts weigh the same in the loss of judging, whatever their numbers. The
    caption is a meaning that is true of the scene, if one was asked.
    """
    model, tokenizer = family.model, family.tokenizer
    ask, describe = family._question_ids(QUESTION), family._question_ids(CAPTION)
    shared = next(i for i, (one, other) in enumerate(zip(ask, describe, strict=False)) if one != other)  # up to the image's end
    one, zero = (tokenizer.convert_tokens_to_ids(token) for token in "10")
    end = tokenizer.eos_token_id
    rows, known = [], []  # ids after the image, and how many of the last ones are taught
    for asked in scenes:
        for question in asked:
            ids = family._question_ids(QUESTION.format(prompt=question.meaning.prompt()))[shared:]
            rows.append([*ids, one if question.label else zero])
            known.append(1)
        true = [question.meaning for question in asked if question.label]
        true = [meaning for meaning in true if meaning.relation] or true  # what is learned last is told most
        told = tokenizer.encode(true[rng.integers(len(true))].prompt(), add_special_tokens=False) if true else []
        rows.append([*describe[shared:], *told, end])
        known.append(len(told) + 1 if true else 0)
        for phrase, answer in [*sample_places(asked[0].grid, rng), ("", ""), ("", "")][:2]:
            told = [*tokenizer.encode(answer, add_special_tokens=False), end]
            rows.append([*family._question_ids(PLACE.format(phrase=phrase))[shared:], *told])
            known.append(len(told) if answer else 0)
    pixels = family._pixels(noisy(render(np.stack([asked[0].grid for asked in scenes])), rng))
    seen = looked_at(model, pixels, torch.tensor([ask[:shared]] * len(scenes)))
    cache = model.model.language_model(inputs_embeds=seen, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows) // len(scenes))
    width = max(map(len, rows))
    padded = torch.tensor([row + [family.pad] * (width - len(row)) for row in rows])
    inputs = model.get_input_embeddings()(padded[:, :-1])
    hidden = model.model.language_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
    taught = [(i, j) for i, row in enumerate(rows) for j in range(len(row) - known[i], len(row))]
    row, column = torch.tensor(taught).T
    labels = padded[row, column]
    losses = F.cross_entropy(model.lm_head(hidden[row, column - 1]), labels, reduction="none")
    questions = len(scenes[0])
    number = row % (questions + 3)
    yes, no = (losses[(number < questions) & (labels == answer)] for answer in (one, zero))
    return (yes.mean() + no.mean()) / 2, losses[number == questions].mean(), losses[number > questions].mean()


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


def train(
    family: Janus, folder: Path, steps: int, per_step: tuple[int, int, int], seed: int, save_every: int, rate: float
) -> None:
    drawn, scenes, questions = per_step
    model = family.model
    frozen = set(model.model.vqmodel.parameters())
    trained = [parameter for parameter in model.parameters() if parameter not in frozen]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos", final_div_factor=20
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
        looked = [sample_questions(rng, SPLIT, questions, simple) for _ in range(scenes)]
        with torch.autocast("cpu", torch.bfloat16):
            draw = drawing_loss(model, ids, starts, batches.offset, family.image_length)
            judge, caption, tell = looking_losses(family, looked, rng)
        optimizer.zero_grad()
        (draw + judge + caption + tell).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % 50 == 0:
            print(
                f"step {done} drawing {draw.item():.4f} judging {judge.item():.4f} captioning {caption.item():.4f} "
                f"telling {tell.item():.4f}",
                flush=True,
            )
        if done % save_every == 0 or done == steps:
            figures = measure(family, "validation", 480, 1)
            print(f"step {done} validation: {json.dumps(figures)}", flush=True)
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
    parser.add_argument("--work", type=Path, required=True, help="folder of the tokenizer and the encoder, and of saves")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--drawn", type=int, default=64, help="drawings per step")
    parser.add_argument("--scenes", type=int, default=64, help="scenes per step about which questions are asked")
    parser.add_argument("--questions", type=int, default=4, help="questions about each of them")
    parser.add_argument("--rate", type=float, default=PEAK_RATE, help="the peak learning rate")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    processor = make_processor()
    model = JanusForConditionalGeneration(make_config(processor))
    model.set_attn_implementation("eager")  # at these lengths its backward is several times faster than the fused kernel's
    initialise(model)
    load_model(model.model.vqmodel, str(arguments.work / "codes.safetensors"))
    load_model(model.model.vision_model, str(arguments.work / "encoder.safetensors"))
    family = Janus(model, processor)
    per_step = (arguments.drawn, arguments.scenes, arguments.questions)
    train(family, arguments.work, arguments.steps, per_step, arguments.seed, arguments.save_every, arguments.rate)
    family.save(arguments.out)


if __name__ == "__main__":
    main()
