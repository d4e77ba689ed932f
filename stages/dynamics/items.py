"""What several commands of learning dynamics do with probes and rows, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from stages.common.errors import UserError

Item = TypeVar("Item")


def shard_of(rows: Sequence[Item], text: str) -> list[Item]:
    """Return every n-th row from the k-th on for a shard "k/n"; raises UserError on any other text."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise UserError(f"--shard {text}: give it as 0/2 and 1/2, the shard's number from 0 and how many there are")
    return list(rows[int(number) :: int(count)])


def similarity(first: str, second: str) -> float:
    """Return the share of words that two prompts have in common, of all their words (Jaccard)."""
    one, two = set(first.lower().split()), set(second.lower().split())
    return len(one & two) / max(1, len(one | two))
