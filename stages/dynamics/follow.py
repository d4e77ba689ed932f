"""Repeat an arm's training and sum first-order terms along it, beside what the training really changed.

    python -m stages.dynamics.follow --config config.yaml --arm sft --probes probes.parquet --prompts prompts/train.parquet \\
        --schedule sft/schedule.parquet --candidates base/candidates/*/*.parquet --checkpoint models/tiny-janus \\
        --trained sft/checkpoint --out path/sft.parquet

The rows of the schedule go through AdamW as the trainer does it: constant rate after warm-up, clipped gradients, and weights in
float32, also where train.precision has forward and backward in bfloat16. At the start of each of dynamics.segments pieces of an
epoch, the derivative of every probe along that piece is taken and added up: `summed`. `from_base` is the derivative at the base
model along the whole way, as if the kernel never changed. `measured` is the change itself. All three are computed in float32.
All images have their log-likelihood followed, and those with alternatives also the posterior and the log odds of yes.

The manifest's settings say how far the repeated weights are from those of the trainer, as a share of the way from the base
model, both as they are saved. Finished epochs are kept; after a kill, the weights up to there are trained again, without
derivatives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests
from stages.common.batches import kept_batches, planned
from stages.common.config import Config, Train, load
from stages.common.errors import UserError, run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.seeds import draw_seed
from stages.families import checkpoint_hash, model_facts, resolved

Row = dict[str, Any]
PLAIN = 32  # images whose log-likelihoods are computed together


def require_plain(settings: Train, arm: str) -> None:
    """Raise UserError unless this module repeats everything that the arm's training does."""
    for key in ("lora_rank", "judge_anchor_weight", "prompt_dropout"):
        if getattr(settings, key):
            raise UserError(
                f"arms.{arm}: train.{key} is set, and a followed training has none; name other arms in dynamics.arms"
            )


def scheduled(config: Config, arm: str, schedule: list[Row], prompts: dict[str, Row]) -> dict[int, list[list[Row]]]:
    """Return the batches of every epoch, with all that the losses of their rows need."""
    epochs: dict[int, dict[int, list[Row]]] = {}
    for row in schedule:
        chosen, rejected = row["reference_chosen"], row["reference_rejected"]
        item = {
            "arm": arm,
            "prompt": prompts[row["prompt_id"]]["prompt"],
            "seed": draw_seed(config.seed, row["chosen"], row["rejected"], row["epoch"]),
            "reference": None if chosen is None or rejected is None else chosen - rejected,
            **{side: row[side] for side in ("chosen", "rejected")},
        }
        epochs.setdefault(row["epoch"], {}).setdefault(row["step"], []).append(item)
    return {epoch: list(steps.values()) for epoch, steps in epochs.items()}


def as_trained(config: Config, settings: Train) -> Config:
    """Return the configuration whose model is loaded as the trainer loads it: in the precision of the training."""
    precision = resolved(config.model).dtype if settings.precision == "auto" else settings.precision
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": precision})})


class Training:
    """The training of an arm, epoch by epoch, with first-order terms.

    The model of `material` was loaded in the precision of the training, and becomes float32 here.
    """

    def __init__(self, material: Any, arm: str, batches: dict[int, list[list[Row]]], probes: Sequence[Row]) -> None:
        import torch
        from transformers import get_constant_schedule_with_warmup

        from stages.dynamics import gradients

        self.material, self.batches, self.probes = material, batches, probes
        self.settings = material.config.arm_train(arm)
        # As the trainer does: in bfloat16 most steps would be lost, because they are smaller than a weight's last bit.
        material.model.view.model.float()
        narrow = material.config.model.dtype == "bfloat16"
        self.precision = partial(torch.autocast, material.model.device.type, torch.bfloat16, enabled=narrow)
        rate, decay = self.settings.learning_rate, self.settings.weight_decay
        self.optimizer = gradients.adamw(material.model.view.model, material.parameters, rate, decay)
        self.rates = get_constant_schedule_with_warmup(self.optimizer, self.settings.warmup_steps)
        self.base = gradients.flat(material.parameters)
        self.done = 0  # epochs
        self.quantities = self.functions()
        with torch.no_grad():
            self.before = [function() for _, _, function in self.quantities]

    def functions(self) -> list[tuple[str, list[Row], Callable[[], Any]]]:
        """Return what is followed, in pieces: the quantity, the probes, and a function that returns a value for each."""
        material = self.material
        found: list[tuple[str, list[Row], Callable[[], Any]]] = []
        for part in planned(self.probes, PLAIN):
            found.append(("g", list(part), partial(material.plain_likelihoods, list(part))))
        for probe in (probe for probe in self.probes if probe["alternatives"]):
            found.append(("uj", [probe], partial(material.judgements, probe)))
        return found

    def train(self, batches: Sequence[list[Row]]) -> None:
        """Take the optimizer steps of some batches."""
        import torch

        from stages.dynamics import gradients

        parameters = self.material.parameters
        for batch in batches:
            with self.precision():
                gradient = self.material.mean_gradient(batch, self.settings.micro_batch_size)
            for name, piece in gradients.split(gradient, parameters).items():
                parameters.tensors[name].grad = piece.clone()
            torch.nn.utils.clip_grad_norm_(list(parameters.tensors.values()), self.settings.max_grad_norm)
            self.optimizer.step()
            self.rates.step()

    def derivatives(self, start: Any, step: Any) -> list[Any]:
        """Return the derivatives of everything that is followed along a step, at the weights `start`."""
        from stages.dynamics import gradients

        parameters, model = self.material.parameters, self.material.model.view.model
        now = gradients.flat(parameters)
        gradients.place(parameters, start)
        found = [gradients.directional(model, parameters, function, step)[1] for _, _, function in self.quantities]
        gradients.place(parameters, now)
        return found

    def advance(self, epoch: int) -> None:
        """Train up to the end of an epoch."""
        while self.done < epoch:
            self.done += 1
            self.train(self.batches[self.done])

    def of_epoch(self, epoch: int) -> list[Row]:
        """Return the path manifest's rows of an epoch, in which `summed` is that of this epoch only."""
        import torch

        from stages.dynamics import gradients

        self.advance(epoch - 1)
        steps = self.batches[epoch]
        size = -(-len(steps) // self.material.config.dynamics.segments)
        summed: list[Any] = [0.0] * len(self.quantities)
        for part in planned(steps, size):
            start = gradients.flat(self.material.parameters)
            self.train(part)
            changes = self.derivatives(start, gradients.flat(self.material.parameters) - start)
            summed = [total + change for total, change in zip(summed, changes, strict=True)]
        self.done = epoch
        whole = self.derivatives(self.base, gradients.flat(self.material.parameters) - self.base)
        with torch.no_grad():
            measured = [function() - before for (_, _, function), before in zip(self.quantities, self.before, strict=True)]
        rows = []
        for (names, probes, _), *columns in zip(self.quantities, summed, whole, measured, strict=True):
            numbers = zip(*(column.tolist() for column in columns), strict=True)
            places = [(probe, name) for probe in probes for name in names]
            for (probe, name), (first, base, change) in zip(places, numbers, strict=True):
                if name != "j" or self.material.judges:
                    fields = {"epoch": epoch, "candidate_id": probe["candidate_id"], "quantity": name}
                    rows.append({**fields, "summed": first, "from_base": base, "measured": change})
        return rows


def cumulated(files: Sequence[Path], arm: str) -> list[Row]:
    """Return the rows of all epochs, with `summed` from the base model on."""
    totals: dict[tuple[str, str], float] = {}
    rows = []
    for row in (row for file in files for row in pq.read_table(file).to_pylist()):
        place = (row["candidate_id"], row["quantity"])
        totals[place] = totals.get(place, 0.0) + row["summed"]
        rows.append({**row, "arm": arm, "summed": totals[place]})
    return rows


def distance(material: Any, trained: Path, base: Any) -> float:
    """Return how far the weights are from a trained checkpoint's, as a share of its distance from the base weights.

    Both are compared as they are saved, because a checkpoint does not hold what the precision of its training does not resolve.
    """
    import torch

    from stages.dynamics import gradients
    from stages.families import open_family

    other = dict(open_family(material.config.model, trained, "train").training_view().model.named_parameters())
    saved = torch.cat([other[name].detach().reshape(-1) for name in material.parameters.tensors])
    mine, theirs = gradients.flat(material.parameters).to(saved.dtype).to(base), saved.to(base)
    return float((mine - theirs).norm() / (theirs - base).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="the arm whose training is repeated")
    parser.add_argument("--probes", type=Path, required=True, help="manifest of stages.dynamics.select")
    parser.add_argument("--prompts", type=Path, required=True, help="training prompts")
    parser.add_argument("--schedule", type=Path, required=True, help="the arm's schedule")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidates of probes and schedule")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the base model")
    parser.add_argument("--trained", type=Path, help="the arm's own checkpoint, to compare the weights with")
    parser.add_argument("--out", type=Path, required=True, help="manifest of the path")
    arguments = parser.parse_args()
    config = load(arguments.config)
    family, arm = config.model.family, arguments.arm
    if arm not in config.arms:
        raise UserError(f"--arm {arm}: not in {arguments.config}; arms there: {', '.join(config.arms)}")
    settings = config.arm_train(arm)
    require_plain(settings, arm)
    probes = manifests.read_rows(arguments.probes, "dynamics_probes")
    prompts = {row["prompt_id"]: row for row in manifests.read_rows(arguments.prompts, "prompts")}
    schedule = manifests.read_rows(arguments.schedule, "schedule")
    from stages.dynamics import gradients
    from stages.dynamics.material import open_material

    config = as_trained(config, settings)
    material = open_material(config, arguments.checkpoint, probes, schedule, arguments.candidates, settings)
    batches = scheduled(config, arm, schedule, prompts)
    uses = [entry("FAMILIES", family)]
    facts = {"checkpoint": checkpoint_hash(family, arguments.checkpoint, "train"), "train": settings.outcome(),
             "segments": config.dynamics.segments}  # fmt: skip
    parents = [arguments.probes, arguments.prompts, arguments.schedule, *arguments.candidates]
    key = ("dynamics path", code("stages.dynamics.follow", mentioned=uses), facts,
           model_facts(config.model, arguments.checkpoint), config.seed, config.score.model_dump(),
           *map(manifests.content_hash, parents))  # fmt: skip
    training = Training(material, arm, batches, probes)
    columns = [field for field in manifests.schema("dynamics_path") if field.name != "arm"]
    with kept_batches(
        arguments.out,
        key,
        list(batches),
        work=training.of_epoch,
        finish=lambda found: pa.Table.from_pylist(found, schema=pa.schema(columns)),
        label=f"following {arm}",
    ) as files:
        training.advance(max(batches))
        apart = distance(material, arguments.trained, training.base) if arguments.trained else None
        facts |= {"distance": apart}
        common: Any = {"stage": "stages.dynamics.follow", "settings": facts, "parents": parents, "uses": uses}
        manifests.write(arguments.out, "dynamics_path", cumulated(files, arm), **common)
    way = float((gradients.flat(material.parameters) - training.base).norm())
    print(f"{arm}: {len(batches)} epochs, the weights moved by {way:.4g}" + (f", {apart:.2%} of it apart from the trainer's"
          if apart is not None else ""))  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
