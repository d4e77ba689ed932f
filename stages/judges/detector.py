"""A detector for spatial, 3d_spatial and numeracy of T2I-CompBench++, in the place of UniDet.

Source of the formulas: stages/judges/compbench_rules.py. Upstream detects with UniDet (722 labels) and estimates depth with
DPT-hybrid of MiDaS. This judge takes a detector of transformers and, for 3d_spatial, a DPT or a Depth Anything, so its scores
are not those of published tables and must not stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
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
    runs_on,
)
from stages.judges.compbench_rules import Claim, Detection

if TYPE_CHECKING:
    import numpy as np

DETECTORS = ("d_fine", "rt_detr", "rt_detr_v2")  # they share their preprocessing and the meaning of their output
DEPTHS = ("dpt", "depth_anything")  # both give relative inverse depth, in which large values are near
DEPTH_REMEDY = "set depth of the judge detector to the folder of another one, or remove it"
NO_CLAIM = "the prompt claims no relation or number that the judge detector can measure"
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
        description="For 3d_spatial, the folder of a DPT such as Intel/dpt-hybrid-midas, or of a Depth Anything of relative "
        "depth such as depth-anything/Depth-Anything-V2-Small-hf. Their large values are near.",
    )

    def outcome(self) -> dict[str, Any]:
        return {key: value for key, value in super().outcome().items() if key != "depth"}

    def stands_in(self) -> str:
        return "a detector of transformers, in the place of UniDet, and its depth model in that of MiDaS"


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


def score(row: dict[str, Any], found: Sequence[Detection], upstream: bool) -> float | None:
    """Return the score of an image under the rule of its prompt's category. Raises UserError where the category has no rule.

    It is None where a prompt of these categories is outside their templates, so that its metadata has no relation or counts.
    row: the prompt's, with prompt, category and metadata. For 3d_spatial, the detections have their depth.
    """
    prompt, category = row["prompt"], row["category"]
    known = json.loads(row.get("metadata") or "{}")
    if category == "numeracy" and known.get("counts"):
        return rules.numeracy(found, [(number, name) for number, name in known["counts"]])
    if category in ("spatial", "complex") and "relation" in known:
        claim = Claim(known["first"], known["relation"], known["second"])
        return (rules.spatial_upstream if upstream else rules.spatial)(found, claim)
    if category == "3d_spatial" and "relation" in known:
        return (rules.spatial_3d_upstream if upstream else rules.spatial_3d)(found, Claim(**known))
    if category in ("numeracy", "spatial", "complex", "3d_spatial"):
        return None  # an error would end the job after everything has been drawn
    raise UserError(
        f"prompt {prompt!r} of category {category}: the judge detector scores spatial, 3d_spatial and numeracy, and "
        "the relations of complex, of source t2i-compbench; name it in scorers for these categories only"
    )


def to_rows(detections: Sequence[Detection], deep: bool) -> list[list[Any]]:
    """Return what an answer keeps of the detections: [label, score, [x0, y0, x1, y1]], and with `deep` both mean depths.

    Scores and depths have six decimals, edges two. A depth is None where the box has no pixel.
    """

    def mean(depth: float) -> float | None:
        return None if math.isnan(depth) else round(depth, 6)

    return [
        [
            one.label,
            round(one.score, 6),
            [round(edge, 2) for edge in one.box],
            *map(mean, (one.depth, one.swapped) if deep else ()),
        ]
        for one in detections
    ]


def from_rows(rows: Any) -> list[Detection]:
    """Return the detections of `to_rows`. Raises ValueError on anything else."""
    try:
        return [
            Detection(label, float(chance), tuple(box), *(math.nan if mean is None else float(mean) for mean in depths))
            for label, chance, box, *depths in rows
        ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"not an answer of the judge detector ({error})") from None


def from_answer(settings: DetectorJudge, row: dict[str, Any], answer: str) -> Verdict:
    """Return the verdict of these settings on the detections that an earlier verdict of the same detector lists.

    row: the prompt's. No model is loaded. Raises ValueError on text of another form, and where 3d_spatial has no depth.
    """
    if answer == NO_CLAIM:
        return Verdict(None, answer=answer)
    rows = json.loads(answer)
    found = from_rows(rows)
    if row["category"] == "3d_spatial" and any(len(one) != 5 for one in rows):
        raise ValueError("an answer of the judge detector without the depth that 3d_spatial needs")
    measured = score(row, found, settings.rules == "upstream")
    return Verdict(None, answer=NO_CLAIM) if measured is None else settings.verdict(measured, answer)


def open_detector(settings: DetectorJudge) -> Judge:
    """Load the detector and the depth model. The answer lists the detections as JSON (`to_rows`), by falling score.

    The score is computed from the answer, so `from_answer` repeats it exactly. A prompt outside its category's template has no
    verdict, and NO_CLAIM as answer.
    """
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoModelForDepthEstimation, AutoModelForObjectDetection

    device = device_of(settings.device)
    remedy = remedy_of(settings.kind)
    model = load_model(settings.checkpoint, remedy, settings.device, AutoModelForObjectDetection, DETECTORS)
    deep = None
    if settings.depth is not None:
        depth_files(settings.depth)
        deep = load_model(settings.depth, DEPTH_REMEDY, settings.device, AutoModelForDepthEstimation, DEPTHS)

    def squeezed(image: np.ndarray, side: int, how: Image.Resampling) -> np.ndarray:
        return np.asarray(Image.fromarray(image).convert("RGB").resize((side, side), how))

    def depth_of(item: Item, size: tuple[int, int]) -> np.ndarray | None:
        """Return the depth `[height, width]` from 0 (far) to 1 (near) in the size in which boxes are measured."""
        if item.prompt["category"] != "3d_spatial":
            return None
        if deep is None:
            raise UserError(
                f"prompt {item.prompt['prompt']!r}: 3d_spatial needs a depth model; set depth of the judge detector"
            )
        side, statistics = seen_by(deep.config)
        pixels = normalised([squeezed(item.image, side, Image.Resampling.BICUBIC)], *statistics).to(device)
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
            depth = depth_of(item, size)
            rows = to_rows(found if depth is None else rules.with_depth(found, depth), depth is not None)
            verdicts.append(from_answer(settings, item.prompt, json.dumps(rows, separators=(",", ":"))))
        return verdicts

    @torch.inference_mode()
    def judge(items: Sequence[Item]) -> list[Verdict]:
        return [verdict for batch in planned(items, settings.batch_size) for verdict in judge_batch(batch)]

    return judge


def seen_by(config: Any) -> tuple[int, tuple[list[float], list[float]]]:
    """Return the side of the square that a depth model sees, in pixels, and the mean and deviation of its pixels from 0 to 1.

    They are those of the released checkpoints' image processors: 0.5 for DPT, ImageNet's for Depth Anything.
    """
    if config.model_type == "dpt":
        return config.image_size, ([0.5] * 3, [0.5] * 3)
    return config.backbone_config.image_size, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def depth_files(folder: str) -> list[str]:
    """Return the files of a depth model. Raises UserError on another model, and on one whose large values are far."""
    found = checkpoint_files(folder, DEPTH_REMEDY, DEPTHS)
    if json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("depth_estimation_type") == "metric":
        raise UserError(f"{folder}/config.json: a model of metric depth, whose large values are far; {DEPTH_REMEDY}")
    return found


def files(settings: DetectorJudge) -> list[str]:
    """Return the files of both checkpoints."""
    found = checkpoint_files(settings.checkpoint, remedy_of(settings.kind), DETECTORS)
    return found + (depth_files(settings.depth) if settings.depth else [])


DETECTOR = JudgeKind(
    DetectorJudge,
    open_detector,
    files=files,
    runs_on=runs_on,
    batch_size=64,
    from_answer=from_answer,
)
