"""Compressed gradients, from which Delta G of any probe and any training row is estimated: for models of any size.

    python -m stages.dynamics.sketch --config config.yaml --probes probes.parquet --rows rows.parquet \\
        --candidates base/candidates/*/*.parquet --checkpoint checkpoints/Janus-Pro-7B --shard 0/8 --out sketches/0000.parquet
    python -m stages.dynamics.sketch ... --cost

Each gradient is added up into dynamics.sketch buckets with random signs (a count sketch). The scalar product of two sketches is
an unbiased estimate of that of the gradients, with a standard deviation of about the product of their lengths divided by the
root of the number of buckets. A gradient exists only while it is compressed. dynamics.parameters (such as layers.28, layers.29)
restricts it to some layers, which also shortens the backward pass, and train.lora_rank to adapters. The model computes in its
own precision. The cost is printed before the first gradient; with --cost the model is loaded, because its size is part of the
cost, and then nothing else happens. Finished batches are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.common import manifests
from stages.common.batches import planned
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.common.seeds import hash_seed
from stages.dynamics.command import parser, read_probes, training_facts, write_batches
from stages.dynamics.items import shard_of
from stages.families import checkpoint_hash, model_facts

Row = dict[str, Any]
BATCH = 16  # items that are kept together


class CountSketch:
    """Adds gradients up into buckets. Bucket and sign of each number depend on the parameter's name and place only."""

    def __init__(self, parameters: Any, buckets: int) -> None:
        import torch

        self.parameters, self.buckets = parameters, buckets
        self.places = {}
        for name, tensor in parameters.tensors.items():
            generator = torch.Generator().manual_seed(hash_seed("sketch", name))
            where = torch.randint(0, buckets, (tensor.numel(),), generator=generator)
            signs = torch.randint(0, 2, (tensor.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            self.places[name] = (where.to(tensor.device), signs.to(tensor.device))

    def of(self, value: Any) -> tuple[Any, float]:
        """Return the sketch of a scalar's gradient, float32 `[buckets]`, and the gradient's length."""
        import torch

        tensors = self.parameters.tensors
        found = torch.autograd.grad(value, list(tensors.values()), allow_unused=True)
        sketch = torch.zeros(self.buckets, device=value.device, dtype=torch.float32)
        square = torch.zeros((), device=value.device, dtype=torch.float64)
        for name, part in zip(tensors, found, strict=True):
            if part is not None:
                where, signs = self.places[name]
                numbers = part.reshape(-1).float()
                sketch.index_add_(0, where, numbers * signs)
                square += numbers.double().square().sum()
        return sketch.cpu().numpy(), float(square.sqrt())


def scalar(material: Any, item: Row) -> Any:
    """Return what is raised: a probe's log-likelihood, or minus a training row's loss."""
    if "objective" not in item:
        return material.likelihoods(item, [item["prompt"]])[0]
    return -material.losses([item])[0]


def cost(material: Any, items: Sequence[Row], buckets: int) -> str:
    """Return what the work needs, in words."""
    images = sum(2 if item.get("objective") == "dpo" else 1 for item in items)
    flops = 3 * sum(material.model.view.flops(item["prompt"]) for item in items) * images / max(1, len(items))
    size = material.parameters.size
    return (
        f"{len(items)} gradients of {images} images, at most {flops:.3g} floating-point operations; {size:,} parameters in "
        f"{', '.join(material.parameters.subsets)}; {13e-9 * size:.2g} GB for one gradient and its buckets beside the model; "
        f"{4e-6 * buckets * len(items):.3g} MB on disk"
    )


def main() -> None:
    options = parser(__doc__, "the model whose gradients are taken", "manifest of the sketches")
    options.add_argument("--shard", default="0/1", help="which of how many shards of probes and rows")
    options.add_argument("--cost", action="store_true", help="load the model, print what the gradients would cost, and end")
    arguments = options.parse_args()
    config = load(arguments.config)
    family = config.model.family
    probes = read_probes(arguments.probes)
    rows = manifests.read_rows(arguments.rows, "dynamics_rows")
    mine = shard_of([*probes, *rows], arguments.shard)
    from stages.dynamics.material import open_material

    material = open_material(config, arguments.checkpoint, probes, rows, arguments.candidates)
    print(cost(material, mine, config.dynamics.sketch), flush=True)
    if arguments.cost:
        return
    sketches = CountSketch(material.parameters, config.dynamics.sketch)

    def work(batch: Sequence[Row]) -> list[Row]:
        found = []
        for item in batch:
            sketch, norm = sketches.of(scalar(material, item))
            name = item.get("row_id", item.get("candidate_id"))
            found.append({"item_id": name, "kind": item.get("objective", "probe"), "sketch": sketch, "norm": norm})
        return found

    uses = [entry("FAMILIES", family)]
    facts = {"checkpoint": checkpoint_hash(family, arguments.checkpoint, "train"), "buckets": config.dynamics.sketch,
             "likelihood": material.model.description.likelihood, "parameters": config.dynamics.parameters,
             "trainable": config.train.trainable, "lora_rank": config.train.lora_rank}  # fmt: skip
    parents = [arguments.probes, arguments.rows, *arguments.candidates]
    key = ("dynamics sketches", code("stages.dynamics.sketch", mentioned=uses), facts, arguments.shard,
           model_facts(config.model, arguments.checkpoint), config.seed, training_facts(config, rows),
           *map(manifests.content_hash, parents))  # fmt: skip
    write_batches(arguments.out, "dynamics_sketches", key, planned(mine, BATCH), work, "sketches",
                  stage="stages.dynamics.sketch", settings=facts, parents=parents, uses=uses)  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
