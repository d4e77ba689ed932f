"""Evaluation: compute the metrics of each benchmark from the verdicts of the model itself and of external judges."""


rule evaluate:
    input:
        prompts=f"{RUN}/prompts/{{benchmark}}.parquet",
        verdicts=lambda wildcards: verdict_files(wildcards.node, wildcards.benchmark),
        scores=lambda wildcards: shard_files(wildcards.node, "scores", wildcards.benchmark),
        base_verdicts=lambda wildcards: verdict_files("base", wildcards.benchmark),
        base_scores=lambda wildcards: shard_files("base", "scores", wildcards.benchmark),
        # The base model's verdicts on its own images are its scores.
        arm_scores_of_base=lambda wildcards: shard_files(
            wildcards.node, "scores" if wildcards.node == "base" else "scores-of-base", wildcards.benchmark
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
