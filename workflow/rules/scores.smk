"""Scores: the model's own understanding branch says which images match; the external judge's verdicts measure.

Set base-evaluation is a trained checkpoint's verdict on the base model's evaluation images, for the win rate.
"""


rule score:
    input:
        prompts=prompt_manifest,
        candidates=candidate_manifest,
        images=image_shard,
        checkpoint=lambda wildcards: checkpoint_files(wildcards.node),
    output:
        f"{RUN}/{{node}}/scores/{{set}}/{{shard}}.parquet",
    log:
        f"{RUN}/logs/score/{{node}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/score/{{node}}.{{set}}.{{shard}}.jsonl"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=GPUS,
        mem_mb=megabytes(2),
        runtime=minutes("judge", shard_images),
    params:
        code=code("stages.score", FAMILY),
        config=CONFIG,
        checkpoint=lambda wildcards, input: Path(input.checkpoint[0]).parent,
        settings=settings.score.model_dump(exclude={"batch_size"}),
        model=MODEL,
    message:
        "Judging: {wildcards.node} on {wildcards.set} images, shard {wildcards.shard}"
    shell:
        "python -m stages.score"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --candidates {input.candidates:q}"
        " --checkpoint {params.checkpoint:q}"
        " --out {output:q}"
        " 2>&1 | tee {log:q}"


rule judge:
    input:
        prompts=prompt_manifest,
        candidates=candidate_manifest,
        images=image_shard,
    output:
        f"{RUN}/{{node}}/verdicts/{{set}}/{{shard}}.parquet",
    log:
        f"{RUN}/logs/judge/{{node}}.{{set}}.{{shard}}.log",
    wildcard_constraints:
        set="train|evaluation|replay",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.judge"),
        config=CONFIG,
        judge=settings.evaluate.judge,
    message:
        "External judge: {wildcards.node}'s {wildcards.set} images, shard {wildcards.shard}"
    shell:
        "python -m stages.judge"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --candidates {input.candidates:q}"
        " --out {output:q}"
        " 2>&1 | tee {log:q}"
