"""How fast Show-o draws and judges, beside upstream's procedure on the same weights in the same run.

    python -m speed.show_o generation --prompts 2 --candidates 2 --steps 8 --out speed/results/show-o-generation-100m.json
    python -m speed.show_o scoring --prompts 2 --candidates 4 --out speed/results/show-o-scoring-100m.json

engine              this project's
upstream-procedure  generation: t2i_generate of showlab/Show-o, all candidates in one batch: all places of text and picture in
                    every step, and logits over the whole vocabulary for all of them; scoring: mmu_generate, one question a
                    call, up to the first token of the answer

Weights are random (seed 0); speed depends on the shape. `show-o-100m` has upstream's vocabulary and 256 codes, `show-o` has its
sizes at 512 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PhiConfig, PreTrainedTokenizerFast

from speed.bench import facts, line, result, timed
from speed.cost import Cost
from speed.data import sample_prompts
from speed.records import write
from stages.common.seeds import candidate_seed
from stages.families.show_o import SHOW_O, ShowOSampling
from stages.families.show_o.decode import masked_after
from stages.families.show_o.family import ShowO
from stages.families.show_o.layout import add_special_tokens
from stages.families.show_o.magvit import Geometry, Magvit
from stages.families.show_o.model import ShowOConfig, ShowOModel, seen_asking, seen_drawing

TEXT, CODES = 50295, 8192
GUIDANCE = 5.0
# hidden, layers, heads, feed-forward, channels of MAGVIT-v2, codes of a picture
SIZES = {"show-o-100m": (512, 12, 8, 2048, 32, 256), "show-o": (2048, 24, 32, 8192, 128, 1024)}


def open_model(name: str, device: str, dtype: str) -> ShowO:
    """Return the named geometry with random weights; its tokenizer makes a token of every word."""
    hidden, layers, heads, feed_forward, channels, places = SIZES[name]
    end = "<|endoftext|>"
    words = [end, *(f"filler{i}" for i in range(TEXT - 7)), "yes", "no", "0", "1", "a", "?"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="filler0"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, unk_token="filler0")
    add_special_tokens(tokenizer)
    geometry = Geometry(channels=channels)
    text = PhiConfig(
        vocab_size=len(tokenizer) + CODES + 1,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        qk_layernorm=True,
    )
    config = ShowOConfig(text_config=text, vq_config=asdict(geometry), image_tokens=places)
    torch.manual_seed(0)
    model = ShowOModel(config).to(device, getattr(torch, dtype))
    return ShowO(model, Magvit(geometry).to(device), tokenizer)


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(family: ShowO, texts: list[str], steps: int) -> None:
    seeds = np.array([candidate_seed(0, text, 0, i) for i, text in enumerate(texts)])
    family.generate(texts, seeds, ShowOSampling(guidance_scale=GUIDANCE, steps=steps))


@torch.no_grad()
def draw_as_upstream(family: ShowO, texts: list[str], steps: int) -> None:
    """Upstream's procedure with torch's generator: nothing is kept from one step to the next but the codes."""
    model, layout, count, places = family.model, family.layout, len(texts), family.places
    rows = [layout.drawing(text) for text in [*texts, *[""] * count]]
    width = layout.max_text + 1
    pads = torch.tensor([width - len(row) for row in rows])
    before = torch.tensor([[layout.pad] * (width - len(row)) + row + [layout.begin] for row in rows], device=family.device)
    after = torch.full((2 * count, 1), layout.end, device=family.device)
    seen = seen_drawing(pads.to(family.device), width + places + 2, places + 2)
    mask = torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)[:, None]
    ids = torch.full((count, places), layout.mask, device=family.device)
    temperature = 1.0
    for step in range(steps):
        whole = torch.cat([before, ids.repeat(2, 1), after], 1)
        logits = model.llm(input_ids=whole, attention_mask=mask, use_cache=False).logits.float()
        logits = (1 + GUIDANCE) * logits[:count] - GUIDANCE * logits[count:]
        probabilities = logits[:, -(places + 1) : -1, layout.offset : -1].softmax(-1)
        codes = torch.multinomial(probabilities.flatten(0, 1), 1).view(count, places)
        unknown = ids == layout.mask
        codes = torch.where(unknown, codes, ids - layout.offset)
        chosen = probabilities.gather(2, codes[:, :, None]).squeeze(2)
        temperature *= 1 - (step + 1) / steps
        exponential = -torch.log(torch.rand_like(chosen).clamp(min=1e-20))
        noise = -torch.log(exponential.clamp(min=1e-20))
        sure = torch.where(unknown, chosen.clamp(min=1e-20), torch.finfo(torch.float32).max).log() + temperature * noise
        most = (unknown.sum(1, keepdim=True) - 1).clamp(max=max(0, masked_after(step, steps, places))).clamp(min=1)
        again = sure < sure.sort(1).values.gather(1, most)
        ids = torch.where(again, layout.mask, codes + layout.offset)
    family._decode(codes)


def drawing_cost(family: ShowO, steps: int, images: int) -> Cost:
    """Weights are read once a step for the whole batch. A step computes the picture's tokens, and logits where it is masked."""
    config, places, itemsize = family.model.config.text_config, family.places, family.model.dtype.itemsize
    layers = sum(parameter.numel() for parameter in family.model.llm.model.layers.parameters())
    head = config.hidden_size * CODES
    masked = [places, *(max(1, masked_after(step, steps, places)) for step in range(steps - 1))]
    attention = 4 * places * (places + 2) * config.hidden_size * config.num_hidden_layers
    flops = 2 * sum((places + 2) * 2 * layers + attention + 2 * head * count for count in masked)
    return Cost(steps * (layers + head) * itemsize / images, flops)


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(family: ShowO, images: np.ndarray, questions: list[str]) -> None:
    family.p_yes(images, questions)


@torch.no_grad()
def judge_as_upstream(family: ShowO, images: np.ndarray, questions: list[str]) -> None:
    model, layout = family.model, family.layout
    for image, question in zip(images, questions, strict=True):
        ids = torch.tensor([layout.asking(family.encode(image[None])[0].tolist(), question)], device=family.device)
        seen = seen_asking(ids.shape[1], 0, family.places + 3, family.device)
        mask = torch.zeros_like(seen, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)[None, None]
        logits = model.llm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        logits.float().softmax(-1).cpu()


def judging_cost(family: ShowO, question: int) -> Cost:
    """One forward over picture and question; MAGVIT-v2 is not counted."""
    config, tokens = family.model.config.text_config, family.places + question
    layers = sum(parameter.numel() for parameter in family.model.llm.model.layers.parameters())
    attention = 4 * tokens * family.places * config.hidden_size * config.num_hidden_layers
    return Cost(tokens * config.hidden_size * family.model.dtype.itemsize, 2 * tokens * layers + attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["generation", "scoring"])
    parser.add_argument("--config", choices=list(SIZES), default="show-o-100m")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--candidates", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--no-warm-up", action="store_true", help="time the first call")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    family = open_model(arguments.config, arguments.device, dtype)
    texts = [text for text in sample_prompts(arguments.prompts) for _ in range(arguments.candidates)]
    ways: dict[str, Callable[[], None]]
    if arguments.task == "generation":
        ways = {
            "engine": partial(draw, family, texts, arguments.steps),
            "upstream-procedure": partial(draw_as_upstream, family, texts, arguments.steps),
        }
        least = drawing_cost(family, arguments.steps, len(texts))
    else:
        images = np.random.default_rng(0).integers(0, 256, (len(texts), family.side, family.side, 3), dtype=np.uint8)
        questions = [SHOW_O.question.replace("{prompt}", text) for text in texts]
        ways = {
            "engine": partial(judge, family, images, questions),
            "upstream-procedure": partial(judge_as_upstream, family, images, questions),
        }
        least = judging_cost(family, len(family.layout.text(questions[0])))
    results = []
    for name, way in ways.items():
        if not arguments.no_warm_up:
            way()
        seconds, peak = timed(arguments.device, way)
        results.append(result(name, len(texts), seconds, peak, least, arguments.device))
        print(line(results[-1]), flush=True)
    if arguments.out:
        told = facts(f"show-o {arguments.task}", arguments.device, dtype)
        told |= {key: getattr(arguments, key) for key in ("config", "prompts", "candidates", "steps")} | {"results": results}
        write(arguments.out, told)


if __name__ == "__main__":
    main()
