"""The tokens that are verdicts: every spelling of yes and no that is a single token."""

from __future__ import annotations

from typing import Any

from stages.common.errors import UserError

YES = ("1", " 1", "yes", " yes", "Yes", " Yes", "YES", " YES")
NO = ("0", " 0", "no", " no", "No", " No", "NO", " NO")


def single_tokens(tokenizer: Any, spellings: tuple[str, ...]) -> list[int]:
    """Return the ids of those spellings that the tokenizer writes as one token, sorted."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    return sorted({row[0] for row in rows if len(row) == 1 and row[0] != tokenizer.unk_token_id})


def require_verdicts(yes: Any, no: Any) -> None:
    """Raise UserError if there is no token for yes, or none for no.

    A family calls it where it reads their probabilities, because a model that draws or answers in words needs no such token.
    """
    if not (len(yes) and len(no)):
        raise UserError(
            "the checkpoint's tokenizer has no single token for yes or for no; set score.mode of this model to answer, and "
            "train.judge_anchor_weight to 0"
        )
