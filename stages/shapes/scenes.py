"""Scenes of the shapes world, and their rendering.

A scene is a grid, int16 `[4, 4]`. The value 0 is an empty cell and `1 + kind` is an object, where `kind` enumerates shapes,
colours and textures: `kind = (shape * 6 + colour) * 3 + texture`. An image is uint8 `[64, 64, 3]`, with one 16 x 16 tile per
cell. This module imports only NumPy and Pillow, so that stages which read or write scenes start quickly.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

GRID = 4
CELL = 16
SIZE = GRID * CELL
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = {
    "red": (214, 39, 40),
    "green": (34, 139, 60),
    "blue": (38, 84, 196),
    "yellow": (240, 196, 25),
    "purple": (140, 60, 170),
    "orange": (245, 130, 32),
}
COLOR_NAMES = tuple(COLORS)
TEXTURES = ("solid", "striped", "dotted")
KINDS = len(SHAPES) * len(COLORS) * len(TEXTURES)
BACKGROUND = (244, 241, 234)
_SCALE = 8  # tiles are drawn 8 times larger and downsampled, for smooth edges


def encode_kind(shape: int, color: int, texture: int) -> int:
    """Return the grid value of an object, from 1 to KINDS."""
    return 1 + (shape * len(COLORS) + color) * len(TEXTURES) + texture


def decode_kind(value: int) -> tuple[int, int, int]:
    """Return the shape, colour and texture indices of a grid value from 1 to KINDS."""
    rest, texture = divmod(int(value) - 1, len(TEXTURES))
    shape, color = divmod(rest, len(COLORS))
    return shape, color, texture


def _outline(shape: str, draw: ImageDraw.ImageDraw) -> None:
    side = CELL * _SCALE
    low, high, middle = 0.08 * side, 0.92 * side, 0.5 * side
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=255)
    elif shape == "square":
        draw.rectangle((1.4 * low, 1.4 * low, side - 1.4 * low, side - 1.4 * low), fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, low), (high, high), (low, high)], fill=255)
    elif shape == "diamond":
        draw.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=255)
    elif shape == "cross":
        arm = 0.17 * side
        draw.rectangle((middle - arm, low, middle + arm, high), fill=255)
        draw.rectangle((low, middle - arm, high, middle + arm), fill=255)
    else:
        angles = -np.pi / 2 + np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2 == 0, 0.5 * side, 0.22 * side)
        points = [(middle + r * np.cos(a), 1.04 * middle + r * np.sin(a)) for r, a in zip(radii, angles, strict=True)]
        draw.polygon(points, fill=255)


def _tile(shape: str, color: tuple[int, int, int], texture: str) -> np.ndarray:
    side = CELL * _SCALE
    mask = Image.new("L", (side, side))
    _outline(shape, ImageDraw.Draw(mask))
    fill = Image.new("RGB", (side, side), color)
    pattern = ImageDraw.Draw(fill)
    light = tuple(255 - (255 - channel) * 2 // 5 for channel in color)
    unit = _SCALE
    if texture == "striped":
        for top in range(unit, side, 4 * unit):
            pattern.rectangle((0, top, side, top + 2 * unit - 1), fill=light)
    elif texture == "dotted":
        for row in range(0, side, 4 * unit):
            for column in range(0, side, 4 * unit):
                pattern.ellipse((column + unit, row + unit, column + 3 * unit, row + 3 * unit), fill=light)
    tile = Image.new("RGB", (side, side), BACKGROUND)
    tile.paste(fill, mask=mask)
    return np.asarray(tile.resize((CELL, CELL), Image.Resampling.BOX), dtype=np.uint8)


@cache
def tiles() -> np.ndarray:
    """Return all tiles, uint8 `[1 + KINDS, 16, 16, 3]`, indexed by grid value. Tile 0 is the empty cell."""
    empty = np.broadcast_to(np.array(BACKGROUND, dtype=np.uint8), (CELL, CELL, 3))
    objects = [_tile(shape, color, texture) for shape in SHAPES for color in COLORS.values() for texture in TEXTURES]
    return np.stack([empty, *objects])


def render(grids: np.ndarray) -> np.ndarray:
    """Return the images of scenes, integer `[n, 4, 4]`, as uint8 `[n, 64, 64, 3]`."""
    count = len(grids)
    return tiles()[grids].transpose(0, 1, 3, 2, 4, 5).reshape(count, SIZE, SIZE, 3)
