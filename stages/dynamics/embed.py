"""Embeddings of prompts and images, from which the paper's proxies of the kernel are computed: for models of any size.

    python -m stages.dynamics.embed --config config.yaml --prompts prompts/*.parquet --candidates base/candidates/*/*.parquet \\
        --pairs sft/pairs.parquet --checkpoint models/tiny-janus --shard 0/2 --out embeddings/0000.parquet

With --pairs, only candidates that these pairs choose are taken from manifests that the pairs refer to; without, all. Sources:

model   the model's own hidden states before its image head, for families with `TokenRows` or `mean_states`: the mean over the
        prompt's tokens, and the mean over the image's tokens in the row without a prompt, so that it does not contain the
        prompt. Where masks are drawn, they are the same DRAWS for all images, and the means over them are taken
clip    CLIP's embeddings, where dynamics.clip names a checkpoint
pixels  the image at 16 x 16 pixels, its mean subtracted; there is no such embedding of a prompt

All have length 1. Forward passes only, no gradients. Finished batches are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests, shards
from stages.common.batches import planned
from stages.common.candidates import Candidates
from stages.common.config import Config, load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.seeds import hash_seed
from stages.dynamics.command import write_batches
from stages.dynamics.items import shard_of
from stages.families import checkpoint_hash, describe, model_facts

Row = dict[str, Any]
SIDE = 16  # pixels
CLIP_REMEDY = "give the folder of a CLIP checkpoint as dynamics.clip"
DRAWS = 4  # of what a family without tokens in order draws for a row
Embedder = Callable[[list[str], list[str], np.ndarray], tuple[np.ndarray | None, np.ndarray]]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors `[n, d]` with length 1."""
    return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def pixels(names: list[str], texts: list[str], images: np.ndarray) -> tuple[None, np.ndarray]:
    from PIL import Image

    small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE)), dtype=np.float64).ravel() for image in images]
    return None, unit(np.stack([values - values.mean() for values in small]))


def by_draws(family: Any, candidates: Candidates) -> Embedder:
    """Return an embedder by `Family.mean_states`."""

    def embed(names: list[str], texts: list[str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pictures = candidates.pictures(names)
        seeds = [np.full(len(texts), hash_seed("embedding", draw), dtype=np.int64) for draw in range(DRAWS)]
        found = [family.mean_states(texts, pictures, equal) for equal in seeds]
        read, drawn = (np.mean(states, axis=0) for states in zip(*found, strict=True))
        return unit(read), unit(drawn)

    return embed


def own_states(config: Config, checkpoint: Path, candidates: Candidates) -> Embedder | None:
    """Return an embedder by the model's hidden states, or None for a family without tokens and `mean_states`."""
    import torch

    from stages.families import open_family

    family = open_family(config.model, checkpoint, "train")
    view = family.training_view()
    view.model.eval()
    if view.token_rows is None:
        return by_draws(family, candidates) if hasattr(family, "mean_states") else None
    rows, device = view.token_rows, next(view.model.parameters()).device

    def mean_state(ids: list[int], places: slice) -> np.ndarray:
        states = view.model.base_model(input_ids=torch.tensor([ids], device=device)).last_hidden_state
        return states[0, places].double().mean(0).cpu().numpy()

    @torch.no_grad()
    def embed(names: list[str], texts: list[str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prompts, pictures = [], []
        for prompt, image in rows.ids(texts, candidates.pictures(names)):
            prompts.append(mean_state(prompt, slice(None)))
            pictures.append(mean_state([*rows.unconditional(prompt), *image], slice(-len(image), None)))
        return unit(np.stack(prompts)), unit(np.stack(pictures))

    return embed


def clip_files(folder: str) -> list[str]:
    """Return the files of a CLIP checkpoint, on which its embeddings depend. Raises UserError on a folder without one."""
    from stages.judges.checkpoint import checkpoint_files
    from stages.judges.clip_score import MODELS

    return checkpoint_files(folder, CLIP_REMEDY, MODELS, tokenizer=True)


def clip(folder: str, device: str) -> Embedder:
    """Return an embedder by a CLIP checkpoint."""
    import torch
    from transformers import CLIPModel

    from stages.families.tools.pictures import square
    from stages.judges.checkpoint import device_of, load_model, load_tokenizer, normalised
    from stages.judges.clip_score import MODELS

    tokenizer, model = load_tokenizer(folder, CLIP_REMEDY), load_model(folder, CLIP_REMEDY, device, CLIPModel, MODELS)
    longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def embed(names: list[str], texts: list[str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        encoded = tokenizer(texts, padding="longest", truncation=True, max_length=longest, return_tensors="pt")
        read = model.get_text_features(**encoded.to(device_of(device))).pooler_output
        side = model.config.vision_config.image_size
        shown = normalised(list(square(images, side))).to(device_of(device))
        seen = model.get_image_features(pixel_values=shown).pooler_output
        return unit(read.float().cpu().numpy()), unit(seen.float().cpu().numpy())

    return embed


def embedded(embedders: dict[str, Embedder], prompts: dict[str, Row], batch: Sequence[tuple[Path, Row]]) -> list[Row]:
    """Return the rows of the embeddings manifest for a batch of candidates with their manifests."""
    images = np.concatenate([shards.read_images(path, [row]) for path, row in batch])
    names, texts = [row["candidate_id"] for _, row in batch], [prompts[row["prompt_id"]]["prompt"] for _, row in batch]
    found = []
    for source, embed in embedders.items():
        read, seen = embed(names, texts, images)
        for place, (_, row) in enumerate(batch):
            ids = {"candidate_id": row["candidate_id"], "prompt_id": row["prompt_id"], "source": source}
            found.append({**ids, "prompt": None if read is None else read[place], "image": seen[place]})
    return found


def wanted_candidates(paths: Sequence[Path], pairs: Sequence[Path]) -> list[tuple[Path, Row]]:
    """Return candidates with their manifests: those that pairs choose, and all of manifests that no pair refers to."""
    chosen = {row["chosen"] for row in manifests.read_rows(pairs, "pairs")}
    found = []
    for path in paths:
        rows = manifests.read_rows(path, "candidates", without=("tokens", "latents"))
        trained = [row for row in rows if row["candidate_id"] in chosen]
        found += [(path, row) for row in trained or rows]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="prompts of all candidates")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--pairs", type=Path, nargs="*", default=[], help="pairs manifests; see above")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model that embeds")
    parser.add_argument("--shard", default="0/1", help="which of how many shards of the candidates")
    parser.add_argument("--out", type=Path, required=True, help="manifest of the embeddings")
    arguments = parser.parse_args()
    config = load(arguments.config)
    family = config.model.family
    prompts = {row["prompt_id"]: row for path in arguments.prompts for row in manifests.read_rows(path, "prompts")}
    mine = shard_of(wanted_candidates(arguments.candidates, arguments.pairs), arguments.shard)
    candidates = Candidates(arguments.candidates, {row["candidate_id"] for _, row in mine}, describe(family))
    embedders: dict[str, Embedder | None] = {"model": own_states(config, arguments.checkpoint, candidates), "pixels": pixels}
    if config.dynamics.clip:
        embedders["clip"] = clip(config.dynamics.clip, config.model.device)
    known = {source: embed for source, embed in embedders.items() if embed is not None}
    uses = [entry("FAMILIES", family)]
    facts = {
        "checkpoint": checkpoint_hash(family, arguments.checkpoint, "train"),
        "clip": [manifests.content_hash(Path(file)) for file in clip_files(config.dynamics.clip)]
        if config.dynamics.clip
        else None,
    }
    parents = [*arguments.prompts, *arguments.candidates, *arguments.pairs]
    key = ("dynamics embeddings", code("stages.dynamics.embed", mentioned=uses), facts, arguments.shard,
           model_facts(config.model, arguments.checkpoint), config.seed, config.score.batch_size,
           *map(manifests.content_hash, parents))  # fmt: skip
    print(f"{len(mine)} images by {', '.join(known)}: for each at most {2 * DRAWS} forward passes, no gradients", flush=True)
    batches = planned(mine, config.score.batch_size)
    work = partial(embedded, known, prompts)
    write_batches(arguments.out, "dynamics_embeddings", key, batches, work, "embeddings",
                  stage="stages.dynamics.embed", settings=facts, parents=parents, uses=uses)  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
