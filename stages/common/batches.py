"""Work in planned batches, each kept as soon as it is done: a killed stage goes on after its last whole batch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.common.runtime import whole_file
from stages.common.seeds import hash_seed

Batch = TypeVar("Batch")


@contextmanager
def kept_batches(
    out: Path, key: Sequence[object], batches: Sequence[Batch], work: Callable[[Batch], pa.Table], label: str
) -> Iterator[Iterator[pa.Table]]:
    """Yield the tables of all batches in order, computed now or kept by an earlier run with the same key.

    out: the stage's final output; kept batches lie in a hidden folder beside it, named by the hash of `key` (everything
    that the batches depend on). Leaving the context without an error removes it: write `out` inside.
    """
    folder = out.parent / f".{out.name}.{hash_seed(*key):016x}.partial"
    folder.mkdir(parents=True, exist_ok=True)

    def run() -> Iterator[pa.Table]:
        shown = tqdm(total=len(batches), desc=label, unit="batch", disable=not sys.stderr.isatty())
        for number, batch in enumerate(batches):
            path = folder / f"{number:06d}.parquet"
            if not path.exists():
                table = work(batch)
                with whole_file(path) as temporary:
                    pq.write_table(table, temporary)
                if shown.disable and (number + 1) % max(1, len(batches) // 10) == 0:
                    print(f"{label}: {number + 1} of {len(batches)} batches", file=sys.stderr, flush=True)
            shown.update()
            yield pq.read_table(path)
        shown.close()

    yield run()
    for kept in out.parent.glob(f".{out.name}.*.partial"):  # this one, and those of killed runs with other settings
        shutil.rmtree(kept)


def planned(items: Sequence[Batch], size: int) -> list[Sequence[Batch]]:
    """Consecutive pieces of at most `size` items; a function of the items alone, never of time or memory."""
    return [items[start : start + size] for start in range(0, len(items), size)]
