"""What a model family must answer. Stages know this page and nothing else of a model.

A family is one file in this folder: a class with these methods and a line in `families/__init__.py`. Nothing here
assumes autoregression, a codebook or a tokenizer's layout: masked and flow-matching models answer the same questions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampling:
    """How candidates are drawn. `guidance_scale` s mixes logits (or velocities) as uncond + s (cond - uncond)."""

    guidance_scale: float = 5.0
    temperature: float = 1.0


@dataclass
class Drawn:
    """n candidates.

    images: uint8 `[n, h, w, 3]`.
    tokens: the family's discrete image representation, int64 `[n, t]`, or None where it has none.
    log_probabilities: float64 `[n]`, natural log of the candidate given its prompt under the conditional model at
        temperature 1 (no guidance), so that it equals `image_log_likelihood` of the same tokens; NaN where unknown.
    """

    images: np.ndarray
    tokens: np.ndarray | None
    log_probabilities: np.ndarray


@dataclass
class TrainingView:
    """What TRL trains.

    model: a module whose hidden states and output embedding give the image's logits (see facts on TRL's fused loss).
    tokenizer: a plain tokenizer, TRL's `processing_class`.
    groups: parameter-name prefixes by group. `llm` is always there and is the default; `text` is the text embedding and
        head; `projector` and `vision` lead into the LLM and out of it.
    judge_only: prefixes that the image's loss does not reach, only the judge's.
    flops: floating-point operations of one sequence of that many tokens, forward.
    """

    model: torch.nn.Module
    tokenizer: Any
    groups: dict[str, tuple[str, ...]]
    judge_only: tuple[str, ...]
    flops: Callable[[float], float]


class Family(Protocol):
    """A loaded model. All methods run under no_grad except through `training_view().model`.

    question: what the judge is asked where the configuration asks nothing else; contains {prompt}.
    answer_prefix: how the answer to that question begins, up to the token that is the verdict.
    """

    question: str
    answer_prefix: str

    @classmethod
    def load(cls, checkpoint: Path, device: str = "cpu", dtype: str = "float32") -> Family:
        """Load safetensors weights. Raises `stages.common.runtime.UserError` on a folder of another family, a folder
        with pickled weights only, or a broken one, and names the remedy."""
        ...

    def save(self, folder: Path) -> None:
        """Write a folder that `load` reads and that plain transformers reads where the family is in transformers."""
        ...

    def bucket(self, prompt: str) -> int:
        """A small integer; candidates whose prompts share it run together without padding."""
        ...

    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: Sampling) -> Drawn:
        """Draw one candidate for each (prompt, seed). A candidate depends on its prompt and seed, not on its batch."""
        ...

    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Judge n images, uint8 `[n, h, w, 3]`, by n questions.

        Returns P(yes) / (P(yes) + P(no)) at the first answer token after `prefix`, and 1 - P(yes) - P(no), the mass on
        neither; both float64 `[n]`. P(yes) sums every single-token spelling of yes and of 1, P(no) likewise.
        """
        ...

    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int) -> list[str]:
        """The generated answers, greedily decoded."""
        ...

    def image_log_likelihood(self, prompts: list[str], tokens: np.ndarray) -> np.ndarray:
        """log p(image | prompt), float64 `[n]`; exact, or a bound that the family's docstring names."""
        ...

    def training_rows(self, prompts: list[str], tokens: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, image ids) for each row, in the vocabulary of `training_view().model`."""
        ...

    def training_view(self) -> TrainingView: ...

    def judge_loss(
        self, model: torch.nn.Module, images: np.ndarray, questions: list[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        """Mean cross-entropy in nats, a scalar with gradient, of the answers to `questions` about `images` (as in `p_yes`)
        against P(yes) targets, float `[n]`. `model` is `training_view().model` as the trainer has wrapped it."""
        ...
