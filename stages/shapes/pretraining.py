"""What the pretraining of every tiny model shares: the lessons about pictures, the loop, and the options of its command.

Every step trains four tasks, only on the pretraining split:

- drawing: prompt -> image codes. One prompt in ten is left out, for guidance.
- judging: image and question -> yes or no. Several questions concern the same scene: its prompt, other true descriptions, and
  prompts in which one thing is changed (see `sample_questions`). The oracle labels them.
- captioning: image -> a true prompt. The judge then learns colours and textures much sooner.
- telling: image and question -> where each of two objects is from the other. The judge learns relations from it.

Each task's loss is averaged separately, because in a common mean over tokens the few answers would have hardly any weight. A
step has more judged pairs than drawings, because an answer teaches one bit and a drawing sixteen codes: this mixture, and the
length of training, make the gap between drawing and judging. The state is saved every `--save-every` steps, and running the
same command again continues from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stages.shapes.sampling import Judged, sample_places
from stages.shapes.tiny_janus import CAPTION, PLACE, QUESTION

SPLIT = "pretraining"
PEAK_RATE = 5.0e-4  # At 1e-3, the model learns much later where objects are, and with that to judge relations.

Losses = dict[str, torch.Tensor]  # of each task, by its name


@dataclass(frozen=True)
class Words:
    """How a family writes. question: from a question to the ids that follow the picture, up to the answer. text: from a text
    to its ids. yes, no: the ids of the verdicts. end: the id that ends an answer."""

    question: Callable[[str], list[int]]
    text: Callable[[str], list[int]]
    yes: int
    no: int
    end: int


def simple_share(done: float) -> float:
    """Return the fraction of simple prompts, which falls as training goes on. done: the part of it that is behind."""
    return max(0.1, 0.8 - 2.0 * done)


def told_places(grid: np.ndarray, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Return two questions about places for a scene's rows of telling, as phrase and answer, which may both be empty."""
    return [*sample_places(grid, rng), ("", ""), ("", "")][:2]


def answer_rows(scenes: list[list[Judged]], rng: np.random.Generator, words: Words) -> tuple[list[list[int]], list[int]]:
    """Return the ids that follow each picture in all its rows, and how many of the last ones are taught.

    scenes: for each scene the questions about it, the same number for all. A scene has these questions, one row of captioning
    and the rows of telling, in this order. The caption is a meaning that is true of the scene, if one was asked.
    """
    rows, known = [], []
    for asked in scenes:
        for question in asked:
            ids = words.question(QUESTION.format(prompt=question.meaning.prompt()))
            rows.append([*ids, words.yes if question.label else words.no])
            known.append(1)
        true = [question.meaning for question in asked if question.label]
        true = [meaning for meaning in true if meaning.relation] or true  # what is learned last is told most
        told = words.text(true[rng.integers(len(true))].prompt()) if true else []
        rows.append([*words.question(CAPTION), *told, words.end])
        known.append(len(told) + 1 if true else 0)
        for phrase, answer in told_places(asked[0].grid, rng):
            told = [*words.text(answer), words.end]
            rows.append([*words.question(PLACE.format(phrase=phrase)), *told])
            known.append(len(told) if answer else 0)
    return rows, known


def answer_losses(
    rows: list[list[int]],
    known: list[int],
    padded: torch.Tensor,
    hidden: torch.Tensor,
    head: nn.Module,
    words: Words,
    questions: int,
    scenes: int,
) -> Losses:
    """Return the losses of judging, captioning and telling. Right and wrong prompts weigh the same in the loss of judging.

    rows, known: of `answer_rows`. padded: the rows, padded on the right. hidden: states `[rows, s - 1, d]` after all but the
    last id. questions: of each scene.
    """
    taught = [(i, j) for i, row in enumerate(rows) for j in range(len(row) - known[i], len(row))]
    row, column = torch.tensor(taught).T
    labels = padded[row, column]
    losses = F.cross_entropy(head(hidden[row, column - 1]), labels, reduction="none")
    number = row % (len(rows) // scenes)
    yes, no = (losses[(number < questions) & (labels == answer)] for answer in (words.yes, words.no))
    return {
        "judging": (yes.mean() + no.mean()) / 2,
        "captioning": losses[number == questions].mean(),
        "telling": losses[number > questions].mean(),
    }


@dataclass
class Pretraining:
    """What a family brings to the loop.

    model: what is saved in between. trained: its trained parameters. kept: whether a tensor of its state is saved.
    losses: from the step's generator and the part of the training that is done to the losses of a batch. measure: figures on
    validation.
    """

    model: nn.Module
    trained: Sequence[nn.Parameter]
    kept: Callable[[str], bool]
    losses: Callable[[np.random.Generator, float], Losses]
    measure: Callable[[], dict[str, float]]


def pretrain(job: Pretraining, folder: Path, steps: int, seed: int, save_every: int, rate: float) -> None:
    """Train, from the state in `folder` if there is one."""
    model, trained = job.model, job.trained
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.05, anneal_strategy="cos", final_div_factor=20
    )
    state, first = folder / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
        print(f"continuing at step {first}", flush=True)
    for step in range(first, steps):
        rng = np.random.default_rng([seed, step])
        losses = job.losses(rng, step / steps)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % 50 == 0:
            print(f"step {done}", *(f"{task} {loss.item():.4f}" for task, loss in losses.items()), flush=True)
        if done % save_every == 0 or done == steps:
            print(f"step {done} validation: {json.dumps(job.measure())}", flush=True)
            temporary = state.with_suffix(".tmp")
            torch.save(
                {
                    "model": {k: v for k, v in model.state_dict().items() if job.kept(k)},
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": done,
                },
                temporary,
            )
            temporary.replace(state)


def parser(description: str | None, work: str) -> argparse.ArgumentParser:
    """Return the options that the commands share. work: what is in the folder --work."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--work", type=Path, required=True, help=work)
    result.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    result.add_argument("--steps", type=int, default=4000)
    result.add_argument("--drawn", type=int, default=64, help="drawings per step")
    result.add_argument("--scenes", type=int, default=64, help="scenes per step about which questions are asked")
    result.add_argument("--questions", type=int, default=4, help="questions about each of them")
    result.add_argument("--rate", type=float, default=PEAK_RATE, help="the peak learning rate")
    result.add_argument("--save-every", type=int, default=250)
    result.add_argument("--seed", type=int, default=0)
    stored = "type of the saved weights; bfloat16 halves the file"
    result.add_argument("--store-as", choices=["float32", "bfloat16"], default="float32", help=stored)
    return result
