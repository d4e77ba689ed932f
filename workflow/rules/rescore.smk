"""Verdicts without images: judges whose rules are applied to what another judge has already measured (SOURCES)."""


rule rescore:
    input:
        prompts=prompt_manifest,
        verdicts=lambda wildcards: (
            f"{RUN}/{wildcards.node}/verdicts/{SOURCES[wildcards.judge]}/{wildcards.set}/{wildcards.shard}.parquet"
        ),
    output:
        f"{RUN}/{{node}}/verdicts/{{judge}}/{{set}}/{{shard}}.parquet",
    log:
        f"{RUN}/logs/rescore/{{node}}.{{judge}}.{{set}}.{{shard}}.log",
    benchmark:
        f"{RUN}/benchmarks/rescore/{{node}}.{{judge}}.{{set}}.{{shard}}.jsonl"
    wildcard_constraints:
        judge=pattern(SOURCES),
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
    params:
        code=lambda wildcards: code("stages.rescore", mentioned=judge_uses(wildcards.judge)),
        config=CONFIG,
        judge=lambda wildcards: judge_settings(wildcards.judge),
        categories=category_options,
    message:
        "Judge {wildcards.judge}, from stored answers: {wildcards.node}, {wildcards.set} images, shard {wildcards.shard}"
    shell:
        "python -m stages.rescore"
        " --config {params.config:q}"
        " --judge {wildcards.judge}"
        " --prompts {input.prompts:q}"
        " --verdicts {input.verdicts:q}"
        " {params.categories}"
        " --out {output:q}"
        " > {log:q} 2>&1"
