"""The registered kinds of external judges, by the name used in `kind` of the section `judges`.

To add a judge, write its module and add a line here: see docs/extending.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.common.registry import resolve

if TYPE_CHECKING:
    from stages.judges.base import JudgeKind

JUDGES = {
    "shapes": "stages.judges.shapes:SHAPES",
    "table": "stages.judges.table:TABLE",
    "family": "stages.judges.family:FAMILY",
    "geneval-hf": "stages.judges.geneval:GENEVAL",
    "vlm": "stages.judges.vlm:VLM",
    "openai": "stages.judges.endpoint:OPENAI",
    "blip-vqa": "stages.judges.blip_vqa:BLIP_VQA",
    "clip-score": "stages.judges.clip_score:CLIP_SCORE",
    "sci-score": "stages.judges.sci_score:SCI_SCORE",
    "detector": "stages.judges.detector:DETECTOR",
    "three-in-one": "stages.judges.three_in_one:THREE_IN_ONE",
}


def judge_kind(kind: str) -> JudgeKind:
    """Return a registered kind of judge."""
    return resolve(JUDGES[kind])
