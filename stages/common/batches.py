"""Work in planned batches. Each is kept as soon as it is done, so a killed stage continues after its last whole batch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from stages.common.files import claim, whole_file
from stages.common.processes import helpers, helping
from stages.common.seeds import hash_seed

Item = TypeVar("Item")


def planned(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut the items into consecutive pieces of at most `size`. The result depends on the items only, not on time or memory."""
    return [items[start : start + size] for start in range(0, len(items), size)]


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
    """Yield the tables of all batches as Parquet files, in order, computed now or kept by an earlier run with the same key.

    out: the stage's final output. Kept batches are in a hidden folder beside it, whose name is a hash of `key`.
    key: everything that the batches depend on.
    prepare, work, finish: the three steps of a batch; see `pipeline`.
    workers: above 1, so many processes run this same command and share the missing batches, one GPU each.

    Leaving the context without an error removes the kept batches, so write `out` inside it.
    """
    folder = out.parent / f".{out.name}.{hash_seed(*key):016x}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:06d}.parquet" for number in range(len(batches))]
    helper = helping()
    held = claim(folder / "writer") if helper is None else lambda: None
    listed = folder / "missing.json"  # all processes share what was missing when the first of them looked
    if helper is None:
        missing = [number for number, file in enumerate(files) if not file.exists()]
        process, processes = 0, max(1, min(workers, len(missing)))
        with whole_file(listed) as temporary:
            temporary.write_text(json.dumps(missing))
    else:
        process, processes = helper
        missing = json.loads(listed.read_text())
    mine = missing[process::processes]

    def save(number: int, result: Any) -> None:
        table = finish(result)
        with whole_file(files[number]) as temporary:
            pq.write_table(table, temporary)

    with helpers(processes if helper is None else 1):
        pipeline([(number, batches[number]) for number in mine], prepare, work, save, held, label)
    if helper is not None:
        sys.exit(0)  # the process that started this one writes the output
    held()
    yield files
    held()
    for left in out.parent.glob(f".{out.name}.*.partial"):  # this one, and those of killed runs with other settings
        shutil.rmtree(left, ignore_errors=True)  # on NFS an open file keeps its folder


def pipeline(
    batches: Sequence[tuple[int, Any]],
    prepare: Callable[[Any], Any],
    work: Callable[[Any], Any],
    save: Callable[[int, Any], None],
    held: Callable[[], None],
    label: str,
) -> None:
    """Run `save(number, work(prepare(batch)))` for every (number, batch).

    While `work` has one batch on the device, one thread prepares the next and another saves the one before. At most one batch
    waits to be saved. held: raises when another process has taken over; it is asked before each batch is saved.
    """
    with ThreadPoolExecutor(1) as before, ThreadPoolExecutor(1) as after:
        progress = tqdm(total=len(batches), desc=label, unit="batch", disable=not sys.stderr.isatty())
        ahead: Future[Any] | None = before.submit(prepare, batches[0][1]) if batches else None
        behind: Future[None] | None = None
        for place, (number, _) in enumerate(batches):
            assert ahead is not None
            ready = ahead.result()
            ahead = before.submit(prepare, batches[place + 1][1]) if place + 1 < len(batches) else None
            result = work(ready)
            if behind is not None:
                behind.result()  # its error stops the stage
            held()
            behind = after.submit(save, number, result)
            progress.update()
            if progress.disable and (place + 1) % max(1, len(batches) // 10) == 0:
                print(f"{label}: {place + 1} of {len(batches)} batches", file=sys.stderr, flush=True)
        if behind is not None:
            behind.result()
        progress.close()
