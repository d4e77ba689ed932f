"""CLIPScore of T2I-CompBench++ for non_spatial: the cosine between the embeddings of the image and of the prompt.

Source: CLIPScore_eval/CLIP_similarity.py of Karine-Huang/T2I-CompBench at 1b70949, which uses CLIP ViT-B/32 and neither scales
nor cuts the cosine. For complex, upstream leaves adjectives out of the text; this judge does not.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    workers,
)

if TYPE_CHECKING:
    import numpy as np


class ClipScoreJudge(CheckpointJudge):
    kind: Literal["clip-score"]


def cropped(image: np.ndarray, side: int) -> np.ndarray:
    """Return the image with its short side resized to `side` pixels (bicubic) and its centre cut out, as CLIP does."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(image).convert("RGB")
    short = min(picture.size)
    width, height = (side if edge == short else int(side * edge / short) for edge in picture.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


def open_clip(settings: ClipScoreJudge) -> Judge:
    """Load CLIP. The score is the cosine, or 0 where it is negative; the answer has the cosine itself."""
    import torch
    from transformers import CLIPModel

    tokenizer = load_tokenizer(settings.kind, settings.checkpoint)
    model = load_model(settings.kind, settings.checkpoint, settings.device, CLIPModel, ["clip"])
    device = device_of(settings.device)
    side, longest = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def judge_batch(items: Sequence[Item]) -> list[Verdict]:
        encoded = tokenizer([item.prompt["prompt"] for item in items], padding="longest", return_tensors="pt").to(device)
        if encoded.input_ids.shape[1] > longest:
            prompt = max((item.prompt["prompt"] for item in items), key=lambda text: len(tokenizer(text).input_ids))
            raise UserError(f"prompt {prompt!r}: more than {longest} tokens; the judge clip-score cannot read so long a prompt")
        pixels = normalised([cropped(item.image, side) for item in items]).to(device)
        images = model.get_image_features(pixel_values=pixels).pooler_output
        texts = model.get_text_features(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask).pooler_output
        cosines = torch.nn.functional.cosine_similarity(images, texts).tolist()
        return [settings.verdict(min(1.0, max(0.0, cosine)), f"cosine {cosine:.6f}") for cosine in cosines]

    @torch.inference_mode()
    def judge(items: Sequence[Item]) -> list[Verdict]:
        return [verdict for batch in planned(items, settings.batch_size) for verdict in judge_batch(batch)]

    return judge


CLIP_SCORE = JudgeKind(
    ClipScoreJudge,
    open_clip,
    files=lambda settings: checkpoint_files(settings.checkpoint),
    workers=workers,
    gpu=True,
    batch_size=64,
)
