"""Which judges need not look at images, because another judge of the run has already measured what they score.

Two judges of a kind with `from_answer` (stages/judges/base.py) that differ in nothing but their rules or their threshold, such
as `objects` and `objects-upstream` of the presets, see the same boxes. So the second one's verdicts are computed from the
answers of the first one's, without a model and without a GPU.
"""

from __future__ import annotations

from typing import Any

from stages.common.config import Config
from stages.judges import judge_kind

# What answers do not depend on: how they are scored, and where and how fast they were made.
FREE = {"rules", "threshold", "device", "workers", "batch_size"}


def measuring(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the settings on which a judge's answers depend, also within the judges that it is made of."""
    return {key: measuring(value) if isinstance(value, dict) else value for key, value in fields.items() if key not in FREE}


def looking(config: Config, benchmark: str) -> list[str]:
    """Return the judges that look at a benchmark's images, for its metrics or for an audit."""
    return [*config.benchmark_judges(benchmark), *config.audit.judges]


def seen(config: Config, benchmark: str, judge: str) -> list[str] | None:
    """Return the categories of a benchmark whose images a judge sees; None if it sees all images.

    A judge that only scores some categories sees their images, unless an audit compares it with other judges on all images.
    """
    if judge == config.benchmarks[benchmark].judge or judge in config.audit.judges:
        return None
    return config.scored_categories(benchmark, judge) or None


def covers(config: Config, benchmark: str, first: str, second: str) -> bool:
    """Return whether the first judge sees all images of a benchmark that the second one sees."""
    if first not in looking(config, benchmark):
        return False
    of_first, of_second = seen(config, benchmark, first), seen(config, benchmark, second)
    return of_first is None or (of_second is not None and set(of_second) <= set(of_first))


def source_of(config: Config, judge: str) -> str | None:
    """Return the judge of the run from whose answers a judge's verdicts are computed; None if it looks at images itself."""
    chosen = config.judge(judge)
    places = [name for name in config.benchmarks if judge in looking(config, name)]
    if judge_kind(chosen.kind).from_answer is None or not places:
        return None
    asked = measuring(chosen.model_dump())
    for first, settings in config.judges.items():
        if first == judge:  # only judges before it, so that no two wait for each other
            return None
        if measuring(settings.model_dump()) == asked and all(covers(config, place, first, judge) for place in places):
            return first
    return None
