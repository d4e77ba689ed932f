"""Trace and norm of the tangent kernel between the logits of images, by random sign vectors.

    python -m stages.dynamics.logits --config config.yaml --probes probes.parquet --candidates base/candidates/*/*.parquet \\
        --checkpoint models/tiny-janus --out logits.parquet

The kernel between two images has an entry for each pair of logits: for tiny-janus 2,048 x 2,048, each a product of gradients of
all trained parameters. With random signs v, the mean of (J v) . (J' v) over draws is the trace of J J', and the mean of the
squares over pairs of different draws is the square of the Frobenius norm (Hutchinson's estimators). The trace between two
images, divided by the root of the product of their own traces, says how alike they are to training as a whole, whatever is
learned. Only for families with logits (`TokenRows`); for others the manifest is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import run_stage
from stages.common.registry import entry
from stages.families import checkpoint_hash

Row = dict[str, Any]


def estimates(material: Any, probes: Sequence[Row], draws: int, seed: int) -> list[Row]:
    """Return the rows of the logits manifest. Gradients of all probes for one draw are held, or of all draws."""
    import torch

    from stages.dynamics import gradients, likelihood

    def logits(probe: Row) -> Any:
        picture = material.picture(probe["candidate_id"])
        return likelihood.image_logits(material.model, [probe["prompt"]], picture)[0]

    def pulled(probe: Row, signs: Any) -> Any:
        return material.gradient(lambda: (logits(probe) * signs.to(material.model.device)).sum())

    with torch.no_grad():
        shape = logits(probes[0]).shape
    traces = torch.zeros(len(probes), len(probes), dtype=torch.float64)
    for signs in gradients.sign_vectors(shape, draws, seed):
        vectors = torch.stack([pulled(probe, signs) for probe in probes])
        traces += (vectors @ vectors.T).cpu() / draws
    found = []
    for place, probe in enumerate(probes):
        vectors = torch.stack([pulled(probe, signs) for signs in gradients.sign_vectors(shape, draws, seed)])
        square = (vectors @ vectors.T) ** 2
        pairs = [float(square[i, j]) for i, j in combinations(range(draws), 2)]
        for other, mate in enumerate(probes):
            norm = (sum(pairs) / len(pairs)) ** 0.5 if other == place else None
            ids = {"candidate_id": probe["candidate_id"], "other_id": mate["candidate_id"]}
            found.append({**ids, "trace": float(traces[place, other]), "norm": norm})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--probes", type=Path, required=True, help="manifest of stages.dynamics.select")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests of the probes")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the model at which the kernel is taken")
    parser.add_argument("--out", type=Path, required=True, help="manifest of traces and norms")
    arguments = parser.parse_args()
    config = load(arguments.config)
    chosen, family = config.dynamics, config.model.family
    probes = [row for row in manifests.read_rows(arguments.probes, "dynamics_probes") if row["alternatives"]]
    probes = probes[: chosen.logit_probes]
    from stages.dynamics.material import open_material
    from stages.dynamics.precision import double

    material = open_material(config, arguments.checkpoint, probes, [], arguments.candidates)
    rows: list[Row] = []
    if material.model.view.token_rows is None:
        print(f"{family} has no logits of image tokens, so there is no kernel between logits")
    else:
        with double(material.model.view.model):
            rows = estimates(material, probes, chosen.logit_draws, config.seed)
    facts = {"checkpoint": checkpoint_hash(family, arguments.checkpoint, "train"), "draws": chosen.logit_draws,
             "parameters": chosen.parameters}  # fmt: skip
    manifests.write(arguments.out, "dynamics_logits", rows, stage="stages.dynamics.logits", settings=facts,
                    parents=[arguments.probes, *arguments.candidates], uses=[entry("FAMILIES", family)])  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
