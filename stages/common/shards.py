"""Image shards: WebDataset tar files of lossless PNG, with random access by the manifest's offset."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from stages.common.errors import UserError

BLOCK = 512


def png(image: np.ndarray) -> bytes:
    """Return an image, uint8 `[h, w, 3]`, as PNG bytes. Equal pixels give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def append(file: Any, candidate_id: str, data: bytes) -> tuple[int, int]:
    """Append `<candidate_id>.png` to an open tar file and return the offset and length of the PNG in it, in bytes.

    Owner, mode and time are constants, so equal images give equal tar files.
    """
    info = tarfile.TarInfo(f"{candidate_id}.png")
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    header = info.tobuf(tarfile.USTAR_FORMAT)
    offset = file.tell() + len(header)
    file.write(header + data + b"\0" * (-len(data) % BLOCK))
    return offset, len(data)


def finish(file: Any) -> None:
    """Write the two empty blocks that end a tar file."""
    file.write(b"\0" * 2 * BLOCK)


def read_images(manifest: Path, rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """Return the images of candidate rows, uint8 `[n, h, w, 3]`, read from the tar files beside their manifest.

    Raises UserError when a tar file is missing, or when an image is truncated or damaged. The message names the tar file and,
    for an image, its candidate.
    """
    pictures, files = [], {}
    try:
        for row in rows:
            path = manifest.parent / row["shard"]
            if path not in files:
                files[path] = path.open("rb")
            files[path].seek(row["offset"])
            data = files[path].read(row["nbytes"])
            try:
                picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            except (UnidentifiedImageError, OSError, SyntaxError):
                raise UserError(
                    f"{path}: the picture of candidate {row['candidate_id']} is cut short or broken; "
                    f"delete {path.name} and {manifest.name} and run again"
                ) from None
            pictures.append(picture)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such image shard; delete {manifest} and run again") from None
    finally:
        for file in files.values():
            file.close()
    return np.stack(pictures)
