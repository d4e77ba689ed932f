"""The exact oracle: it reads a picture back into a scene and says whether a prompt describes it."""

from __future__ import annotations

import itertools

import numpy as np

from stages.shapes.grammar import Meaning, holds
from stages.shapes.scenes import CELL, GRID, tiles

UNREADABLE = -1
TOLERANCE = 0.03  # mean squared error of a cell against its nearest tile, pixels in [0, 1]


def read(images: np.ndarray) -> np.ndarray:
    """Read pictures: `uint8 [n, 64, 64, 3]` to grids `int16 [n, 4, 4]`.

    Each cell takes the value of its nearest tile by mean squared error; a cell further than TOLERANCE from every tile
    is UNREADABLE, and a scene with such a cell matches no prompt. Raises ValueError on pictures of another size.
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
    """Whether the scene has exactly the objects of the meaning, and the relation holds for some way to name them."""
    flat = grid.ravel()
    cells = np.flatnonzero(flat)
    wanted = [group for group in meaning.groups for _ in range(group.count)]
    if (flat == UNREADABLE).any() or len(cells) != len(wanted):
        return False
    fits = [[group.fits(flat[cell]) for cell in cells] for group in wanted]
    for order in itertools.permutations(range(len(cells))):
        if all(fits[i][j] for i, j in enumerate(order)) and (
            meaning.relation is None or holds(meaning.relation, int(cells[order[0]]), int(cells[order[1]]))
        ):
            return True
    return False
