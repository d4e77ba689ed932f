"""Understanding of fresh scenes of the shapes world, which are rendered and not drawn by a model.

The benchmark has three parts. In the first two, the model is asked whether a scene shows a prompt, in the words of the section
score.

Minimal pairs: a scene is shown with its own prompt and with a prompt that is wrong in one thing. By kind of error:

pair_auc               area under the ROC curve of p_yes: how often a right prompt has a higher p_yes than a wrong one
pair_accuracy          share of right verdicts

Yes-no questions in the manner of POPE (arXiv 2305.10355): half of the scenes are shown with their own prompt (yes), half with a
wrong one (no). In `adversarial` the wrong prompt is wrong in one thing; in `random` it is another prompt of the same category.
Both ask about the same scenes. By type of question, for each of the two:

<half>_accuracy        share of right verdicts
<half>_precision       of the verdicts yes, the share that is right
<half>_recall          of the questions whose answer is yes, the share with the verdict yes
<half>_f1              the harmonic mean of precision and recall
<half>_yes_ratio       share of the verdicts yes; half of the questions have the answer yes

Captions: the model describes a scene, and the oracle decides whether the caption is true of it. By category of the scene:

caption_true           share of true captions
caption_unparsed       share of captions that are not in the wording of the prompts, which count as wrong

unreadable             share of verdicts that could not be parsed (score.mode answer), which count in no other metric
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from stages.understanding.base import Answer, Measure, Question, UnderstandingKind, UnderstandingSettings, by_image

if TYPE_CHECKING:
    from stages.shapes.grammar import Meaning

TYPES = {"existence": ["shape"], "attribute": ["color", "texture"], "count": ["number"], "relation": ["relation"]}
HALVES = ("random", "adversarial")
LONGEST_CAPTION = 24  # tokens; the longest prompts have fewer than 16 words
NEXT_TURN = "<|"  # the tiny model ends its caption with the tag of the next turn


class ShapesUnderstanding(UnderstandingSettings):
    kind: Literal["shapes"]
    split: Literal["post-training", "validation", "test"] = Field(
        default="validation", description="The split of the grammar from which all prompts come, right and wrong ones."
    )
    count: Annotated[int, Field(ge=8)] = Field(
        default=600,
        description="How many scenes the minimal pairs have, spread evenly over the five kinds of error, and how many the "
        "yes-no questions have, spread evenly over their four types.",
    )
    captions: Annotated[int, Field(ge=0)] = Field(
        default=120, description="How many scenes the model describes, spread evenly over the six categories. 0 asks for none."
    )
    caption_question: str | None = Field(
        default=None, description="The question that asks for a caption. Empty: the one that the tiny model was trained on."
    )
    seed: int = Field(default=0, description="The seed of the scenes. Equal seeds ask every checkpoint equal questions.")


def questions(settings: ShapesUnderstanding) -> list[Question]:
    """Return all questions, part by part. Parts have seeds of their own, so that the size of one changes no other."""
    pairs, yes_no, captions = (np.random.default_rng([settings.seed, part]) for part in range(3))
    return [
        *minimal_pair_questions(settings, pairs),
        *yes_no_questions(settings, yes_no),
        *caption_questions(settings, captions),
    ]


def minimal_pair_questions(settings: ShapesUnderstanding, rng: np.random.Generator) -> Iterator[Question]:
    from stages.shapes.grammar import ERRORS
    from stages.shapes.sampling import minimal_pairs

    for kind in ERRORS:
        for number, (right, wrong) in enumerate(
            minimal_pairs(rng, settings.split, kind, max(1, settings.count // len(ERRORS)))
        ):
            scene, image = f"pairs/{kind}/{number:04d}", partial(picture, wrong.grid)
            yield Question(f"{scene}/yes", scene, "pairs", kind, image, right.prompt(), "yes")
            yield Question(f"{scene}/no", scene, "pairs", kind, image, wrong.meaning.prompt(), "no")


def yes_no_questions(settings: ShapesUnderstanding, rng: np.random.Generator) -> Iterator[Question]:
    """Yield as many questions with the answer yes as with the answer no, for each type and half."""
    from stages.shapes.sampling import minimal_pairs

    for name, kinds in TYPES.items():
        scenes = [
            pair
            for place, kind in enumerate(kinds)
            for pair in minimal_pairs(
                rng, settings.split, kind, part_of(settings.count // len(TYPES) // 2 * 2, len(kinds), place)
            )
        ]
        for number, (right, wrong) in enumerate(scenes):
            image, expected = partial(picture, wrong.grid), "yes" if number % 2 == 0 else "no"
            other = other_meaning(right, wrong.grid, settings.split, rng)
            for half, meaning in zip(HALVES, (other, wrong.meaning), strict=True):
                scene = f"{half}/{name}/{number:04d}"
                asked = right if expected == "yes" else meaning
                yield Question(scene, scene, half, name, image, asked.prompt(), expected)


def caption_questions(settings: ShapesUnderstanding, rng: np.random.Generator) -> Iterator[Question]:
    from stages.shapes.grammar import CATEGORIES, sample_scene
    from stages.shapes.sampling import sample_meaning

    for place, category in enumerate(CATEGORIES if settings.captions else ()):
        for number in range(part_of(settings.captions, len(CATEGORIES), place)):
            meaning = sample_meaning(rng, settings.split, category=category)
            grid = sample_scene(meaning, rng)
            scene = f"captions/{category}/{number:04d}"
            text = settings.caption_question or trained_question()
            image, grade = partial(picture, grid), partial(caption_score, grid)
            yield Question(scene, scene, "captions", category, image, text, meaning.prompt(), grade, LONGEST_CAPTION)


def part_of(total: int, parts: int, place: int) -> int:
    """Return how many of `total` belong to part number `place`, if the parts are as equal as possible."""
    return total // parts + (place < total % parts)


def other_meaning(meaning: Meaning, grid: np.ndarray, split: str, rng: np.random.Generator) -> Meaning:
    """Return a random meaning of the same category and split that is false of the scene."""
    from stages.shapes import oracle
    from stages.shapes.grammar import split_meanings

    pool = split_meanings(meaning.category, split)
    while oracle.matches(other := pool[rng.integers(len(pool))], grid):
        pass
    return other


def picture(grid: np.ndarray) -> np.ndarray:
    """Return a scene's image, uint8 `[64, 64, 3]`."""
    from stages.shapes.scenes import render

    return render(grid[None])[0]


def trained_question() -> str:
    """Return the question about captions that the tiny model was trained on."""
    from stages.shapes.tiny_janus import CAPTION

    return CAPTION


def caption_score(grid: np.ndarray, caption: str) -> float:
    """Return 1 for a caption that is true of the scene, otherwise 0, also if the caption cannot be parsed."""
    from stages.shapes import oracle

    meaning = parsed(caption)
    return float(meaning is not None and oracle.matches(meaning, grid))


def parsed(caption: str) -> Meaning | None:
    """Return the meaning of a caption, or None if it is not in the wording of the prompts."""
    from stages.shapes.grammar import parse_prompt

    try:
        return parse_prompt(caption.split(NEXT_TURN)[0])
    except ValueError:
        return None


def measures(answers: Sequence[Answer]) -> list[Measure]:
    """Return the metrics of all parts."""
    found: list[Measure] = []
    for (part, category), members in grouped(answers).items():
        if part == "pairs":
            found += pair_measures(category, members)
        elif part == "captions":
            found += caption_measures(category, members)
        else:
            found += yes_no_measures(part, category, members)
    for part in dict.fromkeys(answer.part for answer in answers if answer.part != "captions"):
        judged = [answer for answer in answers if answer.part == part]
        missing = np.array([answer.score is None for answer in judged], float)
        found.append(by_image("unreadable", part, images_of(judged), missing, np.ones(len(judged))))
    return found


def grouped(answers: Sequence[Answer]) -> dict[tuple[str, str], list[Answer]]:
    """Return the answers by part and category."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.part, answer.category), []).append(answer)
    return groups


def images_of(answers: Sequence[Answer]) -> list[str]:
    return [answer.image_id for answer in answers]


def flags(answers: Sequence[Answer], value: Callable[[Answer], bool]) -> np.ndarray:
    """Return a value of each answer as 0 or 1, and 0 for verdicts that could not be read, float64 `[answers]`."""
    return np.array([answer.score is not None and value(answer) for answer in answers], float)


def said_yes(answer: Answer) -> bool:
    return (answer.expected == "yes") == (answer.score == 1)


def pair_measures(kind: str, answers: Sequence[Answer]) -> list[Measure]:
    images = images_of(answers)
    right, readable = flags(answers, lambda answer: answer.score == 1), flags(answers, lambda answer: True)
    yes = {answer.image_id: answer.p_yes for answer in answers if answer.expected == "yes"}
    no = {answer.image_id: answer.p_yes for answer in answers if answer.expected == "no"}
    known = np.array([yes[image] is not None and no[image] is not None for image in yes])
    values = np.zeros(len(known))
    values[known] = concordance(
        *(np.array([side[image] for image, use in zip(yes, known, strict=True) if use], float) for side in (yes, no))
    )
    return [
        by_image("pair_auc", kind, list(yes), values, known.astype(float)),
        by_image("pair_accuracy", kind, images, right, readable),
    ]


def concordance(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """Return for each pair a value whose mean is the area under the ROC curve, float64 `[pairs]`.

    right, wrong: p_yes with the right and with the wrong prompt of each pair, `[pairs]`. The area compares every right value
    with every wrong one, not only those of one pair. A pair's value is the area plus the pair's influence on it, as in DeLong's
    method, so means of resampled pairs vary as the area itself does.
    """
    from stages.tools.rates import placements

    if not len(right):
        return np.zeros(0)
    beaten, lost = placements(right, wrong)
    return beaten + lost - beaten.mean()


def yes_no_measures(half: str, name: str, answers: Sequence[Answer]) -> list[Measure]:
    images = images_of(answers)
    true_yes = flags(answers, lambda answer: said_yes(answer) and answer.expected == "yes")
    yes, expected = flags(answers, said_yes), flags(answers, lambda answer: answer.expected == "yes")
    right, readable = flags(answers, lambda answer: answer.score == 1), flags(answers, lambda answer: True)
    return [
        by_image(f"{half}_accuracy", name, images, right, readable),
        by_image(f"{half}_precision", name, images, true_yes, yes),
        by_image(f"{half}_recall", name, images, true_yes, expected),
        by_image(f"{half}_f1", name, images, 2 * true_yes, yes + expected),
        by_image(f"{half}_yes_ratio", name, images, yes, readable),
    ]


def caption_measures(category: str, answers: Sequence[Answer]) -> list[Measure]:
    images, every = images_of(answers), np.ones(len(answers))
    unparsed = np.array([parsed(answer.answer or "") is None for answer in answers], float)
    return [
        by_image("caption_true", category, images, flags(answers, lambda answer: answer.score == 1), every),
        by_image("caption_unparsed", category, images, unparsed, every),
    ]


SHAPES = UnderstandingKind(
    ShapesUnderstanding,
    size=lambda settings: 4 * settings.count + 20 * settings.captions,  # writing a caption takes as long as some 20 verdicts
    questions=questions,
    measures=measures,
)
