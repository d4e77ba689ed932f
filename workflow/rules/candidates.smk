"""Candidates: a checkpoint draws N images for each prompt of a set, shard by shard.

This rule draws the base model's candidates, the replay of a discard pool and the images of benchmarks.
"""


rule generate:
    input:
        prompts=prompt_manifest,
        checkpoint=lambda wildcards: checkpoint_files(wildcards.node, "draw"),
        # `ancient`: the check must run first, but a repeated check, after a benchmark was added, re-draws nothing.
        checked=ancient(f"{RUN}/prompts/sets.parquet") if settings.arms else [],
    output:
        manifest=f"{RUN}/{{node}}/candidates/{{set}}/{{shard}}.parquet",
        images=f"{RUN}/{{node}}/candidates/{{set}}/{{shard}}.tar",
    log:
        f"{RUN}/logs/generate/{{node}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/generate/{{node}}.{{set}}.{{shard}}.jsonl"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(gpus_of_model),
        mem_mb=megabytes_of_model,
        runtime=minutes_for("draw", shard_images),
    params:
        code=lambda wildcards: code("stages.generate", mentioned=uses_of(wildcards.node)),
        config=lambda wildcards: config_of(wildcards.node),
        checkpoint=lambda wildcards: checkpoint_folder(wildcards.node),
        candidates=images_per_prompt,
        # A replay is a separate round, so that it does not reuse the seeds of round 0.
        round=lambda wildcards: REPLAYS[wildcards.node].node.epoch if wildcards.set == "replay" else 0,
        sampling=lambda wildcards: read_by(
            "stages.generate", settings_of(wildcards.node).sampling(), uses=uses_of(wildcards.node)
        ),
        shards=lambda wildcards: settings.shards(wildcards.set),
        model=lambda wildcards: model_identity(settings_of(wildcards.node)),
        seed=settings.seed,
    message:
        "Drawing: {wildcards.node}, {wildcards.set} prompts, shard {wildcards.shard}"
    shell:
        "python -m stages.generate"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --shard $((10#{wildcards.shard}))/{params.shards}"
        " --checkpoint {params.checkpoint:q}"
        " --candidates {params.candidates}"
        " --round {params.round}"
        " --out {output.manifest:q}"
        " --images {output.images:q}"
        " 2>&1 | logged {log:q}"
