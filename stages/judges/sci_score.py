"""SciScore of Science-T2I: how well an image shows what science says about its prompt, by a CLIP that was trained for it.

Source: arXiv 2504.13129 and eval/eval_t2i_with_SciScore.py of Jialuo-Li/Science-T2I at 024e5dd. SciScore is exp(logit_scale)
times the cosine between the embeddings of the image and of the implicit prompt, whichever prompt the image was drawn from.
Texts are cut after 77 tokens, as upstream does. `stages.tools.science_choice` tests the checkpoint on the benchmark's images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from stages.judges.base import Item, Judge, JudgeKind, Verdict
from stages.judges.checkpoint import CheckpointJudge, runs_on
from stages.judges.clip_score import files, open_cosines

# The SciScore at which the score is 1. Trained scales are about 100 and cosines reach about 0.35, so SciScores reach about 35.
# With 100 here, Gen. (the mean score in percent) is the mean SciScore as in published tables, such as 24.49.
LARGEST = 100.0


class SciScoreJudge(CheckpointJudge):
    kind: Literal["sci-score"]


def implicit_prompt(item: Item) -> str:
    """Return the implicit prompt from the item's metadata, or for prompts of other suites the prompt itself."""
    return json.loads(item.prompt.get("metadata") or "{}").get("implicit_prompt") or item.prompt["prompt"]


def open_sci_score(settings: SciScoreJudge) -> Judge:
    """Load SciScore. The score is a hundredth of SciScore, or 0 where it is negative; the answer has SciScore itself."""
    cosines, scale = open_cosines(settings, truncate=True)

    def verdict(sci_score: float) -> Verdict:
        return settings.verdict(min(1.0, max(0.0, sci_score / LARGEST)), f"SciScore {sci_score:.4f}")

    def judge(items: Sequence[Item]) -> list[Verdict]:
        found = cosines([item.image for item in items], [implicit_prompt(item) for item in items])
        return [verdict(scale * cosine) for cosine in found]

    return judge


SCI_SCORE = JudgeKind(SciScoreJudge, open_sci_score, files=files, runs_on=runs_on, batch_size=64)
