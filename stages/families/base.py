"""The interface between the stages and a model family. Stages know this page and nothing else about a model.

A family is a package `stages/families/<name>/`. Its `__init__.py` holds a `Description`, which tells the configuration and
the workflow what they need to know without loading torch. Its loader returns an object with the methods of `Family`, or
with those of the roles that the family has:

1. It draws: prompts, seeds and the family's own sampling settings become images.
2. It judges: images and questions become P(yes), or generated answers.
3. It can be trained: it gives the likelihood of candidates, and losses with gradient.

The interface does not assume autoregression, a codebook, a tokenizer or a single weight file. Autoregressive, masked and
flow-matching models answer the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel

if TYPE_CHECKING:
    import torch

Role = Literal["draw", "judge", "train"]


@dataclass(frozen=True)
class Description:
    """What is known about a family without loading its weights.

    name: the value of `model.family` in the configuration.
    loader: `"package.module:Class"`; the class has a classmethod `load` (see `Family`).
    roles: the roles that the family has.
    sampling: the family's sampling settings, a pydantic model with a default, limits and a description for every key. It
        checks `generate.sampling` of the configuration; the settings are stored with every candidate.
    question: what the judge is asked unless the configuration sets `score.question`. It contains {prompt}.
    answer_prefix: how the answer to that question begins, up to the token that is the verdict.
    candidate: what likelihoods and losses are computed from: the "tokens" or "latents" that drawing returned, or the
        "pixels" of the stored image.
    likelihood: whether `log_likelihood` is "exact", a lower "bound", or an "estimate" that depends on random draws (a mask,
        a timestep, noise). None for a family that is not trained.
    groups: names of the parameter groups that `train.trainable` may join with a plus sign, such as "llm" and "projector".
    files: a function of the checkpoint folder and a role that returns the files on which the family depends in that role, in
        a fixed order. A checkpoint may consist of several folders below that one. Raises UserError when the folder does not
        hold a checkpoint of this family, and names the remedy.
    trained_file: the file, relative to the checkpoint folder, that the family's `save` is known by. Training moves it into
        place last, so the checkpoint is complete where this file exists.
    drawing_flops: a function of the checkpoint folder and the sampling settings that returns the floating-point operations of
        drawing one image. Time limits follow from it where they are longer than what reading the weights takes. None for a
        family whose drawing is bound by reading weights.
    """

    name: str
    loader: str
    roles: frozenset[Role]
    sampling: type[BaseModel]
    question: str
    answer_prefix: str
    candidate: Literal["tokens", "latents", "pixels"]
    likelihood: Literal["exact", "bound", "estimate"] | None
    groups: tuple[str, ...]
    files: Callable[[Path, Role], list[Path]]
    trained_file: str
    drawing_flops: Callable[[Path, Any], float] | None = None


@dataclass
class Pictures:
    """n candidates, in the form that the family's likelihood and losses need (see `Description.candidate`).

    images: uint8 `[n, height, width, 3]`.
    tokens: the family's discrete codes, int64 `[n, ...]`; the shape after n is the family's, such as `[n, 16, 16, 4]`.
    latents: the family's continuous representation, float32 `[n, ...]`.
    """

    images: np.ndarray | None = None
    tokens: np.ndarray | None = None
    latents: np.ndarray | None = None


@dataclass
class Drawn:
    """n candidates as they were drawn.

    images: uint8 `[n, height, width, 3]`.
    tokens, latents: as in `Pictures`; None where the family has none.
    log_probabilities: float64 `[n]`, the natural logarithm of p(candidate | prompt) under the conditional model, without
        guidance and at temperature 1, so that it equals `log_likelihood` of the same candidate. None where it is unknown.
    """

    images: np.ndarray
    tokens: np.ndarray | None = None
    latents: np.ndarray | None = None
    log_probabilities: np.ndarray | None = None


@dataclass
class RowLosses:
    """Losses of n rows, both float tensors `[n]` with gradient, from the same forward pass and the same random draws.

    sft: what supervised fine-tuning minimises for this row, normalised as the family's authors do it.
    preference: the negative log-likelihood of the row's image in nats (or the bound, estimate or error that stands for it).
        The preference loss compares it with the reference model's value for the same draws.
    """

    sft: torch.Tensor
    preference: torch.Tensor


@dataclass
class TokenRows:
    """How an autoregressive family presents its rows to TRL's trainers, which compute the loss themselves.

    TRL computes hidden states times output embedding and never materialises the logits of a whole batch.

    tokenizer: a plain tokenizer, TRL's `processing_class`.
    ids: from n prompts and their pictures to n pairs (prompt ids, image ids), in the vocabulary of `TrainingView.model`.
    unconditional: from prompt ids to those of the row without a prompt, as drawing under guidance uses it.
    """

    tokenizer: Any
    ids: Callable[[list[str], Pictures], list[tuple[list[int], list[int]]]]
    unconditional: Callable[[list[int]], list[int]]


@dataclass
class TrainingView:
    """What the trainer needs from a family. Exactly one of `token_rows` and `losses` is given.

    model: the module that is trained.
    groups: prefixes of parameter names for each group in `Description.groups`. "llm" is the default group.
    judge_only: prefixes of parameters that no image loss reaches, only the judge's.
    flops: floating-point operations of one forward pass over one row with the given prompt.
    token_rows: for families that use TRL's own loss.
    losses: from (model, prompts, pictures, seeds) to `RowLosses`. `model` is `TrainingView.model` as the trainer has wrapped
        it, and the function runs the forward pass through `model(...)`, because distributed wrappers rely on that. seeds,
        int64 `[n]`, determine everything that the family draws for a row. Rows with equal seeds share their draws, so chosen
        and rejected, policy and reference see the same mask, timestep or noise. An empty prompt stands for the row without a
        prompt, as drawing under guidance uses it.
    """

    model: torch.nn.Module
    groups: dict[str, tuple[str, ...]]
    judge_only: tuple[str, ...]
    flops: Callable[[str], float]
    token_rows: TokenRows | None = None
    losses: Callable[[torch.nn.Module, list[str], Pictures, np.ndarray], RowLosses] | None = None


class Family(Protocol):
    """A loaded model. Every method runs without gradient except those that say otherwise."""

    @classmethod
    def load(cls, checkpoint: Path, device: str, dtype: str, role: Role) -> Family:
        """Load a checkpoint for one role.

        device is a torch device such as "cpu" or "cuda:0", dtype is "float32" or "bfloat16". Only safetensors are read.
        Raises UserError on a folder of another family, on pickled or broken weights, and names the remedy.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `load` reads, with `Description.trained_file` among its files."""
        ...

    def bucket(self, prompt: str) -> int:
        """Return a small integer. Candidates whose prompts have the same bucket run together without padding."""
        ...

    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: Any) -> Drawn:
        """Draw one candidate for each prompt and seed (int64 `[n]`).

        sampling is an instance of `Description.sampling`. A candidate depends on its prompt, its seed and the sampling
        settings, never on the other candidates of the batch, except for floating-point ties.
        """
        ...

    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Judge n images, uint8 `[n, height, width, 3]`, by n questions.

        Returns P(yes) / (P(yes) + P(no)) at the first answer token after `prefix`, and the probability mass on neither
        answer, 1 - P(yes) - P(no); both are float64 `[n]`. P(yes) sums every single-token spelling of yes and of 1, and
        P(no) those of no and of 0. Where both are 0, the first is NaN.
        """
        ...

    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int) -> list[str]:
        """Return the answers, decoded greedily."""
        ...

    def log_likelihood(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> np.ndarray:
        """Return log p(image | prompt) in nats, float64 `[n]`.

        It is exact, a bound or an estimate, as `Description.likelihood` says, and equals `-RowLosses.preference` for the
        same seeds. Families with an exact likelihood ignore the seeds.
        """
        ...

    def training_view(self) -> TrainingView:
        """Return what the trainer needs. The parameters are the family's own, not copies."""
        ...

    def judge_loss(
        self, model: torch.nn.Module, images: np.ndarray, questions: Sequence[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        """Return the cross-entropy of the answers against P(yes) targets, float `[n]`: a scalar in nats with gradient.

        The answers are those to `questions` about `images`, as in `p_yes`. `model` is `TrainingView.model` as the trainer has
        wrapped it. Only `train.judge_anchor_weight` needs this method.
        """
        ...

    def mean_states(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return embeddings of n prompts and of n pictures, both float64 `[n, hidden]`: means of the last hidden states.

        A prompt's are those of its tokens. A picture's are those of its places in a row without a prompt, so that they say
        nothing of it. seeds, int64 `[n]`, determine what is drawn for a row, as in `TrainingView.losses`. Optional, and only
        for families without `TokenRows`: learning dynamics compare pictures by it (`stages.dynamics.embed`), and without it
        only by pixels and CLIP.
        """
        ...
