"""Actions at the start and at the end of a run. None of them takes place when the workflow is only parsed."""

from stages.common.files import whole_file
from stages.tools import interrupted
from stages.tools.status import report as status_report


def at_start(function):
    """Call a function when Snakemake starts to execute the workflow, before it takes its lock.

    `onstart` would be too late to remove the lock of a killed Snakemake. Doing it while the workflow is parsed would be too
    early, because --list-rules and dry runs parse it too.
    """
    execute = workflow.execute

    def started(*arguments, **keywords):
        if not keywords["executor_plugin"].common_settings.dryrun_exec:
            function()
        return execute(*arguments, **keywords)

    workflow.execute = started


def write_run_config():
    """Write the merged configuration beside its results if it has changed, and return whether it has.

    A model that is only audited draws and judges with a configuration of its own in its folder.
    """
    for model, own in AUDITED.items():
        write_settings(own, Path(config_of(model)))
    return write_settings(settings, Path(CONFIG))


def write_settings(chosen, path):
    import yaml

    text = yaml.safe_dump(chosen.model_dump(), sort_keys=False)
    if path.exists() and path.read_text() == text:
        return False
    try:
        with whole_file(path) as temporary:
            temporary.write_text(text)
    except OSError as error:
        raise WorkflowError(f"{path}: cannot be written ({error.strerror}); check permissions and free space of results/")
    return True


def write_jobs(anew):
    """Write the workflow's jobs to a file for `python -m stages.tools.status`. anew: discard the jobs of earlier calls."""
    jobs = [
        interrupted.Job(job.rule.name, str(job.output[0]), str(job.log[0]))
        for level in workflow.dag.toposorted()
        for job in level
        if job.output and job.log
    ]
    interrupted.write_jobs(Path(RUN), jobs, anew)


def cancel_orphans():
    if left := interrupted.cancel_orphans(Path(".")):
        logger.warning(f"Cancelling SLURM jobs of a former run in this folder: {', '.join(left)}")


def show_summary():
    for name in ("summary", "judge_report", "audit") if settings.arms else ("audit",):
        log = Path(f"{RUN}/logs/{name}.log")
        if log.exists():
            print(log.read_text())


def show_status():
    if Path(CONFIG).exists():
        print(status_report(Path(RUN).resolve()))


at_start(lambda: interrupted.release_stale_locks(Path(".")))
