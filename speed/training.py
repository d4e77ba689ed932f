"""How fast the LLM trains (SFT), beside a plain transformers Trainer on the same weights and data in the same run.

    python -m speed.training --config janus-100m --prompts 4 --candidates 2 --out speed/results/training-100m.json

trl                     this project's trainer: TRL's fused head, DeepSpeed where --gpus is above 1 or --offload is given
transformers-trainer    transformers' Trainer and full logits; one GPU only

A sample is a prompt and its image; prompts x candidates samples make an optimizer step. "images" in the table are samples,
and the floor is the device's dense bfloat16 peak: its fraction is the fraction of peak FLOPs.
"""

from __future__ import annotations

import math
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from speed import cost
from speed.bench import parser, report, result
from speed.data import Rows, mean_length, samples
from speed.models import open_model
from stages.common.config import Train
from stages.families.base import TrainingView
from stages.families.janus.family import Janus
from stages.training.launch import STOP_SIGNALS, launched, local_rank, rank
from stages.training.trainer import Job, Stop, StopSaveLog, freeze, join, leave, make_trainer, trained

Way = Callable[[TrainingView, Rows, Train, int, Path], Any]
WARM = 1  # optimizer steps before the clock starts


class Clock(TrainerCallback):
    """Steps and seconds from the end of the warm-up; ends the training where another step would pass `limit` seconds."""

    start = seconds = 0.0
    steps = 0
    peak: int | None = None  # bytes allocated on a GPU

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        if state.global_step <= WARM:
            self.start = time.perf_counter()
            return
        self.seconds, self.steps = time.perf_counter() - self.start, state.global_step - WARM
        control.should_training_stop |= self.seconds * (self.steps + 1) / self.steps > self.limit


def trl(view: TrainingView, data: Rows, settings: Train, steps: int, work: Path, reference: np.ndarray | None = None) -> Any:
    """This project's trainer; DPO where `data` and `reference` are those of `preferences`."""
    rows = [{"input_ids": prompt + image, "labels": [-100] * len(prompt) + image} for prompt, image in data]
    if reference is not None:
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        half = len(data) // 2
        pairs = zip(data[:half], data[half:], reference[:half], reference[half:], strict=True)
        rows = [
            dict(zip(names, (prompt, chosen, rejected, one, two), strict=True))
            for (prompt, chosen), (_, rejected), one, two in pairs
        ]
    callback = StopSaveLog(settings, Stop(), lambda: None, work, 0.0)  # it tells no speed, the clock does
    dpo = reference is not None
    trainer = make_trainer(Job(view, Dataset.from_list(rows), settings, work, steps=steps, seed=0, dpo=dpo, callback=callback))
    trainer.args.save_strategy = SaveStrategy.NO
    return trainer


def transformers(view: TrainingView, data: Rows, settings: Train, steps: int, work: Path) -> Any:
    width = max(len(prompt) + len(image) for prompt, image in data)

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [(row["prompt"] + row["image"], [-100] * len(row["prompt"]) + row["image"]) for row in batch]
        ids = [ids + [0] * (width - len(ids)) for ids, _ in rows]
        labels = [labels + [-100] * (width - len(labels)) for _, labels in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        total = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return total / num_items_in_batch

    freeze(view.model, trained(view, settings))
    for parameter in view.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    cpu = view.model.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=steps, per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.accumulation(), learning_rate=settings.learning_rate, save_strategy="no",
        logging_steps=1, report_to=[], use_cpu=cpu, bf16=view.model.dtype == torch.bfloat16, remove_unused_columns=False,
        activation_checkpointing=settings.gradient_checkpointing, dataloader_pin_memory=not cpu, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": prompt, "image": image} for prompt, image in data])
    return Trainer(model=view.model, args=arguments, train_dataset=rows, data_collator=collate, compute_loss_func=loss)


WAYS = {"trl": trl, "transformers-trainer": transformers}


def clocked(way: Way, family: Janus, data: Rows, settings: Train, clock: Clock, steps: int) -> None:
    """Train for the warm-up and at most `steps` steps more; the clock tells how it went."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}  # the trainer's would outlive it
    if family.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as work:
            trainer = way(family.training_view(), data, settings, WARM + steps, Path(work))
            trainer.add_callback(clock)
            trainer.train()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def clocked_trl(family: Janus, data: Rows, reference: np.ndarray | None, lora: int, clock: Clock, steps: int) -> None:
    """The same for this project's trainer, on one process and one batch; with a reference it is DPO's."""
    batch = len(data) if reference is None else len(data) // 2
    settings = Train(batch_size=batch, micro_batch_size=batch, lora_rank=lora)
    clocked(partial(trl, reference=reference), family, data, settings, clock, steps)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=3, help="optimizer steps on the clock")
    options.add_argument("--micro-batch-size", type=int, help="default: a process's whole share")
    options.add_argument("--lora-rank", type=int, default=0)
    options.add_argument("--gradient-checkpointing", action="store_true")
    options.add_argument("--gpus", type=int, default=1)
    options.add_argument("--zero-stage", type=int, default=2)
    options.add_argument("--offload", action="store_true")
    arguments = options.parse_args()
    arguments.dtype = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    batch = arguments.prompts * arguments.candidates
    settings = Train(
        batch_size=batch,
        micro_batch_size=arguments.micro_batch_size or batch // arguments.gpus,
        lora_rank=arguments.lora_rank,
        gradient_checkpointing=arguments.gradient_checkpointing,
        gpus=arguments.gpus,
        zero_stage=arguments.zero_stage,
        offload=arguments.offload,
    )
    if settings.deepspeed:
        launched(settings.gpus, settings.nodes)
        join(cpu=arguments.device == "cpu")
        if arguments.device != "cpu":
            torch.cuda.set_device(local_rank() or 0)
    results: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        if (arguments.only and name not in arguments.only) or (name != "trl" and (settings.deepspeed or settings.lora_rank)):
            continue
        family = open_model(arguments.config, arguments.device, arguments.dtype)
        data = samples(family, arguments.prompts, batch * (WARM + arguments.steps))
        forward, itemsize, lora = family._flops(mean_length(data)), family.model.dtype.itemsize, settings.lora_rank > 0
        least = cost.training(family.model.config, forward, lora, itemsize, settings.micro_batch_size)
        clock = Clock()
        clocked(way, family, data, settings, clock, arguments.steps)
        made = batch * clock.steps
        results.append(result(name, made, clock.seconds, clock.peak, least, arguments.device, settings.gpus))
        del family
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    if rank() == 0:
        report("training", arguments, results)
    leave()


if __name__ == "__main__":
    main()
