"""Exact first-order terms: what a step on each training row does to each probe, by subset of parameters.

    python -m stages.dynamics.terms --config config.yaml --probes probes.parquet --rows rows.parquet \\
        --candidates base/candidates/*/*.parquet --checkpoint models/tiny-janus --shard 0/2 \\
        --out terms.parquet --values values.parquet

For each pair of a probe and a training row there is Delta G, Delta U and Delta J for learning rate 1, summed over all trained
parameters and for each layer, in float64. With the objective `kernel` the training row is another probe whose log-likelihood
is raised: these values are the empirical tangent kernel between the log-likelihoods.

Gradients of at most dynamics.memory megabytes of training rows are held at once, and of one probe, so memory grows neither with
the number of probes nor with that of rows. Finished batches are kept, and a killed stage continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.batches import planned
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.fingerprints import code
from stages.common.registry import entry
from stages.dynamics.command import parser, read_probes, training_facts, write_batches
from stages.dynamics.items import shard_of
from stages.families import checkpoint_hash, model_facts

Row = dict[str, Any]
BATCH = 10  # probes that are kept together
BYTES = 8  # of a float64


def blocks(rows: Sequence[Row], size: int, memory: int) -> list[Sequence[Row]]:
    """Return the rows in blocks whose gradients of `size` float64 numbers fit into `memory` megabytes."""
    return planned(rows, max(1, memory * 10**6 // (BYTES * size)))


class Terms:
    """Computes batches of terms. The gradients of the block of training rows that was used last are kept."""

    def __init__(self, material: Any) -> None:
        self.material = material
        self.block: Sequence[Row] | None = None
        self.vectors: Any = None

    def descents(self, block: Sequence[Row]) -> Any:
        """Return the descent directions of a block of rows, `[n, size]`."""
        import torch

        if self.block is not block:
            self.block, self.vectors = block, None  # free the old ones first
            size = self.material.parameters.size
            self.vectors = torch.empty(len(block), size, dtype=torch.float64, device=self.material.model.device)
            for place, row in enumerate(block):
                self.vectors[place] = self.material.descent(row)
        return self.vectors

    def of_batch(self, batch: tuple[Sequence[Row], Sequence[Row]]) -> list[Row]:
        """Return the rows of the terms manifest for a block of training rows and some probes."""
        from stages.dynamics import gradients

        block, probes = batch
        found = []
        for probe in probes:
            by_subset = gradients.products(self.material.probe_gradients(probe), self.descents(block), self.material.parameters)
            for subset, values in {"all": sum(by_subset.values()), **by_subset}.items():
                for row, (g, u, j) in zip(block, values.T.tolist(), strict=True):
                    found.append(
                        {
                            "candidate_id": probe["candidate_id"],
                            "row_id": row.get("row_id", row.get("candidate_id")),
                            "objective": row.get("objective", "kernel"),
                            "subset": subset,
                            "delta_g": g,
                            "delta_u": u,
                            "delta_j": j if self.material.judges else None,
                        }
                    )
        return found


def values(material: Any, probes: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows of the values manifest: what the model says of each probe before any step."""
    import torch

    with torch.no_grad():
        for probe in probes:
            log_likelihood, posterior, odds = material.values(probe).tolist()
            yield {
                "candidate_id": probe["candidate_id"],
                "log_likelihood": log_likelihood,
                "posterior": posterior,
                "log_odds": odds if material.judges else None,
                "weights": material.likelihoods(probe).softmax(0).tolist(),
            }


def main() -> None:
    options = parser(__doc__, "the model at which the terms are taken", "manifest of the terms")
    options.add_argument("--shard", default="0/1", help="which of how many shards of the probes")
    options.add_argument("--values", type=Path, required=True, help="manifest of the model's values before any step")
    arguments = options.parse_args()
    config = load(arguments.config)
    family = config.model.family
    every = read_probes(arguments.probes)
    rows = manifests.read_rows(arguments.rows, "dynamics_rows")
    probes = shard_of(every, arguments.shard)
    from stages.dynamics.material import open_material
    from stages.dynamics.precision import double

    material = open_material(config, arguments.checkpoint, every, rows, arguments.candidates)
    weights = checkpoint_hash(family, arguments.checkpoint, "train")
    facts = {"checkpoint": weights, "shard": arguments.shard, "likelihood": material.model.description.likelihood,
             "trainable": config.train.trainable, "parameters": config.dynamics.parameters}  # fmt: skip
    uses = [entry("FAMILIES", family)]
    parents = [arguments.probes, arguments.rows, *arguments.candidates]
    key = ("dynamics terms", code("stages.dynamics.terms", mentioned=uses), facts,
           model_facts(config.model, arguments.checkpoint), config.seed, training_facts(config, rows),
           config.score.model_dump(), config.dynamics.memory,
           *map(manifests.content_hash, parents))  # fmt: skip
    held = blocks([*rows, *every], material.parameters.size, config.dynamics.memory)
    batches = [(block, part) for block in held for part in planned(probes, BATCH)]
    print(f"{len(probes)} probes, {len(rows)} rows and {len(every)} kernel rows, {material.parameters.size:,} parameters: "
          f"{len(held) * len(probes)} gradients of probes, {len(rows) + len(every)} of rows", flush=True)  # fmt: skip
    terms = Terms(material)
    common: Any = {"stage": "stages.dynamics.terms", "settings": facts, "parents": parents, "uses": uses}
    with double(material.model.view.model):
        manifests.write(arguments.values, "dynamics_values", list(values(material, probes)), **common)
        write_batches(arguments.out, "dynamics_terms", key, batches, terms.of_batch, "terms", **common)


if __name__ == "__main__":
    run_stage(main)
