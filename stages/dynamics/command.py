"""What the commands of learning dynamics share: their options, and manifests that are written batch by batch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.common import manifests
from stages.common.batches import kept_batches
from stages.common.config import Config

Row = dict[str, Any]


def parser(description: str | None, checkpoint: str, out: str) -> argparse.ArgumentParser:
    """Return the options of a command that looks at probes and training rows. checkpoint, out: what these two are."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--config", type=Path, required=True)
    result.add_argument("--probes", type=Path, required=True, help="manifest of stages.dynamics.select")
    result.add_argument("--rows", type=Path, required=True, help="manifest of stages.dynamics.select")
    result.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests of probes and rows")
    result.add_argument("--checkpoint", type=Path, required=True, help=checkpoint)
    result.add_argument("--out", type=Path, required=True, help=out)
    return result


def read_probes(path: Path) -> list[Row]:
    """Return the probes that have alternatives, for which terms are computed; the others are only followed."""
    return [row for row in manifests.read_rows(path, "dynamics_probes") if row["alternatives"]]


def training_facts(config: Config, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the settings that say what is trained and what training rows minimise, for the key of kept batches."""
    arms = sorted({row["arm"] for row in rows})
    return [config.train.outcome(), *(config.arm_train(arm).outcome() for arm in arms)]


def write_batches(
    out: Path,
    kind: str,
    key: Sequence[Any],
    batches: Sequence[Any],
    work: Callable[[Any], list[Row]],
    label: str,
    **common: Any,
) -> None:
    """Write a manifest whose rows `work` returns batch by batch. A killed command continues after its last finished batch.

    key: everything on which the rows depend. common: stage, settings, parents and uses, as for `manifests.write`.
    """

    def table(found: list[Row]) -> pa.Table:
        return pa.Table.from_pylist(found, schema=manifests.schema(kind))

    with kept_batches(out, key, batches, work=work, finish=table, label=label) as files:
        manifests.write(out, kind, (pq.read_table(file) for file in files), **common)
