"""Learning dynamics: `snakemake dynamics`. Nothing here is part of the loop, and the loop does not depend on it.

probes and training rows -> first-order terms at each examined checkpoint -> steps, followed trainings, similarities -> page
"""

DYNAMICS = f"{RUN}/dynamics"
PROBED = settings.dynamics.benchmark or next(iter(JUDGED or BENCHMARKS), None)  # the benchmark of the probes
PROBE_JUDGE = settings.benchmarks[PROBED].judge if PROBED else None
PIECES = [f"{number:04d}" for number in range(settings.dynamics.shards)]


def examined_arms():
    """Return the arms of dynamics.arms, or the first of each objective without replay and the first with replay."""
    kinds = {}
    for name, arm in settings.arms.items():
        if arm.replay_by == "self" and not settings.arm_pairs(name).matched:
            kinds.setdefault((arm.objective, bool(arm.replay_epochs)), name)
    return settings.dynamics.arms or list(kinds.values())


def examined_replays():
    """Return the replays of the examined arms in which something is drawn."""
    return list(dict.fromkeys(name for arm in examined_arms() for name in NODES[arm].replays if REPLAYS[name].draws))


def examined_pairs():
    """Return the arguments that name the training data of the examined arms, and the files."""
    found = {f"{selection_folder(arm)}/pairs.parquet": arm for arm in reversed(examined_arms())}
    found |= {f"{RUN}/{name}/replay/pairs.parquet": REPLAYS[name].node.arm for name in examined_replays()}
    return [f"--pairs {arm} {path}" for path, arm in found.items()], list(found)


def examined_candidates():
    """Return the candidate manifests that probes and training rows refer to."""
    replayed = [path for name in examined_replays() for path in shard_files(name, "candidates", "replay")]
    return [*shard_files("base", "candidates", PROBED), *shard_files("base", "candidates", "train"), *replayed]


def training_verdicts():
    """Return an external judge's verdicts on training candidates, which only measure."""
    folder, named = f"verdicts/{PROBE_JUDGE}", [("base", "train"), *((name, "replay") for name in examined_replays())]
    return [path for node, images in named for path in shard_files(node, folder, images)] if PROBE_JUDGE else []


def dynamics_settings(stage, without=("shards", "memory")):
    return read_by(stage, settings.dynamics, without=without)


def dynamics_minutes(work):
    """Return a time limit: a gradient of one image takes about what three judgements take, and each piece of work so many."""
    chosen = settings.dynamics
    probes = {
        "terms": chosen.probes * (3 + chosen.alternatives) / len(PIECES) + chosen.rows,
    }[work]
    return lambda wildcards, attempt: attempt * int(30 + 3 * cost.SECONDS["train"] * GIGABYTES * probes / 60)


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
            gpu=min(GPUS, 1),
            mem_mb=lambda wildcards, attempt: megabytes(8)(wildcards, attempt) + settings.dynamics.memory,
            runtime=dynamics_minutes("terms"),
        params:
            code=code("stages.dynamics.terms", mentioned=USES),
            config=CONFIG,
            checkpoint=lambda wildcards: checkpoint_folder(wildcards.node),
            shard=lambda wildcards: f"{int(wildcards.shard)}/{len(PIECES)}",
            settings=dynamics_settings("stages.dynamics.terms"),
            trainable=settings.train.trainable,
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
