"""The final outputs: the summary of all arms, the tables, the contact sheet, the judge report, learning curves and the pages."""

import sys


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


if BENCHMARKS or UNDERSTANDING:

    rule tables:
        input:
            metrics=metrics_files(),
            prompts=expand(f"{RUN}/prompts/{{benchmark}}.parquet", benchmark=BENCHMARKS),
            paper=PAPER if settings.report.paper_model else [],
        output:
            table_files(),
        log:
            f"{RUN}/logs/tables.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=1000,
        params:
            # How images were drawn and judged is passed as text, so no code of a family or a judge is reached.
            code=code("stages.tables", mentioned=[]),
            config=CONFIG,
            recipe=lambda wildcards: recipe.whole(settings),
            paper_model=settings.report.paper_model,
            paper=["--paper", PAPER] if settings.report.paper_model else [],
            folder=lambda wildcards, output: Path(output[0]).parent,
        message:
            "Tables"
        shell:
            "python -m stages.tables"
            " --config {params.config:q}"
            " --metrics {input.metrics:q}"
            " --prompts {input.prompts:q}"
            " {params.paper:q}"
            " --out {params.folder:q}"
            " > {log:q} 2>&1"


if BENCHMARKS:

    rule contact_sheet:
        input:
            prompts=f"{RUN}/prompts/train.parquet",
            candidates=shard_files("base", "candidates", "train"),
            scores=shard_files("base", "scores", "train"),
            pairs=shown_pairs(),
            evaluation=f"{RUN}/prompts/{BENCHMARKS[0]}.parquet",
            drawn=[f"{RUN}/{node}/candidates/{BENCHMARKS[0]}/0000.parquet" for node in EVALUATED],
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


if JUDGED:

    rule judge_report:
        input:
            prompts=[f"{RUN}/prompts/{name}.parquet" for name in [*JUDGED, "train"]],
            scores=reported_files("scores"),
            verdicts=reported_files("verdicts"),
        output:
            table=f"{RUN}/judge_report.parquet",
            plot=report(f"{RUN}/judge_report.png", caption="../report/judge_report.rst", category="Results"),
        log:
            f"{RUN}/logs/judge_report.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=2000,
        params:
            code=code("stages.judge_report"),
            config=CONFIG,
            accept_thresholds=settings.accept_thresholds(),
            prompts=[f"--prompts {name} {RUN}/prompts/{name}.parquet" for name in [*JUDGED, "train"]],
            scores=lambda wildcards: reported_arguments("scores"),
            verdicts=lambda wildcards: reported_arguments("verdicts"),
        message:
            "Judge report"
        shell:
            "python -m stages.judge_report"
            " --config {params.config:q}"
            " {params.prompts}"
            " {params.scores}"
            " {params.verdicts}"
            " --out {output.table:q}"
            " --plot {output.plot:q}"
            " > {log:q} 2>&1"


if BENCHMARKS and settings.evaluate.every_checkpoint:

    rule learning_curves:
        input:
            every_metrics_file(),
        output:
            table=f"{RUN}/learning_curves.csv",
            plot=report(f"{RUN}/learning_curves.png", caption="../report/learning_curves.rst", category="Results"),
        log:
            f"{RUN}/logs/learning_curves.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=1000,
        params:
            code=code("stages.learning_curves"),
            config=CONFIG,
            curves={arm: [(node.epoch, node.name) for node in arm_tree.path(NODES, arm)] for arm in settings.arms},
        message:
            "Learning curves"
        shell:
            "python -m stages.learning_curves"
            " --config {params.config:q}"
            " --metrics {input:q}"
            " --out {output.table:q}"
            " --plot {output.plot:q}"
            " > {log:q} 2>&1"


# `snakemake --report` can put a folder into a ZIP file, but not into a single HTML file, which has the report only.
ZIPPED = any(argument.endswith(".zip") for argument in sys.argv)
PAGES = directory(f"{RUN}/pages")


rule pages:
    input:
        shown_files(),
    output:
        report=report(f"{RUN}/report.html", caption="../report/report.rst", category="Pages"),
        pages=report(PAGES, htmlindex="index.html", caption="../report/pages.rst", category="Pages") if ZIPPED else PAGES,
    log:
        f"{RUN}/logs/pages.log",
    conda:
        "../../envs/light.yaml"
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        code=code("stages.browse", mentioned=[]),
        templates=template_files(),
        run=lambda wildcards, output: Path(output.report).parent,
    message:
        "Pages"
    shell:
        "python -m stages.browse {params.run:q} --report {output.report:q} --out {output.pages:q} > {log:q} 2>&1"
