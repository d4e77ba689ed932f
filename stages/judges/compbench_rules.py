"""The scores of T2I-CompBench++ as pure functions, from detections, depth and probabilities of yes.

Source: Huang et al., T2I-CompBench++ (arXiv 2307.06350), and the scripts UniDet_eval/2D_spatial_eval.py, 3D_spatial_eval.py,
numeracy_eval.py, BLIPvqa_eval/BLIP_vqa.py and 3_in_1_eval/3_in_1.py of Karine-Huang/T2I-CompBench at 1b70949. A name that ends
with `_upstream` is upstream's rule with its faults; the same name without it is a mended variant. Never compare the two.

Boxes are (x0, y0, x1, y1) in pixels, x to the right and y downwards. Upstream measures them in images whose short side is
resized to 479, with a long side of at most 480, and so must anyone who wants its 150 pixels to mean the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

Box = tuple[float, float, float, float]
PEOPLE = ("girl", "boy", "man", "woman")
# Upstream takes the first of this list that is in the prompt. "on top of" has no rule there, so it scores 0.
RELATIONS = (
    "on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of", "on top of",
)  # fmt: skip
RELATIONS_3D = ("in front of", "behind", "hidden")
BESIDE = RELATIONS[:3]
NEAR = 150  # pixels
OVERLAP, OVERLAP_3D = 0.1, 0.5  # intersection over union

NUMBERS = {
    "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
}  # fmt: skip
# The things that the prompts of numeracy count, and plurals that do not end with s.
IRREGULAR = {
    "knife": "knives", "man": "men", "woman": "women", "person": "people", "mouse": "mice", "butterfly": "butterflies",
    "strawberry": "strawberries", "fish": "fish", "goldfish": "goldfish", "shrimp": "shrimp", "sheep": "sheep",
    "deer": "deer", "tomato": "tomatoes", "peach": "peaches", "couch": "couches",
}  # fmt: skip
REGULAR = (
    "airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy bread cake camel camera candle "
    "car cat chair chicken clock computer cow cup desk dog drum duck egg flag frog giraffe girl guitar hamburger helicopter "
    "helmet horse key kite lamp lemon microphone microwave paddle painting pear pen phone pig pillow plate printer rabbit "
    "refrigerator ship sink sofa stool suitcase swan table television tent toy train truck turtle vase"
)
SINGULAR = {f"{name}s": name for name in REGULAR.split()} | {plural: name for name, plural in IRREGULAR.items()}
RENAMED = dict.fromkeys(PEOPLE, "person") | {"ship": "boat", "goldfish": "fish", "painting": "picture"}
# Names of the same thing in the label spaces of COCO, Objects365 and Open Images.
SYNONYMS = (
    {"sofa", "couch"}, {"phone", "cell phone", "mobile phone", "telephone"}, {"cow", "cattle"}, {"wallet", "wallet/purse"},
    {"table", "dining table", "coffee table"}, {"bag", "handbag", "handbag/satchel"}, {"television", "tv", "monitor/tv"},
    {"painting", "picture", "picture/frame", "picture frame"}, {"computer", "laptop"},
)  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """One detected object: its label in lower case, its score from 0 to 1 and its box (x0, y0, x1, y1) in pixels.

    depth: the mean of the depth map in the box (large is near), NaN where the box has no pixel or where there is no depth map.
    swapped: the same with the axes of the map swapped, as upstream has it. See `with_depth`.
    """

    label: str
    score: float
    box: Box
    depth: float = math.nan
    swapped: float = math.nan


@dataclass(frozen=True)
class Claim:
    """What a prompt says about two things, as in "a cat on the left of a dog": cat, on the left of, dog."""

    first: str
    relation: str
    second: str


# What a prompt says


def relation_in(prompt: str, relations: Sequence[str] = RELATIONS) -> str | None:
    """Return the first relation of the list, not of the prompt, that the prompt contains, as upstream does."""
    return next((relation for relation in relations if relation in prompt.lower()), None)


def spatial_claim(prompt: str) -> Claim | None:
    """Return the two nouns and the relation of a prompt of spatial or 3d_spatial; None where the template is another one.

    The template is "a FIRST relation a SECOND". The last word of either side is the noun, with which spaCy's first and last
    noun of upstream agree for these templates.
    """
    text = prompt.lower().strip().rstrip(".")
    relation = relation_in(text, RELATIONS_3D) or relation_in(text)
    if relation is None:
        return None
    before, after = text.split(relation, 1)
    first, second = re.findall(r"[a-z-]+", before), re.findall(r"[a-z-]+", after)
    return Claim(first[-1], relation, second[-1]) if first and second else None


def counted_nouns(prompt: str) -> list[tuple[int, str]]:
    """Return how many of which thing a prompt of numeracy asks for, in order, as (number, singular).

    Each number word from a to eight counts the next word, if that word is among the benchmark's things. Upstream also looks at
    pairs of words, which its list of things does not contain, and stops on a singular after a number above one, which here
    counts as its plural.
    """
    words = re.findall(r"[a-z]+|[^a-z\s]", prompt.lower())
    found = []
    for word, after in pairwise(words):
        name = after if after in SINGULAR.values() else SINGULAR.get(after)
        if word in NUMBERS and name:
            found.append((NUMBERS[word], name))
    return found


def complex_kind(prompt: str) -> str:
    """Return which scores a prompt of complex averages: spatial, action, or both, beside that of the attributes.

    A relation directly after is, was, are or were is spatial; a relation after another verb is both; the others are action.
    Upstream has lists of prompts instead (complex_val_spatial.txt and complex_val_action.txt), from which this rule differs for
    one of 300 validation prompts.
    """
    text = prompt.lower()
    relation = r"(?:on top of|next to|near|on side of|on the (?:left|right|top|bottom) of)\b"
    if re.search(rf"\b(?:is|was|are|were) {relation}", text):
        return "spatial"
    return "both" if re.search(rf"\b{relation}", text) else "action"


# Boxes and labels


def intersection_over_union(first: Box, second: Box) -> float:
    """Return the overlap of two boxes, from 0 to 1. It is 0 for boxes without area, for which upstream divides by zero."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return common / (areas - common) if areas > common else 0.0


def by_score(detections: Sequence[Detection]) -> list[Detection]:
    """Return the detections by falling score. Equal scores keep their order."""
    return sorted(detections, key=lambda detection: -detection.score)


def as_person(noun: str) -> str:
    return "person" if noun in PEOPLE else noun


def names(noun: str) -> set[str]:
    """Return the labels that mean the noun in the mended variants: itself, its synonyms, and for people also person.

    A boy is no girl, but each of them is a person.
    """
    people = PEOPLE if noun == "person" else ()
    return {noun, as_person(noun), *people}.union(*(group for group in SYNONYMS if noun in group))


def shows(detection: Detection, noun: str) -> bool:
    """Return whether a label means the noun. A label may be several names, as in "cattle, cow" of UniDet."""
    return not names(noun).isdisjoint({detection.label, *(part.strip() for part in detection.label.split(","))})


def best_pair(detections: Sequence[Detection], claim: Claim) -> tuple[Detection | None, Detection | None]:
    """Return the best detections of both nouns. One detection is never taken for two things (mended variants)."""
    ordered = by_score(detections)
    first = next((found for found in ordered if shows(found, claim.first)), None)
    second = next((found for found in ordered if found is not first and shows(found, claim.second)), None)
    return first, second


def weighted(first: Detection | None, second: Detection | None, position: float) -> float:
    """Return a quarter of each found object's score, and half the position's score (0 to 1) if both are found."""
    found = [detection for detection in (first, second) if detection is not None]
    return 0.25 * sum(detection.score for detection in found) + (0.5 * position if len(found) == 2 else 0.0)


# spatial


def position_2d(first: Box, second: Box, relation: str, *, either_axis: bool) -> float:
    """Return how well the first box stands in the relation to the second, from 0 to 1.

    left, right, top and bottom need the larger part of the distance between the centres in their direction, and lose points
    where the boxes overlap by more than a tenth. The others need a distance of less than 150 pixels: along one of the axes with
    `either_axis`, as upstream has it, or else along both.
    """
    dx = (second[0] + second[2]) / 2 - (first[0] + first[2]) / 2
    dy = (second[1] + second[3]) / 2 - (first[1] + first[3]) / 2
    if relation in BESIDE:
        nearer, farther = sorted((abs(dx), abs(dy)))
        return 1.0 if (nearer if either_axis else farther) < NEAR else NEAR / farther
    along, across = {
        "on the left of": (dx, dy), "on the right of": (-dx, dy), "on the top of": (dy, dx), "on the bottom of": (-dy, dx),
    }.get(relation, (0.0, 0.0))  # fmt: skip
    if along <= abs(across):
        return 0.0
    overlap = intersection_over_union(first, second)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def spatial_upstream(detections: Sequence[Detection], claim: Claim) -> float:
    """Return upstream's score of two objects in a plane, from 0 to 1; sums below 0.5 are 0.

    Its faults: an object counts only where its label equals the noun, so 100 of the 300 validation prompts always score 0; "on
    top of" always scores nothing; a distance along one axis is enough to be near; the same noun twice is one object.
    """
    ordered = by_score(detections)
    nouns = as_person(claim.first), as_person(claim.second)
    first, second = (next((found for found in ordered if found.label == noun), None) for noun in nouns)
    position = position_2d(first.box, second.box, claim.relation, either_axis=True) if first and second else 0.0
    score = weighted(first, second, position)
    return 0.0 if score < 0.5 else score


def spatial(detections: Sequence[Detection], claim: Claim) -> float:
    """Return the mended score of two objects in a plane, from 0 to 1; sums below 0.5 are 0.

    Synonyms and the parts of joined labels count, "on top of" is "on the top of", near means near along both axes, and one
    detection is never two objects.
    """
    first, second = best_pair(detections, claim)
    relation = "on the top of" if claim.relation == "on top of" else claim.relation
    position = position_2d(first.box, second.box, relation, either_axis=False) if first and second else 0.0
    score = weighted(first, second, position)
    return 0.0 if score < 0.5 else score


# 3d_spatial


def mean_depth(depth: np.ndarray, box: Box, *, swapped: bool) -> float:
    """Return the mean of `depth` (`[height, width]`, large is near) in a box; NaN where the box has no pixel.

    swapped: x indexes rows and y indexes columns, which is upstream's fault.
    """
    x0, y0, x1, y1 = (int(edge) for edge in box)
    region = depth[x0:x1, y0:y1] if swapped else depth[y0:y1, x0:x1]
    return float(region.mean()) if region.size else math.nan


def with_depth(detections: Sequence[Detection], depth: np.ndarray) -> list[Detection]:
    """Return the detections with their mean depth. depth: float `[height, width]`, large is near."""
    return [
        replace(
            found,
            depth=mean_depth(depth, found.box, swapped=False),
            swapped=mean_depth(depth, found.box, swapped=True),
        )
        for found in detections
    ]


def in_order(first: float, second: float, relation: str) -> bool:
    """Return whether the first depth is nearer (in front of) or farther (behind, hidden) than the second; never with NaN."""
    return first > second if relation == "in front of" else first < second


def spatial_3d_upstream(detections: Sequence[Detection], claim: Claim) -> float:
    """Return upstream's score of two objects in depth, from 0 to 1. The detections have their depth (`with_depth`).

    Its faults: labels match by a part of their letters (car in carrot); while the second noun is sought, a later match of the
    first replaces a better one; the axes of the depth map are swapped; boxes that do not overlap, or overlap by exactly one
    half, have no position.
    """
    ordered = by_score(detections)
    nouns = as_person(claim.first), as_person(claim.second)
    # Upstream joins all labels by spaces to see whether a noun occurs; no noun has a space, so any label decides.
    both = all(any(noun in found.label for found in ordered) for noun in nouns)
    places: list[Detection | None] = [None, None]
    for found in ordered:
        for place, noun in enumerate(nouns):
            if noun in found.label and (both or places[place] is None):
                places[place] = found
        if all(places):
            break
    first, second = places
    position = 0.0
    if first and second and in_order(first.swapped, second.swapped, claim.relation):
        overlap = intersection_over_union(first.box, second.box)
        position = 1.0 if overlap > OVERLAP_3D else overlap / OVERLAP_3D if overlap < OVERLAP_3D else 0.0
    return weighted(first, second, position)


def spatial_3d(detections: Sequence[Detection], claim: Claim) -> float:
    """Return the mended score of two objects in depth, from 0 to 1. The detections have their depth (`with_depth`).

    Labels match as in `spatial`, and the depth map is read by rows and columns. The order in depth alone decides, so separate
    objects can be in front of one another; only what is hidden must also overlap.
    """
    first, second = best_pair(detections, claim)
    right = first and second and in_order(first.depth, second.depth, claim.relation)
    if right and first and second and claim.relation == "hidden":
        right = intersection_over_union(first.box, second.box) > 0
    return weighted(first, second, float(bool(right)))


# numeracy


def repeated(first: Box, second: Box) -> bool:
    """Return whether two boxes are one object: more than 0.9 of their union or of either of them is common (sides plus 1)."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    return any(common / whole > 0.9 for whole in (sum(areas) - common, *areas))


def numeracy(detections: Sequence[Detection], counts: Sequence[tuple[int, str]]) -> float:
    """Return upstream's score of counted things, from 0 to 1: half for the presence and half for the number of each.

    counts: (number, singular) as of `counted_nouns`; at least one. Where no label equals a noun, every label that contains it
    is renamed to it, for the nouns after it as well.
    """
    kept: list[Detection] = []
    for found in by_score(detections):
        if not any(found.label == other.label and repeated(found.box, other.box) for other in kept):
            kept.append(found)
    labels = [found.label for found in kept]
    points = 0
    for number, singular in counts:
        noun = RENAMED.get(singular, singular)
        if noun not in labels:
            labels = [noun if noun in label else label for label in labels]
        points += (noun in labels) + (labels.count(noun) == number)  # every number is at least 1
    return points / (2 * len(counts))


# color, shape, texture and complex


def attribute(p_yes: Sequence[float]) -> float:
    """Return the product of P(yes) of a prompt's noun phrases, each and the product rounded to four decimals.

    Only the first eight phrases count, and no phrase at all gives 1, as upstream has it.
    """
    return round(math.prod(round(probability, 4) for probability in p_yes[:8]), 4)


def three_in_one(kind: str, attributes: float, relation: float, action: float) -> float:
    """Return the score of a prompt of complex: the mean of the attributes' score and those that its kind asks for.

    kind: spatial (with the relation's score), action (with the CLIP score) or both; see `complex_kind`.
    """
    parts = {"spatial": (attributes, relation), "action": (attributes, action), "both": (attributes, relation, action)}[kind]
    return sum(parts) / len(parts)
