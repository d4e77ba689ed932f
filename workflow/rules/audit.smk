"""The audit: models side by side on all benchmarks, before any training, and a verdict on whether to train.

The images, scores, verdicts and metrics of the models are made by the same rules as those of base, baselines and arms.
"""

if BENCHMARKS:

    rule audit_report:
        input:
            prompts=expand(f"{RUN}/prompts/{{benchmark}}.parquet", benchmark=BENCHMARKS),
            metrics=[f"{RUN}/{model}/metrics/{name}.parquet" for name in BENCHMARKS for model in TO_AUDIT],
            scores=audited_files("scores"),
            verdicts=audited_files("verdicts"),
            paper=PAPER,
            speeds=measured_speeds(),
        output:
            [path for path in audit_files() if "judge_report" not in path and not path.endswith(".png")],
            plot=report(f"{AUDIT}/audit.png", caption="../report/audit.rst", category="Results"),
        log:
            f"{RUN}/logs/audit.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=2000,
        params:
            # How images were drawn and judged is passed as text, so no code of a family or a judge is reached.
            code=code("stages.audit", mentioned=[]),
            config=CONFIG,
            settings=settings.audit.model_dump(exclude={"models"}),
            selections={name: selection_settings(name) for name in settings.arms} or settings.pairs.model_dump(),
            candidates=settings.generate.candidates,
            epochs={name: arm.epochs for name, arm in settings.arms.items()},
            recipe=lambda wildcards: [
                recipe.drawing(settings.audited(model)) + recipe.asking(settings.audited(model)) for model in TO_AUDIT
            ],
            judged=lambda wildcards: [recipe.benchmark(settings, name) for name in BENCHMARKS],
            scores=lambda wildcards: audited_arguments("scores", audited_folders("scores")),
            verdicts=lambda wildcards: audited_arguments("verdicts", audited_folders("verdicts")),
            folder=lambda wildcards, output: Path(output.plot).parent,
        message:
            "Audit"
        shell:
            "python -m stages.audit"
            " --config {params.config:q}"
            " --prompts {input.prompts:q}"
            " --metrics {input.metrics:q}"
            " {params.scores}"
            " {params.verdicts}"
            " --paper {input.paper:q}"
            " --out {params.folder:q}"
            " > {log:q} 2>&1"


if JUDGED:

    rule audit_judge_report:
        """The judge report of the audited models: how well each one's p(yes) tells right from wrong images."""
        input:
            prompts=[f"{RUN}/prompts/{name}.parquet" for name in JUDGED],
            scores=[path for name in JUDGED for model in TO_AUDIT for path in shard_files(model, "scores", name)],
            verdicts=[
                path
                for name in JUDGED
                for model in TO_AUDIT
                for path in shard_files(model, f"verdicts/{settings.benchmarks[name].judge}", name)
            ],
        output:
            table=f"{AUDIT}/judge_report.parquet",
            plot=report(f"{AUDIT}/judge_report.png", caption="../report/judge_report.rst", category="Results"),
        log:
            f"{RUN}/logs/audit.judge_report.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=2000,
        params:
            code=code("stages.judge_report"),
            config=CONFIG,
            accept_thresholds=settings.accept_thresholds(),
            prompts=[f"--prompts {name} {RUN}/prompts/{name}.parquet" for name in JUDGED],
            scores=lambda wildcards: audited_arguments(
                "scores", [(name, model, "scores") for name in JUDGED for model in TO_AUDIT]
            ),
            verdicts=lambda wildcards: audited_arguments(
                "verdicts",
                [(name, model, f"verdicts/{settings.benchmarks[name].judge}") for name in JUDGED for model in TO_AUDIT],
            ),
        message:
            "Judge report of the audited models"
        shell:
            "python -m stages.judge_report"
            " --config {params.config:q}"
            " {params.prompts}"
            " {params.scores}"
            " {params.verdicts}"
            " --out {output.table:q}"
            " --plot {output.plot:q}"
            " > {log:q} 2>&1"
