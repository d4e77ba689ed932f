"""The interface of an understanding benchmark: it asks a model about images that no model drew, and grades the answers.

A kind of benchmark is a module in this folder with an `UnderstandingKind`, registered by name in
`stages/understanding/__init__.py`. The configuration's section `understanding` names benchmarks and gives each a kind and its
settings. `stages.understand` collects a checkpoint's answers, and `stages.count_answers` computes the metrics from them. Every
checkpoint is asked the same questions, so a trained model is compared with the base model question by question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.settings import Model, Score, Section


class UnderstandingSettings(Section):
    """The settings that all kinds share. A kind adds its own and narrows `kind` to its name with Literal."""

    kind: str

    def outcome(self) -> dict[str, Any]:
        """Return the settings that an answer depends on.

        A kind leaves out those that say where files are (their content counts, see `UnderstandingKind.files`) or how fast it
        runs.
        """
        return self.model_dump()


@dataclass(frozen=True)
class Question:
    """A question about one image.

    question_id: the question's name, unique within the benchmark and the same for every checkpoint.
    image_id: the image's name. Questions about one image are not independent of each other, so intervals resample images.
    part, category: where the question belongs in the benchmark; the kind's metrics are computed by them.
    image: returns the image, uint8 `[height, width, 3]`. Images that are asked about in one batch have the same size.
    text: a prompt, about which the model is asked as in the section score of the configuration; or, if `grade` is given, the
        whole question.
    expected: the right answer: yes or no for a prompt, and for an open question an example in words.
    grade: for an open question, from the generated answer to how right it is, from 0 to 1; None if it cannot be read.
    max_new_tokens: for an open question, the longest answer in tokens.
    """

    question_id: str
    image_id: str
    part: str
    category: str
    image: Callable[[], np.ndarray]
    text: str
    expected: str
    grade: Callable[[str], float | None] | None = None
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Answer:
    """A checkpoint's answer to a question: a row of the manifest `answers`, which describes the fields."""

    question_id: str
    image_id: str
    part: str
    category: str
    question: str
    expected: str | None
    answer: str | None
    p_yes: float | None
    score: float | None


@dataclass(frozen=True)
class Measure:
    """A metric in one category, as a quotient of sums over images: 100 x sum of numerators / sum of denominators.

    numerators, denominators: float64 `[images]`, in an order that is the same for every checkpoint. An image that does not
        count has 0 in both.
    """

    metric: str
    category: str
    numerators: np.ndarray
    denominators: np.ndarray


def mean_scores(answers: Sequence[Answer]) -> list[Measure]:
    """Return the mean score (`accuracy`) and the share of unreadable answers (`unreadable`) of each category."""
    measures = []
    for category in dict.fromkeys(answer.category for answer in answers):
        scores = [answer.score for answer in answers if answer.category == category]
        images = [answer.image_id for answer in answers if answer.category == category]
        known = np.array([score is not None for score in scores], float)
        measures += [
            by_image("accuracy", category, images, np.array([score or 0.0 for score in scores]), known),
            by_image("unreadable", category, images, 1 - known, np.ones(len(known))),
        ]
    return measures


def by_image(metric: str, category: str, images: Sequence[str], numerators: np.ndarray, denominators: np.ndarray) -> Measure:
    """Return a metric in a category from the numerator and the denominator of each answer, `[answers]`.

    images: the image of each answer. Those of one image are averaged, so that an image counts once however often it is asked
    about.
    """
    summed = by_question(metric, category, images, numerators, denominators)
    _, counts = np.unique(np.array(images), return_counts=True)
    return Measure(metric, category, summed.numerators / counts, summed.denominators / counts)


def by_question(metric: str, category: str, images: Sequence[str], numerators: np.ndarray, denominators: np.ndarray) -> Measure:
    """Return the same where every answer counts once: those of one image are added, and stay together when it is resampled."""
    _, places = np.unique(np.array(images), return_inverse=True)
    return Measure(metric, category, np.bincount(places, numerators), np.bincount(places, denominators))


@dataclass(frozen=True)
class UnderstandingKind:
    """settings: the kind's settings, a subclass of UnderstandingSettings.
    size: from the settings to the number of questions, from which the workflow derives a time limit.
    questions: from the settings to the questions, in a fixed order. `stages.understand` asks them in batches and continues
        after a kill. Raises UserError with file, field and remedy.
    evaluate: instead of `questions`, for an evaluation that asks its own questions, such as another project's harness: from
        (settings, model, score, checkpoint, part) to all answers of a part with their scores. model and score are the
        configuration's sections, and checkpoint is the folder of the weights.
    parts: from the settings to the names of the parts for which `evaluate` is called. The answers of a finished part are kept,
        so a killed evaluation continues with the next one.
    measures: from the answers to the metrics.
    files: from the settings to the files that the benchmark depends on, which the workflow watches.
    uses: from the settings to further entries of registries that the kind is built on (`stages.common.registry.entry`).
    """

    settings: type[UnderstandingSettings]
    size: Callable[[Any], int]
    questions: Callable[[Any], list[Question]] | None = None
    evaluate: Callable[[Any, Model, Score, Path, str], list[Answer]] | None = None
    parts: Callable[[Any], list[str]] = lambda settings: ["all"]
    measures: Callable[[Sequence[Answer]], list[Measure]] = mean_scores
    files: Callable[[Any], list[str]] = lambda settings: []
    uses: Callable[[Any], list[str]] = lambda settings: []
