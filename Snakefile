"""selfgap turns the gap between how well a unified model draws and how well it judges into training data.

prompts -> candidates -> scores -> pairs -> schedule -> checkpoint, with a replay of the discard pool in between, then
evaluation and report. `snakemake --cores 2` runs config.yaml. `--configfile FILE [FILE ...]` runs other configurations; each
file overrides those before it. Every rule calls `python -m stages.<name>`. As parameters it has a fingerprint of the code that
can change its result and exactly the settings that it reads, so it re-runs when one of those changes, and only then.
"""

from snakemake.utils import min_version

min_version("9.0")

if not workflow.configfiles:

    configfile: "config.yaml"


include: "workflow/rules/config.smk"
include: "workflow/rules/paths.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/session.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/candidates.smk"
include: "workflow/rules/scores.smk"
include: "workflow/rules/rescore.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/audit.smk"


if settings.arms:  # without arms, models are audited and nothing is trained

    include: "workflow/rules/pairs.smk"
    include: "workflow/rules/controls.smk"
    include: "workflow/rules/training.smk"
    include: "workflow/rules/replay.smk"
    include: "workflow/rules/report.smk"
    include: "workflow/rules/dynamics_paths.smk"
    include: "workflow/rules/dynamics.smk"


rule all:
    default_target: True
    input:
        final_outputs(),
    localrule: True


rule audit:
    """Audit models side by side before any training, and say whether to train: those of the section audit, or the base model."""
    input:
        lambda wildcards: audit_files(),
    localrule: True


rule precision:
    """Collect the external judge's verdicts on the training images, which measure the selection's precision only."""
    input:
        lambda wildcards: precision_files(),
    localrule: True


onstart:
    cancel_orphans()
    write_jobs(anew=write_run_config())


onsuccess:
    show_summary()


onerror:
    show_status()
