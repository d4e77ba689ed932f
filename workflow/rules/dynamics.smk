"""Learning dynamics: `snakemake dynamics`. Nothing here is part of the loop, and the loop does not depend on it.

probes and training rows -> first-order terms at each examined checkpoint -> steps, followed trainings, similarities -> page
"""

if PROBED:

    rule dynamics_select:
        input:
            prompts=f"{RUN}/prompts/{PROBED}.parquet",
            candidates=shard_files("base", "candidates", PROBED),
            scores=shard_files("base", "scores", PROBED),
            verdicts=shard_files("base", f"verdicts/{PROBE_JUDGE}", PROBED) if PROBE_JUDGE else [],
            training_prompts=f"{RUN}/prompts/train.parquet",
            pairs=examined_pairs()[1],
            training_verdicts=training_verdicts(),
        output:
            probes=f"{DYNAMICS}/probes.parquet",
            rows=f"{DYNAMICS}/rows.parquet",
        log:
            f"{RUN}/logs/dynamics/select.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=2000,
        params:
            code=code("stages.dynamics.select"),
            config=CONFIG,
            pairs=examined_pairs()[0],
            settings=dynamics_settings("stages.dynamics.select"),
            seed=settings.seed,
        message:
            "Dynamics: probes and training rows"
        shell:
            "python -m stages.dynamics.select"
            " --config {params.config:q}"
            " --prompts {input.prompts:q}"
            " --candidates {input.candidates:q}"
            " --scores {input.scores:q}"
            " --verdicts {input.verdicts:q}"
            " --training-prompts {input.training_prompts:q}"
            " {params.pairs}"
            " --training-verdicts {input.training_verdicts:q}"
            " --probes {output.probes:q}"
            " --rows {output.rows:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_terms:
        input:
            probes=f"{DYNAMICS}/probes.parquet",
            rows=f"{DYNAMICS}/rows.parquet",
            candidates=examined_candidates(),
            checkpoint=lambda wildcards: checkpoint_files(wildcards.node, "train"),
        output:
            terms=f"{DYNAMICS}/{{node}}/terms/{{shard}}.parquet",
            values=f"{DYNAMICS}/{{node}}/values/{{shard}}.parquet",
        log:
            f"{RUN}/logs/dynamics/terms.{{node}}.{{shard}}.log",
        benchmark:
            f"{RUN}/benchmarks/dynamics/terms.{{node}}.{{shard}}.jsonl"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=lambda wildcards, attempt: megabytes(8)(wildcards, attempt) + settings.dynamics.memory,
            runtime=dynamics_minutes("terms"),
        params:
            code=code("stages.dynamics.terms", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder(wildcards.node),
            shard=lambda wildcards: f"{int(wildcards.shard)}/{len(PIECES)}",
            settings=dynamics_settings("stages.dynamics.terms"),
            train=dynamics_training("stages.dynamics.terms"),
            score=read_by("stages.dynamics.terms", settings.score, without=["batch_size"]),
            model=MODEL,
        message:
            "Dynamics: terms at {wildcards.node}, shard {wildcards.shard}"
        shell:
            "python -m stages.dynamics.terms"
            " --config {params.config:q}"
            " --probes {input.probes:q}"
            " --rows {input.rows:q}"
            " --candidates {input.candidates:q}"
            " --checkpoint {params.checkpoint:q}"
            " --shard {params.shard}"
            " --out {output.terms:q}"
            " --values {output.values:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_steps:
        input:
            probes=f"{DYNAMICS}/probes.parquet",
            rows=f"{DYNAMICS}/rows.parquet",
            candidates=examined_candidates(),
            checkpoint=checkpoint_files("base", "train"),
        output:
            f"{DYNAMICS}/steps.parquet",
        log:
            f"{RUN}/logs/dynamics/steps.log",
        benchmark:
            f"{RUN}/benchmarks/dynamics/steps.jsonl"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=megabytes(10),
            runtime=dynamics_minutes("steps"),
        params:
            code=code("stages.dynamics.steps", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder("base"),
            settings=dynamics_settings("stages.dynamics.steps"),
            train=dynamics_training("stages.dynamics.steps"),
            score=read_by("stages.dynamics.steps", settings.score, without=["batch_size"]),
            model=MODEL,
        message:
            "Dynamics: predicted and measured steps"
        shell:
            "python -m stages.dynamics.steps"
            " --config {params.config:q}"
            " --probes {input.probes:q}"
            " --rows {input.rows:q}"
            " --candidates {input.candidates:q}"
            " --checkpoint {params.checkpoint:q}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_follow:
        input:
            probes=f"{DYNAMICS}/probes.parquet",
            prompts=f"{RUN}/prompts/train.parquet",
            schedule=f"{RUN}/{{arm}}/schedule.parquet",
            candidates=[*shard_files("base", "candidates", PROBED), *shard_files("base", "candidates", "train")],
            checkpoint=checkpoint_files("base", "train"),
            trained=lambda wildcards: checkpoint_files(wildcards.arm, "train"),
        output:
            f"{DYNAMICS}/path/{{arm}}.parquet",
        log:
            f"{RUN}/logs/dynamics/follow.{{arm}}.log",
        benchmark:
            f"{RUN}/benchmarks/dynamics/follow.{{arm}}.jsonl"
        wildcard_constraints:
            arm=pattern(followed_arms()),
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=megabytes(12),
            runtime=dynamics_minutes("follow"),
        params:
            code=code("stages.dynamics.follow", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder("base"),
            trained=lambda wildcards: checkpoint_folder(wildcards.arm),
            segments=settings.dynamics.segments,
            train=lambda wildcards: training_settings(wildcards.arm),
            score=read_by("stages.dynamics.follow", settings.score, without=["batch_size"]),
            model=MODEL,
        message:
            "Dynamics: following the training of {wildcards.arm}"
        shell:
            "python -m stages.dynamics.follow"
            " --config {params.config:q}"
            " --arm {wildcards.arm}"
            " --probes {input.probes:q}"
            " --prompts {input.prompts:q}"
            " --schedule {input.schedule:q}"
            " --candidates {input.candidates:q}"
            " --checkpoint {params.checkpoint:q}"
            " --trained {params.trained:q}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_logits:
        input:
            probes=f"{DYNAMICS}/probes.parquet",
            candidates=shard_files("base", "candidates", PROBED),
            checkpoint=checkpoint_files("base", "train"),
        output:
            f"{DYNAMICS}/logits.parquet",
        log:
            f"{RUN}/logs/dynamics/logits.log",
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=megabytes(8 + 2 * settings.dynamics.logit_probes),
            runtime=dynamics_minutes("terms"),
        params:
            code=code("stages.dynamics.logits", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder("base"),
            settings=dynamics_settings("stages.dynamics.logits"),
            train=read_by("stages.dynamics.logits", settings.train, without=WITHOUT_OUTCOME),
            seed=settings.seed,
            model=MODEL,
        message:
            "Dynamics: the kernel between logits"
        shell:
            "python -m stages.dynamics.logits"
            " --config {params.config:q}"
            " --probes {input.probes:q}"
            " --candidates {input.candidates:q}"
            " --checkpoint {params.checkpoint:q}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_embed:
        input:
            prompts=[f"{RUN}/prompts/train.parquet", f"{RUN}/prompts/{PROBED}.parquet"],
            candidates=examined_candidates(),
            pairs=examined_pairs()[1],
            checkpoint=checkpoint_files("base", "train"),
            clip=clip_files,
        output:
            f"{DYNAMICS}/embeddings/{{shard}}.parquet",
        log:
            f"{RUN}/logs/dynamics/embed.{{shard}}.log",
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=megabytes(2),
            runtime=dynamics_minutes("embed"),
        params:
            code=code("stages.dynamics.embed", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder("base"),
            shard=lambda wildcards: f"{int(wildcards.shard)}/{len(PIECES)}",
            clip=settings.dynamics.clip,
            model=MODEL,
        message:
            "Dynamics: embeddings, shard {wildcards.shard}"
        shell:
            "python -m stages.dynamics.embed"
            " --config {params.config:q}"
            " --prompts {input.prompts:q}"
            " --candidates {input.candidates:q}"
            " --pairs {input.pairs:q}"
            " --checkpoint {params.checkpoint:q}"
            " --shard {params.shard}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_sketch:
        input:
            probes=f"{DYNAMICS}/probes.parquet",
            rows=f"{DYNAMICS}/rows.parquet",
            candidates=examined_candidates(),
            checkpoint=checkpoint_files("base", "train"),
        output:
            f"{DYNAMICS}/sketches/{{shard}}.parquet",
        log:
            f"{RUN}/logs/dynamics/sketch.{{shard}}.log",
        benchmark:
            f"{RUN}/benchmarks/dynamics/sketch.{{shard}}.jsonl"
        conda:
            "../../envs/models.yaml"
        threads: 1
        resources:
            gpu=gpus_asked(gpu_of_model),
            mem_mb=megabytes(10),
            runtime=dynamics_minutes("sketch"),
        params:
            code=code("stages.dynamics.sketch", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder("base"),
            shard=lambda wildcards: f"{int(wildcards.shard)}/{len(PIECES)}",
            settings=dynamics_settings("stages.dynamics.sketch"),
            train=dynamics_training("stages.dynamics.sketch"),
            model=MODEL,
        message:
            "Dynamics: compressed gradients, shard {wildcards.shard}"
        shell:
            "python -m stages.dynamics.sketch"
            " --config {params.config:q}"
            " --probes {input.probes:q}"
            " --rows {input.rows:q}"
            " --candidates {input.candidates:q}"
            " --checkpoint {params.checkpoint:q}"
            " --shard {params.shard}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    rule dynamics_claims:
        input:
            **proxy_inputs(),
            terms=expand(
                f"{DYNAMICS}/{{node}}/{{kind}}/{{shard}}.parquet", node=term_nodes(), kind=["terms", "values"], shard=PIECES
            ),
            paths=expand(f"{DYNAMICS}/path/{{arm}}.parquet", arm=followed_arms()),
            other=[f"{DYNAMICS}/steps.parquet", f"{DYNAMICS}/logits.parquet"],
            metrics=[f"{RUN}/{node}/metrics/{PROBED}.parquet" for node in ["base", *examined_arms()]],
        output:
            f"{DYNAMICS}/claims.parquet",
        log:
            f"{RUN}/logs/dynamics/claims.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=lambda wildcards, attempt: 4000 * attempt,
        params:
            code=code("stages.dynamics.claims"),
            config=CONFIG,
            folder=lambda wildcards: DYNAMICS,
            nodes=term_nodes(),
            followed=followed_arms(),
            seed=settings.seed,
            only="",
            of_base=lambda wildcards: [
                f"--scores-of-base {arm} {' '.join(shard_files(arm, 'scores-of-base', PROBED))}" for arm in examined_arms()
            ],
            pairs=lambda wildcards: [f"--pairs {arm} {selection_folder(arm)}/pairs.parquet" for arm in examined_arms()],
        message:
            "Dynamics: claims"
        shell:
            "python -m stages.dynamics.claims"
            " --config {params.config:q}"
            " --dynamics {params.folder:q}"
            " --nodes {params.nodes:q}"
            " --followed {params.followed:q}"
            " {params.only}"
            " --scores {input.scores:q}"
            " {params.of_base}"
            " {params.pairs}"
            " --verdicts {input.verdicts:q}"
            " --metrics {input.metrics:q}"
            " --out {output:q}"
            " 2>&1 | logged {log:q}"

    use rule dynamics_claims as dynamics_proxy_claims with:
        input:
            **proxy_inputs(),
            metrics=[],
        output:
            f"{DYNAMICS}/proxies.parquet",
        log:
            f"{RUN}/logs/dynamics/proxy_claims.log",
        params:
            only="--proxies",
        message:
            "Dynamics: claims from similarities and compressed gradients"

    rule dynamics_page:
        input:
            claims=f"{DYNAMICS}/claims.parquet",
        output:
            page=f"{DYNAMICS}/page.md",
            pictures=expand(
                f"{DYNAMICS}/page-{{name}}.png", name=["steps", *(["path"] if followed_arms() else []), "terms", "proxies"]
            ),
        log:
            f"{RUN}/logs/dynamics/page.log",
        conda:
            "../../envs/light.yaml"
        resources:
            mem_mb=4000,
        params:
            code=code("stages.dynamics.page"),
            folder=lambda wildcards: DYNAMICS,
            only="",
        message:
            "Dynamics: page and pictures"
        shell:
            "rm -f {output.page:q}; python -m stages.dynamics.page"
            " --dynamics {params.folder:q}"
            " {params.only}"
            " --out {output.page:q}"
            " 2>&1 | logged {log:q}"

    use rule dynamics_page as dynamics_proxies_page with:
        input:
            claims=f"{DYNAMICS}/proxies.parquet",
        output:
            page=f"{DYNAMICS}/proxies.md",
            pictures=f"{DYNAMICS}/proxies-proxies.png",
        log:
            f"{RUN}/logs/dynamics/proxies_page.log",
        params:
            only="--proxies",
        message:
            "Dynamics: page and picture of similarities and compressed gradients"

    rule dynamics:
        """Everything about learning dynamics, exact terms and proxies."""
        input:
            f"{DYNAMICS}/page.md",
        localrule: True

    rule dynamics_proxies:
        """What is affordable with a model of any size: similarities and compressed gradients, with a page of their own."""
        input:
            f"{DYNAMICS}/proxies.md",
        localrule: True
