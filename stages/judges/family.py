"""Any registered model family as an external judge of another model's images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from stages.common.registry import entry
from stages.common.settings import Model, Score
from stages.families import describe, open_family
from stages.families.tools.checkpoints import preprocessing_files
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict


class FamilyJudge(JudgeSettings):
    kind: Literal["family"]
    model: Model = Field(description="The judging model: its family and its checkpoint.")
    score: Score = Field(default=Score(), description="How it is asked, as in the section score.")

    @model_validator(mode="after")
    def _judges(self) -> FamilyJudge:
        if "judge" not in describe(self.model.family).roles:
            raise ValueError(f"model.family: {self.model.family} only draws and cannot judge; choose another family")
        return self

    def outcome(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model": self.model.model_dump(include={"family", "dtype"}),
            "score": self.score.model_dump(exclude={"batch_size"}),
        }


def open_model(settings: FamilyJudge) -> Judge:
    """Load the model. Its p_yes is the graded score, and its verdict follows score.verdict_threshold."""
    import numpy as np

    from stages.common.batches import planned
    from stages.families.tools.asking import ask

    family = open_family(settings.model, Path(settings.model.checkpoint), "judge")
    description = describe(settings.model.family)

    def judge(items: Sequence[Item]) -> list[Verdict]:
        verdicts = []
        for batch in planned(items, settings.score.batch_size):
            images = np.stack([item.image for item in batch])
            answers = ask(family, description, settings.score, images, [item.prompt["prompt"] for item in batch])
            verdicts += [Verdict(answer.verdict, answer.p_yes, answer.text) for answer in answers]
        return verdicts

    return judge


def files(settings: FamilyJudge) -> list[str]:
    """Return the files of the judging checkpoint: its weights, tokenizer and image processor."""
    checkpoint = Path(settings.model.checkpoint)
    found = [*describe(settings.model.family).files(checkpoint, "judge"), *preprocessing_files(checkpoint)]
    return [str(path) for path in found]


FAMILY = JudgeKind(
    FamilyJudge,
    open_model,
    files=files,
    uses=lambda settings: [entry("FAMILIES", settings.model.family)],
    runs_on=lambda settings: settings.model,
    batch_size=64,
)
