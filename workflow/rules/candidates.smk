"""Candidates: a checkpoint draws N images for each prompt of a set, shard by shard.

The base model's candidates, the replay of a discard pool and the evaluation's images are this one rule.
"""


rule generate:
    input:
        prompts=prompt_manifest,
        checkpoint=lambda wildcards: checkpoint_files(wildcards.node),
    output:
        manifest=f"{RUN}/{{node}}/candidates/{{set}}/{{shard}}.parquet",
        images=f"{RUN}/{{node}}/candidates/{{set}}/{{shard}}.tar",
    log:
        f"{RUN}/logs/generate/{{node}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/generate/{{node}}.{{set}}.{{shard}}.jsonl"
    wildcard_constraints:
        set="train|evaluation|replay",
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=megabytes(2),
        runtime=minutes("draw", shard_images),
    params:
        code=code("stages.generate", FAMILY),
        config=CONFIG,
        checkpoint=lambda wildcards, input: Path(input.checkpoint[0]).parent,
        candidates=images_per_prompt,
        # An arm's replay is a round of its own, so that it does not repeat the seeds of the first one.
        round=lambda wildcards: NODES[wildcards.node].epoch if wildcards.set == "replay" else 0,
        settings=settings.generate.model_dump(exclude={"candidates", "batch_size"}),
        model=MODEL,
        seed=settings.seed,
    message:
        "Drawing: {wildcards.node}, {wildcards.set} prompts, shard {wildcards.shard}"
    shell:
        "python -m stages.generate"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --shard $((10#{wildcards.shard}))/{params.settings[shards]}"
        " --checkpoint {params.checkpoint:q}"
        " --candidates {params.candidates}"
        " --round {params.round}"
        " --out {output.manifest:q}"
        " --images {output.images:q}"
        " 2>&1 | tee {log:q}"
