"""A detector for spatial, 3d_spatial and numeracy of T2I-CompBench++, in the place of UniDet.

Source of the formulas: stages/judges/compbench_rules.py. Upstream detects with UniDet (722 labels) and estimates depth with
DPT-hybrid of MiDaS. This judge takes a detector of transformers and, for 3d_spatial, a DPT, so its scores are not those of
published tables and must not stand beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from stages.common.batches import planned
from stages.common.errors import UserError
from stages.common.settings import Share
from stages.judges import compbench_rules as rules
from stages.judges.base import Item, Judge, JudgeKind, Verdict
from stages.judges.checkpoint import (
    CheckpointJudge,
    checkpoint_files,
    device_of,
    load_model,
    normalised,
    remedy_of,
    workers,
)
from stages.judges.compbench_rules import Claim, Detection

if TYPE_CHECKING:
    import numpy as np

DETECTORS = ("d_fine", "rt_detr", "rt_detr_v2")  # they share their preprocessing and the meaning of their output
DEPTHS, DEPTH_REMEDY = ("dpt",), "set depth of the judge detector to the folder of another one, or remove it"
SIDE = 640  # pixels; these detectors see squares
SHORT, LONG = 479, 480  # pixels; upstream measures boxes in images of this size


class DetectorJudge(CheckpointJudge):
    kind: Literal["detector"]
    rules: Literal["mended", "upstream"] = Field(
        default="mended", description="Which formulas score spatial and 3d_spatial: mended, or upstream's with their faults."
    )
    detection_threshold: Share = Field(default=0.3, description="Objects are kept at this score or above. UniDet's was 0.1.")
    depth: str | None = Field(
        default=None,
        description="For 3d_spatial, the folder of a DPT such as Intel/dpt-hybrid-midas, whose large values are near.",
    )

    def outcome(self) -> dict[str, Any]:
        return {key: value for key, value in super().outcome().items() if key != "depth"}


def measured_size(height: int, width: int) -> tuple[int, int]:
    """Return the height and width in which boxes are measured: a short side of 479 pixels, and at most 480 in the long side."""
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    return round(height * scale), round(width * scale)


def detections_of(
    logits: np.ndarray, boxes: np.ndarray, labels: dict[int, str], size: tuple[int, int], least: float
) -> list[Detection]:
    """Return the detections of one image by falling score.

    logits: `[queries, classes]`. boxes: `[queries, 4]`, centre and size as shares of the image. size: height and width in
    pixels. As in transformers' own postprocessing, the best pairs of query and class count, as many as there are queries.
    """
    import numpy as np

    scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
    found = []
    for place in np.argsort(-scores, axis=None, kind="stable")[: len(logits)]:
        query, label = divmod(int(place), logits.shape[1])
        if scores[query, label] < least:
            break
        x, y, width, height = boxes[query].astype(np.float64) * (size[1], size[0], size[1], size[0])
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        x0, y0, x1, y1 = (float(min(max(0, edge), size[1 - axis % 2])) for axis, edge in enumerate(box))
        found.append(Detection(labels[label].lower(), float(scores[query, label]), (x0, y0, x1, y1)))
    return found


def score(item: Item, found: list[Detection], depth: np.ndarray | None, upstream: bool) -> float:
    """Return the score of an image under the rule of its prompt's category. Raises UserError where the prompt has no rule."""
    prompt, category = item.prompt["prompt"], item.prompt["category"]
    known = json.loads(item.prompt.get("metadata") or "{}")
    if category == "numeracy" and known.get("counts"):
        return rules.numeracy(found, [(number, name) for number, name in known["counts"]])
    if category in ("spatial", "complex") and "relation" in known:
        claim = Claim(known["first"], known["relation"], known["second"])
        return (rules.spatial_upstream if upstream else rules.spatial)(found, claim)
    if category == "3d_spatial" and "relation" in known:
        if depth is None:
            raise UserError(f"prompt {prompt!r}: 3d_spatial needs a depth model; set depth of the judge detector")
        return (rules.spatial_3d_upstream if upstream else rules.spatial_3d)(found, Claim(**known), depth)
    raise UserError(
        f"prompt {prompt!r} of category {category}: the judge detector scores spatial, 3d_spatial and numeracy, and "
        "the relations of complex, of source t2i-compbench; name it in scorers for these categories only"
    )


def open_detector(settings: DetectorJudge) -> Judge:
    """Load the detector and the depth model. The answer lists the detections as JSON: [label, score, [x0, y0, x1, y1]]."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForDepthEstimation, AutoModelForObjectDetection

    device = device_of(settings.device)
    remedy = remedy_of(settings.kind)
    model = load_model(settings.checkpoint, remedy, settings.device, AutoModelForObjectDetection, DETECTORS)
    deep = None
    if settings.depth is not None:
        deep = load_model(settings.depth, DEPTH_REMEDY, settings.device, AutoModelForDepthEstimation, DEPTHS)

    def squeezed(image: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(image).convert("RGB").resize((side, side), how))

    def depth_of(item: Item, size: tuple[int, int]) -> np.ndarray | None:
        """Return the depth `[height, width]` from 0 (far) to 1 (near) in the size in which boxes are measured."""
        if deep is None or item.prompt["category"] != "3d_spatial":
            return None
        side = deep.config.image_size
        pixels = normalised([squeezed(item.image, side, Image.Resampling.BICUBIC)], [0.5] * 3, [0.5] * 3).to(device)
        depth = deep(pixel_values=pixels).predicted_depth
        depth = (depth - depth.min()) / (depth.max() - depth.min()).clamp_min(1e-12)
        resized = torch.nn.functional.interpolate(depth[None], size=size, mode="bilinear", align_corners=True)
        return resized[0, 0].cpu().numpy()

    def judge_batch(items: Sequence[Item]) -> list[Verdict]:
        squares = [squeezed(item.image, SIDE, Image.Resampling.BILINEAR) for item in items]
        output = model(pixel_values=normalised(squares, [0.0] * 3, [1.0] * 3).to(device))
        logits, boxes = output.logits.cpu().numpy(), output.pred_boxes.cpu().numpy()
        verdicts = []
        for place, item in enumerate(items):
            size = measured_size(*item.image.shape[:2])
            found = detections_of(logits[place], boxes[place], model.config.id2label, size, settings.detection_threshold)
            listed = [[one.label, round(one.score, 3), [round(edge) for edge in one.box]] for one in found]
            graded = score(item, found, depth_of(item, size), settings.rules == "upstream")
            verdicts.append(settings.verdict(graded, json.dumps(listed, separators=(",", ":"))))
        return verdicts

    @torch.inference_mode()
    def judge(items: Sequence[Item]) -> list[Verdict]:
        return [verdict for batch in planned(items, settings.batch_size) for verdict in judge_batch(batch)]

    return judge


def files(settings: DetectorJudge) -> list[str]:
    """Return the files of both checkpoints."""
    found = checkpoint_files(settings.checkpoint, remedy_of(settings.kind), DETECTORS)
    return found + (checkpoint_files(settings.depth, DEPTH_REMEDY, DEPTHS) if settings.depth else [])


DETECTOR = JudgeKind(DetectorJudge, open_detector, files=files, workers=workers, gpu=True, batch_size=64)
