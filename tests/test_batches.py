"""Batches that several processes share."""

from contextlib import contextmanager

import pyarrow as pa
import pytest

from stages.common import batches
from stages.common.processes import PROCESS


def test_processes_share_what_is_missing_and_not_what_is_done(tmp_path, monkeypatch):
    """After a helper has failed, only its share is missing: the processes of the next run divide that among them."""
    asked: dict[str, list[int]] = {}

    def run(name: str, workers: int = 1) -> None:
        def work(batch: int) -> int:
            asked.setdefault(name, []).append(batch)
            if name == "failing" and batch % 4 == 2:
                raise RuntimeError("a helper has died")
            return batch

        with batches.kept_batches(
            tmp_path / "out.parquet", ("key",), range(16), work=work, finish=lambda number: pa.table({"number": [number]}),
            label="numbers", workers=workers,
        ) as files:  # fmt: skip
            assert [file.exists() for file in files] == [True] * 16

    @contextmanager
    def helpers(count):
        for number in range(1, count):
            with monkeypatch.context() as patch, pytest.raises(SystemExit):
                patch.setenv(PROCESS, f"{number}/{count}")
                run(f"helper {number}", count)
        yield

    folder = tmp_path / f".out.parquet.{batches.hash_seed('key'):016x}.partial"
    with pytest.raises(RuntimeError):
        run("failing")
    kept = {int(path.stem) for path in folder.glob("0*.parquet")}
    missing = [number for number in range(16) if number not in kept]
    assert len(missing) > 8
    monkeypatch.setattr(batches, "helpers", helpers)
    run("first", 4)
    shares = [asked.get(name, []) for name in ("first", "helper 1", "helper 2", "helper 3")]
    assert sorted(number for share in shares for number in share) == missing
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
