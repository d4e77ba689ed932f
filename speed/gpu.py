"""How fast one GPU draws, judges and trains at the geometry of Janus-Pro, within nine minutes.

    python -m speed.gpu                                    writes speed/results/gpu-<device>.json
    python -m speed.gpu --device cpu --geometry tiny       the same code within seconds on a CPU, for tests

The weights are random and made on the device, since speed depends only on shapes. A line of the table is one measurement:

draw, some steps     `batch` guided images of one prompt at once. The decode steps measured are those with a nearly empty, a
                     half full and a nearly full key-value cache, as a step's cost grows with it. The figure is that of whole
                     images: their mean times the image's tokens, the prompt's prefill and the pixels measured apart.
                     "two lengths": the prompts of half of the rows are a token longer, so attention reads a mask.
draw, whole images   the family's `generate` from prompt to pixels, which may cut the batch into pieces that fit.
pixels               only codes to pictures, a part of both of the above; it is not in the floor.
judge                the family's `p_yes`, pictures and questions as the stage has them.
sft, dpo             optimizer steps at the largest batch of 32, 16, 8, ... sequences that fits; "plain" is a PyTorch loop,
                     "TRL" this project's trainer. A sample of DPO is a pair. AdamW on all of a 7B model needs 110 GB, so it
                     is trained with LoRA there. Activations are never computed again.

Every measurement begins with a warm-up and a short part from which the duration of the rest is told; none takes more than a
sixth of the time that is left, and is cut or left out where it would. The JSON is written anew after each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from speed import bench, cost
from speed.data import SAMPLING, mean_length, preferences, question, sample_prompts, samples
from speed.models import open_model
from speed.plain import training_step
from speed.records import ROOT
from speed.session import Session, TimeUp
from stages.families.janus.family import Janus

PROMPT = " and ".join(sample_prompts(6))  # as many tokens as a sentence
STEPS, REPEATS = 24, 3  # decode steps at each of three places; the fastest of so many counts
TRAINING_STEPS = 5  # optimizer steps on the clock


@dataclass(frozen=True)
class Geometry:
    """What is measured of a model. rows: sequences of the largest training batch tried. lora: ranks, 0 trains all weights."""

    name: str
    draw: tuple[int, ...] = (10, 32, 100, 200)
    judge: tuple[int, ...] = (16, 64, 256)
    rows: int = 32
    lora: tuple[int, ...] = (0,)

    def goal(self, goal: cost.Goal) -> cost.Goal | None:
        """The goals of drawing and judging are Janus-Pro-7B's."""
        return goal if self.name == "janus-pro-7b" else None


GEOMETRIES = {
    "7b": Geometry("janus-pro-7b", lora=(32,)),
    "1b": Geometry("janus-pro-1b"),
    "tiny": Geometry("tiny-janus", draw=(4, 10), judge=(4, 10), rows=8, lora=(0, 4)),
}


@torch.no_grad()
def pixels(session: Session, geometry: str, family: Janus) -> float:
    """Seconds an image."""
    images = GEOMETRIES[geometry].draw[1]
    codes = torch.randint(family.model.config.vq_config.num_embeddings, (images, family.image_length), device=family.device)
    session.timed(lambda: family._decode(codes))
    seconds, peak = session.timed(lambda: family._decode(codes))
    session.add((geometry, "pixels", "codes to pictures", images), images, seconds, peak, cost.Cost(0, 0), None)
    return seconds / images


def drawing_cost(family: Janus, batch: int) -> cost.Cost:
    prompt, itemsize = family.bucket(PROMPT), family.model.dtype.itemsize
    return cost.generation(family.model.config, prompt, family.image_length, batch, True, itemsize)


@torch.no_grad()
def draw_steps(session: Session, geometry: str, family: Janus, batch: int, pixel: float, two_lengths: bool) -> float:
    """Seconds that the whole images of the batch would take, with `pixel` seconds for the pixels of each."""
    prompt, tokens = family._prompt_ids(PROMPT), family.image_length
    draws = torch.rand((batch, tokens), dtype=torch.float64, device=family.device)

    def some(place: int, count: int) -> tuple[float, int | None]:
        """Prefill and `count` tokens; their cache holds `place` tokens already, as the prompt is that much longer."""
        longer = [place + (row % 2 if two_lengths else 0) for row in range(batch)]
        rows = [(*prompt[:-1], *[prompt[-2]] * more, prompt[-1]) for more in longer]
        return session.timed(lambda: family._sample(rows, draws[:, :count], SAMPLING))

    count = min(STEPS, tokens // 4)
    late = tokens - 1 - count
    some(late, 2)
    prefill, step = some(late, 1)[0], some(late, 2)[0]
    step = max(step - prefill, step / 20)
    count = min(count, int((session.limit() / 3 - (2 * REPEATS + 1) * prefill) / ((REPEATS + 1) * step)))
    if count < 1:
        raise TimeUp(f"a prefill of {late + len(prompt)} tokens takes {prefill:.1f} s and a step {step:.1f} s")
    milliseconds, peaks = {}, [0]
    for place in (late, late // 2, 0):  # the largest cache first: what follows fits into memory that torch holds already
        some(place, 1 + count)
        long, short = [some(place, 1 + count) for _ in range(REPEATS)], [some(place, 1) for _ in range(REPEATS)]
        prefill = min(seconds for seconds, _ in short)
        milliseconds[place] = 1000 * max(min(seconds for seconds, _ in long) - prefill, 1e-6) / count
        peaks += [peak or 0 for _, peak in long]
    mean = (milliseconds[0] + 2 * milliseconds[late // 2] + milliseconds[late]) / 4000  # trapezoids over the length
    seconds = prefill + tokens * mean + batch * pixel
    way = f"{3 * count} of {tokens} steps{', two lengths' if two_lengths else ''}{'' if pixel else ', without pixels'}"
    session.add(
        (geometry, "draw", way, batch), batch, seconds, max(peaks) or None, drawing_cost(family, batch),
        GEOMETRIES[geometry].goal(cost.DRAWING), extrapolated=True, prompt_tokens=len(prompt),
        step_milliseconds=milliseconds, prefill_seconds=prefill, pixel_seconds_per_image=pixel,
    )  # fmt: skip
    return seconds


def draw_whole(session: Session, geometry: str, family: Janus, batch: int, expected: float) -> None:
    if expected > session.limit():
        raise TimeUp(f"it would take {expected:.0f} s, and {session.limit():.0f} s is the most for a measurement")
    with patch.object(family, "_sample", wraps=family._sample) as spy:
        seconds, peak = session.timed(lambda: family.generate([PROMPT] * batch, np.arange(batch), SAMPLING))
    pieces = [len(call.args[0]) for call in spy.call_args_list]
    way = "whole images" if len(pieces) == 1 else f"whole images in pieces of {', '.join(map(str, pieces))}"
    least, goal = drawing_cost(family, batch), GEOMETRIES[geometry].goal(cost.DRAWING)
    session.add((geometry, "draw", way, batch), batch, seconds, peak, least, goal, extrapolated=False, pieces=pieces)


def judge(session: Session, geometry: str, family: Janus, batch: int) -> None:
    size = family.processor.image_processor.size["height"]
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)

    def some(count: int) -> tuple[float, int | None]:
        return session.timed(lambda: family.p_yes(images[:count], [question(PROMPT)] * count))

    first = min(batch, 8)
    some(first)
    probe, _ = some(first)
    count = min(batch, int(session.limit() / 2 * first / probe))
    if count < first:
        raise TimeUp(f"{first} images take {probe:.1f} s")
    some(count)
    seconds, peak = some(count)
    tokens = len(family.tokenizer.encode(question(PROMPT)))
    least, goal = (
        cost.scoring(family.model.config, tokens, family.model.dtype.itemsize),
        GEOMETRIES[geometry].goal(cost.JUDGING),
    )
    session.add((geometry, "judge", "p_yes", count), count, seconds, peak, least, goal, question_tokens=tokens)


def train(session: Session, geometry: str, lora: int, dpo: bool, trl: bool, rows: int) -> int:
    """Measure at `rows` sequences a step; returns them."""
    session.free()
    family = open_model(GEOMETRIES[geometry].name, session.device, session.facts["dtype"])
    batch = rows // 2 if dpo else rows
    data, reference = preferences(family, batch) if dpo else (samples(family, batch, batch), None)
    itemsize, length = family.model.dtype.itemsize, mean_length(data)
    least = cost.training(family.model.config, rows // batch * family._flops(length), lora > 0, itemsize, batch)
    limit = session.limit()
    if trl:
        from speed.training import Clock, clocked_trl

        clock = Clock(limit)
        with contextlib.redirect_stdout(sys.stderr):  # the trainer tells its steps
            clocked_trl(family, data, reference, lora, clock, TRAINING_STEPS)
        steps, seconds, peak = clock.steps, clock.seconds, clock.peak
    else:
        step = training_step(family, data, reference, lora)
        step()
        steps, seconds, peak = 0, 0.0, None
        while steps == 0 or (steps < TRAINING_STEPS and seconds * (steps + 1) / steps <= limit):
            took, peak = session.timed(step)
            steps, seconds = steps + 1, seconds + took
    way = f"{'TRL' if trl else 'plain'}, {f'LoRA {lora}' if lora else 'the whole LLM'}"
    name = (geometry, "dpo" if dpo else "sft", way, batch)
    session.add(name, batch * steps, seconds, peak, least, cost.TRAINING, steps=steps, sequence_tokens=length)
    return rows


def train_largest(session: Session, geometry: str, lora: int, dpo: bool, trl: bool, rows: int) -> int:
    """The same at the first of `rows`, half as many, ... that fits."""
    while rows > 2:
        with contextlib.suppress(torch.OutOfMemoryError):
            return train(session, geometry, lora, dpo, trl, rows)
        rows //= 2
    return train(session, geometry, lora, dpo, trl, rows)


def draw_and_judge(session: Session, geometry: str) -> None:
    shape = GEOMETRIES[geometry]
    family = session.attempt(f"{geometry}", lambda: open_model(shape.name, session.device, session.facts["dtype"]))
    if family is None:
        return
    common = (session, geometry, family)
    pixel = session.attempt(f"{geometry} pixels", partial(pixels, *common)) or 0.0
    for batch in shape.draw:
        steps = session.attempt(f"{geometry} draw, steps, batch {batch}", partial(draw_steps, *common, batch, pixel, False))
        if steps:
            session.attempt(f"{geometry} draw, whole images, batch {batch}", partial(draw_whole, *common, batch, steps))
    mixed = partial(draw_steps, *common, shape.draw[1], pixel, True)
    session.attempt(f"{geometry} draw, steps, two lengths, batch {shape.draw[1]}", mixed)
    for batch in shape.judge:
        session.attempt(f"{geometry} judge, batch {batch}", partial(judge, *common, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="in all, from start to end")
    parser.add_argument("--geometry", nargs="+", choices=GEOMETRIES, default=["7b", "1b"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: with --geometry tiny, for tests")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--out", type=Path, help="JSON; default: speed/results/gpu-<device>.json")
    arguments = parser.parse_args()
    # One GPU of several: over all that it sees transformers' Trainer would spread the batch.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; `--device cpu --geometry tiny` runs the same code on a small model")
    if not cuda and arguments.geometry != ["tiny"]:
        sys.exit("error: --device cpu needs --geometry tiny; the other models are too large for a CPU")
    facts = bench.facts("gpu", arguments.device, arguments.dtype or ("bfloat16" if cuda else "float32"))
    facts["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory if cuda else None
    facts["geometries"] = {name: asdict(GEOMETRIES[name]) for name in arguments.geometry}
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", facts["device"])
    session = Session(arguments.device, arguments.minutes, arguments.out or ROOT / f"speed/results/gpu-{slug}.json", facts)
    print(f"{facts['device']}, torch {torch.__version__}, {facts['dtype']}, {session.left():.0f} s left", flush=True)
    for geometry in arguments.geometry:
        draw_and_judge(session, geometry)
        session.free()
    for geometry in arguments.geometry:
        for lora in GEOMETRIES[geometry].lora:
            for dpo in (False, True):
                rows = GEOMETRIES[geometry].rows
                for trl in (False, True):
                    name = f"{geometry} {'dpo' if dpo else 'sft'}, {'TRL' if trl else 'plain'}"
                    work = partial(train_largest, session, geometry, lora, dpo, trl, rows)
                    rows = session.attempt(f"{name}, LoRA {lora}" if lora else name, work) or rows
    print(f"{session.out}, after {60 * session.minutes - session.left():.0f} s")
    sys.exit(int(session.failed))


if __name__ == "__main__":
    main()
