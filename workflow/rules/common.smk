"""The configuration, and where the things of a run lie.

results/<run>/prompts/<set>.parquet
results/<run>/<node>/candidates/<set>/<shard>.parquet and .tar     node: base, or a trained checkpoint
results/<run>/<node>/scores/<set>/<shard>.parquet                  the node's own verdicts
results/<run>/<node>/verdicts/<set>/<shard>.parquet                the external judge's
results/<run>/<arm>/pairs.parquet, discard.parquet                 arms that select alike share the first one's
results/<run>/<node>/schedule.parquet, checkpoint/, training.parquet, replay/, metrics.parquet
"""

import json
import os
import shutil
import socket
import subprocess
from functools import cache
from pathlib import Path

from snakemake.exceptions import WorkflowError

from stages.common import arms as arm_tree
from stages.common.fingerprints import code
from stages.common.config import validate
from stages.common.runtime import UserError, process_lives, whole_file
from stages.families.tools.checkpoints import require_model_type
from stages.tools.status import report as status_report

try:
    settings = validate(dict(config), ", ".join(str(path) for path in workflow.configfiles))
    require_model_type(Path(settings.model.checkpoint), settings.model.family)
    NODES = arm_tree.nodes(settings)
except UserError as error:
    raise WorkflowError(str(error))

RUN = f"results/{settings.run}"
CONFIG = f"{RUN}/run_config.yaml"
SHARDS = [f"{number:04d}" for number in range(settings.generate.shards)]
FAMILY = f"stages.families.{settings.model.family}.family"
# What a model's answers depend on besides its weights; where it runs and how many at once are not part of it.
MODEL = {"family": settings.model.family, "dtype": settings.model.dtype}


# SIGTERM goes to every process of a cluster's job; tee must outlive the stage, or its last words are not in the log.
shell.prefix("set -euo pipefail; tee() {{ trap '' TERM; exec tee \"$@\"; }}; ")


wildcard_constraints:
    arm="|".join(settings.arms) or "none",
    node="|".join(["base", *NODES]),
    set="train|evaluation|replay|base-evaluation",
    shard=r"\d{4}",


# Models


def checkpoint_files(node):
    """The files whose change makes it another model."""
    if node != "base":
        return [f"{RUN}/{node}/checkpoint/model.safetensors"]
    folder = Path(settings.model.checkpoint)
    return sorted(str(path) for path in [folder / "config.json", *folder.glob("*.safetensors")])


def parent_checkpoint(wildcards):
    parent = NODES[wildcards.node].parent
    return checkpoint_files(parent) if parent else []


# Prompts and candidates


def prompt_files(wildcards):
    chosen = getattr(settings.prompts, wildcards.set)
    return [*chosen.files, *chosen.exclude]


def prompt_manifest(wildcards):
    if wildcards.set == "replay":
        return f"{RUN}/{wildcards.node}/replay/pool.parquet"
    return f"{RUN}/prompts/{wildcards.set.removeprefix('base-')}.parquet"


def images_per_prompt(wildcards):
    if wildcards.set == "evaluation":
        return settings.evaluate.images_per_prompt
    if wildcards.set == "replay":
        return settings.arms[NODES[wildcards.node].arm].candidates or settings.generate.candidates
    return settings.generate.candidates


def shard_files(node, kind, images):
    """All shards' manifests of one kind: candidates, scores or verdicts."""
    return expand(f"{RUN}/{node}/{kind}/{images}/{{shard}}.parquet", shard=SHARDS)


def candidate_manifest(wildcards):
    """Set base-evaluation is the base model's evaluation images."""
    if wildcards.set == "base-evaluation":
        return f"{RUN}/base/candidates/evaluation/{wildcards.shard}.parquet"
    return f"{RUN}/{wildcards.node}/candidates/{wildcards.set}/{wildcards.shard}.parquet"


def image_shard(wildcards):
    return str(Path(candidate_manifest(wildcards)).with_suffix(".tar"))


# Selection


def judgements(arm):
    """Whose verdicts select an arm's data: the model's own, but for the control that lets the truth select."""
    return "verdicts" if settings.arm_pairs(arm).filter == "oracle" else "scores"


def selection(arm):
    """Exactly the settings that an arm's selection reads."""
    chosen = settings.arms[arm]
    return {
        "objective": chosen.objective,
        "candidates": chosen.candidates,
        "pairs": settings.arm_pairs(arm).model_dump(),
        "seed": settings.seed,
    }


def selected(arm):
    """The folder that holds an arm's selection."""
    return f"{RUN}/{arm_tree.selection_owner(settings, arm)}"


# Replay


def pool_before(wildcards):
    """The discard manifest at the time of a node's replay: its last replay's, or the selection's."""
    node = NODES[wildcards.node]
    return f"{RUN}/{node.replays[-1]}/replay/waiting.parquet" if node.replays else f"{selected(node.arm)}/discard.parquet"


def replay_scores(wildcards):
    return shard_files(wildcards.node, judgements(NODES[wildcards.node].arm), "replay")


def replay_nodes():
    """Every node whose replay fed an arm."""
    return list(dict.fromkeys(replay for arm in settings.arms for replay in NODES[arm].replays))


def waiting_pools():
    return [f"{RUN}/{replay}/replay/waiting.parquet" for replay in replay_nodes()]


# Training


def training(node):
    """Exactly the settings that a node's training reads."""
    arm = NODES[node].arm
    return {"objective": settings.arms[arm].objective, "seed": settings.seed, **settings.arm_train(arm).outcome()}


def pairs_name(node):
    """DPO trains on the pairs with reference log-probabilities."""
    return "reference.parquet" if settings.arms[NODES[node].arm].objective == "dpo" else "pairs.parquet"


def first_pairs(wildcards):
    return f"{selected(NODES[wildcards.node].arm)}/{pairs_name(wildcards.node)}"


def replayed_pairs(wildcards):
    return [f"{RUN}/{replay}/replay/{pairs_name(wildcards.node)}" for replay in NODES[wildcards.node].replays]


def replay_arguments(wildcards):
    epochs = [NODES[replay].epoch for replay in NODES[wildcards.node].replays]
    return [f"--replayed {epoch} {path}" for epoch, path in zip(epochs, replayed_pairs(wildcards))]


def training_candidates(wildcards):
    replayed = [path for replay in NODES[wildcards.node].replays for path in shard_files(replay, "candidates", "replay")]
    return shard_files("base", "candidates", "train") + replayed


def anchor_scores(wildcards):
    """The base model's own judgement of its own candidates, for arms that hold on to it."""
    anchored = settings.arm_train(NODES[wildcards.node].arm).judge_anchor_weight
    return shard_files("base", "scores", "train") if anchored else []


def reference_candidates(wildcards):
    """Wildcard owner: an arm, or <node>/replay."""
    owner = Path(wildcards.owner)
    replayed = owner.name == "replay"
    return shard_files(str(owner.parent), "candidates", "replay") if replayed else shard_files("base", "candidates", "train")


def continued(wildcards):
    parent = NODES[wildcards.node].parent
    return f"--continue {RUN}/{parent}/work" if parent else ""


# What a model's job asks of a cluster: limits, not predictions. A job that runs into one is submitted again with more and
# goes on where it was; the profile's set-resources may name others.

GIGABYTES = sum(Path(path).stat().st_size for path in checkpoint_files("base")) / 1e9
GPUS = 0 if settings.model.device == "cpu" else settings.model.workers or 1
# On one GPU, for each gigabyte of weights. Drawing 1,000 images with 15 GB takes about 1,000 s without batching over prompts.
SECONDS = {"draw": 0.07, "judge": 0.02, "train": 0.02}


@cache
def prompt_count(name):
    """An upper bound, known before the prompts are."""
    chosen = getattr(settings.prompts, name)
    return chosen.count or sum(Path(path).read_bytes().count(b"\n") + 1 for path in chosen.files) or 10_000


def megabytes(copies):
    """Memory of the node for so many copies of the weights, beside Python and its libraries."""
    return lambda wildcards, attempt: attempt * int(4000 + 1000 * copies * GIGABYTES)


def minutes(work, count, gpus=lambda wildcards: 1):
    """Time for `count` images or rows on `gpus`, functions of the wildcards, beside half an hour for start and loading."""
    return lambda wildcards, attempt: attempt * int(30 + SECONDS[work] * GIGABYTES * count(wildcards) / gpus(wildcards) / 60)


def shard_images(wildcards):
    """Images in a shard."""
    evaluated = wildcards.set.endswith("evaluation")
    images = settings.evaluate.images_per_prompt if evaluated else settings.generate.candidates
    return prompt_count("evaluation" if evaluated else "train") * images / len(SHARDS)


def selected_images(wildcards):
    return prompt_count("train") * settings.generate.candidates


def training_nodes(wildcards):
    return settings.arm_train(NODES[wildcards.node].arm).nodes


def training_processes(wildcards):
    return settings.arm_train(NODES[wildcards.node].arm).gpus * training_nodes(wildcards)


def trained_rows(wildcards):
    node = NODES[wildcards.node]
    kept = settings.arm_pairs(node.arm).chosen_per_prompt or settings.generate.candidates
    return prompt_count("train") * kept * node.epoch


# Evaluation and report


def scores_of_base(wildcards):
    return shard_files(wildcards.node, "scores", "evaluation" if wildcards.node == "base" else "base-evaluation")


def shown_pairs():
    """The selection of the first arm of each objective."""
    first = {arm.objective: name for name, arm in reversed(settings.arms.items())}
    return [f"{selected(name)}/pairs.parquet" for name in first.values()]


def show_summary():
    log = Path(f"{RUN}/logs/summary.log")
    if log.exists():
        print(log.read_text())


def show_status():
    if Path(CONFIG).exists():
        print(status_report(Path(RUN).resolve()))


# What is done before and after the jobs


# kill -9 leaves Snakemake's lock behind. Its owner is written down, so that the next call can tell that it is gone.
OWNER = Path(".snakemake/selfgap-owner.json")


def release_stale_lock():
    """Remove the lock of an owner that ran on this machine and is no more; any other lock is left to `--unlock`."""
    locks = list(Path(".snakemake/locks").glob("*.lock"))
    if not locks or not OWNER.exists():
        return
    owner = json.loads(OWNER.read_text())
    if owner["host"] == socket.gethostname() and not process_lives(owner["process"]):
        for lock in locks:
            lock.unlink(missing_ok=True)


def cancel_orphans():
    """Jobs that a killed Snakemake left in SLURM's queue: their successors go on from the batches that they kept.

    They are known by their log in this folder's .snakemake, whose lock says that no other Snakemake runs here.
    """
    if not shutil.which("squeue"):
        return
    query = ["squeue", "--me", "--noheader", "--Format=JobArrayID:32,STDOUT:4096"]
    queue = subprocess.run(query, capture_output=True, text=True).stdout
    logs = str(Path(".snakemake/slurm_logs").resolve()) + "/"
    left = [job for job, _, log in (line.partition(" ") for line in queue.splitlines()) if log.strip().startswith(logs)]
    if left:
        logger.warning(f"Cancelling SLURM jobs of a former run in this folder: {', '.join(left)}")
        subprocess.run(["scancel", *left])


def write_owner():
    OWNER.parent.mkdir(exist_ok=True)
    OWNER.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))


def write_run_config():
    """The merged configuration beside its results, written where it changed."""
    import yaml

    text = yaml.safe_dump(settings.model_dump(), sort_keys=False)
    path = Path(CONFIG)
    if path.exists() and path.read_text() == text:
        return
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be written ({error.strerror}); check permissions and free space of results/")


release_stale_lock()
