"""The judge anchor: a loss that holds the judge to the base model's own judgements, beside the loss of the images or alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common import manifests, shards
from stages.common.config import Train
from stages.common.errors import UserError
from stages.common.seeds import hash_seed
from stages.common.settings import Score
from stages.families.base import Description

Row = dict[str, Any]


@dataclass(frozen=True)
class Judgement:
    """The probability of yes that the judge is held to for one candidate, and the manifest that the candidate is in."""

    manifest: Path
    candidate: Row
    target: float


def read_judgements(scores: list[Path], candidates: list[Path], settings: Train, seed: int) -> list[Judgement]:
    """Return the base model's judgements of its own candidates, shuffled. Raises UserError when there are none."""
    column = settings.judge_anchor_target  # p_yes or verdict; a verdict is the certainty of yes or no
    found = {row["candidate_id"]: row[column] for row in manifests.read_rows(scores, "scores") if row[column] is not None}
    judgements = [
        Judgement(path, row, float(found[row["candidate_id"]]))
        for path in candidates
        for row in manifests.read_rows(path, "candidates", without=("tokens", "latents"), wanted=found)
    ]
    if not judgements:
        raise UserError("train.judge_anchor_weight: no judged candidate; give --scores of the base model's candidates")
    return sorted(judgements, key=lambda judgement: hash_seed("anchor", seed, judgement.candidate["candidate_id"]))


def anchor_loss(
    family: Any, description: Description, judgements: list[Judgement], prompts: dict[str, str], score: Score
) -> Callable[[Any, list[int]], Any]:
    """Return loss(model, indices): the cross-entropy of the model's p_yes against these judgements' targets.

    The model is asked as stages.score asked it.
    """
    import numpy as np

    from stages.families.tools.asking import question_and_prefix

    template, prefix = question_and_prefix(description, score)

    def loss(model: Any, indices: list[int]) -> Any:
        chosen = [judgements[index] for index in indices]
        images = np.concatenate([shards.read_images(judgement.manifest, [judgement.candidate]) for judgement in chosen])
        questions = [template.replace("{prompt}", prompts[judgement.candidate["prompt_id"]]) for judgement in chosen]
        targets = np.array([judgement.target for judgement in chosen])
        return family.judge_loss(model, images, questions, targets, prefix)

    return loss
