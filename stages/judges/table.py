"""Verdicts from a table that a person or another tool has written: CSV or Parquet with one row for each judged image.

Columns: `candidate_id`, and `verdict` (true or false, 1 or 0, yes or no) or `score` (a number in [0, 1]) or both. Where a row
has only a score, the image matches when the score is at least `threshold`. Images that the table leaves out, and rows with
neither a verdict nor a score, count as unreadable. The column `reason` is optional: a word or two that say why an image does
not match, such as color or count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from stages.common.errors import UserError
from stages.common.settings import Share
from stages.judges.base import Item, Judge, JudgeKind, JudgeSettings, Verdict

WORDS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
EMPTY = ("", "nan", "<na>", "none", "null", "na", "n/a")


class TableJudge(JudgeSettings):
    kind: Literal["table"]
    files: Annotated[list[str], Field(min_length=1)] = Field(
        description="CSV or Parquet files with the columns candidate_id and verdict or score."
    )
    threshold: Share = Field(default=0.5, description="Where only scores are given: an image matches at this score or above.")

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(exclude={"files"})


def open_table(settings: TableJudge) -> Judge:
    """Return a judge that looks images up by their candidate_id."""
    found: dict[str, Verdict] = {}
    for name in settings.files:
        for candidate, verdict in read_table(Path(name), settings.threshold).items():
            if found.setdefault(candidate, verdict) != verdict:
                raise UserError(f"{name}: candidate {candidate} has another verdict in an earlier file; keep one of them")

    def judge(items: Sequence[Item]) -> list[Verdict]:
        return [found.get(item.candidate_id, Verdict(None)) for item in items]

    return judge


def read_table(path: Path, threshold: float) -> dict[str, Verdict]:
    """Return the verdicts of a file by candidate_id. Raises UserError that names the file and the row or column."""
    import pandas

    try:
        frame = pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_csv(path, dtype=str, index_col=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check files of this judge in the section judges") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable CSV or Parquet table ({reason}); write it again") from None
    if "candidate_id" not in frame or not {"verdict", "score"} & set(frame):
        raise UserError(f"{path}: needs the columns candidate_id and verdict or score, but has {', '.join(map(str, frame))}")
    found: dict[str, Verdict] = {}
    for number, row in enumerate(frame.to_dict("records"), 1):
        name = _text(row["candidate_id"])
        if not name:
            raise UserError(f"{path}: row {number} has no candidate_id; give the image that it is about, or remove the row")
        matches = _matches(path, name, row.get("verdict"))
        score = _score(path, name, row.get("score"))
        if matches is None and score is not None:
            matches = score >= threshold
        verdict = Verdict(matches, score, reason=_text(row.get("reason")) or None)
        if found.setdefault(name, verdict) != verdict:
            raise UserError(f"{path}: candidate {name} has two different verdicts; keep one row for each image")
    return found


def _text(value: Any) -> str:
    """Return a cell as text, or nothing for the ways in which CSV and Parquet leave a cell empty."""
    text = str(value).strip()
    return "" if text.lower() in EMPTY else text


def _matches(path: Path, name: str, value: Any) -> bool | None:
    text = _text(value).lower()
    if not text:
        return None
    if text not in WORDS:
        raise UserError(f"{path}: candidate {name}: verdict {value!r} is not true or false, 1 or 0, yes or no")
    return WORDS[text]


def _score(path: Path, name: str, value: Any) -> float | None:
    text = _text(value)
    if not text:
        return None
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(f"{path}: candidate {name}: score {value!r} is not a number between 0 and 1")
    return score


TABLE = JudgeKind(TableJudge, open_table, files=lambda settings: settings.files)
