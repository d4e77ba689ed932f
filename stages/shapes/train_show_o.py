"""Pretrain the tiny Show-o in the shapes world: first its image tokenizer, then the transformer that draws and judges.

    python -m stages.shapes.train_show_o --work results/pretraining/show-o-0 --out models/tiny-show-o

The tokenizer is trained as tiny-janus's is (stages/shapes/train_codes.py): code k represents tile k. Its encoder learns the
bits of the code, in scenes and in its own drawings of them, and its decoder learns to draw them.

stages/shapes/pretraining.py describes the lessons of the transformer. A drawing is taught as Show-o teaches it: codes that a
random mask hides are predicted in their places. Pictures are read through their codes, so no vision encoder has to learn to see
first. What tiny-janus's encoder learns before (stages/shapes/train_encoder.py) is a fifth lesson here, naming: at each place of
a picture, the states in the middle of the transformer must tell what is there and on which sides of it objects lie. Without it,
the judge hardly learns relations. Looking is learned long before drawing, so the later part of the training has more drawings
and fewer scenes in a step.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

from stages.families.show_o import PICTURES, ShowOSampling
from stages.families.show_o.family import ShowO
from stages.families.show_o.magvit import Magvit
from stages.families.show_o.model import ShowOModel
from stages.families.tools.allocation import keep_freed_memory
from stages.shapes import oracle
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
from stages.shapes.scenes import GRID, render
from stages.shapes.tiny_show_o import VQ, make_config, make_tokenizer
from stages.shapes.train_codes import sample_grids, to_images, to_pixels
from stages.shapes.train_encoder import HEADS, names, noisy

VQ_RATE, SHARPNESS = 4e-3, 4.0
SAMPLING = ShowOSampling(guidance_scale=1.0, steps=16)  # with less guidance objects are missing, with more there are too many
DROPOUT = 0.1  # share of drawings without their prompt
LATE = 0.375  # the part of the training after which a step has four times as many drawings and half as many scenes


# --- the image tokenizer ---------------------------------------------------------------------------------------------


def train_codes(steps: int, batch: int, seed: int) -> Magvit:
    """Return the image tokenizer, trained so that code k represents tile k."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Magvit(VQ)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=VQ_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, VQ_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        grids = sample_grids(batch, rng)
        images = render(grids)
        codes = torch.from_numpy(grids).flatten(1)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = model.decode(codes)
            read_too = drawn[batch // 2 :].detach().float()  # the judge reads the model's drawings
            seen = model.encoder(torch.cat([to_pixels(noisy(images[: batch // 2], rng)), read_too]))
        read = F.binary_cross_entropy_with_logits(SHARPNESS * seen.float(), (model.latents(codes) + 1) / 2)
        draw = F.mse_loss(drawn.float(), to_pixels(images))
        optimizer.zero_grad()
        (draw + 0.05 * read).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step} reconstruction {draw.item():.4f} codes {read.item():.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def round_trips(model: Magvit, count: int, seed: int) -> tuple[float, float]:
    """Return the fraction of scenes that the oracle reads unchanged after encoding and decoding, and the fraction of scenes
    whose codes are unchanged after decoding and encoding, as the judge reads what was drawn."""
    grids = sample_grids(count, np.random.default_rng(seed))
    codes = torch.cat([model.encode(to_pixels(part)) for part in np.array_split(render(grids), max(1, count // 250))])
    decoded = torch.cat([model.decode(part) for part in codes.split(250)])
    again = torch.cat([model.encode(to_pixels(to_images(part))) for part in decoded.split(250)])
    unchanged = (oracle.read(to_images(decoded)) == grids).all((1, 2)).mean()
    return float(unchanged), float((again == codes).all(1).float().mean())


def image_tokenizer(folder: Path, steps: int, seed: int) -> Magvit:
    """Return the image tokenizer in the folder, which is trained if there is none."""
    path = folder / PICTURES
    if path.exists():
        model = Magvit(VQ)
        model.load_state_dict(load_file(path))
        return model
    model = train_codes(steps, 48, seed)
    read, kept = round_trips(model, 1000, seed + 1)
    print(f"scenes that the oracle reads unchanged: {read:.4f}; codes that are read unchanged: {kept:.4f}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return model


# --- the transformer -------------------------------------------------------------------------------------------------


def drawing_loss(family: ShowO, rng: np.random.Generator, count: int, simple: float) -> torch.Tensor:
    """Return the mean cross-entropy of what a batch's masks hide, as upstream averages it."""
    meanings = [sample_meaning(rng, SPLIT, simple) for _ in range(count)]
    codes = np.stack([sample_scene(meaning, rng).ravel() for meaning in meanings]).astype(np.int64)  # code k represents tile k
    prompts = [meaning.prompt() if rng.random() >= DROPOUT else "" for meaning in meanings]
    arguments, _ = family.masked(prompts, codes, family.masks(rng.integers(1 << 62, size=count))[:, 0])
    return -family.model(**arguments).mean()


def looking_losses(family: ShowO, scenes: list[list[Judged]], rng: np.random.Generator, heads: nn.ModuleList) -> Losses:
    """Return the losses of judging, captioning, telling and naming. Each picture is read once, as codes, and its questions
    continue from the cached keys and values. heads: one for each of `train_encoder.names`."""
    model, layout = family.model, family.layout
    codes = np.stack([asked[0].grid.ravel() for asked in scenes]).astype(np.int64)
    pictures = [layout.asking(row.tolist(), "") for row in codes]
    shared = family.places + 3
    words = Words(
        question=lambda text: layout.asking(codes[0].tolist(), text)[shared:],
        text=layout.text,
        yes=layout.text("yes")[0],
        no=layout.text("no")[0],
        end=layout.text_end,
    )
    rows, known = answer_rows(scenes, rng, words)
    llm, cache = model.llm.model, DynamicCache(config=model.llm.config)
    everything = torch.ones(1, shared, shared, dtype=torch.bool)
    inputs = model.embedded(torch.tensor([picture[:shared] for picture in pictures]))
    states = llm(
        inputs_embeds=inputs,
        attention_mask=model.attention_mask(everything, inputs.dtype),
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=True,
    ).hidden_states
    cache.batch_repeat_interleave(len(rows) // len(scenes))
    width = max(map(len, rows))
    padded = torch.tensor([row + [layout.pad] * (width - len(row)) for row in rows])
    inputs = model.embedded(padded[:, :-1])
    seen = torch.cat([torch.ones(width - 1, shared, dtype=torch.bool), torch.ones(width - 1, width - 1).tril().bool()], 1)
    mask = model.attention_mask(seen[None], inputs.dtype)
    hidden = llm(inputs_embeds=inputs, attention_mask=mask, past_key_values=cache, use_cache=True).last_hidden_state
    losses = answer_losses(rows, known, padded, hidden, model.llm.lm_head, words, len(scenes[0]), len(scenes))
    middle = F.layer_norm(states[len(states) // 2][:, 2 : 2 + family.places], [states[0].shape[-1]])
    grids = codes.reshape(-1, GRID, GRID)
    named = [
        F.cross_entropy(head(middle).flatten(0, 1), label.flatten()) for head, label in zip(heads, names(grids), strict=True)
    ]
    return losses | {"naming": torch.stack(named).mean()}


def initialise(model: ShowOModel) -> None:
    """Initialise the weights so that they preserve variance; see stages.shapes.train_model."""
    for name, module in model.llm.model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.35 if name.endswith(("dense", "fc2")) else 1.0))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    nn.init.normal_(model.llm.lm_head.weight, std=0.5 * model.llm.lm_head.in_features**-0.5)


def lessons(family: ShowO, drawn: int, scenes: int, questions: int) -> Pretraining:
    """Return what the loop needs. drawn, scenes, questions: see the options of the command."""
    heads = nn.ModuleList(nn.Linear(family.model.get_input_embeddings().embedding_dim, size) for size in HEADS)
    trained = nn.ModuleList([family.model, heads])

    def losses(rng: np.random.Generator, done: float) -> Losses:
        simple, late = simple_share(done), done >= LATE
        looked = [sample_questions(rng, SPLIT, questions, simple) for _ in range(scenes // 2 if late else scenes)]
        with torch.autocast("cpu", torch.bfloat16):
            draw = drawing_loss(family, rng, 4 * drawn if late else drawn, simple)
            return {"drawing": draw, **looking_losses(family, looked, rng, heads)}

    def figures() -> dict[str, float]:
        return measure(family, "validation", 480, 1, SAMPLING)

    return Pretraining(trained, list(trained.parameters()), lambda name: True, losses, figures)


def main() -> None:
    options = parser(__doc__, "folder of the image tokenizer, which is trained if it is not there, and of saves")
    options.add_argument("--code-steps", type=int, default=2000, help="steps of the image tokenizer")
    arguments = options.parse_args()
    keep_freed_memory()
    vq = image_tokenizer(arguments.work, arguments.code_steps, arguments.seed)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = ShowOModel(make_config(tokenizer))
    model.llm.set_attn_implementation("eager")  # at these lengths its backward is several times faster than the fused kernel's
    initialise(model)
    family = ShowO(model, vq, tokenizer)
    job = lessons(family, arguments.drawn, arguments.scenes, arguments.questions)
    pretrain(job, arguments.work, arguments.steps, arguments.seed, arguments.save_every, arguments.rate)
    family.model.to(getattr(torch, arguments.store_as))
    family.save(arguments.out)
    print(json.dumps({"checkpoint": str(arguments.out), "steps": arguments.steps}))


if __name__ == "__main__":
    main()
