"""The schedule as a data set. Rows look their candidates up when they are needed, so no picture is held once for each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.common.candidates import Candidates
from stages.common.seeds import draw_seed, hash_seed, uniforms
from stages.families.base import Pictures, TokenRows, TrainingView

Row = dict[str, Any]


@dataclass
class Material:
    """What the rows of a training are made of.

    schedule: rows of the schedule manifest, in order. prompts: prompt text by prompt_id. anchors: how many judgements the
    judge anchor has; row i is paired with judgement i modulo this number, and with none where it is 0. prompt_dropout: the
    share of rows that lose their prompt.
    """

    schedule: Sequence[Row]
    prompts: dict[str, str]
    candidates: Candidates
    dpo: bool
    anchors: int
    prompt_dropout: float
    seed: int

    def texts(self, places: Sequence[int]) -> list[str]:
        """Return the prompts of the schedule's rows at these places."""
        return [self.prompts[self.schedule[place]["prompt_id"]] for place in places]

    def dropped(self, places: Sequence[int]) -> list[bool]:
        """Return which rows are trained without their prompt. It depends on the pair and the epoch, as all draws do.

        It has seeds of its own: a family takes its mask or timestep from the first numbers of a row's seed, so the same numbers
        here would give rows without a prompt other masks or timesteps than the rest.
        """
        if not self.prompt_dropout:
            return [False] * len(places)
        own = np.array([hash_seed("prompt dropout", seed) for seed in self.seeds(places)])
        return (uniforms(own, 1)[:, 0] < self.prompt_dropout).tolist()

    def seeds(self, places: Sequence[int]) -> np.ndarray:
        """Return the seeds of everything random in the losses of these rows, int64 `[n]`."""
        rows = [self.schedule[place] for place in places]
        return np.array([draw_seed(self.seed, row["chosen"], row["rejected"], row["epoch"]) for row in rows])

    def pictures(self, places: Sequence[int], side: str) -> Pictures:
        """Return their chosen or rejected pictures."""
        return self.candidates.pictures([self.schedule[place][side] for place in places])

    def anchor(self, place: int) -> dict[str, int]:
        """Return the column of the judge anchor, if there is one."""
        return {"anchor": place % self.anchors} if self.anchors else {}


def make_rows(view: TrainingView, material: Material) -> Any:
    """Return the data set that the view's trainer takes."""
    return token_rows(view.token_rows, material) if view.token_rows else LossRows(material)


def token_rows(rows: TokenRows, material: Material) -> Any:
    """Return a `datasets.Dataset` whose rows are token ids, made when the trainer asks for them."""
    from datasets import Dataset

    return Dataset.from_dict({"row": list(range(len(material.schedule)))}).with_transform(TokenIds(rows, material))


@dataclass
class TokenIds:
    """Makes the columns that TRL's trainers read, from the places of rows in the schedule."""

    rows: TokenRows
    material: Material

    def __reduce__(self) -> tuple[Any, ...]:
        """`datasets` pickles a transform to hash it, and `rows` refers to the whole model, which would be copied for that."""
        return TokenIds, ()

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows, material, places = self.rows, self.material, batch["row"]
        texts = material.texts(places)
        chosen = rows.ids(texts, material.pictures(places, "chosen"))
        columns: dict[str, list[Any]] = {}
        if material.dpo:
            rejected = rows.ids(texts, material.pictures(places, "rejected"))
            columns["prompt_ids"] = [prompt for prompt, _ in chosen]
            columns["chosen_ids"] = [image for _, image in chosen]
            columns["rejected_ids"] = [image for _, image in rejected]
            for side in ("chosen", "rejected"):
                columns[f"ref_{side}_logps"] = [material.schedule[place][f"reference_{side}"] for place in places]
        else:
            for row, dropped in enumerate(material.dropped(places)):
                if dropped:
                    prompt, image = chosen[row]
                    chosen[row] = rows.unconditional(prompt), image
            columns["input_ids"] = [prompt + image for prompt, image in chosen]
            columns["labels"] = [[-100] * len(prompt) + image for prompt, image in chosen]
        if material.anchors:
            columns["anchor"] = [place % material.anchors for place in places]
        return columns


class LossRows(torch.utils.data.Dataset):
    """The rows of a family that computes its own losses. A row is its place in the schedule; `collate` makes the batch."""

    def __init__(self, material: Material) -> None:
        self.material = material

    def __len__(self) -> int:
        return len(self.material.schedule)

    def __getitem__(self, place: int) -> Row:
        return {"place": place, **self.material.anchor(place)}

    def collate(self, batch: list[Row]) -> dict[str, Any]:
        """Return prompts, pictures and seeds of a batch; for DPO those of the chosen, then those of the rejected."""
        material, places = self.material, [row["place"] for row in batch]
        rows = [material.schedule[place] for place in places]
        seeds = material.seeds(places)
        texts, pictures = material.texts(places), material.pictures(places, "chosen")
        if not material.dpo:
            texts = ["" if dropped else text for text, dropped in zip(texts, material.dropped(places), strict=True)]
            return {"prompts": texts, "pictures": pictures, "seeds": seeds}
        return {
            "prompts": texts * 2,
            "pictures": joined(pictures, material.pictures(places, "rejected")),
            "seeds": np.concatenate([seeds, seeds]),
            "reference_chosen": torch.tensor([row["reference_chosen"] for row in rows]),
            "reference_rejected": torch.tensor([row["reference_rejected"] for row in rows]),
        }


def joined(first: Pictures, second: Pictures) -> Pictures:
    """Return the pictures of both, one after the other."""
    parts = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("images", "tokens", "latents")
        if getattr(first, name) is not None
    }
    return Pictures(**parts)
