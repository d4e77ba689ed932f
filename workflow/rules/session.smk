"""Actions at the start and at the end of a run. None of them takes place when the workflow is only parsed."""

from stages.common.files import whole_file
from stages.tools import interrupted
from stages.tools.gpus import gpu_is_here
from stages.tools.status import report as status_report


def around_execution():
    """Let Snakemake remove stale locks and record itself before it takes its lock, and remove its record when it ends.

    `onstart` would be too late, since the lock is taken and environments are made before. Doing it while the workflow is parsed
    would be too early, because --list-rules and dry runs parse it too, and because the executor is not known yet. Snakemake
    also executes the workflow within each job; that is not a run of its own.
    """
    execute, unlock = workflow.execute, workflow.unlock

    def executed(*arguments, **keywords):
        executor = keywords["executor_plugin"].common_settings
        if executor.dryrun_exec or not workflow.is_main_process:
            return execute(*arguments, **keywords)
        limit_gpu_jobs(executor.local_exec)
        interrupted.release_stale_locks(Path("."))
        record = interrupted.write_owner(Path("."), settings.run)
        try:
            return execute(*arguments, **keywords)
        finally:
            record.unlink(missing_ok=True)

    def unlocked():
        unlock()
        interrupted.forget_owners(Path("."))

    workflow.execute, workflow.unlock = executed, unlocked


def limit_gpu_jobs(local):
    """On a machine of its own, let one job with GPUs run at a time. It uses the GPUs that it sees.

    Snakemake would otherwise start as many of them as it has cores, all on the first GPU. `--resources gpu=N` states another
    limit. local: whether jobs run on this machine, and not on a cluster.
    """
    global one_gpu_job
    needed = [GPUS, *(gpus_of(model_of_judge(name)) for name in GPU_JUDGES)]
    one_gpu_job = local and any(needed) and "gpu" not in workflow.global_resources and gpu_is_here()
    if one_gpu_job:
        workflow.register_resource("gpu", 1)


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
        print(status_report(Path(RUN).absolute()))


around_execution()
