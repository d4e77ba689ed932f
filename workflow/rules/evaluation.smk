"""Evaluation: the metrics of each benchmark, from the verdicts of the model itself and of external judges.

The metrics of understanding benchmarks come from the model's answers to questions about images that no model drew.
"""


rule evaluate:
    input:
        prompts=f"{RUN}/prompts/{{benchmark}}.parquet",
        verdicts=lambda wildcards: verdict_files(wildcards.node, wildcards.benchmark),
        scores=lambda wildcards: shard_files(wildcards.node, "scores", wildcards.benchmark),
        base_verdicts=lambda wildcards: verdict_files(compared_with(wildcards.node), wildcards.benchmark),
        base_scores=lambda wildcards: shard_files(compared_with(wildcards.node), "scores", wildcards.benchmark),
        # The base model's verdicts on its own images are its scores.
        arm_scores_of_base=lambda wildcards: shard_files(
            wildcards.node,
            "scores" if wildcards.node == compared_with(wildcards.node) else "scores-of-base",
            wildcards.benchmark,
        ),
    output:
        f"{RUN}/{{node}}/metrics/{{benchmark}}.parquet",
    log:
        f"{RUN}/logs/evaluate/{{node}}.{{benchmark}}.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.evaluate"),
        config=CONFIG,
        settings=read_by("stages.evaluate", settings.evaluate),
        judge=lambda wildcards: settings.benchmarks[wildcards.benchmark].judge,
        scorers=lambda wildcards: settings.scorers(wildcards.benchmark),
        second_scorers=lambda wildcards: settings.benchmarks[wildcards.benchmark].second_scorers,
        seed=settings.seed,
    message:
        "Evaluation: {wildcards.node} on {wildcards.benchmark}"
    shell:
        "python -m stages.evaluate"
        " --config {params.config:q}"
        " --benchmark {wildcards.benchmark}"
        " --arm {wildcards.node}"
        " --prompts {input.prompts:q}"
        " --verdicts {input.verdicts:q}"
        " --scores {input.scores:q}"
        " --base-verdicts {input.base_verdicts:q}"
        " --base-scores {input.base_scores:q}"
        " --arm-scores-of-base {input.arm_scores_of_base:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule understand:
    input:
        files=understanding_files,
        checkpoint=lambda wildcards: checkpoint_files(wildcards.node, "judge"),
    output:
        f"{RUN}/{{node}}/answers/{{understanding}}.parquet",
    log:
        f"{RUN}/logs/understand/{{node}}.{{understanding}}.log",
    benchmark:
        f"{RUN}/benchmarks/understand/{{node}}.{{understanding}}.jsonl"
    conda:
        "../../envs/models.yaml"
    threads: 1
    resources:
        gpu=gpus_asked(gpus_of_model),
        mem_mb=megabytes_of_model,
        runtime=minutes_for("judge", understanding_questions),
    params:
        code=lambda wildcards: code("stages.understand", mentioned=[*USES, *understanding_uses(wildcards.understanding)]),
        config=CONFIG,
        checkpoint=lambda wildcards: checkpoint_folder(wildcards.node),
        settings=understanding_settings,
        score=read_by("stages.understand", settings.score, without=["batch_size"]),
        model=MODEL,
    message:
        "Understanding: {wildcards.node} on {wildcards.understanding}"
    shell:
        "python -m stages.understand"
        " --config {params.config:q}"
        " --name {wildcards.understanding}"
        " --checkpoint {params.checkpoint:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule count_answers:
    input:
        answers=f"{RUN}/{{node}}/answers/{{understanding}}.parquet",
        base=f"{RUN}/base/answers/{{understanding}}.parquet",
    output:
        f"{RUN}/{{node}}/understanding/{{understanding}}.parquet",
    log:
        f"{RUN}/logs/count_answers/{{node}}.{{understanding}}.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=lambda wildcards: code("stages.count_answers", mentioned=understanding_uses(wildcards.understanding)),
        config=CONFIG,
        settings=read_by("stages.count_answers", settings.evaluate),
        seed=settings.seed,
    message:
        "Understanding: metrics of {wildcards.node} on {wildcards.understanding}"
    shell:
        "python -m stages.count_answers"
        " --config {params.config:q}"
        " --name {wildcards.understanding}"
        " --arm {wildcards.node}"
        " --answers {input.answers:q}"
        " --base-answers {input.base:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"
