"""The memory, time and GPUs that jobs with a model request from a cluster.

These are limits, not predictions. A job that exceeds one is submitted again with a higher limit and continues where it stopped.
The profile's set-resources can override them. What work takes how long is in stages/tools/cost.py.
"""

from functools import cache

from stages.tools.gpus import gpu_is_here


def gpus_of(model):
    """Return how many GPUs a model needs, where it runs by these settings: one for each process that shares a shard."""
    return 0 if model.device == "cpu" else model.workers or 1


def gpus_of_judge(name):
    chosen = settings.judge(name)
    return gpus_of(judge_kind(chosen.kind).runs_on(chosen))


GPUS = gpus_of(settings.model)
# On a machine of its own, one job with GPUs runs at a time, and uses what it sees. Snakemake would otherwise start as many of them
# as it has cores, all on the first GPU. `--resources gpu=N` states another limit.
ONE_GPU_JOB = (
    workflow.local_exec
    and workflow.is_main_process
    and any([GPUS, *map(gpus_of_judge, GPU_JUDGES)])
    and "gpu" not in workflow.global_resources
    and gpu_is_here()
)
if ONE_GPU_JOB:
    workflow.register_resource("gpu", 1)


def gpus_asked(count):
    """Return how many GPUs a job asks the scheduler for."""
    return min(count, 1) if ONE_GPU_JOB else count


@cache
def prompt_count(name):
    return cost.prompt_limit(chosen_prompts(name))


@cache
def gigabytes(node):
    return cost.gigabytes(settings_of(node))


@cache
def seconds(node, work):
    return cost.limit(settings_of(node), work)[0]


def megabytes(copies):
    """Return the memory of a node, in MB, for that many copies of the weights and for Python with its libraries."""
    return lambda wildcards, attempt: attempt * int(4000 + 1000 * copies * gigabytes(wildcards.get("node", "base")))


def minutes_for(work, count, gpus=lambda wildcards: 1):
    """Return the minutes for `count` images or rows on `gpus` GPUs, both functions of the wildcards, plus 30 for start-up."""
    return lambda wildcards, attempt: attempt * int(
        30 + seconds(wildcards.get("node", "base"), work) * count(wildcards) / gpus(wildcards) / 60
    )


def shard_images(wildcards):
    """Return the number of images in a shard."""
    name = "train" if wildcards.set == "replay" else wildcards.set
    return prompt_count(name) * images_per_prompt(wildcards) / settings.shards(name)


def understanding_questions(wildcards):
    chosen = settings.understanding[wildcards.understanding]
    return understanding_kind(chosen.kind).size(chosen)


def reference_images(wildcards):
    """Return a bound on the log-probabilities of the reference: two for each prompt and epoch, or one for each candidate."""
    return prompt_count("train") * max(2 * reference_epochs(wildcards), settings.generate.candidates)


def training_nodes(wildcards):
    return settings.arm_train(NODES[wildcards.node].arm).nodes


def training_processes(wildcards):
    return settings.arm_train(NODES[wildcards.node].arm).gpus * training_nodes(wildcards)


def gpus_of_each_node(wildcards):
    """Return what a training on several nodes asks of each of them; empty for one node."""
    gpus = settings.arm_train(NODES[wildcards.node].arm).gpus
    return f"gpu:{gpus}" if GPUS and training_nodes(wildcards) > 1 else ""


def trained_images(wildcards):
    node = NODES[wildcards.node]
    per_prompt = cost.rows_per_prompt(settings, node.arm) * cost.images_per_row(settings, node.arm)
    return prompt_count("train") * per_prompt * node.epoch
