"""Batches that several processes share."""

from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow as pa
import pytest

from stages.common import batches, processes
from stages.common.errors import UserError
from stages.common.processes import PROCESS
from stages.common.settings import Model
from stages.families import workers


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


@pytest.fixture
def gpus(monkeypatch):
    """The GPUs that were given to processes, none of which is really started."""
    found = []

    def start(command, env):
        found.append(env.get("CUDA_VISIBLE_DEVICES"))
        return SimpleNamespace(wait=lambda: 0, terminate=lambda: None)

    monkeypatch.setattr(processes, "command", list)
    monkeypatch.setattr(processes.subprocess, "Popen", start)
    return found


@pytest.mark.parametrize(("listed", "given"), [(None, ["1"]), ("4,7", ["7"]), ("4", ["4"]), ("", [""]), ("-1", ["-1"])])
def test_each_process_gets_a_gpu_of_those_that_are_visible(listed, given, gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    with processes.helpers(2):
        pass
    assert gpus == given


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    model = Model(workers=3, device="auto")
    with pytest.raises(UserError, match=r"workers of .*: 3 processes need a GPU each, but torch sees 2"):
        workers(model)
    assert workers(model.model_copy(update={"device": "cpu"})) == 3
    with pytest.raises(UserError, match=r"device is cuda:1; set device to cuda"):
        workers(model.model_copy(update={"device": "cuda:1"}))
    monkeypatch.setenv(processes.PROCESS, "1/3")  # sees one GPU, and is one of the three
    assert workers(model) == 3
