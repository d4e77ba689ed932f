"""Scores and verdicts: the model's own understanding branch decides which images match; external judges measure both branches.

`scores` are a checkpoint's verdicts on its own images. `scores-of-base` are its verdicts on the base model's images, from which
the win rate is computed.
"""


rule score:
    input:
        prompts=prompt_manifest,
        candidates=candidate_manifest,
        images=image_shard,
        checkpoint=lambda wildcards: checkpoint_files(wildcards.node, "judge"),
    output:
        f"{RUN}/{{node}}/{{scores}}/{{set}}/{{shard}}.parquet",
    log:
        f"{RUN}/logs/score/{{node}}.{{scores}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/score/{{node}}.{{scores}}.{{set}}.{{shard}}.jsonl"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(gpus_of_model),
        mem_mb=megabytes_of_model,
        runtime=minutes_for("judge", shard_images),
    params:
        code=lambda wildcards: code("stages.score", mentioned=uses_of(wildcards.node)),
        config=lambda wildcards: config_of(wildcards.node),
        checkpoint=lambda wildcards: checkpoint_folder(wildcards.node, "judge"),
        settings=lambda wildcards: read_by(
            "stages.score", settings_of(wildcards.node).score, without=["batch_size"], uses=uses_of(wildcards.node)
        ),
        model=lambda wildcards: model_identity(settings_of(wildcards.node)),
    message:
        "Judging: {wildcards.node}, {wildcards.scores}, {wildcards.set} images, shard {wildcards.shard}"
    shell:
        "python -m stages.score"
        " --config {params.config:q}"
        " --prompts {input.prompts:q}"
        " --candidates {input.candidates:q}"
        " --checkpoint {params.checkpoint:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule judge:
    input:
        prompts=prompt_manifest,
        candidates=candidate_manifest,
        images=image_shard,
        files=judge_files,
    output:
        f"{RUN}/{{node}}/verdicts/{{judge}}/{{set}}/{{shard}}.parquet",
    log:
        f"{RUN}/logs/judge/{{node}}.{{judge}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/judge/{{node}}.{{judge}}.{{set}}.{{shard}}.jsonl"
    wildcard_constraints:
        judge=pattern(name for name in JUDGES if name not in (*GPU_JUDGES, *SOURCES)),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=lambda wildcards: code("stages.judge", mentioned=judge_uses(wildcards.judge)),
        config=CONFIG,
        judge=lambda wildcards: judge_settings(wildcards.judge),
        categories=category_options,
    message:
        "External judge {wildcards.judge}: {wildcards.node}, {wildcards.set} images, shard {wildcards.shard}"
    shell:
        "python -m stages.judge"
        " --config {params.config:q}"
        " --judge {wildcards.judge}"
        " --prompts {input.prompts:q}"
        " --candidates {input.candidates:q}"
        " {params.categories}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


use rule judge as judge_on_gpu with:
    wildcard_constraints:
        judge=pattern(GPU_JUDGES),
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(gpus_of_judge),
        mem_mb=megabytes_of_judge,
        runtime=judge_minutes,
