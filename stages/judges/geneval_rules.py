"""GenEval's rules (arXiv 2310.11513): from what a detector has found in an image to whether the image is right, and why not.

Source: djghosh13/geneval, evaluation/evaluate_images.py, with its default options: no suppression of overlapping objects.
x points right and y down; a box is (x0, y0, x1, y1) in pixels.

The benchmark has 553 prompts in six tags, and four images for each prompt:

    single_object   one object, of any number
    two_object      one object each of two classes
    counting        exactly two, three or four objects of a class
    colors          one object of a color
    position        an object left of, right of, above or below another one
    color_attr      two objects, each of its own color

The score of a tag is the share of right images among all its images. The benchmark's number is the mean of the scores of the
six tags, so every tag has the same weight (evaluation/summary_scores.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]
Kind = Literal["missing", "count", "color", "position", "extra"]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS: tuple[str, ...] = get_args(Color)
MINIMUM_SCORE, MINIMUM_SCORE_COUNTING = 0.3, 0.9  # an object counts above this score; the second is that of the tag counting
MOST_OBJECTS = 16  # of a class that are looked at
OVERLAP = 0.1  # the share of the two sizes by which two centers may differ before one object is beside the other
DIRECTION = 0.5  # the part of the distance along an axis from which a relation along this axis holds
# The 80 classes of COCO in their order, with GenEval's names (evaluation/object_names.txt).
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in _NAMES.split(","))


# What a prompt asks for


class Objects(BaseModel):
    """So many objects of a class."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(alias="class")
    count: int = Field(ge=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in CLASSES:
            raise ValueError(f"{name!r} is not one of GenEval's 80 classes")
        return name


class Clause(Objects):
    """Objects that the image must show: all of a color, or all in a relation to the objects of an earlier clause.

    position: the relation, and the index of the earlier clause in `include`.
    """

    color: Color | None = None
    position: tuple[Relation, int] | None = None


class Metadata(BaseModel):
    """A line of GenEval's metadata. include: clauses that must all hold. exclude: so many objects or more must not be there."""

    model_config = ConfigDict(frozen=True)

    tag: str
    include: list[Clause] = Field(min_length=1)
    exclude: list[Objects] = []

    @model_validator(mode="after")
    def _targets(self) -> Metadata:
        for index, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise ValueError(f"include.{index}.position: {clause.position[1]} is not the index of an earlier clause")
        return self

    @property
    def minimum_score(self) -> float:
        return MINIMUM_SCORE_COUNTING if self.tag == "counting" else MINIMUM_SCORE


def read_metadata(text: str | None) -> Metadata:
    """Return the metadata of a prompt from its JSON text. Raises ValueError, in one line, if it is not that of GenEval."""
    if not text:
        raise ValueError("it has no metadata")
    try:
        return Metadata.model_validate_json(text)
    except ValidationError as error:
        found = error.errors()[0]
        place, words = ".".join(map(str, found["loc"])), found["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {words}" if place else words) from None


# What an image shows


@dataclass(frozen=True)
class Detection:
    """One object that the detector has found. name: one of CLASSES. score: from 0 to 1. box: in pixels, x1 and y1 exclusive.

    color: one of COLORS, where a clause asks about it.
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    color: str | None = None


def strongest(detections: Sequence[Detection], name: str, minimum: float) -> list[int]:
    """Return the indices of the objects of a class that count, by falling score: above `minimum`, and at most MOST_OBJECTS."""
    found = [index for index, detection in enumerate(detections) if detection.name == name and detection.score > minimum]
    return sorted(found, key=lambda index: -detections[index].score)[:MOST_OBJECTS]


def with_colors(
    metadata: Metadata, detections: Sequence[Detection], classify: Callable[[list[int]], Sequence[str]]
) -> list[Detection]:
    """Return the detections with the colors of those objects whose color a clause asks about.

    classify: from the indices of detections to their colors. It is called at most once.
    """
    asked: dict[int, None] = {}
    for clause in metadata.include:
        objects = strongest(detections, clause.name, metadata.minimum_score)
        if clause.color is not None and len(objects) >= clause.count:
            asked.update(dict.fromkeys(objects[: clause.count]))
    found = dict(zip(asked, classify(list(asked)), strict=True)) if asked else {}
    return [replace(detection, color=found.get(index)) for index, detection in enumerate(detections)]


def relations(box: Sequence[float], target: Sequence[float]) -> set[str]:
    """Return the relations in which a box is to a target box: none, one, or two that touch, such as left of and above.

    The distance of the centers is shortened along each axis by OVERLAP of the sum of both sizes. A relation holds if what is
    left is more than DIRECTION of the whole, unshortened distance.
    """
    shortened, centers = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (box[low] + box[high] - target[low] - target[high]) / 2
        sizes = abs(box[high] - box[low]) + abs(target[high] - target[low])
        shortened.append(math.copysign(max(abs(distance) - OVERLAP * sizes, 0), distance))
        centers.append(distance)
    if max(map(abs, shortened)) < 1e-3:
        return set()
    x, y = (part / math.hypot(*centers) for part in shortened)
    holds = {"left of": x < -DIRECTION, "right of": x > DIRECTION, "above": y < -DIRECTION, "below": y > DIRECTION}
    return {relation for relation, true in holds.items() if true}


# Whether they agree


@dataclass(frozen=True)
class Failure:
    """A clause that does not hold: the kind of error, and what was expected and found in words.

    missing: no object of the class. count: too few. color, position: as they say; a clause about objects whose target clause
    fails is of kind position. extra: too many.
    """

    kind: Kind
    text: str


def evaluate(metadata: Metadata, detections: Sequence[Detection]) -> list[Failure]:
    """Return the clauses that do not hold, those of `include` first. The image is right if there is none.

    A clause looks only at the `count` best objects of its class. Raises ValueError if the color of one of them is needed and
    not known; see `with_colors`.
    """
    failures: list[Failure] = []
    held: list[list[Detection]] = []  # the objects of each clause of include; none where it failed
    for clause in metadata.include:
        best = strongest(detections, clause.name, metadata.minimum_score)[: clause.count]
        objects = [detections[index] for index in best]
        failure = _failure(clause, objects, held)
        held.append([] if failure else objects)
        if failure:
            failures.append(failure)
    for limit in metadata.exclude:
        found = len(strongest(detections, limit.name, metadata.minimum_score))
        if found >= limit.count:
            failures.append(Failure("extra", f"fewer than {limit.count} {limit.name} expected, {found} found"))
    return failures


def _failure(clause: Clause, objects: Sequence[Detection], held: Sequence[Sequence[Detection]]) -> Failure | None:
    """Return why a clause does not hold. objects: the best ones, at most `count`. held: the objects of the earlier clauses."""
    if len(objects) < clause.count:
        text = f"{clause.count} {clause.name} expected, {len(objects)} found"
        return Failure("count" if objects else "missing", text)
    if clause.color is not None:
        colors = [found.color for found in objects]
        if None in colors:
            raise ValueError(f"the color of a {clause.name} is not known")
        if any(color != clause.color for color in colors):
            return Failure(
                "color", f"{clause.count} {clause.color} {clause.name} expected, {', '.join(map(str, colors))} found"
            )
    if clause.position is not None:
        relation, target = clause.position
        if not held[target]:
            return Failure("position", f"nothing found that {clause.name} can be {relation}")
        for found in objects:
            for other in held[target]:
                true = relations(found.box, other.box)
                if relation not in true:
                    text = (
                        f"{clause.name} {relation} {other.name} expected, {' and '.join(sorted(true)) or 'neither side'} found"
                    )
                    return Failure("position", text)
    return None
