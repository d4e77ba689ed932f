"""selfgap: a unified model's internal gap as training data.

prompts -> candidates -> scores -> pairs -> schedule -> checkpoint, with the discard pool drawn and judged again in between,
then evaluation and report. `snakemake --cores 2` runs config.yaml; `--configfile FILE` runs another configuration instead of
it. Every rule is a shell line around `python -m stages.<name>`, carries the code it imports and exactly the settings it
reads as params, and so runs again when one of those changes, and only then.
"""

from snakemake.utils import min_version

min_version("9.0")

if not workflow.configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/prompts.smk"
include: "workflow/rules/candidates.smk"
include: "workflow/rules/scores.smk"
include: "workflow/rules/pairs.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/replay.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        f"{RUN}/summary.csv",
        f"{RUN}/contact_sheet.png",
        waiting_pools(),
    localrule: True


rule audit:
    """The external judge on the training images too: how precise the selection was. It measures; nothing trains on it."""
    input:
        shard_files("base", "verdicts", "train"),
        [path for replay in replay_nodes() for path in shard_files(replay, "verdicts", "replay")],
    localrule: True


onstart:
    write_owner()
    cancel_orphans()
    write_run_config()


onsuccess:
    show_summary()


onerror:
    show_status()
