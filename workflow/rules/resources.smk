"""The memory, time and GPUs that jobs with a model request from a cluster.

These are limits, not predictions. A job that exceeds one is submitted again with a higher limit and continues where it stopped.
The profile's set-resources can override them. What work takes how long is in stages/tools/cost.py.
"""

from functools import cache
from math import ceil


def processes_of(model):
    """Return how many processes share a shard, each with the weights of a model of its own."""
    return model.workers or 1


def gpus_of(model):
    """Return how many GPUs a model needs, where it runs by these settings: one for each process."""
    return 0 if model.device == "cpu" else processes_of(model)


def model_of_judge(name):
    """Return where a judge that is a model runs."""
    chosen = settings.judge(name)
    return judge_kind(chosen.kind).runs_on(chosen)


def gpus_of_judge(wildcards):
    return gpus_of(model_of_judge(wildcards.judge))


GPUS = gpus_of(settings.model)
one_gpu_job = False  # whether this machine runs one job with GPUs at a time; decided when a run starts (session.smk)


def gpus_asked(count):
    """Return how many GPUs a job asks the scheduler for: `count`, or one where this machine runs one such job at a time.

    count: a function of the wildcards. The result is one too, because the executor is only known when the run starts.
    """
    return lambda wildcards: min(count(wildcards), 1) if one_gpu_job else count(wildcards)


def gpus_of_model(wildcards):
    return GPUS


def gpu_of_model(wildcards):
    """Return 1 if the model runs on a GPU, for jobs that use one, whatever model.workers says."""
    return min(GPUS, 1)


@cache
def prompt_count(name):
    return cost.prompt_limit(chosen_prompts(name))


@cache
def gigabytes(node):
    return cost.gigabytes(settings_of(node))


def node_gigabytes(wildcards):
    return gigabytes(wildcards.get("node", "base"))


@cache
def seconds(node, work):
    return cost.limit(settings_of(node), work)[0]


def megabytes(copies):
    """Return the memory of a job, in MB, for that many copies of the weights and for Python with its libraries."""
    return lambda wildcards, attempt: attempt * int(4000 + 1000 * copies * node_gigabytes(wildcards))


def megabytes_of(processes, size, attempt):
    """Return the memory of a job in which each process loads weights of `size` gigabytes, in MB. One of them may hold two copies."""
    return attempt * int(4000 * processes + 1000 * (processes + 1) * size)


def megabytes_of_model(wildcards, attempt):
    """Return the memory of a job whose processes draw or judge with a node's model, in MB."""
    return megabytes_of(processes_of(settings.model), node_gigabytes(wildcards), attempt)


def megabytes_of_judge(wildcards, attempt):
    """Return the memory of a job whose processes judge with an external judge that is a model, in MB."""
    return megabytes_of(processes_of(model_of_judge(wildcards.judge)), judge_gigabytes(wildcards), attempt)


def judge_gigabytes(wildcards):
    """Return the size of the weights of an external judge."""
    return sum(Path(path).stat().st_size for path in judge_files(wildcards) if path.endswith(".safetensors")) / 1e9


def judge_minutes(wildcards, attempt):
    """Return the minutes of a shard's images with an external judge on one GPU, plus 30 for start-up."""
    return attempt * ceil(30 + cost.judge_limit(judge_gigabytes(wildcards)) * shard_images(wildcards) / 60)


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
