"""TRL's trainers as this project uses them: rows in the schedule's order, whole saves, and a stop that can be continued."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from stages.common.config import Train
from stages.common.runtime import UserError, sync
from stages.families.tools.devices import peak_flops
from stages.training.launch import STOP_SIGNALS, rank
from stages.training.saves import PREFIX, saves, write_layout

KEPT = 2  # saves; the older one is for a save that a failing disk has spoilt
FIRST_LOSS = {"sigmoid": lambda beta: math.log(2), "hinge": lambda beta: 1.0, "ipo": lambda beta: (0.5 / beta) ** 2}


class Stop:
    """Set by a stop signal from the moment this exists; the trainer saves and ends after the step it is in."""

    def __init__(self) -> None:
        self.wanted = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._want)

    def _want(self, *_: object) -> None:
        self.wanted = True


def trained(view: Any, settings: Train) -> tuple[str, ...]:
    """Name prefixes of what trains: the wanted groups, less what no loss of this training reaches."""
    groups = [*settings.trainable.split("+"), *(["text"] if settings.train_text else [])]
    prefixes = [prefix for group in groups for prefix in view.groups[group]]
    return tuple(prefix for prefix in prefixes if settings.judge_anchor_weight or prefix not in view.judge_only)


def freeze(model: torch.nn.Module, prefixes: tuple[str, ...]) -> None:
    """Let only parameters with these prefixes train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


def lora(model: torch.nn.Module, prefixes: tuple[str, ...], settings: Train) -> Any:
    from peft import LoraConfig

    linear = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name.startswith(prefixes)]
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=linear)


def deepspeed_config(settings: Train, cpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; what says "auto" the trainer fills in from its own arguments."""
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
    """Meet the other processes, for DeepSpeed."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of what DeepSpeed calls
    if cpu:  # or a shared-memory operation is compiled at first use, for minutes; without it gloo does its work
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False)


def leave() -> None:
    """Part from the other processes, if there are any."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def whole_model(trainer: Any) -> Iterator[None]:
    """Within, the trained model is as it will be used: weights that ZeRO-3 spread are together, LoRA is part of them, and
    all have the type in which the model was loaded."""
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


class Watch(TrainerCallback):
    """Ends a training that is broken or has a successor, saves when it is time, and tells how fast it goes."""

    def __init__(
        self,
        settings: Train,
        stop: Stop,
        held: Callable[[], None],
        schedule: Path,
        flops: Callable[[float], float],
        length: float,
    ) -> None:
        self.settings, self.stop, self.held, self.schedule = settings, stop, held, schedule
        self.flops = flops(length) / length * (2 if settings.lora_rank else 3)  # a token, forward and backward
        self.saved = self.logged = time.monotonic()
        self.tokens = 0.0

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
            if not math.isfinite(logs.get(name, 0.0)):  # DeepSpeed tells no norm at stage 0
                raise UserError(
                    f"{self.schedule}: {name} at step {state.global_step} is not finite; lower train.learning_rate, or delete "
                    f"{args.output_dir} to start over at the base model"
                )
        now = time.monotonic()
        speed = (logs["num_tokens"] - self.tokens) / (now - self.logged)
        self.tokens, self.logged = logs["num_tokens"], now
        if rank() == 0:
            peak = peak_flops(torch.cuda.get_device_name()) if args.device.type == "cuda" else None
            share = f", {speed * self.flops / peak / args.world_size:.1%} of peak" if peak else ""
            shown = "".join(
                f", {name} {logs[name]:.4g}" for name in ("loss", "rewards/margins", "judge_anchor") if name in logs
            )
            print(f"step {state.global_step} of {state.max_steps}{shown}, {speed:,.0f} tokens/s{share}", flush=True)


class Whole:
    """A save exists whole or not at all: it is written under another name, synced and renamed."""

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
        if self.is_deepspeed_enabled:  # its own save holds the weights
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


class InOrder(Whole):
    """The order of the rows is the schedule's, not the sampler's; and each row may bring a judgement to keep."""

    anchor: Callable[[Any, list[int]], torch.Tensor] | None = None
    current_gradient_accumulation_steps: int
    _metrics: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        rows = inputs.pop("anchor", None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if self.anchor is None:
            return loss
        anchor = self.anchor(model, rows.tolist())
        self._metrics["train"]["judge_anchor"].append(self.accelerator.gather(anchor.detach()).mean().item())
        # SFT's loss is a share of the whole batch's already, DPO's is divided by the trainer
        parts = self.current_gradient_accumulation_steps if isinstance(self, SFTTrainer) else 1
        return loss + self.settings.judge_anchor_weight * anchor / parts


class InOrderSFT(InOrder, SFTTrainer):
    pass


class InOrderDPO(InOrder, DPOTrainer):
    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # ids already

    def _precompute_ref_logps(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # computed by stages.reference

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's loss, the chosen images' NLL a token beside it; the first preference loss must be that of equal models."""
        settings = self.settings
        length = inputs["completion_mask"].chunk(2)[0].sum(1).float().mean().item()
        loss = super()._compute_loss(model, inputs, return_outputs)
        nll = -self._metrics["train"]["logps/chosen"][-1] / length
        self._metrics["train"]["nll"].append(nll)
        if self.state.global_step == 0:
            found = self.accelerator.gather(loss.detach()).mean().item() - settings.nll_weight * nll
            expected = FIRST_LOSS[settings.dpo_loss](settings.beta)
            rounding = 0.05 + settings.beta / 4 if self.args.bf16 else 1e-3  # bfloat16: half a nat of an image's sum
            if abs(found - expected) > rounding * max(1.0, expected):
                raise UserError(
                    f"the first {settings.dpo_loss} loss of DPO is {found:.4f}, and between equal models it is {expected:.4f} "
                    "(ln 2 for sigmoid): the schedule's reference log-probabilities are not the base model's; "
                    "delete the reference manifests and run again"
                )
        return loss


def make_trainer(
    view: Any,
    rows: Any,
    settings: Train,
    work: Path,
    steps: int,
    seed: int,
    dpo: bool,
    watch: Watch,
    anchor: Callable[[Any, list[int]], torch.Tensor] | None,
) -> Any:
    """A trainer over `rows` in their order. anchor: from the trainer's model and the rows' `anchor` column to a loss."""
    cpu = view.model.device.type == "cpu"
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or accelerate's import of DeepSpeed looks for one and warns
    shared: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": steps,
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
        "seed": seed,
        "data_seed": seed,
        "use_cpu": cpu,
        "bf16": view.model.dtype == torch.bfloat16,
        "activation_checkpointing": settings.gradient_checkpointing,
        "max_length": None,
        "remove_unused_columns": False,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": not os.isatty(2),
        "deepspeed": deepspeed_config(settings, cpu) if settings.deepspeed else None,
    }
    prefixes = trained(view, settings)
    adapters = lora(view.model, prefixes, settings) if settings.lora_rank else None
    freeze(view.model, prefixes)
    if shared["bf16"] and not settings.deepspeed:  # DeepSpeed keeps float32 weights for the optimizer, torch does not
        for parameter in view.model.parameters():
            if parameter.requires_grad and adapters is None:
                parameter.data = parameter.data.float()
    kind: Any = InOrderDPO if dpo else InOrderSFT
    if dpo:
        arguments = DPOConfig(
            **shared,
            beta=settings.beta,
            loss_type=[settings.dpo_loss, "sft"] if settings.nll_weight else [settings.dpo_loss],
            loss_weights=[1.0, settings.nll_weight] if settings.nll_weight else [1.0],
            precompute_ref_log_probs=True,
        )
    else:
        arguments = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = kind(
        model=view.model,
        args=arguments,
        train_dataset=rows,
        processing_class=view.tokenizer,
        peft_config=adapters,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.settings, trainer.anchor = settings, anchor
    if anchor is not None:
        collate = trainer.data_collator

        def with_anchor(batch: list[dict[str, Any]]) -> dict[str, Any]:
            return {**collate(batch), "anchor": torch.tensor([row["anchor"] for row in batch])}

        trainer.data_collator = with_anchor
    return trainer
