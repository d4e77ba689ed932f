"""Show-o's vocabulary and the layout of its sequences.

Source: training/prompting_utils.py, inference_t2i.py and inference_mmu.py of showlab/Show-o at 45a5a2d. Text comes first in the
vocabulary, then `[PAD]` and the special tokens in the order of SPECIAL, then the image codes, and the mask at the end. The
comment in upstream's configurations names another order, which is not the one that its weights have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stages.common.errors import UserError

PAD = "[PAD]"
SPECIAL = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def add_special_tokens(tokenizer: Any) -> None:
    """Add Show-o's tokens to a text tokenizer, in upstream's order: the pad first."""
    tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.add_tokens(list(SPECIAL))


@dataclass(frozen=True)
class Layout:
    """Makes sequences of ids.

    tokenizer: with the special tokens. codes: how many image codes there are. max_text: see `ShowOConfig.max_text_tokens`.
    Raises UserError when the tokenizer is not one of Show-o.
    """

    tokenizer: Any
    codes: int
    max_text: int

    def __post_init__(self) -> None:
        ids = self.tokenizer.convert_tokens_to_ids([PAD, *SPECIAL])
        wanted = list(range(len(self.tokenizer) - 1 - len(SPECIAL), len(self.tokenizer)))
        if ids != wanted or self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the checkpoint's tokenizer does not end with {PAD} and Show-o's special tokens in upstream's order; "
                "its tokenizer files are another model's: convert the checkpoint again"
            )

    def _id(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    @property
    def pad(self) -> int:
        return self._id(PAD)

    @property
    def begin(self) -> int:
        """The id of the picture's begin."""
        return self._id("<|soi|>")

    @property
    def end(self) -> int:
        """The id of the picture's end."""
        return self._id("<|eoi|>")

    @property
    def text_end(self) -> int:
        """The id that begins and ends text."""
        return self.tokenizer.eos_token_id

    @property
    def offset(self) -> int:
        """The id of code 0."""
        return len(self.tokenizer)

    @property
    def mask(self) -> int:
        return self.offset + self.codes

    @property
    def vocabulary(self) -> int:
        return self.mask + 1

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def drawing(self, prompt: str) -> list[int]:
        """Return what stands before a drawing. An empty prompt is that of unconditional rows."""
        ids = self.text(prompt)
        if not ids or ids[0] != self.text_end:
            ids = [self.text_end, *ids]
        ids = [self._id("<|t2i|>"), *ids, self.text_end]
        return ids if len(ids) <= self.max_text + 1 else [*ids[: self.max_text], self.text_end]

    def asking(self, codes: list[int], question: str, prefix: str = "") -> list[int]:
        """Return a question about a picture that is seen through its codes, up to the answer's first token."""
        picture = [self.begin, *(self.offset + code for code in codes), self.end]
        return [self._id("<|mmu|>"), *picture, self.text_end, *self.text(f"USER: \n{question} ASSISTANT:{prefix}")]

    def asking_tower(self, question: str, prefix: str = "") -> tuple[list[int], int]:
        """Return a question about a picture that a CLIP tower sees, and the column before which its features belong."""
        before = [self._id("<|mmu|>"), *self.text(SYSTEM), self.begin]
        return [*before, self.end, *self.text(f"USER: {question} ASSISTANT:{prefix}")], len(before)
