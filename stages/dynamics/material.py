"""Probes and training rows with their pictures, and a model in the form that learning dynamics need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.common import manifests, shards
from stages.common.batches import planned
from stages.common.candidates import Candidates
from stages.common.config import Config, Train
from stages.common.errors import UserError
from stages.dynamics import gradients, likelihood
from stages.dynamics.gradients import Parameters
from stages.dynamics.likelihood import Model
from stages.families import describe, open_family
from stages.training.trainer import lora

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

    def values(self, probe: Row) -> torch.Tensor:
        """Return log-likelihood, log posterior and log odds of a probe, `[3]`; the last is 0 without a judge."""
        found = self.likelihoods(probe)
        odds = self.log_odds(probe) if self.judges else torch.zeros_like(found[0])
        return torch.stack([found[0], likelihood.posterior(found), odds])

    def judgements(self, probe: Row) -> torch.Tensor:
        """Return log posterior and log odds of a probe, `[2]`."""
        return self.values(probe)[1:]

    def plain_likelihoods(self, probes: Sequence[Row]) -> torch.Tensor:
        """Return log p(image | prompt) of several probes, `[n]`."""
        seeds = np.array([probe["seed"] for probe in probes], dtype=np.int64)
        pictures = self.candidates.pictures([probe["candidate_id"] for probe in probes])
        return likelihood.log_likelihoods(self.model, [probe["prompt"] for probe in probes], pictures, seeds)

    def summed_loss(self, rows: Sequence[Row]) -> torch.Tensor:
        return self.losses(rows).sum()

    def mean_gradient(self, rows: Sequence[Row], size: int) -> torch.Tensor:
        """Return the gradient of the mean loss of a batch, `[size]`, computed from `size` rows at a time."""
        total = torch.zeros(self.parameters.size, dtype=next(iter(self.parameters.tensors.values())).dtype)
        total = total.to(self.model.device)
        for part in planned(rows, size):
            total += self.gradient(partial(self.summed_loss, part)) / len(rows)
        return total

    def losses(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return what each training row's arm minimises, `[n]`, without a judge anchor; all rows are of one arm.

        For DPO, a row may bring `reference`, the log-likelihood of its chosen minus that of its rejected image under the
        reference model; rows without it are compared with the model itself.
        """
        prompts, seeds = [row["prompt"] for row in rows], np.array([row["seed"] for row in rows], dtype=np.int64)
        chosen = self.candidates.pictures([row["chosen"] for row in rows])
        settings = self.config.arm_train(rows[0]["arm"])
        if not rows[0]["rejected"]:
            return settings.image_weight * likelihood.sft_losses(self.model, prompts, chosen, seeds)
        rejected = self.candidates.pictures([row["rejected"] for row in rows])
        known = [row["reference"] for row in rows if row.get("reference") is not None]
        kind = next(iter(self.parameters.tensors.values())).dtype
        reference = torch.tensor(known, device=self.model.device, dtype=kind) if known else None
        losses = likelihood.dpo_losses(self.model, prompts, chosen, rejected, seeds, reference, settings)
        return settings.image_weight * losses

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
    config: Config,
    checkpoint: Path,
    probes: Sequence[Row],
    rows: Sequence[Row],
    candidates: Sequence[Path],
    train: Train | None = None,
) -> Material:
    """Load the model, with gradients for what is trained, and look up all pictures.

    What is trained is said by the section train and dynamics.parameters, or by `train`, an arm's settings. With train.lora_rank
    it is the adapters, which begin with the seed of the run. Raises UserError on a family that is not trained and on subsets of
    parameters that the model does not have.
    """
    name = config.model.family
    description = describe(name)
    if "train" not in description.roles:
        raise UserError(f"model.family {name}: it is not trained, so there are no learning dynamics; choose another family")
    family = open_family(config.model, checkpoint, "train")
    view = family.training_view()
    settings, subsets = train or config.train, [] if train else config.dynamics.parameters
    prefixes, part = tuple(prefix for group in settings.trainable.split("+") for prefix in view.groups[group]), ""
    if settings.lora_rank:
        from peft import get_peft_model

        torch.manual_seed(config.seed)
        adapted: Any = get_peft_model(view.model, lora(view.model, prefixes, settings))  # type: ignore[arg-type]
        view, prefixes, part = replace(view, model=adapted), ("",), "lora_"
    view.model.eval()
    try:
        parameters = gradients.chosen_parameters(view.model, prefixes, subsets, part)
    except ValueError:
        known = ", ".join(gradients.chosen_parameters(view.model, prefixes, (), part).subsets)
        missing = ", ".join(subsets)
        raise UserError(f"dynamics.parameters: the model has no subset {missing}; it has {known}") from None
    wanted = {row["candidate_id"] for row in probes} | {
        row[side] for row in rows for side in ("chosen", "rejected") if row[side]
    }
    found = Candidates(candidates, wanted, description)
    return Material(likelihood.Model(family, description, view, config.score), parameters, found, candidates, config)
