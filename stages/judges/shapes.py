"""The exact oracle of the shapes world: it reads every scene from the pixels and compares it with the prompt's meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from stages.common.errors import UserError
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict

if TYPE_CHECKING:
    import numpy as np

    from stages.shapes.grammar import Meaning


class ShapesJudge(JudgeSettings):
    kind: Literal["shapes"]


def open_oracle(settings: ShapesJudge) -> Judge:
    """Return the oracle. It raises UserError when a prompt or an image is not of the shapes world."""
    from stages.shapes import oracle

    def judge(items: Sequence[Item]) -> list[Verdict]:
        meanings = [meaning_of(item) for item in items]
        grids = read_scenes(items)
        errors = [oracle.error(meaning, grid) for meaning, grid in zip(meanings, grids, strict=True)]
        return [Verdict(error is None, reason=error) for error in errors]

    return judge


def meaning_of(item: Item) -> Meaning:
    """Return what the item's prompt says, from its metadata."""
    from stages.shapes.grammar import from_json

    try:
        return from_json(item.prompt["metadata"])
    except ValueError as error:
        raise UserError(f"prompt {item.prompt['prompt']!r}: {error}; the judge shapes needs prompts of source shapes") from None


def read_scenes(items: Sequence[Item]) -> np.ndarray:
    """Return the scenes that the pictures show."""
    import numpy as np

    from stages.shapes import oracle

    try:
        return oracle.read(np.stack([item.image for item in items]))
    except ValueError as error:
        raise UserError(
            f"images from candidate {items[0].candidate_id} on: {error}; the judge shapes needs images of that world"
        ) from None


SHAPES = JudgeKind(ShapesJudge, open_oracle)
