"""Step 2 of the tiny model: its vision encoder learns to see, as the vision encoders of large models do before they join one.

    python -m stages.shapes.train_encoder --out DIR

For every cell of a scene, linear heads on the encoder's features name the object's shape, colour and texture, or none, and say
whether other objects lie above, below, to the left and to the right. The heads are thrown away afterwards. Janus takes SigLIP,
which has seen millions of images with captions, for the same purpose. The scenes are those on which the image tokenizer is
trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import nn
from transformers.models.janus.modeling_janus import JanusVisionModel

from stages.families.tools.allocation import keep_freed_memory
from stages.shapes.scenes import COLORS, SHAPES, TEXTURES, render
from stages.shapes.tiny_janus import make_config, make_processor
from stages.shapes.train_codes import sample_grids, to_pixels

PEAK_RATE = 2e-3
SIZES = (len(SHAPES), len(COLORS), len(TEXTURES))
HEADS = (*(size + 1 for size in SIZES), 2, 2, 2, 2)


def names(grids: np.ndarray) -> list[torch.Tensor]:
    """Return what each head should say about each cell, int64 `[n, 16]` each.

    They are the cell's shape, colour and texture (with one more index for empty cells), and whether objects lie above it, below
    it, to its left and to its right.
    """
    values = grids.reshape(len(grids), -1)
    rest, texture = np.divmod(np.maximum(values - 1, 0), SIZES[2])
    parts = [np.where(values == 0, size, part) for size, part in zip(SIZES, (*np.divmod(rest, SIZES[1]), texture), strict=True)]
    for axis in (1, 2):
        taken = (grids > 0).any(3 - axis, keepdims=True)
        upto = np.cumsum(taken, axis)
        before, after = upto > taken, upto[:, -1:, -1:] > upto
        parts += [np.broadcast_to(side, grids.shape).reshape(values.shape) for side in (before, after)]
    return [torch.from_numpy(np.broadcast_to(part, values.shape).astype(np.int64)) for part in parts]


def noisy(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images with a little noise, uint8, because the decoder's images are not exact either."""
    return (images + rng.normal(0, 6, images.shape)).round().clip(0, 255).astype(np.uint8)


def train(steps: int, batch: int, seed: int) -> tuple[JanusVisionModel, float]:
    """Return the encoder, and the fraction of objects in its last batches that it names and places right."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = make_config(make_processor()).vision_config
    model = JanusVisionModel(config)
    heads = nn.ModuleList(nn.Linear(config.hidden_size, size) for size in HEADS)
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    right: list[float] = []
    for step in range(steps):
        grids = sample_grids(batch, rng)
        features = model(to_pixels(noisy(render(grids), rng))).last_hidden_state
        logits = [head(features) for head in heads]
        labels = names(grids)
        losses = [F.cross_entropy(part.flatten(0, 1), label.flatten()) for part, label in zip(logits, labels, strict=True)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        all_right = torch.stack([part.argmax(-1) == label for part, label in zip(logits, labels, strict=True)]).all(0)
        right.append(float(all_right[labels[0] < SIZES[0]].float().mean()))
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} objects named and placed right {100 * right[-1]:.1f} %", flush=True)
    return model, float(np.mean(right[-20:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    model, right = train(arguments.steps, arguments.batch, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(arguments.out / "encoder.safetensors"))
    print(f"objects named and placed right: {100 * right:.1f} %")


if __name__ == "__main__":
    main()
