"""Print what a run needs before anything runs: images, judgements, calls of endpoints, training steps, GPU hours,
GPU memory and disk.

    python -m stages.tools.cost --configfile configs/janus-pro-7b.yaml mine.yaml --device H100

The files are laid over each other as `snakemake --configfile` does, and the numbers are those of a run from its beginning.
Counts are exact, except that nobody knows before how many prompts are selected or wait for replay: numbers with `<=` assume
that all of them do. GPU hours and disk are estimates, and the report says from what:

- Where speed/results has the model and the device of --device, GPU hours follow from what was measured. Otherwise they follow
  from SECONDS and FLOPS, from which the workflow also derives the time limits of its jobs. Those are generous, so the run
  should take less.
- Bytes of an image are measured on the run's own images if there are any, or stated with --image-bytes.
- GPU memory is computed from the number of weights. Activations and key-value caches come on top.

A configuration without arms is that of an audit: its models draw and judge, and nothing is trained. No weights are loaded.
Retries, starting Python and loading weights are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyarrow import ArrowException

from stages.common.config import Config, Train, load
from stages.common.errors import UserError, run_stage
from stages.families import describe
from stages.judges import judge_kind
from stages.suites import open_suite
from stages.suites.base import PromptSource
from stages.tools import arms, rescoring
from stages.understanding import understanding_kind

Row = dict[str, Any]
# Seconds on one GPU per image and per gigabyte of weights: a generous model, as time limits need it. With 15 GB of weights,
# drawing 1,000 images takes about 1,000 s if prompts are not batched.
SECONDS = {"draw": 0.07, "judge": 0.02, "train": 0.02}
# Operations a second that a GPU is taken to do where a family's drawing is bound by them: a quarter of an A100's peak in
# float32, and a sixth in bfloat16.
FLOPS = {"float32": 5e12, "bfloat16": 5e13}
# Seconds of an external judge for an image, at least. Detectors, whose images are large, and BLIP-VQA, which asks about each
# noun, do more work than the size of their weights says.
JUDGE_SECONDS = 0.25
MEASURED = {"generation": ("draw", "engine"), "scoring": ("judge", "engine"), "training": ("train", "trl")}
SPEEDS = Path(__file__).resolve().parents[2] / "speed" / "results"
IMAGE_BYTES = 250_000  # assumed where nothing is known: a PNG of 384 x 384 pixels, which are 442,368 bytes uncompressed
ROW_BYTES = 2_000  # assumed: a candidate's row with 576 codes, and the rows of its scores and verdicts
KEPT_SAVES = 2  # of each training (stages/training/trainer.py)


# What the time limits of jobs need as well


def gigabytes(config: Config) -> float:
    """Return the size of the model's weights. Raises UserError where the checkpoint is not one of its family."""
    files = describe(config.model.family).files(Path(config.model.checkpoint), "draw")
    return sum(path.stat().st_size for path in files) / 1e9


def limit(config: Config, work: str) -> tuple[float, str]:
    """Return the seconds of one GPU for an image of this work, as time limits take them, and what they follow from."""
    size, draws = gigabytes(config), describe(config.model.family).drawing_flops
    found = SECONDS[work] * size, f"estimate, {SECONDS[work]:g} s an image and GB, {size:.3g} GB of weights"
    if work != "draw" or draws is None:
        return found
    flops, rate = draws(Path(config.model.checkpoint), config.sampling()), FLOPS.get(config.model.dtype, FLOPS["bfloat16"])
    bound = flops / rate, f"estimate, {flops / 1e12:.3g} TFLOP an image at {rate / 1e12:g} TFLOP/s"
    return max(found, bound)


def judge_limit(size: float) -> float:
    """Return the seconds of one GPU in which an external judge with that many gigabytes of weights judges an image, at most."""
    return max(SECONDS["judge"] * size, JUDGE_SECONDS)


def chosen_prompts(config: Config, name: str) -> PromptSource:
    """Return the settings of a set of prompts: train, or a benchmark."""
    return config.prompts if name == "train" else config.benchmarks[name].prompts


def prompt_limit(chosen: PromptSource) -> int:
    """Return an upper bound on the number of prompts of a set, without reading them as a suite does."""
    files = open_suite(chosen.source).files(chosen)
    return chosen.count or sum(rows_in(Path(path)) for path in files) or 10_000


def rows_in(path: Path) -> int:
    """Return the rows of a Parquet file, whose bytes may hold images, or the lines of any other file."""
    if path.suffix != ".parquet":
        return path.read_bytes().count(b"\n") + 1
    try:
        return pq.read_metadata(path).num_rows
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable Parquet file ({reason}); fetch it again") from None


def rows_per_prompt(config: Config, arm: str) -> int:
    """Return the most training rows that an arm takes for one prompt: for DPO one pair, for SFT its accepted candidates."""
    if config.arms[arm].objective == "dpo":
        return 1
    drawn = config.arms[arm].candidates or config.generate.candidates
    return min(drawn, config.arm_pairs(arm).chosen_per_prompt or drawn)


def images_per_row(config: Config, arm: str) -> int:
    """Return how many images one training row has: for DPO a chosen and a rejected one."""
    return 2 if config.arms[arm].objective == "dpo" else 1


# What a run consists of


@dataclass(frozen=True)
class Work:
    """Images that one model draws or judges, or that it is trained on.

    kind: draw; judge (the model's own verdicts); external; understand (questions); reference (log-probabilities); or train,
    where an image counts once in each epoch. node: the folder in the results. name: the set of prompts, or the understanding
    benchmark. judge: the external judge. bound: whether count is an upper bound.
    """

    kind: str
    node: str
    name: str
    count: int
    judge: str | None = None
    bound: bool = False


@dataclass(frozen=True)
class Training:
    """One training segment: rows of an epoch, and optimizer steps of the segment's epochs. Both are upper bounds."""

    node: str
    rows: int
    epochs: int
    steps: int


def prompts_of(config: Config) -> dict[str, list[Row]]:
    """Return the prompts of every set, as the workflow will take them. Raises UserError on files that cannot be read."""
    from stages.prompts import collect  # the stage's own function, so that the numbers cannot differ

    seeds = ({"train": config.seed} if config.arms else {}) | dict.fromkeys(config.benchmarks, 0)
    return {name: collect(chosen_prompts(config, name), seed)[0] for name, seed in seeds.items()}


def evaluated(config: Config) -> list[str]:
    """Return the models that draw and judge the benchmarks, base first."""
    within = arms.nodes(config) if config.evaluate.every_checkpoint else config.arms
    return list(dict.fromkeys([*config.untrained(), *config.arms, *within]))


def needs_scores(config: Config) -> bool:
    """Return whether the model judges its own training candidates: only arms that others select for can do without."""
    selections = [config.arm_pairs(arm) for arm in config.arms]
    anchored = any(config.arm_train(arm).judge_anchor_weight for arm in config.arms)
    return bool(config.benchmarks) or anchored or any(chosen.oracle is None or chosen.matched for chosen in selections)


def candidate_works(config: Config, prompts: int) -> list[Work]:
    """Return what is done with the training candidates and with the pools that are drawn again."""
    works = [Work("draw", "base", "train", prompts * config.generate.candidates)]
    works += [Work("judge", "base", "train", works[0].count)] if needs_scores(config) else []
    oracles = dict.fromkeys(config.arm_pairs(arm).oracle for arm in config.arms)
    works += [Work("external", "base", "train", works[0].count, judge) for judge in oracles if judge]
    for replay in arms.replays(config).values():
        if replay.draws:
            arm = replay.node.arm
            count = prompts * (config.arms[arm].candidates or config.generate.candidates)
            judge = config.arm_pairs(arm).oracle
            works.append(Work("draw", replay.name, "replay", count, bound=True))
            works.append(Work("external" if judge else "judge", replay.name, "replay", count, judge, bound=True))
    return works


def benchmark_works(config: Config, name: str, prompts: list[Row]) -> list[Work]:
    """Return what every model draws and judges on a benchmark, and what external judges see of it.

    A judge whose verdicts are computed from another one's answers sees nothing.
    """
    count, by_category = config.benchmarks[name].images_per_prompt, Counter(row["category"] for row in prompts)
    images, works = count * len(prompts), []
    audit = not config.arms
    further = config.audit.judges if audit else []
    for node in config.to_audit() if audit else evaluated(config):
        works += [Work("draw", node, name, images), Work("judge", node, name, images)]
        works += [Work("judge", node, f"{name} of base", images)] if node != "base" and not audit else []
        for judge in dict.fromkeys([*config.benchmark_judges(name), *further]):
            if not rescoring.source_of(config, judge):
                seen = rescoring.seen(config, name, judge)
                scored = images if seen is None else count * sum(by_category[category] for category in seen)
                works.append(Work("external", node, name, scored, judge))
    return works


def reference_works(config: Config, prompts: int) -> list[Work]:
    """Return the log-probabilities under the base model that DPO needs: two for each pair, and for each replay."""
    owners: dict[str, str] = {}  # the folder of the pairs, and an arm that trains on them
    for node in arms.nodes(config).values():
        if config.arms[node.arm].objective == "dpo":
            owners |= {name: node.arm for name in (arms.selection_owner(config, node.arm), *node.replays)}
    likelihood = describe(config.model.family).likelihood
    epochs = {arm: arms.reference_epochs(config, arm, likelihood) for arm in owners.values()}
    return [Work("reference", owner, "train", 2 * prompts * epochs[arm], bound=True) for owner, arm in owners.items()]


def trainings(config: Config, prompts: int) -> list[Training]:
    """Return the training segments. Arms share those that they have in common."""
    tree, found = arms.nodes(config), []
    for node in tree.values():
        epochs = node.epoch - (tree[node.parent].epoch if node.parent else 0)
        rows = prompts * rows_per_prompt(config, node.arm)
        found.append(Training(node.name, rows, epochs, epochs * -(-rows // config.arm_train(node.arm).batch_size)))
    return found


def works_of(config: Config, prompts: dict[str, list[Row]]) -> list[Work]:
    """Return everything that models do in a run, or in an audit if there are no arms."""
    measured = [work for name in config.benchmarks for work in benchmark_works(config, name, prompts[name])]
    if not config.arms:
        return measured
    training_prompts = len(prompts["train"])
    works = candidate_works(config, training_prompts) + measured
    for name, chosen in config.understanding.items():
        questions = understanding_kind(chosen.kind).size(chosen)
        works += [Work("understand", node, name, questions) for node in [*config.untrained(), *config.arms]]
    works += reference_works(config, training_prompts)
    tree = arms.nodes(config)
    for training in trainings(config, training_prompts):
        count = training.rows * training.epochs * images_per_row(config, tree[training.node].arm)
        works.append(Work("train", training.node, "train", count, bound=True))
    return works


# Time


@dataclass(frozen=True)
class Speed:
    """Seconds of one GPU (or of the machine, on a CPU) for one image, and where the number comes from."""

    seconds: float
    source: str


def measured(config: Config, device: str | None) -> dict[str, Speed]:
    """Return the speeds that speed/results has for this model, by the checkpoint folder's name, on the device."""
    found: dict[str, Speed] = {}
    for path in sorted(SPEEDS.glob("*.json")) if device else []:
        facts = json.loads(path.read_text())
        if facts.get("benchmark") not in MEASURED or facts["config"] != Path(config.model.checkpoint).name.lower():
            continue
        work, way = MEASURED[facts["benchmark"]]
        if str(device).lower() in facts["device"].lower():
            for result in facts["results"]:
                if result["name"] == way:
                    source = f"measured, {path.relative_to(SPEEDS.parents[1])} ({facts['device']})"
                    found[work] = Speed(result["seconds_per_1000_images"] / 1000, source)
    return found


def speeds(config: Config, device: str | None) -> dict[str, Speed]:
    """Return the speed of drawing, judging and training: what was measured, or else the model behind the time limits."""
    limits = {work: Speed(*limit(config, work)) for work in SECONDS}
    return limits | measured(config, device)


STAGES = {
    "drawing": ("draw", "draw"),
    "self-judgement": ("judge", "judge"),
    "understanding": ("understand", "judge"),
    "external judges on GPUs": ("external", "judge"),
    "reference": ("reference", "judge"),
    "training": ("train", "train"),
}  # the kind of work, and the speed that is taken for it


def models_of(config: Config) -> dict[str, Config]:
    """Return the models of different speed with the configuration of each: the trained one, or those that are audited."""
    return {"": config} if config.arms else {name: config.audited(name) for name in config.audit.models}


def hours(config: Config, works: Iterable[Work], speed: dict[str, Speed]) -> dict[str, tuple[float, Speed]]:
    """Return GPU hours by stage with the speed behind them. Judges of other weights are taken to be as fast as the model."""

    def on_gpu(work: Work) -> bool:
        if work.judge is None:
            return True
        chosen = config.judge(work.judge)
        runs_on = judge_kind(chosen.kind).runs_on
        return runs_on is not None and runs_on(chosen).device != "cpu"

    found = {}
    for stage, (kind, pace) in STAGES.items():
        count = sum(work.count for work in works if work.kind == kind and on_gpu(work))
        if count:
            found[stage] = (count * speed[pace].seconds / 3600, speed[pace])
    return found


# Disk


@dataclass(frozen=True)
class ImageSize:
    """Bytes of an image in its tar file and of its rows in the manifests, and where the numbers come from."""

    image: float
    rows: float
    source: str


def image_size(folder: Path, stated: int | None) -> ImageSize:
    """Return the size of an image: stated, or measured on the images that a run's folder already has, or assumed."""
    if stated:
        return ImageSize(stated, ROW_BYTES, "stated with --image-bytes; rows assumed")
    for manifest in sorted(folder.glob("*/candidates/*/*.parquet")):
        count = pq.read_metadata(manifest).num_rows
        tar = manifest.with_suffix(".tar")
        if count and tar.is_file():
            sizes = (tar.stat().st_size / count, manifest.stat().st_size / count)
            return ImageSize(*sizes, f"measured, {count} images of {manifest}")
    return ImageSize(IMAGE_BYTES, ROW_BYTES, "assumed, for PNGs of 384 x 384 pixels; --image-bytes states another number")


def tensor_numbers(files: Iterable[Path]) -> int:
    """Return how many numbers safetensors files hold, from their headers. Other files count as none."""
    total = 0
    for path in files:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    size = 1
                    for length in tensor["shape"]:
                        size *= length
                    total += size
    return total


def disk(config: Config, works: Iterable[Work], size: ImageSize) -> dict[str, float]:
    """Return bytes on disk by kind of file.

    A checkpoint has the base model's size, or four bytes a number where one process trains. A save has the weights and AdamW's
    state, at most twelve bytes a number; LoRA's saves are small and not counted.
    """
    images = sum(work.count for work in works if work.kind == "draw")
    written = {"images": images * size.image, "manifests": images * size.rows}
    if not config.arms:
        return written
    files = describe(config.model.family).files(Path(config.model.checkpoint), "train")
    weights, numbers = sum(path.stat().st_size for path in files), tensor_numbers(files)
    checkpoints = saves = 0
    for node in arms.nodes(config).values():
        settings = config.arm_train(node.arm)
        checkpoints += weights if settings.deepspeed else max(weights, 4 * numbers)
        saves += 0 if settings.lora_rank else KEPT_SAVES * (weights + 12 * numbers)
    return written | {"checkpoints": checkpoints, "saves": saves}


# GPU memory


def training_bytes(settings: Train, weight: int) -> float:
    """Return the bytes of one GPU for each trained number: the weight, its gradient, and AdamW's weight and moments in float32.

    weight: bytes of a weight in the forward pass. Without DeepSpeed, a trained weight is float32 and is AdamW's own. ZeRO
    divides the optimizer's state among the processes, from stage 2 on also the gradients, and at stage 3 the weights
    (arXiv 1910.02054, section 3). With LoRA, the adapters' own state is small and not counted.
    """
    if settings.lora_rank:
        return weight
    if not settings.deepspeed:
        return 16
    processes = settings.gpus * settings.nodes
    optimizer = 0 if settings.offload else 12
    if settings.zero_stage == 0:
        return 2 * weight + optimizer
    if settings.zero_stage == 3:
        return ((0 if settings.offload else weight) + weight + optimizer) / processes
    return weight + (weight + optimizer) / processes


def gpu_memory(config: Config) -> dict[str, float]:
    """Return the bytes of one GPU that weights, gradients and AdamW's state take, by work: drawing and judging, and each arm.

    A training is counted as if every weight were trained. The language model has most of them.
    """
    numbers = tensor_numbers(describe(config.model.family).files(Path(config.model.checkpoint), "draw"))
    weight = 4 if config.model.dtype == "float32" else 2
    found = {"drawing, judging, reference": float(weight * numbers)}
    for arm in config.arms:
        settings = config.arm_train(arm)
        precision = config.model.dtype if settings.precision == "auto" else settings.precision
        found[f"training, {arm}"] = training_bytes(settings, 4 if precision == "float32" else 2) * numbers
    return found


# The report


def number(count: float, bound: bool = False) -> str:
    return f"{'<= ' if bound else ''}{count:,.0f}"


def readable(size: float) -> str:
    """Return a number of bytes with a decimal prefix."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def columns(rows: list[list[str]]) -> str:
    """Return rows as text, the first column on the left and numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True))]
        lines.append("  " + "  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)


def counted(works: Iterable[Work], kinds: tuple[str, ...], label: Any) -> list[list[str]]:
    """Return a line for each label of the works of these kinds: the total, and over how many models."""
    totals: dict[str, list[Work]] = {}
    for work in works:
        if work.kind in kinds:
            totals.setdefault(label(work), []).append(work)
    lines = []
    for name, parts in totals.items():
        models = len({work.node for work in parts})
        total = number(sum(work.count for work in parts), any(work.bound for work in parts))
        lines.append([name, total, f"{models} models" if models > 1 else parts[0].node])
    return lines


def endpoint_of(config: Config, work: Work) -> str | None:
    """Return the address that is called for each image: kinds of judges that call one have the setting `endpoint`."""
    return getattr(config.judge(work.judge or ""), "endpoint", None)


def judge_label(config: Config, work: Work) -> str:
    """Return an external judge's name with its kind or endpoint."""
    kind = config.judge(work.judge or "").kind
    return f"{work.judge}, {endpoint_of(config, work) or f'kind {kind}'}"


def report(config: Config, device: str | None = None, image_bytes: int | None = None, folder: Path | None = None) -> str:
    """Return the whole report. folder: the run's results, whose images are measured if there are any."""
    prompts = prompts_of(config)
    works = works_of(config, prompts)
    bounds = "Upper bounds (<=) take every prompt as selected, and as waiting for replay." if config.arms else "An audit."
    parts = [f"Run {config.run} from its beginning. {bounds}"]

    def section(title: str, rows: list[list[str]]) -> None:
        if rows:
            parts.append(f"\n{title}\n{columns(rows)}")

    section("Prompts", [[name, number(len(rows)), ""] for name, rows in prompts.items()])
    section("Images to draw", counted(works, ("draw",), lambda work: work.name))
    section("Self-judgements", counted(works, ("judge",), lambda work: work.name))
    section("Questions of understanding benchmarks (about)", counted(works, ("understand",), lambda work: work.name))
    for title, called in (("External judgements", False), ("Calls of endpoints, which may cost money", True)):
        chosen = [work for work in works if work.kind == "external" and bool(endpoint_of(config, work)) is called]
        section(title, counted(chosen, ("external",), lambda work: judge_label(config, work)))
    if config.arms:
        segments = [
            [training.node, number(training.rows, True), str(training.epochs), number(training.steps, True), ""]
            for training in trainings(config, len(prompts["train"]))
        ]
        section("Training, by checkpoint (upper bounds before selection)", [["", "rows", "epochs", "steps", ""], *segments])
    lines: list[list[str]] = []
    total = 0.0
    for model, own in models_of(config).items():
        did = [work for work in works if config.arms or work.node == model]
        try:
            pace = speeds(own, device)
        except UserError as error:  # which names the section of a model that is trained
            place = "model" if config.arms else f"audit.models.{model}"
            raise UserError(str(error).replace("model.checkpoint", f"{place}.checkpoint")) from None
        for stage, (time, speed) in hours(own, did, pace).items():
            lines.append([stage if config.arms else f"{model}, {stage}", f"{time:,.3g}", speed.source])
            total += time
    section(
        "Hours of one GPU, or of the CPU where there is none (estimates, of upper bounds where counts are)",
        [*lines, ["together", f"{total:,.3g}", ""]],
    )
    if config.arms and config.model.device != "cpu":
        memory = gpu_memory(config)
        section(
            "Memory of each GPU (computed; activations and caches come on top)",
            [[name, readable(value), ""] for name, value in memory.items()],
        )
    size = image_size(folder or Path("results") / config.run, image_bytes)
    sizes = disk(config, works, size)
    sources = {
        "images": f"{size.image:,.0f} bytes each: {size.source}",
        "manifests": f"{size.rows:,.0f} bytes an image",
        "checkpoints": f"{len(arms.nodes(config))}, from the size of {config.model.checkpoint}",
        "saves": f"the last {KEPT_SAVES} of each training with AdamW's state; deleting <run>/*/work costs only time",
    }
    lines = [[name, readable(value), sources[name]] for name, value in sizes.items()]
    section("Disk (estimates)", [*lines, ["together", readable(sum(sizes.values())), ""]])
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--configfile", type=Path, nargs="+", default=[Path("config.yaml")], help="as for snakemake; default: config.yaml"
    )
    parser.add_argument("--device", help="part of the name of the GPU or CPU that the jobs will have, as in speed/results")
    parser.add_argument("--image-bytes", type=int, help="bytes of one image on disk")
    arguments = parser.parse_args()
    config = load(*arguments.configfile)
    if not config.arms and not config.audit.models:
        raise UserError(f"{arguments.configfile[-1]}: arms is empty, so there is nothing to run; give the preset as well")
    print(report(config, arguments.device, arguments.image_bytes))


if __name__ == "__main__":
    run_stage(main)
