"""The trainers of this project: rows in the schedule's order, saves that are whole, and a stop that can be continued.

Autoregressive families train with TRL's SFTTrainer and DPOTrainer, which compute the loss from token ids (`TokenRows`). Other
families give a loss for each row, and `RowLossTrainer` averages it or makes a preference loss of it.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer import dpo_trainer

from stages.common.config import Train
from stages.common.errors import UserError
from stages.common.files import sync
from stages.families.base import TrainingView
from stages.families.tools.devices import peak_flops
from stages.training.launch import STOP_SIGNALS, rank
from stages.training.saves import PREFIX, saves, write_layout

KEPT = 2  # saves; the older one is there in case a failing disk has spoilt the newer one
FIRST_LOSS = {"sigmoid": lambda beta: math.log(2), "hinge": lambda beta: 1.0, "ipo": lambda beta: (0.5 / beta) ** 2}


class Stop:
    """Notes a stop signal from the moment this object exists; the trainer saves and ends after the step that it is in."""

    def __init__(self) -> None:
        self.wanted = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._want)

    def _want(self, *_: object) -> None:
        self.wanted = True


# --- what trains -----------------------------------------------------------------------------------------------------


def trained(view: TrainingView, settings: Train) -> tuple[str, ...]:
    """Return name prefixes of the parameters that train: the wanted groups without what no loss of this training reaches."""
    prefixes = [prefix for group in settings.trainable.split("+") for prefix in view.groups[group]]
    return tuple(prefix for prefix in prefixes if settings.judge_anchor_weight or prefix not in view.judge_only)


def freeze(model: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    """Let only parameters with these prefixes train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def lora(model: torch.nn.Module, prefixes: tuple[str, ...], settings: Train) -> Any:
    """Return peft's configuration for adapters on every linear layer with one of these prefixes."""
    from peft import LoraConfig

    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name.startswith(prefixes)]
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=linear)


# --- several processes -----------------------------------------------------------------------------------------------


def deepspeed_config(settings: Train, cpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's configuration. The trainer fills in what says "auto" from its own arguments."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    memory = {"device": "cpu", "pin_memory": not cpu}
    if settings.offload:
        zero |= {"offload_optimizer": memory} | ({"offload_param": memory} if settings.zero_stage == 3 else {})
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return dict.fromkeys(batch, "auto") | {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on the CPU too and needs no compiler
    }


def join(cpu: bool) -> None:
    """Join the other processes of a DeepSpeed training."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what DeepSpeed calls
    if cpu:  # otherwise a shared-memory operation is compiled at first use, for minutes; without it gloo does its work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False)


def require_equal_starts(start: Path | None) -> None:
    """Raise UserError unless all processes continue from the same save: a node may see the others' files late."""
    found: list[Path | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, start)
    if len(set(found)) > 1:
        seen = ", ".join(str(save or "no save") for save in found)
        raise UserError(
            f"the processes see different saves ({seen}), because a node saw another one's files late; run it again"
        )


def leave() -> None:
    """Leave the group of processes, if there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def whole_model(trainer: Any) -> Iterator[None]:
    """While the context is open, the trained model is as it will be used, so that the family's `save` writes it.

    ZeRO-3 shards are gathered, LoRA adapters are merged, and all weights have the type in which the model was loaded.
    """
    model, gathered = trainer.accelerator.unwrap_model(trainer.model), nullcontext()
    if trainer.settings.deepspeed and trainer.settings.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        if trainer.settings.lora_rank:
            model = model.merge_and_unload()
        if trainer.args.bf16:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        model.eval()
        yield


# --- while it trains -------------------------------------------------------------------------------------------------


class StopSaveLog(TrainerCallback):
    """Stops the training when a signal asks for it, when another process has taken over or when the loss is not finite; saves
    at time intervals; and prints a line for every step with the speed."""

    def __init__(self, settings: Train, stop: Stop, held: Callable[[], None], schedule: Path, row_flops: float) -> None:
        """held raises when another process has taken over. row_flops: of one row's forward pass."""
        self.settings, self.stop, self.held, self.schedule = settings, stop, held, schedule
        self.step_flops = row_flops * settings.batch_size * (2 if settings.lora_rank else 3)  # forward and backward
        self.saved = self.logged = time.monotonic()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.held()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        minutes = self.settings.save_every_minutes
        due = minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        wanted = torch.tensor([self.stop.wanted, due], dtype=torch.int32, device=args.device)
        if torch.distributed.is_initialized():  # all processes do the same
            torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX)
        stop, due = wanted.tolist()
        control.should_training_stop |= bool(stop)
        control.should_save |= bool(stop or due)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):  # DeepSpeed reports no norm at stage 0
                raise UserError(
                    f"{self.schedule}: {name} at step {state.global_step} is not finite; lower train.learning_rate, or delete "
                    f"{args.output_dir} to start over from the base model"
                )
        now = time.monotonic()
        steps_per_second = 1 / max(now - self.logged, 1e-9)
        self.logged = now
        if rank() == 0:
            peak = peak_flops(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
            share = f", {self.step_flops * steps_per_second / peak / args.world_size:.1%} of peak" if peak else ""
            shown = "".join(
                f", {name} {logs[name]:.4g}" for name in ("loss", "rewards/margins", "judge_anchor") if name in logs
            )
            speed = self.settings.batch_size * steps_per_second
            print(f"step {state.global_step} of {state.max_steps}{shown}, {speed:,.1f} rows/s{share}", flush=True)


class AtomicSaves:
    """A mixin for Trainer: a save exists whole or not at all. It is written under another name, synced and renamed."""

    args: Any
    state: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    settings: Train

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(Path(self.args.output_dir) / ".unfinished")

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """stages.train writes its own."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_deepspeed_enabled:  # DeepSpeed's own save holds the weights
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
        else:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        work, unfinished = Path(self.args.output_dir), Path(self._get_output_dir())
        name = f"{PREFIX}{self.state.global_step}"
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
            free = shutil.disk_usage(work).free
            raise UserError(
                f"{work}: the save at step {self.state.global_step} could not be written ({error}); {free / 1e9:.1f} GB are "
                "free there, make room and run again: the last save is whole"
            ) from None
        self.accelerator.wait_for_everyone()
        if rank() == 0:
            write_layout(unfinished / name, self.settings)
            for path in unfinished.rglob("*"):
                sync(path)
            shutil.rmtree(work / name, ignore_errors=True)
            (unfinished / name).replace(work / name)
            unfinished.rmdir()
            sync(work)
            for old in saves(work)[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


class ScheduledRows(AtomicSaves):
    """A mixin for Trainer: the schedule determines the order of the rows, and each row may bring a judgement to keep.

    anchor: from the trainer's model and the indices of judgements to the cross-entropy between them and the model's own.
    """

    anchor: Callable[[Any, list[int]], torch.Tensor] | None = None
    current_gradient_accumulation_steps: int
    _metrics: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        rows = inputs.pop("anchor", None)
        loss = self.settings.image_weight * self.row_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.anchor is None:
            return loss
        anchor = self.anchor(model, rows.tolist())
        self._metrics["train"]["judge_anchor"].append(self.accelerator.gather(anchor.detach()).mean().item())
        # SFT's loss is already a share of the whole batch's; the other losses are divided by the trainer afterwards
        parts = self.current_gradient_accumulation_steps if isinstance(self, SFTTrainer) else 1
        return loss + self.settings.judge_anchor_weight * anchor / parts

    def row_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        """Return the loss of the images, without the anchor."""
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]

    def require_equal_models(self, preference_loss: torch.Tensor) -> None:
        """Raise UserError unless the first preference loss is that of two equal models (ln 2 for the sigmoid loss)."""
        if self.state.global_step > 0:
            return
        settings = self.settings
        found = self.accelerator.gather(preference_loss.detach()).mean().item()
        expected = FIRST_LOSS[settings.dpo_loss](settings.beta)
        rounding = 0.05 + settings.beta / 4 if self.args.bf16 else 1e-3  # bfloat16: half a nat of an image's sum
        if abs(found - expected) > rounding * max(1.0, expected):
            raise UserError(
                f"the first {settings.dpo_loss} loss of DPO is {found:.4f}, and between equal models it is {expected:.4f} "
                "(ln 2 for sigmoid): the schedule's reference log-probabilities are not the base model's; "
                "delete the reference manifests and run again"
            )


class TokenSFT(ScheduledRows, SFTTrainer):
    """TRL's SFT on token ids."""


class TokenDPO(ScheduledRows, DPOTrainer):
    """TRL's DPO on token ids, with the reference log-probabilities that the schedule holds."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # it holds ids already

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # stages.reference has computed them

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        length = inputs["completion_mask"].chunk(2)[0].sum(1).float().mean().item()
        loss = super()._compute_loss(model, inputs, return_outputs)
        nll = -self._metrics["train"]["logps/chosen"][-1] / length
        self._metrics["train"]["nll"].append(nll)
        self.require_equal_models(loss - self.settings.nll_weight * nll)
        return loss


class RowLossTrainer(ScheduledRows, Trainer):
    """SFT and DPO on the losses that a family gives for each row (`TrainingView.losses`).

    The preference loss is DPO's (arXiv 2305.18290) with `-RowLosses.preference` in the place of log-likelihoods, which is
    Diffusion-DPO (arXiv 2311.12908) for a family whose loss is a denoising error. Chosen and rejected go through one forward
    pass with equal seeds, and the reference was computed for the same seeds.
    """

    losses: Callable[..., Any]
    dpo: bool

    def row_loss(self, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        found = self.losses(model, inputs["prompts"], inputs["pictures"], inputs["seeds"])
        if not self.dpo:
            return found.sft.mean()
        chosen, rejected = (-found.preference).float().chunk(2)
        nll = found.sft.chunk(2)[0].float().mean()
        reference_chosen, reference_rejected = inputs["reference_chosen"], inputs["reference_rejected"]
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        preference = preference_loss(margin, self.settings).mean()
        self.require_equal_models(preference)
        for name, values in {
            "nll": nll,
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "rewards/margins": self.settings.beta * margin.mean(),
            "rewards/accuracies": (margin > 0).float().mean(),
        }.items():
            self._metrics["train"][name].append(self.accelerator.gather(values.detach()).mean().item())
        return preference + self.settings.nll_weight * nll

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        means = {name: float(np.mean(values)) for name, values in self._metrics["train"].items() if values}
        self._metrics["train"].clear()
        super().log(logs | means, *arguments, **keywords)


def preference_loss(margin: torch.Tensor, settings: Train) -> torch.Tensor:
    """Return the preference loss of each margin, policy minus reference, chosen minus rejected."""
    if settings.dpo_loss == "sigmoid":
        return -F.logsigmoid(settings.beta * margin)
    if settings.dpo_loss == "hinge":
        return torch.relu(1 - settings.beta * margin)
    return (margin - 0.5 / settings.beta) ** 2


# --- putting it together ---------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One training.

    rows: the schedule's rows in order, as `stages.training.rows` makes them for this view. work: the folder of the saves.
    steps: the last optimizer step. anchor: see `ScheduledRows`; its rows have a column "anchor" with an index.
    """

    view: TrainingView
    rows: Any
    settings: Train
    work: Path
    steps: int
    seed: int
    dpo: bool
    callback: StopSaveLog
    anchor: Callable[[Any, list[int]], torch.Tensor] | None = None


def trainer_arguments(job: Job, cpu: bool, bf16: bool) -> dict[str, Any]:
    """Return the arguments that all trainers share."""
    settings = job.settings
    return {
        "output_dir": str(job.work),
        "max_steps": job.steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.accumulation(),
        "learning_rate": settings.learning_rate,
        # The number of replayed rows is not known beforehand, so the rate must not depend on the total.
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "save_steps": settings.save_every_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a broken loss must be seen
        "report_to": [],
        "seed": job.seed,
        "data_seed": job.seed,
        "use_cpu": cpu,
        "bf16": bf16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": not os.isatty(2),
        "deepspeed": deepspeed_config(settings, cpu) if settings.deepspeed else None,
    }


def one_gpu(arguments: TrainingArguments, device: torch.device) -> None:
    """Let a process train on one GPU, the model's, even if it sees several.

    transformers would otherwise divide each batch among them, and a process alone would move its model to the first one.
    """
    arguments._n_gpu = min(1, arguments.n_gpu)
    if device.type == "cuda" and device.index is not None:
        arguments.__dict__["_setup_devices"] = device  # the cached property behind arguments.device
        torch.cuda.set_device(device)


def token_trainer(job: Job, shared: dict[str, Any], adapters: Any) -> Any:
    """Return TRL's trainer for a family with `TokenRows`."""
    settings = job.settings
    shared = shared | {"max_length": None}
    if job.dpo:
        kind: Any = TokenDPO
        arguments = DPOConfig(
            **shared,
            beta=settings.beta,
            loss_type=[settings.dpo_loss, "sft"] if settings.nll_weight else [settings.dpo_loss],
            loss_weights=[1.0, settings.nll_weight] if settings.nll_weight else [1.0],
            precompute_ref_log_probs=True,
        )
        # TRL names its cache of reference log-probabilities by a hash of all weights. TokenDPO has no such cache.
        dpo_trainer.hash_module = lambda module: ""
    else:
        kind, arguments = TokenSFT, SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
    assert job.view.token_rows is not None
    one_gpu(arguments, next(job.view.model.parameters()).device)
    return kind(
        model=job.view.model,
        args=arguments,
        train_dataset=job.rows,
        processing_class=job.view.token_rows.tokenizer,
        peft_config=adapters,
        callbacks=[job.callback],
    )


def row_loss_trainer(job: Job, shared: dict[str, Any], adapters: Any) -> Any:
    """Return the trainer for a family that gives a loss for each row."""
    model = job.view.model
    if adapters is not None:
        from peft import get_peft_model

        model = get_peft_model(model, adapters)  # type: ignore[arg-type]
    arguments = TrainingArguments(**shared)
    one_gpu(arguments, next(job.view.model.parameters()).device)
    trainer = RowLossTrainer(
        model=model,
        args=arguments,
        train_dataset=job.rows,
        data_collator=job.rows.collate,
        callbacks=[job.callback],
    )
    trainer.losses, trainer.dpo = job.view.losses, job.dpo  # type: ignore[assignment]
    trainer.model_accepts_loss_kwargs = False  # the losses are means over rows
    trainer._metrics = {"train": _Lists()}
    return trainer


class _Lists(dict[str, list[float]]):
    def __missing__(self, name: str) -> list[float]:
        return self.setdefault(name, [])


def make_trainer(job: Job) -> Any:
    """Return a trainer over the job's rows in their order."""
    parameter = next(job.view.model.parameters())
    cpu, bf16 = parameter.device.type == "cpu", parameter.dtype == torch.bfloat16
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or accelerate's import of DeepSpeed looks for one and warns
    shared = trainer_arguments(job, cpu, bf16)
    prefixes = trained(job.view, job.settings)
    adapters = lora(job.view.model, prefixes, job.settings) if job.settings.lora_rank else None
    freeze(job.view.model, prefixes)
    if bf16 and not job.settings.deepspeed:  # DeepSpeed keeps float32 weights for the optimizer, torch does not
        for weight in job.view.model.parameters():
            if weight.requires_grad and adapters is None:
                weight.data = weight.data.float()
    if not any(weight.requires_grad for weight in job.view.model.parameters()):
        raise UserError(
            f"train.trainable {job.settings.trainable}: no weight of these groups takes part in the loss of images; add llm, "
            "or raise train.judge_anchor_weight, which trains what the judge looks with"
        )
    trainer = (token_trainer if job.view.token_rows else row_loss_trainer)(job, shared, adapters)
    trainer.remove_callback(PrinterCallback)
    trainer.settings, trainer.anchor = job.settings, job.anchor
    if job.anchor is not None:
        collate = trainer.data_collator

        def with_anchor(batch: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collate(batch), "anchor": torch.tensor([row["anchor"] for row in batch])}

        trainer.data_collator = with_anchor
    return trainer
