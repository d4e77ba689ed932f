"""The final outputs: the summary table of all arms, and the contact sheet."""


rule summary:
    input:
        metrics_files(),
    output:
        report(f"{RUN}/summary.csv", caption="../report/summary.rst", category="Results"),
    log:
        f"{RUN}/logs/summary.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=1000,
    params:
        code=code("stages.report"),
    message:
        "Summary"
    shell:
        "python -m stages.report --metrics {input:q} --out {output:q} > {log:q} 2>&1"


if BENCHMARKS:

    rule contact_sheet:
        input:
            prompts=f"{RUN}/prompts/train.parquet",
            candidates=shard_files("base", "candidates", "train"),
            scores=shard_files("base", "scores", "train"),
            pairs=shown_pairs(),
            evaluation=f"{RUN}/prompts/{BENCHMARKS[0]}.parquet",
            drawn=[f"{RUN}/{node}/candidates/{BENCHMARKS[0]}/{SHARDS[0]}.parquet" for node in EVALUATED],
            verdicts=shown_verdicts(),
        output:
            report(f"{RUN}/contact_sheet.png", caption="../report/contact_sheet.rst", category="Results"),
        log:
            f"{RUN}/logs/contact_sheet.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=1000,
        params:
            code=code("stages.contact_sheet"),
            config=CONFIG,
            benchmark=BENCHMARKS[0],
            arms=EVALUATED,
            settings=read_by("stages.contact_sheet", settings.report),
        message:
            "Contact sheet"
        shell:
            "python -m stages.contact_sheet"
            " --config {params.config:q}"
            " --benchmark {params.benchmark}"
            " --prompts {input.prompts:q}"
            " --candidates {input.candidates:q}"
            " --scores {input.scores:q}"
            " --pairs {input.pairs:q}"
            " --evaluation {input.evaluation:q}"
            " --arms {params.arms}"
            " --drawn {input.drawn:q}"
            " --verdicts {input.verdicts:q}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"
