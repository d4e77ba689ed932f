"""Judges that are asked a question about each image: the settings that they share, and how their answers become verdicts."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from stages.common.settings import Positive, Share
from stages.families.tools.asking import parse_answer
from stages.judges.base import JudgeSettings, Verdict

QUESTION = 'Does this image show "{prompt}"? Answer with yes or no.'


class AskedJudge(JudgeSettings):
    mode: Literal["p_yes", "answer"] = Field(
        default="p_yes",
        description="p_yes reads the probabilities of yes and no at the first answer token. answer reads the answer's text "
        "('Yes, ...', 'The score is 1.').",
    )
    question: str = Field(default=QUESTION, description="The question, with {prompt} in it.")
    threshold: Share = Field(default=0.5, description="In mode p_yes: an image matches at this probability of yes or above.")
    max_new_tokens: Positive = Field(default=128, description="The longest answer, in tokens.")

    @field_validator("question")
    @classmethod
    def _question(cls, question: str) -> str:
        if "{prompt}" not in question:
            raise ValueError("the question must contain {prompt}")
        return question

    def asked(self, prompt: str) -> str:
        """Return the question about a prompt."""
        return self.question.replace("{prompt}", prompt)


def words(**facts: Any) -> str:
    """Return what a verdict's `answer` holds: JSON with the facts that are known, probabilities with six significant digits."""
    known = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in facts.items()}
    return json.dumps({key: value for key, value in known.items() if value is not None}, ensure_ascii=False)


def graded(yes: float, no: float, threshold: float, **facts: Any) -> Verdict:
    """Return the verdict of P(yes) and P(no) at the first answer token: yes / (yes + no), against the threshold.

    The mass on neither is in `answer` as p_neither: where it is large, the model wanted to say something else, and its verdict
    is worth little. The verdict is empty where neither has any mass. facts: what else `answer` holds.
    """
    if not yes + no > 0:
        return Verdict(None, answer=words(p_neither=1.0, **facts))
    score = yes / (yes + no)
    return Verdict(score >= threshold, score, words(p_neither=max(0.0, 1 - yes - no), **facts))


def read(text: str, **facts: Any) -> Verdict:
    """Return the verdict of an answer's text. It is empty when the text says neither yes nor no."""
    return Verdict(parse_answer(text), answer=words(text=text, **facts))
