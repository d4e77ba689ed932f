"""The paths of a run's results, and the functions that return the inputs of rules.

results/<run>/prompts/<set>.parquet                                  set: train, or the name of a benchmark
results/<run>/<node>/candidates/<set>/<shard>.parquet and .tar       node: base, a baseline, or a trained checkpoint
results/<run>/<node>/scores/<set>/<shard>.parquet                    the node's verdicts on its own images
results/<run>/<node>/scores-of-base/<benchmark>/<shard>.parquet      the node's verdicts on the base model's images
results/<run>/<node>/verdicts/<judge>/<set>/<shard>.parquet          an external judge's verdicts on the node's images
results/<run>/<node>/metrics/<benchmark>.parquet                     the metrics with their intervals
results/<run>/<node>/answers/<name>.parquet                          the answers to an understanding benchmark
results/<run>/<node>/understanding/<name>.parquet                    the metrics of these answers
results/<run>/<arm>/pairs.parquet, discard.parquet                   arms with equal selections share the first arm's
results/<run>/<node>/schedule.parquet, checkpoint/, training.parquet, replay/
results/<run>/<node>-by-<who>/replay/                                the replay of a control, with its candidates and scores
results/<run>/tables/                                                the result tables as CSV, Markdown and LaTeX
results/<run>/pages/, report.html                                    gallery, report and review
results/<run>/<model>/config.yaml, candidates/, scores/, ...         a model that is only audited, laid out like a node
results/<run>/audit/                                                 the audit of all these models
"""

import shlex
from hashlib import sha256

# Models


def config_of(node):
    """Return the configuration file with which a node draws and judges: the run's, or that of a model that is only audited."""
    return f"{RUN}/{node}/config.yaml" if node in AUDITED else CONFIG


def settings_of(node):
    return AUDITED.get(node, settings)


def uses_of(node):
    """Return the registry entries that drawing and judging by a node use."""
    return [entry("FAMILIES", settings_of(node).model.family)]


def checkpoint_files(node, role):
    """Return the files on which the results of a node's model in a role depend: its weights, tokenizer and image processor."""
    if node not in AUDITED and model_of(node, role) not in UNTRAINED:
        return [f"{RUN}/{model_of(node, role)}/checkpoint/{FAMILY.trained_file}"]
    folder, family = Path(checkpoint_folder(node, role)), describe(settings_of(node).model.family)
    return [str(path) for path in [*family.files(folder, role), *preprocessing_files(folder)]]


def checkpoint_folder(node, role="draw"):
    if node in AUDITED:
        return AUDITED[node].model.checkpoint
    model = model_of(node, role)
    return UNTRAINED.get(model) or f"{RUN}/{model}/checkpoint"


def model_of(node, role):
    """Return the checkpoint that draws or judges in a node's folder: in a control of replay, that can be the base model."""
    if node not in REPLAYS:
        return node
    return REPLAYS[node].judges if role == "judge" else REPLAYS[node].draws


def parent_checkpoint(wildcards):
    parent = NODES[wildcards.node].parent
    return checkpoint_files(parent, "train") if parent else []


# Prompts


def chosen_prompts(name):
    return cost.chosen_prompts(settings, name)


def suite_uses(name):
    """Return the registry entry that a set of prompts uses."""
    return [entry("SUITES", chosen_prompts(name).source)]


def prompt_files(wildcards):
    from stages.suites import open_suite

    chosen = chosen_prompts(wildcards.set)
    return [*open_suite(chosen.source).files(chosen), *chosen.exclude]


def prompt_manifest(wildcards):
    """Return the prompts of a set; for a replay, those of the discard pool."""
    if wildcards.set == "replay":
        return f"{RUN}/{wildcards.node}/replay/pool.parquet"
    return f"{RUN}/prompts/{wildcards.set}.parquet"


# Candidates, scores and verdicts


def images_per_prompt(wildcards):
    if wildcards.set in BENCHMARKS:
        return settings.benchmarks[wildcards.set].images_per_prompt
    if wildcards.set == "replay":
        return settings.arms[REPLAYS[wildcards.node].node.arm].candidates or settings.generate.candidates
    return settings.generate.candidates


def compared_with(node):
    """Return the node with which the metrics compare a node: base, or for a model that is only audited itself."""
    return node if node in AUDITED else "base"


def numbers(count):
    """Return the numbers of so many pieces, as their files have them."""
    return [f"{number:04d}" for number in range(count)]


def shard_files(node, kind, images):
    """Return the manifests of all shards. kind: candidates, scores, scores-of-base, or verdicts/<judge>."""
    return expand(f"{RUN}/{node}/{kind}/{images}/{{shard}}.parquet", shard=numbers(settings.shards(images)))


def shard_range(node, kind, images):
    """Return the same files in one word, {0000..0199}, which bash expands: its command lines are limited to 128 KiB."""
    return f"{RUN}/{node}/{kind}/{images}/{{0000..{settings.shards(images) - 1:04d}}}.parquet"


def candidate_manifest(wildcards):
    """Return the manifest of the images to judge: the node's own, or the base model's."""
    node = "base" if wildcards.get("scores") == "scores-of-base" else wildcards.node
    return f"{RUN}/{node}/candidates/{wildcards.set}/{wildcards.shard}.parquet"


def image_shard(wildcards):
    return str(Path(candidate_manifest(wildcards)).with_suffix(".tar"))


def verdict_files(node, benchmark):
    """Return the verdicts of all external judges of a benchmark."""
    return [
        path for judge in settings.benchmark_judges(benchmark) for path in shard_files(node, f"verdicts/{judge}", benchmark)
    ]


def category_options(wildcards):
    """Return the option that names the categories of a judge that is only a scorer for some of them; empty if it judges all."""
    if wildcards.set not in BENCHMARKS:
        return []
    names = rescoring.seen(settings, wildcards.set, wildcards.judge)
    return [f"--categories {shlex.join(names)}"] if names else []


def judge_settings(name):
    """Return the settings of a judge that its code reads and on which its verdicts depend."""
    chosen = settings.judge(name)
    read = read_by("stages.judge", chosen, uses=judge_uses(name))
    return {key: value for key, value in chosen.outcome().items() if key in read}


def judge_files(wildcards):
    chosen = settings.judge(wildcards.judge)
    return judge_kind(chosen.kind).files(chosen)


# Understanding


def understanding_settings(wildcards):
    """Return the settings of an understanding benchmark that its code reads and on which the answers depend."""
    chosen, name = settings.understanding[wildcards.understanding], wildcards.understanding
    read = read_by("stages.understand", chosen, uses=[*USES, *understanding_uses(name)])
    return {key: value for key, value in chosen.outcome().items() if key in read}


def understanding_files(wildcards):
    chosen = settings.understanding[wildcards.understanding]
    return understanding_kind(chosen.kind).files(chosen)


# Selection


def selecting(arm):
    """Return the folder whose verdicts select an arm's data: the model's own scores, or for a control an oracle's verdicts."""
    oracle = settings.arm_pairs(arm).oracle
    return f"verdicts/{oracle}" if oracle else "scores"


def oracle_verdicts(arm):
    """Return the verdicts that select an arm's data, or nothing if the truth does not select."""
    return shard_files("base", selecting(arm), "train") if settings.arm_pairs(arm).oracle else []


def selection_settings(arm, stage="stages.pairs"):
    """Return exactly the settings that an arm's selection reads."""
    chosen = settings.arms[arm]
    return {
        "objective": chosen.objective,
        "candidates": chosen.candidates,
        "pairs": read_by(stage, settings.arm_pairs(arm)),
        "seed": settings.seed,
    }


def selection_folder(arm):
    """Return the folder that holds an arm's selection."""
    return f"{RUN}/{arm_tree.selection_owner(settings, arm)}"


# Replay


def pool_before(wildcards):
    """Return the discard manifest before a replay: that of the arm's previous replay, or that of the selection."""
    replay = REPLAYS[wildcards.node]
    if replay.before:
        return f"{RUN}/{replay.before[-1]}/replay/waiting.parquet"
    return f"{selection_folder(replay.node.arm)}/discard.parquet"


def selected_before(wildcards):
    """Return the pairs of an arm before a replay in which nothing is drawn."""
    replay = REPLAYS[wildcards.node]
    return [
        f"{selection_folder(replay.node.arm)}/pairs.parquet",
        *(f"{RUN}/{name}/replay/pairs.parquet" for name in replay.before),
    ]


def replay_scores(wildcards):
    return shard_files(wildcards.node, selecting(REPLAYS[wildcards.node].node.arm), "replay")


def drawn_replays():
    """Return the names of all replays in which something is drawn."""
    return [replay.name for replay in REPLAYS.values() if replay.draws]


def waiting_pools():
    return [f"{RUN}/{replay}/replay/waiting.parquet" for replay in drawn_replays()]


# Training


def training_settings(node):
    """Return exactly the settings on which a node's weights depend."""
    arm = NODES[node].arm
    train = settings.arm_train(arm)
    read = read_by("stages.train", train, without=WITHOUT_OUTCOME)
    asked = {"score": read_by("stages.train", settings.score, without=["batch_size"])} if train.judge_anchor_weight else {}
    return {"objective": settings.arms[arm].objective, "seed": settings.seed, **read, **asked}


def pairs_name(node):
    """Return the name of the pairs manifest. DPO trains on pairs with reference log-probabilities."""
    return "reference.parquet" if settings.arms[NODES[node].arm].objective == "dpo" else "pairs.parquet"


def first_pairs(wildcards):
    return f"{selection_folder(NODES[wildcards.node].arm)}/{pairs_name(wildcards.node)}"


def replayed_pairs(wildcards):
    return [f"{RUN}/{replay}/replay/{pairs_name(wildcards.node)}" for replay in NODES[wildcards.node].replays]


def replay_arguments(wildcards):
    epochs = [REPLAYS[replay].node.epoch for replay in NODES[wildcards.node].replays]
    return [f"--replayed {epoch} {path}" for epoch, path in zip(epochs, replayed_pairs(wildcards))]


def training_candidates(wildcards):
    replays = [replay for replay in NODES[wildcards.node].replays if REPLAYS[replay].draws]
    return shard_files("base", "candidates", "train") + [
        p for name in replays for p in shard_files(name, "candidates", "replay")
    ]


def anchor_scores(wildcards):
    """Return the base model's scores of its own candidates for arms with the judge anchor, otherwise nothing."""
    anchored = settings.arm_train(NODES[wildcards.node].arm).judge_anchor_weight
    return shard_files("base", "scores", "train") if anchored else []


def reference_candidates(wildcards):
    """Return the candidates of the pairs. The wildcard owner is an arm, or <replay>/replay."""
    owner = Path(wildcards.owner)
    redrawn = owner.name == "replay" and REPLAYS[str(owner.parent)].draws
    return shard_files(str(owner.parent), "candidates", "replay") if redrawn else shard_files("base", "candidates", "train")


def reference_epochs(wildcards):
    owner = Path(wildcards.owner)
    arm = REPLAYS[str(owner.parent)].node.arm if owner.name == "replay" else wildcards.owner
    return arm_tree.reference_epochs(settings, arm, FAMILY.likelihood)


def continued_work(wildcards):
    """Return the argument that names the training that this one continues."""
    parent = NODES[wildcards.node].parent
    return f"--continue {RUN}/{parent}/work" if parent else ""


# Audit


def audit_judges(benchmark):
    """Return the judges of a benchmark whose verdicts the audit reads: the external judge, and those of audit.judges."""
    judge = settings.benchmarks[benchmark].judge
    return list(dict.fromkeys([*([judge] if judge else []), *settings.audit.judges]))


def audited_folders(kind):
    """Return the benchmark, the model and the folder of all scores, or of all verdicts, that the audit reads."""
    return [
        (name, model, folder)
        for name in BENCHMARKS
        for model in TO_AUDIT
        for folder in (["scores"] if kind == "scores" else [f"verdicts/{judge}" for judge in audit_judges(name)])
    ]


def audited_files(kind):
    return [path for name, model, folder in audited_folders(kind) for path in shard_files(model, folder, name)]


def measured_speeds():
    """Return the files from which the audit's GPU hours follow, if a device is named: otherwise none is read."""
    return [str(path) for path in sorted(cost.SPEEDS.glob("*.json"))] if settings.audit.device else []


def audited_arguments(kind, folders):
    """Return the arguments that give a stage these files."""
    return [f"--{kind} {name} {model} {shard_range(model, folder, name)}" for name, model, folder in folders]


def audit_files():
    """Return everything that an audit writes."""
    if not BENCHMARKS:
        raise WorkflowError("audit: the section benchmarks is empty, so there is nothing to audit; add a benchmark")
    compared = any(audit_judges(name) for name in BENCHMARKS)
    tables = ["non", "judge", "forecast", *(["agreement"] if compared else [])]
    of_judges = [f"{AUDIT}/judge_report.parquet", f"{AUDIT}/judge_report.png"] if JUDGED else []
    others = [f"{AUDIT}/{name}" for name in ("audit.parquet", "forecast.parquet", "verdict.md", "audit.png")]
    return [*of_judges, *others, *expand(f"{AUDIT}/{{name}}.{{ending}}", name=tables, ending=["csv", "md", "tex"])]


def precision_files():
    """Return the external judge's verdicts on all training images."""
    if not JUDGED:
        raise WorkflowError(
            "precision: no benchmark has a judge, whose verdicts this target collects; set benchmarks.<name>.judge"
        )
    judge = settings.benchmarks[JUDGED[0]].judge
    drawn = [("base", "train"), *((replay, "replay") for replay in drawn_replays())]
    return [path for node, images in drawn for path in shard_files(node, f"verdicts/{judge}", images)]


# Report


def metrics_files():
    """Return the metrics of base, baselines and arms on all benchmarks, then those on understanding benchmarks."""
    drawn = [f"{RUN}/{node}/metrics/{benchmark}.parquet" for benchmark in BENCHMARKS for node in EVALUATED]
    return drawn + [f"{RUN}/{node}/understanding/{name}.parquet" for name in UNDERSTANDING for node in EVALUATED]


def table_files():
    """Return the result tables, each in three formats."""
    names = [*(["generation", "by_subtask"] if BENCHMARKS else []), *(["understanding"] if UNDERSTANDING else [])]
    return expand(f"{RUN}/tables/{{name}}.{{ending}}", name=names, ending=["csv", "md", "tex"])


def every_metrics_file():
    """Return the metrics of all checkpoints, also those within the arms, on all benchmarks."""
    return [f"{RUN}/{node}/metrics/{benchmark}.parquet" for benchmark in BENCHMARKS for node in ["base", *NODES]]


def shown_pairs():
    """Return the pairs of the first arm of each objective."""
    first = {arm.objective: name for name, arm in reversed(settings.arms.items())}
    return [f"{selection_folder(name)}/pairs.parquet" for name in first.values()]


def shown_verdicts():
    """Return the verdicts shown on the contact sheet, which are those of the first benchmark's judge."""
    judge = settings.benchmarks[BENCHMARKS[0]].judge
    return [f"{RUN}/{node}/verdicts/{judge}/{BENCHMARKS[0]}/0000.parquet" for node in EVALUATED] if judge else []


def reported_sets():
    """Return the sets and checkpoints of the judge report with the folders of their verdicts, which may be None.

    These are the images of all benchmarks with an external judge, and the base model's training candidates. The candidates have
    verdicts only if a control selects by them and the same judge judges the first of these benchmarks.
    """
    judge = settings.benchmarks[JUDGED[0]].judge
    found = [(name, node, f"verdicts/{settings.benchmarks[name].judge}") for name in JUDGED for node in EVALUATED]
    return [*found, ("train", "base", f"verdicts/{judge}" if judge in ORACLES else None)]


def reported_files(kind):
    """Return the scores or the verdicts that the judge report reads."""
    folders = [(name, node, "scores" if kind == "scores" else verdicts) for name, node, verdicts in reported_sets()]
    return [path for name, node, folder in folders if folder for path in shard_files(node, folder, name)]


def reported_arguments(kind):
    """Return the arguments that give the judge report these files."""
    folders = [(name, node, "scores" if kind == "scores" else verdicts) for name, node, verdicts in reported_sets()]
    return [f"--{kind} {name} {node} {shard_range(node, folder, name)}" for name, node, folder in folders if folder]


def template_files():
    """Return the templates and assets of the pages, each with a hash: a parameter like the fingerprint of code."""
    folder = Path(workflow.basedir) / "stages" / "pages"
    paths = sorted(path for part in ("templates", "assets") for path in (folder / part).iterdir())
    return [f"{path.relative_to(workflow.basedir)}@{sha256(path.read_bytes()).hexdigest()[:8]}" for path in paths]


def shown_files():
    """Return what the pages are made from, as far as it is not made from one another: all images have been counted in metrics."""
    judge_report = [f"{RUN}/judge_report.parquet", f"{RUN}/judge_report.png"] if JUDGED else []
    curves = [f"{RUN}/learning_curves.png"] if BENCHMARKS and settings.evaluate.every_checkpoint else []
    trained = [] if BENCHMARKS else [path for arm in settings.arms for path in checkpoint_files(arm, "draw")]
    return [*metrics_files(), *table_files(), *judge_report, *curves, *trained, *waiting_pools()]


def final_outputs():
    """Return the final outputs of a run: pages, summary and pictures or, without a benchmark, the arms' checkpoints and pages.

    A configuration without arms only audits.
    """
    if not settings.arms:
        return audit_files()
    summary = [f"{RUN}/summary.csv"] if BENCHMARKS or UNDERSTANDING else []
    sheet = [f"{RUN}/contact_sheet.png"] if BENCHMARKS else []
    return [*summary, *sheet, *shown_files(), f"{RUN}/report.html", f"{RUN}/pages"]
