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
from stages.common.settings import Model, Share
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

    def stands_in(self) -> str:
        return "its relation comes from a detector of transformers, in the place of UniDet"


NO_PHRASE = "the prompt has no noun phrase"


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
    """Load all three judges. The answer is JSON with the kind of the prompt, the scores that are averaged and the detections.

    The score is computed from the answer, so `from_answer` repeats it exactly.
    """
    attributes = blip_vqa.open_blip(settings.attributes)
    relation = detector.open_detector(settings.relation)
    action = clip_score.open_clip(settings.action)

    def verdicts(judge: Judge, items: Sequence[Item], wanted: Sequence[bool]) -> list[Verdict | None]:
        """Return a judge's verdicts on the wanted items, and None for the others."""
        found = iter(judge([item for item, want in zip(items, wanted, strict=True) if want]) if any(wanted) else ())
        return [next(found) if want else None for want in wanted]

    def judge(items: Sequence[Item]) -> list[Verdict]:
        kinds = [kind_of(item) for item in items]
        columns = (
            verdicts(attributes, items, [True] * len(items)),
            verdicts(relation, items, [kind != "action" for kind in kinds]),
            verdicts(action, items, [kind != "spatial" for kind in kinds]),
        )
        return [verdict(item, kind, *parts) for item, kind, *parts in zip(items, kinds, *columns, strict=True)]

    def verdict(item: Item, kind: str, seen: Verdict | None, found: Verdict | None, cosine: Verdict | None) -> Verdict:
        if seen is None or seen.score is None:
            return from_answer(settings, item.prompt, NO_PHRASE)
        if found is not None and found.score is None:
            return from_answer(settings, item.prompt, detector.NO_CLAIM)
        parts: dict[str, Any] = {"kind": kind, "attributes": seen.score}
        if cosine is not None and cosine.score is not None:
            parts["action"] = round(cosine.score, 6)
        if found is not None:
            parts["detections"] = json.loads(found.answer or "[]")
        return from_answer(settings, item.prompt, json.dumps(parts))

    return judge


def from_answer(settings: ThreeInOneJudge, row: dict[str, Any], answer: str) -> Verdict:
    """Return the verdict of these settings on what an earlier verdict with the same models found. No model is loaded.

    row: the prompt's. Raises ValueError on text of another form.
    """
    if answer in (NO_PHRASE, detector.NO_CLAIM):
        return Verdict(None, answer=answer)
    try:
        parts = json.loads(answer)
        kind, attributes, action = parts["kind"], parts["attributes"], parts.get("action")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not an answer of the judge three-in-one ({error!r})") from None
    told = {"kind": kind, "attributes": attributes}
    if "detections" in parts:
        found = detector.from_rows(parts["detections"])
        relation = detector.score(row, found, settings.relation.rules == "upstream")
        if relation is None:
            return Verdict(None, answer=detector.NO_CLAIM)
        told["relation"] = round(relation, 6)
    told |= {name: parts[name] for name in ("action", "detections") if name in parts}
    score = three_in_one(kind, attributes, told.get("relation", 0.0), action or 0.0)  # those of other kinds have no weight
    matches = None if settings.threshold is None else score >= settings.threshold
    return Verdict(matches, score, json.dumps(told, separators=(",", ":")))


def files(settings: ThreeInOneJudge) -> list[str]:
    """Return the files of all three judges."""
    return [
        *blip_vqa.BLIP_VQA.files(settings.attributes),
        *detector.DETECTOR.files(settings.relation),
        *clip_score.CLIP_SCORE.files(settings.action),
    ]


def runs_on(settings: ThreeInOneJudge) -> Model:
    """Return where the first of the three judges runs that is not on the CPU. All of them run in the same processes."""
    places = [checkpoint.runs_on(part) for part in (settings.attributes, settings.relation, settings.action)]
    return next((place for place in places if place.device != "cpu"), places[0])


THREE_IN_ONE = JudgeKind(
    ThreeInOneJudge,
    open_three,
    files=files,
    uses=lambda settings: [entry("JUDGES", kind) for kind in ("blip-vqa", "detector", "clip-score")],
    runs_on=runs_on,
    batch_size=64,
    from_answer=from_answer,
)
