"""The memory, time and GPUs that jobs with a model request from a cluster.

These are limits, not predictions. A job that exceeds one is submitted again with a higher limit and continues where it stopped.
The profile's set-resources can override them.
"""

from functools import cache

GIGABYTES = sum(path.stat().st_size for path in FAMILY.files(Path(settings.model.checkpoint), "draw")) / 1e9
GPUS = 0 if settings.model.device == "cpu" else settings.model.workers or 1
# Seconds on one GPU per image and per gigabyte of weights. With 15 GB of weights, drawing 1,000 images takes about 1,000 s if
# prompts are not batched.
SECONDS = {"draw": 0.07, "judge": 0.02, "train": 0.02}


@cache
def prompt_count(name):
    """Return an upper bound on the number of prompts of a set, which is needed before the prompts have been read."""
    from stages.suites import open_suite

    chosen = chosen_prompts(name)
    files = open_suite(chosen.source).files(chosen)
    return chosen.count or sum(Path(path).read_bytes().count(b"\n") + 1 for path in files) or 10_000


def megabytes(copies):
    """Return the memory of a node, in MB, for that many copies of the weights and for Python with its libraries."""
    return lambda wildcards, attempt: attempt * int(4000 + 1000 * copies * GIGABYTES)


def minutes_for(work, count, gpus=lambda wildcards: 1):
    """Return the minutes for `count` images or rows on `gpus` GPUs, both functions of the wildcards, plus 30 for start-up."""
    return lambda wildcards, attempt: attempt * int(30 + SECONDS[work] * GIGABYTES * count(wildcards) / gpus(wildcards) / 60)


def shard_images(wildcards):
    """Return the number of images in a shard."""
    name = "train" if wildcards.set == "replay" else wildcards.set
    return prompt_count(name) * images_per_prompt(wildcards) / len(SHARDS)


def understanding_questions(wildcards):
    chosen = settings.understanding[wildcards.understanding]
    return understanding_kind(chosen.kind).size(chosen)


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
