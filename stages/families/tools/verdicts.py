"""The tokens that are verdicts: every spelling of yes and no that is a single token."""

from __future__ import annotations

from typing import Any

YES = ("1", " 1", "yes", " yes", "Yes", " Yes", "YES", " YES")
NO = ("0", " 0", "no", " no", "No", " No", "NO", " NO")


def single_tokens(tokenizer: Any, spellings: tuple[str, ...]) -> list[int]:
    """Return the ids of those spellings that the tokenizer writes as one token, sorted."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    return sorted({row[0] for row in rows if len(row) == 1 and row[0] != tokenizer.unk_token_id})
