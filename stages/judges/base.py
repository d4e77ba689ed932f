"""The interface of an external judge: it looks at images and says whether they match their prompts.

A kind of judge is a module in this folder with a `JudgeKind`, registered by name in `stages/judges/__init__.py`. The
configuration's section `judges` names judges and gives each a kind and its settings; a benchmark refers to them by name.
Judges only measure. The exception is a control: an arm with `pairs.filter: oracle` selects by a judge's verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.common.settings import Model, Section


class JudgeSettings(Section):
    """The settings that all kinds of judges share. A kind adds its own and narrows `kind` to its name with Literal."""

    kind: str

    def stands_in(self) -> str:
        """Return what the judge is, if it is not its benchmark's original scorer. The words stand below every table."""
        return ""

    def outcome(self) -> dict[str, Any]:
        """Return the settings that a verdict depends on.

        A kind leaves out those that say where files are (their content counts, see `JudgeKind.files`) or how fast it runs.
        """
        return self.model_dump()


@dataclass(frozen=True)
class Item:
    """One image to judge.

    candidate_id: the image's id. prompt: its row of the prompt manifest, with prompt, category and metadata.
    image: uint8 `[height, width, 3]`.
    """

    candidate_id: str
    prompt: dict[str, Any]
    image: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What a judge says about one image.

    matches: whether the image matches the prompt; None when the judge gave no readable verdict. Unreadable verdicts are
        counted apart, never as wrong. The judge itself applies its threshold, where it has one; nobody cuts a score again.
    score: a graded score in [0, 1], for judges that have one. Gen. averages it instead of the verdict. A judge that only
        grades leaves `matches` empty: it can measure Gen., and nothing that compares verdicts.
    answer: the judge's own words, where it has any.
    reason: why the image does not match, as the name of a kind of error, for judges that know it. The judge report measures the
        model's own judge for each reason separately, so a judge should have few of them.
    """

    matches: bool | None
    score: float | None = None
    answer: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"a judge gave the score {self.score}; scores are between 0 and 1")

    @property
    def grade(self) -> float | None:
        """The score, or where there is none the verdict as 1 or 0. None when neither could be read."""
        if self.score is not None:
            return self.score
        return None if self.matches is None else float(self.matches)


Judge = Callable[[Sequence[Item]], list[Verdict]]


@dataclass(frozen=True)
class JudgeKind:
    """settings: the kind's settings, a subclass of JudgeSettings.
    open: from an instance of these settings to a function that judges a batch of items and returns as many verdicts, in the
        same order. It loads whatever the judge needs, once. Raises UserError with file, field and remedy.
    files: from the settings to the files that the judge depends on, which the workflow watches.
    uses: from the settings to the registered families or judges that the judge is built on, such as "FAMILIES[janus]"
        (`stages.common.registry.entry`). Their code counts as its own.
    runs_on: for judges that are models, from the settings to the device, the type of the weights, and the number of processes
        that share a shard's batches, one GPU each. The workflow asks for these GPUs and for the environment with torch.
    batch_size: images that are judged and kept at a time; a killed stage continues after its last batch.
    from_answer: for kinds whose answers hold what was measured, a function from the settings, a prompt's row and the answer of
        an earlier verdict to the verdict under these settings, without the image and without a model. Judges that differ in
        nothing else than `rules` and `threshold` share their answers then (`stages.tools.rescoring`). It raises ValueError on
        text of another form.
    """

    settings: type[JudgeSettings]
    open: Callable[[Any], Judge]
    files: Callable[[Any], list[str]] = lambda settings: []
    uses: Callable[[Any], list[str]] = lambda settings: []
    runs_on: Callable[[Any], Model] | None = None
    batch_size: int = 1024
    from_answer: Callable[[Any, dict[str, Any], str], Verdict] | None = None
