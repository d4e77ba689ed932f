"""Pairs: select SFT rows or DPO pairs by the verdicts. Prompts without an accepted candidate form the discard pool."""


rule pairs:
    input:
        candidates=shard_files("base", "candidates", "train"),
        scores=lambda wildcards: shard_files("base", selecting(wildcards.arm), "train"),
    output:
        pairs=f"{RUN}/{{arm}}/pairs.parquet",
        discard=f"{RUN}/{{arm}}/discard.parquet",
    log:
        f"{RUN}/logs/pairs/{{arm}}.log",
    wildcard_constraints:
        arm=pattern(arm for arm in settings.arms if arm not in MATCHED),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=code("stages.pairs"),
        config=CONFIG,
        selection=lambda wildcards: selection_settings(wildcards.arm),
    message:
        "Pairs: {wildcards.arm}"
    shell:
        "python -m stages.pairs"
        " --config {params.config:q}"
        " --arm {wildcards.arm}"
        " --candidates {input.candidates:q}"
        " --scores {input.scores:q}"
        " --out {output.pairs:q}"
        " --discard {output.discard:q}"
        " 2>&1 | logged {log:q}"
