"""Work in planned batches, each kept as soon as it is done: a killed stage goes on after its last whole batch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.common.runtime import UserError, claim, whole_file
from stages.common.seeds import hash_seed

Item = TypeVar("Item")


@contextmanager
def kept_batches(
    out: Path,
    key: Sequence[object],
    batches: Sequence[Any],
    *,
    prepare: Callable[[Any], Any] = lambda batch: batch,
    work: Callable[[Any], Any],
    finish: Callable[[Any], pa.Table],
    label: str,
    workers: int = 1,
) -> Iterator[list[Path]]:
    """Yield all batches' tables as Parquet files in order, computed now or kept by an earlier run with the same key.

    While `work` has one batch on the device, another thread runs `prepare` for the next and a third `finish` for the one
    before. out: the stage's final output; kept batches lie in a hidden folder beside it, named by the hash of `key`
    (everything that the batches depend on). Leaving the context without an error removes it: write `out` inside.

    workers: above 1, as many processes run this same command and share the missing batches, one GPU each.
    """
    folder = out.parent / f".{out.name}.{hash_seed(*key):016x}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    held = claim(folder / "writer") if SHARE not in os.environ else lambda: None
    files = [folder / f"{number:06d}.parquet" for number in range(len(batches))]
    missing = sum(not file.exists() for file in files)
    if SHARE in os.environ:
        share, shares = (int(part) for part in os.environ[SHARE].split("/"))
    else:
        share, shares = 0, max(1, min(workers, missing))
    mine = [number for number in range(share, len(files), shares) if not files[number].exists()]

    def save(number: int, result: Any) -> None:
        table = finish(result)
        with whole_file(files[number]) as temporary:
            pq.write_table(table, temporary)

    with helpers(shares if share == 0 else 1), ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        shown = tqdm(total=len(mine), desc=label, unit="batch", disable=not sys.stderr.isatty())
        ahead: Future[Any] | None = before.submit(prepare, batches[mine[0]]) if mine else None
        behind: Future[None] | None = None
        for place, number in enumerate(mine):
            assert ahead is not None
            ready = ahead.result()
            ahead = before.submit(prepare, batches[mine[place + 1]]) if place + 1 < len(mine) else None
            result = work(ready)
            if behind is not None:
                behind.result()  # at most one batch waits to be written, and its error stops the stage
            held()
            behind = after.submit(save, number, result)
            shown.update()
            if shown.disable and (place + 1) % max(1, len(mine) // 10) == 0:
                print(f"{label}: {place + 1} of {len(mine)} batches", file=sys.stderr, flush=True)
        if behind is not None:
            behind.result()
        shown.close()
    if share:
        sys.exit(0)  # the process that started this one writes the output
    held()
    yield files
    held()
    for left in out.parent.glob(f".{out.name}.*.partial"):  # this one, and those of killed runs with other settings
        shutil.rmtree(left, ignore_errors=True)  # on NFS an open file keeps its folder


SHARE = "SELFGAP_SHARE"  # `k/n` in the environment of the k-th of n processes that share a stage's batches


@contextmanager
def helpers(shares: int) -> Iterator[None]:
    """Run this command again for every share but the first, each on a GPU of its own; UserError where one fails."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    started = []
    for share in range(1, shares):
        stage = sys.modules["__main__"].__spec__
        assert stage is not None, "a stage runs as python -m stages.<name>"
        environment = os.environ | {SHARE: f"{share}/{shares}"}
        environment["CUDA_VISIBLE_DEVICES"] = visible[share] if share < len(visible) else str(share)
        started.append(subprocess.Popen([sys.executable, "-m", stage.name, *sys.argv[1:]], env=environment))
    try:
        yield
        failed = sum(process.wait() != 0 for process in started)
    finally:
        for process in started:
            process.terminate()
    if failed:
        raise UserError(f"{failed} of {shares} processes failed, see above; finished batches are kept, run again")


def planned(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Consecutive pieces of at most `size` items; a function of the items alone, never of time or memory."""
    return [items[start : start + size] for start in range(0, len(items), size)]
