"""Candidates between models and manifests: what a family drew becomes columns, and rows become what a family trains on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.common import manifests, shards
from stages.common.errors import UserError
from stages.families.base import Description, Drawn, Pictures

LARGEST_TOKEN = np.iinfo(np.uint32).max


class CandidateRow(TypedDict, total=False):
    """A row of a candidates manifest as Python values; the manifest's schema describes every field."""

    candidate_id: str
    prompt_id: str
    round: int
    index: int
    seed: int
    shard: str
    offset: int
    nbytes: int
    width: int
    height: int
    checkpoint: str
    sampling: str
    log_probability: float | None


def sampling_text(sampling: Any) -> str:
    """Return the family's sampling settings (a pydantic model) as JSON, in the order of their fields."""
    return json.dumps(sampling.model_dump())


def representation(drawn: Drawn, place: int) -> dict[str, Any]:
    """Return the columns tokens, latents and shape of one candidate. Raises ValueError on a token that does not fit."""
    if drawn.tokens is not None:
        tokens = np.asarray(drawn.tokens[place])
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= LARGEST_TOKEN:
            raise ValueError(
                f"image tokens between {tokens.min()} and {tokens.max()} do not fit the column tokens (0 to {LARGEST_TOKEN})"
            )
        return {"tokens": tokens.ravel().astype(np.uint32), "latents": None, "shape": list(tokens.shape)}
    if drawn.latents is not None:
        latents = np.asarray(drawn.latents[place], dtype=np.float32)
        return {"tokens": None, "latents": latents.ravel(), "shape": list(latents.shape)}
    return {"tokens": None, "latents": None, "shape": None}


class Candidates:
    """Wanted candidates of several manifests, kept compactly and looked up by candidate_id."""

    def __init__(self, paths: Sequence[Path], wanted: set[str], description: Description) -> None:
        """Read the rows. Raises UserError when a wanted candidate is in none of the manifests."""
        self.description = description
        column = {"tokens": "tokens", "latents": "latents", "pixels": None}[description.candidate]
        unused = [name for name in ("tokens", "latents") if name != column]
        identifiers = pa.array(sorted(wanted), pa.string())
        self.place: dict[str, tuple[int, int]] = {}
        self.paths = list(paths)
        self.tables: list[pa.Table] = []
        for number, path in enumerate(paths):
            table = manifests.read(path, "candidates").drop_columns(unused)
            table = table.filter(pc.is_in(table["candidate_id"], identifiers)).combine_chunks()
            if column and table[column].null_count:
                raise UserError(
                    f"{path}: column {column!r} is empty, but model.family {description.name} trains on it; draw these "
                    "candidates with that family"
                )
            self.tables.append(table)
            self.place |= {name: (number, row) for row, name in enumerate(table["candidate_id"].to_pylist())}
        if lost := sorted(wanted - self.place.keys()):
            names = ", ".join(map(str, paths))
            raise UserError(f"candidate {lost[0]} is in none of the candidate manifests ({names}); give them all")

    def prompt_ids(self, names: Sequence[str]) -> list[str]:
        """Return the prompt_id of each candidate."""
        return [self._cell(name, "prompt_id") for name in names]

    def pictures(self, names: Sequence[str]) -> Pictures:
        """Return the candidates in the form that the family trains on."""
        if self.description.candidate == "pixels":
            return Pictures(images=np.concatenate([self._image(name) for name in names]))
        column = self.description.candidate
        arrays = []
        for name in names:
            number, row = self.place[name]
            values = self.tables[number][column][row].values.to_numpy(zero_copy_only=False)
            arrays.append(values.reshape(self._cell(name, "shape")))
        if column == "tokens":
            return Pictures(tokens=np.stack(arrays).astype(np.int64))
        return Pictures(latents=np.stack(arrays).astype(np.float32))

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """Return a hash of each candidate's picture, in the form that the family trains on, by candidate_id.

        A candidate_id does not contain the picture: the same id, drawn again in another precision or by other code, can be
        another one.
        """
        found = {}
        for name in names:
            picture = self.pictures([name])
            parts = [part for part in (picture.images, picture.tokens, picture.latents) if part is not None]
            found[name] = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]
        return found

    def _cell(self, name: str, column: str) -> Any:
        number, row = self.place[name]
        return self.tables[number][column][row].as_py()

    def _image(self, name: str) -> np.ndarray:
        number, row = self.place[name]
        fields = {column: self.tables[number][column][row].as_py() for column in ("candidate_id", "shard", "offset", "nbytes")}
        return shards.read_images(self.paths[number], [fields])
