"""The files that the rules of learning dynamics share, and what they examine: arms, replays and checkpoints."""

DYNAMICS = f"{RUN}/dynamics"
PROBED = settings.dynamics.benchmark or next(iter(JUDGED or BENCHMARKS), None)  # the benchmark of the probes
PROBE_JUDGE = settings.benchmarks[PROBED].judge if PROBED else None
PIECES = numbers(settings.dynamics.shards)


def examined_arms():
    """Return the arms of dynamics.arms, or the first of each objective without replay and the first with replay.

    An arm without a loss of images has no terms.
    """
    kinds = {}
    for name, arm in settings.arms.items():
        if arm.replay_by == "self" and not settings.arm_pairs(name).matched and settings.arm_train(name).image_weight:
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


def clip_files(wildcards):
    """Return the files of the CLIP of dynamics.clip, if there is one."""
    from stages.dynamics import embed

    try:
        return embed.clip_files(settings.dynamics.clip) if settings.dynamics.clip else []
    except UserError as error:
        raise WorkflowError(f"{names}: dynamics.clip: {error}")


def training_verdicts():
    """Return an external judge's verdicts on training candidates, which only measure."""
    folder, named = f"verdicts/{PROBE_JUDGE}", [("base", "train"), *((name, "replay") for name in examined_replays())]
    return [path for node, images in named for path in shard_files(node, folder, images)] if PROBE_JUDGE else []


def proxy_inputs():
    """Return the inputs of the claims that need neither exact terms nor followed trainings."""
    return {
        "chosen": [f"{DYNAMICS}/probes.parquet", f"{DYNAMICS}/rows.parquet"],
        "proxies": expand(f"{DYNAMICS}/{{kind}}/{{shard}}.parquet", kind=["embeddings", "sketches"], shard=PIECES),
        "scores": shard_files("base", "scores", PROBED),
        "scores_of_base": [path for arm in examined_arms() for path in shard_files(arm, "scores-of-base", PROBED)],
        "verdicts": shard_files("base", f"verdicts/{PROBE_JUDGE}", PROBED) if PROBE_JUDGE else [],
        "pairs": [f"{selection_folder(arm)}/pairs.parquet" for arm in examined_arms()],
    }


def dynamics_settings(stage, without=("shards", "memory")):
    return read_by(stage, settings.dynamics, without=without)


def dynamics_training(stage):
    """Return the settings of training that a stage reads: what is trained, and what the rows of each examined arm minimise."""
    arms = dict.fromkeys([*examined_arms(), *(REPLAYS[name].node.arm for name in examined_replays())])
    sections = [settings.train, *map(settings.arm_train, arms)]
    return [read_by(stage, section, without=WITHOUT_OUTCOME) for section in sections]


def followed_arms():
    """Return the examined arms whose training can be followed: those without replay that train plainly."""
    arms = [arm for arm in examined_arms() if not settings.arms[arm].replay_epochs]
    plain = ("lora_rank", "judge_anchor_weight", "prompt_dropout")
    return [arm for arm in arms if not any(getattr(settings.arm_train(arm), key) for key in plain)]


def term_nodes():
    """Return the checkpoints at which terms are taken: the base model and those that replay."""
    return list(dict.fromkeys(["base", *(REPLAYS[name].draws for name in examined_replays())]))


def dynamics_minutes(work):
    """Return a time limit. A derivative along a direction takes about as long as a gradient, and both three judgements."""
    chosen = settings.dynamics
    each = chosen.alternatives + 4  # of a probe with all that is asked about it
    images = {
        "terms": chosen.probes * each / len(PIECES) + chosen.rows,
        "steps": 8 * len(chosen.step_sizes) * chosen.step_probes * each,
        "follow": 100 * chosen.segments * (chosen.images + chosen.probes * each),
        "embed": prompt_count("train") * settings.generate.candidates / len(PIECES),
        "sketch": (chosen.probes + 2 * chosen.rows) / len(PIECES),
    }[work]
    seconds = 3 * cost.SECONDS["judge"] * images
    return lambda wildcards, attempt: attempt * int(30 + seconds * gigabytes(wildcards.get("node", "base")) / 60)
