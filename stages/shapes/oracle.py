"""The exact oracle: it reconstructs the scene from an image and decides whether a prompt describes it."""

from __future__ import annotations

import itertools

import numpy as np

from stages.shapes.grammar import Meaning, holds
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
