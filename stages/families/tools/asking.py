"""Ask a model's understanding branch whether images show their prompts, and parse its answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.common.settings import Score

if TYPE_CHECKING:
    from stages.families.base import Description, Family

# "The score is 1." with an optional colon, emphasis or brackets. The score is unreadable if the number continues ("0.8", "10")
# or if an alternative follows ("0/1", "1 or 0").
SCORE = re.compile(r"score\s+is\s*:?\s*[*_`{(\[]*\s*([01])(?:\.0+)?(?![\d./,]*\d)(?!\s*(?:/|or\b|out\b))", re.IGNORECASE)
ANY_SCORE = re.compile(r"score\s+is\b", re.IGNORECASE)
# "Yes, ..." or "No, ..." at the beginning of an answer. "No doubt the image shows ..." and "Yes and no" are neither.
FIRST_WORD = re.compile(
    r"\W*(?:(yes)\b(?!\s+(?:and|or)\s+no\b)|(no|1|0)(?=\s*(?:[.,;:!*)\]}\n-]|$)|\s+(?:it|this|the)\b))(?![.,/]\d)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """A model's judgement of an image. verdict is None if the answer could not be parsed; text is the generated answer."""

    verdict: bool | None
    p_yes: float | None
    p_neither: float | None = None
    text: str | None = None


def parse_answer(answer: str) -> bool | None:
    """Return the verdict of an answer such as `The score is 1.` or `Yes, ...`. None if it is unclear."""
    if ANY_SCORE.search(answer):
        scores = set(SCORE.findall(answer))
        readable = len(scores) == 1 and len(SCORE.findall(answer)) == len(ANY_SCORE.findall(answer))
        return scores == {"1"} if readable else None
    first = FIRST_WORD.match(answer)
    return (first.group(1) or first.group(2)).lower() in ("yes", "1") if first else None


def question_and_prefix(description: Description, score: Score) -> tuple[str, str]:
    """Return the judge's question and the beginning of its answer: the configured ones, or else those of the family."""
    if score.question:
        return score.question, score.answer_prefix
    return description.question, description.answer_prefix


def ask(family: Family, description: Description, score: Score, images: np.ndarray, prompts: list[str]) -> list[Answer]:
    """Return the answers for n images, uint8 `[n, height, width, 3]`, to the question whether each shows its prompt.

    A p_yes that is no number is unreadable: neither yes nor no has any probability then.
    """
    template, prefix = question_and_prefix(description, score)
    questions = [template.replace("{prompt}", prompt) for prompt in prompts]
    if score.mode == "p_yes":
        return [
            Answer(bool(p_yes >= score.verdict_threshold), float(p_yes), float(p_neither))
            if np.isfinite(p_yes)
            else Answer(None, None, float(p_neither) if np.isfinite(p_neither) else None)
            for p_yes, p_neither in zip(*family.p_yes(images, questions, prefix), strict=True)
        ]
    answers = []
    for text in family.answer(images, questions, score.max_new_tokens):
        verdict = parse_answer(text)
        answers.append(Answer(verdict, None if verdict is None else float(verdict), text=text))
    return answers
