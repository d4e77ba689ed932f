"""Predicted against measured: one real optimizer step, and what it did to every probe.

    python -m stages.dynamics.steps --config config.yaml --probes probes.parquet --rows rows.parquet \\
        --candidates base/candidates/*/*.parquet --checkpoint models/tiny-janus --out steps.parquet

The step is taken on a batch of the arm's size from the chosen training rows, for SFT and for DPO, by gradient descent and by
AdamW, in several sizes. AdamW starts without a state, clips the gradient and has the arm's learning rate times the size; its
first step is nearly the sign of the gradient. The step of gradient descent of the same size is as long. The prediction is the
derivative along the step, in float64: if only the second order is missing, the error falls as the square of the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.dynamics.command import parser, read_probes, training_facts, write_batches
from stages.families import checkpoint_hash, model_facts

Row = dict[str, Any]
QUANTITIES = ("g", "u", "j")


def adamw_step(material: Any, gradient: Any, settings: Any, size: float) -> Any:
    """Return the first step of AdamW, `[size]`, for a flat gradient, and leave the weights as they are."""
    import torch

    from stages.dynamics import gradients

    parameters = material.parameters
    before = gradients.flat(parameters)
    for name, piece in gradients.split(gradient, parameters).items():
        parameters.tensors[name].grad = piece.clone()
    tensors = list(parameters.tensors.values())
    torch.nn.utils.clip_grad_norm_(tensors, settings.max_grad_norm)
    rate = size * settings.learning_rate
    gradients.adamw(material.model.view.model, parameters, rate, settings.weight_decay).step()
    step = gradients.flat(parameters) - before
    gradients.place(parameters, before)
    for tensor in tensors:
        tensor.grad = None
    return step


class Steps:
    """Takes steps. The gradient of the batch of an objective is computed once."""

    def __init__(self, material: Any, rows: Sequence[Row], probes: Sequence[Row]) -> None:
        self.material, self.probes, self.rows = material, probes, rows
        self.gradients: dict[str, Any] = {}

    def step(self, objective: str, optimizer: str, size: float) -> Any:
        """Return a step, `[size]`."""
        rows = [row for row in self.rows if row["objective"] == objective and not row["round"]]
        settings = self.material.config.arm_train(rows[0]["arm"])
        batch = [row for row in rows if row["arm"] == rows[0]["arm"]][: settings.batch_size]
        if objective not in self.gradients:
            self.gradients[objective] = self.material.mean_gradient(batch, settings.micro_batch_size)
        gradient = self.gradients[objective]
        step = adamw_step(self.material, gradient, settings, size)
        return step if optimizer == "adamw" else -gradient * (step.norm() / gradient.norm())

    def of_batch(self, wanted: tuple[str, str, float]) -> list[Row]:
        """Return the rows of the steps manifest for one objective, optimizer and size."""
        import torch

        from stages.dynamics import gradients

        material, (objective, optimizer, size) = self.material, wanted
        step = self.step(objective, optimizer, size)
        model, parameters, before = material.model.view.model, material.parameters, gradients.flat(material.parameters)
        expected = [gradients.directional(model, parameters, partial(material.values, p), step) for p in self.probes]
        gradients.move(parameters, step)
        with torch.no_grad():
            after = [material.values(probe) for probe in self.probes]
        gradients.place(parameters, before)
        return [
            {
                "objective": objective,
                "optimizer": optimizer,
                "size": size,
                "length": float(step.norm()),
                "candidate_id": probe["candidate_id"],
                "quantity": quantity,
                "predicted": float(change[place]),
                "measured": float(now[place] - value[place]),
            }
            for probe, (value, change), now in zip(self.probes, expected, after, strict=True)
            for place, quantity in enumerate(QUANTITIES)
            if quantity != "j" or material.judges
        ]


def main() -> None:
    arguments = parser(__doc__, "the model that steps", "manifest of predicted and measured changes").parse_args()
    config = load(arguments.config)
    family, chosen = config.model.family, config.dynamics
    probes = read_probes(arguments.probes)[: chosen.step_probes]
    rows = manifests.read_rows(arguments.rows, "dynamics_rows")
    from stages.dynamics.material import open_material
    from stages.dynamics.precision import double

    material = open_material(config, arguments.checkpoint, probes, rows, arguments.candidates)
    objectives = [o for o in ("sft", "dpo") if any(row["objective"] == o and not row["round"] for row in rows)]
    batches = [(o, optimizer, size) for o in objectives for optimizer in ("sgd", "adamw") for size in chosen.step_sizes]
    arms = {row["arm"]: config.arm_train(row["arm"]).outcome() for row in rows}
    facts = {"checkpoint": checkpoint_hash(family, arguments.checkpoint, "train"), "sizes": chosen.step_sizes,
             "probes": len(probes), "parameters": chosen.parameters, "train": arms}  # fmt: skip
    uses = [entry("FAMILIES", family)]
    parents = [arguments.probes, arguments.rows, *arguments.candidates]
    key = ("dynamics steps", code("stages.dynamics.steps", mentioned=uses), facts,
           model_facts(config.model, arguments.checkpoint), config.seed, training_facts(config, rows),
           config.score.model_dump(), *map(manifests.content_hash, parents))  # fmt: skip
    work = Steps(material, rows, probes).of_batch
    with double(material.model.view.model):
        write_batches(arguments.out, "dynamics_steps", key, batches, work, "steps", stage="stages.dynamics.steps",
                      settings=facts, parents=parents, uses=uses)  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
