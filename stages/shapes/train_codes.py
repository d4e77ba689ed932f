"""Step 1 of the tiny model: train its image tokenizer (`JanusVQVAE`) on rendered scenes.

    python -m stages.shapes.train_codes --out DIR

Training is supervised: code k represents tile k. The encoder learns to classify the tile of each cell (cross-entropy over the
cosine similarities to the codebook), and the decoder learns to draw it (squared error). transformers' `JanusVQVAE.forward` has
no straight-through estimator and so cannot train the encoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import nn
from transformers.models.janus.modeling_janus import JanusVQVAE

from stages.families.tools.allocation import keep_freed_memory
from stages.shapes import oracle
from stages.shapes.grammar import CATEGORIES, sample_scene, split_meanings
from stages.shapes.scenes import render
from stages.shapes.tiny_janus import make_config, make_processor

PEAK_RATE = 4e-3


def sample_grids(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return random scenes, int64 `[count, 4, 4]`: half of them of the pretraining split, the others dense and arbitrary.

    In the dense scenes every tile occurs beside every other.
    """
    grids = []
    for i in range(count):
        if i % 2:
            grids.append(rng.integers(0, 109, (4, 4)) * (rng.random((4, 4)) < 0.8))
        else:
            pool = split_meanings(CATEGORIES[rng.integers(len(CATEGORIES))], "pretraining")
            grids.append(sample_scene(pool[rng.integers(len(pool))], rng))
    return np.stack(grids).astype(np.int64)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """Return images, uint8 `[n, h, w, 3]`, as float32 `[n, 3, h, w]` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: torch.Tensor) -> np.ndarray:
    """Return the inverse of `to_pixels`, rounded and clipped."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def latents(model: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Return the latents of unit norm, float32 `[n, 4, 4, d]`."""
    return F.normalize(model.quant_conv(model.encoder(pixels)), dim=1).permute(0, 2, 3, 1)


@torch.no_grad()
def encode(model: JanusVQVAE, images: np.ndarray, batch: int = 256) -> np.ndarray:
    """Return the nearest codes by cosine similarity, int64 `[n, 16]`. Unlike transformers, upstream normalises the latents."""
    codes = []
    for start in range(0, len(images), batch):
        z = latents(model, to_pixels(images[start : start + batch]))
        codes.append((z @ F.normalize(model.quantize.embedding.weight, dim=1).T).argmax(-1).flatten(1))
    return torch.cat(codes).numpy()


def train(steps: int, batch: int, seed: int) -> JanusVQVAE:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = JanusVQVAE(make_config(make_processor()).vq_config)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # with the default standard deviation of 0.02 it barely trains
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.quantize.embedding.weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        grids = sample_grids(batch, rng)
        pixels = to_pixels(render(grids))
        codes = torch.from_numpy(grids)
        codebook = F.normalize(model.quantize.embedding.weight, dim=1)
        sharpness = 16.0
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast
            seen, drawn = latents(model, pixels), model.decode(codes.flatten(1))
        logits = sharpness * seen.float() @ codebook.T
        read = F.cross_entropy(logits.flatten(0, 2), codes.flatten())
        draw = F.mse_loss(drawn.float(), pixels)
        optimizer.zero_grad()
        (draw + 0.05 * read).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step} reconstruction {draw.item():.4f} codes {read.item():.4f}", flush=True)
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(F.normalize(model.quantize.embedding.weight, dim=1))
    return model.eval()


@torch.no_grad()
def round_trip(model: JanusVQVAE, count: int, seed: int) -> float:
    """Return the fraction of scenes that the oracle reads unchanged after encoding and decoding."""
    grids = sample_grids(count, np.random.default_rng(seed))
    codes = torch.from_numpy(encode(model, render(grids)))
    decoded = torch.cat([model.decode(part) for part in codes.split(256)])
    return float((oracle.read(to_images(decoded)) == grids).all((1, 2)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keep_freed_memory()
    model = train(arguments.steps, arguments.batch, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(arguments.out / "codes.safetensors"))
    print(f"fraction of scenes that the oracle reads unchanged: {round_trip(model, 1000, arguments.seed + 1):.4f}")


if __name__ == "__main__":
    main()
