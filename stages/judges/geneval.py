"""GenEval with models of transformers: Mask2Former finds the objects, CLIP names their colors, and GenEval's rules decide.

The rules are upstream's (`stages.judges.geneval_rules`). The weights of the detector are not: upstream uses those of mmdet 2.x.
So the judge is called geneval-hf, and its numbers should be compared only with each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from stages.common.batches import planned
from stages.common.errors import UserError
from stages.common.settings import Device, Positive
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict
from stages.judges.checkpoint import checkpoint_files, device_of, load_model, load_processor, load_tokenizer, runs_on
from stages.judges.geneval_rules import (
    CLASSES,
    COLORS,
    MINIMUM_SCORE,
    Detection,
    Metadata,
    evaluate,
    read_metadata,
    strongest,
    with_colors,
)

if TYPE_CHECKING:
    import torch

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
DETECTOR_REMEDY = f"set detector of the judge geneval-hf to a whole local folder of {DETECTOR}"
CLIP_REMEDY = f"set clip of the judge geneval-hf to a whole local folder of {CLIP}"
# How upstream asks for a color: the mean over these prompts (evaluation/evaluate_images.py).
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = 0x99  # the gray that replaces everything outside an object before its color is asked


class GenevalJudge(JudgeSettings):
    kind: Literal["geneval-hf"]
    detector: str = Field(
        description=f"The folder of a Mask2Former checkpoint for instances, such as {DETECTOR}. Only safetensors are read."
    )
    clip: str = Field(description=f"The folder of the CLIP checkpoint that names colors, such as {CLIP}.")
    device: Device = Field(
        default="auto", description="auto, cpu, cuda, or one device such as cuda:0. auto takes a GPU where there is one."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="The type of weights and activations. bfloat16 moves scores a little, so objects near a threshold change.",
    )
    batch_size: Positive = Field(default=16, description="Images in which objects are searched together. It changes no result.")
    workers: Positive | None = Field(
        default=None,
        description="How many processes share the batches of one shard, one GPU each. Empty: one for each visible GPU.",
    )

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(include={"kind", "dtype"})

    def stands_in(self) -> str:
        return "GenEval's rules on Mask2Former of transformers, in the place of mmdet's, which has other weights"


# The verdict


def open_geneval(settings: GenevalJudge) -> Judge:
    """Load both models. Scores are those of Mask2Former's post-processing: class probability times mean mask probability.

    The verdict's reason is the kind of the first clause that does not hold, and its answer is `to_answer` of what was found.
    """
    device = device_of(settings.device)
    detect = open_detector(settings.detector, device, settings.dtype)
    colors = open_colors(settings.clip, device, settings.dtype)

    def judge(items: Sequence[Item]) -> list[Verdict]:
        asked = [metadata_of(item) for item in items]
        verdicts = []
        for batch in planned(list(zip(asked, items, strict=True)), settings.batch_size):
            found = detect(np.stack([item.image for _, item in batch]))
            verdicts += [one(metadata, item.image, *objects) for (metadata, item), objects in zip(batch, found, strict=True)]
        return verdicts

    def one(asked: Metadata, image: np.ndarray, detections: list[Detection], masks: np.ndarray) -> Verdict:
        def classify(indices: list[int]) -> list[str]:
            crops = [cut_out(image, masks[index], detections[index].box) for index in indices]
            return colors(crops, [detections[index].name for index in indices])

        return verdict(asked, with_colors(asked, detections, classify))

    return judge


def metadata_of(item: Item) -> Metadata:
    """Return what the item's prompt asks for."""
    try:
        return read_metadata(item.prompt.get("metadata"))
    except ValueError as error:
        raise UserError(
            f"prompt {item.prompt['prompt']!r}: {error}; the judge geneval-hf needs prompts with GenEval's metadata, as from "
            "source geneval"
        ) from None


def verdict(asked: Metadata, detections: Sequence[Detection]) -> Verdict:
    """Return the verdict of GenEval's rules on what was found, with the colors that the prompt asks about."""
    failures = evaluate(asked, detections)
    return Verdict(not failures, answer=to_answer(detections), reason=failures[0].kind if failures else None)


def to_answer(detections: Sequence[Detection]) -> str:
    """Return the detections as JSON, by falling score: a list of objects with class, score, box and, if it was asked, color.

    Scores are rounded up to four digits. So a score above a threshold of at most four digits stays above it, and one at or
    below it stays there, which rounding to the nearest does not ensure. Scores that become equal keep their order.
    """
    rows = []
    for found in sorted(detections, key=lambda found: -found.score):
        score = -(-round(found.score * 1e6) // 100) / 1e4  # the post-processing gives six digits; in whole numbers it is exact
        row = {"class": found.name, "score": score, "box": found.box}
        rows.append(row | ({"color": found.color} if found.color else {}))
    return json.dumps(rows, separators=(",", ":"))


# The models


def open_detector(folder: str, device: str, dtype: str) -> Callable[[np.ndarray], list[tuple[list[Detection], np.ndarray]]]:
    """Load the detector: a function from images, uint8 `[n, height, width, 3]`, to the objects in each of them.

    It returns detections in the order of CLASSES and by falling score, and their masks, bool `[n, height, width]`. Masks are
    predicted at the size that the checkpoint's image processor demands and enlarged to the image; a box just encloses its mask.
    """
    import torch
    import torch.nn.functional as F
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput as Output

    model = load_model(folder, DETECTOR_REMEDY, device, Mask2FormerForUniversalSegmentation, ("mask2former",), dtype)
    processor = load_processor(folder, DETECTOR_REMEDY, Mask2FormerImageProcessorPil)
    labels = [label.lower() for _, label in sorted(model.config.id2label.items())]
    if len(labels) != len(CLASSES) or (labels[0], labels[-1]) != (CLASSES[0], CLASSES[-1]):
        raise UserError(
            f"{folder}/config.json: {len(labels)} classes from {labels[0]} to {labels[-1]}, not the {len(CLASSES)} of COCO's "
            f"instances; {DETECTOR_REMEDY}"
        )

    @torch.inference_mode()
    def detect(images: np.ndarray) -> list[tuple[list[Detection], np.ndarray]]:
        # Images of one size are not padded unless pad_size demands it, so the masks cover exactly the image.
        inputs = processor(list(images), input_data_format="channels_last", pad_size=None, return_tensors="pt")
        output = model(pixel_values=inputs["pixel_values"].to(device, model.dtype))
        # On the CPU, where the post-processing creates its maps.
        classes, masks = (logits.float().cpu() for logits in (output.class_queries_logits, output.masks_queries_logits))
        found = processor.post_process_instance_segmentation(
            Output(class_queries_logits=classes, masks_queries_logits=masks), threshold=MINIMUM_SCORE, return_binary_maps=True
        )
        return [objects(one, images.shape[1:3]) for one in found]

    def objects(found: dict[str, Any], size: tuple[int, int]) -> tuple[list[Detection], np.ndarray]:
        segments = found["segments_info"]
        if not segments:  # then there is no stack of masks
            return [], np.zeros((0, *size), bool)
        # Only of objects above the threshold; the post-processing itself would enlarge all its hundred masks.
        masks = F.interpolate(found["segmentation"][None], size=size, mode="nearest")[0].bool().numpy()
        visible = [index for index, mask in enumerate(masks) if mask.any()]
        boxed = [
            Detection(CLASSES[segments[index]["label_id"]], segments[index]["score"], box_of(masks[index])) for index in visible
        ]
        order = [index for name in CLASSES for index in strongest(boxed, name, MINIMUM_SCORE)]
        return [boxed[index] for index in order], masks[[visible[index] for index in order]]

    return detect


def open_colors(folder: str, device: str, dtype: str) -> Callable[[Sequence[np.ndarray], Sequence[str]], list[str]]:
    """Load CLIP: a function from pictures of objects, uint8 `[height, width, 3]` of any size, and their classes to colors."""
    import torch
    import torch.nn.functional as F
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = load_model(folder, CLIP_REMEDY, device, CLIPModel, ("clip",), dtype)
    processor = load_processor(folder, CLIP_REMEDY, CLIPImageProcessorPil)
    tokenizer = load_tokenizer(folder, CLIP_REMEDY, CLIPTokenizer)
    known: dict[str, torch.Tensor] = {}

    def colors_of(kind: str) -> torch.Tensor:
        """Return the unit vectors of all colors of a class, float32 `[colors, width]`."""
        if kind not in known:
            texts = [prompt.format(color=color, name=kind) for color in COLORS for prompt in COLOR_PROMPTS]
            tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device)
            units = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
            known[kind] = F.normalize(units.view(len(COLORS), len(COLOR_PROMPTS), -1).mean(1), dim=-1)
        return known[kind]

    @torch.inference_mode()
    def classify(pictures: Sequence[np.ndarray], names: Sequence[str]) -> list[str]:
        inputs = processor(list(pictures), input_data_format="channels_last", return_tensors="pt")
        features = model.get_image_features(pixel_values=inputs["pixel_values"].to(device, model.dtype)).pooler_output.float()
        # The cosine has the same order as the product with the picture's vector of any length.
        return [COLORS[int((colors_of(name) @ vector).argmax())] for name, vector in zip(names, features, strict=True)]

    return classify


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box that just encloses a mask `[height, width]`: (x0, y0, x1, y1) with the maxima + 1, as upstream's mmdet."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1


def cut_out(image: np.ndarray, mask: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Return the box of an image `[height, width, 3]` with everything outside the mask `[height, width]` in gray."""
    x0, y0, x1, y1 = map(int, box)
    return np.where(mask[..., None], image, np.uint8(BACKGROUND))[y0:y1, x0:x1]


def files(settings: GenevalJudge) -> list[str]:
    """Return the files of both checkpoints."""
    return [
        *checkpoint_files(settings.detector, DETECTOR_REMEDY, ("mask2former",), processor=True),
        *checkpoint_files(settings.clip, CLIP_REMEDY, ("clip",), tokenizer=True, processor=True),
    ]


GENEVAL = JudgeKind(
    GenevalJudge,
    open_geneval,
    files=files,
    runs_on=runs_on,
    batch_size=64,
)
