"""What a run's folder has so far: its sets of prompts, the images drawn for them, and everything that was said about them.

A run may be half done or failed. Files that are not there yet are left out, and rows that nobody has judged yet have empty
verdicts. Tables are kept as Arrow columns without image tokens, because a run can have more images than fit into memory as
Python objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.common import manifests
from stages.common.config import Config, load
from stages.common.errors import UserError
from stages.tools import arms
from stages.tools.interrupted import read_jobs
from stages.tools.status import last_line

Row = dict[str, Any]
TRAIN, REPLAY, BASE = "train", "replay", "base"
DRAWN = ("candidate_id", "prompt_id", "round", "index", "seed", "shard", "offset", "nbytes", "checkpoint")
OWN = {"p_yes": "p_yes", "verdict": "own"}
EXTERNAL = ("verdict", "score", "reason", "answer")


@dataclass(frozen=True)
class Group:
    """Images that belong side by side: those of one set by one model.

    name: the folder in the run. label: what people read. images: the folder below candidates/, scores/ and verdicts/.
    """

    name: str
    label: str
    images: str


@dataclass(frozen=True)
class Run:
    """A run's folder, results/<run>, with its configuration."""

    folder: Path
    config: Config

    def prompts(self, name: str) -> Path:
        return self.folder / "prompts" / f"{name}.parquet"

    def shards(self, group: Group, kind: str) -> list[Path]:
        """Return the manifests of a group that exist, in order. kind: candidates, scores, or verdicts/<judge>."""
        return manifests.pieces(self.folder / group.name / kind / group.images, self.config.shards(group.images))

    def models(self) -> list[str]:
        """Return the models that draw benchmarks: base, baselines, checkpoints in the order of training, and audited models."""
        return [*self.config.untrained(), *arms.nodes(self.config), *self.config.audit.models]

    def compared(self) -> list[str]:
        """Return the models that people compare: those of `models` without the checkpoints in the middle of a training."""
        return [*self.config.untrained(), *self.config.arms, *self.config.audit.models]

    def subject(self) -> str:
        """Return in words which checkpoints the run is about: the model that it trains, if any, and those that it audits."""
        config = self.config
        audited = [f"{name}: {model.family}, {model.checkpoint}" for name, model in config.audit.models.items()]
        own = [f"{config.model.family}, {config.model.checkpoint}"] if config.arms or not audited else []
        return "; ".join([*own, *audited])

    def replays(self) -> list[arms.Replay]:
        return list(arms.replays(self.config).values())

    def groups(self, name: str) -> list[Group]:
        """Return the groups of a set of which something has been drawn, base first."""
        if name == TRAIN:
            redrawn = [replay for replay in self.replays() if replay.draws]
            found = [Group(BASE, BASE, TRAIN)]
            found += [Group(replay.name, f"{replay.name}, replay", REPLAY) for replay in redrawn]
        else:
            found = [Group(model, model, name) for model in self.models()]
        return [group for group in found if self.shards(group, "candidates")]

    def sets(self) -> list[str]:
        """Return the sets of prompts of which something has been drawn: the training prompts, then the benchmarks."""
        return [name for name in (TRAIN, *self.config.benchmarks) if self.prompts(name).exists() and self.groups(name)]

    def second_opinions(self, group: Group) -> list[str]:
        """Return the models that have judged a group's images: trained models judge those of base on benchmarks."""
        if group != Group(BASE, BASE, group.images):
            return []
        return [model for model in self.models() if self.shards(Group(model, model, group.images), "scores-of-base")]

    def judges(self, name: str) -> list[str]:
        """Return the external judges that have judged images of a set, the benchmark's own judge first."""
        known = self.config.benchmark_judges(name) if name in self.config.benchmarks else []
        found = {path.parent.name for g in self.groups(name) for path in (self.folder / g.name).glob(f"verdicts/*/{g.images}")}
        return [*(judge for judge in known if judge in found), *sorted(found - set(known))]

    def missing(self) -> list[str]:
        """Return the outputs of planned jobs that do not exist, below the run's folder, with the last line of a job's log."""
        found = []
        for job in read_jobs(self.folder):
            out, log = (Path(*Path(path).parts[2:]) for path in (job.out, job.log))  # without results/<run>
            if str(out) not in ("report.html", "pages") and not (self.folder / out).exists():  # these are being written now
                ended = self.folder / log
                found.append(f"{out}: {last_line(ended)}" if ended.is_file() else str(out))
        return found


def open_run(folder: Path) -> Run:
    """Return a run. Raises UserError unless the folder is one that `snakemake` has begun to write."""
    config = folder / "run_config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: contains no run_config.yaml; give the folder of a run that has been started, results/<run>")
    return Run(folder, load(config))


def read_columns(paths: Iterable[Path], kind: str, names: Sequence[str]) -> pa.Table:
    """Return some columns of manifests, one after the other. Raises UserError that names a file without them."""
    wanted = pa.schema([manifests.schema(kind).field(name) for name in names])
    tables = [wanted.empty_table()]
    for path in paths:
        try:
            tables.append(pq.read_table(path, columns=list(names)).select(list(names)).cast(wanted))
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a {kind} manifest ({reason}); delete it and run again") from None
    return pa.concat_tables(tables).combine_chunks()


def beside(left: pa.Table, right: pa.Table, names: Mapping[str, str]) -> pa.Table:
    """Return `left` with columns of `right` in the rows with the same candidate_id; elsewhere they are empty.

    names: the columns of `right` and their new names.
    """
    places = pc.index_in(left["candidate_id"], value_set=right["candidate_id"].combine_chunks())
    found = right.select(list(names)).take(places)
    for name, new in names.items():
        left = left.append_column(new, found[name])
    return left


def images(run: Run, group: Group, judges: Sequence[str], models: Sequence[str] = ()) -> pa.Table:
    """Return a row for each image of a group.

    Its columns are DRAWN, scored, p_yes and own, and for each judge `judged <judge>`, `verdict <judge>` and so on. models: for
    images of base, the models whose verdicts on them become the columns `p_yes by <model>` and `own by <model>`.
    """
    table = read_columns(run.shards(group, "candidates"), "candidates", DRAWN)
    scores = read_columns(run.shards(group, "scores"), "scores", ("candidate_id", *OWN))
    table = table.append_column("scored", pc.is_in(table["candidate_id"], scores["candidate_id"].combine_chunks()))
    table = beside(table, scores, OWN)
    for judge in judges:
        verdicts = read_columns(run.shards(group, f"verdicts/{judge}"), "verdicts", ("candidate_id", *EXTERNAL))
        table = table.append_column(
            f"judged {judge}", pc.is_in(table["candidate_id"], verdicts["candidate_id"].combine_chunks())
        )
        table = beside(table, verdicts, {name: f"{name} {judge}" for name in EXTERNAL})
    for model in models:
        of_base = run.shards(Group(model, model, group.images), "scores-of-base")
        scores = read_columns(of_base, "scores", ("candidate_id", *OWN))
        table = beside(table, scores, {name: f"{new} by {model}" for name, new in OWN.items()})
    return table.combine_chunks()


class ByPrompt:
    """The rows of a table by the number of their prompt. Rows of a prompt keep their order."""

    def __init__(self, table: pa.Table, prompts: pa.Table) -> None:
        places = pc.index_in(table["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
        numbers = places.fill_null(-1).combine_chunks().to_numpy()
        order = np.argsort(numbers, kind="stable")
        self._table = table.take(order).combine_chunks()
        self._ends = np.searchsorted(numbers[order], np.arange(prompts.num_rows + 1))

    def __getitem__(self, number: int) -> list[Row]:
        start, end = self._ends[number : number + 2]
        return self._table.slice(start, end - start).to_pylist() if end > start else []


@dataclass(frozen=True)
class SelectionFolder:
    """Where the pairs of a selection are, what it is called, and its replay if it is one."""

    folder: Path
    label: str
    replay: arms.Replay | None


def selection_folders(run: Run) -> list[SelectionFolder]:
    """Return where all selections are, or will be: the first one of each arm, then those of the replays."""
    config, tree = run.config, arms.nodes(run.config)
    owners: dict[str, list[str]] = {}
    for arm in config.arms:
        owners.setdefault(arms.selection_owner(config, arm), []).append(arm)
    found = [SelectionFolder(run.folder / owner, ", ".join(names), None) for owner, names in owners.items()]
    for replay in run.replays():
        names = [arm for arm in config.arms if replay.name in tree[arm].replays]
        what = "replay" if replay.draws else "further rows"  # in a control where nothing is drawn, of the first round
        label = f"{', '.join(names)}: {what} after epoch {replay.node.epoch}"
        found.append(SelectionFolder(run.folder / replay.name / "replay", label, replay))
    return found


@dataclass(frozen=True)
class Selection:
    """What one selection took and left out.

    label: with the names of the arms that share it. epoch: of a replay, or None for the first. pool: the prompts that a replay
    drew again.
    """

    label: str
    epoch: int | None
    pairs: ByPrompt
    discard: ByPrompt
    pool: ByPrompt | None


def selections(run: Run, prompts: pa.Table) -> list[Selection]:
    """Return the selections that exist so far: the first one of each arm, then those of the replays."""
    found: list[Selection] = []

    def table(path: Path, kind: str, names: Sequence[str]) -> ByPrompt:
        return ByPrompt(read_columns([path] if path.exists() else [], kind, names), prompts)

    for place in selection_folders(run):
        folder, replay = place.folder, place.replay
        if (folder / "pairs.parquet").exists():
            pairs = table(folder / "pairs.parquet", "pairs", ("prompt_id", "chosen", "rejected", "margin"))
            discard = table(folder / "discard.parquet", "discard", ("prompt_id", "best_p_yes", "reason"))
            pool = table(folder / "pool.parquet", "prompts", ("prompt_id",)) if replay and replay.draws else None
            epoch = replay.node.epoch if replay else None
            found.append(Selection(place.label, epoch, pairs, discard, pool))
    return found
