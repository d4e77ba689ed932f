"""The toy family's model: a flow from noise to pixels, and a bilinear judge."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from stages.families.toy import TOY, WEIGHTS, ToySampling
from torch import nn

from stages.families.base import Drawn, Pictures, Role, RowLosses, TrainingView

SIDE, WORDS = 8, 16
PIXELS = SIDE * SIDE * 3


def texts(prompts: list[str]) -> torch.Tensor:
    """Return each prompt as the mean of a fixed random vector for each of its words, `[n, WORDS]`; zeros without a word."""
    rows = []
    for prompt in prompts:
        seeds = [int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") for word in prompt.split()]
        vectors = [np.random.default_rng(seed).standard_normal(WORDS) for seed in seeds]
        rows.append(np.mean(vectors, axis=0) if vectors else np.zeros(WORDS))
    return torch.tensor(np.array(rows))


def to_unit(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.reshape(len(images), PIXELS)).double() / 127.5 - 1


class Flow(nn.Module):
    """Velocity of a noised image `[n, PIXELS]` at time `[n]`, given texts `[n, WORDS]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(PIXELS + WORDS + 1, 64), nn.Linear(64, PIXELS)

    def forward(self, noised: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.first(torch.cat([noised, text, time[:, None]], 1))))


class Toy:
    def __init__(self, flow: Flow, judge: nn.Linear) -> None:
        self.flow, self.judge = flow.double().eval(), judge.double().eval()

    @classmethod
    def load(cls, checkpoint: Path, device: str = "cpu", dtype: str = "float32", role: Role = "draw") -> Toy:
        toy = cls(Flow(), nn.Linear(PIXELS, WORDS))
        for module, name in ((toy.flow, WEIGHTS["draw"]), (toy.judge, WEIGHTS["judge"])):
            module.load_state_dict(load_file(checkpoint / name))
        return toy

    def save(self, folder: Path) -> None:
        for module, name in ((self.flow, WEIGHTS["draw"]), (self.judge, WEIGHTS["judge"])):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / name)

    def bucket(self, prompt: str) -> int:
        return 0

    @torch.no_grad()
    def generate(self, prompts: list[str], seeds: np.ndarray, sampling: ToySampling) -> Drawn:
        noise = np.stack([np.random.Generator(np.random.Philox(int(seed))).standard_normal(PIXELS) for seed in seeds])
        x, text = torch.from_numpy(noise), texts(prompts)
        for step in range(sampling.steps):
            time = torch.full((len(x),), 1 - step / sampling.steps, dtype=torch.float64)
            plain = self.flow(x, time, torch.zeros_like(text))
            x = x - (plain + sampling.guidance_scale * (self.flow(x, time, text) - plain)) / sampling.steps
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
        return Drawn(pixels.reshape(-1, SIDE, SIDE, 3))

    @torch.no_grad()
    def p_yes(self, images: np.ndarray, questions: list[str], prefix: str = "") -> tuple[np.ndarray, np.ndarray]:
        yes = self._logit(images, questions).sigmoid().numpy()
        return yes, np.zeros(len(yes))

    def _logit(self, images: np.ndarray, questions: list[str]) -> torch.Tensor:
        return (self.judge(to_unit(images)) * texts(questions)).sum(1)

    def answer(self, images: np.ndarray, questions: list[str], max_new_tokens: int) -> list[str]:
        return [f"The score is {int(p > 0.5)}." for p in self.p_yes(images, questions)[0]]

    @torch.no_grad()
    def log_likelihood(self, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> np.ndarray:
        return -self._losses(self.flow, prompts, pictures, seeds).preference.numpy()

    def _losses(self, model: nn.Module, prompts: list[str], pictures: Pictures, seeds: np.ndarray) -> RowLosses:
        draws = [np.random.Generator(np.random.Philox(int(seed))) for seed in seeds]
        time = torch.tensor([draw.random() for draw in draws], dtype=torch.float64)
        noise = torch.from_numpy(np.stack([draw.standard_normal(PIXELS) for draw in draws]))
        image = to_unit(pictures.images)
        noised = (1 - time[:, None]) * image + time[:, None] * noise
        error = (model(noised, time, texts(prompts)) - (noise - image)) ** 2
        return RowLosses(sft=error.mean(1), preference=error.sum(1) / 2)

    def training_view(self) -> TrainingView:
        size = sum(parameter.numel() for parameter in self.flow.parameters())
        return TrainingView(self.flow, {"llm": ("first.", "last.")}, (), lambda prompt: 2.0 * size, losses=self._losses)

    def judge_loss(
        self, model: nn.Module, images: np.ndarray, questions: list[str], p_yes: np.ndarray, prefix: str = ""
    ) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(self._logit(images, questions), torch.as_tensor(p_yes))


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write random weights."""
    torch.manual_seed(seed)
    Toy(Flow(), nn.Linear(PIXELS, WORDS)).save(folder)
    return folder


assert TOY.trained_file == WEIGHTS["draw"]
