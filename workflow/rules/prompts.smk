"""Prompts: the training set and the held-out set."""


rule prompts:
    input:
        prompt_files,
    output:
        f"{RUN}/prompts/{{set}}.parquet",
    log:
        f"{RUN}/logs/prompts/{{set}}.log",
    wildcard_constraints:
        set="train|evaluation",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=code("stages.prompts"),
        config=CONFIG,
        settings=lambda wildcards: getattr(settings.prompts, wildcards.set).model_dump(),
        seed=lambda wildcards: settings.seed if wildcards.set == "train" else 0,
    message:
        "Prompts: {wildcards.set}"
    shell:
        "python -m stages.prompts"
        " --config {params.config:q}"
        " --set {wildcards.set}"
        " --out {output:q}"
        " 2>&1 | tee {log:q}"
