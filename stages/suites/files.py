"""Reading prompts from files: text, GenEval's metadata, or a prompt manifest."""

from __future__ import annotations

import json
from pathlib import Path

from stages.common import manifests
from stages.common.errors import UserError
from stages.suites.base import PromptRow

LONGEST = 4096  # characters of a prompt
# The audit's strata of arXiv 2507.16663.
GENEVAL_DIFFICULTY = {"single_object": "easy", "two_object": "easy", "color_attr": "easy"}


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark. Raises UserError on anything else."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a text file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the files of the prompts") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
        line = data[: error.start].count(b"\n") + 1
        likely = "UTF-16" if wide else "WINDOWS-1252"
        raise UserError(f"{path}: not UTF-8 (line {line}); convert it, for example with iconv -f {likely} -t UTF-8") from None
    if "\0" in text:
        raise UserError(f"{path}: has NUL characters, so it is not UTF-8 text; convert it with iconv -f UTF-16 -t UTF-8")
    if not text.strip():
        raise UserError(f"{path}: holds no prompt; give a file with one prompt on each line")
    return text


def text_lines(path: Path) -> list[str]:
    """Return one prompt for each line. Line ends may be CRLF, the last newline may be missing, empty lines are skipped."""
    lines = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if len(line) > LONGEST:
            raise UserError(f"{path}:{number}: a line of {len(line)} characters; a prompt has at most {LONGEST}")
        if prompt := " ".join(line.split()):
            lines.append(prompt)
    return lines


def geneval_rows(path: Path) -> list[PromptRow]:
    """Return the prompts of GenEval's metadata (djghosh13/geneval, prompts/evaluation_metadata.jsonl).

    Only prompt and tag are read here. Raises UserError with file and line where they are no texts.
    """
    rows: list[PromptRow] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            row: PromptRow = {"prompt": fields["prompt"], "category": fields["tag"]}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a GenEval line (JSON with tag and prompt)") from None
        for key in ("prompt", "tag"):
            if not isinstance(fields[key], str) or not fields[key].strip():
                raise UserError(
                    f"{path}:{number}: {key} is {fields[key]!r}, not a text; correct this line of GenEval's metadata"
                )
        row["metadata"] = json.dumps(fields, sort_keys=True)
        if difficulty := GENEVAL_DIFFICULTY.get(fields["tag"]):
            row["difficulty"] = difficulty
        rows.append(row)
    return rows


def prompts_in(path: Path) -> list[str]:
    """Return the prompts of a file of any of the three kinds, which its ending tells apart."""
    if path.suffix == ".jsonl":
        return [row["prompt"] for row in geneval_rows(path)]
    if path.suffix == ".parquet":
        return [row["prompt"] for row in manifests.read_rows(path, "prompts")]
    return text_lines(path)
