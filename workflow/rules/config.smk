"""Loads and validates the configuration, and derives the constants that the other rule files use.

settings: the validated configuration (stages/common/config.py). NODES, REPLAYS: the trained checkpoints and the replays
(stages/tools/arms.py).
"""

from pathlib import Path

from snakemake.exceptions import WorkflowError

from stages.common.config import WITHOUT_OUTCOME, validate
from stages.common.errors import UserError
from stages.common.fingerprints import code, read_settings
from stages.common.registry import entry
from stages.families import describe
from stages.families.tools.checkpoints import preprocessing_files
from stages.judges import judge_kind
from stages.tools import arms as arm_tree
from stages.tools import cost, recipe, rescoring
from stages.understanding import understanding_kind

try:
    names = ", ".join(str(path) for path in workflow.configfiles)
    settings = validate(dict(config), names)
    if not settings.arms and not settings.audit.models:
        raise UserError(
            f"{names}: arms is empty, so nothing would be trained; lay your file over a preset "
            "(--configfile configs/janus-pro-7b.yaml mine.yaml), or add arms, as config.yaml does"
        )
    FAMILY = describe(settings.model.family)
    if settings.arms:
        FAMILY.files(Path(settings.model.checkpoint), "draw")  # raises UserError unless it is one of this family
    for model, chosen in settings.audit.models.items():
        try:
            for role in ("draw", "judge"):
                describe(chosen.family).files(Path(chosen.checkpoint), role)
        except UserError as error:
            remedy = str(error).replace("model.checkpoint", f"audit.models.{model}.checkpoint")
            raise UserError(f"{names}: audit.models.{model}: {remedy}") from None
    for baseline, checkpoint in settings.baselines.items():
        try:
            for role in ("draw", "judge"):
                FAMILY.files(Path(checkpoint), role)
        except UserError as error:
            remedy = str(error).replace("model.checkpoint", f"baselines.{baseline}")
            raise UserError(f"{names}: baselines.{baseline}: {remedy}") from None
    NODES, REPLAYS = arm_tree.nodes(settings), arm_tree.replays(settings)
except UserError as error:
    raise WorkflowError(str(error))


def model_identity(chosen):
    """Return everything besides the weights on which a model's results depend. Device and batch sizes are not included."""
    return {"family": chosen.model.family, "dtype": chosen.model.dtype}


USES = [entry("FAMILIES", settings.model.family)]  # the registry entries that drawing, judging and training use
RUN = f"results/{settings.run}"
CONFIG = f"{RUN}/run_config.yaml"
PAPER = str(Path(workflow.basedir) / "stages/paper/results.csv")  # the results of arXiv 2507.16663
BENCHMARKS = list(settings.benchmarks)
JUDGED = [name for name in BENCHMARKS if settings.benchmarks[name].judge]  # those with an external judge
UNDERSTANDING = list(settings.understanding)
AUDITED = {name: settings.audited(name) for name in settings.audit.models}  # models that are only audited, with their settings
UNTRAINED = settings.untrained() if settings.arms else {}  # base and the baselines, with their checkpoints
EVALUATED = [*UNTRAINED, *settings.arms]
AUDIT = f"{RUN}/audit"
TO_AUDIT = settings.to_audit()  # base and the baselines, unless the section audit names models
MATCHED = [arm for arm in settings.arms if settings.arm_pairs(arm).matched]
MODEL = model_identity(settings)
ORACLES = list(dict.fromkeys(filter(None, (settings.arm_pairs(arm).oracle for arm in settings.arms))))
JUDGES = list(
    dict.fromkeys(
        [*ORACLES, *(judge for name in BENCHMARKS for judge in settings.benchmark_judges(name)), *settings.audit.judges]
    )
)
# Judges whose verdicts are computed from the answers of another one, with its name.
SOURCES = {name: source for name in JUDGES if (source := rescoring.source_of(settings, name))}
GPU_JUDGES = [name for name in JUDGES if judge_kind(settings.judge(name).kind).runs_on and name not in SOURCES]
for name in JUDGES:
    try:
        judge_kind(settings.judge(name).kind).files(settings.judge(name))  # raises UserError unless its checkpoint is there
    except UserError as error:
        raise WorkflowError(f"{names}: judges.{name}: {error}")


def read_by(stage, section, without=(), uses=USES):
    """Return the settings of a section that a stage reads, as a rule's parameter: the rule re-runs when one of them changes."""
    read = read_settings(section, stage, mentioned=uses)
    return {key: value for key, value in read.items() if key not in without}


def pattern(names):
    """Return a wildcard constraint that matches exactly these names."""
    return "|".join(name.replace(".", r"\.") for name in names) or "none"


wildcard_constraints:
    arm=pattern(settings.arms),
    node=pattern([*UNTRAINED, *NODES, *REPLAYS, *AUDITED]),
    set=pattern(["train", "replay", *BENCHMARKS]),
    benchmark=pattern(BENCHMARKS),
    understanding=pattern(UNDERSTANDING),
    judge=pattern(JUDGES),
    scores="scores|scores-of-base",
    shard=r"\d{4}",


# A cluster sends SIGTERM to every process of a job. tee must outlive the stage, or the log loses its last lines.
shell.prefix("set -euo pipefail; logged() {{ trap '' TERM; exec tee \"$@\"; }}; ")


def judge_uses(name):
    """Return the registry entries that a judge uses: its kind and, if a model family judges, that family."""
    chosen = settings.judge(name)
    return [entry("JUDGES", chosen.kind), *judge_kind(chosen.kind).uses(chosen)]


def understanding_uses(name):
    """Return the registry entries that an understanding benchmark uses."""
    chosen = settings.understanding[name]
    return [entry("UNDERSTANDING", chosen.kind), *understanding_kind(chosen.kind).uses(chosen)]
