"""How the images of a benchmark were drawn and judged, in words. Scores without this cannot be compared."""

from __future__ import annotations

from typing import Any

from stages.common.config import Config
from stages.families import describe

# Where and how fast a judge runs, which changes no verdict.
RUNNING = {"device", "workers", "batch_size", "concurrency", "timeout", "retries", "answers", "key_variable"}


def listed(fields: dict[str, Any], prefix: str = "") -> list[str]:
    """Return settings as `key value`, those of a section within another one with both names, as in `model.checkpoint`."""
    found = []
    for key, value in fields.items():
        if isinstance(value, dict):
            found += listed(value, f"{prefix}{key}.")
        elif key not in RUNNING and value not in (None, "", [], {}):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            found.append(f"{prefix}{key} {text}")
    return found


def drawing(config: Config) -> str:
    """Return the models and how they draw."""
    named = ", ".join(f"{name} {checkpoint}" for name, checkpoint in config.untrained().items())
    settings = ", ".join(listed(config.sampling().model_dump())) or "no settings"
    return f"Checkpoints of the family {config.model.family}: {named}. Sampling: {settings}; seed {config.seed}."


def asking(config: Config) -> str:
    """Return how the models judge images themselves."""
    score, family = config.score, describe(config.model.family)
    read = "its generated answer" if score.mode == "answer" else f"yes from p(yes) {score.verdict_threshold:g}"
    return f"A model's own verdict: {read}, to the question: {score.question or family.question}"


def judging(config: Config, name: str) -> str:
    """Return a judge's name with its kind, checkpoints and other settings on which verdicts depend."""
    return f"{name} ({', '.join(listed(config.judge(name).model_dump()))})"


def stand_ins(config: Config, name: str) -> list[str]:
    """Return a sentence for each kind of judge of a benchmark that is not the benchmark's own scorer."""
    found: dict[str, list[str]] = {}
    for judge in config.benchmark_judges(name):
        if text := config.judge(judge).stands_in():
            found.setdefault(text, []).append(judge)
    return [f"Not the benchmark's own scorer: {', '.join(names)}: {text}." for text, names in found.items()]


def benchmark(config: Config, name: str) -> str:
    """Return how a benchmark was drawn and judged, and which of its scorers are not its own."""
    chosen, scorers = config.benchmarks[name], config.scorers(name)
    count = f" (count {chosen.prompts.count})" if chosen.prompts.count else ""
    judge = f"judge {judging(config, chosen.judge)}" if chosen.judge else "no external judge, so only Non. is measured"
    scored = [f"Gen. of {category} by {judging(config, judge)}" for category, judge in scorers.items()]
    scored += [f"second Gen. of {category} by {judging(config, judge)}" for category, judge in chosen.second_scorers.items()]
    images = f"{chosen.images_per_prompt} images for each prompt of {chosen.prompts.source}{count}"
    return " ".join([f"{name}: {'; '.join([images, judge, *scored])}.", *stand_ins(config, name)])


def understanding(config: Config, name: str) -> str:
    """Return what an understanding benchmark asks."""
    return f"{name}: {', '.join(listed(config.understanding[name].model_dump()))}."


def whole(config: Config) -> list[str]:
    """Return everything above: the parameter by which the workflow notices that the tables must say something else."""
    found = [drawing(config), asking(config)]
    found += [benchmark(config, name) for name in config.benchmarks]
    return found + [understanding(config, name) for name in config.understanding]
