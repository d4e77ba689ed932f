"""The exact oracle: it reconstructs the scene from an image, decides whether a prompt describes it, and names the error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from stages.shapes.grammar import Group, Meaning, holds
from stages.shapes.scenes import CELL, GRID, tiles

UNREADABLE = -1
TOLERANCE = 0.03  # largest mean squared error between a cell and its nearest tile, for pixels in [0, 1]


def read(images: np.ndarray) -> np.ndarray:
    """Return the scenes of images, uint8 `[n, 64, 64, 3]`, as grids, int16 `[n, 4, 4]`.

    Each cell takes the value of its nearest tile by mean squared error. A cell whose error exceeds TOLERANCE for every tile is
    UNREADABLE, and a scene with such a cell matches no prompt. Raises ValueError on images of another size.
    """
    count = len(images)
    if images.shape[1:] != (GRID * CELL, GRID * CELL, 3):
        raise ValueError(f"the shapes oracle reads 64 x 64 RGB pictures, got {images.shape[1:]}")
    cells = images.reshape(count, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    pixels = cells.reshape(count * GRID * GRID, -1).astype(np.float32) / 255
    known = tiles().reshape(len(tiles()), -1).astype(np.float32) / 255
    errors = (pixels**2).sum(1)[:, None] - 2 * pixels @ known.T + (known**2).sum(1)[None]
    nearest = errors.argmin(1)
    best = errors[np.arange(len(errors)), nearest] / pixels.shape[1]
    return np.where(best <= TOLERANCE, nearest, UNREADABLE).astype(np.int16).reshape(count, GRID, GRID)


def matches(meaning: Meaning, grid: np.ndarray) -> bool:
    """Return whether the scene has exactly the meaning's objects, and its relation holds for some assignment of them."""
    return len(_objects(grid)) == sum(group.count for group in meaning.groups) and contains(meaning, grid)


def contains(meaning: Meaning, grid: np.ndarray) -> bool:
    """Return whether the scene has the meaning's objects in its relation, perhaps beside others."""
    if (grid == UNREADABLE).any():
        return False
    return any(
        meaning.relation is None or holds(meaning.relation, chosen[0][0], chosen[1][0])
        for chosen in _choices(meaning.groups, _objects(grid))
    )


def error(meaning: Meaning, grid: np.ndarray) -> str | None:
    """Return the kind of error that makes the scene differ from the meaning, or None if the scene matches.

    unreadable  the oracle cannot read a part of the picture
    relation    the objects are right, and the relation does not hold
    number      some objects are missing or some are too many, and nothing else is wrong
    shape, color, texture
                the scene matches if this attribute is free in one of the groups, and no other attribute has this effect
    several     anything else, such as two groups with a wrong colour, or a wrong colour and a wrong relation
    """
    if (grid == UNREADABLE).any():
        return "unreadable"
    if matches(meaning, grid):
        return None
    if matches(replace(meaning, relation=None), grid):
        return "relation"
    if len(_objects(grid)) > sum(group.count for group in meaning.groups):
        return "number" if contains(meaning, grid) else "several"
    if len(_objects(grid)) < sum(group.count for group in meaning.groups):
        return "number" if any(matches(part, grid) for part in _parts(meaning)) else "several"
    wrong = [
        attribute
        for attribute in ("shape", "color", "texture")
        if any(matches(_freed(meaning, i, attribute), grid) for i in range(len(meaning.groups)))
    ]
    return wrong[0] if len(wrong) == 1 else "several"


def _objects(grid: np.ndarray) -> dict[int, int]:
    """Return the scene's objects: cell -> grid value."""
    flat = grid.ravel()
    return {int(cell): int(flat[cell]) for cell in np.flatnonzero(flat)}


def _choices(groups: Sequence[Group], objects: dict[int, int]) -> Iterator[list[tuple[int, ...]]]:
    """Yield every way to choose the cells of each group, without using a cell twice."""
    if not groups:
        yield []
        return
    fitting = [cell for cell, value in objects.items() if groups[0].fits(value)]
    for chosen in itertools.combinations(fitting, groups[0].count):
        left = {cell: value for cell, value in objects.items() if cell not in chosen}
        for others in _choices(groups[1:], left):
            yield [chosen, *others]


def _parts(meaning: Meaning) -> Iterator[Meaning]:
    """Yield the meanings that remain if objects are left out. A relation needs all its objects and is dropped."""
    for counts in itertools.product(*(range(group.count + 1) for group in meaning.groups)):
        kept = tuple(replace(group, count=count) for group, count in zip(meaning.groups, counts, strict=True))
        yield replace(meaning, groups=kept, relation=None)


def _freed(meaning: Meaning, which: int, attribute: str) -> Meaning:
    """Return the meaning with one attribute of one group free, so that each of its objects may have any value of it."""
    groups = list(meaning.groups)
    groups[which] = replace(groups[which], **{attribute: None})  # type: ignore[arg-type]
    return replace(meaning, groups=tuple(groups))
