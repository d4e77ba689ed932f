"""Train the shared LLM on a schedule, on one GPU, on several, or on several nodes with DeepSpeed.

    python -m stages.train --config config.yaml --arm sft --prompts prompts.parquet --schedule schedule.parquet \\
        --candidates base/*.parquet --work work/ --out checkpoint/ --metrics training.parquet [--continue parent-work/]

The command starts as many processes as train.gpus and train.nodes say. The schedule is read in order, so a segment continues
bit-exactly: `--continue` takes the work folder of the training that this one continues, and a killed training continues from
its own last save. On SIGTERM and SIGUSR1 it saves after the current step and exits with code 75; run it again to continue. The
saves in a work folder are keyed by everything they depend on (code, settings, base model and the schedule up to that step).
Saves with another key are never continued; where there are none, training starts from the base model and ends with the same
weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.common import manifests
from stages.common.candidates import Candidates
from stages.common.config import WITHOUT_OUTCOME, Arm, Config, Train, load
from stages.common.errors import UserError, run_stage
from stages.common.files import aside, claim, sync, whole_file
from stages.common.fingerprints import code, read_settings
from stages.common.registry import entry
from stages.families import checkpoint_hash, describe, open_family, preprocessing_hash, require_gpus, resolved
from stages.families.tools.asking import question_and_prefix
from stages.training.anchor import Judgement, anchor_loss, read_judgements
from stages.training.launch import STOPPED, launched, local_rank, rank
from stages.training.saves import discard, keyed, latest, require_layout, saves, step_of

Row = dict[str, Any]


@dataclass
class Inputs:
    """Everything that a training reads, checked.

    weights: the base model's hash. preprocessing: that of its tokenizer and image processor. precision: the dtype of the
    training. prompts: prompt text by prompt_id. pictures: a hash of each picture by candidate_id, also of those that are
    judged. modules: the fingerprint of the code.
    """

    config: Config
    arm: Arm
    settings: Train
    schedule: list[Row]
    weights: str
    preprocessing: str
    precision: str
    candidates: Candidates
    prompts: dict[str, str]
    pictures: dict[str, str]
    judgements: list[Judgement]
    modules: list[str]

    @property
    def steps(self) -> int:
        return self.schedule[-1]["step"] + 1

    @property
    def dpo(self) -> bool:
        return self.arm.objective == "dpo"

    @property
    def uses(self) -> list[str]:
        return [entry("FAMILIES", self.config.model.family)]

    def outcome(self) -> Row:
        """Return the settings on which the trained weights depend by more than rounding."""
        read = read_settings(self.settings, "stages.train", mentioned=self.uses)
        return {key: value for key, value in read.items() if key not in WITHOUT_OUTCOME}

    def identity(self) -> tuple[object, ...]:
        """Return everything that the saves depend on, besides the schedule."""
        common = (
            self.arm.objective,
            self.outcome(),
            self.config.seed,
            self.weights,
            self.preprocessing,
            self.precision,
            self.modules,
        )
        if not self.judgements:
            return common
        asked = question_and_prefix(describe(self.config.model.family), self.config.score)
        judged = [(judgement.candidate, judgement.target) for judgement in self.judgements]
        return (
            *common,
            asked,
            [(row["candidate_id"], self.prompts[row["prompt_id"]], self.pictures[row["candidate_id"]], p) for row, p in judged],
        )

    @cached_property
    def contents(self) -> list[Row]:
        """The rows of the schedule, each with its prompt's text and the hashes of its pictures."""

        def read_by(row: Row) -> Row:
            pictures = [self.pictures.get(row[side]) for side in ("chosen", "rejected")]
            return {"prompt": self.prompts[row["prompt_id"]], "pictures": pictures}

        return [row | read_by(row) for row in self.schedule]


def read_inputs(arguments: argparse.Namespace) -> Inputs:
    """Read and check the schedule and all that it refers to. Raises UserError."""
    config = load(arguments.config)
    if arguments.arm not in config.arms:
        raise UserError(f"--arm {arguments.arm}: not in {arguments.config}; arms there: {', '.join(config.arms)}")
    arm, settings = config.arms[arguments.arm], config.arm_train(arguments.arm)
    schedule = manifests.read_rows(arguments.schedule, "schedule")
    base, family = Path(config.model.checkpoint), config.model.family
    weights = checkpoint_hash(family, base, "train")
    foreign = {row["reference_checkpoint"] for row in schedule} - {weights}
    if arm.objective == "dpo" and foreign:
        raise UserError(
            f"{arguments.schedule}: reference_checkpoint {foreign.pop()} is not {base} ({weights}); "
            "run stages.reference with this model again"
        )
    wanted = {row[side] for row in schedule for side in ("chosen", "rejected") if row[side]}
    anchored = settings.judge_anchor_weight > 0
    judgements = read_judgements(arguments.scores, arguments.candidates, settings, config.seed) if anchored else []
    judged = {judgement.candidate["candidate_id"] for judgement in judgements}
    candidates = Candidates(arguments.candidates, wanted | judged, describe(family))
    prompts = {row["prompt_id"]: row["prompt"] for row in manifests.read_rows(arguments.prompts, "prompts")}
    asked = {row["prompt_id"] for row in schedule} | {judgement.candidate["prompt_id"] for judgement in judgements}
    if missing := asked - prompts.keys():
        raise UserError(f"{arguments.prompts}: prompt_id {min(missing)} of the schedule is not there; give its prompt manifest")
    modules = code("stages.train", mentioned=[entry("FAMILIES", family)])
    precision = resolved(config.model).dtype if settings.precision == "auto" else settings.precision
    pictures = candidates.digests(sorted(wanted | judged))
    return Inputs(
        config=config,
        arm=arm,
        settings=settings,
        schedule=schedule,
        weights=weights,
        preprocessing=preprocessing_hash(base),
        precision=precision,
        candidates=candidates,
        prompts=prompts,
        pictures=pictures,
        judgements=judgements,
        modules=modules,
    )


def open_trained_model(config: Config, precision: str) -> Any:
    """Load the base model on this process's device, in the precision of the training."""
    import torch

    device = resolved(config.model).device
    if device.startswith("cuda") and local_rank() is not None:
        device = f"cuda:{local_rank()}"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # the trainer takes the current device
    model = config.model.model_copy(update={"dtype": precision, "device": device})
    return open_family(model, Path(config.model.checkpoint), "train")


def put_in_place(folder: Path, out: Path, last: str) -> None:
    """Move a finished checkpoint's files into `out`, with the file `last` at the end: where it exists, the rest does too."""
    out.mkdir(parents=True, exist_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path == folder / last, path.suffix == ".safetensors", path)):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.chmod(out.stat().st_mode & 0o666)  # safetensors are written so that only the owner can read them
        sync(path)
        path.replace(target)
        sync(target.parent)
    shutil.rmtree(folder)


def metrics_rows(history: list[dict[str, Any]], settings: Train) -> list[Row]:
    """Return the trainer's log as (step, metric, value) rows, without the token counter, which restarts with each process."""
    for logged in history:  # SFT's loss is the NLL and the anchor; DPO logs its NLL
        images = logged["loss"] - settings.judge_anchor_weight * logged.get("judge_anchor", 0.0)
        if settings.image_weight:
            logged.setdefault("nll", images / settings.image_weight)
    return [
        {"step": int(logged["step"]), "metric": name, "value": float(value)}
        for logged in history
        for name, value in sorted(logged.items())
        if name not in ("step", "epoch", "num_tokens")
    ]


def plot(history: list[dict[str, Any]], out: Path) -> None:
    """Plot loss, DPO's margin and learning rate by step as PNG. Equal trainings give equal files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in ("loss", "rewards/margins", "learning_rate") if name in history[0]]
    figure = Figure(figsize=(8, 2 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(len(shown), sharex=True), shown, strict=True):
        axis.plot([entry["step"] for entry in history], [entry[name] for entry in history], linewidth=1)
        axis.set_ylabel(name)
    axis.set_xlabel("step")
    with whole_file(out) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def card(config: Config, name: str, schedule: Path, steps: int, weights: str, modules: list[str]) -> str:
    """Return the checkpoint's README: what it is, and everything that is needed to train it again."""
    import yaml

    arm, epochs = config.arms[name], manifests.facts(schedule)["settings"].get("epochs")
    packages = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
    facts = {
        "arm": name,
        "epochs": epochs,
        "optimizer steps": steps,
        "base model": weights,
        "schedule": manifests.content_hash(schedule),
        "versions": {package: version(package) for package in packages},
        "code": modules,
        "config": config.model_dump(),
    }
    return f"""# {config.run}, arm {name}

{Path(config.model.checkpoint).name} ({config.model.family}), trained by {arm.objective.upper()} for {epochs} epochs on images
that it drew itself and that its own judgement chose.

To train it again, run the sources below with `config` below as `--configfile`. Base model, schedule and sources are
identified by a hash of their content.

```yaml
{yaml.safe_dump(facts, sort_keys=False, width=120)}```
"""


def train(arguments: argparse.Namespace, inputs: Inputs, start: Path | None) -> None:
    """Train from a save or from the base model, and write checkpoint, metrics and plot. Runs in every process."""
    import torch

    from stages.training.rows import Material, make_rows
    from stages.training.trainer import Job, Stop, StopSaveLog, join, leave, make_trainer, require_equal_starts, whole_model

    stop = Stop()
    torch.use_deterministic_algorithms(True, warn_only=True)
    config, settings, steps = inputs.config, inputs.settings, inputs.steps
    description = describe(config.model.family)
    family = open_trained_model(config, inputs.precision)
    view = family.training_view()
    view.model.train()
    if settings.deepspeed:
        join(cpu=next(view.model.parameters()).device.type == "cpu")
        require_equal_starts(start)

    work = keyed(arguments.work, inputs.contents, steps, inputs.identity())
    if rank() == 0:
        discard(arguments.work, work, *([start.parent] if start else []))
    held = claim(work / "writer") if rank() == 0 else lambda: None
    material = Material(
        schedule=inputs.schedule,
        prompts=inputs.prompts,
        candidates=inputs.candidates,
        dpo=inputs.dpo,
        anchors=len(inputs.judgements),
        prompt_dropout=0.0 if inputs.dpo else settings.prompt_dropout,
        seed=config.seed,
    )
    some = material.texts(range(min(len(inputs.schedule), 256)))
    row_flops = sum(map(view.flops, some)) / len(some) * (2 if inputs.dpo else 1)
    anchor = None
    if inputs.judgements:
        anchor = anchor_loss(family, description, inputs.judgements, inputs.prompts, config.score)
    trainer = make_trainer(
        Job(
            view=view,
            rows=make_rows(view, material),
            settings=settings,
            work=work,
            steps=steps,
            seed=config.seed,
            dpo=inputs.dpo,
            callback=StopSaveLog(settings, stop, held, arguments.schedule, row_flops),
            anchor=anchor,
        )
    )
    if rank() == 0:
        count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        print(f"{steps} steps, {count:,} trainable numbers, from {start.name if start else 'the base model'}", flush=True)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if trainer.state.global_step < steps:
        if rank() == 0:
            print(
                f"stopped by a signal after step {trainer.state.global_step}, saved; run it again to continue", file=sys.stderr
            )
        sys.exit(STOPPED)
    if steps not in map(step_of, saves(work)):
        trainer._save_checkpoint(trainer.model, None)
    held()
    finished = aside(arguments.out)
    with whole_model(trainer):
        if rank() == 0:
            family.save(finished)
    if rank() == 0:
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        write_results(arguments, inputs, finished, history, description.trained_file)
        discard(arguments.work, work)
        print(json.dumps({"steps": steps, "last_loss": history[-1]["loss"]}))
    leave()


def write_results(arguments: argparse.Namespace, inputs: Inputs, finished: Path, history: list[Row], last: str) -> None:
    """Write metrics and plot, and put the finished checkpoint in place."""
    text = card(inputs.config, arguments.arm, arguments.schedule, inputs.steps, inputs.weights, inputs.modules)
    (finished / "README.md").write_text(text)
    manifests.write(
        arguments.metrics,
        "training",
        metrics_rows(history, inputs.settings),
        stage="stages.train",
        settings=inputs.outcome(),
        parents=[arguments.schedule],
        uses=inputs.uses,
    )
    plot(history, arguments.metrics.with_suffix(".png"))
    put_in_place(finished, arguments.out, last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="the arm whose objective and settings apply")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--schedule", type=Path, required=True, help="schedule manifest, from the very first step")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="for the judge anchor: scores of base candidates")
    parser.add_argument("--continue", dest="parent", type=Path, help="work folder of the training that this one continues")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainer's saves")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--metrics", type=Path, required=True, help="training metrics (Parquet)")
    arguments = parser.parse_args()
    inputs = read_inputs(arguments)
    works = [*([arguments.parent] if arguments.parent else []), arguments.work]
    start = latest(works, inputs.contents, inputs.identity())
    if start:
        require_layout(start, inputs.settings)
    if inputs.settings.deepspeed:
        if local_rank() is None:
            require_gpus(inputs.config.model, inputs.settings.gpus, "train.gpus")
        launched(inputs.settings.gpus, inputs.settings.nodes)  # the rest runs in each of the processes
    train(arguments, inputs, start)


if __name__ == "__main__":
    run_stage(main)
