"""Pictures as models take them."""

from __future__ import annotations

import numpy as np
from PIL import Image


def square(images: np.ndarray, side: int) -> np.ndarray:
    """Return images, uint8 `[n, h, w, 3]`, with the short side resized to `side` (bicubic) and the centre cut out.

    This is what torchvision's Resize and CenterCrop do with PIL images. Images of that size are returned as they are.
    """
    height, width = images.shape[1:3]
    if height == width == side:
        return images
    short = min(height, width)
    size = [side if edge == short else int(side * edge / short) for edge in (width, height)]
    left, top = (int(round((edge - side) / 2)) for edge in size)  # noqa: RUF046 -- as torchvision
    pictures = [Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(picture.crop((left, top, left + side, top + side))) for picture in pictures])
