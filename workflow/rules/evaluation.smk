"""Evaluation: images of the held-out prompts, judged by the model itself and by the external judge, are counted."""


rule evaluate:
    input:
        prompts=f"{RUN}/prompts/evaluation.parquet",
        verdicts=lambda wildcards: shard_files(wildcards.node, "verdicts", "evaluation"),
        scores=lambda wildcards: shard_files(wildcards.node, "scores", "evaluation"),
        base_verdicts=shard_files("base", "verdicts", "evaluation"),
        base_scores=shard_files("base", "scores", "evaluation"),
        arm_scores_of_base=scores_of_base,
    output:
        f"{RUN}/{{node}}/metrics.parquet",
    log:
        f"{RUN}/logs/evaluate/{{node}}.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.evaluate"),
        config=CONFIG,
        settings=settings.evaluate.model_dump(exclude={"images_per_prompt"}),
        seed=settings.seed,
    message:
        "Evaluation: {wildcards.node}"
    shell:
        "python -m stages.evaluate"
        " --config {params.config:q}"
        " --arm {wildcards.node}"
        " --prompts {input.prompts:q}"
        " --verdicts {input.verdicts:q}"
        " --scores {input.scores:q}"
        " --base-verdicts {input.base_verdicts:q}"
        " --base-scores {input.base_scores:q}"
        " --arm-scores-of-base {input.arm_scores_of_base:q}"
        " --out {output:q}"
        " 2>&1 | tee {log:q}"
