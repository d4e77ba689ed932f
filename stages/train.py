"""Train the shared LLM on a schedule, with TRL's SFTTrainer or DPOTrainer; on several GPUs or nodes with DeepSpeed.

    python -m stages.train --config config.yaml --arm sft --prompts prompts.parquet --schedule schedule.parquet \\
        --candidates base/*.parquet --work work/ --out checkpoint/ --metrics training.parquet [--continue parent-work/]

The command starts as many processes as train.gpus and train.nodes say. The schedule is read in order, so a segment
continues bit-exactly: `--continue` takes the work folder of the training that this one goes on from, and a killed training
goes on from its own last save. SIGTERM and SIGUSR1 save after the step and exit with code 75: run it again. A work
folder's saves are keyed by everything they depend on (code, settings, base model, the schedule up to there); saves of
another key are never continued, and where there are none the training starts at the base model, which gives the same
weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.common import manifests, shards
from stages.common.config import Config, Score, Train, load
from stages.common.fingerprints import code
from stages.common.runtime import UserError, aside, claim, run_stage, sync, whole_file
from stages.common.seeds import hash_seed
from stages.families import FAMILIES, open_family
from stages.families.tools.checkpoints import checkpoint_hash
from stages.training.launch import STOPPED, launched, local_rank, rank
from stages.training.saves import discard, keyed, latest, require_layout, saves, step_of

Row = dict[str, Any]


def training_rows(
    family: Any, schedule: list[Row], prompts: dict[str, Row], known: dict[str, Row], dpo: bool, anchors: int
) -> Any:
    """The schedule as a `datasets.Dataset` of ids, row for row; row i keeps judgement i modulo `anchors`, if there are any."""
    import numpy as np
    from datasets import Dataset

    def ids(side: str) -> list[tuple[list[int], list[int]]]:
        texts = [prompts[row["prompt_id"]]["prompt"] for row in schedule]
        return family.training_rows(texts, np.array([known[row[side]]["tokens"] for row in schedule]))

    chosen = ids("chosen")
    kept = [{"anchor": i % anchors} if anchors else {} for i in range(len(schedule))]
    if not dpo:
        return Dataset.from_list(
            [
                {"input_ids": prompt + image, "labels": [-100] * len(prompt) + image, **judgement}
                for (prompt, image), judgement in zip(chosen, kept, strict=True)
            ]
        )
    return Dataset.from_list(
        [
            {
                "prompt_ids": prompt,
                "chosen_ids": image,
                "rejected_ids": other,
                "ref_chosen_logps": row["reference_chosen"],
                "ref_rejected_logps": row["reference_rejected"],
                **judgement,
            }
            for (prompt, image), (_, other), row, judgement in zip(chosen, ids("rejected"), schedule, kept, strict=True)
        ]
    )


def judgements(scores: list[Path], candidates: list[Path], seed: int) -> list[tuple[Path, Row, float]]:
    """The base model's own p_yes on its own candidates, shuffled: (candidate manifest, candidate, p_yes)."""
    found = {row["candidate_id"]: row["p_yes"] for row in manifests.read_rows(scores, "scores") if row["p_yes"] is not None}
    rows = [
        (path, row, found[row["candidate_id"]])
        for path in candidates
        for row in manifests.read_rows(path, "candidates", without=("tokens",), wanted=found)
    ]
    if not rows:
        raise UserError("train.judge_anchor_weight: no judged candidate; give --scores of the base model's candidates")
    return sorted(rows, key=lambda row: hash_seed("anchor", seed, row[1]["candidate_id"]))


def anchor_loss(
    family: Any, anchors: list[tuple[Path, Row, float]], prompts: dict[str, Row], score: Score
) -> Callable[[Any, list[int]], Any]:
    """From the trainer's model and the places of judgements to the cross-entropy to them, asked as stages.score asked."""
    import numpy as np

    template, prefix = score.asked(family)

    def loss(model: Any, places: list[int]) -> Any:
        chosen = [anchors[place] for place in places]
        images = np.concatenate([shards.read_images(path, [row]) for path, row, _ in chosen])
        questions = [template.replace("{prompt}", prompts[row["prompt_id"]]["prompt"]) for _, row, _ in chosen]
        return family.judge_loss(model, images, questions, np.array([p_yes for _, _, p_yes in chosen]), prefix)

    return loss


def place(folder: Path, out: Path) -> None:
    """Move a finished checkpoint folder's files into `out`, the weights last: where they are, the rest is."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name)):
        path.chmod(out.stat().st_mode & 0o666)  # safetensors are written for the owner alone
        sync(path)
        path.replace(out / path.name)
    sync(out)
    folder.rmdir()


def metrics_rows(history: list[dict[str, Any]], settings: Train) -> list[Row]:
    """The trainer's log as (step, metric, value) rows, without the counter that starts again where a training does."""
    for entry in history:  # SFT's loss is the NLL and the anchor; DPO logs its NLL
        entry.setdefault("nll", entry["loss"] - settings.judge_anchor_weight * entry.get("judge_anchor", 0.0))
    return [
        {"step": int(entry["step"]), "metric": name, "value": float(value)}
        for entry in history
        for name, value in sorted(entry.items())
        if name not in ("step", "epoch", "num_tokens")
    ]


def plot(history: list[dict[str, Any]], out: Path) -> None:
    """Loss, DPO's margin and learning rate by step, as PNG; equal trainings give equal files."""
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


def card(config: Config, name: str, schedule: Path, steps: int, weights: str, modules: list[str], saved: Path) -> str:
    """The checkpoint's README: what it is, and everything needed to train it again."""
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
    architecture = json.loads((saved / "config.json").read_text())["architectures"][0]
    return f"""# {config.run}, arm {name}

{Path(config.model.checkpoint).name}, trained by {arm.objective.upper()} for {epochs} epochs on images of its own that its own
judgement chose. Loads with `transformers.{architecture}.from_pretrained`.

To train it again, give `config` below as `--configfile` to the sources below. Base model, schedule and sources are told by a
hash of their content.

```yaml
{yaml.safe_dump(facts, sort_keys=False, width=120)}```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--arm", required=True, help="whose objective and settings")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--schedule", type=Path, required=True, help="schedule manifest, from the very first step")
    parser.add_argument("--candidates", type=Path, nargs="+", required=True, help="candidate manifests")
    parser.add_argument("--scores", type=Path, nargs="*", default=[], help="of the base candidates, for the judge anchor")
    parser.add_argument("--continue", dest="parent", type=Path, help="work folder of the training this one goes on from")
    parser.add_argument("--work", type=Path, required=True, help="folder of the trainer's saves")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--metrics", type=Path, required=True, help="training metrics (Parquet)")
    arguments = parser.parse_args()
    config: Config = load(arguments.config)
    arm, settings = config.arms[arguments.arm], config.arm_train(arguments.arm)
    dpo = arm.objective == "dpo"
    schedule = manifests.read_rows(arguments.schedule, "schedule")
    steps = schedule[-1]["step"] + 1
    base = Path(config.model.checkpoint)
    weights = checkpoint_hash(base)
    foreign = {row["reference_checkpoint"] for row in schedule} - {weights}
    if dpo and foreign:
        raise UserError(
            f"{arguments.schedule}: reference_checkpoint {foreign.pop()} is not {base} ({weights}); "
            "run stages.reference with this model again"
        )
    wanted = {row[side] for row in schedule for side in ("chosen", "rejected") if row[side]}
    known = {row["candidate_id"]: row for row in manifests.read_rows(arguments.candidates, "candidates", wanted=wanted)}
    if lost := sorted(wanted - known.keys()):
        raise UserError(f"{arguments.schedule}: candidate {lost[0]} is in none of the candidate manifests; give them all")

    prompts = manifests.prompts_of(arguments.prompts, list(known.values()))
    anchors = judgements(arguments.scores, arguments.candidates, config.seed) if settings.judge_anchor_weight else []
    modules = code("stages.train", FAMILIES[config.model.family][0])
    judged = [(row["candidate_id"], p_yes) for _, row, p_yes in anchors]
    identity = (arm.objective, settings.outcome(), config.seed, weights, modules, *([judged] if judged else []))
    start = latest([*([arguments.parent] if arguments.parent else []), arguments.work], schedule, identity)
    if start:
        require_layout(start, settings)
    if settings.deepspeed:
        launched(settings.gpus, settings.nodes)  # from here on in each of the processes

    import torch

    from stages.training.trainer import Stop, Watch, join, leave, make_trainer, whole_model

    stop = Stop()
    torch.use_deterministic_algorithms(True, warn_only=True)
    model = config.model.model_copy(update={} if settings.precision == "auto" else {"dtype": settings.precision})
    if torch.cuda.is_available() and local_rank() is not None:
        torch.cuda.set_device(local_rank())
        model = model.model_copy(update={"device": f"cuda:{local_rank()}"})
    family = open_family(model, base)
    view = family.training_view()
    view.model.train()
    if settings.deepspeed:
        join(cpu=view.model.device.type == "cpu")
    rows = training_rows(family, schedule, prompts, known, dpo, len(anchors))
    work = keyed(arguments.work, schedule, steps, identity)
    if rank() == 0:
        discard(arguments.work, work, *([start.parent] if start else []))
    held = claim(work / "writer") if rank() == 0 else lambda: None
    length = sum(len(row.get("input_ids") or row["prompt_ids"] + row["chosen_ids"]) for row in rows) / len(rows)
    watch = Watch(settings, stop, held, arguments.schedule, view.flops, length)
    anchor = anchor_loss(family, anchors, prompts, config.score) if anchors else None
    trainer = make_trainer(view, rows, settings, work, steps, config.seed, dpo, watch, anchor)
    if rank() == 0:
        count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        print(f"{steps} steps, {count:,} trainable numbers, from {start.name if start else 'the base model'}", flush=True)
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    if trainer.state.global_step < steps:
        if rank() == 0:
            print(f"stopped by a signal after step {trainer.state.global_step}, saved; run again to go on", file=sys.stderr)
        sys.exit(STOPPED)
    if steps not in map(step_of, saves(work)):
        trainer._save_checkpoint(trainer.model, None)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    held()
    finished = aside(arguments.out)
    with whole_model(trainer):
        if rank() == 0:
            family.save(finished)
    if rank() == 0:
        text = card(config, arguments.arm, arguments.schedule, steps, weights, modules, finished)
        (finished / "README.md").write_text(text)
        manifests.write(
            arguments.metrics,
            "training",
            metrics_rows(history, settings),
            stage="stages.train",
            settings=settings.outcome(),
            parents=[arguments.schedule],
        )
        plot(history, arguments.metrics.with_suffix(".png"))
        place(finished, arguments.out)
        discard(arguments.work, work)
        print(json.dumps({"steps": steps, "last_loss": history[-1]["loss"]}))
    leave()


if __name__ == "__main__":
    run_stage(main)
