"""Train the shared LLM on a schedule, with TRL's SFTTrainer or DPOTrainer.

    python -m stages.train --config config.yaml --arm sft --prompts prompts.parquet --schedule schedule.parquet \\
        --candidates base/*.parquet --work work/ --out checkpoint/ --metrics training.parquet [--continue parent-work/]

The schedule is read in order, so a segment continues bit-exactly: `--continue` takes the work folder of the training that
this one goes on from, and a killed training goes on from its own last save. A work folder's saves are keyed by everything
they depend on (code, settings, base model, the schedule up to there); saves of another key are never continued, and where
there are none the training starts at the base model, which gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.code import code
from stages.common.config import Config, Train, load
from stages.common.runtime import UserError, run_stage, sync
from stages.common.seeds import hash_seed
from stages.families.checkpoints import checkpoint_hash

Row = dict[str, Any]
RUNG = "checkpoint-"


def saves(work: Path) -> list[Path]:
    """Whole saves in a work folder, oldest first: the trainer writes trainer_state.json last."""
    found = [path for path in work.glob(RUNG + "*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(RUNG)))


def keyed(work: Path, schedule: list[Row], steps: int, identity: tuple[object, ...]) -> Path:
    """The folder in `work` for a training over the schedule's first `steps` steps: `<steps>-<hash>`."""
    rows = [tuple(row.values()) for row in schedule if row["step"] < steps]
    return work / f"{steps}-{hash_seed(*identity, rows):016x}"


def inherited(work: Path, schedule: list[Row], identity: tuple[object, ...]) -> list[Path]:
    """The parent's saves, if its schedule is the beginning of this one."""
    counts = {int(path.name.split("-")[0]) for path in work.glob("*-*") if path.is_dir()}
    return [save for count in sorted(counts) for save in saves(keyed(work, schedule, count, identity))]


def training_rows(family: Any, schedule: list[Row], prompts: dict[str, Row], known: dict[str, Row], dpo: bool) -> Any:
    """The schedule as a `datasets.Dataset` of ids, row for row."""
    import numpy as np
    from datasets import Dataset

    def ids(side: str) -> list[tuple[list[int], list[int]]]:
        texts = [prompts[row["prompt_id"]]["prompt"] for row in schedule]
        return family.training_rows(texts, np.array([known[row[side]]["tokens"] for row in schedule]))

    chosen = ids("chosen")
    if not dpo:
        return Dataset.from_list(
            [{"input_ids": prompt + image, "labels": [-100] * len(prompt) + image} for prompt, image in chosen]
        )
    return Dataset.from_list(
        [
            {
                "prompt_ids": prompt,
                "chosen_ids": image,
                "rejected_ids": other,
                "ref_chosen_logps": row["reference_chosen"],
                "ref_rejected_logps": row["reference_rejected"],
            }
            for (prompt, image), (_, other), row in zip(chosen, ids("rejected"), schedule, strict=True)
        ]
    )


def freeze(model: Any, prefixes: tuple[str, ...]) -> int:
    """Let only parameters with these prefixes train; returns how many numbers that are."""
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def make_trainer(view: Any, rows: Any, settings: Train, work: Path, steps: int, seed: int, dpo: bool) -> Any:
    import torch
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    cpu = view.model.device.type == "cpu"
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.batch_size // settings.micro_batch_size,
        "learning_rate": settings.learning_rate,
        # The number of replayed rows is not known beforehand, so the rate must not depend on the total.
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "save_steps": settings.save_every_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a broken loss must be seen
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "bf16": view.model.dtype == torch.bfloat16,
        "activation_checkpointing": False,
        "max_length": None,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": not os.isatty(2),
    }

    class InOrder:
        """The order is the schedule's, not the sampler's."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    if not dpo:

        class InOrderSFT(InOrder, SFTTrainer):
            pass

        arguments = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
        return InOrderSFT(model=view.model, args=arguments, train_dataset=rows, processing_class=view.tokenizer)

    class InOrderDPO(InOrder, DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # ids already

        def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset  # computed by stages.reference

    arguments = DPOConfig(
        **shared,
        beta=settings.beta,
        loss_type=["sigmoid", "sft"] if settings.nll_weight else ["sigmoid"],
        loss_weights=[1.0, settings.nll_weight] if settings.nll_weight else [1.0],
        precompute_ref_log_probs=True,
    )
    return InOrderDPO(model=view.model, args=arguments, train_dataset=rows, processing_class=view.tokenizer)


def place(folder: Path, out: Path) -> None:
    """Move a finished checkpoint folder's files into `out`, the weights last: where they are, the rest is."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        path.chmod(out.stat().st_mode & 0o666)  # safetensors are written for the owner alone
        sync(path)
        path.replace(out / path.name)
    sync(out)
    folder.rmdir()


def metrics_rows(history: list[dict[str, Any]]) -> list[Row]:
    """The trainer's log as (step, metric, value) rows, without the counter that starts again where a training does."""
    return [
        {"step": int(entry["step"]), "metric": name, "value": float(value)}
        for entry in history
        for name, value in sorted(entry.items())
        if name not in ("step", "epoch", "num_tokens")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="whose objective and settings")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--schedule", type=Path, required=True, help="schedule manifest, from the very first step")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--continue", dest="parent", type=Path, help="work folder of the training this one goes on from")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainer's saves")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--metrics", type=Path, required=True, help="training metrics (Parquet)")
    arguments = parser.parse_args()
    config: Config = load(arguments.config)
    arm, settings = config.arms[arguments.arm], config.arm_train(arguments.arm)
    dpo = arm.objective == "dpo"
    schedule = manifests.read_rows(arguments.schedule, "schedule")
    steps = schedule[-1]["step"] + 1
    base = Path(config.model.checkpoint)
    foreign = {row["reference_checkpoint"] for row in schedule} - {checkpoint_hash(base)}
    if dpo and foreign:
        raise UserError(
            f"{arguments.schedule}: reference_checkpoint {foreign.pop()} is not {base} ({checkpoint_hash(base)}); "
            "run stages.reference with this model again"
        )
    wanted = {row[side] for row in schedule for side in ("chosen", "rejected") if row[side]}
    known = {row["candidate_id"]: row for row in manifests.read_rows(arguments.candidates, "candidates", wanted=wanted)}
    lost = next((row["chosen"] for row in schedule if row["chosen"] not in known), None)
    if lost:
        raise UserError(f"{arguments.schedule}: candidate {lost} is in none of the candidate manifests; give them all")

    import torch

    from stages.families import open_family

    torch.use_deterministic_algorithms(True, warn_only=True)
    family = open_family(config.model, base)
    view = family.training_view()
    view.model.train()
    count = freeze(view.model, view.groups[settings.trainable])
    prompts = manifests.prompts_of(arguments.prompts, list(known.values()))
    rows = training_rows(family, schedule, prompts, known, dpo)
    fixed = settings.model_dump(exclude={"fork_epochs", "save_every_steps"})
    identity = (arm.objective, fixed, config.seed, checkpoint_hash(base), code("stages.train", type(family).__module__))
    work = keyed(arguments.work, schedule, steps, identity)
    for stale in arguments.work.glob("*-*"):
        if stale != work:
            shutil.rmtree(stale)
    trainer = make_trainer(view, rows, settings, work, steps, config.seed, dpo)
    start = next(reversed(saves(work) or (inherited(arguments.parent, schedule, identity) if arguments.parent else [])), None)
    print(f"{steps} steps, {count:,} trainable numbers, from {start.name if start else 'the base model'}", flush=True)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    broken = next((entry["step"] for entry in history if not math.isfinite(entry["loss"])), None)
    if broken is not None:
        shutil.rmtree(work)  # or the next run would continue from broken weights
        raise UserError(f"{arguments.schedule}: the loss at step {broken} is not finite; lower train.learning_rate")
    if not saves(work) or saves(work)[-1].name != f"{RUNG}{steps}":
        trainer._save_checkpoint(trainer.model, None)
    view.model.eval()
    finished = arguments.out.parent / f".{arguments.out.name}.tmp"
    shutil.rmtree(finished, ignore_errors=True)
    family.save(finished)
    manifests.write(
        arguments.metrics,
        "training",
        metrics_rows(history),
        stage="stages.train",
        settings=settings.model_dump(),
        parents=[arguments.schedule],
    )
    place(finished, arguments.out)
    print(json.dumps({"steps": steps, "last_loss": history[-1]["loss"]}))


if __name__ == "__main__":
    run_stage(main)
