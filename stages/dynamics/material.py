"""Probes and training rows with their pictures, and a model in the form that learning dynamics need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.common import manifests, shards
from stages.common.candidates import Candidates
from stages.common.config import Config, Train
from stages.common.errors import UserError
from stages.dynamics import gradients, likelihood
from stages.dynamics.gradients import Parameters
from stages.dynamics.likelihood import Model
from stages.families import describe, open_family

Row = dict[str, Any]


@dataclass
class Material:
    """What terms are computed from. candidates, images: of everything that probes and rows refer to."""

    model: Model
    parameters: Parameters
    candidates: Candidates
    paths: Sequence[Path]
    config: Config

    @cached_property
    def places(self) -> dict[str, tuple[Path, Row]]:
        """Return where each candidate's image is: its manifest and its row there."""
        columns = ("tokens", "latents")
        return {
            row["candidate_id"]: (path, row)
            for path in self.paths
            for row in manifests.read_rows(path, "candidates", without=columns, wanted=self.candidates.place)
        }

    def picture(self, name: str) -> Any:
        return self.candidates.pictures([name])

    def image(self, name: str) -> np.ndarray:
        """Return the stored image, uint8 `[h, w, 3]`."""
        path, row = self.places[name]
        return shards.read_images(path, [row])[0]

    # --- scalars whose gradients are terms ---------------------------------------------------------------------------

    def likelihoods(self, probe: Row, prompts: Sequence[str] | None = None) -> torch.Tensor:
        """Return log p(image | prompt) under a probe's prompt and its alternatives, or under the given prompts, `[n]`."""
        wanted = [probe["prompt"], *probe["alternatives"]] if prompts is None else prompts
        return likelihood.under_prompts(self.model, wanted, self.picture(probe["candidate_id"]), probe["seed"])

    def log_odds(self, probe: Row) -> torch.Tensor:
        return likelihood.log_odds(self.model, probe["prompt"], self.image(probe["candidate_id"]))

    def losses(self, rows: Sequence[Row], reference: torch.Tensor | None = None) -> torch.Tensor:
        """Return what each training row's objective minimises, `[n]`; all rows have the same objective."""
        prompts, seeds = [row["prompt"] for row in rows], np.array([row["seed"] for row in rows], dtype=np.int64)
        chosen = self.candidates.pictures([row["chosen"] for row in rows])
        if not rows[0]["rejected"]:
            return likelihood.sft_losses(self.model, prompts, chosen, seeds)
        rejected = self.candidates.pictures([row["rejected"] for row in rows])
        settings = self.train_settings(rows[0]["arm"])
        return likelihood.dpo_losses(self.model, prompts, chosen, rejected, seeds, reference, settings)

    def train_settings(self, arm: str) -> Train:
        return self.config.arm_train(arm)

    @cached_property
    def judges(self) -> bool:
        """Whether the family's judgements have a gradient."""
        return "judge" in self.model.description.roles and hasattr(self.model.family, "judge_loss")

    # --- gradients ---------------------------------------------------------------------------------------------------

    def gradient(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        return gradients.gradient(function(), self.parameters)

    def probe_gradients(self, probe: Row) -> torch.Tensor:
        """Return the gradients of log-likelihood, log posterior and log odds, `[3, size]`; zeros without a judge."""
        found = [
            self.gradient(lambda: self.likelihoods(probe, [probe["prompt"]])[0]),
            self.gradient(lambda: likelihood.posterior(self.likelihoods(probe))),
        ]
        found.append(self.gradient(lambda: self.log_odds(probe)) if self.judges else torch.zeros_like(found[0]))
        return torch.stack(found)

    def descent(self, row: Row) -> torch.Tensor:
        """Return minus the gradient of a training row's loss, or for a probe the gradient of its log-likelihood, `[size]`."""
        if "objective" not in row:
            return self.gradient(lambda: self.likelihoods(row, [row["prompt"]])[0])
        return -self.gradient(lambda: self.losses([row])[0])


def open_material(
    config: Config, checkpoint: Path, probes: Sequence[Row], rows: Sequence[Row], candidates: Sequence[Path]
) -> Material:
    """Load the model, with gradients for what is trained by default, and look up all pictures.

    Raises UserError on a family that is not trained and on subsets of parameters that the model does not have.
    """
    name = config.model.family
    description = describe(name)
    if "train" not in description.roles:
        raise UserError(f"model.family {name}: it is not trained, so there are no learning dynamics; choose another family")
    family = open_family(config.model, checkpoint, "train")
    view = family.training_view()
    view.model.eval()
    prefixes = tuple(prefix for group in config.train.trainable.split("+") for prefix in view.groups[group])
    try:
        parameters = gradients.chosen_parameters(view.model, prefixes, config.dynamics.parameters)
    except ValueError:
        known = ", ".join(gradients.chosen_parameters(view.model, prefixes).subsets)
        wanted = ", ".join(config.dynamics.parameters)
        raise UserError(f"dynamics.parameters: the model has no subset {wanted}; it has {known}") from None
    wanted = {row["candidate_id"] for row in probes} | {
        row[side] for row in rows for side in ("chosen", "rejected") if row[side]
    }
    found = Candidates(candidates, wanted, description)
    return Material(likelihood.Model(family, description, view, config.score), parameters, found, candidates, config)
