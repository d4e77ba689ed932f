"""Training: reference log-probabilities for DPO, the schedule, and the trainer that reads it in order.

A node continues its parent bit-exactly from the trainer's saves in work/. The saves are not declared as outputs, so a retry
finds them, and deleting the folder costs only time. A training that receives a stop signal saves and ends. The shell and tee
around it ignore the signal, so that they outlive it.

SLURM's plugin asks for the GPUs of all nodes together, and SLURM could then divide them unevenly; `gres` says how many each node
has. The plugin cannot start a step with GPUs on several nodes. The resource `mpi` makes it start the job in the batch step, and
from there the stage starts its processes on every node (stages/training/launch.py).
"""


rule reference:
    input:
        prompts=f"{RUN}/prompts/train.parquet",
        pairs=f"{RUN}/{{owner}}/pairs.parquet",
        candidates=reference_candidates,
        checkpoint=checkpoint_files("base", "train"),
    output:
        f"{RUN}/{{owner}}/reference.parquet",
    log:
        f"{RUN}/logs/reference/{{owner}}.log",
    benchmark:
        f"{RUN}/benchmarks/reference/{{owner}}.jsonl"
    wildcard_constraints:
        owner=r"[^/]+(/replay)?",
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(gpu_of_model),
        mem_mb=megabytes(2),
        runtime=minutes_for("judge", reference_images),
    params:
        code=code("stages.reference", mentioned=USES),
        config=CONFIG,
        checkpoint=lambda wildcards: checkpoint_folder("base"),
        model=MODEL,
        epochs=reference_epochs,
        # The random draws of an estimated likelihood depend on the run's seed. An exact likelihood has no random draws.
        seed=None if FAMILY.likelihood == "exact" else settings.seed,
    message:
        "Reference log-probabilities: {wildcards.owner}"
    shell:
        "python -m stages.reference"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --pairs {input.pairs:q}"
        " --candidates {input.candidates:q}"
        " --checkpoint {params.checkpoint:q}"
        " --epochs {params.epochs}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule schedule:
    input:
        pairs=first_pairs,
        replayed=replayed_pairs,
    output:
        f"{RUN}/{{node}}/schedule.parquet",
    log:
        f"{RUN}/logs/schedule/{{node}}.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.schedule"),
        config=CONFIG,
        arm=lambda wildcards: NODES[wildcards.node].arm,
        epochs=lambda wildcards: NODES[wildcards.node].epoch,
        replayed=replay_arguments,
        batch_size=lambda wildcards: settings.arm_train(NODES[wildcards.node].arm).batch_size,
        seed=settings.seed,
    message:
        "Schedule: {wildcards.node}"
    shell:
        "python -m stages.schedule"
        " --config {params.config:q}"
        " --arm {params.arm}"
        " --epochs {params.epochs}"
        " --pairs {input.pairs:q}"
        " {params.replayed}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule train:
    input:
        prompts=f"{RUN}/prompts/train.parquet",
        schedule=f"{RUN}/{{node}}/schedule.parquet",
        candidates=training_candidates,
        scores=anchor_scores,
        base=checkpoint_files("base", "train"),
        parent=parent_checkpoint,
    output:
        checkpoint=f"{RUN}/{{node}}/checkpoint/{FAMILY.trained_file}",
        metrics=f"{RUN}/{{node}}/training.parquet",
        plot=f"{RUN}/{{node}}/training.png",
    log:
        f"{RUN}/logs/train/{{node}}.log",
    benchmark:
        f"{RUN}/benchmarks/train/{{node}}.jsonl"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(lambda wildcards: training_processes(wildcards) if GPUS else 0),
        gres=gpus_of_each_node,
        nodes=training_nodes,
        tasks=training_nodes,
        tasks_per_gpu=0,
        mpi=lambda wildcards: "srun" if training_nodes(wildcards) > 1 else "",
        mem_mb=megabytes(8),
        runtime=minutes_for("train", trained_images, training_processes),
    params:
        code=code("stages.train", mentioned=USES),
        config=CONFIG,
        arm=lambda wildcards: NODES[wildcards.node].arm,
        parent=continued_work,
        work=lambda wildcards: f"{RUN}/{wildcards.node}/work",
        out=lambda wildcards: checkpoint_folder(wildcards.node),
        training=lambda wildcards: training_settings(wildcards.node),
        model=MODEL,
    message:
        "Training: {wildcards.node}"
    shell:
        "trap '' TERM USR1; "
        "python -m stages.train"
        " --config {params.config:q}"
        " --arm {params.arm}"
        " --prompts {input.prompts:q}"
        " --schedule {input.schedule:q}"
        " --candidates {input.candidates:q}"
        " --scores {input.scores:q}"
        " {params.parent}"
        " --work {params.work:q}"
        " --out {params.out:q}"
        " --metrics {output.metrics:q}"
        " 2>&1 | logged {log:q}"
