"""3-in-1 of T2I-CompBench++ for complex: the mean of what blip-vqa, detector and clip-score say, as the prompt's kind asks.

Source: 3_in_1_eval/3_in_1.py of Karine-Huang/T2I-CompBench at 1b70949. Upstream joins its three tables by the position of rows;
here each judge looks at the image itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.common.registry import entry
from stages.common.settings import Share
from stages.judges import blip_vqa, checkpoint, clip_score, detector
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict
from stages.judges.compbench_rules import three_in_one


class ThreeInOneJudge(JudgeSettings):
    kind: Literal["three-in-one"]
    attributes: blip_vqa.BlipVqaJudge = Field(description="The judge of the attributes, of kind blip-vqa.")
    relation: detector.DetectorJudge = Field(description="The judge of the spatial relation, of kind detector.")
    action: clip_score.ClipScoreJudge = Field(description="The judge of the action, of kind clip-score.")
    threshold: Share | None = Field(
        default=None,
        description="An image matches at this score or above. Empty: the judge only grades, which suffices for Gen.",
    )

    def outcome(self) -> dict[str, Any]:
        parts = {"attributes": self.attributes, "relation": self.relation, "action": self.action}
        own = {"kind": self.kind, "threshold": self.threshold}
        return own | {name: part.outcome() for name, part in parts.items()}


def kind_of(item: Item) -> str:
    """Return spatial, action or both, from the metadata of a prompt of complex."""
    kind = json.loads(item.prompt.get("metadata") or "{}").get("kind")
    if kind is None:
        raise UserError(
            f"prompt {item.prompt['prompt']!r}: the judge three-in-one scores only complex of source t2i-compbench; "
            "name it in scorers for this category"
        )
    return kind


def open_three(settings: ThreeInOneJudge) -> Judge:
    """Load all three judges. The answer has the scores that are averaged."""
    attributes = blip_vqa.open_blip(settings.attributes)
    relation = detector.open_detector(settings.relation)
    action = clip_score.open_clip(settings.action)

    def scores(judge: Judge, items: Sequence[Item], wanted: Sequence[bool]) -> list[float | None]:
        """Return a judge's scores of the wanted items, and None for the others and for unreadable ones."""
        found = iter(judge([item for item, want in zip(items, wanted, strict=True) if want]) if any(wanted) else ())
        return [next(found).score if want else None for want in wanted]

    def judge(items: Sequence[Item]) -> list[Verdict]:
        kinds = [kind_of(item) for item in items]
        columns = (
            scores(attributes, items, [True] * len(items)),
            scores(relation, items, [kind != "action" for kind in kinds]),
            scores(action, items, [kind != "spatial" for kind in kinds]),
        )
        return [verdict(kind, *parts) for kind, *parts in zip(kinds, *columns, strict=True)]

    def verdict(kind: str, attribute: float | None, position: float | None, cosine: float | None) -> Verdict:
        if attribute is None:
            return Verdict(None, answer="the prompt has no noun phrase")
        score = three_in_one(kind, attribute, position or 0.0, cosine or 0.0)  # those of other kinds have no weight
        parts = {"attributes": attribute, "relation": position, "action": cosine}
        told = "; ".join(f"{name} {value:.4f}" for name, value in parts.items() if value is not None)
        return Verdict(None if settings.threshold is None else score >= settings.threshold, score, f"{kind}: {told}")

    return judge


def files(settings: ThreeInOneJudge) -> list[str]:
    """Return the files of all three judges."""
    return [
        *blip_vqa.BLIP_VQA.files(settings.attributes),
        *detector.DETECTOR.files(settings.relation),
        *clip_score.CLIP_SCORE.files(settings.action),
    ]


THREE_IN_ONE = JudgeKind(
    ThreeInOneJudge,
    open_three,
    files=files,
    uses=lambda settings: [entry("JUDGES", kind) for kind in ("blip-vqa", "detector", "clip-score")],
    workers=lambda settings: checkpoint.workers(settings.attributes),
    gpu=True,
    batch_size=64,
)
