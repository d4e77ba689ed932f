"""Prompts: the training set, the sets of the benchmarks, and the check that they do not overlap."""


rule prompts:
    input:
        prompt_files,
    output:
        f"{RUN}/prompts/{{set}}.parquet",
    log:
        f"{RUN}/logs/prompts/{{set}}.log",
    wildcard_constraints:
        set=pattern(["train", *BENCHMARKS]),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=lambda wildcards: code("stages.prompts", mentioned=suite_uses(wildcards.set)),
        config=CONFIG,
        settings=lambda wildcards: read_by("stages.prompts", chosen_prompts(wildcards.set), uses=suite_uses(wildcards.set)),
        seed=lambda wildcards: settings.seed if wildcards.set == "train" else 0,
    message:
        "Prompts: {wildcards.set}"
    shell:
        "python -m stages.prompts"
        " --config {params.config:q}"
        " --set {wildcards.set}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"


rule prompt_sets:
    """Fail if a benchmark contains training prompts, or lacks a category that has a scorer, before any image is drawn."""
    input:
        train=f"{RUN}/prompts/train.parquet",
        benchmarks=expand(f"{RUN}/prompts/{{benchmark}}.parquet", benchmark=BENCHMARKS),
    output:
        f"{RUN}/prompts/sets.parquet",
    log:
        f"{RUN}/logs/prompts/sets.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=code("stages.prompt_sets"),
        config=CONFIG,
        scorers={name: (chosen.scorers, chosen.second_scorers) for name, chosen in settings.benchmarks.items()},
    message:
        "Prompts: no benchmark overlaps the training set"
    shell:
        "python -m stages.prompt_sets"
        " --config {params.config:q}"
        " --train {input.train:q}"
        " --benchmarks {input.benchmarks:q}"
        " --out {output:q}"
        " 2>&1 | logged {log:q}"
