"""CLIPScore of T2I-CompBench++ for non_spatial: the cosine between the embeddings of the image and of the prompt.

Source: CLIPScore_eval/CLIP_similarity.py of Karine-Huang/T2I-CompBench at 1b70949, which uses CLIP ViT-B/32 and neither scales
nor cuts the cosine. For complex, upstream leaves adjectives out of the text; this judge does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from stages.common.batches import planned
from stages.common.errors import UserError
from stages.judges.base import Item, Judge, JudgeKind, Verdict
from stages.judges.checkpoint import (
    CheckpointJudge,
    checkpoint_files,
    device_of,
    load_model,
    load_tokenizer,
    normalised,
    remedy_of,
    runs_on,
)

if TYPE_CHECKING:
    import numpy as np

MODELS = ("clip",)  # model_type


class ClipScoreJudge(CheckpointJudge):
    kind: Literal["clip-score"]


Cosines = Callable[[Sequence["np.ndarray"], Sequence[str]], list[float]]


def open_cosines(settings: CheckpointJudge, truncate: bool) -> tuple[Cosines, float]:
    """Load a CLIP: a function from images and as many texts to the cosine of each pair, and the scale of CLIP's logits.

    The function takes uint8 `[height, width, 3]` of any sizes, in batches of `batch_size`. truncate: whether a text that is too
    long is cut; otherwise it raises UserError. The scale is exp(logit_scale), about 100 in trained models.
    """
    import torch
    from transformers import CLIPModel

    from stages.families.tools.pictures import square

    remedy = remedy_of(settings.kind)
    tokenizer = load_tokenizer(settings.checkpoint, remedy)
    model = load_model(settings.checkpoint, remedy, settings.device, CLIPModel, MODELS)
    device = device_of(settings.device)
    side, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def of_batch(batch: Sequence[tuple[np.ndarray, str]]) -> list[float]:
        images, texts = zip(*batch, strict=True)
        cut = {"truncation": True, "max_length": longest} if truncate else {}
        encoded = tokenizer(list(texts), padding="longest", return_tensors="pt", **cut).to(device)
        if encoded.input_ids.shape[1] > longest:
            text = max(texts, key=lambda text: len(tokenizer(text).input_ids))
            raise UserError(
                f"prompt {text!r}: more than {longest} tokens; the judge {settings.kind} cannot read so long a prompt"
            )
        pixels = normalised([square(image[None], side)[0] for image in images]).to(device)
        seen = model.get_image_features(pixel_values=pixels).pooler_output
        read = model.get_text_features(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).pooler_output
        return torch.nn.functional.cosine_similarity(seen, read).tolist()

    @torch.inference_mode()
    def cosines(images: Sequence[np.ndarray], texts: Sequence[str]) -> list[float]:
        pairs = list(zip(images, texts, strict=True))
        return [cosine for batch in planned(pairs, settings.batch_size) for cosine in of_batch(batch)]

    return cosines, float(model.logit_scale.exp())


def open_clip(settings: ClipScoreJudge) -> Judge:
    """Load CLIP. The score is the cosine, or 0 where it is negative; the answer has the cosine itself."""
    cosines, _ = open_cosines(settings, truncate=False)

    def judge(items: Sequence[Item]) -> list[Verdict]:
        found = cosines([item.image for item in items], [item.prompt["prompt"] for item in items])
        return [settings.verdict(min(1.0, max(0.0, cosine)), f"cosine {cosine:.6f}") for cosine in found]

    return judge


def files(settings: CheckpointJudge) -> list[str]:
    """Return the files of the CLIP."""
    return checkpoint_files(settings.checkpoint, remedy_of(settings.kind), MODELS, tokenizer=True)


CLIP_SCORE = JudgeKind(
    ClipScoreJudge,
    open_clip,
    files=files,
    runs_on=runs_on,
    batch_size=64,
)
