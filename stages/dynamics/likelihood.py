"""Log-likelihoods, judgements and losses with gradient, through the family interface and nothing else.

A family with an exact likelihood gives exact terms. A bound or an estimate depends on random draws (a mask, a timestep, noise),
which follow from a seed: with fixed seeds the terms are those of the estimate under fixed draws, exactly, and only an
approximation of those of the likelihood itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.common.config import Train
from stages.common.settings import Score
from stages.families.base import Description, Pictures, TrainingView
from stages.families.tools.asking import question_and_prefix
from stages.training.trainer import preference_loss


@dataclass
class Model:
    """A loaded model and how it is asked. view: what it trains. score: the section of the configuration."""

    family: Any
    description: Description
    view: TrainingView
    score: Score

    @property
    def device(self) -> torch.device:
        return next(self.view.model.parameters()).device


def image_logits(model: Model, prompts: list[str], pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits `[n, m, k]` that predict the m tokens of each image, and these tokens, int64 `[n, m]`.

    Only for families with `TokenRows`. Rows are padded on the right as TRL does, and attention is causal.
    """
    assert model.view.token_rows is not None
    ids = model.view.token_rows.ids(prompts, pictures)
    rows = [torch.tensor([*prompt, *image], device=model.device) for prompt, image in ids]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    targets = torch.tensor([image for _, image in ids], device=model.device)
    before = torch.tensor([len(prompt) - 1 for prompt, _ in ids], device=model.device)
    places = before[:, None] + torch.arange(targets.shape[1], device=model.device)
    logits = model.view.model(input_ids=padded, attention_mask=mask).logits
    return logits[torch.arange(len(rows), device=model.device)[:, None], places], targets


def log_likelihoods(model: Model, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> torch.Tensor:
    """Return log p(image | prompt) in nats, `[n]`, with gradient: exact, a bound or an estimate, as the family says."""
    if model.view.losses is not None:
        return -model.view.losses(model.view.model, prompts, pictures, seeds).preference
    logits, targets = image_logits(model, prompts, pictures)
    return logits.log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2).sum(1)


def sft_losses(model: Model, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> torch.Tensor:
    """Return what SFT minimises for each row, `[n]`: for families with `TokenRows` the mean over tokens, in nats.

    The trainer averages over the rows of a batch. For tokens it averages over all tokens, which is the same where all images
    have equally many.
    """
    if model.view.losses is not None:
        return model.view.losses(model.view.model, prompts, pictures, seeds).sft
    logits, targets = image_logits(model, prompts, pictures)
    return -logits.log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2).mean(1)


def dpo_losses(
    model: Model,
    prompts: list[str],
    chosen: Pictures,
    rejected: Pictures,
    seeds: np.ndarray,
    reference: torch.Tensor | None,
    settings: Train,
) -> torch.Tensor:
    """Return what DPO minimises for each pair, `[n]`: the preference loss and the weighted loss of the chosen image.

    reference: log-likelihoods of chosen minus rejected under the reference model, `[n]`. None takes the model itself, which is
    DPO's first step.
    """
    difference = log_likelihoods(model, prompts, chosen, seeds) - log_likelihoods(model, prompts, rejected, seeds)
    margin = difference - (difference.detach() if reference is None else reference)
    if settings.dpo_loss == "ipo" and model.view.losses is None:  # TRL compares means over tokens; all images have equally many
        assert model.view.token_rows is not None
        margin = margin / len(model.view.token_rows.ids(prompts, chosen)[0][1])
    own = sft_losses(model, prompts, chosen, seeds) if settings.nll_weight else torch.zeros_like(margin)
    return preference_loss(margin, settings) + settings.nll_weight * own


def log_odds(model: Model, prompt: str, image: np.ndarray) -> torch.Tensor:
    """Return log p(yes) - log p(no) of the branch that answers questions, about one image uint8 `[h, w, 3]`, with gradient.

    The cross-entropy against "no" minus that against "yes" is exactly this, so every family with `judge_loss` has it.
    """
    template, prefix = question_and_prefix(model.description, model.score)
    asked = (model.view.model, image[None], [template.replace("{prompt}", prompt)])
    yes, no = (model.family.judge_loss(*asked, np.array([target]), prefix) for target in (1.0, 0.0))
    return no - yes


def posterior(log_likelihood: torch.Tensor) -> torch.Tensor:
    """Return log p(y0 | x0) where the first log-likelihood, of `[1 + a]`, is that of y0 and the others are alternatives'."""
    return log_likelihood[0] - log_likelihood.logsumexp(0)


def repeated(pictures: Pictures, count: int) -> Pictures:
    """Return one picture `count` times."""
    arrays = {name: getattr(pictures, name) for name in ("images", "tokens", "latents")}
    return Pictures(**{name: np.repeat(array, count, 0) for name, array in arrays.items() if array is not None})


def under_prompts(model: Model, prompts: Sequence[str], picture: Pictures, seed: int) -> torch.Tensor:
    """Return log p(image | prompt) of one image under several prompts, `[n]`, all with the same random draws."""
    seeds = np.full(len(prompts), seed, dtype=np.int64)
    return log_likelihoods(model, list(prompts), repeated(picture, len(prompts)), seeds)
